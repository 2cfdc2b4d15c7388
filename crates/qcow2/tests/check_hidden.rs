//! Damage where only an internal snapshot or a bitmap would meet it is found, and what qemu-img says of it is told.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a test need not be durable"
)]

mod images;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use images::{run, sh};
use serde_json::Value;
use stead_qcow2::{CheckReport, Finding, Layer, Use, check};

const CLUSTER: u64 = 65_536;
const COPIED: u64 = 1 << 63;

/// An image whose internal snapshot has tables of its own, with a bitmap that has bits.
struct Image {
    path: PathBuf,
    bytes: Vec<u8>,
    snapshot_table: u64,
    snapshot_l1: u64,
    snapshot_l2: u64,
    active_l2: u64,
    bitmap_directory: u64,
    bitmap_table: u64,
}

impl Image {
    fn make(dir: &Path) -> Self {
        let path = dir.join("image");
        let name = path.display();
        sh(&format!("qemu-img create -q -f qcow2 {name} 64M"));
        let io = |command: &str| {
            let args = ["-f", "qcow2", "-c", command, &path.display().to_string()];
            run("qemu-io", &args.map(str::to_owned));
        };
        io("write -P 1 0 256k");
        sh(&format!("qemu-img snapshot -c s {name}"));
        sh(&format!("qemu-img bitmap --add {name} b"));
        io("write -P 2 0 128k");
        let layer = Layer::open(&path).expect("opens");
        let snapshot = &layer.internal_snapshots().expect("read")[0];
        let bitmap = &layer.stored_bitmaps().expect("read")[0];
        let header = layer.header();
        let bytes = fs::read(&path).expect("read");
        let offset = |at: u64| {
            let at = usize::try_from(at).expect("fits");
            let word = u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight"));
            word & 0x00ff_ffff_ffff_fe00
        };
        Self {
            snapshot_table: header.snapshot_table.0,
            snapshot_l1: snapshot.l1_table.0,
            snapshot_l2: offset(snapshot.l1_table.0),
            active_l2: offset(header.l1_table.0),
            bitmap_directory: header.bitmaps.expect("there").directory.0,
            bitmap_table: bitmap.table.0,
            path: path.clone(),
            bytes,
        }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        let file = fs::File::options().write(true).open(&self.path);
        file.expect("opens")
            .write_all_at(bytes, at)
            .expect("written");
    }

    /// The image with bytes changed: what we find, and whether qemu-img finds any damage.
    fn damaged(&self, at: u64, bytes: &[u8]) -> (CheckReport, bool) {
        self.put(at, bytes);
        let layer = Layer::inspect(&self.path).expect("the active disk is whole");
        let ours = check(&layer).expect("checked");
        let theirs = Command::new("qemu-img")
            .args(["check", "--output=json", "-f", "qcow2"])
            .arg(&self.path)
            .output();
        let theirs = theirs.expect("qemu-img is installed").stdout;
        let theirs: Value = serde_json::from_slice(&theirs).unwrap_or(Value::Null);
        let seen = theirs.is_null() || theirs["corruptions"].as_u64().is_some_and(|n| n > 0);
        let place = usize::try_from(at).expect("fits");
        self.put(at, &self.bytes[place..place + bytes.len()]);
        (ours, seen)
    }
}

fn is_of(finding: &Finding, wanted: &[Use]) -> bool {
    if let Finding::Overlap { uses, .. } = finding {
        return uses.iter().any(|one| wanted.contains(one));
    }
    if let Finding::Unusable { usage, .. } = finding {
        return wanted.contains(usage);
    }
    matches!(finding, Finding::RefcountTooLow { .. })
}

#[test]
fn damage_that_only_an_internal_snapshot_or_a_bitmap_meets_is_found() {
    let dir = tempfile::tempdir().expect("a folder");
    let image = Image::make(dir.path());
    assert_ne!(image.snapshot_l2, image.active_l2, "tables of its own");
    let far = 1_u64 << 40;
    let snapshots = [
        Use::SnapshotL1Table,
        Use::L2Table,
        Use::Data,
        Use::SnapshotTable,
    ];
    let bitmaps = [Use::BitmapDirectory, Use::BitmapTable, Use::BitmapData];
    let word = u64::to_be_bytes;
    // Where, what, and which finding says so.
    let cases: [(&str, u64, [u8; 8], &[Use]); 12] = [
        (
            "its L1 table has a table behind the end",
            image.snapshot_l1,
            word(far),
            &snapshots,
        ),
        (
            "its L1 table has a table that is no cluster",
            image.snapshot_l1,
            word(image.snapshot_l2 + 512),
            &snapshots,
        ),
        (
            "its L1 table has a reserved bit",
            image.snapshot_l1,
            word(image.snapshot_l2 | 1),
            &snapshots,
        ),
        (
            "its table is the header",
            image.snapshot_l1,
            word(CLUSTER),
            &snapshots,
        ),
        (
            "its data is behind the end",
            image.snapshot_l2,
            word(far),
            &snapshots,
        ),
        (
            "its data is the active table",
            image.snapshot_l2,
            word(image.active_l2),
            &snapshots,
        ),
        (
            "its data has a reserved bit",
            image.snapshot_l2,
            word(1 << 57 | image.active_l2),
            &snapshots,
        ),
        (
            "its L1 table is behind the end",
            image.snapshot_table,
            word(far),
            &snapshots,
        ),
        (
            "the bits are behind the end",
            image.bitmap_table,
            word(far),
            &bitmaps,
        ),
        (
            "the bits are the active table",
            image.bitmap_table,
            word(image.active_l2),
            &bitmaps,
        ),
        (
            "an entry of the bitmap's table is not valid",
            image.bitmap_table,
            word(3),
            &bitmaps,
        ),
        (
            "the bitmap's table is behind the end",
            image.bitmap_directory,
            word(far),
            &bitmaps,
        ),
    ];
    for (name, at, bytes, wanted) in cases {
        let (ours, theirs) = image.damaged(at, &bytes);
        assert!(!ours.is_safe(), "{name}: {:?}", ours.findings);
        assert!(
            ours.findings.iter().any(|one| is_of(one, wanted)),
            "{name}: {:?}",
            ours.findings
        );
        assert!(theirs, "qemu-img finds it, too: {name}");
    }
    let (whole, _) = image.damaged(image.snapshot_l2, &word(0)[..0]);
    assert!(whole.is_clean(), "{:?}", whole.findings);
}

#[test]
fn bits_of_a_bitmap_over_the_table_of_an_internal_snapshot_are_found_though_refcounts_agree() {
    let dir = tempfile::tempdir().expect("a folder");
    let image = Image::make(dir.path());
    let refcount = 2 * CLUSTER + image.snapshot_l1 / CLUSTER * 2;
    image.put(refcount, &[0, 2]);
    let (ours, theirs) = image.damaged(image.bitmap_table, &image.snapshot_l1.to_be_bytes());
    assert!(
        !theirs,
        "qemu-img counts two references and a refcount of two"
    );
    let wanted = [Use::SnapshotL1Table, Use::BitmapData];
    let is_told =
        |one: &Finding| matches!(one, Finding::Overlap { uses, .. } if uses[..] == wanted);
    assert!(
        ours.findings.iter().any(is_told) && !ours.is_safe(),
        "{:?}",
        ours.findings
    );
}

#[test]
fn a_copied_flag_in_a_table_that_an_internal_snapshot_shares_is_found() {
    let dir = tempfile::tempdir().expect("a folder");
    let image = Image::make(dir.path());
    // The third cluster is shared: the active table must not say that it may be written.
    let at = usize::try_from(image.active_l2 + 16).expect("fits");
    let word = u64::from_be_bytes(image.bytes[at..at + 8].try_into().expect("eight"));
    assert_eq!(word & COPIED, 0);
    let (ours, _) = image.damaged(image.active_l2 + 16, &(word | COPIED).to_be_bytes());
    let found = ours
        .findings
        .iter()
        .any(|one| matches!(one, Finding::WrongCopiedFlag { .. }));
    assert!(found && !ours.is_safe(), "{:?}", ours.findings);
}
