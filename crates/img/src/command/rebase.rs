//! `rebase`: another backing file, or none.

use stead_qcow2::ops::rebase::{self, BackingFile, NewBacking};
use stead_qcow2::{DiskContent, Error};

use crate::command::Command;
use crate::common::{
    self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, RECORD_BACKING,
};
use crate::console::Console;
use crate::editing;
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::new_image;
use crate::opened::{OpenedChain, Sharing};
use crate::progress::{self, watched};
use crate::reference::Reference;
use crate::report::{self, DRY_RUN, JSON};

pub(crate) const COMMAND: Command = Command {
    name: "rebase",
    about: "Give an image another backing file, or none",
    usage: "[-f FMT | --image-opts] [-u] [-b NAME [-F FMT]] [-p] [-q] [-U] [-t CACHE] [-T CACHE] [--record-backing] [--dry-run] [--json] FILE",
    help: "What the active disk and every internal snapshot show stays: where the new file below shows something else, \
           the image gets the old bytes itself. It is changed in one step: after an error or a crash it is as it was.\n\n\
           \x20 -b, --backing NAME    the new backing file, which starts in FILE's folder; \"\": none, FILE gets everything\n\
           \x20 -F, --backing-format FMT\n\
           \x20                       its format\n\
           \x20 -u, --backing-unsafe  change only the name, for a file that was moved; without -b: none\n\
           \x20 -f, --format FMT      the format of FILE; else its first bytes tell\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20 -p, --progress        show how far it is\n\
           \x20     --record-backing  read all of the new file and record what it shows, for check --backing; with -b and the\n\
           \x20                       present file nothing else changes\n\
           \x20     --dry-run         only say how much room it takes\n\
           \x20     --json            say as JSON what was done\n\
           \x20 -q, --quiet           print nothing\n\
           \x20 -U, --force-share     read the files below though somebody may write to them\n\
           \x20 -t, -T                accepted for scripts\n\n\
           Example:\n  {program} rebase -b new-base.qcow2 -F qcow2 disk.qcow2\n",
    opts: &[
        FORMAT,
        Opt::value("backing-format", "F", &["backing-format"]),
        Opt::value("backing", "b", &["backing"]),
        Opt::flag("unsafe", "u", &["backing-unsafe"]),
        Opt::value("cache", "t", &["cache"]),
        Opt::value("source-cache", "T", &["source-cache"]),
        PROGRESS,
        QUIET,
        FORCE_SHARE,
        OBJECT,
        IMAGE_OPTS,
        RECORD_BACKING,
        DRY_RUN,
        JSON,
    ],
    run,
    last_is_operand: false,
};

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let name = common::one_operand(parsed, console.program())?;
    let wanted = Wanted::read(parsed, console.program())?;
    common::cache_mode(parsed, "cache", "cache")?;
    common::cache_mode(parsed, "source-cache", "source cache")?;
    let (image, format) = editing::image(parsed, name, console)?;
    if format == Format::Raw {
        wanted.require_known_format()?;
        return Err(wanted.cannot("Operation not supported"));
    }
    match parsed.has("unsafe") {
        true => rename(parsed, &image, &wanted, console)?,
        false => keep(parsed, &image, &wanted, console)?,
    }
    Ok(0)
}

/// What the user wants below the image.
struct Wanted {
    /// As it is written; empty: nothing.
    name: Option<String>,
    format: Option<String>,
}

impl Wanted {
    fn read(parsed: &Parsed, program: &str) -> Outcome<Self> {
        let wanted = Self {
            name: common::text(parsed, "backing"),
            format: common::text(parsed, "backing-format"),
        };
        if parsed.has(RECORD_BACKING.id) && (wanted.name().is_none() || parsed.has("unsafe")) {
            let text = "--record-backing is for a backing file (-b) that is looked at (without -u)";
            return Err(Failure::usage(program, text));
        }
        if wanted.name.is_none() && !parsed.has("unsafe") {
            let text = "Must specify backing file (-b) or use unsafe mode (-u)";
            return Err(Failure::usage(program, text));
        }
        Ok(wanted)
    }

    /// The file's name, if there is to be one.
    fn name(&self) -> Option<&str> {
        self.name.as_deref().filter(|name| !name.is_empty())
    }

    /// How the image is to say it.
    fn file(&self) -> Option<BackingFile<'_>> {
        Some(BackingFile {
            name: self.name()?.as_bytes(),
            format: self.format.as_deref().map(str::as_bytes),
        })
    }

    fn require_known_format(&self) -> Outcome<()> {
        match &self.format {
            Some(format) if Format::by_name(format).is_none() => {
                Err(Failure::new(format!("Invalid format name: '{format}'")))
            }
            Some(_) | None => Ok(()),
        }
    }

    /// So that nobody has to guess it.
    fn require_format(&self) -> Outcome<()> {
        match (self.name(), &self.format) {
            (Some(_), None) => Err(self.cannot("backing format must be specified")),
            (None, _) | (Some(_), Some(_)) => Ok(()),
        }
    }

    /// The disk that it is.
    fn disk(&self, image: &Reference, sharing: Sharing) -> Outcome<Option<OpenedChain>> {
        let Some(name) = self.name() else {
            return Ok(None);
        };
        let format = self.format.as_deref();
        let opened = new_image::below_shared(&image.path, name, format, sharing);
        let opened = opened.map_err(|why| {
            Failure::lines(&format!("Could not open new backing file '{name}': "), &why)
        })?;
        Ok(Some(opened))
    }

    fn cannot(&self, why: &str) -> Failure {
        let name = self.name.as_deref().unwrap_or("(null)");
        let text = format!("Could not change the backing file to '{name}': {why}");
        Failure::new(text)
    }

    fn failed(&self, error: &Error) -> Failure {
        match self.name() {
            Some(name) if name.len() > MAX_NAME_BYTES => {
                self.cannot("Invalid argument").with_more(error.to_string())
            }
            Some(_) | None => self.cannot(&error.to_string()).because_of(error),
        }
    }
}

/// The longest name of a backing file that an image can say, in bytes.
const MAX_NAME_BYTES: usize = 1023;

/// The name alone.
fn rename(
    parsed: &Parsed,
    image: &Reference,
    wanted: &Wanted,
    console: &mut Console,
) -> Outcome<()> {
    let mut editor = editing::editor(image)?;
    wanted.require_known_format()?;
    wanted.require_format()?;
    let new = wanted.file();
    let failed = |error: Error| wanted.failed(&error);
    if parsed.has(DRY_RUN.id) {
        let plan = editor.plan(|edit| {
            edit.set_backing(new.map(|file| (file.name, file.format)));
            Ok(())
        });
        return report::planned(parsed, &plan.map_err(failed)?, console);
    }
    let done = watched(parsed, |_| rebase::rename(&mut editor, new)).map_err(failed)?;
    report::done(parsed, &done, "", console)
}

/// Another file below, or none, and every disk state shows what it showed.
fn keep(parsed: &Parsed, image: &Reference, wanted: &Wanted, console: &mut Console) -> Outcome<()> {
    let mut editor = editing::editor(image)?;
    let sharing = Sharing::of(parsed);
    let old = editing::below(image, &editor, sharing)?;
    let old = old.as_ref().map(|opened| &opened.chain);
    wanted.require_known_format()?;
    let disk = wanted.disk(image, sharing)?;
    wanted.require_format()?;
    let failed = |error: Error| wanted.failed(&error);
    let content = match &disk {
        Some(opened) if parsed.has(RECORD_BACKING.id) => {
            let control = progress::stoppable();
            Some(DiskContent::of(&opened.chain, &control).map_err(failed)?)
        }
        Some(_) | None => None,
    };
    let new = disk
        .as_ref()
        .zip(wanted.file())
        .map(|(opened, file)| NewBacking {
            file,
            disk: &opened.chain,
            content,
        });
    if parsed.has(DRY_RUN.id) {
        let plan = watched(parsed, |control| {
            rebase::plan(&editor, old, new.as_ref(), control)
        });
        return report::planned(parsed, &plan.map_err(failed)?, console);
    }
    let done = watched(parsed, |control| {
        rebase::rebase(&mut editor, old, new.as_ref(), control)
    });
    let done = done.map_err(failed)?;
    report::done_with_bitmaps(parsed, &done, &done.value.bitmaps, console)
}
