//! Internal snapshots are read as QEMU reads them, and so is what lies in a file of its own.

mod images;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use images::{layer, make_chain, run, sh};
use stead_qcow2::{
    Chain, Encryption, Error, Follow, InternalSnapshot, Layer, LayerFile, LayerFormat, OpenPolicy,
    check, probe_format,
};

fn content(chain: &Chain) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(chain.len()).expect("fits")];
    chain.read_at(0, &mut bytes).expect("read");
    bytes
}

fn io(path: &Path, commands: &[&str]) {
    let mut args: Vec<String> = vec!["-f".into(), "qcow2".into()];
    for command in commands {
        args.extend(["-c".to_owned(), (*command).to_owned()]);
    }
    args.push(path.display().to_string());
    run("qemu-io", &args);
}

/// The disk of an internal snapshot, as QEMU converts it.
fn converted(top: &LayerFile, snapshot: &InternalSnapshot, to: &Path) -> Vec<u8> {
    let name = String::from_utf8_lossy(&snapshot.name).into_owned();
    let (top, out) = (top.path.display().to_string(), to.display().to_string());
    let words = [
        "convert", "-l", &name, "-f", "qcow2", "-O", "raw", &top, &out,
    ];
    run("qemu-img", &words.map(str::to_owned));
    std::fs::read(to).expect("read")
}

#[test]
fn every_internal_snapshot_reads_as_qemu_converts_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut compared = 0;
    for seed in 21_000_000..21_000_016 {
        let made = make_chain(dir.path(), seed);
        let chain = made.open();
        let Some(top) = chain.layer(0) else { continue };
        let active = content(&chain);
        for snapshot in top.internal_snapshots().expect("a good table") {
            let view = chain.view_of(&snapshot).expect("a good view");
            let expected = converted(made.top(), &snapshot, &dir.path().join("raw"));
            assert!(content(&view) == expected, "{}", made.story);
            compared += 1;
        }
        assert!(
            content(&chain) == active,
            "a view changed what it is a view of"
        );
    }
    assert!(compared > 2, "{compared} internal snapshots");
}

#[test]
fn a_view_keeps_its_own_length_when_the_disk_is_resized() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    let name = path.display();
    sh(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size=4k {name} 3M"
    ));
    io(&path, &["write -P 1 0 3M"]);
    sh(&format!("qemu-img snapshot -c small {name}"));
    sh(&format!("qemu-img resize -q {name} 7M"));
    io(&path, &["write -P 2 0 7M"]);
    let chain = Chain::open(&[layer(&path, LayerFormat::Qcow2)]).expect("open");
    let snapshots = chain.layer(0).expect("qcow2").internal_snapshots();
    let [small] = &snapshots.expect("a good table")[..] else {
        panic!("one internal snapshot was made");
    };
    let view = chain.view_of(small).expect("a view");
    assert_eq!((view.len(), chain.len()), (3 << 20, 7 << 20));
    assert!(content(&view).iter().all(|byte| *byte == 1));
    assert!(content(&chain).iter().all(|byte| *byte == 2));
    assert!(small.date_seconds > 0 && small.vm_state_bytes == 0);
}

/// VM state lies in the tables behind the disk's last one. Here the end of a disk is made to be state:
/// the internal snapshot is told that its disk was smaller.
#[test]
fn vm_state_is_read_from_behind_the_disk() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = dir.path().join("image");
    let name = path.display();
    // One L2 table describes 64 * 512 bytes.
    sh(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size=512 {name} 200k"
    ));
    io(&path, &["write -P 7 0 150k", "write -P 8 150k 50k"]);
    sh(&format!("qemu-img snapshot -c state {name}"));
    let bytes = std::fs::read(&path).expect("read");
    let table = u64::from_be_bytes(bytes[64..72].try_into().expect("8 bytes"));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open");
    // The disk was 131072 bytes long, four tables; 70 000 bytes of state followed.
    file.write_all_at(&70_000_u64.to_be_bytes(), table + 40)
        .expect("state size");
    file.write_all_at(&131_072_u64.to_be_bytes(), table + 48)
        .expect("disk size");
    let image = Layer::open(&path).expect("open");
    let snapshots = image.internal_snapshots().expect("a good table");
    let view = image.view_of(&snapshots[0]).expect("a view");
    assert_eq!(
        (view.virtual_size(), view.vm_state_bytes()),
        (131_072, 70_000)
    );
    let mut state = vec![0; 70_000];
    view.read_vm_state(0, &mut state).expect("read");
    assert_eq!(&state[..22_528], &[7; 22_528][..]);
    assert_eq!(&state[22_528..], &[8; 47_472][..]);
    let mut part = [0; 3];
    view.read_vm_state(22_527, &mut part).expect("read");
    assert_eq!(part, [7, 8, 8]);
    let error = view
        .read_vm_state(69_999, &mut part)
        .expect_err("behind the end");
    assert!(matches!(error, Error::OutOfDisk { .. }), "{error}");
    assert_eq!(image.vm_state_bytes(), 0, "the active state has none");
}

fn external(dir: &Path, options: &str) -> (PathBuf, PathBuf) {
    let [image, data] = ["image", "data"].map(|name| dir.join(name));
    sh(&format!(
        "qemu-img create -q -f qcow2 -o data_file={},{options} {} 3M",
        data.display(),
        image.display()
    ));
    io(
        &image,
        &["write -P 5 0 100k", "write -z 64k 64k", "write -P 6 2M 1M"],
    );
    (image, data)
}

const EXTERNAL: [&str; 4] = [
    "data_file_raw=off",
    "data_file_raw=on",
    "data_file_raw=off,cluster_size=4k",
    "data_file_raw=off,extended_l2=on,cluster_size=16k",
];

#[test]
fn guest_data_in_a_file_of_its_own_is_read_only_when_that_file_is_allowed() {
    for options in EXTERNAL {
        let dir = tempfile::tempdir().expect("temp dir");
        let (image, data) = external(dir.path(), options);
        let top = layer(&image, LayerFormat::Qcow2);
        let error = Chain::open(std::slice::from_ref(&top)).expect_err("refused");
        assert!(matches!(error, Error::ExternalDataFile { .. }), "{error}");
        let error = Chain::open_following(&top, &OpenPolicy::NOTHING).expect_err("refused");
        assert!(matches!(error, Error::NotFollowed { .. }), "{error}");
        let expected = images::convert(&top, &dir.path().join("raw"));
        for follow in [Follow::Names, Follow::Listed(vec![data.clone()])] {
            let policy = OpenPolicy {
                follow,
                probe: false,
            };
            let chain = Chain::open_following(&top, &policy).expect("allowed");
            assert!(content(&chain) == expected, "{options}");
        }
        Layer::open_with_data(&image, &data).expect("the caller names it");
        let report = check(&Layer::inspect(&image).expect("open")).expect("check");
        assert!(report.is_clean(), "{options}: {:?}", report.findings);
    }
}

#[test]
fn a_data_file_shorter_than_what_points_into_it_is_found() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (image, data) = external(dir.path(), "data_file_raw=off");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&data)
        .expect("open");
    file.set_len(2 << 20).expect("cut off");
    let layer = Layer::open_with_data(&image, &data).expect("open");
    let report = check(&layer).expect("check");
    assert_eq!(report.corruptions, 16, "{:?}", report.findings);
    let plain = dir.path().join("plain");
    sh(&format!(
        "qemu-img create -q -f qcow2 {} 1M",
        plain.display()
    ));
    let error = Layer::open_with_data(&plain, &data).expect_err("it has no data file");
    assert!(matches!(error, Error::NoExternalData { .. }), "{error}");
}

/// The encryption method of a good image changed to LUKS, with a header extension.
fn luks(dir: &Path) -> PathBuf {
    let path = dir.join("luks");
    sh(&format!(
        "qemu-img create -q -f qcow2 {} 1M",
        path.display()
    ));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .expect("open");
    let mut extension = vec![0x05, 0x37, 0xbe, 0x77, 0, 0, 0, 16];
    extension.extend(0x4_0000_u64.to_be_bytes());
    extension.extend(0x1_0000_u64.to_be_bytes());
    extension.extend([
        0x12, 0x34, 0x56, 0x78, 0, 0, 0, 3, b'o', b'l', b'd', 0, 0, 0, 0, 0,
    ]);
    extension.extend([0; 8]);
    file.write_all_at(&[0, 0, 0, 2], 32).expect("method");
    file.write_all_at(&extension, 112).expect("extension");
    path
}

#[test]
fn an_encrypted_image_can_be_looked_at_but_not_read_as_a_disk() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = luks(dir.path());
    let image = Layer::inspect(&path).expect("it can be looked at");
    let header = image.header();
    assert!(matches!(header.encryption, Some(Encryption::Luks { .. })));
    let [unknown] = &header.unknown_extensions[..] else {
        panic!("{:?}", header.unknown_extensions)
    };
    assert_eq!(
        (unknown.kind, &unknown.data[..]),
        (0x1234_5678, &b"old"[..])
    );
    for error in [
        Layer::open(&path).expect_err("refused"),
        Chain::open_following(&layer(&path, LayerFormat::Qcow2), &OpenPolicy::NAMES)
            .expect_err("refused"),
        image.data_file().expect_err("refused"),
    ] {
        let named = matches!(&error, Error::Encrypted { method, .. } if method == "LUKS");
        assert!(named, "{error}");
    }
}

/// An overlay with this backing name, and the format it states.
fn overlay(dir: &Path, name: &str, format: Option<&str>) -> LayerFile {
    let path = dir.join("overlay");
    let mut args = vec!["create", "-q", "-u", "-f", "qcow2", "-b", name];
    args.extend(format.map(|format| ["-F", format]).into_iter().flatten());
    let path_text = path.display().to_string();
    args.extend([&path_text, "1M"]);
    run(
        "qemu-img",
        &args.into_iter().map(str::to_owned).collect::<Vec<_>>(),
    );
    layer(path, LayerFormat::Qcow2)
}

fn raw_base(dir: &Path) -> PathBuf {
    let base = dir.join("base");
    sh(&format!("qemu-img create -q -f raw {} 1M", base.display()));
    let args = ["-f", "raw", "-c", "write -P 9 0 1M"].map(str::to_owned);
    run(
        "qemu-io",
        &args
            .into_iter()
            .chain([base.display().to_string()])
            .collect::<Vec<_>>(),
    );
    base
}

#[test]
fn names_of_files_are_followed_in_all_the_ways_qemu_writes_them() {
    let dir = tempfile::tempdir().expect("temp dir");
    let base = raw_base(dir.path());
    let path = base.display();
    let names = [
        "base".to_owned(),
        format!("{path}"),
        format!("file:{path}"),
        "./base".to_owned(),
        format!(
            "json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{path}\"}}}}"
        ),
        format!(
            "json:{{\"driver\":\"raw\",\"file.driver\":\"file\",\"file.filename\":\"{path}\"}}"
        ),
    ];
    for name in names {
        let top = overlay(dir.path(), &name, Some("raw"));
        let chain = Chain::open_following(&top, &OpenPolicy::NAMES).expect(&name);
        assert_eq!(chain.depth(), 2);
        assert_eq!(chain.file(1).expect("base").1, LayerFormat::Raw);
        assert!(content(&chain).iter().all(|byte| *byte == 9), "{name}");
        let listed = OpenPolicy {
            follow: Follow::Listed(vec![base.clone()]),
            probe: false,
        };
        assert_eq!(
            Chain::open_following(&top, &listed)
                .expect("listed")
                .depth(),
            2
        );
        let other = OpenPolicy {
            follow: Follow::Listed(vec![top.path.clone()]),
            probe: false,
        };
        let error = Chain::open_following(&top, &other).expect_err("not listed");
        assert!(matches!(error, Error::NotFollowed { .. }), "{error}");
    }
}

#[test]
fn names_that_are_no_files_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("temp dir");
    raw_base(dir.path());
    let cases = [
        ("nbd://127.0.0.1/x", "nbd"),
        ("nbd:unix:/tmp/x", "nbd"),
        ("http://host/x", "http"),
        ("json:{\"driver\":\"nbd\",\"host\":\"h\"}", "nbd"),
        (
            "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"nbd\",\"host\":\"h\"}}",
            "nbd",
        ),
        (
            "json:{\"driver\":\"raw\",\"size\":5,\"file.filename\":\"base\"}",
            "size",
        ),
        ("json:{}", "names no file"),
        ("json:[", "JSON"),
        ("file:", "no file name"),
    ];
    for (name, said) in cases {
        let top = overlay(dir.path(), name, Some("raw"));
        let error = Chain::open_following(&top, &OpenPolicy::NAMES).expect_err(name);
        assert!(matches!(error, Error::NotFollowed { .. }), "{error}");
        assert!(error.to_string().contains(said), "{name}: {error}");
    }
    let top = overlay(dir.path(), "base", Some("vmdk"));
    let error = Chain::open_following(&top, &OpenPolicy::NAMES).expect_err("vmdk");
    assert!(error.to_string().contains("vmdk"), "{error}");
}

#[test]
fn a_format_that_is_not_stated_is_probed_only_when_that_is_allowed() {
    let dir = tempfile::tempdir().expect("temp dir");
    raw_base(dir.path());
    let top = overlay(dir.path(), "base", Some("raw"));
    // The extension with the format becomes one that is not known.
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&top.path)
        .expect("open");
    file.write_all_at(&[1, 2, 3, 4], 112).expect("write");
    let error = Chain::open_following(&top, &OpenPolicy::NAMES).expect_err("no format");
    assert!(error.to_string().contains("not stated"), "{error}");
    let policy = OpenPolicy {
        probe: true,
        ..OpenPolicy::NAMES
    };
    let chain = Chain::open_following(&top, &policy).expect("probed");
    assert_eq!(chain.file(1).expect("base").1, LayerFormat::Raw);
    assert_eq!(probe_format(&top.path).expect("known"), LayerFormat::Qcow2);
    let vmdk = dir.path().join("vmdk");
    sh(&format!("qemu-img create -q -f vmdk {} 1M", vmdk.display()));
    let error = probe_format(&vmdk).expect_err("not ours");
    assert!(
        matches!(&error, Error::UnknownFormat { format, .. } if format == "vmdk"),
        "{error}"
    );
}

#[test]
fn a_chain_that_comes_back_to_itself_or_hangs_is_refused() {
    let dir = tempfile::tempdir().expect("temp dir");
    let top = overlay(dir.path(), "overlay", Some("qcow2"));
    let error = Chain::open_following(&top, &OpenPolicy::NAMES).expect_err("a loop");
    assert!(
        matches!(&error, Error::InvalidChain { reason } if reason.contains("twice")),
        "{error}"
    );
    let pipe = dir.path().join("pipe");
    sh(&format!("mkfifo {}", pipe.display()));
    let top = overlay(dir.path(), "pipe", Some("raw"));
    let error = Chain::open_following(&top, &OpenPolicy::NAMES).expect_err("a pipe");
    assert!(matches!(error, Error::Io { .. }), "{error}");
}
