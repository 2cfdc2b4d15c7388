//! Doing it, over connections that the caller gives.

use std::io::{ErrorKind, Read, Write};
use std::ops::ControlFlow;

use serde::Serialize;
use stead_agent_link::Bytes;
use stead_agent_link::files::{
    Content, Copied, CopyError, Download, Entry, FileAttributes, FileChannel, FileErrorKind,
    FileKind, Guest, Progress, Replace, Upload,
};
use stead_engine::{EngineError, Kind, Result, Watch};

use super::report::{CopiedReport, FileReport};
use super::{CpArgs, FileCommand, MkdirArgs, PutArgs, StatArgs, Way};

/// Gives a connection to the guest; called once more for each that breaks.
pub type Connect<'a> = dyn FnMut() -> Result<Box<dyn FileChannel>> + 'a;

/// How many connections of one copy may break.
const MAX_BROKEN: usize = 3;
/// Zeros to print for holes.
const ZEROS: [u8; 4096] = [0; 4096];

/// Copies over the connections that `connect` gives, and goes on over the next one when one breaks.
///
/// # Errors
/// [`EngineError`] says at which file it ended; those before it are whole.
pub fn run(
    args: &CpArgs,
    way: Way,
    watch: &Watch,
    connect: &mut Connect<'_>,
) -> Result<CopiedReport> {
    let options = args.options();
    let mut listener = |progress: &Progress<'_>| tell(watch, progress);
    match way {
        Way::In(from, to) => {
            let mut upload = Upload::new(from, to.path, options);
            over(connect, &mut |guest| upload.run(guest, &mut listener))
        }
        Way::Out(from, to) => {
            let mut download = Download::new(from.path, to, options);
            over(connect, &mut |guest| download.run(guest, &mut listener))
        }
    }
}

fn over(
    connect: &mut Connect<'_>,
    copy: &mut dyn FnMut(&mut Guest<'_>) -> std::result::Result<Copied, CopyError>,
) -> Result<CopiedReport> {
    let mut broken = 0;
    loop {
        let mut channel = connect()?;
        match copy(&mut Guest::new(channel.as_mut())) {
            Ok(copied) => return Ok(copied.into()),
            Err(error) if error.is_broken_channel() && broken < MAX_BROKEN => broken += 1,
            Err(error) => return Err(failed("copy", error)),
        }
    }
}

fn tell(watch: &Watch, progress: &Progress<'_>) -> ControlFlow<()> {
    let what = String::from_utf8_lossy(&progress.path.0);
    watch.progress(&what, progress.done_bytes, progress.total_bytes);
    match watch.is_cancelled() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

/// One command on files, with its input and output.
///
/// # Errors
/// [`EngineError`] says what the guest or the host could not.
pub fn run_file(
    command: &FileCommand,
    json: bool,
    channel: &mut dyn FileChannel,
    input: &mut dyn Read,
    output: &mut dyn Write,
) -> Result<()> {
    let mut guest = Guest::new(channel);
    let path = &command.at().path;
    match command {
        FileCommand::Ls(_) => list(&mut guest, path, json, output),
        FileCommand::Stat(args) => stat(&mut guest, args, json, output),
        FileCommand::Cat(_) => cat(&mut guest, path, output),
        FileCommand::Put(args) => put(&mut guest, args, input),
        FileCommand::Mkdir(args) => make_folder(&mut guest, args),
        FileCommand::Rm(args) => guest
            .remove(path, args.recursive)
            .and_then(|()| sync_above(&mut guest, path))
            .map_err(|error| failed("remove", error)),
    }
}

fn list(guest: &mut Guest<'_>, path: &Bytes, json: bool, output: &mut dyn Write) -> Result<()> {
    let failed = |error| failed("list", error);
    let mut entries: Vec<Entry> = Vec::new();
    guest
        .list(path, true, &mut |page| {
            entries.extend(page);
            true
        })
        .map_err(failed)?;
    entries.sort_by(|one, other| one.name.0.cmp(&other.name.0));
    let mut reports = Vec::with_capacity(entries.len());
    for Entry { name, metadata } in &entries {
        let target = match metadata.kind == FileKind::Symlink {
            true => Some(guest.read_link(&below(path, name)).map_err(failed)?),
            false => None,
        };
        reports.push(FileReport::new(name, metadata, target.as_ref()));
    }
    match json {
        true => print_json(&reports, output),
        false => reports
            .iter()
            .try_for_each(|report| writeln!(output, "{}", report.line())),
    }
    .map_err(unprinted)
}

fn stat(guest: &mut Guest<'_>, args: &StatArgs, json: bool, output: &mut dyn Write) -> Result<()> {
    let path = &args.path.at.path;
    let failed = |error| failed("examine", error);
    let metadata = guest.stat(path, args.follow).map_err(failed)?;
    let target = match metadata.kind == FileKind::Symlink {
        true => Some(guest.read_link(path).map_err(failed)?),
        false => None,
    };
    let report = FileReport::new(path, &metadata, target.as_ref());
    match json {
        true => print_json(&report, output),
        false => writeln!(output, "{}", report.line()),
    }
    .map_err(unprinted)
}

/// Prints a file as it comes: whether it is whole is said by the exit status.
fn cat(guest: &mut Guest<'_>, path: &Bytes, output: &mut dyn Write) -> Result<()> {
    let mut print = |content: &Content| match content {
        Content::Data(data) => output.write_all(&data.0),
        Content::Hole(length) => print_zeros(*length, output),
    };
    guest
        .read(path, &mut |content| {
            print(content).map_err(|source| CopyError::Local {
                attempted: "write to",
                path: "standard output".into(),
                source,
            })
        })
        .map_err(|error| failed("print", error))?;
    output.flush().map_err(unprinted)
}

fn print_zeros(length: u64, output: &mut dyn Write) -> std::io::Result<()> {
    let mut left = length;
    while left > 0 {
        let step = usize::try_from(left).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
        output.write_all(&ZEROS[..step])?;
        left -= step as u64;
    }
    Ok(())
}

fn put(guest: &mut Guest<'_>, args: &PutArgs, input: &mut dyn Read) -> Result<()> {
    let attributes = FileAttributes {
        mode: args.mode,
        ..FileAttributes::default()
    };
    let replace = match args.keep {
        true => Replace::No,
        false => Replace::Yes,
    };
    guest
        .write(&args.path.at.path, input, attributes, replace)
        .map_err(|error| failed("write", error))?;
    Ok(())
}

fn make_folder(guest: &mut Guest<'_>, args: &MkdirArgs) -> Result<()> {
    let path = &args.path.at.path;
    guest
        .make_folder(path, args.parents, args.mode)
        .and_then(|()| guest.sync(path))
        .map_err(|error| failed("make a folder", error))
}

/// What was changed about a name is on the disk.
fn sync_above(guest: &mut Guest<'_>, path: &Bytes) -> std::result::Result<(), CopyError> {
    let end = path.0.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    guest.sync(&path.0[..end.max(1)].into())
}

fn below(folder: &Bytes, name: &Bytes) -> Bytes {
    let mut path = folder.0.clone();
    path.push(b'/');
    path.extend_from_slice(&name.0);
    path.into()
}

fn print_json<T: Serialize>(value: &T, output: &mut dyn Write) -> std::io::Result<()> {
    serde_json::to_writer_pretty(&mut *output, value)?;
    writeln!(output)
}

fn unprinted(source: std::io::Error) -> EngineError {
    EngineError::new(Kind::Internal, "write to standard output", "").because(source)
}

fn failed(attempt: &str, error: CopyError) -> EngineError {
    let (kind, next) = sort(&error);
    let failed = EngineError::new(kind, attempt, "").because(error);
    match next {
        Some(next) => failed.next(next),
        None => failed,
    }
}

/// Which exit status an error has, and what helps.
fn sort(error: &CopyError) -> (Kind, Option<&'static str>) {
    match error {
        CopyError::Guest(error) => sort_guest(error.kind),
        CopyError::Channel { .. } => (
            Kind::Agent,
            Some("run the same command again: it goes on with the file at which it ended"),
        ),
        CopyError::Protocol { .. } => (Kind::Agent, None),
        CopyError::Local { source, .. } => sort_local(source.kind()),
        CopyError::LocalChanged { .. } | CopyError::GuestChanged { .. } => (
            Kind::Conflict,
            Some("copy it when nothing writes it, or stop what does"),
        ),
        CopyError::Damaged { .. } => (Kind::Damaged, Some("run the same command again")),
        CopyError::Special { .. } => (Kind::Usage, Some("leave such files out: --skip-special")),
        CopyError::Limit { .. } | CopyError::Place { .. } => (Kind::Usage, None),
        CopyError::Interrupted => (
            Kind::Cancelled,
            Some("run the same command again: it goes on with the file at which it ended"),
        ),
    }
}

fn sort_local(kind: ErrorKind) -> (Kind, Option<&'static str>) {
    if kind == ErrorKind::NotFound {
        return (Kind::NotFound, Some("see that the path is right"));
    }
    match kind == ErrorKind::StorageFull || kind == ErrorKind::QuotaExceeded {
        true => (Kind::NoSpace, None),
        false => (
            Kind::Usage,
            Some("see that the path is right and may be used"),
        ),
    }
}

fn sort_guest(kind: FileErrorKind) -> (Kind, Option<&'static str>) {
    match kind {
        FileErrorKind::NotFound => (Kind::NotFound, Some("`stead file ls` lists what there is")),
        FileErrorKind::Exists | FileErrorKind::NotEmpty => (Kind::Conflict, Some("choose another")),
        FileErrorKind::NotAFolder
        | FileErrorKind::IsAFolder
        | FileErrorKind::Special
        | FileErrorKind::Invalid => (Kind::Usage, Some("`stead file stat` says what it is")),
        FileErrorKind::NoSpace => (Kind::NoSpace, Some("make room in the guest")),
        FileErrorKind::Denied | FileErrorKind::ReadOnly => (
            Kind::Usage,
            Some("choose a place in the guest that can be written to"),
        ),
        FileErrorKind::Changed | FileErrorKind::Busy => (
            Kind::Conflict,
            Some("try again when nothing else writes it"),
        ),
        FileErrorKind::Damaged => (Kind::Damaged, Some("run the same command again")),
        FileErrorKind::Other => (Kind::Agent, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cp::{GuestPath, GuestPathArgs};
    use stead_agent_link::files::{
        ChannelError, FileInput, FileReply, FileRequest, FileTime, Metadata, Owner,
    };

    /// A guest with one folder, in which is one link.
    struct OneLink {
        reply: Option<FileReply>,
    }

    impl FileChannel for OneLink {
        fn request(&mut self, request: FileRequest) -> std::result::Result<(), ChannelError> {
            let metadata = Metadata {
                kind: FileKind::Symlink,
                mode: 0o777,
                owner: Owner { uid: 0, gid: 0 },
                length_bytes: 3,
                allocated_bytes: 0,
                links: 1,
                modified: FileTime {
                    seconds: 0,
                    nanoseconds: 0,
                },
            };
            let is_list = matches!(request, FileRequest::List { .. });
            self.reply = Some(match is_list {
                true => FileReply::Entries {
                    entries: vec![Entry {
                        name: "\u{1b}[2J".into(),
                        metadata,
                    }],
                    last: true,
                },
                false => FileReply::Link("x\ny".into()),
            });
            Ok(())
        }

        fn send(&mut self, input: FileInput) -> std::result::Result<(), ChannelError> {
            panic!("nothing is written: {input:?}")
        }

        fn receive(&mut self) -> std::result::Result<FileReply, ChannelError> {
            self.reply
                .take()
                .ok_or_else(|| ChannelError::new("no more"))
        }

        fn poll(&mut self) -> std::result::Result<Option<FileReply>, ChannelError> {
            Ok(None)
        }
    }

    #[test]
    fn a_name_that_a_terminal_would_obey_is_shown_escaped() {
        let at = GuestPath {
            sandbox: "web".to_owned(),
            path: "/d".into(),
        };
        let command = FileCommand::Ls(GuestPathArgs { at });
        let show = |json| {
            let mut output = Vec::new();
            let mut channel = OneLink { reply: None };
            run_file(
                &command,
                json,
                &mut channel,
                &mut std::io::empty(),
                &mut output,
            )
            .expect("listed");
            String::from_utf8(output).expect("text")
        };
        let line = show(false);
        assert!(line.ends_with("\\u{1b}[2J -> x\\ny\n"), "{line}");
        let value: serde_json::Value = serde_json::from_str(&show(true)).expect("JSON");
        assert_eq!(value[0]["name"], "\u{1b}[2J");
        assert_eq!(value[0]["kind"], "symlink");
    }

    #[test]
    fn a_copy_is_gone_on_with_over_a_few_more_connections_and_not_for_ever() {
        let words = ["web:/f", "."].map(std::ffi::OsString::from);
        let [source, target] = words;
        let args = CpArgs {
            archive: false,
            follow: false,
            skip_special: false,
            source,
            target,
        };
        let mut connections = 0;
        let error = run(
            &args,
            args.way().expect("a way"),
            &Watch::silent(),
            &mut || {
                connections += 1;
                Ok(Box::new(Silent))
            },
        )
        .expect_err("broken");
        assert_eq!((connections, error.kind()), (1 + MAX_BROKEN, Kind::Agent));
    }

    struct Silent;

    impl FileChannel for Silent {
        fn request(&mut self, _request: FileRequest) -> std::result::Result<(), ChannelError> {
            Ok(())
        }

        fn send(&mut self, _input: FileInput) -> std::result::Result<(), ChannelError> {
            Err(ChannelError::new("silent"))
        }

        fn receive(&mut self) -> std::result::Result<FileReply, ChannelError> {
            Err(ChannelError::new("silent"))
        }

        fn poll(&mut self) -> std::result::Result<Option<FileReply>, ChannelError> {
            Err(ChannelError::new("silent"))
        }
    }
}
