//! Whatever lies below an image is exchanged or taken away, and every disk state shows what it showed.
#![allow(
    clippy::disallowed_methods,
    reason = "images in a temporary folder need not be durable"
)]

mod images;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use images::{Random, editor, format_name, layer, make_chain, require_whole, run, sh, text};
use stead_qcow2::edit::SnapshotName;
use stead_qcow2::ops::rebase::{self, BackingFile, NewBacking};
use stead_qcow2::{Chain, Control, Error, Layer, LayerFile, LayerFormat, check, ops};

fn io(path: &Path, format: &str, commands: &[&str]) {
    let mut args = vec!["-f".to_owned(), format.to_owned()];
    for command in commands {
        args.extend(["-c".to_owned(), (*command).to_owned()]);
    }
    args.push(path.display().to_string());
    run("qemu-io", &args);
}

fn content(chain: &Chain) -> blake3::Hash {
    let mut bytes = vec![0; usize::try_from(chain.len()).expect("small")];
    chain.read_at(0, &mut bytes).expect("read");
    blake3::hash(&bytes)
}

/// Name, length, content and VM state of every disk state, the active one first.
type States = Vec<(String, u64, blake3::Hash, blake3::Hash)>;

fn states(files: &[LayerFile]) -> States {
    let chain = Chain::open(files).expect("whole");
    let top = chain.layer(0).expect("qcow2");
    let nothing = blake3::hash(b"");
    let mut all = vec![(String::new(), chain.len(), content(&chain), nothing)];
    for snapshot in top.internal_snapshots().expect("whole") {
        let view = chain.view_of(&snapshot).expect("a view");
        let mut state = vec![0; usize::try_from(snapshot.vm_state_bytes).expect("small")];
        let disk = view.layer(0).expect("qcow2");
        disk.read_vm_state(0, &mut state).expect("read");
        let name = String::from_utf8(snapshot.name).expect("text");
        all.push((name, view.len(), content(&view), blake3::hash(&state)));
    }
    all
}

/// What QEMU reads of a disk state of the same length as the image.
fn qemu_reads(path: &Path, snapshot: &str, to: &Path) -> blake3::Hash {
    let mut words = vec!["convert", "-f", "qcow2", "-O", "raw"];
    let filter = format!("snapshot.name={snapshot}");
    if !snapshot.is_empty() {
        words.extend(["-l", &filter]);
    }
    words.extend([text(path), text(to)]);
    run(
        "qemu-img",
        &words.into_iter().map(str::to_owned).collect::<Vec<_>>(),
    );
    blake3::hash(&std::fs::read(to).expect("read"))
}

/// The image's own file, alone.
fn alone(path: &Path) -> [LayerFile; 1] {
    [layer(path, LayerFormat::Qcow2)]
}

/// Where the oracle is wrong: it exits with 0, finds nothing wrong, and the internal snapshot is zeros.
#[test]
fn qemu_loses_an_internal_snapshot_in_a_flatten_and_we_keep_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let [base, theirs, ours] = ["base", "theirs", "ours"].map(|name| dir.path().join(name));
    sh(&format!("qemu-img create -q -f raw {} 64M", text(&base)));
    io(&base, "raw", &["write -P 0xaa 0 8M"]);
    for image in [&theirs, &ours] {
        let (base, image) = (text(&base), text(image));
        sh(&format!(
            "qemu-img create -q -f qcow2 -b {base} -F raw {image}"
        ));
        sh(&format!("qemu-img snapshot -c cp {image}"));
    }
    let files = [
        layer(&ours, LayerFormat::Qcow2),
        layer(&base, LayerFormat::Raw),
    ];
    let before = states(&files);

    run(
        "qemu-img",
        &["rebase", "-b", "", text(&theirs)].map(str::to_owned),
    );
    require_whole(&theirs, "qemu-img says that all is well");
    let lost = states(&alone(&theirs));
    assert_eq!(lost[0], before[0], "the active disk is kept");
    assert_ne!(
        lost[1], before[1],
        "this qemu-img keeps internal snapshots: good"
    );
    assert_eq!(
        lost[1].2,
        blake3::hash(&vec![0; 64 << 20]),
        "all of it is zeros"
    );

    let below = Chain::open(&files[1..]).expect("whole");
    rebase::flatten(
        &mut editor(&ours).expect("whole"),
        Some(&below),
        &Control::default(),
    )
    .expect("flatten");
    require_whole(&ours, "");
    assert_eq!(states(&alone(&ours)), before);
    sh(&format!("qemu-img snapshot -a cp {}", text(&ours)));
    io(&ours, "qcow2", &["read -P 0xaa 0 8M", "read -P 0 8M 56M"]);
    let report = check(&Layer::open(&ours).expect("whole")).expect("readable");
    assert!(report.notes.is_empty(), "{:?}", report.notes);
}

/// Internal snapshots of several lengths, over whatever the random top has.
fn add_snapshots(path: &Path, random: &mut Random, below: Option<&Chain>) -> Result<(), Error> {
    for round in 0..random.below(3) {
        let size = Layer::open(path)?.virtual_size();
        let at = random.below(size) / 512 * 512;
        let length = (512 * (1 + random.below(300))).min(size - at);
        let byte = 1 + random.below(200);
        io(path, "qcow2", &[&format!("write -P {byte} {at} {length}")]);
        let called = SnapshotName {
            name: format!("ours{round}").into_bytes(),
            date_seconds: 1,
            date_nanoseconds: 0,
        };
        match ops::snapshot::create(&mut editor(path)?, &called) {
            Ok(_) | Err(Error::RefcountOverflow { .. }) => {}
            Err(error) => return Err(error),
        }
        let new = 512 * (1 + random.below(size / 512 * 3 / 2));
        ops::resize::resize(&mut editor(path)?, new, below)?;
    }
    Ok(())
}

/// Random chains: all cluster sizes, subclusters, compressed clusters, zeros, discards, short bases.
#[test]
fn every_disk_state_reads_the_same_before_and_after_a_flatten() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (mut flattened, mut snapshots) = (0, 0);
    for seed in 51_000_000..51_000_014 {
        let made = make_chain(dir.path(), seed);
        if made.files.len() < 2 {
            continue;
        }
        let top = made.top().path.clone();
        let below = Chain::open(&made.files[1..]).expect("whole");
        let mut random = Random::new(seed);
        match add_snapshots(&top, &mut random, Some(&below)) {
            // QEMU 7.2 now and then damages an image itself; see the tests of check.
            Err(Error::Damaged { .. }) => continue,
            done => done.expect("whole"),
        }
        let before = states(&made.files);
        let Ok(mut one) = editor(&top) else { continue };
        let done = rebase::flatten(&mut one, Some(&below), &Control::default())
            .unwrap_or_else(|error| panic!("{error}\n{}", made.story));
        drop(one);
        require_whole(&top, &made.story);
        assert_eq!(states(&alone(&top)), before, "{}", made.story);
        let raw = dir.path().join("raw");
        for (name, length, hash, _) in &before {
            // QEMU converts an internal snapshot with the length that the image has now.
            if *length == before[0].1 && before.iter().filter(|one| one.0 == *name).count() == 1 {
                assert_eq!(
                    qemu_reads(&top, name, &raw),
                    *hash,
                    "{name}\n{}",
                    made.story
                );
            }
        }
        assert_eq!(
            std::fs::metadata(&top).expect("stat").len(),
            done.room.end_bytes
        );
        flattened += 1;
        snapshots += before.len() - 1;
    }
    assert!(flattened > 5 && snapshots > 7, "{flattened}, {snapshots}");
}

/// Two bases that differ here and there, and share some of it.
#[test]
fn every_disk_state_reads_the_same_over_another_backing_file() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (mut done, mut snapshots, mut kept) = (0, 0, 0);
    for seed in 52_000_000..52_000_012 {
        let made = make_chain(dir.path(), seed);
        if made.files.len() < 2 {
            continue;
        }
        let top = made.top().path.clone();
        let mut random = Random::new(seed);
        let old = made.files[1..].to_vec();
        let new = other_base(dir.path(), &made.files, &mut random);
        let below = Chain::open(&old).expect("whole");
        match add_snapshots(&top, &mut random, Some(&below)) {
            Err(Error::Damaged { .. }) => continue,
            done => done.expect("whole"),
        }
        let before = states(&made.files);
        let disk = Chain::open(&new).expect("whole");
        let backing = NewBacking {
            file: BackingFile {
                name: text(&new[0].path).as_bytes(),
                format: Some(format_name(new[0].format).as_bytes()),
            },
            disk: &disk,
            content: None,
        };
        let Ok(mut one) = editor(&top) else { continue };
        let result = rebase::rebase(&mut one, Some(&below), Some(&backing), &Control::default())
            .unwrap_or_else(|error| panic!("{error}\n{}", made.story));
        drop(one);
        let mut files = alone(&top).to_vec();
        files.extend(new);
        require_whole(&top, &made.story);
        assert_eq!(states(&files), before, "{}", made.story);
        let raw = dir.path().join("raw");
        assert_eq!(qemu_reads(&top, "", &raw), before[0].2, "{}", made.story);
        kept += u64::from(result.value.bytes < before[0].1);
        done += 1;
        snapshots += before.len() - 1;
    }
    assert!(
        done > 4 && snapshots > 3 && kept > 2,
        "{done}, {snapshots}, {kept}"
    );
}

/// A copy of the disk below with other bytes in some places, a layer over the old base, or the base alone.
fn other_base(dir: &Path, files: &[LayerFile], random: &mut Random) -> Vec<LayerFile> {
    if files.len() > 2 && random.chance(3) {
        return files[2..].to_vec();
    }
    let path = dir.join("other");
    if path.exists() {
        std::fs::remove_file(&path).expect("remove");
    }
    let (below, format) = (&files[1], format_name(files[1].format));
    let name = text(&path);
    if random.chance(2) {
        let below = text(&below.path);
        sh(&format!(
            "qemu-img create -q -f qcow2 -b {below} -F {format} {name}"
        ));
        io(&path, "qcow2", &["write -P 99 0 3k", "write -z 8k 9k"]);
        let mut new = vec![layer(&path, LayerFormat::Qcow2)];
        new.extend_from_slice(&files[1..]);
        return new;
    }
    sh(&format!(
        "qemu-img convert -f {format} -O raw {} {name}",
        text(&below.path)
    ));
    io(&path, "raw", &["write -P 99 0 3k", "write -z 8k 9k"]);
    vec![layer(&path, LayerFormat::Raw)]
}

fn overlay(dir: &Path, options: &str, snapshots: usize) -> (PathBuf, PathBuf) {
    let [base, image] = ["base", "image"].map(|name| dir.join(name));
    sh(&format!("qemu-img create -q -f raw {} 16M", text(&base)));
    io(&base, "raw", &["write -P 1 0 4M", "write -P 2 6M 1M"]);
    let (below, name) = (text(&base), text(&image));
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {below} -F raw -o {options} {name}"
    ));
    for number in 0..snapshots {
        sh(&format!("qemu-img snapshot -c s{number} {name}"));
    }
    (base, image)
}

fn flatten(base: &Path, image: &Path) -> Result<stead_qcow2::edit::Done<rebase::Rebased>, Error> {
    let below = Chain::open(&[layer(base, LayerFormat::Raw)]).expect("whole");
    rebase::flatten(&mut editor(image)?, Some(&below), &Control::default())
}

#[test]
fn what_several_states_show_is_copied_once_and_holes_are_not_copied() {
    for (options, snapshots) in [
        ("cluster_size=64k", 3),
        ("cluster_size=4k", 0),
        ("cluster_size=4k", 9),
    ] {
        let dir = tempfile::tempdir().expect("temp dir");
        let (base, image) = overlay(dir.path(), options, snapshots);
        let files = [
            layer(&image, LayerFormat::Qcow2),
            layer(&base, LayerFormat::Raw),
        ];
        let before = states(&files);
        let old = std::fs::metadata(&image).expect("stat").len();
        let done = flatten(&base, &image).expect("flatten");
        assert_eq!(done.value.bytes, 5 << 20, "{options}");
        let grown = std::fs::metadata(&image).expect("stat").len() - old;
        let tables = 1 << 20;
        assert!(grown < (5 << 20) + tables, "{options}: {grown}");
        assert_eq!(states(&alone(&image)), before, "{options}");
        require_whole(&image, options);
        // Writes of QEMU afterwards leave the other states alone.
        io(&image, "qcow2", &["write -P 77 100k 300k"]);
        require_whole(&image, options);
        assert_eq!(states(&alone(&image))[1..], before[1..], "{options}");
    }
}

#[test]
fn the_room_is_known_exactly_before_the_first_write() {
    use std::os::unix::fs::MetadataExt;
    for options in [
        "cluster_size=64k",
        "cluster_size=1k",
        "cluster_size=16k,extended_l2=on",
    ] {
        let dir = tempfile::tempdir().expect("temp dir");
        let (base, image) = overlay(dir.path(), options, 2);
        let below = Chain::open(&[layer(&base, LayerFormat::Raw)]).expect("whole");
        let mut one = editor(&image).expect("whole");
        let bytes = std::fs::read(&image).expect("read");
        let plan = rebase::plan(&one, Some(&below), None, &Control::default()).expect("plan");
        assert!(
            std::fs::read(&image).expect("read") == bytes,
            "a plan wrote"
        );
        let blocks = |path: &Path| std::fs::metadata(path).expect("stat").blocks() * 512;
        let before = blocks(&image);
        let done = rebase::flatten(&mut one, Some(&below), &Control::default()).expect("flatten");
        assert_eq!(plan, done.room, "{options}");
        assert_eq!(
            std::fs::metadata(&image).expect("stat").len(),
            plan.end_bytes
        );
        let grown = blocks(&image) - before;
        assert!(
            grown <= plan.new_bytes && plan.new_bytes < grown + (256 << 10),
            "{options}: {grown} of {plan:?}"
        );
    }
}

/// Refcounts of one bit cannot say that two states share a cluster: each gets its own.
#[test]
fn states_that_cannot_share_get_their_own_copies() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (base, image) = overlay(dir.path(), "refcount_bits=1", 2);
    let files = [
        layer(&image, LayerFormat::Qcow2),
        layer(&base, LayerFormat::Raw),
    ];
    let before = states(&files);
    let done = flatten(&base, &image).expect("flatten");
    assert_eq!(done.value.bytes, 3 * (5 << 20));
    assert_eq!(states(&alone(&image)), before);
    require_whole(&image, "");
}

#[test]
fn bitmaps_and_vm_state_are_what_they_were() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (base, image) = overlay(dir.path(), "cluster_size=512", 0);
    let name = text(&image);
    sh(&format!("qemu-img bitmap --add -g 64k {name} on"));
    io(
        &image,
        "qcow2",
        &["write -P 7 1M 100k", "write -P 8 15M 200k"],
    );
    sh(&format!("qemu-img bitmap --add --disable {name} off"));
    sh(&format!("qemu-img snapshot -c state {name}"));
    // The end of the disk is made to be state: the snapshot is told that its disk was smaller.
    let bytes = std::fs::read(&image).expect("read");
    let table = u64::from_be_bytes(bytes[64..72].try_into().expect("8 bytes"));
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .expect("open");
    use std::os::unix::fs::FileExt;
    file.write_all_at(&200_000_u64.to_be_bytes(), table + 40)
        .expect("state size");
    file.write_all_at(&(15_u64 << 20).to_be_bytes(), table + 48)
        .expect("disk size");
    drop(file);
    let files = [
        layer(&image, LayerFormat::Qcow2),
        layer(&base, LayerFormat::Raw),
    ];
    let before = states(&files);
    let bitmaps = |image: &Path| {
        Layer::open(image)
            .expect("whole")
            .stored_bitmaps()
            .expect("whole")
    };
    let kept = bitmaps(&image);
    assert_eq!(kept.len(), 2);
    flatten(&base, &image).expect("flatten");
    assert_eq!(states(&alone(&image)), before);
    assert_eq!(bitmaps(&image), kept, "their tables need not even move");
    require_whole(&image, "");
}

#[test]
fn a_new_name_alone_changes_nothing_else() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (_base, image) = overlay(dir.path(), "cluster_size=64k", 1);
    let before = std::fs::read(&image).expect("read");
    let new = BackingFile {
        name: b"a/very/different/name",
        format: Some(b"raw"),
    };
    let mut one = editor(&image).expect("whole");
    rebase::rename(&mut one, Some(new)).expect("rename");
    let backing = one.layer().header().backing.clone().expect("a name");
    assert_eq!(
        (backing.name.as_slice(), backing.format.as_deref()),
        (new.name, new.format)
    );
    rebase::rename(&mut one, None).expect("no name");
    assert!(one.layer().header().backing.is_none());
    let long = [b'n'; 1024];
    for name in [&b""[..], &long] {
        let error = rebase::rename(&mut one, Some(BackingFile { name, format: None }));
        assert!(matches!(error, Err(Error::Refused { .. })));
    }
    drop(one);
    let after = std::fs::read(&image).expect("read");
    // QEMU's file ended inside its last cluster.
    let end = before.len().min(after.len());
    assert!(after[1 << 16..end] == before[1 << 16..end]);
    assert!(after[end..].iter().all(|byte| *byte == 0));
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_written() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (base, image) = overlay(dir.path(), "cluster_size=64k", 1);
    let bytes = std::fs::read(&image).expect("read");
    let below = Chain::open(&[layer(&base, LayerFormat::Raw)]).expect("whole");
    let mut one = editor(&image).expect("whole");
    let quiet = Control::default();
    let refused = |result: Result<_, Error>| {
        let error: Error =
            Result::<stead_qcow2::edit::Done<_>, Error>::expect_err(result, "refused");
        assert!(matches!(error, Error::Refused { .. }), "{error}");
        assert!(error.to_string().contains("nothing was changed"), "{error}");
    };
    refused(rebase::flatten(&mut one, None, &quiet));
    let itself = Chain::open(&[layer(&image, LayerFormat::Qcow2)]).expect("whole");
    let file = BackingFile {
        name: b"image",
        format: Some(b"qcow2"),
    };
    let new = NewBacking {
        file,
        disk: &itself,
        content: None,
    };
    refused(rebase::rebase(&mut one, Some(&below), Some(&new), &quiet));
    let cancel = AtomicBool::new(false);
    // Cancelled in the middle of the copying.
    let progress = |_: f64| cancel.store(true, Ordering::Relaxed);
    let control = Control {
        cancel: Some(&cancel),
        progress: Some(&progress),
    };
    let error = rebase::flatten(&mut one, Some(&below), &control).expect_err("cancelled");
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    drop(one);
    assert!(std::fs::read(&image).expect("read") == bytes);
    let mut one = editor(&image).expect("whole");
    rebase::flatten(&mut one, Some(&below), &quiet).expect("flatten");
    refused(rebase::flatten(&mut one, Some(&below), &quiet));
}
