//! Images whose guest data lies in an external data file: every change keeps what the disk shows, and a raw data file
//! goes on to be the disk by itself.

#![allow(
    clippy::disallowed_methods,
    reason = "a crash image that is looked at again need not be durable"
)]

mod images;

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use images::{Random, convert, layer, run, sh};
use stead_qcow2::edit::{EditOptions, Editor, JournalFiles, SnapshotName, recover_storage_over};
use stead_qcow2::ops::commit::{CommitOptions, LongerBase, commit, commit_into};
use stead_qcow2::ops::repair::{RepairMode, repair};
use stead_qcow2::ops::{rebase, resize, snapshot};
use stead_qcow2::{Chain, Control, Error, Layer, LayerFile, LayerFormat, OpenPolicy, Result};
use stead_sim::RecordedDisk;
use stead_sys::storage::Storage;

/// What the images are like: options of qemu-img.
const KINDS: [&str; 4] = [
    "cluster_size=4k",
    "cluster_size=64k",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=4k,data_file_raw=on",
];

fn is_raw(kind: &str) -> bool {
    kind.contains("data_file_raw")
}

fn data_of(image: &Path) -> PathBuf {
    image.with_extension("data")
}

/// An image with its data file beside it.
fn create(image: &Path, kind: &str, size: u64, below: Option<&Path>) -> LayerFile {
    let data = data_of(image);
    let backing = below.map_or_else(String::new, |below| {
        format!("-b {} -F qcow2", below.display())
    });
    sh(&format!(
        "qemu-img create -q -f qcow2 -o {kind},data_file={} {backing} {} {size}",
        data.display(),
        image.display()
    ));
    layer(image, LayerFormat::Qcow2)
}

fn plain(image: &Path, size: u64, below: Option<&Path>) -> LayerFile {
    let backing = below.map_or_else(String::new, |below| {
        format!("-b {} -F qcow2", below.display())
    });
    let image_text = image.display();
    sh(&format!(
        "qemu-img create -q -f qcow2 -o cluster_size=4k {backing} {image_text} {size}"
    ));
    layer(image, LayerFormat::Qcow2)
}

/// Writes, zeros and discards all over an image.
fn scribble(image: &Path, random: &mut Random, count: u64, size: u64) {
    let mut args = vec!["-f".to_owned(), "qcow2".into(), "-d".into(), "unmap".into()];
    for _ in 0..count {
        let at = random.below(size / 512) * 512;
        let length = (512 * (1 + random.below(80))).min(size - at);
        let command = match random.below(6) {
            0 => format!("write -z {at} {length}"),
            1 => format!("discard {at} {length}"),
            2 => format!("write -z -u {at} {length}"),
            _ => format!("write -P {} {at} {length}", 1 + random.below(250)),
        };
        args.extend(["-c".to_owned(), command]);
    }
    args.push(image.display().to_string());
    run("qemu-io", &args);
}

fn editor(image: &Path) -> Editor {
    let opened = Editor::open_following(image, &OpenPolicy::NAMES, EditOptions::default());
    opened.unwrap_or_else(|error| panic!("{error}"))
}

fn below(path: &Path) -> Chain {
    Chain::open_following(&layer(path, LayerFormat::Qcow2), &OpenPolicy::NAMES).expect("whole")
}

/// The image is whole, shows `expected`, and so does its data file alone if it is raw.
fn require(image: &Path, kind: &str, expected: &[u8], story: &str) {
    sh(&format!("qemu-img check -q -f qcow2 {}", image.display()));
    let file = layer(image, LayerFormat::Qcow2);
    let shown = convert(&file, &image.with_extension("seen"));
    let differs = (0..expected.len()).find(|at| shown.get(*at) != Some(&expected[*at]));
    assert!(shown == expected, "{kind}: {story}, from {differs:?} on");
    let chain = Chain::open_following(&file, &OpenPolicy::NAMES).expect("whole");
    let mut ours = vec![0; expected.len()];
    chain.read_at(0, &mut ours).expect("readable");
    assert!(ours == expected, "{kind}, as we see it: {story}");
    let data = std::fs::read(data_of(image)).expect("readable");
    if is_raw(kind) {
        // QEMU itself fills the last cluster up.
        let disk = data.get(..expected.len());
        assert!(
            disk == Some(expected),
            "{kind}, the data file alone: {story}"
        );
    }
}

#[test]
fn flatten_and_rebase_keep_what_an_image_with_a_data_file_shows() {
    let size = (1 << 20) - 3 * 512;
    for (seed, kind) in (500..).zip(KINDS.iter().filter(|kind| !is_raw(kind)).cycle().take(9)) {
        let dir = tempfile::tempdir().expect("temp dir");
        let [base, other, top] = ["base", "other", "top"].map(|name| dir.path().join(name));
        let mut random = Random::new(seed);
        plain(&base, size + random.below(2) * 4096, None);
        plain(&other, size - random.below(2) * 4096, None);
        let file = create(&top, kind, size, Some(&base));
        scribble(&base, &mut random, 12, size - 4096);
        scribble(&other, &mut random, 12, size - 4096);
        scribble(&top, &mut random, 8, size);
        let expected = convert(&file, &dir.path().join("expected"));
        let quiet = Control::default();
        let flat = seed % 2 == 0;
        let mut editor = editor(&top);
        let old = below(&base);
        if flat {
            rebase::flatten(&mut editor, Some(&old), &quiet).expect("flattened");
        } else {
            let name = other.display().to_string();
            let disk = below(&other);
            let new = rebase::NewBacking {
                file: rebase::BackingFile {
                    name: name.as_bytes(),
                    format: Some(b"qcow2"),
                },
                disk: &disk,
                content: None,
            };
            rebase::rebase(&mut editor, Some(&old), Some(&new), &quiet).expect("rebased");
        }
        drop(editor);
        std::fs::remove_file(&base).expect("there");
        require(
            &top,
            kind,
            &expected,
            &format!("seed {seed}, to none: {flat}"),
        );
    }
}

#[test]
fn a_disk_in_a_data_file_changes_its_length_and_what_is_added_is_zeros() {
    for kind in KINDS {
        let dir = tempfile::tempdir().expect("temp dir");
        let image = dir.path().join("image");
        let size: u64 = 300 << 10;
        let file = create(&image, kind, size, None);
        scribble(&image, &mut Random::new(7), 10, size);
        io_write(&image, "write -P 9 100k 200k");
        let mut expected = convert(&file, &dir.path().join("expected"));
        let mut editor = editor(&image);
        for length in [size - 512, 150 << 10, 149 * 1024 + 512, 400 << 10, 3 << 20] {
            resize::resize(&mut editor, length, None).expect("resized");
            expected.resize(usize::try_from(length).expect("small"), 0);
            let data = std::fs::metadata(data_of(&image)).expect("there").len();
            assert_eq!(data, length, "{kind}");
        }
        drop(editor);
        require(&image, kind, &expected, "resized five times");
        // A data file that was longer shows nothing of that.
        let longer = std::fs::OpenOptions::new()
            .append(true)
            .open(data_of(&image));
        io::Write::write_all(&mut longer.expect("there"), &[7; 8192]).expect("written");
        let length = (3 << 20) + 100 * 512;
        resize::resize(&mut self::editor(&image), length, None).expect("resized");
        expected.resize(usize::try_from(length).expect("small"), 0);
        require(&image, kind, &expected, "longer before");
    }
}

fn io_write(image: &Path, command: &str) {
    let image = image.display().to_string();
    let args = ["-f", "qcow2", "-c", command, &image].map(str::to_owned);
    run("qemu-io", &args);
}

fn followed(empty_top: bool) -> CommitOptions {
    CommitOptions {
        empty_top,
        longer_base: LongerBase::Keep,
        follow_data: true,
        ..CommitOptions::default()
    }
}

#[test]
fn a_base_with_a_data_file_becomes_what_the_top_showed() {
    let size: u64 = (1 << 20) - 512;
    let (mut in_place, mut verified) = (0, 0);
    for (seed, kind) in (700..).zip(KINDS.iter().cycle().take(12)) {
        let dir = tempfile::tempdir().expect("temp dir");
        let [base, top] = ["base", "top"].map(|name| dir.path().join(name));
        let mut random = Random::new(seed);
        let longer = size + random.below(2) * 8192;
        create(&base, kind, size, None);
        scribble(&base, &mut random, 12, size);
        let file = match random.below(2) {
            // Here the top has a data file, too.
            0 => create(&top, "cluster_size=4k", longer, Some(&base)),
            _ => plain(&top, longer, Some(&base)),
        };
        scribble(&top, &mut random, 12, longer);
        let expected = convert(&file, &dir.path().join("expected"));
        let files = [file, layer(&base, LayerFormat::Qcow2)];
        let report = commit(&files, &followed(seed % 3 == 0), &Control::default());
        let report = report.unwrap_or_else(|error| panic!("{kind}, seed {seed}: {error}"));
        require(&base, kind, &expected, &format!("seed {seed}"));
        assert!(convert(&files[0], &dir.path().join("through")) == expected);
        in_place += u64::from(report.base.journal);
        verified += report.in_place_bytes;
    }
    assert!(
        in_place > 6 && verified > 100 << 10,
        "{in_place} {verified}"
    );
}

#[test]
fn what_a_top_with_a_data_file_defines_goes_into_a_base_of_any_format() {
    for format in [LayerFormat::Qcow2, LayerFormat::Raw] {
        let dir = tempfile::tempdir().expect("temp dir");
        let [base, top] = ["base", "top"].map(|name| dir.path().join(name));
        let name = images::format_name(format);
        let (b, t) = (base.display(), top.display());
        let data = data_of(&top);
        sh(&format!("qemu-img create -q -f {name} {b} 1M"));
        let args = ["-f", name, "-c", "write -P 1 0 1M", &b.to_string()].map(str::to_owned);
        run("qemu-io", &args);
        sh(&format!(
            "qemu-img create -q -f qcow2 -o data_file={} -b {b} -F {name} {t}",
            data.display()
        ));
        scribble(&top, &mut Random::new(3), 12, 1 << 20);
        let files = [layer(&top, LayerFormat::Qcow2), layer(&base, format)];
        let expected = convert(&files[0], &dir.path().join("expected"));
        // Names are not followed unless that is said.
        let error = commit(&files, &CommitOptions::default(), &Control::default());
        let error = error.expect_err("refused").to_string();
        assert!(error.contains("external data file"), "{error}");
        commit(&files, &followed(true), &Control::default()).expect("committed");
        assert!(convert(&files[1], &dir.path().join("seen")) == expected);
        assert!(convert(&files[0], &dir.path().join("through")) == expected);
    }
}

#[test]
fn what_a_data_file_cannot_keep_is_refused_as_by_qemu_and_nothing_changes() {
    let dir = tempfile::tempdir().expect("temp dir");
    let [image, other] = ["image", "other"].map(|name| dir.path().join(name));
    create(&image, KINDS[3], 1 << 20, None);
    plain(&other, 1 << 20, None);
    io_write(&image, "write -P 5 0 64k");
    let before = (
        std::fs::read(&image).expect("read"),
        std::fs::read(data_of(&image)).expect("read"),
    );
    let name = SnapshotName {
        name: b"cp".to_vec(),
        date_seconds: 0,
        date_nanoseconds: 0,
    };
    let error = snapshot::create(&mut editor(&image), &name).expect_err("refused");
    assert!(error.to_string().contains("external data file"), "{error}");
    let other_name = other.display().to_string();
    let disk = below(&other);
    let file = rebase::BackingFile {
        name: other_name.as_bytes(),
        format: Some(b"qcow2"),
    };
    let new = rebase::NewBacking {
        file,
        disk: &disk,
        content: None,
    };
    let quiet = Control::default();
    let error = rebase::rebase(&mut editor(&image), None, Some(&new), &quiet).expect_err("refused");
    assert!(error.to_string().contains("data file is raw"), "{error}");
    let error = rebase::rename(&mut editor(&image), Some(file)).expect_err("refused");
    assert!(error.to_string().contains("data file is raw"), "{error}");
    for line in [
        format!("snapshot -c cp {}", image.display()),
        format!("rebase -u -b {other_name} -F qcow2 {}", image.display()),
    ] {
        let theirs = Command::new("qemu-img").args(line.split(' ')).output();
        assert!(!theirs.expect("installed").status.success(), "{line}");
    }
    let after = (
        std::fs::read(&image).expect("read"),
        std::fs::read(data_of(&image)).expect("read"),
    );
    assert!(before == after);
}

#[test]
fn leaks_of_an_image_with_a_data_file_are_repaired_without_opening_that() {
    let dir = tempfile::tempdir().expect("temp dir");
    let image = dir.path().join("image");
    let file = create(&image, KINDS[0], 1 << 20, None);
    scribble(&image, &mut Random::new(11), 12, 1 << 20);
    let expected = convert(&file, &dir.path().join("expected"));
    let mut bytes = std::fs::read(&image).expect("read");
    let word = |bytes: &[u8], at: usize| {
        let word: [u8; 8] = bytes[at..at + 8].try_into().expect("8 bytes");
        usize::try_from(u64::from_be_bytes(word)).expect("small")
    };
    let table = word(&bytes, 48);
    let block = word(&bytes, table);
    let cluster = bytes.len().div_ceil(4096);
    bytes.resize((cluster + 1) * 4096, 7);
    bytes[block + cluster * 2 + 1] = 1;
    std::fs::write(&image, &bytes).expect("write");
    let hidden = dir.path().join("hidden");
    std::fs::rename(data_of(&image), &hidden).expect("moved");
    let repaired = repair(&image, RepairMode::All, &Control::default()).expect("repaired");
    assert_eq!((repaired.before.leaks, repaired.after.leaks), (1, 0));
    std::fs::rename(&hidden, data_of(&image)).expect("moved");
    require(&image, KINDS[0], &expected, "repaired");
}

/// One of two disks that die together, at the call with a number counted over both.
#[derive(Debug)]
struct Mortal {
    inner: Arc<RecordedDisk>,
    calls: Arc<AtomicU64>,
    at_call: u64,
    /// Its syncs do something.
    honest: bool,
}

impl Mortal {
    fn alive(&self) -> io::Result<()> {
        match self.calls.fetch_add(1, Ordering::SeqCst) + 1 >= self.at_call {
            true => Err(io::Error::other("killed")),
            false => Ok(()),
        }
    }
}

impl Storage for Mortal {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> io::Result<()> {
        self.inner.read_exact_at(bytes, at)
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.alive()?;
        self.inner.write_all_at(bytes, at)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.alive()?;
        self.inner.set_len(length)
    }

    fn sync(&self) -> io::Result<()> {
        self.alive()?;
        if self.honest {
            self.inner.sync()
        } else {
            Ok(())
        }
    }
}

type Change<'a> = &'a dyn Fn(&mut Editor) -> Result<()>;

/// An image and its data file, and a change of them.
struct Story<'a> {
    kind: &'a str,
    image: PathBuf,
    bytes: (Vec<u8>, Vec<u8>),
    change: Change<'a>,
}

/// Length and content of a disk, and the name of what is below.
type Seen = (u64, blake3::Hash, Option<Vec<u8>>);

impl Story<'_> {
    /// Runs the change until call `at_call`: what is left, how many calls there were, and whether it was done.
    fn run(&self, at_call: u64, honest: bool) -> (Arc<RecordedDisk>, Arc<RecordedDisk>, u64, bool) {
        let disks = [&self.bytes.0, &self.bytes.1];
        let [image, data] = disks.map(|bytes| Arc::new(RecordedDisk::new(bytes.clone())));
        let calls = Arc::new(AtomicU64::new(0));
        let mortal = |inner: &Arc<RecordedDisk>, honest| -> Arc<dyn Storage> {
            Arc::new(Mortal {
                inner: Arc::clone(inner),
                calls: Arc::clone(&calls),
                at_call,
                honest,
            })
        };
        let path = data_of(&self.image);
        let storages = (mortal(&data, honest), path.as_path());
        let options = EditOptions::default();
        let opened =
            Editor::on_storage_with_data(mortal(&image, true), &self.image, storages, options);
        let mut editor = opened.expect("opening writes nothing");
        let done = (self.change)(&mut editor).is_ok();
        (image, data, calls.load(Ordering::SeqCst), done)
    }

    /// What the two files show; the first is whole, and the second, if it is raw, is the disk by itself.
    fn seen(&self, image: &[u8], data: &[u8]) -> std::result::Result<Seen, String> {
        std::fs::write(&self.image, image).expect("written");
        std::fs::write(data_of(&self.image), data).expect("written");
        let file = layer(&self.image, LayerFormat::Qcow2);
        let chain = Chain::open_following(&file, &OpenPolicy::NAMES).map_err(|e| e.to_string())?;
        let top = chain.layer(0).expect("qcow2");
        let report = stead_qcow2::check(top).map_err(|error| error.to_string())?;
        if !report.is_clean() {
            return Err(format!("{:?}", report.findings));
        }
        let mut bytes = vec![0; usize::try_from(chain.len()).expect("small")];
        chain
            .read_at(0, &mut bytes)
            .map_err(|error| error.to_string())?;
        if is_raw(self.kind) && data.get(..bytes.len()) != Some(&bytes) {
            return Err("the raw data file is another disk".into());
        }
        let backing = top.header().backing.as_ref().map(|one| one.name.clone());
        Ok((chain.len(), blake3::hash(&bytes), backing))
    }

    /// Crashes at every call, with losses of what was not synced: how many were recovered, or what was wrong.
    fn judge(&self, honest: bool) -> std::result::Result<u64, String> {
        let (image, data, calls, done) = self.run(u64::MAX, true);
        assert!(done, "{}", self.kind);
        let old = self.seen(&self.bytes.0, &self.bytes.1)?;
        let new = self.seen(&image.bytes(), &data.bytes())?;
        assert!(old != new, "the change changes something");
        let mut recovered = 0;
        for call in 1..=calls {
            let (image, data, _, _) = self.run(call, honest);
            for seed in 0..6 {
                let left = |disk: &RecordedDisk| {
                    let history = disk.history();
                    let bytes = history.power_loss(history.events().len(), seed * 1000 + call);
                    Arc::new(RecordedDisk::new(bytes))
                };
                let (image, data) = (left(&image), left(&data));
                let place = format!("{}: call {call} of {calls}, seed {seed}", self.kind);
                let opened = Layer::inspect_file(written(&image.bytes()), &self.image);
                let in_progress = matches!(opened, Err(Error::InProgress { .. }));
                if in_progress {
                    let to = Arc::clone(&data);
                    let again = recover_storage_over(
                        Arc::clone(&image) as _,
                        &self.image,
                        to as _,
                        &JournalFiles::Any,
                    );
                    again.map_err(|error| format!("{place}: {error}"))?;
                    recovered += 1;
                }
                let found = self.seen(&image.bytes(), &data.bytes());
                let found = found.map_err(|error| format!("{place}: {error}"))?;
                if found != new && (in_progress || found != old) {
                    return Err(format!("{place}: another state"));
                }
            }
        }
        Ok(recovered)
    }
}

fn written(bytes: &[u8]) -> std::fs::File {
    let mut file = tempfile::tempfile().expect("temp file");
    io::Write::write_all(&mut file, bytes).expect("written");
    file
}

#[test]
fn a_crash_at_any_call_leaves_an_image_with_a_data_file_before_or_after_or_recoverable() {
    let mut recovered = [0; 4];
    for (at, kind) in KINDS.iter().enumerate() {
        let dir = tempfile::tempdir().expect("temp dir");
        let [below_it, image, top] = ["below", "image", "top"].map(|name| dir.path().join(name));
        let size: u64 = (128 << 10) - 512;
        plain(&below_it, size, None);
        io_write(&below_it, "write -P 1 0 100k");
        let under = (!is_raw(kind)).then_some(below_it.as_path());
        create(&image, kind, size, under);
        io_write(&image, "write -P 2 8k 30k");
        io_write(&image, "write -z 40k 8k");
        plain(&top, size + 4096, Some(&image));
        for command in [
            "write -P 3 2k 10k",
            "write -P 4 42k 50k",
            "write -z 20k 9k",
            "write -P 5 120k 10k",
        ] {
            io_write(&top, command);
        }
        let read = |path: &Path| std::fs::read(path).expect("read");
        let bytes = (read(&image), read(&data_of(&image)));
        let above = [layer(&top, LayerFormat::Qcow2)];
        let lower = [layer(&below_it, LayerFormat::Qcow2)];
        let disk = below(&below_it);
        let (options, quiet) = (followed(false), Control::default());
        let chain = (&above[..], if under.is_some() { &lower[..] } else { &[] });
        let joins = |editor: &mut Editor| commit_into(editor, 0, chain, &options, &quiet).map(drop);
        let flattens = |editor: &mut Editor| rebase::flatten(editor, Some(&disk), &quiet).map(drop);
        let shrinks =
            |editor: &mut Editor| resize::resize(editor, 70 << 10, under.map(|_| &disk)).map(drop);
        let grows =
            |editor: &mut Editor| resize::resize(editor, 200 << 10, under.map(|_| &disk)).map(drop);
        let changes: [Change<'_>; 4] = [&joins, &shrinks, &grows, &flattens];
        for (number, change) in changes.into_iter().enumerate() {
            if number == 3 && under.is_none() {
                continue;
            }
            let story = Story {
                kind,
                image: image.clone(),
                bytes: bytes.clone(),
                change,
            };
            let judged = story
                .judge(true)
                .unwrap_or_else(|error| panic!("change {number}: {error}"));
            recovered[number] += judged;
            if number == 0 && at == 0 {
                // The twin: a data file whose sync does nothing is caught.
                assert!(story.judge(false).is_err(), "the sync is not needed");
            }
        }
    }
    assert!(recovered[0] > 40 && recovered[1] > 10, "{recovered:?}");
}
