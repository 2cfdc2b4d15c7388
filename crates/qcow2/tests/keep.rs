//! A copy that keeps internal snapshots and bitmaps has all of them, and shares what they share; a part of a
//! disk is what `qemu-img dd` takes.

mod images;

use std::path::Path;

use images::{format_name, make_chain, run, sh};
use stead_qcow2::{
    Chain, ClusterSize, Compression, Control, ConvertOptions, DdBlocks, Durability, GuestOffset,
    Keep, Layer, LayerFormat, NewFormat, Preallocation, Qcow2Options, Target, Verify, check,
    convert, dd, predict,
};
use stead_sys::durable::Existing;

fn new_file(path: &Path) -> Target {
    Target::New {
        path: path.to_owned(),
        mode: 0o600,
        existing: Existing::Keep,
    }
}

fn options(qcow2: Qcow2Options) -> ConvertOptions<'static> {
    ConvertOptions {
        format: NewFormat::Qcow2(qcow2),
        keep: Keep {
            snapshots: true,
            bitmaps: true,
        },
        verify: Verify::Content,
        durability: Durability::Cached,
        ..ConvertOptions::default()
    }
}

fn io(path: &Path, commands: &[&str]) {
    let mut args: Vec<String> = Vec::new();
    for command in commands {
        args.extend(["-c".to_owned(), (*command).to_owned()]);
    }
    args.push(path.display().to_string());
    run("qemu-io", &args);
}

/// A base, and a disk over it with three internal snapshots, compressed clusters, and a bitmap.
fn rich_disk(dir: &Path) -> Chain {
    let (base, top) = (dir.join("base"), dir.join("top"));
    sh(&format!("qemu-img create -q -f raw {} 16M", base.display()));
    run(
        "qemu-io",
        &[
            "-f".into(),
            "raw".into(),
            "-c".into(),
            "write -P 9 0 12M".into(),
            base.display().to_string(),
        ],
    );
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {} -F raw {} 16M",
        base.display(),
        top.display()
    ));
    io(
        &top,
        &["write -P 1 0 2M", "write -c -P 2 4M 1M", "write -z 6M 1M"],
    );
    sh(&format!("qemu-img snapshot -c one {}", top.display()));
    io(&top, &["write -P 3 1M 100k", "write -P 4 8M 3M"]);
    sh(&format!("qemu-img snapshot -c two {}", top.display()));
    io(&top, &["write -P 5 9M 1M", "write -c -P 6 13M 64k"]);
    sh(&format!("qemu-img snapshot -c three {}", top.display()));
    sh(&format!("qemu-img bitmap --add {} changes", top.display()));
    io(&top, &["write -P 7 2M 130k"]);
    sh(&format!(
        "qemu-img bitmap --add -g 4k --disable {} frozen",
        top.display()
    ));
    Chain::open(&[
        images::layer(&top, LayerFormat::Qcow2),
        images::layer(&base, LayerFormat::Raw),
    ])
    .expect("open")
}

fn kinds() -> Vec<(Qcow2Options, bool)> {
    let of = |change: &dyn Fn(&mut Qcow2Options)| {
        let mut options = Qcow2Options::default();
        change(&mut options);
        options
    };
    let bits = |bits| ClusterSize::from_bits(bits).expect("valid");
    vec![
        (of(&|_| ()), false),
        (of(&|o| o.compression = Compression::Zstd), true),
        (
            of(&|o| (o.cluster_size, o.refcount_bits) = (bits(12), 64)),
            false,
        ),
        (
            of(&|o| (o.cluster_size, o.refcount_bits) = (bits(12), 1)),
            false,
        ),
        (of(&|o| o.refcount_bits = 2), true),
        (of(&|o| o.extended_l2 = true), false),
        (of(&|o| o.cluster_size = bits(21)), false),
    ]
}

#[test]
fn every_snapshot_and_bitmap_of_a_chain_is_in_the_copy_and_reads_the_same_without_the_base() {
    let dir = tempfile::tempdir().expect("temp dir");
    let chain = rich_disk(dir.path());
    for (index, (qcow2, compressed)) in kinds().into_iter().enumerate() {
        let path = dir.path().join(format!("copy{index}"));
        let options = ConvertOptions {
            compressed,
            ..options(qcow2.clone())
        };
        let said = predict(&chain, &new_file(&path), &options, &Control::default());
        let made = convert(&chain, &new_file(&path), &options, &Control::default());
        let made = made.unwrap_or_else(|error| panic!("{index}: {error}"));
        assert_eq!(said.expect("predict"), made, "{index}");
        assert_eq!(made.kept_snapshots, 3);
        assert_eq!(made.kept_bitmaps, [b"changes".to_vec(), b"frozen".to_vec()]);
        assert_eq!(path.metadata().expect("stat").len(), made.file_bytes);
        sh(&format!("qemu-img check -q {}", path.display()));
        let layer = Layer::open(&path).expect("our own image");
        let report = check(&layer).expect("our own image");
        assert!(report.is_clean(), "{index}: {:?}", report.findings);
        as_qemu_sees_it(dir.path(), &path);
        let bitmaps = layer.stored_bitmaps().expect("read");
        let changes = layer.read_bitmap(&bitmaps[0]).expect("read");
        assert!(changes.is_dirty(GuestOffset(2 << 20)) && !changes.is_dirty(GuestOffset(0)));
        assert_eq!([bitmaps[0].auto, bitmaps[1].auto], [true, false]);
    }
}

/// QEMU reads each snapshot of the copy as it reads that of the source.
fn as_qemu_sees_it(dir: &Path, copy: &Path) {
    for name in ["one", "two", "three"] {
        let read = |image: &Path, to: &str| {
            let to = dir.join(to);
            let (image, to) = (image.display(), to.display());
            sh(&format!(
                "qemu-img convert -f qcow2 -l {name} -O raw {image} {to}"
            ));
            std::fs::read(to.to_string()).expect("read")
        };
        assert!(
            read(copy, "ours") == read(&dir.join("top"), "theirs"),
            "{name}"
        );
    }
}

/// 16 MiB with 12 MiB of data: four full copies would have 48 MiB.
#[test]
fn views_share_what_did_not_change_between_them() {
    let dir = tempfile::tempdir().expect("temp dir");
    let chain = rich_disk(dir.path());
    let path = dir.path().join("copy");
    let options = options(Qcow2Options::default());
    let made = convert(&chain, &new_file(&path), &options, &Control::default()).expect("convert");
    assert!(made.file_bytes < 20 << 20, "{made:?}");
}

#[test]
fn an_applied_snapshot_of_a_copy_can_be_written_and_stays_clean() {
    let dir = tempfile::tempdir().expect("temp dir");
    let chain = rich_disk(dir.path());
    let path = dir.path().join("copy");
    let mut options = options(Qcow2Options::default());
    options.keep.bitmaps = false;
    convert(&chain, &new_file(&path), &options, &Control::default()).expect("convert");
    for name in ["two", "one", "three"] {
        sh(&format!("qemu-img snapshot -a {name} {}", path.display()));
        io(&path, &["write -P 77 3M 5M"]);
        sh(&format!("qemu-img check -q {}", path.display()));
    }
    sh(&format!("qemu-img snapshot -d one {}", path.display()));
    sh(&format!("qemu-img check -q {}", path.display()));
}

#[test]
fn bitmaps_of_layers_are_joined_and_one_with_a_hole_is_dropped_with_the_reason() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = |name: &str| dir.path().join(name);
    let [low, middle, top] = ["low", "middle", "top"].map(path);
    sh(&format!("qemu-img create -q -f qcow2 {} 8M", low.display()));
    for name in ["joined", "holed"] {
        sh(&format!("qemu-img bitmap --add {} {name}", low.display()));
    }
    io(&low, &["write -P 1 1M 64k"]);
    for (over, below) in [(&middle, &low), (&top, &middle)] {
        sh(&format!(
            "qemu-img create -q -f qcow2 -b {} -F qcow2 {} 8M",
            below.display(),
            over.display()
        ));
        sh(&format!("qemu-img bitmap --add {} joined", over.display()));
    }
    sh(&format!("qemu-img bitmap --add {} holed", top.display()));
    sh(&format!(
        "qemu-img bitmap --add --disable {} own",
        top.display()
    ));
    io(&middle, &["write -P 2 3M 64k"]);
    io(&top, &["write -P 3 5M 64k"]);
    let files = [top, middle, low].map(|path| images::layer(path, LayerFormat::Qcow2));
    let chain = Chain::open(&files).expect("open");
    let copy = path("copy");
    let made = convert(
        &chain,
        &new_file(&copy),
        &options(Qcow2Options::default()),
        &Control::default(),
    )
    .expect("convert");
    assert_eq!(made.kept_bitmaps, [b"joined".to_vec(), b"own".to_vec()]);
    assert_eq!(made.dropped_bitmaps.len(), 1);
    assert_eq!(made.dropped_bitmaps[0].name, b"holed");
    assert!(
        made.dropped_bitmaps[0].reason.contains("layer 1"),
        "{made:?}"
    );
    let layer = Layer::open(&copy).expect("open");
    let stored = layer.stored_bitmaps().expect("read");
    let joined = layer.read_bitmap(&stored[0]).expect("read");
    let dirty: Vec<_> = joined.dirty_ranges().collect();
    let piece = |mib: u64| mib << 20..(mib << 20) + (64 << 10);
    assert_eq!(dirty, [piece(1), piece(3), piece(5)]);
    sh(&format!("qemu-img check -q {}", copy.display()));
}

#[test]
fn a_part_of_a_disk_is_what_qemu_img_dd_takes() {
    let dir = tempfile::tempdir().expect("temp dir");
    let made = make_chain(dir.path(), 41_000_002);
    let chain = made.open();
    let top = made.top();
    let cases = [
        (512, None, 0),
        (4096, Some(20), 0),
        (1 << 20, Some(3), 1),
        (1000, Some(77), 5),
        (1, Some(100_000), 3),
        (65_536, None, 2),
        (65_536, Some(1), 2),
        (1 << 20, None, 1 << 40),
    ];
    for (index, (bs, count, skip)) in cases.into_iter().enumerate() {
        for (format, word) in [
            (
                NewFormat::Raw {
                    preallocation: Preallocation::Off,
                },
                "raw",
            ),
            (NewFormat::Qcow2(Qcow2Options::default()), "qcow2"),
        ] {
            let [ours, theirs] =
                ["ours", "theirs"].map(|who| dir.path().join(format!("{who}{index}{word}")));
            let count_word = count.map_or(String::new(), |count| format!("count={count}"));
            sh(&format!(
                "qemu-img dd -f {} -O {word} bs={bs} {count_word} skip={skip} if={} of={}",
                format_name(top.format),
                top.path.display(),
                theirs.display()
            ));
            let blocks = DdBlocks {
                block_bytes: bs,
                count,
                skip,
            };
            let options = ConvertOptions {
                format,
                verify: Verify::Content,
                ..ConvertOptions::default()
            };
            dd(
                &chain,
                &new_file(&ours),
                blocks,
                &options,
                &Control::default(),
            )
            .expect("dd");
            let size = |path: &Path| {
                let text = sh(&format!(
                    "qemu-img info --output=json -f {word} {}",
                    path.display()
                ));
                let info: serde_json::Value = serde_json::from_str(&text).expect("JSON");
                info["virtual-size"].as_u64().expect("a number")
            };
            assert_eq!(size(&ours), size(&theirs), "{bs} {count:?} {skip} {word}");
            sh(&format!(
                "qemu-img compare -q -f {word} -F {word} {} {}",
                ours.display(),
                theirs.display()
            ));
        }
    }
}
