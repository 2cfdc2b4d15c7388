//! New images are accepted by QEMU's tools and read back as what was written.

mod images;

use std::path::Path;
use std::process::Command;

use images::{RandomChain, format_name, make_chain};
use stead_qcow2::{
    Backing, Chain, ClusterSize, Error, GuestOffset, ImageBuilder, ImageOptions, Layer, LayerFile,
    LayerFormat, Qcow2Options, create_overlay, write_image,
};
use stead_sys::durable::{self, Existing};

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().expect("run");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {args:?}: {text}{errors}"
    );
    text
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temp paths are text")
}

fn check(path: &Path) {
    run("qemu-img", &["check", text(path)]);
}

#[test]
fn an_overlay_of_every_cluster_size_is_accepted_by_qemu_and_can_be_written() {
    let dir = tempfile::tempdir().expect("temp dir");
    let base = dir.path().join("base.raw");
    let content: Vec<u8> = (0..3_u32 << 20).map(|n| (n % 251) as u8).collect();
    durable::publish(&base, 0o600, &content, Existing::Keep).expect("base");
    for bits in 9..=21 {
        let size = ClusterSize::from_bits(bits).expect("valid");
        let path = dir.path().join(format!("{bits}.qcow2"));
        let backing = Some(("base.raw", LayerFormat::Raw));
        create_overlay(&path, 0o600, 5 << 20, backing, size).expect("create");
        check(&path);
        run("qemu-io", &["-c", "write -P 77 1000k 100k", text(&path)]);
        check(&path);
        let files =
            [(&path, LayerFormat::Qcow2), (&base, LayerFormat::Raw)].map(|(path, format)| {
                LayerFile {
                    path: path.clone(),
                    format,
                }
            });
        let chain = Chain::open(&files).expect("open");
        let mut expected = content.clone();
        expected.resize(5 << 20, 0);
        expected[1000 << 10..1100 << 10].fill(77);
        let mut found = vec![1; 5 << 20];
        chain.read_at(0, &mut found).expect("read");
        assert!(found == expected, "cluster bits {bits}");
        assert_eq!(
            chain
                .layer(0)
                .expect("layer")
                .header()
                .backing
                .as_ref()
                .expect("named")
                .name,
            b"base.raw"
        );
    }
}

#[test]
fn an_overlay_never_replaces_a_file() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("disk.qcow2");
    durable::publish(&path, 0o600, b"mine", Existing::Keep).expect("file");
    let error =
        create_overlay(&path, 0o600, 1 << 20, None, ClusterSize::DEFAULT).expect_err("there");
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert_eq!(std::fs::read(&path).expect("read"), b"mine");
    assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
}

#[test]
fn what_the_format_cannot_express_is_refused_before_a_file_is_made() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("disk.qcow2");
    let long = "n".repeat(1024);
    let raw = LayerFormat::Raw;
    let (tiny, usual) = (ClusterSize::MIN, ClusterSize::DEFAULT);
    let cases = [
        (1000, None, usual),
        (1 << 20, Some((long.as_str(), raw)), usual),
        (1 << 20, Some((&long[..600], raw)), tiny),
        (1 << 20, Some(("", raw)), usual),
        (1 << 40, None, tiny),
        (u64::MAX - 511, None, usual),
    ];
    for (size, backing, cluster) in cases {
        let error = create_overlay(&path, 0o600, size, backing, cluster).expect_err("refused");
        assert!(matches!(error, Error::InvalidImage { .. }), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
    }
}

fn options(virtual_size: u64, bits: u32) -> ImageOptions {
    ImageOptions {
        mode: 0o600,
        virtual_size,
        existing: Existing::Keep,
        qcow2: Qcow2Options {
            cluster_size: ClusterSize::from_bits(bits).expect("valid"),
            ..Qcow2Options::default()
        },
    }
}

#[test]
fn a_builder_takes_only_whole_clusters_in_order() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("disk.qcow2");
    let mut builder = ImageBuilder::create(&path, options((64 << 10) + 512, 12)).expect("create");
    builder
        .write(GuestOffset(8192), &[1; 4096])
        .expect("in order");
    let invalid = [(0, 4096), (8192, 4096), (12_288 + 512, 4096), (12_288, 1)];
    for (at, length) in invalid {
        let bytes = vec![1; length];
        let error = builder.write(GuestOffset(at), &bytes).expect_err("refused");
        assert!(matches!(error, Error::InvalidImage { .. }), "{error}");
    }
    let error = builder
        .write(GuestOffset(64 << 10), &[1; 4096])
        .expect_err("behind the end");
    assert!(matches!(error, Error::OutOfDisk { .. }), "{error}");
    builder
        .write(GuestOffset(64 << 10), &[2; 512])
        .expect("the last cluster is cut");
    assert!(!path.exists());
    builder.finish().expect("finish");
    check(&path);
}

/// QEMU reads the same from both.
fn compare(one: &Path, format: LayerFormat, other: &Path) {
    let args = [
        "compare",
        "-f",
        format_name(format),
        "-F",
        "qcow2",
        text(one),
        text(other),
    ];
    run("qemu-img", &args);
}

fn sizes() -> impl Iterator<Item = ClusterSize> {
    [9, 12, 16, 21]
        .into_iter()
        .filter_map(ClusterSize::from_bits)
        .cycle()
}

fn check_new(path: &Path, made: &RandomChain) {
    check(path);
    let layer = Layer::open(path).expect("our own image");
    let report = stead_qcow2::check(&layer).expect("our own image");
    assert!(report.is_clean(), "{:?}\n{}", report.findings, made.story);
    assert_eq!(report.used_clusters, report.file_clusters);
}

#[test]
fn a_full_copy_of_a_chain_reads_the_same_and_holds_nothing_but_data() {
    let dir = tempfile::tempdir().expect("temp dir");
    for (seed, size) in (21_000_000..21_000_012).zip(sizes()) {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        let path = dir.path().join(format!("{seed}.copy"));
        let copy = options(chain.len(), size.bits());
        write_image(&path, copy, &chain, chain.data()).expect("write");
        check_new(&path, &made);
        compare(&made.top().path, made.top().format, &path);
        let found: u64 = Layer::open(&path)
            .expect("our own image")
            .extents(GuestOffset(0))
            .map(|extent| extent.expect("valid"))
            .filter(|extent| extent.kind != stead_qcow2::ExtentKind::Unallocated)
            .map(|extent| extent.length)
            .sum();
        let data: u64 = chain
            .data()
            .map(|r| r.expect("valid"))
            .map(|r| r.end - r.start)
            .sum();
        let clusters = chain.data().count() as u64 + 1;
        assert!(
            found <= data + clusters * 2 * size.bytes(),
            "{found} of {data}"
        );
    }
}

#[test]
fn layers_merged_over_what_lies_below_read_the_same() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut merged = 0;
    for (seed, size) in (22_000_000..22_000_016).zip(sizes()) {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        for layers in 1..chain.depth() {
            let path = dir.path().join(format!("{seed}.{layers}"));
            let below = &made.files[layers];
            let mut overlay = options(chain.len(), size.bits());
            overlay.qcow2.backing = Some(Backing {
                name: text(&below.path).to_owned(),
                format: below.format,
            });
            write_image(&path, overlay, &chain, chain.allocated(layers)).expect("write");
            check_new(&path, &made);
            compare(&made.top().path, made.top().format, &path);
            merged += 1;
        }
    }
    assert!(merged > 8, "{merged}");
}

#[test]
fn an_image_that_is_not_finished_leaves_nothing() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("disk.qcow2");
    let mut builder = ImageBuilder::create(&path, options(1 << 20, 16)).expect("create");
    builder.write(GuestOffset(0), &[1; 65_536]).expect("write");
    drop(builder);
    assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
}

/// More refcount blocks than one, and refcounts for the refcounts' own clusters.
#[test]
fn an_image_of_many_small_clusters_counts_them_all() {
    let dir = tempfile::tempdir().expect("temp dir");
    for clusters in [
        1, 64, 200, 245, 250, 251, 252, 253, 254, 255, 256, 257, 500, 16_000, 17_000,
    ] {
        let path = dir.path().join(format!("{clusters}.qcow2"));
        let length = clusters * 512;
        let mut builder = ImageBuilder::create(&path, options(length, 9)).expect("create");
        let bytes = vec![9; usize::try_from(length).expect("fits")];
        builder.write(GuestOffset(0), &bytes).expect("write");
        builder.finish().expect("finish");
        check(&path);
        let report = stead_qcow2::check(&Layer::open(&path).expect("open")).expect("check");
        assert!(report.is_clean(), "{:?}", report.findings);
        assert_eq!(report.guest_clusters, clusters);
    }
}
