//! A guest that lies about its files.

use std::fs;
use std::path::Path;

use stead_agent_link::files::{
    Content, CopyError, CopyOptions, Download, Entry, FileKind, FileReply, FileTime, Guest,
    HashKind, Metadata, Owner,
};
use stead_agent_proto::files::{Chunk, ChunkDigest, MAX_PAGE_ENTRIES};
use stead_agent_proto::message::Bytes;

use crate::joined::Liar;
use crate::{folder, names, quiet, tree};

fn metadata(kind: FileKind, length_bytes: u64) -> Metadata {
    Metadata {
        kind,
        mode: 0o4755,
        owner: Owner { uid: 0, gid: 0 },
        length_bytes,
        allocated_bytes: 0,
        links: 1,
        modified: FileTime {
            seconds: 1,
            nanoseconds: 1,
        },
    }
}

fn entry(name: &[u8], kind: FileKind, length_bytes: u64) -> Entry {
    Entry {
        name: name.into(),
        metadata: metadata(kind, length_bytes),
    }
}

fn page(entries: Vec<Entry>) -> FileReply {
    FileReply::Entries {
        entries,
        last: true,
    }
}

fn chunk(offset_bytes: u64, data: &[u8]) -> Chunk {
    Chunk {
        offset_bytes,
        content: Content::Data(data.into()),
    }
}

fn content(chunks: &[Chunk], announced: Option<u64>) -> Vec<FileReply> {
    let mut digest = ChunkDigest::new(HashKind::Blake3);
    chunks.iter().for_each(|chunk| digest.add(chunk));
    let mut replies = vec![FileReply::ReadBegins {
        metadata: metadata(FileKind::File, announced.unwrap_or(0)),
        length_bytes: announced,
    }];
    replies.extend(chunks.iter().cloned().map(FileReply::Chunk));
    replies.push(FileReply::ReadEnds {
        digest: digest.digest(),
    });
    replies
}

fn fetch_with(
    replies: Vec<FileReply>,
    target: &Path,
    options: CopyOptions,
) -> Result<(), CopyError> {
    let mut liar = Liar {
        replies: replies.into(),
    };
    let mut download = Download::new("/x".into(), target.to_owned(), options);
    download.run(&mut Guest::new(&mut liar), &mut quiet)?;
    Ok(())
}

fn fetch(replies: Vec<FileReply>, target: &Path) -> Result<(), CopyError> {
    fetch_with(replies, target, CopyOptions::default())
}

fn is_protocol(error: &CopyError) -> bool {
    matches!(error, CopyError::Protocol { .. })
}

#[test]
fn names_in_a_list_that_lead_elsewhere_are_refused_before_anything_is_made() {
    for name in [
        &b".."[..],
        b".",
        b"",
        b"a/b",
        b"/etc/passwd",
        b"../x",
        b"a\0b",
        &[b'n'; 256],
    ] {
        let (outer, folder_kind) = (folder(), FileKind::Folder);
        let target = outer.path().join("t");
        let replies = vec![
            FileReply::Stat(metadata(folder_kind, 0)),
            page(vec![
                entry(b"good", folder_kind, 0),
                entry(name, FileKind::File, 1),
            ]),
        ];
        let error = fetch(replies, &target).expect_err("hostile");
        assert!(is_protocol(&error), "{name:?}: {error}");
        assert_eq!(names(outer.path()), [""; 0]);
    }
}

#[test]
fn more_or_less_than_was_announced_or_elsewhere_is_refused_and_what_was_there_stays() {
    let outer = folder();
    let target = outer.path().join("f");
    tree::file(&target, b"old");
    let hole = |length| Chunk {
        offset_bytes: 0,
        content: Content::Hole(length),
    };
    let lies: [(&str, Vec<Chunk>, u64); 7] = [
        ("more", vec![chunk(0, b"0123")], 3),
        ("more, later", vec![chunk(0, b"0123"), chunk(4, b"4")], 4),
        ("less", vec![chunk(0, b"0123")], 5),
        ("a gap", vec![chunk(0, b"0"), chunk(2, b"2")], 3),
        ("twice", vec![chunk(0, b"0"), chunk(0, b"0")], 2),
        ("a hole beyond", vec![hole(1 << 60)], 4),
        ("an empty chunk", vec![chunk(0, b"")], 4),
    ];
    for (lie, chunks, announced) in lies {
        let mut replies = vec![FileReply::Stat(metadata(FileKind::File, announced))];
        replies.extend(content(&chunks, Some(announced)));
        let error = fetch(replies, &target).expect_err(lie);
        assert!(is_protocol(&error), "{lie}: {error}");
        assert_eq!(fs::read(&target).expect("read"), b"old", "{lie}");
        assert_eq!(names(outer.path()), ["f"], "{lie}");
    }
}

#[test]
fn a_file_that_is_not_the_one_that_was_listed_is_refused() {
    let outer = folder();
    let target = outer.path().join("f");
    let mut replies = vec![FileReply::Stat(metadata(FileKind::File, 3))];
    replies.extend(content(&[chunk(0, b"0123")], Some(4)));
    let error = fetch(replies, &target).expect_err("another");
    assert!(matches!(error, CopyError::GuestChanged { .. }), "{error}");
    assert_eq!(names(outer.path()), [""; 0]);
}

/// The replies of a guest that first has a link of a name and then a folder of the same name, with a file in it.
fn link_trick(outside: &Path) -> Vec<FileReply> {
    use std::os::unix::ffi::OsStrExt;
    let outside = Bytes::from(outside.as_os_str().as_bytes());
    // Entries are copied from the last one on.
    let mut replies = vec![
        FileReply::Stat(metadata(FileKind::Folder, 0)),
        page(vec![
            entry(b"x", FileKind::Folder, 0),
            entry(b"x", FileKind::Symlink, 0),
        ]),
        FileReply::Link(outside),
        page(vec![entry(b"evil", FileKind::File, 4)]),
    ];
    replies.extend(content(&[chunk(0, b"evil")], Some(4)));
    replies
}

#[test]
fn a_link_that_a_guest_makes_on_the_host_is_never_gone_through() {
    let (outer, outside) = (folder(), folder());
    let target = outer.path().join("t");
    let error = fetch(link_trick(outside.path()), &target).expect_err("a trick");
    assert!(matches!(error, CopyError::Local { .. }), "{error}");
    assert_eq!(names(outside.path()), [""; 0]);
    assert_eq!(
        fs::read_link(target.join("x")).expect("link"),
        outside.path()
    );
}

#[test]
fn the_link_trick_reaches_outside_where_paths_are_used_instead_of_handles() {
    let (outer, outside) = (folder(), folder());
    let target = outer.path().join("t");
    fetch(link_trick(outside.path()), &target).expect_err("a trick");
    tree::file(&target.join("x").join("evil"), b"evil");
    assert_eq!(names(outside.path()), ["evil"]);
}

#[test]
fn a_file_fetched_from_a_guest_has_no_set_user_bit_unless_owners_are_asked_for() {
    use std::os::unix::fs::PermissionsExt;
    let outer = folder();
    let target = outer.path().join("f");
    let mut replies = vec![FileReply::Stat(metadata(FileKind::File, 1))];
    replies.extend(content(&[chunk(0, b"0")], Some(1)));
    fetch(replies, &target).expect("fetched");
    let mode = fs::metadata(&target).expect("stat").permissions().mode();
    assert_eq!(mode & 0o7777, 0o755);
}

#[test]
fn pages_without_end_and_answers_to_other_questions_are_refused() {
    let outer = folder();
    let target = outer.path().join("t");
    let folder = || FileReply::Stat(metadata(FileKind::Folder, 0));
    let more = |entries| FileReply::Entries {
        entries,
        last: false,
    };
    let many = vec![entry(b"n", FileKind::File, 1); MAX_PAGE_ENTRIES + 1];
    for replies in [
        vec![folder(), more(vec![])],
        vec![folder(), page(many)],
        vec![folder(), FileReply::Done],
        vec![FileReply::WriteBegins],
        vec![FileReply::Chunk(chunk(0, b"0"))],
        vec![FileReply::Stat(metadata(FileKind::File, u64::MAX))],
    ] {
        let error = fetch(replies, &target).expect_err("hostile");
        assert!(is_protocol(&error), "{error}");
        assert_eq!(names(outer.path()), [""; 0]);
    }
}

#[test]
fn folders_without_end_and_more_bytes_than_allowed_are_refused() {
    let outer = folder();
    let mut replies = vec![FileReply::Stat(metadata(FileKind::Folder, 0))];
    replies.extend(std::iter::repeat_n(
        page(vec![entry(b"d", FileKind::Folder, 0)]),
        2000,
    ));
    let error = fetch(replies, &outer.path().join("t")).expect_err("hostile");
    assert!(matches!(error, CopyError::Limit { .. }), "{error}");
    let options = CopyOptions {
        limit_bytes: 3,
        ..CopyOptions::default()
    };
    let mut replies = vec![FileReply::Stat(metadata(FileKind::File, 4))];
    replies.extend(content(&[chunk(0, b"0123")], Some(4)));
    let error = fetch_with(replies, &outer.path().join("f"), options).expect_err("too much");
    assert!(matches!(error, CopyError::Limit { .. }), "{error}");
    assert_eq!(names(outer.path()), ["t"]);
}

#[test]
fn more_digests_than_were_asked_for_are_refused_and_false_ones_only_cost_time() {
    let outer = folder();
    let source = outer.path().join("f");
    tree::file(&source, &tree::noise(5 << 20, 1));
    let with = |digests: Vec<[u8; 32]>| {
        let replies = [
            FileReply::Stat(metadata(FileKind::Folder, 0)),
            FileReply::Digests {
                digests,
                last: true,
            },
            FileReply::WriteBegins,
            FileReply::Done,
            FileReply::Done,
        ];
        let mut liar = Liar {
            replies: replies.into(),
        };
        let target = Bytes::from("/x");
        let mut upload =
            stead_agent_link::files::Upload::new(source.clone(), target, CopyOptions::default());
        upload.run(&mut Guest::new(&mut liar), &mut quiet)
    };
    let block =
        |at: usize| *blake3::hash(&tree::noise(5 << 20, 1)[at << 20..][..1 << 20]).as_bytes();
    let error = with(vec![
        block(0),
        block(1),
        block(2),
        block(3),
        block(4),
        [0; 32],
    ]);
    assert!(is_protocol(&error.expect_err("six of five")));
    assert_eq!(with(vec![[0; 32]; 5]).expect("sent anew").resumed_bytes, 0);
    assert_eq!(
        with(vec![block(0), block(0)]).expect("one").resumed_bytes,
        1 << 20
    );
}
