//! `stead cp` and `stead file`: which side a path is on, and what is done there.

mod report;
mod run;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use stead_agent_link::Bytes;
use stead_agent_link::files::{CopyOptions, FileChannel};
use stead_engine::{Engine, EngineError, Kind, Result, Watch};
use tokio::runtime::Handle;
use tokio::task::block_in_place;

use crate::print;

/// `stead cp`.
#[derive(Debug, Args)]
pub struct CpArgs {
    /// Copy owners too, and with them set-user, set-group and sticky bits
    #[arg(long, short)]
    pub archive: bool,
    /// Follow SRC if it is a symlink; those below it never are
    #[arg(long, short = 'L')]
    pub follow: bool,
    /// Leave out devices, pipes and sockets, which else end the copy
    #[arg(long)]
    pub skip_special: bool,
    /// What is copied: PATH, or SANDBOX:PATH; with /. at its end, what is in the folder
    #[arg(value_name = "SRC")]
    pub source: OsString,
    /// Where to: PATH, or SANDBOX:PATH; into it if it is a folder
    #[arg(value_name = "DST")]
    pub target: OsString,
}

/// A path in a guest.
#[derive(Debug, Args)]
pub struct GuestPathArgs {
    /// SANDBOX:PATH
    #[arg(value_name = "SANDBOX:PATH", value_parser = guest_path)]
    pub at: GuestPath,
}

/// `stead file`.
#[derive(Debug, Subcommand)]
pub enum FileCommand {
    /// List a folder
    #[command(after_help = "Example:\n  stead file ls web:/etc")]
    Ls(GuestPathArgs),
    /// Show what a path stands for
    #[command(after_help = "Example:\n  stead file stat web:/etc/hostname")]
    Stat(StatArgs),
    /// Print a file
    #[command(after_help = "Example:\n  stead file cat web:/etc/hostname")]
    Cat(GuestPathArgs),
    /// Write a file with what comes from standard input; it appears when that has ended
    #[command(after_help = "Example:\n  echo hello | stead file put web:/root/greeting")]
    Put(PutArgs),
    /// Make a folder
    #[command(after_help = "Example:\n  stead file mkdir --parents web:/srv/data/in")]
    Mkdir(MkdirArgs),
    /// Remove a file, or with --recursive a folder
    #[command(after_help = "Example:\n  stead file rm --recursive web:/srv/data")]
    Rm(RemoveArgs),
}

/// `stead file stat`.
#[derive(Debug, Args)]
pub struct StatArgs {
    /// Follow a symlink
    #[arg(long, short = 'L')]
    pub follow: bool,
    #[command(flatten)]
    pub path: GuestPathArgs,
}

/// `stead file put`.
#[derive(Debug, Args)]
pub struct PutArgs {
    /// Permission bits [default: those of the file that is replaced, else 644]
    #[arg(long, value_name = "OCTAL", value_parser = mode)]
    pub mode: Option<u32>,
    /// Fail if there is such a file
    #[arg(long)]
    pub keep: bool,
    #[command(flatten)]
    pub path: GuestPathArgs,
}

/// `stead file mkdir`.
#[derive(Debug, Args)]
pub struct MkdirArgs {
    /// Make missing folders above it too; one that is there is no error
    #[arg(long, short)]
    pub parents: bool,
    /// Permission bits
    #[arg(long, value_name = "OCTAL", value_parser = mode, default_value = "755")]
    pub mode: u32,
    #[command(flatten)]
    pub path: GuestPathArgs,
}

/// `stead file rm`.
#[derive(Debug, Args)]
pub struct RemoveArgs {
    /// Remove a folder with everything in it
    #[arg(long, short)]
    pub recursive: bool,
    #[command(flatten)]
    pub path: GuestPathArgs,
}

/// A path in a sandbox's guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestPath {
    /// Name, id, or the beginning of an id.
    pub sandbox: String,
    /// Absolute.
    pub path: Bytes,
}

/// A path on either side.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Side {
    Host(PathBuf),
    Guest(GuestPath),
}

/// Which way a copy goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Into the guest.
    In(PathBuf, GuestPath),
    /// Out of it.
    Out(GuestPath, PathBuf),
}

impl Way {
    /// The sandbox whose guest is asked.
    pub fn sandbox(&self) -> &str {
        match self {
            Self::In(_, at) | Self::Out(at, _) => &at.sandbox,
        }
    }
}

impl FileCommand {
    /// The path that the command is about.
    pub fn at(&self) -> &GuestPath {
        match self {
            Self::Ls(path) | Self::Cat(path) => &path.at,
            Self::Stat(args) => &args.path.at,
            Self::Put(args) => &args.path.at,
            Self::Mkdir(args) => &args.path.at,
            Self::Rm(args) => &args.path.at,
        }
    }
}

/// What is before the first colon is a sandbox, unless there is a slash in it: `./a:b` is a file of the host.
fn side(word: &OsStr) -> std::result::Result<Side, String> {
    let bytes = word.as_bytes();
    let colon = bytes.iter().position(|byte| *byte == b':');
    let (name, path) = match colon {
        Some(at) if !bytes[..at].contains(&b'/') => (&bytes[..at], &bytes[at + 1..]),
        Some(_) | None => return Ok(Side::Host(PathBuf::from(word))),
    };
    let sandbox = std::str::from_utf8(name)
        .ok()
        .filter(|name| !name.is_empty())
        .ok_or_else(|| format!("{} names no sandbox before the colon", word.display()))?;
    // As seen from the root, the only folder that a guest is sure to have.
    let mut absolute = Vec::with_capacity(path.len() + 1);
    if path.first() != Some(&b'/') {
        absolute.push(b'/');
    }
    absolute.extend_from_slice(path);
    Ok(Side::Guest(GuestPath {
        sandbox: sandbox.to_owned(),
        path: absolute.into(),
    }))
}

fn guest_path(word: &str) -> std::result::Result<GuestPath, String> {
    match side(OsStr::new(word))? {
        Side::Guest(path) => Ok(path),
        Side::Host(_) => Err(format!("{word:?} is not SANDBOX:PATH")),
    }
}

fn mode(word: &str) -> std::result::Result<u32, String> {
    match u32::from_str_radix(word, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        Ok(_) | Err(_) => Err(format!("{word:?} is no mode; write for instance 644")),
    }
}

impl CpArgs {
    /// Which way the copy goes.
    ///
    /// # Errors
    /// When both paths are on the same side.
    pub fn way(&self) -> Result<Way> {
        let read = |word: &OsStr| side(word).map_err(usage);
        match (read(&self.source)?, read(&self.target)?) {
            (Side::Host(from), Side::Guest(to)) => Ok(Way::In(from, to)),
            (Side::Guest(from), Side::Host(to)) => Ok(Way::Out(from, to)),
            (Side::Host(_), Side::Host(_)) => Err(usage("neither SRC nor DST is SANDBOX:PATH")),
            (Side::Guest(_), Side::Guest(_)) => Err(usage(
                "SRC and DST are both in guests: copy to the host first",
            )),
        }
    }

    fn options(&self) -> CopyOptions {
        CopyOptions {
            owners: self.archive,
            follow: self.follow,
            skip_special: self.skip_special,
            ..CopyOptions::default()
        }
    }
}

/// `stead cp`: copies, and returns the exit status.
///
/// # Errors
/// [`EngineError`] says at which file it ended; those before it are whole.
pub fn copy(engine: &Engine, args: &CpArgs, watch: &Watch, json: bool) -> Result<u8> {
    let way = args.way()?;
    let sandbox = way.sandbox().to_owned();
    let report = block_in_place(|| run::run(args, way, watch, &mut || connect(engine, &sandbox)))?;
    match (json, report.skipped) {
        (true, _) => return Ok(print::json(&report)),
        (false, 0) => {}
        (false, skipped) => watch.notice(format!("{skipped} special files were left out")),
    }
    Ok(0)
}

/// `stead file`: does it, and returns the exit status.
///
/// # Errors
/// [`EngineError`] says what the guest or the host could not.
pub fn file(engine: &Engine, command: &FileCommand, json: bool) -> Result<u8> {
    block_in_place(|| {
        let mut channel = connect(engine, &command.at().sandbox)?;
        let (mut input, mut output) = (std::io::stdin(), std::io::stdout());
        run::run_file(command, json, channel.as_mut(), &mut input, &mut output)
    })?;
    Ok(0)
}

fn connect(engine: &Engine, sandbox: &str) -> Result<Box<dyn FileChannel>> {
    let files = Handle::current().block_on(engine.files(sandbox))?;
    Ok(Box::new(files))
}

fn usage(found: impl Into<String>) -> EngineError {
    EngineError::new(Kind::Usage, "copy", found.into()).left("nothing was changed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cp {
        #[command(flatten)]
        args: CpArgs,
    }

    #[derive(Debug, Parser)]
    struct File {
        #[command(subcommand)]
        command: FileCommand,
    }

    fn at(sandbox: &str, path: &str) -> GuestPath {
        GuestPath {
            sandbox: sandbox.to_owned(),
            path: path.into(),
        }
    }

    fn way(words: &[&str]) -> Result<Way> {
        let words = ["cp"].iter().chain(words);
        Cp::try_parse_from(words).expect("parsed").args.way()
    }

    #[test]
    fn what_stands_before_a_colon_is_a_sandbox_unless_there_is_a_slash_in_it() {
        let host = |path: &str| PathBuf::from(path);
        for (words, expected) in [
            (["a", "web:/b"], Way::In(host("a"), at("web", "/b"))),
            (["./x:y", "web:"], Way::In(host("./x:y"), at("web", "/"))),
            (["web:etc", "."], Way::Out(at("web", "/etc"), host("."))),
            (["web:/a:b", "/c"], Way::Out(at("web", "/a:b"), host("/c"))),
        ] {
            let found = way(&words).expect("one side each");
            assert_eq!(found, expected);
            assert_eq!(found.sandbox(), "web");
        }
        for words in [["a", "b"], ["a:/x", "b:/y"], [":/x", "b"]] {
            let error = way(&words).expect_err("no way");
            assert_eq!(error.kind(), Kind::Usage, "{words:?}");
        }
    }

    #[test]
    fn paths_that_are_no_text_are_copied_too() {
        let word = OsStr::from_bytes(b"web:/\xff\xfe");
        let Side::Guest(found) = side(word).expect("a path") else {
            panic!("of the host");
        };
        assert_eq!(found.path.0, b"/\xff\xfe");
    }

    #[test]
    fn the_options_of_a_copy_say_what_is_kept() {
        let parse = |words: &[&str]| {
            let words = ["cp"].iter().chain(words).chain(&["a", "b:c"]);
            Cp::try_parse_from(words).expect("parsed").args.options()
        };
        assert_eq!(parse(&[]), CopyOptions::default());
        let all = parse(&["-aL", "--skip-special"]);
        assert!(all.owners && all.follow && all.skip_special);
    }

    #[test]
    fn file_commands_take_paths_of_guests_and_modes_in_octal() {
        let parse = |words: &[&str]| {
            let words = ["file"].iter().chain(words);
            File::try_parse_from(words).map(|file| file.command)
        };
        let put = parse(&["put", "--mode", "600", "web:/a"]).expect("parsed");
        assert_eq!(put.at(), &at("web", "/a"));
        assert!(matches!(
            put,
            FileCommand::Put(PutArgs {
                mode: Some(0o600),
                ..
            })
        ));
        for words in [["ls", "/etc"], ["cat", ":/etc"], ["rm", "./a:b"]] {
            parse(&words).expect_err("no path of a guest");
        }
        for mode in ["8", "x", "17777", "-1", ""] {
            parse(&["mkdir", "--mode", mode, "web:/a"]).expect_err(mode);
        }
    }
}
