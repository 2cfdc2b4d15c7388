//! Checking finds what `qemu-img check` finds, in good images and in damaged ones.

mod images;

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use images::{Random, make_chain};
use serde_json::Value;
use stead_qcow2::{CheckReport, Error, Finding, Layer, LayerFormat, Note, Use, check};

fn seeds(theme: u64) -> Range<u64> {
    let count = std::env::var("STEAD_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok());
    let first = theme * 1_000_000;
    first..first + count.unwrap_or(10)
}

/// What QEMU's check says; `None` when it cannot check the image at all.
fn qemu_check(path: &Path) -> Option<Value> {
    // Without the backing file: its name may be what was damaged.
    let options = format!(
        "driver=qcow2,file.driver=file,file.filename={},backing=",
        path.display()
    );
    let output = Command::new("qemu-img")
        .args(["check", "--output=json", "--image-opts", &options])
        .output()
        .expect("qemu-img is installed");
    let report: Value = serde_json::from_slice(&output.stdout).ok()?;
    (report["check-errors"] == 0).then_some(report)
}

fn number(report: &Value, key: &str) -> u64 {
    // QEMU leaves out what is 0.
    report
        .get(key)
        .map_or(0, |value| value.as_u64().expect("a number"))
}

fn our_check(path: &Path) -> stead_qcow2::Result<CheckReport> {
    check(&Layer::open(path)?)
}

#[test]
fn good_images_are_clean_and_counted_as_qemu_counts() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut snapshots = 0;
    let mut bitmaps = 0;
    let (mut checked, mut damaged_by_qemu) = (0, 0);
    for seed in seeds(11) {
        let made = make_chain(dir.path(), seed);
        for (level, file) in made.files.iter().enumerate() {
            if file.format == LayerFormat::Raw {
                continue;
            }
            let mut random = Random::new(seed + level as u64);
            bitmaps += u64::from(add_bitmap(&file.path, &mut random));
            let layer = Layer::open(&file.path).expect("a good image");
            snapshots += layer.internal_snapshots().expect("a good table").len();
            let ours = check(&layer).expect("a good image");
            let theirs = qemu_check(&file.path).expect("a good image");
            let text = format!("{:?}\n{theirs}\n{}", ours.findings, made.story);
            // QEMU 7.2 itself damages an image now and then, when compressed writes follow discards:
            // a cluster of compressed data is given to other data too.
            if number(&theirs, "corruptions") > 0 {
                assert!(!ours.is_safe(), "{text}");
                damaged_by_qemu += 1;
                continue;
            }
            assert!(ours.is_clean(), "{text}");
            assert_eq!(number(&theirs, "leaks"), 0, "{text}");
            checked += 1;
            // QEMU counts clusters that were preallocated as zeros with the allocated ones; so do we.
            let counted = [
                (ours.guest_clusters, "allocated-clusters"),
                (ours.compressed_clusters, "compressed-clusters"),
                (ours.image_end.0, "image-end-offset"),
            ];
            for (ours, key) in counted {
                assert_eq!(ours, number(&theirs, key), "{key}\n{}", made.story);
            }
        }
    }
    assert!(
        checked > 10 * damaged_by_qemu,
        "{checked} checked, {damaged_by_qemu} damaged"
    );
    assert!(
        snapshots > 0 && bitmaps > 0,
        "{snapshots} snapshots, {bitmaps} bitmaps"
    );
}

/// Adds a persistent bitmap and makes some of it dirty, where the image can have one.
fn add_bitmap(path: &Path, random: &mut Random) -> bool {
    if !random.chance(2) {
        return false;
    }
    let path = path.to_str().expect("temp paths are text");
    let run = |program: &str, args: &[&str]| {
        let output = Command::new(program)
            .args(args)
            .output()
            .expect("installed");
        output.status.success()
    };
    run(
        "qemu-img",
        &["bitmap", "--add", "-g", "512", "-f", "qcow2", path, "b0"],
    ) && run("qemu-io", &["-f", "qcow2", "-c", "write -P 3 1k 9k", path])
}

/// The places of metadata in an image, read by the bytes of the specification.
struct Anatomy {
    bytes: Vec<u8>,
    cluster: u64,
    l1: u64,
    refcount_table: u64,
}

impl Anatomy {
    fn of(path: &Path) -> Self {
        let bytes = std::fs::read(path).expect("read");
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let [l1, refcount_table] = [word(40), word(48)];
        let cluster = 1 << bytes[23];
        Self {
            bytes,
            cluster,
            l1,
            refcount_table,
        }
    }

    fn word(&self, at: u64) -> u64 {
        let at = usize::try_from(at).expect("fits");
        u64::from_be_bytes(self.bytes[at..at + 8].try_into().expect("8 bytes"))
    }

    fn offset(&self, at: u64) -> u64 {
        self.word(at) & 0x00ff_ffff_ffff_fe00
    }

    /// The first L2 table.
    fn l2(&self) -> u64 {
        self.offset(self.l1)
    }

    /// Where the refcount of the cluster at `place` stands, with 16 bits.
    fn refcount(&self, place: u64) -> u64 {
        let block = self.offset(self.refcount_table);
        block + place / self.cluster * 2
    }
}

const CLUSTER: u64 = 65_536;

/// An image with data in its first eight clusters, and 16-bit refcounts.
fn simple(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("simple.qcow2");
    images::sh(&format!(
        "qemu-img create -q -f qcow2 {} 8M",
        path.display()
    ));
    let args = ["-c", "write -P 5 0 512k"].map(str::to_owned);
    let args: Vec<String> = args
        .into_iter()
        .chain([path.display().to_string()])
        .collect();
    images::run("qemu-io", &args);
    path
}

fn put(path: &Path, at: u64, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .expect("open");
    file.write_all_at(bytes, at).expect("write");
}

/// What a damage must lead to: corruptions and leaks, by both.
struct Case {
    name: &'static str,
    at: u64,
    bytes: Vec<u8>,
    corruptions: u64,
    leaks: u64,
}

fn cases(anatomy: &Anatomy) -> Vec<Case> {
    let l2 = anatomy.l2();
    let first = anatomy.offset(l2);
    let second = l2 + 8;
    let file_end = anatomy.bytes.len() as u64;
    let case = |name, at, bytes: &[u8], corruptions, leaks| Case {
        name,
        at,
        bytes: bytes.to_vec(),
        corruptions,
        leaks,
    };
    let word = |word: u64| word.to_be_bytes();
    let copied = 1 << 63;
    vec![
        case(
            "a free cluster has a refcount",
            anatomy.refcount(file_end - CLUSTER),
            &[0, 2],
            1,
            1,
        ),
        case(
            "a used cluster has no refcount",
            anatomy.refcount(first),
            &[0, 0],
            2,
            0,
        ),
        case(
            "a refcount is too high",
            anatomy.refcount(first),
            &[0, 7],
            1,
            1,
        ),
        case(
            "an L2 table has no refcount",
            anatomy.refcount(l2),
            &[0, 0],
            2,
            0,
        ),
        case(
            "the header has no refcount",
            anatomy.refcount(0),
            &[0, 0],
            1,
            0,
        ),
        case("an entry lost its copied flag", l2, &word(first), 1, 0),
        case("an entry is gone", l2, &word(0), 0, 1),
        case(
            "two entries share a cluster",
            second,
            &word(first | copied),
            1,
            1,
        ),
        case(
            "data lies over an L2 table",
            second,
            &word(l2 | copied),
            1,
            1,
        ),
        case(
            "data lies over the header's tables",
            second,
            &word(anatomy.l1 | copied),
            1,
            1,
        ),
        case(
            "data lies out of the file",
            second,
            &word(1 << 40 | copied),
            1,
            1,
        ),
        case(
            "an entry has a reserved bit",
            second,
            &word(1 << 57 | first | copied),
            1,
            1,
        ),
        case(
            "the refcount table is empty",
            anatomy.refcount_table,
            &word(0),
            1,
            0,
        ),
    ]
}

#[test]
fn each_damage_is_found_as_qemu_finds_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = simple(dir.path());
    let anatomy = Anatomy::of(&path);
    let clean = our_check(&path).expect("a good image");
    assert!(clean.is_clean(), "{clean:?}");
    for case in cases(&anatomy) {
        let place = usize::try_from(case.at).expect("fits");
        let before = anatomy.bytes[place..place + case.bytes.len()].to_vec();
        put(&path, case.at, &case.bytes);
        let ours = our_check(&path).expect("a readable image");
        let theirs = qemu_check(&path).expect("a readable image");
        let name = case.name;
        let text = format!("{name}: {:#?}\n{theirs}", ours.findings);
        assert!(!ours.is_clean(), "{text}");
        assert_eq!(ours.leaks, number(&theirs, "leaks"), "{text}");
        assert!(ours.leaks >= case.leaks, "{text}");
        assert_eq!(
            ours.corruptions > 0,
            number(&theirs, "corruptions") > 0,
            "{text}"
        );
        assert!(ours.corruptions >= case.corruptions, "{text}");
        put(&path, case.at, &before);
    }
    assert_eq!(our_check(&path).expect("a good image"), clean);
}

#[test]
fn an_overlap_that_the_refcounts_agree_with_is_found() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = simple(dir.path());
    let anatomy = Anatomy::of(&path);
    let l2 = anatomy.l2();
    let lost = anatomy.offset(l2 + 8);
    put(&path, l2 + 8, &l2.to_be_bytes());
    put(&path, anatomy.l1, &l2.to_be_bytes());
    put(&path, anatomy.refcount(l2), &[0, 2]);
    put(&path, anatomy.refcount(lost), &[0, 0]);
    let ours = our_check(&path).expect("a readable image");
    let theirs = qemu_check(&path).expect("a readable image");
    assert_eq!(number(&theirs, "corruptions"), 0, "QEMU does not see it");
    let [Finding::Overlap { cluster, uses }] = ours.findings.as_slice() else {
        panic!("{:?}", ours.findings)
    };
    assert_eq!(
        (cluster.0, uses.as_slice()),
        (l2, &[Use::L2Table, Use::Data][..])
    );
}

/// Where metadata lies: the header, the tables, and the first clusters behind them.
fn metadata(anatomy: &Anatomy) -> Vec<Range<u64>> {
    let table = |at: u64| at..(at + anatomy.cluster).min(anatomy.bytes.len() as u64);
    let block = anatomy.offset(anatomy.refcount_table);
    let mut all = vec![
        0..112,
        table(anatomy.l1),
        table(anatomy.refcount_table),
        table(block),
    ];
    all.extend((anatomy.l2() != 0).then(|| table(anatomy.l2())));
    all
}

/// Bits flipped in metadata, mostly where it is not zero: what QEMU finds corrupt, we find corrupt or do
/// not open. The other way round there may be more: overlaps, and what QEMU ignores when it reads.
#[test]
fn no_damage_that_qemu_finds_is_missed() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (mut corrupt, mut leaky, mut good) = (0, 0, 0);
    for seed in seeds(12) {
        let made = make_chain(dir.path(), seed);
        let Some(file) = made
            .files
            .iter()
            .find(|file| file.format == LayerFormat::Qcow2)
        else {
            continue;
        };
        let anatomy = Anatomy::of(&file.path);
        let mut random = Random::new(seed);
        let ranges = metadata(&anatomy);
        for _ in 0..15 {
            let at = pick_byte(&mut random, &ranges, &anatomy);
            let bit = 1_u8 << random.below(8);
            let byte = anatomy.bytes[usize::try_from(at).expect("fits")];
            put(&file.path, at, &[byte ^ bit]);
            let ours = our_check(&file.path);
            let theirs = qemu_check(&file.path);
            let text = format!(
                "byte {at:#x} bit {bit:#x}: {ours:?}\n{theirs:?}\n{}",
                made.story
            );
            match (&ours, &theirs) {
                (Err(Error::Io { .. }), _) => panic!("{text}"),
                (Ok(ours), None) => assert!(!ours.is_safe(), "{text}"),
                (Err(_), _) => corrupt += 1,
                (Ok(ours), Some(theirs)) => {
                    let theirs_corrupt = number(theirs, "corruptions") > 0;
                    assert!(ours.corruptions > 0 || !theirs_corrupt, "{text}");
                    if ours.corruptions == 0 {
                        assert_eq!(ours.leaks, number(theirs, "leaks"), "{text}");
                    }
                    corrupt += u64::from(!ours.is_safe());
                    leaky += u64::from(ours.is_safe() && ours.leaks > 0);
                    good += u64::from(ours.is_clean());
                }
            }
            put(&file.path, at, &[byte]);
        }
    }
    assert!(
        corrupt > 20 && good > 0,
        "{corrupt} corrupt, {leaky} leaky, {good} good"
    );
}

fn pick_byte(random: &mut Random, ranges: &[Range<u64>], anatomy: &Anatomy) -> u64 {
    let mut at = 0;
    for _ in 0..200 {
        let range = &ranges[usize::try_from(random.below(ranges.len() as u64)).expect("few")];
        at = range.start + random.below(range.end - range.start);
        if anatomy.bytes[usize::try_from(at).expect("fits")] != 0 {
            break;
        }
    }
    at
}

#[test]
fn a_checked_image_is_not_written() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = simple(dir.path());
    put(&path, Anatomy::of(&path).l2(), &[0; 8]);
    let mut permissions = std::fs::metadata(&path).expect("stat").permissions();
    permissions.set_readonly(true);
    std::fs::set_permissions(&path, permissions).expect("read-only");
    let before = std::fs::read(&path).expect("read");
    assert_eq!(our_check(&path).expect("a readable image").leaks, 1);
    assert!(std::fs::read(&path).expect("read") == before);
}

fn notes(path: &Path) -> Vec<Note> {
    let report = our_check(path).expect("a readable image");
    assert!(report.is_safe(), "{:?}", report.findings);
    report.notes
}

fn io(path: &Path, commands: &[&str]) {
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    let path = path.to_str().expect("temp paths are text");
    let args: Vec<String> = commands.chain([path]).map(str::to_owned).collect();
    images::run("qemu-io", &args);
}

/// An overlay with an internal snapshot over 8 MiB of data in its base, flattened by `qemu-img`.
fn hollowed(dir: &Path, options: &str, before: &[&str], after: &[&str]) -> std::path::PathBuf {
    let [base, top] = ["base", "top"].map(|name| dir.join(name));
    let (base_name, top_name) = (base.display(), top.display());
    images::sh(&format!("qemu-img create -q -f qcow2 {base_name} 64M"));
    io(&base, &["write -P 170 0 8M"]);
    images::sh(&format!(
        "qemu-img create -q -f qcow2 {options} -b {base_name} -F qcow2 {top_name}"
    ));
    io(&top, before);
    images::sh(&format!("qemu-img snapshot -c cp {top_name}"));
    io(&top, after);
    assert_eq!(notes(&top), [], "nothing is lost yet");
    let words = ["rebase", "-b", "", top.to_str().expect("text")];
    images::run("qemu-img", &words.map(str::to_owned));
    top
}

/// Runs of clusters are counted at once, and pages that are alike are held against refcounts at a glance:
/// that must give what counting one by one gives.
#[test]
fn a_large_preallocated_image_is_counted_exactly_and_one_wrong_refcount_in_it_is_found() {
    let dir = tempfile::tempdir().expect("temp dir");
    for options in [
        "cluster_size=64k",
        "cluster_size=2M,refcount_bits=64",
        "cluster_size=16k,refcount_bits=1",
    ] {
        let path = dir.path().join(options.replace([',', '='], "-"));
        let name = path.display();
        images::sh(&format!(
            "qemu-img create -q -f qcow2 -o preallocation=metadata,{options} {name} 3G"
        ));
        let ours = our_check(&path).expect("a good image");
        assert!(ours.is_clean(), "{:?}", ours.findings);
        let theirs = qemu_check(&path).expect("a good image");
        assert_eq!(ours.guest_clusters, number(&theirs, "allocated-clusters"));
        assert_eq!(ours.image_end.0, number(&theirs, "image-end-offset"));
        assert_eq!(ours.used_clusters, ours.file_clusters);
        let layer = Layer::open(&path).expect("open");
        let mut table = [0; 8];
        let file = std::fs::File::open(&path).expect("open");
        file.read_exact_at(&mut table, layer.header().refcount_table.0)
            .expect("read");
        put(&path, u64::from_be_bytes(table) + 300, &[0x55]);
        let wrong = our_check(&path).expect("a readable image");
        assert!(!wrong.is_safe() || wrong.leaks > 0, "{options}");
        assert!(wrong.findings.len() <= 16, "{:?}", wrong.findings);
    }
}

#[test]
fn an_internal_snapshot_whose_table_is_too_short_for_its_disk_is_found() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = simple(dir.path());
    images::sh(&format!("qemu-img snapshot -c s {}", path.display()));
    assert_eq!(notes(&path), []);
    let table = Anatomy::of(&path).word(64);
    put(&path, table + 48, &(1_u64 << 40).to_be_bytes());
    let report = our_check(&path).expect("a readable image");
    let [Finding::Unusable { usage, reason }] = &report.findings[..] else {
        panic!("{:?}", report.findings)
    };
    assert_eq!(*usage, Use::SnapshotL1Table);
    assert!(reason.contains("at least"), "{reason}");
}

/// The internal snapshot reads zeros where it read data of the base, and QEMU's check is content.
#[test]
fn an_internal_snapshot_hollowed_by_a_flatten_is_told_as_a_possible_loss() {
    for options in ["", "-o cluster_size=4k", "-o extended_l2=on"] {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = hollowed(
            dir.path(),
            options,
            &["write -P 1 1M 64k"],
            &["write -P 2 2M 64k"],
        );
        let theirs = qemu_check(&path).expect("a readable image");
        assert_eq!(number(&theirs, "corruptions") + number(&theirs, "leaks"), 0);
        let [
            Note::PossibleLoss {
                id,
                name,
                missing_bytes,
                diverged_bytes,
                incomplete,
            },
        ] = &notes(&path)[..]
        else {
            panic!("{:?}", notes(&path))
        };
        assert_eq!((id.as_str(), name.as_str()), ("1", "cp"));
        assert_eq!(
            (*missing_bytes, *diverged_bytes, *incomplete),
            ((8 << 20) - (64 << 10), 0, false)
        );
        // What both have and what is not the same is told, too.
        io(&path, &["write -P 3 1M 64k"]);
        let after = notes(&path);
        let told = matches!(
            &after[..],
            [Note::PossibleLoss {
                diverged_bytes: 65_536,
                ..
            }]
        );
        assert!(told, "{after:?}");
        assert!(after[0].to_string().contains("possible loss"));
    }
}

#[test]
fn bitmaps_that_say_nothing_or_do_not_fit_are_told() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    let name = path.display();
    images::sh(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size=512 {name} 1M"
    ));
    images::sh(&format!("qemu-img bitmap --add -g 65536 {name} b0"));
    io(&path, &["write 0 64k"]);
    assert_eq!(notes(&path), []);
    let layer = Layer::open(&path).expect("open");
    let stored = layer.stored_bitmaps().expect("a good directory");
    let directory = layer.header().bitmaps.expect("there").directory.0;
    let anatomy = Anatomy::of(&path);
    let bits = anatomy.offset(stored[0].table.0);
    assert_ne!(bits, 0, "the bits are stored");
    let b0 = || "b0".to_owned();
    let changed = |at: u64, bytes: &[u8]| {
        let place = usize::try_from(at).expect("fits");
        let before = anatomy.bytes[place..place + bytes.len()].to_vec();
        put(&path, at, bytes);
        let report = our_check(&path).expect("a readable image");
        put(&path, at, &before);
        report
    };
    assert_eq!(
        changed(bits + 100, &[1]).notes,
        [Note::BitmapTailBits { name: b0() }]
    );
    assert_eq!(
        changed(directory + 15, &[3]).notes,
        [Note::BitmapInUse { name: b0() }]
    );
    assert_eq!(
        changed(directory + 16, &[9]).notes,
        [Note::UnknownBitmap { name: b0() }]
    );
    let untrusted = changed(95, &[0]);
    assert_eq!(untrusted.notes, [Note::BitmapsNotTrusted { count: 1 }]);
    assert!(untrusted.leaks > 0, "their clusters belong to nobody");
    assert_eq!(changed(95, &[3]).notes, [Note::NoDataFile]);
    for wrong in [changed(directory + 17, &[5]), changed(directory + 11, &[2])] {
        let found = wrong.findings.iter().any(|finding| {
            matches!(
                finding,
                Finding::Unusable {
                    usage: Use::BitmapTable,
                    ..
                }
            )
        });
        assert!(found && !wrong.is_safe(), "{:?}", wrong.findings);
    }
    images::sh(&format!("qemu-img bitmap --remove {name} b0"));
    put(&path, 95, &[1]);
    assert_eq!(notes(&path), [Note::NoBitmaps]);
    let report = our_check(&path).expect("readable");
    let json = serde_json::to_value(&report).expect("JSON");
    assert_eq!(json["notes"][0]["note"], "no-bitmaps");
    assert_eq!(json["leaks"], 0);
}
