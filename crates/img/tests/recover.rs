//! `recover` follows no name in a journal that the user did not give.

#![allow(
    clippy::disallowed_methods,
    reason = "files of a test need not be durable"
)]

mod both;

use std::path::Path;
use std::sync::Arc;

use both::Bench;
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::commit::{CommitOptions, RawBase, commit_into_raw};
use stead_qcow2::{Control, Error, Layer};
use stead_sim::RecordedDisk;
use stead_sys::storage::Storage;

/// Makes `top` an image in progress whose journal writes its disk over the file at `victim`.
fn write_over(bench: &Bench, victim: &Path) -> Vec<u8> {
    bench.sh(
        "qemu-img create -q -f raw base 64k; qemu-img create -q -f qcow2 -b base -F raw top; \
         qemu-io -f qcow2 -c 'write -q -P 7 0 64k' top",
    );
    let path = bench.path("top");
    let top = Arc::new(RecordedDisk::new(std::fs::read(&path).expect("read")));
    let raw: Arc<dyn Storage> = Arc::new(RecordedDisk::new(vec![0; 64 << 10]));
    let base = RawBase::on_storage(raw, victim.to_owned());
    let storage: Arc<dyn Storage> = Arc::clone(&top) as _;
    let mut editor = Editor::on_storage(storage, &path, EditOptions::default()).expect("whole");
    let (options, quiet) = (CommitOptions::default(), Control::default());
    commit_into_raw(&mut editor, &[], &base, &options, &quiet).expect("committed");
    let history = top.history();
    let mut all = (0..=history.events().len()).map(|count| history.prefix(count));
    let in_progress = |bytes: &Vec<u8>| {
        let disk = Arc::new(RecordedDisk::new(bytes.clone()));
        matches!(
            Layer::from_storage(disk, &path),
            Err(Error::InProgress { .. })
        )
    };
    let image = all.find(in_progress).expect("it goes through a journal");
    std::fs::write(&path, &image).expect("write");
    image
}

#[test]
fn recover_writes_to_no_file_that_the_user_did_not_name() {
    let bench = Bench::new();
    let victim = bench.path("victim");
    std::fs::write(&victim, [1; 64 << 10]).expect("write");
    let image = write_over(&bench, &victim);
    for with in ["", "--with base", "--with base --with top"] {
        let refused = bench.ours(&format!("recover --json {with} top"));
        assert_eq!(refused.status.code(), Some(1), "{with}");
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(text.contains(&format!("writes to {victim:?}")), "{text}");
        assert!(text.contains("--with FILE"), "{text}");
        let said: serde_json::Value = serde_json::from_slice(&refused.stdout).expect("JSON");
        let file = victim.to_str().expect("text");
        let needs = serde_json::json!([{ "file": file, "written": true }]);
        assert_eq!(said["needs"], needs, "{with}");
        assert!(std::fs::read(&victim).expect("read") == [1; 64 << 10]);
        assert!(std::fs::read(bench.path("top")).expect("read") == image);
    }
    let done = bench.ours("recover --with base --with victim top");
    assert!(done.status.success(), "{done:?}");
    assert!(std::fs::read(&victim).expect("read") == [7; 64 << 10]);
    bench.sh("qemu-img check -q top");
}
