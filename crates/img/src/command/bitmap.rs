//! `bitmap`: dirty bitmaps that an image keeps, added, removed and changed.

use stead_qcow2::edit::Editor;
use stead_qcow2::ops::bitmap::{self, Action, Step};
use stead_qcow2::{Error, GRANULARITY_BITS, Layer};

use crate::command::Command;
use crate::common::{self, FORMAT, IMAGE_OPTS, LONG_PROGRESS, OBJECT};
use crate::console::Console;
use crate::editing;
use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::opened::{self, ReadLock, Sharing};
use crate::progress::watched;
use crate::reference;
use crate::report::{self, DRY_RUN, JSON};

pub(crate) const COMMAND: Command = Command {
    name: "bitmap",
    about: "Add, remove and change dirty bitmaps",
    usage: "(--add [-g SIZE] | --remove | --clear | --enable | --disable | --merge NAME [-b FILE2 [-F FMT]])... \
            [-f FMT | --image-opts] [--dry-run] [--json] FILE BITMAP",
    help: "All that is asked is done to BITMAP, in that order and in one step: after an error or a crash the image is \
           as it was.\n\n\
           \x20     --add             add it, empty, recording writes\n\
           \x20 -g, --granularity SIZE\n\
           \x20                       how many bytes one of its bits stands for: a power of 2 from 512 to 2G\n\
           \x20     --remove          remove it\n\
           \x20     --clear           forget what it has marked\n\
           \x20     --enable          record writes from now on\n\
           \x20     --disable         record no writes from now on\n\
           \x20     --merge NAME      mark also what the bitmap NAME has marked\n\
           \x20 -b, --source-file FILE2\n\
           \x20                       the image that NAME is in; else it is FILE\n\
           \x20 -F, --source-format FMT\n\
           \x20                       its format\n\
           \x20 -f, --format FMT      the format of FILE; else its first bytes tell\n\
           \x20     --image-opts      FILE is an option string\n\
           \x20     --progress        show how far it is\n\
           \x20     --dry-run         only say how much room it takes\n\
           \x20     --json            say as JSON what was done\n\n\
           Example:\n  {program} bitmap --add --merge monday disk.qcow2 week\n",
    opts: &[
        Opt::flag("add", "", &["add"]),
        Opt::flag("remove", "", &["remove"]),
        Opt::flag("clear", "", &["clear"]),
        Opt::flag("enable", "", &["enable"]),
        Opt::flag("disable", "", &["disable"]),
        Opt::value("merge", "", &["merge"]),
        Opt::value("granularity", "g", &["granularity"]),
        Opt::value("source-file", "b", &["source-file"]),
        Opt::value("source-format", "F", &["source-format"]),
        FORMAT,
        OBJECT,
        IMAGE_OPTS,
        LONG_PROGRESS,
        DRY_RUN,
        JSON,
    ],
    run,
    last_is_operand: false,
};

fn run(parsed: &Parsed, console: &mut Console) -> Outcome<u8> {
    let granularity = common::text(parsed, "granularity");
    let granularity = granularity.map(|text| common::size(&text, "granularity"));
    let granularity = granularity.transpose()?.filter(|bytes| *bytes > 0);
    let asked = asked(parsed);
    check_combinations(parsed, &asked)?;
    let [name, bitmap] = parsed.operands.as_slice() else {
        return Err(Failure::new("Expecting filename and bitmap name"));
    };
    let (image, format) = editing::image(parsed, name, console)?;
    let change = Change {
        bitmap: bitmap.to_string_lossy().into_owned(),
        granularity,
        asked,
    };
    if format == Format::Raw {
        return Err(change.refuse_raw(&image.given));
    }
    let mut editor = editing::editor(&image)?;
    let source = source(parsed)?;
    change.check(&editor, source.as_ref())?;
    let steps = change.steps(source.as_ref().and_then(|source| source.layer.as_ref()));
    if parsed.has(DRY_RUN.id) {
        let plan = watched(parsed, |control| {
            bitmap::plan_with(&editor, &steps, control)
        });
        let plan = plan.map_err(|error| change.failed(&editor, &steps, &error))?;
        report::planned(parsed, &plan, console)?;
        return Ok(0);
    }
    let done = watched(parsed, |control| {
        bitmap::change_with(&mut editor, &steps, control)
    });
    let done = done.map_err(|error| change.failed(&editor, &steps, &error))?;
    report::done(parsed, &done, "", console)?;
    Ok(0)
}

/// The option for what is merged.
const MERGE: &str = "merge";

/// What is asked to be done to the bitmap.
#[derive(Debug, Clone)]
enum Asked {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    /// The bitmap of that name is merged into it.
    Merge(String),
}

impl Asked {
    fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => MERGE,
        }
    }
}

/// In the order in which it stands on the command line.
fn asked(parsed: &Parsed) -> Vec<Asked> {
    let mut asked = Vec::new();
    for (id, value) in parsed.given() {
        asked.push(match id {
            "add" => Asked::Add,
            "remove" => Asked::Remove,
            "clear" => Asked::Clear,
            "enable" => Asked::Enable,
            "disable" => Asked::Disable,
            MERGE => Asked::Merge(value.to_string_lossy().into_owned()),
            _ => continue,
        });
    }
    asked
}

fn check_combinations(parsed: &Parsed, asked: &[Asked]) -> Outcome<()> {
    let has = |id| parsed.has(id);
    let refusals = [
        (
            asked.is_empty(),
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ),
        (
            has("granularity") && !has("add"),
            "granularity only supported with --add",
        ),
        (
            has("source-format") && !has("source-file"),
            "-F only supported with -b",
        ),
        (
            has("source-file") && !has(MERGE),
            "Merge bitmap source file only supported with --merge",
        ),
    ];
    match refusals.iter().find(|(refused, _)| *refused) {
        Some((_, text)) => Err(Failure::new(*text)),
        None => Ok(()),
    }
}

/// The image that bitmaps are merged from.
struct Source {
    /// `None`: a raw disk, which has none.
    layer: Option<Layer>,
    #[expect(dead_code, reason = "it is held, not used")]
    lock: ReadLock,
}

fn source(parsed: &Parsed) -> Outcome<Option<Source>> {
    let Some(name) = parsed.last("source-file") else {
        return Ok(None);
    };
    let given = name.to_string_lossy();
    let cannot = |why: String| Failure::new(format!("Could not open '{given}': {why}"));
    let mut image = reference::from_name(name).map_err(cannot)?;
    if let Some(format) = common::text(parsed, "source-format") {
        let known = Format::by_name(&format);
        image.format = Some(known.ok_or_else(|| cannot(format!("Unknown driver '{format}'")))?);
    }
    let format = opened::format_of(&image)?;
    let lock = opened::lock(&image, Sharing::Locked)?;
    let layer = match format {
        Format::Qcow2 => Some(opened::inspect(&image)?),
        Format::Raw => None,
    };
    Ok(Some(Source { layer, lock }))
}

/// The change of one bitmap.
struct Change {
    bitmap: String,
    /// In bytes.
    granularity: Option<u64>,
    asked: Vec<Asked>,
}

impl Change {
    /// The failure of one thing that was asked. What stands on more lines than one goes below.
    fn not_done(&self, asked: &Asked, why: &str) -> Failure {
        let (what, bitmap) = (asked.name(), &self.bitmap);
        Failure::lines(
            &format!("Operation {what} on bitmap {bitmap} failed: "),
            why,
        )
    }

    /// A raw disk keeps none.
    fn refuse_raw(&self, image: &str) -> Failure {
        let [first, ..] = self.asked.as_slice() else {
            unreachable!("at least one was asked");
        };
        let why = match first {
            Asked::Add => {
                format!("Can't store persistent bitmaps to {image}: Operation not supported")
            }
            Asked::Remove | Asked::Clear | Asked::Enable | Asked::Disable | Asked::Merge(_) => {
                not_found(&self.bitmap)
            }
        };
        self.not_done(first, &why)
    }

    /// Looks for what can be known to fail before anything is done.
    fn check(&self, editor: &Editor, source: Option<&Source>) -> Outcome<()> {
        let own = editor.layer();
        let mut known = Known::of(Some(own))?;
        let from = source.map(|source| Known::of(source.layer.as_ref()));
        let from = from.transpose()?;
        let layer = source.and_then(|source| source.layer.as_ref());
        let lengths = layer.map(|layer| (own.virtual_size(), layer.virtual_size()));
        for asked in &self.asked {
            let checked = match asked {
                Asked::Add => known.add(&self.bitmap, self.granularity),
                Asked::Remove => known.remove(&self.bitmap),
                Asked::Clear | Asked::Enable | Asked::Disable => known.require(&self.bitmap),
                Asked::Merge(other) => known
                    .require(&self.bitmap)
                    .and_then(|()| from.as_ref().unwrap_or(&known).require(other))
                    .and_then(|()| require_same_length(lengths)),
            };
            checked.map_err(|why| self.not_done(asked, &why))?;
        }
        Ok(())
    }

    fn steps<'a>(&'a self, source: Option<&'a Layer>) -> Vec<Step<'a>> {
        let step = |asked: &'a Asked| Step {
            bitmap: self.bitmap.as_bytes(),
            action: match asked {
                Asked::Add => Action::Add {
                    granularity_bits: self.granularity.and_then(bits_of),
                    enabled: true,
                },
                Asked::Remove => Action::Remove,
                Asked::Clear => Action::Clear,
                Asked::Enable => Action::Enable,
                Asked::Disable => Action::Disable,
                Asked::Merge(other) => Action::Merge {
                    source: other.as_bytes(),
                    image: source,
                },
            },
        };
        self.asked.iter().map(step).collect()
    }

    /// The failure, named after the first step that cannot be done.
    fn failed(&self, editor: &Editor, steps: &[Step<'_>], error: &Error) -> Failure {
        if let Error::Cancelled { .. } = error {
            return Failure::new(error.to_string()).because_of(error);
        }
        let fails = |count: &usize| bitmap::plan(editor, &steps[..*count]).is_err();
        let count = (1..=steps.len()).find(fails).unwrap_or(steps.len());
        self.not_done(&self.asked[count - 1], &error.to_string())
    }
}

/// The bitmaps that an image has: their names, and whether each can be used.
struct Known {
    all: Vec<(Vec<u8>, bool)>,
}

impl Known {
    /// Those that can be trusted.
    fn of(layer: Option<&Layer>) -> Outcome<Self> {
        let stored = layer.map(Layer::stored_bitmaps).transpose()?;
        let stored = stored.unwrap_or_default().into_iter();
        Ok(Self {
            all: stored.map(|one| (one.name, !one.in_use)).collect(),
        })
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.all.iter().position(|(own, _)| own == name.as_bytes())
    }

    fn add(&mut self, name: &str, granularity: Option<u64>) -> Result<(), String> {
        if name.is_empty() {
            return Err("Bitmap name cannot be empty".into());
        }
        if granularity.is_some_and(|bytes| bits_of(bytes).is_none()) {
            return Err("Granularity must be power of 2 and at least 512".into());
        }
        if self.find(name).is_some() {
            return Err(format!("Bitmap already exists: {name}"));
        }
        self.all.push((name.into(), true));
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), String> {
        let index = self.find(name).ok_or_else(|| not_found(name))?;
        self.all.remove(index);
        Ok(())
    }

    fn require(&self, name: &str) -> Result<(), String> {
        let index = self.find(name).ok_or_else(|| not_found(name))?;
        match self.all[index] {
            (_, true) => Ok(()),
            (_, false) => Err(format!(
                "Bitmap '{name}' is inconsistent and cannot be used\n\
                 It was not saved when the image was last used; it can only be removed (--remove)."
            )),
        }
    }
}

fn not_found(name: &str) -> String {
    format!("Dirty bitmap '{name}' not found")
}

/// The disks of the target and the source, where that is another image.
fn require_same_length(lengths: Option<(u64, u64)>) -> Result<(), String> {
    match lengths {
        Some((to, from)) if to != from => Err(format!(
            "Bitmaps are of different sizes (destination size is {to}, source size is {from}) and can't be merged"
        )),
        Some(_) | None => Ok(()),
    }
}

/// A granularity as a power of two.
fn bits_of(bytes: u64) -> Option<u8> {
    let bits = u8::try_from(bytes.checked_ilog2()?).ok()?;
    (bytes.is_power_of_two() && GRANULARITY_BITS.contains(&bits)).then_some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granularities_are_powers_of_two_from_512_bytes_to_2_gib() {
        for (bytes, bits) in [(512, 9), (1 << 16, 16), (1 << 31, 31)] {
            assert_eq!(bits_of(bytes), Some(bits));
        }
        for bytes in [0, 1, 256, 1000, 1 << 32, u64::MAX] {
            assert_eq!(bits_of(bytes), None, "{bytes}");
        }
    }
}
