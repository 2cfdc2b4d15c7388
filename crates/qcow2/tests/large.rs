//! Images of 64 TiB are read, checked, measured and planned in a set amount of memory.
//!
//! Files are sparse: their tables are where they should be and hold an entry here and there. Each operation runs in
//! a process of its own, which tells the most memory that it had.
#![allow(
    clippy::disallowed_methods,
    reason = "files of a test need not be durable"
)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::rebase;
use stead_qcow2::{
    Chain, Control, GuestOffset, Layer, LayerFile, LayerFormat, MAX_VIRTUAL_BYTES, NewFormat,
    Qcow2Options, check, measure,
};

/// Set in a child: the operation, the image, how many bytes its cache may have.
const JOB: &str = "STEAD_TEST_LARGE";
const MIB: u64 = 1 << 20;
/// What a process has beside its caches: the program, L1 tables (1 MiB each), buffers.
const FIXED_BYTES: u64 = 40 * MIB;

/// A sparse image of 64 TiB. Each `every`th L2 table is there, with one cluster of data each.
struct Shape {
    bits: u32,
    every: u64,
}

impl Shape {
    fn cluster(&self) -> u64 {
        1 << self.bits
    }

    fn coverage(&self) -> u64 {
        self.cluster() * self.cluster() / 8
    }

    fn l1_entries(&self) -> u64 {
        MAX_VIRTUAL_BYTES / self.coverage()
    }

    fn tables(&self) -> u64 {
        self.l1_entries() / self.every
    }

    /// Where table `index` has its only entry.
    fn entry(&self, index: u64) -> u64 {
        index * 7919 % (self.cluster() / 8)
    }

    /// Guest offset of the data of table `index`.
    fn data_at(&self, index: u64) -> u64 {
        index * self.every * self.coverage() + self.entry(index) * self.cluster()
    }

    /// Clusters: header, refcount table, refcount block, L1 table, L2 tables, data.
    fn write(&self, path: &Path, backing: Option<&str>) {
        let file = File::options()
            .create(true)
            .truncate(true)
            .write(true)
            .open(path);
        let file = file.expect("a file");
        let cluster = self.cluster();
        let l1_clusters = (self.l1_entries() * 8).div_ceil(cluster);
        let first_table = 3 + l1_clusters;
        let first_data = first_table + self.tables();
        let end = first_data + self.tables();
        assert!(end <= cluster * 8 / 16, "one refcount block is enough");
        file.set_len(end * cluster).expect("long");
        let put = |bytes: &[u8], at: u64| file.write_all_at(bytes, at).expect("written");
        put(&self.header(backing), 0);
        put(&(2 * cluster).to_be_bytes(), cluster);
        let counts: Vec<u8> = (0..end).flat_map(|_| 1_u16.to_be_bytes()).collect();
        put(&counts, 2 * cluster);
        for index in 0..self.tables() {
            let table = (first_table + index) * cluster;
            let data = (first_data + index) * cluster;
            let copied = 1_u64 << 63;
            put(
                &(table | copied).to_be_bytes(),
                3 * cluster + index * self.every * 8,
            );
            put(
                &(data | copied).to_be_bytes(),
                table + self.entry(index) * 8,
            );
            if index.is_multiple_of(64) {
                put(&[7; 512], data);
            }
        }
    }

    fn header(&self, backing: Option<&str>) -> Vec<u8> {
        let name = backing.unwrap_or_default();
        let mut bytes = b"QFI\xfb".to_vec();
        bytes.extend(3_u32.to_be_bytes());
        bytes.extend(if name.is_empty() { 0_u64 } else { 128 }.to_be_bytes());
        bytes.extend(u32::try_from(name.len()).expect("short").to_be_bytes());
        bytes.extend(self.bits.to_be_bytes());
        bytes.extend(MAX_VIRTUAL_BYTES.to_be_bytes());
        bytes.extend(0_u32.to_be_bytes());
        bytes.extend(u32::try_from(self.l1_entries()).expect("few").to_be_bytes());
        bytes.extend((3 * self.cluster()).to_be_bytes());
        bytes.extend(self.cluster().to_be_bytes());
        bytes.extend(1_u32.to_be_bytes());
        bytes.extend([0; 12 + 24]);
        bytes.extend(4_u32.to_be_bytes());
        bytes.extend(104_u32.to_be_bytes());
        assert_eq!(bytes.len(), 104);
        if !name.is_empty() {
            bytes.extend(0xe279_2aca_u32.to_be_bytes());
            bytes.extend(5_u32.to_be_bytes());
            bytes.extend(b"qcow2\0\0\0");
            bytes.resize(128, 0);
            bytes.extend(name.as_bytes());
        }
        bytes
    }
}

const SHAPES: [Shape; 2] = [
    // 512 MiB of L2 tables.
    Shape {
        bits: 16,
        every: 16,
    },
    // 256 MiB.
    Shape { bits: 21, every: 1 },
];

fn chain(path: &Path) -> Chain {
    let file = |path: &Path| LayerFile {
        path: path.to_owned(),
        format: LayerFormat::Qcow2,
    };
    Chain::open(&[file(path)]).expect("opens")
}

/// What a child does.
fn work(job: &str, shape: &Shape, path: &Path, cache_bytes: u64) {
    match job {
        "open" => drop(chain(path)),
        "check" => {
            let layer = Layer::open(path).expect("opens");
            layer.set_cache_bytes(cache_bytes);
            let report = check(&layer).expect("checked");
            assert!(report.is_clean(), "{:?}", report.findings.first());
            assert_eq!(report.guest_clusters, shape.tables());
        }
        "map" => {
            let layer = Layer::open(path).expect("opens");
            layer.set_cache_bytes(cache_bytes);
            let mut extents = 0;
            for extent in layer.extents(GuestOffset(0)) {
                extent.expect("read");
                extents += 1;
            }
            assert!(extents > shape.tables(), "{extents}");
        }
        "measure" => {
            let chain = chain(path);
            chain.set_cache_bytes(cache_bytes);
            let format = NewFormat::Qcow2(Qcow2Options::default());
            let found = measure(&chain, &format).expect("measured");
            assert!(found.required > shape.tables() * shape.cluster());
        }
        "read" => {
            let chain = chain(path);
            chain.set_cache_bytes(cache_bytes);
            let mut bytes = [0; 4096];
            for round in 0..3 {
                for index in 0..shape.tables() {
                    chain
                        .read_at(shape.data_at(index), &mut bytes)
                        .expect("read");
                    let written = index.is_multiple_of(64);
                    assert_eq!(bytes[0], if written { 7 } else { 0 }, "{round} {index}");
                }
            }
        }
        "flatten" => {
            let options = EditOptions {
                cache_bytes,
                ..EditOptions::default()
            };
            let editor = Editor::open(path, options).expect("opens");
            let below = chain(&path.with_extension("base"));
            below.set_cache_bytes(cache_bytes);
            let plan = rebase::plan(&editor, Some(&below), None, &Control::default());
            assert!(plan.expect("planned").new_bytes > 0);
        }
        other => panic!("{other}"),
    }
}

/// Runs in a child process; alone it does nothing.
#[test]
fn child_that_works() {
    let Ok(job) = std::env::var(JOB) else {
        return;
    };
    let parts: Vec<&str> = job.split(' ').collect();
    let shape = &SHAPES[parts[1].parse::<usize>().expect("a number")];
    work(
        parts[0],
        shape,
        Path::new(parts[3]),
        parts[2].parse().expect("a number"),
    );
    let status = std::fs::read_to_string("/proc/self/status").expect("there");
    let most = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    println!("most {}", most.expect("told").trim());
}

/// The most memory that a child had while it worked, in bytes.
fn memory_of(job: &str, shape: usize, cache_bytes: u64, path: &Path) -> u64 {
    let output = Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "child_that_works", "--nocapture"])
        .env(
            JOB,
            format!("{job} {shape} {cache_bytes} {}", path.display()),
        )
        .output()
        .expect("runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{job}: {text}{output:?}");
    let most = text
        .split("most ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    most.expect("told").parse::<u64>().expect("KiB") * 1024
}

#[test]
fn images_of_64_tib_are_handled_within_the_cache_and_a_fixed_amount_of_memory() {
    let dir = tempfile::tempdir().expect("a folder");
    for (index, shape) in SHAPES.iter().enumerate() {
        let path = dir.path().join(format!("{index}.qcow2"));
        shape.write(&path, None);
        for job in ["open", "check", "map", "measure", "read"] {
            let cache = 8 * MIB;
            let most = memory_of(job, index, cache, &path);
            assert!(
                most < cache + FIXED_BYTES,
                "{job} {}: {} MiB",
                shape.bits,
                most / MIB
            );
        }
        // With the default there is more in memory, and no more than that.
        let cache = stead_qcow2::DEFAULT_CACHE_BYTES;
        let most = memory_of("map", index, cache, &path);
        assert!(most > 64 * MIB, "the tables are kept: {} MiB", most / MIB);
        assert!(
            most < cache + FIXED_BYTES,
            "{}: {} MiB",
            shape.bits,
            most / MIB
        );
    }
}

#[test]
fn a_flatten_of_64_tib_is_planned_within_the_cache_and_a_fixed_amount_of_memory() {
    let dir = tempfile::tempdir().expect("a folder");
    for (index, shape) in SHAPES.iter().enumerate() {
        let path = dir.path().join(format!("{index}.qcow2"));
        let base = Shape {
            bits: shape.bits,
            every: shape.l1_entries() / 64,
        };
        base.write(&path.with_extension("base"), None);
        shape.write(&path, Some(&format!("{index}.base")));
        let cache = 16 * MIB;
        let most = memory_of("flatten", index, cache, &path);
        // Two caches: of the image's tables and of those below it.
        assert!(
            most < 2 * cache + FIXED_BYTES,
            "{}: {} MiB",
            shape.bits,
            most / MIB
        );
    }
}

#[test]
fn qemu_finds_these_images_whole() {
    let dir = tempfile::tempdir().expect("a folder");
    for shape in SHAPES {
        let path = dir.path().join("image");
        shape.write(&path, None);
        let status = Command::new("qemu-img")
            .args(["check", "-q"])
            .arg(&path)
            .status();
        assert!(
            status.expect("qemu-img is installed").success(),
            "{}",
            shape.bits
        );
    }
}
