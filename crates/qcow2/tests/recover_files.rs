//! A recovery touches no file that the caller did not allow, whatever the journal says: anybody can make one.

#![allow(
    clippy::disallowed_methods,
    reason = "files of a test need not be durable"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use stead_qcow2::edit::{EditOptions, Editor, JournalFiles, Recovery, recover};
use stead_qcow2::ops::commit::{CommitOptions, RawBase, commit_into, commit_into_raw};
use stead_qcow2::{Control, Error, Layer, LayerFile, LayerFormat};
use stead_sim::RecordedDisk;
use stead_sys::storage::Storage;

const DISK: usize = 256 << 10;

fn sh(dir: &Path, command: &str) {
    let mut shell = Command::new("sh");
    let done = shell.args(["-ec", command]).current_dir(dir).status();
    assert!(done.expect("a shell").success(), "{command}");
}

/// What `disk` held at the first moment at which the image was in progress.
fn marked(disk: &RecordedDisk) -> Vec<u8> {
    let history = disk.history();
    let mut all = (0..=history.events().len()).map(|count| history.prefix(count));
    let in_progress = |bytes: &Vec<u8>| {
        let disk = Arc::new(RecordedDisk::new(bytes.clone()));
        let opened = Layer::from_storage(disk, Path::new("marked"));
        matches!(opened, Err(Error::InProgress { .. }))
    };
    all.find(in_progress).expect("it goes through a journal")
}

/// A folder with an image in progress, `top`, whose journal writes its disk over the file at `victim`.
fn writes_to(dir: &Path, victim: &Path) -> Vec<u8> {
    sh(
        dir,
        "qemu-img create -q -f raw base 256k; qemu-img create -q -f qcow2 -b base -F raw top; \
         qemu-io -f qcow2 -c 'write -q -P 7 0 256k' top",
    );
    let top = Arc::new(RecordedDisk::new(
        std::fs::read(dir.join("top")).expect("read"),
    ));
    let raw: Arc<dyn Storage> = Arc::new(RecordedDisk::new(vec![0; DISK]));
    let base = RawBase::on_storage(raw, victim.to_owned());
    let storage: Arc<dyn Storage> = Arc::clone(&top) as _;
    let options = EditOptions::default();
    let mut editor = Editor::on_storage(storage, &dir.join("top"), options).expect("whole");
    let (options, quiet) = (CommitOptions::default(), Control::default());
    commit_into_raw(&mut editor, &[], &base, &options, &quiet).expect("committed");
    let image = marked(&top);
    std::fs::write(dir.join("top"), &image).expect("write");
    image
}

/// The files that an error names: path, and whether it would be written.
fn named(error: &Error) -> Vec<(PathBuf, bool)> {
    let Error::JournalFiles { files, .. } = error else {
        panic!("{error}");
    };
    let named = files.iter();
    named
        .map(|file| (file.path.clone(), file.written))
        .collect()
}

#[test]
fn a_journal_that_writes_to_a_file_nobody_allowed_is_refused_named_and_nothing_is_written() {
    let (dir, other) = (
        tempfile::tempdir().expect("temp dir"),
        tempfile::tempdir().expect("temp dir"),
    );
    let victim = other.path().join("victim");
    let before = vec![1; DISK];
    std::fs::write(&victim, &before).expect("write");
    let image = writes_to(dir.path(), &victim);
    let top = dir.path().join("top");
    // A link in the folder does not bring the file there.
    std::os::unix::fs::symlink(&victim, dir.path().join("victim")).expect("link");
    let refusals = [
        JournalFiles::default(),
        JournalFiles::Listed(vec![dir.path().join("base"), top.clone()]),
        JournalFiles::InFolder,
    ];
    for files in refusals {
        let error = recover(&top, &files).expect_err("not allowed");
        assert_eq!(named(&error), [(victim.clone(), true)], "{files:?}");
        let text = error.to_string();
        assert!(
            text.contains(&format!("writes to {victim:?}")) && text.contains("nothing was written"),
            "{text}"
        );
        assert!(std::fs::read(&victim).expect("read") == before, "{files:?}");
        assert!(std::fs::read(&top).expect("read") == image, "{files:?}");
    }
    // By any of its names it is allowed.
    let files = JournalFiles::Listed(vec![dir.path().join("victim")]);
    assert_eq!(recover(&top, &files).expect("allowed"), Recovery::Finished);
    assert!(std::fs::read(&victim).expect("read") == [7; DISK]);
}

#[test]
fn a_file_in_the_folder_is_written_only_where_the_folder_is_allowed() {
    let dir = tempfile::tempdir().expect("temp dir");
    let victim = dir.path().join("victim");
    std::fs::write(&victim, vec![1; DISK]).expect("write");
    writes_to(dir.path(), &victim);
    let top = dir.path().join("top");
    let error = recover(&top, &JournalFiles::Nothing).expect_err("not allowed");
    assert_eq!(named(&error), [(victim.clone(), true)]);
    let done = recover(&top, &JournalFiles::InFolder).expect("allowed");
    assert_eq!(done, Recovery::Finished);
    assert!(std::fs::read(&victim).expect("read") == [7; DISK]);
}

/// Reading would put the content of any file into an image that others read.
#[test]
fn a_journal_that_reads_a_file_nobody_allowed_is_refused_and_its_base_stays_in_progress() {
    let dir = tempfile::tempdir().expect("temp dir");
    sh(
        dir.path(),
        "qemu-img create -q -f qcow2 base 256k; qemu-io -f qcow2 -c 'write -q -P 3 0 256k' base; \
         qemu-img create -q -f qcow2 -b base -F qcow2 top; qemu-io -f qcow2 -c 'write -q -P 7 0 64k' top",
    );
    let [base, top] = ["base", "top"].map(|name| dir.path().join(name));
    let disk = Arc::new(RecordedDisk::new(std::fs::read(&base).expect("read")));
    let storage: Arc<dyn Storage> = Arc::clone(&disk) as _;
    let mut editor = Editor::on_storage(storage, &base, EditOptions::default()).expect("whole");
    let above = LayerFile {
        path: top.clone(),
        format: LayerFormat::Qcow2,
    };
    let (options, quiet) = (CommitOptions::default(), Control::default());
    commit_into(&mut editor, 0, (&[above], &[]), &options, &quiet).expect("committed");
    let image = marked(&disk);
    std::fs::write(&base, &image).expect("write");
    let error = recover(&base, &JournalFiles::Nothing).expect_err("not allowed");
    assert_eq!(named(&error), [(top.clone(), false)]);
    assert!(std::fs::read(&base).expect("read") == image);
    let files = JournalFiles::Listed(vec![top]);
    assert_eq!(recover(&base, &files).expect("allowed"), Recovery::Finished);
    sh(
        dir.path(),
        "qemu-img check -q base; qemu-io -f qcow2 -c 'read -q -P 7 0 64k' -c 'read -q -P 3 64k 192k' base",
    );
}
