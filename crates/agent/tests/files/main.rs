//! Files between host and guest: both sides' logic joined in memory, each on folders of its own.

mod hostile;
mod joined;
mod tree;

use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use joined::Joined;
use rustix::fs::{CWD, FileType, Mode};
use stead_agent_link::files::{
    Content, Copied, CopyError, CopyOptions, Download, FileAttributes, FileErrorKind, FileKind,
    Guest, HashKind, Progress, Replace, Upload,
};
use stead_agent_proto::message::Bytes;
use tempfile::TempDir;

fn folder() -> TempDir {
    tempfile::tempdir().expect("temp dir")
}

fn bytes(path: &Path) -> Bytes {
    path.as_os_str().as_bytes().into()
}

fn quiet(_: &Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn upload(channel: &mut Joined, from: &Path, to: &Path) -> Result<Copied, CopyError> {
    let mut upload = Upload::new(from.to_owned(), bytes(to), CopyOptions::default());
    upload.run(&mut Guest::new(channel), &mut quiet)
}

fn download(channel: &mut Joined, from: &Path, to: &Path) -> Result<Copied, CopyError> {
    let mut download = Download::new(bytes(from), to.to_owned(), CopyOptions::default());
    download.run(&mut Guest::new(channel), &mut quiet)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("list")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

#[test]
fn a_tree_copied_into_a_guest_and_out_again_is_the_same() {
    let (host, guest) = (folder(), folder());
    let source = host.path().join("source");
    fs::create_dir(&source).expect("folder");
    tree::make(&source);
    let expected = tree::see(&source);
    assert!(
        expected
            .values()
            .any(|seen| format!("{seen:?}").contains("is_sparse: true"))
    );
    let mut channel = Joined::default();
    let sent = upload(&mut channel, &source, &guest.path().join("there")).expect("upload");
    assert_eq!(tree::see(&guest.path().join("there")), expected);
    assert_eq!((sent.files, sent.links), (5, 2));
    assert!(
        sent.hole_bytes > 7 << 20 && sent.data_bytes < 1 << 20,
        "{sent:?}"
    );
    let back = host.path().join("back");
    let fetched = download(&mut channel, &guest.path().join("there"), &back).expect("download");
    assert_eq!(tree::see(&back), expected);
    assert_eq!(fetched, sent);
}

#[test]
fn a_copy_goes_into_a_folder_under_its_name_or_takes_the_name_that_is_given() {
    let (host, guest) = (folder(), folder());
    tree::file(&host.path().join("a"), b"a");
    fs::create_dir(host.path().join("d")).expect("folder");
    tree::file(&host.path().join("d/in"), b"in");
    let mut channel = Joined::default();
    let mut up = |from: &str, to: &str| {
        upload(
            &mut channel,
            &host.path().join(from),
            &guest.path().join(to),
        )
    };
    up("a", "").expect("into a folder");
    up("a", "b").expect("under another name");
    up("d", "").expect("a folder into a folder");
    up("d", "e").expect("a folder under another name");
    up("d/.", "e").expect("its content");
    for (from, to) in [
        ("a", "missing/"),
        ("d", "a"),
        ("d", "missing/below"),
        ("none", "x"),
    ] {
        up(from, to).expect_err(to);
    }
    assert_eq!(names(guest.path()), ["a", "b", "d", "e"]);
    assert_eq!(names(&guest.path().join("e")), ["in"]);
    let mut down = |from: &str, to: &str| {
        download(
            &mut channel,
            &guest.path().join(from),
            &host.path().join(to),
        )
    };
    down("a", "d").expect("into a folder");
    down("e", "d").expect("a folder into a folder");
    down("e/.", "d").expect("its content");
    down("e", "f").expect("under another name");
    for (from, to) in [("a", "missing/"), ("d", "a"), ("none", "x")] {
        down(from, to).expect_err(to);
    }
    assert_eq!(names(host.path()), ["a", "d", "f"]);
    assert_eq!(names(&host.path().join("d")), ["a", "e", "in"]);
}

/// Runs a copy over connections that break after 1, 2, 3 … calls, each time all of it anew, until one lasts.
fn break_everywhere(
    mut copy: impl FnMut(&mut Joined) -> Result<Copied, CopyError>,
    mut look: impl FnMut(),
) -> usize {
    for calls in 0.. {
        match copy(&mut Joined::broken_after(calls)) {
            Ok(_) => return calls,
            Err(error) => assert!(error.is_broken_channel(), "{error}"),
        }
        look();
    }
    unreachable!("a copy has an end")
}

#[test]
fn a_file_is_the_old_or_the_new_one_wherever_the_connection_breaks() {
    let (host, guest) = (folder(), folder());
    let (old, new) = (tree::noise(90_000, 3), tree::noise(140_000, 4));
    let (here, there) = (host.path().join("f"), guest.path().join("f"));
    for to_guest in [true, false] {
        let (source, target) = if to_guest {
            (&here, &there)
        } else {
            (&there, &here)
        };
        tree::file(source, &new);
        tree::file(target, &old);
        let copy = |channel: &mut Joined| match to_guest {
            true => upload(channel, source, target),
            false => download(channel, source, target),
        };
        let calls = break_everywhere(copy, || {
            let found = fs::read(target).expect("there is always one");
            assert!(found == old || found == new, "half a file is visible");
        });
        assert!(
            calls >= 9,
            "{calls} calls are too few for {} bytes",
            new.len()
        );
        assert_eq!(fs::read(target).expect("read"), new);
        assert_eq!(names(target.parent().expect("folder")), ["f"]);
    }
}

#[test]
fn a_tree_goes_on_over_one_broken_connection_after_the_other() {
    for to_guest in [true, false] {
        let (host, guest) = (folder(), folder());
        let (source, target) = (host.path().join("s"), guest.path().join("t"));
        fs::create_dir(&source).expect("folder");
        tree::make(&source);
        let options = CopyOptions::default();
        let mut up = Upload::new(source.clone(), bytes(&target), options);
        let mut down = Download::new(bytes(&source), target.clone(), options);
        let mut connections = 0;
        let copied = loop {
            connections += 1;
            assert!(connections < 500, "it does not come to an end");
            let mut channel = Joined::broken_after(12);
            let mut guest = Guest::new(&mut channel);
            match match to_guest {
                true => up.run(&mut guest, &mut quiet),
                false => down.run(&mut guest, &mut quiet),
            } {
                Ok(copied) => break copied,
                Err(error) => assert!(error.is_broken_channel(), "{error}"),
            }
        };
        assert!(connections > 3, "nothing was interrupted");
        assert_eq!((copied.files, copied.links), (5, 2));
        assert_eq!(tree::see(&target), tree::see(&source));
    }
}

#[test]
fn a_large_file_goes_on_behind_the_last_block_that_both_sides_have() {
    let (host, guest) = (folder(), folder());
    let content = tree::noise(9 << 20, 5);
    for to_guest in [true, false] {
        let (source, target) = match to_guest {
            true => (host.path().join("up"), guest.path().join("up")),
            false => (guest.path().join("down"), host.path().join("down")),
        };
        tree::file(&source, &content);
        // A copy of its own each time: as if the command had been killed and run again.
        let copy = |channel: &mut Joined| match to_guest {
            true => upload(channel, &source, &target),
            false => download(channel, &source, &target),
        };
        let (mut sent, mut connections) = (0, 0);
        let copied = loop {
            connections += 1;
            assert!(connections < 50, "it does not come to an end");
            let mut channel = Joined::broken_after(100);
            let done = copy(&mut channel);
            sent += channel.data_bytes;
            match done {
                Ok(copied) => break copied,
                Err(error) => assert!(error.is_broken_channel(), "{error}"),
            }
            assert!(!target.exists());
        };
        assert!(copied.resumed_bytes >= 4 << 20, "{copied:?}");
        let again = sent - content.len() as u64;
        let blocks = (connections - 1) << 20;
        assert!(
            again <= blocks,
            "{again} bytes were sent twice, {blocks} may be"
        );
        assert_eq!(fs::read(&target).expect("read"), content);
    }
    assert_eq!(names(host.path()), ["down", "up"]);
    assert_eq!(names(guest.path()), ["down", "up"]);
}

#[test]
fn a_partial_file_that_was_changed_meanwhile_is_not_gone_on_with() {
    let (host, guest) = (folder(), folder());
    let content = tree::noise(5 << 20, 6);
    let (source, target) = (host.path().join("f"), guest.path().join("f"));
    tree::file(&source, &content);
    upload(&mut Joined::broken_after(120), &source, &target).expect_err("broken");
    let partial = guest.path().join(&names(guest.path())[0]);
    let file = File::options().write(true).open(&partial).expect("open");
    file.write_all_at(b"other", (1 << 20) + 17).expect("damage");
    let copied = upload(&mut Joined::default(), &source, &target).expect("upload");
    assert_eq!(
        copied.resumed_bytes,
        1 << 20,
        "only what lies before the damage is kept"
    );
    assert_eq!(fs::read(&target).expect("read"), content);
}

#[test]
fn a_flipped_bit_is_found_and_what_was_there_stays() {
    let (host, guest) = (folder(), folder());
    let (here, there) = (host.path().join("f"), guest.path().join("f"));
    let content = tree::noise(200_000, 7);
    for hash in [HashKind::Blake3, HashKind::Crc32c] {
        let options = CopyOptions {
            hash,
            ..CopyOptions::default()
        };
        tree::file(&here, &content);
        tree::file(&there, b"old");
        let error = Upload::new(here.clone(), bytes(&there), options)
            .run(&mut Guest::new(&mut Joined::flipping_after(3)), &mut quiet)
            .expect_err("damaged");
        assert_eq!(error.guest_kind(), Some(FileErrorKind::Damaged), "{error}");
        assert_eq!(fs::read(&there).expect("read"), b"old");
        tree::file(&there, &content);
        tree::file(&here, b"old");
        let error = Download::new(bytes(&there), here.clone(), options)
            .run(&mut Guest::new(&mut Joined::flipping_after(3)), &mut quiet)
            .expect_err("damaged");
        assert!(matches!(error, CopyError::Damaged { .. }), "{error}");
        assert_eq!(fs::read(&here).expect("read"), b"old");
    }
    assert_eq!(
        (names(host.path()), names(guest.path())),
        (vec!["f".into()], vec!["f".into()])
    );
}

/// A file system of one megabyte, gone when dropped.
struct Tiny(TempDir);

impl Tiny {
    fn new() -> Self {
        let at = folder();
        let options = Some(c"size=1m");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", at.path(), "tmpfs", flags, options).expect("mount, as root");
        Self(at)
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(self.0.path(), flags).expect("unmount");
    }
}

#[test]
fn without_room_the_old_file_stays_and_no_part_of_the_new_one() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: mounts a file system, which takes root");
        return;
    }
    let (tiny, other) = (Tiny::new(), folder());
    let (small, large) = (tiny.0.path().join("f"), other.path().join("f"));
    tree::file(&small, b"old");
    tree::file(&large, &tree::noise(2 << 20, 8));
    let error = upload(&mut Joined::default(), &large, &small).expect_err("no room");
    assert_eq!(error.guest_kind(), Some(FileErrorKind::NoSpace), "{error}");
    let error = download(&mut Joined::default(), &large, &small).expect_err("no room");
    let CopyError::Local { source, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(source.kind(), io::ErrorKind::StorageFull);
    assert_eq!(fs::read(&small).expect("read"), b"old");
    assert_eq!(names(tiny.0.path()), ["f"]);
    // The room is back.
    tree::file(&large, &tree::noise(500 << 10, 8));
    upload(&mut Joined::default(), &large, &small).expect("room enough");
}

#[test]
fn a_file_that_changes_while_it_is_copied_is_refused_on_both_sides() {
    let (host, guest) = (folder(), folder());
    let (here, there) = (host.path().join("f"), guest.path().join("f"));
    for shrink in [true, false] {
        for to_guest in [true, false] {
            let (source, target) = if to_guest {
                (&here, &there)
            } else {
                (&there, &here)
            };
            tree::file(source, &tree::noise(300_000, 9));
            tree::file(target, b"old");
            let disturb = File::options().write(true).open(source).expect("open");
            let mut seen = 0;
            let mut listener = |_: &Progress<'_>| {
                seen += 1;
                match (seen, shrink) {
                    (4, true) => disturb.set_len(140_000).expect("shrink"),
                    (4, false) => disturb.write_all_at(b"new", 0).expect("write"),
                    (_, _) => {}
                }
                ControlFlow::Continue(())
            };
            let mut channel = Joined::default();
            let mut joined = Guest::new(&mut channel);
            let options = CopyOptions::default();
            let error = match to_guest {
                true => Upload::new(source.clone(), bytes(target), options)
                    .run(&mut joined, &mut listener),
                false => Download::new(bytes(source), target.clone(), options)
                    .run(&mut joined, &mut listener),
            }
            .expect_err("changed");
            let named = matches!(error, CopyError::LocalChanged { .. })
                || error.guest_kind() == Some(FileErrorKind::Changed);
            assert!(named, "{error}");
            assert_eq!(fs::read(target).expect("read"), b"old");
            assert_eq!(names(target.parent().expect("folder")), ["f"]);
        }
    }
}

#[test]
fn a_pipe_ends_a_copy_by_its_name_or_is_left_out_when_asked() {
    let (host, guest) = (folder(), folder());
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, host.path().join("pipe"), FileType::Fifo, mode, 0).expect("pipe");
    tree::file(&host.path().join("a"), b"a");
    let (mut channel, target) = (Joined::default(), guest.path().join("t"));
    let error = upload(&mut channel, host.path(), &target).expect_err("a pipe");
    assert!(
        matches!(
            &error,
            CopyError::Special {
                kind: FileKind::Pipe,
                ..
            }
        ),
        "{error}"
    );
    let error = download(&mut channel, host.path(), &target).expect_err("a pipe");
    assert!(
        matches!(
            &error,
            CopyError::Special {
                kind: FileKind::Pipe,
                ..
            }
        ),
        "{error}"
    );
    let options = CopyOptions {
        skip_special: true,
        ..CopyOptions::default()
    };
    let mut upload = Upload::new(
        host.path().to_owned(),
        bytes(&guest.path().join("u")),
        options,
    );
    let copied = upload
        .run(&mut Guest::new(&mut channel), &mut quiet)
        .expect("upload");
    assert_eq!((copied.files, copied.skipped), (1, 1));
    // Nobody waits for the other end of it, and nobody writes to it.
    let pipe = bytes(&host.path().join("pipe"));
    let mut joined = Guest::new(&mut channel);
    let error = joined.read(&pipe, &mut |_| Ok(())).expect_err("a pipe");
    assert_eq!(error.guest_kind(), Some(FileErrorKind::Special));
    let given = FileAttributes::default();
    let error = joined
        .write(&pipe, &mut io::empty(), given, Replace::Yes)
        .expect_err("a pipe");
    assert_eq!(error.guest_kind(), Some(FileErrorKind::Special));
}

#[test]
fn a_copy_that_is_interrupted_by_its_listener_goes_on_later() {
    let (host, guest) = (folder(), folder());
    let content = tree::noise(6 << 20, 10);
    let (source, target) = (host.path().join("f"), guest.path().join("f"));
    tree::file(&source, &content);
    let mut stop = |progress: &Progress<'_>| match progress.done_bytes > (5 << 20) + 65_536 {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    let mut channel = Joined::default();
    let mut upload = Upload::new(source.clone(), bytes(&target), CopyOptions::default());
    let error = upload
        .run(&mut Guest::new(&mut channel), &mut stop)
        .expect_err("interrupted");
    assert!(matches!(error, CopyError::Interrupted));
    let error = self::upload(&mut Joined::default(), &source, &target).expect_err("still open");
    assert_eq!(error.guest_kind(), Some(FileErrorKind::Busy), "{error}");
    drop(channel);
    let copied = self::upload(&mut Joined::default(), &source, &target).expect("upload");
    assert_eq!(copied.resumed_bytes, 5 << 20);
    assert_eq!(fs::read(&target).expect("read"), content);
}

#[test]
fn a_folder_with_many_entries_comes_page_by_page() {
    let guest = folder();
    let count = match std::env::var_os("STEAD_SOAK") {
        Some(_) => 1_000_000,
        None => 3_000,
    };
    for number in 0..count {
        let mode = Mode::RUSR;
        let name = guest.path().join(format!("{number:0100}"));
        rustix::fs::mknodat(CWD, name, FileType::RegularFile, mode, 0).expect("file");
    }
    let mut channel = Joined::default();
    let mut joined = Guest::new(&mut channel);
    let (mut found, mut pages) = (std::collections::HashSet::new(), 0);
    let whole = joined.list(&bytes(guest.path()), false, &mut |page| {
        pages += 1;
        found.extend(page.into_iter().map(|entry| entry.name.0));
        true
    });
    assert!(whole.expect("list"));
    assert_eq!(found.len(), count);
    assert!(pages >= count / 128);
    let mut seen = 0;
    let whole = joined.list(&bytes(guest.path()), false, &mut |_| {
        seen += 1;
        false
    });
    assert!(!whole.expect("list"), "it was enough before the end");
    assert_eq!(seen, 1);
}

#[test]
fn a_file_that_does_not_know_its_size_is_read_to_its_end() {
    let mut channel = Joined::default();
    let mut joined = Guest::new(&mut channel);
    let mut text = Vec::new();
    let path = Bytes::from("/proc/self/status");
    joined
        .read(&path, &mut |content| {
            if let Content::Data(data) = content {
                text.extend_from_slice(&data.0);
            }
            Ok(())
        })
        .expect("read");
    assert!(String::from_utf8_lossy(&text).contains("\nVmRSS:"));
}

#[test]
fn a_file_that_is_one_hole_of_a_terabyte_is_copied_at_once() {
    let (host, guest) = (folder(), folder());
    let (source, target) = (host.path().join("f"), guest.path().join("f"));
    tree::file(&source, b"");
    let file = File::options().write(true).open(&source).expect("open");
    file.set_len(1 << 40).expect("grow");
    let begin = Instant::now();
    upload(&mut Joined::default(), &source, &target).expect("upload");
    let metadata = fs::metadata(&target).expect("stat");
    assert_eq!((metadata.len(), metadata.blocks()), (1 << 40, 0));
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "its zeros were counted"
    );
}

#[test]
fn names_are_made_changed_and_removed_without_following_links() {
    let guest = folder();
    let outside = folder();
    tree::file(&outside.path().join("precious"), b"x");
    let at = |name: &str| bytes(&guest.path().join(name));
    let mut channel = Joined::default();
    let mut joined = Guest::new(&mut channel);
    joined
        .make_folder(&at("a/b/c"), true, 0o751)
        .expect("folders");
    assert_eq!(joined.stat(&at("a/b"), false).expect("stat").mode, 0o751);
    let error = joined
        .make_folder(&at("a"), false, 0o700)
        .expect_err("there");
    assert_eq!(error.guest_kind(), Some(FileErrorKind::Exists));
    joined
        .make_link(&at("a/out"), &bytes(outside.path()), Replace::No)
        .expect("link");
    assert_eq!(
        joined.read_link(&at("a/out")).expect("link"),
        bytes(outside.path())
    );
    assert_eq!(
        joined.stat(&at("a/out"), false).expect("stat").kind,
        FileKind::Symlink
    );
    assert_eq!(
        joined.stat(&at("a/out"), true).expect("stat").kind,
        FileKind::Folder
    );
    joined
        .rename(&at("a"), &at("z"), Replace::No)
        .expect("rename");
    let error = joined.remove(&at("z"), false).expect_err("not empty");
    assert_eq!(error.guest_kind(), Some(FileErrorKind::NotEmpty));
    joined.remove(&at("z"), true).expect("remove");
    assert_eq!(names(outside.path()), ["precious"], "a link was followed");
    let error = joined.remove(&at("z"), true).expect_err("gone");
    assert_eq!(error.guest_kind(), Some(FileErrorKind::NotFound));
    let error = joined.remove(&"/".into(), true).expect_err("the root");
    assert_eq!(error.guest_kind(), Some(FileErrorKind::Invalid));
}

#[test]
fn a_link_in_the_place_of_a_file_is_replaced_and_what_it_leads_to_stays() {
    let (host, guest) = (folder(), folder());
    tree::file(&host.path().join("f"), b"new");
    tree::file(&guest.path().join("precious"), b"x");
    symlink("precious", guest.path().join("f")).expect("link");
    upload(
        &mut Joined::default(),
        &host.path().join("f"),
        &guest.path().join("f"),
    )
    .expect("up");
    assert_eq!(fs::read(guest.path().join("precious")).expect("read"), b"x");
    let metadata = fs::symlink_metadata(guest.path().join("f")).expect("stat");
    assert!(metadata.is_file());
}

#[test]
fn what_an_abandoned_transfer_left_is_removed_after_a_day() {
    let (host, guest) = (folder(), folder());
    let (source, target) = (host.path().join("f"), guest.path().join("f"));
    tree::file(&source, &tree::noise(100_000, 11));
    for (age_hours, left) in [(1, 2), (25, 1)] {
        upload(
            &mut Joined::broken_after(5),
            &source,
            &guest.path().join("g"),
        )
        .expect_err("broken");
        let partial = names(guest.path())
            .into_iter()
            .find(|name| name.starts_with(".stead"));
        let partial = File::open(guest.path().join(partial.expect("a partial file")));
        let then = SystemTime::now() - Duration::from_secs(age_hours * 3600);
        partial.expect("open").set_modified(then).expect("time");
        upload(&mut Joined::default(), &source, &target).expect("upload");
        assert_eq!(names(guest.path()).len(), left, "after {age_hours} hours");
    }
}

#[test]
fn a_stream_without_a_known_length_becomes_a_file() {
    let guest = folder();
    let target = guest.path().join("f");
    let content = tree::noise(100_001, 12);
    let mut channel = Joined::default();
    let mut joined = Guest::new(&mut channel);
    let given = FileAttributes {
        mode: Some(0o600),
        ..FileAttributes::default()
    };
    let length = joined.write(&bytes(&target), &mut &content[..], given, Replace::No);
    assert_eq!(length.expect("write"), content.len() as u64);
    assert_eq!(fs::read(&target).expect("read"), content);
    assert_eq!(fs::metadata(&target).expect("stat").mode() & 0o7777, 0o600);
    let error = joined.write(&bytes(&target), &mut io::empty(), given, Replace::No);
    assert_eq!(
        error.expect_err("taken").guest_kind(),
        Some(FileErrorKind::Exists)
    );
    assert_eq!(fs::read(&target).expect("read"), content);
}

/// How fast the logic is without a connection, messages encoded and decoded: printed, since it is the machine's.
#[test]
fn the_logic_alone_moves_data_in_both_directions() {
    let (host, guest) = (folder(), folder());
    let megabytes = match std::env::var_os("STEAD_SOAK") {
        Some(_) => 512,
        None => 32,
    };
    let (source, target) = (host.path().join("f"), guest.path().join("f"));
    tree::file(&source, &tree::noise(megabytes << 20, 13));
    for hash in [HashKind::Blake3, HashKind::Crc32c] {
        let options = CopyOptions {
            hash,
            ..CopyOptions::default()
        };
        let mut channel = Joined::default();
        let begin = Instant::now();
        Upload::new(source.clone(), bytes(&target), options)
            .run(&mut Guest::new(&mut channel), &mut quiet)
            .expect("upload");
        let up = megabytes as f64 / begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        Download::new(bytes(&target), host.path().join("g"), options)
            .run(&mut Guest::new(&mut channel), &mut quiet)
            .expect("download");
        let down = megabytes as f64 / begin.elapsed().as_secs_f64();
        println!("{hash:?}: up {up:.0} MiB/s, down {down:.0} MiB/s");
        assert_eq!(channel.data_bytes, (2 * megabytes as u64) << 20);
    }
}
