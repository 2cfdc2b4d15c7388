//! Dirty bitmaps are read as QEMU reads them, and QEMU reads ours.

mod images;

use std::os::unix::fs::FileExt;
use std::path::Path;

use images::{Random, qemu_dirty, run, sh};
use stead_qcow2::{Bitmap, BitmapCluster, Error, GuestOffset, Layer};

fn io(path: &Path, commands: &[String]) {
    let mut args: Vec<String> = vec!["-f".into(), "qcow2".into()];
    for command in commands {
        args.extend(["-c".to_owned(), command.clone()]);
    }
    args.push(path.display().to_string());
    run("qemu-io", &args);
}

fn ours(path: &Path) -> Bitmap {
    let layer = Layer::open(path).expect("open");
    let stored = layer.stored_bitmaps().expect("a good directory");
    layer.read_bitmap(&stored[0]).expect("a good bitmap")
}

#[test]
fn what_qemu_marked_is_what_is_read() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut random = Random::new(31);
    for (cluster, granularity) in [
        (512, 512),
        (512, 65_536),
        (4096, 2048),
        (65_536, 512),
        (65_536, 131_072),
    ] {
        let path = dir.path().join(format!("{cluster}-{granularity}"));
        let name = path.display();
        let size = 512 * (9000 + random.below(5000));
        sh(&format!(
            "qemu-img create -q -f qcow2 -o cluster_size={cluster} {name} {size}"
        ));
        sh(&format!("qemu-img bitmap --add -g {granularity} {name} b0"));
        let writes: Vec<String> = (0..random.below(30))
            .map(|_| {
                let at = random.below(size / 512) * 512;
                let length = (512 * (1 + random.below(200))).min(size - at);
                format!("write {at} {length}")
            })
            .collect();
        io(&path, &writes);
        let bitmap = ours(&path);
        assert!(bitmap.auto && bitmap.name() == b"b0");
        assert_eq!(
            (bitmap.granularity(), bitmap.disk_length()),
            (granularity, size)
        );
        let found: Vec<_> = bitmap.dirty_ranges().collect();
        assert_eq!(found, qemu_dirty(&path, "b0"), "{cluster} {granularity}");
    }
}

/// Bits of a bitmap written over those of an image, behind its end; its refcounts do not matter here.
fn store(path: &Path, bitmap: &Bitmap) -> [u64; 3] {
    let layer = Layer::open(path).expect("open");
    let size = layer.cluster_size();
    let stored = layer.stored_bitmaps().expect("a good directory");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .expect("open");
    let mut end = layer.file_length().next_multiple_of(size.bytes());
    let mut kinds = [0; 3];
    for index in 0..bitmap.table_entries(size) {
        let word = match bitmap.cluster(size, index) {
            BitmapCluster::Clear => 0,
            BitmapCluster::Full => 1,
            BitmapCluster::Mixed => {
                let mut bytes = vec![0; size.buffer_len()];
                bitmap.cluster_bytes(size, index, &mut bytes);
                file.write_all_at(&bytes, end).expect("write");
                end += size.bytes();
                end - size.bytes()
            }
        };
        kinds[usize::try_from(word.min(2)).expect("small")] += 1;
        file.write_all_at(&word.to_be_bytes(), stored[0].table.0 + index * 8)
            .expect("write");
    }
    kinds
}

#[test]
fn what_is_encoded_is_what_qemu_reads() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    let name = path.display();
    let size = (24 << 20) + 512 * 77;
    sh(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size=512 {name} {size}"
    ));
    sh(&format!("qemu-img bitmap --add -g 512 {name} b0"));
    let mut bitmap = ours(&path);
    assert_eq!(bitmap.dirty_bytes(), 0);
    let mut random = Random::new(32);
    for _ in 0..50 {
        bitmap.set(GuestOffset(random.below(size)), random.below(100_000));
    }
    bitmap.set(GuestOffset(4 << 20), 9 << 20);
    let kinds = store(&path, &bitmap);
    assert!(kinds.iter().all(|count| *count > 0), "{kinds:?}");
    let found: Vec<_> = bitmap.dirty_ranges().collect();
    assert_eq!(found, qemu_dirty(&path, "b0"));
    assert_eq!(ours(&path), bitmap);
}

#[test]
fn a_bitmap_that_was_not_saved_is_not_read() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    let name = path.display();
    sh(&format!("qemu-img create -q -f qcow2 {name} 1M"));
    sh(&format!("qemu-img bitmap --add {name} b0"));
    let layer = Layer::open(&path).expect("open");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open");
    let directory = layer.header().bitmaps.expect("there").directory.0;
    for (at, bytes, said) in [
        (15, &[3_u8][..], "in use"),
        (15, &[8 | 2], "type and flags"),
        (16, &[2], "type and flags"),
        (17, &[70], "granularity"),
        (8, &[0, 0, 0, 2], "bitmap_table_size"),
    ] {
        let mut before = [0; 4];
        file_read(&path, directory + at, &mut before);
        file.write_all_at(bytes, directory + at).expect("write");
        let layer = Layer::open(&path).expect("open");
        let stored = layer.stored_bitmaps().expect("a good directory");
        let error = layer.read_bitmap(&stored[0]).expect_err(said);
        assert!(error.to_string().contains(said), "{said}: {error}");
        assert_eq!(matches!(error, Error::BitmapInUse { .. }), said == "in use");
        file.write_all_at(&before[..bytes.len()], directory + at)
            .expect("write");
    }
    assert_eq!(ours(&path).dirty_bytes(), 0);
}

fn file_read(path: &Path, at: u64, bytes: &mut [u8]) {
    let file = std::fs::File::open(path).expect("open");
    file.read_exact_at(bytes, at).expect("read");
}
