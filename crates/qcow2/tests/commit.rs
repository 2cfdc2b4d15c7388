//! A commit makes the base what the top showed, keeps the base's internal snapshots, and says what became of the
//! bitmaps.

#![allow(
    clippy::disallowed_methods,
    reason = "a copy of an image to compare with need not be durable"
)]

mod images;

use std::path::{Path, PathBuf};
use std::process::Command;

use images::{Random, convert, layer, make_chain, qemu_dirty, run, sh};
use stead_qcow2::edit::EditOptions;
use stead_qcow2::ops::commit::{
    self, BitmapFate, Chosen, CommitOptions, CommitReport, Incomplete, LongerBase,
};
use stead_qcow2::{Chain, Control, Error, Layer, LayerFile, LayerFormat, Result};

fn commit(files: &[LayerFile], options: &CommitOptions) -> Result<CommitReport> {
    commit::commit(files, options, &Control::default())
}

fn measure(files: &[LayerFile], options: &CommitOptions) -> Result<CommitReport> {
    commit::measure(files, options, &Control::default())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temp paths are text")
}

fn io(path: &Path, command: &str) {
    let args = ["-f", "qcow2", "-c", command, text(path)].map(str::to_owned);
    run("qemu-io", &args);
}

fn options(base: usize) -> CommitOptions {
    CommitOptions {
        base,
        edit: EditOptions {
            cache_bytes: 1 << 16,
            allow_dirty: true,
        },
        ..CommitOptions::default()
    }
}

/// The internal snapshots of a file and what they show with everything below.
fn snapshots(files: &[LayerFile]) -> Vec<(Vec<u8>, blake3::Hash)> {
    let chain = Chain::open(files).expect("whole");
    let Some(top) = chain.layer(0) else {
        return Vec::new();
    };
    let all = top.internal_snapshots().expect("whole");
    all.into_iter()
        .map(|snapshot| {
            let view = chain.view_of(&snapshot).expect("whole");
            let mut bytes = vec![0; usize::try_from(view.len()).expect("small")];
            view.read_at(0, &mut bytes).expect("readable");
            (snapshot.name, blake3::hash(&bytes))
        })
        .collect()
}

fn delete_snapshots(file: &LayerFile) {
    for snapshot in Layer::open(&file.path)
        .expect("open")
        .internal_snapshots()
        .expect("whole")
    {
        let name = String::from_utf8(snapshot.name).expect("text");
        sh(&format!("qemu-img snapshot -d {name} {}", text(&file.path)));
    }
}

fn require_clean(file: &LayerFile, story: &str) {
    if file.format == LayerFormat::Raw {
        return;
    }
    let report = stead_qcow2::check(&Layer::open(&file.path).expect("whole")).expect("readable");
    assert!(report.is_clean(), "{:?}\n{story}", report.findings);
    let output = Command::new("qemu-img")
        .args(["check", "-q", "-f", "qcow2", text(&file.path)])
        .output();
    let output = output.expect("qemu-img is installed");
    let found = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{found}\n{story}");
}

/// Commits a random chain; `None` where QEMU itself made it damaged.
fn one_commit(dir: &Path, seed: u64) -> Option<CommitReport> {
    let made = make_chain(dir, seed);
    let files = &made.files;
    if files.len() < 2 {
        return None;
    }
    let mut random = Random::new(seed);
    let base = 1 + usize::try_from(random.below(files.len() as u64 - 1)).expect("few");
    let mut options = options(base);
    options.longer_base = random.pick(&[LongerBase::Keep, LongerBase::Cut]);
    options.empty_top = base == 1 && !random.chance(3);
    for file in &files[..base] {
        delete_snapshots(file);
    }
    // QEMU leaks clusters where a snapshot does not fit the refcounts.
    let is_clean = |file: &LayerFile| {
        let layer = Layer::open(&file.path).expect("open");
        stead_qcow2::check(&layer).expect("readable").is_clean()
    };
    let qcow2 = |file: &&LayerFile| file.format == LayerFormat::Qcow2;
    if !files.iter().filter(qcow2).all(is_clean) {
        return None;
    }
    let raw = dir.join("raw");
    let expected = convert(&files[0], &raw);
    let before = convert(&files[base], &raw);
    let kept = snapshots(&files[base..]);
    let planned = match measure(files, &options) {
        Err(Error::Damaged { .. } | Error::RefcountOverflow { .. }) => return None,
        planned => planned.unwrap_or_else(|error| panic!("{error}\n{}", made.story)),
    };
    let report = commit(files, &options);
    let report = report.unwrap_or_else(|error| panic!("{error}\n{}", made.story));
    let story = format!("{}{options:?}\n{report:?}", made.story);
    assert_eq!(planned.base, report.base, "{story}");
    let length = std::fs::metadata(&files[base].path).expect("there").len();
    assert_eq!(length, report.base.end_bytes, "{story}");
    for file in files {
        require_clean(file, &story);
    }
    let found = convert(&files[base], &raw);
    assert!(found[..expected.len()] == expected, "{story}");
    match options.longer_base {
        LongerBase::Keep => {
            assert!(found[expected.len()..] == before[expected.len().min(before.len())..])
        }
        LongerBase::Cut | LongerBase::Refuse => assert_eq!(found.len(), expected.len()),
    }
    assert!(convert(&files[0], &raw) == expected, "{story}");
    assert!(snapshots(&files[base..]) == kept, "{story}");
    if options.empty_top {
        let top = Chain::open(files).expect("whole");
        assert_eq!(top.allocated(1).count(), 0, "{story}");
    }
    Some(report)
}

#[test]
fn the_base_becomes_what_the_top_showed_and_its_internal_snapshots_stay() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (mut done, mut in_place) = (0, 0);
    let soak = std::env::var_os("STEAD_SOAK").is_some();
    for seed in 81_000_000..81_000_000_u64 + if soak { 400 } else { 24 } {
        if let Some(report) = one_commit(dir.path(), seed) {
            done += 1;
            in_place += u32::from(report.base.journal);
        }
    }
    assert!(
        done > 15 && in_place > 5,
        "{done} done, {in_place} in place"
    );
}

fn create(path: &Path, size: &str, backing: Option<&LayerFile>) -> LayerFile {
    let backing = backing.map_or_else(String::new, |below| {
        format!(
            "-b {} -F {}",
            text(&below.path),
            images::format_name(below.format)
        )
    });
    sh(&format!(
        "qemu-img create -q -f qcow2 {backing} {} {size}",
        text(path)
    ));
    layer(path, LayerFormat::Qcow2)
}

fn names(dir: &Path) -> [PathBuf; 3] {
    ["base", "mid", "top"].map(|name| dir.join(name))
}

#[test]
fn a_snapshot_above_that_shows_what_would_change_refuses_the_commit() {
    let dir = tempfile::tempdir().expect("temp dir");
    let [base, _, top] = names(dir.path());
    let below = create(&base, "4M", None);
    io(&base, "write -P 1 0 1M");
    let above = create(&top, "4M", Some(&below));
    io(&top, "write -P 2 0 64k");
    sh(&format!("qemu-img snapshot -c cp {}", text(&top)));
    let files = [above, below];
    io(&top, "write -P 3 0 64k");
    let before = std::fs::read(&base).expect("read");
    commit(&files, &options(1)).expect("the snapshot has its own bytes there");
    std::fs::write(&base, &before).expect("write");
    io(&top, "write -P 4 512k 64k");
    let error = commit(&files, &options(1)).expect_err("the snapshot would change");
    assert!(
        error
            .to_string()
            .contains("\"cp\" shows the base at guest offset 0x80000"),
        "{error}"
    );
    assert!(std::fs::read(&base).expect("read") == before);
}

#[test]
fn a_base_is_not_cut_where_a_snapshot_above_shows_it() {
    let dir = tempfile::tempdir().expect("temp dir");
    let [base, _, top] = names(dir.path());
    let below = create(&base, "4M", None);
    io(&base, "write -P 1 3M 64k");
    let above = create(&top, "4M", Some(&below));
    sh(&format!("qemu-img snapshot -c cp {}", text(&top)));
    sh(&format!("qemu-img resize -q --shrink {} 2M", text(&top)));
    let files = [above, below];
    let mut cut = options(1);
    cut.longer_base = LongerBase::Cut;
    let error = commit(&files, &cut).expect_err("the snapshot would lose its end");
    assert!(error.to_string().contains("offset 0x200000"), "{error}");
    cut.longer_base = LongerBase::Keep;
    commit(&files, &cut).expect("nothing is cut");
}

#[test]
fn a_longer_base_is_not_cut_unless_that_is_said() {
    let dir = tempfile::tempdir().expect("temp dir");
    let [base, _, top] = names(dir.path());
    let below = create(&base, "4M", None);
    io(&base, "write -P 1 0 4M");
    let above = create(&top, "2M", Some(&below));
    io(&top, "write -P 2 0 1M");
    let files = [above, below];
    let error = commit(&files, &options(1)).expect_err("refused");
    assert!(
        error.to_string().contains("4194304 bytes, and the disk"),
        "{error}"
    );
    let mut keep = options(1);
    keep.longer_base = LongerBase::Keep;
    commit(&files, &keep).expect("commit");
    io(&base, "read -P 1 2M 2M");
    let mut cut = options(1);
    cut.longer_base = LongerBase::Cut;
    commit(&files, &cut).expect("commit");
    assert_eq!(Layer::open(&base).expect("open").virtual_size(), 2 << 20);
}

#[test]
fn files_that_are_no_chain_are_refused_before_anything_is_read_wrong() {
    let dir = tempfile::tempdir().expect("temp dir");
    let [base, mid, top] = names(dir.path());
    let lowest = create(&base, "4M", None);
    let middle = create(&mid, "4M", Some(&lowest));
    let above = create(&top, "4M", Some(&middle));
    let files = [above.clone(), middle.clone(), lowest];
    let mut deep = options(2);
    deep.empty_top = true;
    for (files, options, said) in [
        (&files[..], options(0), "expected 1 to 2"),
        (&files, options(3), "expected 1 to 2"),
        (&files, deep, "between it and the base"),
        (
            &files[..2],
            options(1),
            "has a backing file, which was not given",
        ),
    ] {
        let error = commit(files, &options).expect_err(said);
        assert!(matches!(error, Error::InvalidChain { .. }), "{error}");
        assert!(error.to_string().contains(said), "{error}");
    }
}

fn add(path: &Path, name: &str) {
    sh(&format!("qemu-img bitmap --add {} {name}", text(path)));
}

fn fate<'a>(report: &'a CommitReport, name: &str) -> &'a BitmapFate {
    let found = report
        .bitmaps
        .iter()
        .find(|one| one.name == name.as_bytes());
    &found.expect("every bitmap is told of").fate
}

/// A base, a layer and a top of 8 MiB with bitmaps of all kinds; each layer writes a place of its own.
fn chain_with_bitmaps(dir: &Path) -> [LayerFile; 3] {
    let [base, mid, top] = names(dir);
    let lowest = create(&base, "8M", None);
    io(&base, "write -P 1 0 8M");
    for name in ["all", "hole", "lowest", "frozen", "off"] {
        add(&base, name);
    }
    sh(&format!("qemu-img bitmap --disable {} frozen", text(&base)));
    io(&base, "write -P 2 1M 64k");
    let middle = create(&mid, "8M", Some(&lowest));
    for name in ["all", "above", "off"] {
        add(&mid, name);
    }
    sh(&format!("qemu-img bitmap --disable {} off", text(&mid)));
    io(&mid, "write -P 3 2M 64k");
    let above = create(&top, "8M", Some(&middle));
    // Before the bitmaps of this layer began.
    io(&top, "write -P 4 3M 64k");
    for name in ["all", "above", "hole", "off", "new"] {
        add(&top, name);
    }
    io(&top, "write -P 5 4M 64k");
    [above, middle, lowest]
}

const K: u64 = 1 << 16;

fn places(of: &[u64]) -> Vec<std::ops::Range<u64>> {
    of.iter().map(|mib| mib << 20..(mib << 20) + K).collect()
}

#[test]
fn bitmaps_of_the_layers_are_joined_and_what_they_missed_is_marked() {
    let dir = tempfile::tempdir().expect("temp dir");
    let files = chain_with_bitmaps(dir.path());
    let report = commit(&files, &options(2)).expect("commit");
    let base = &files[2].path;
    assert_eq!(
        *fate(&report, "all"),
        BitmapFate::Merged { unnamed_bytes: K }
    );
    assert_eq!(qemu_dirty(base, "all"), places(&[1, 2, 3, 4]));
    assert_eq!(
        *fate(&report, "above"),
        BitmapFate::Carried { unnamed_bytes: K }
    );
    assert_eq!(qemu_dirty(base, "above"), places(&[2, 3, 4]));
    assert_eq!(*fate(&report, "lowest"), BitmapFate::Marked);
    assert_eq!(qemu_dirty(base, "lowest"), places(&[1, 2, 3, 4]));
    assert_eq!(*fate(&report, "frozen"), BitmapFate::Kept);
    assert_eq!(qemu_dirty(base, "frozen"), []);
    // It began in the top, after the first write there, and says nothing of what was before.
    assert_eq!(
        *fate(&report, "new"),
        BitmapFate::Carried { unnamed_bytes: 0 }
    );
    assert_eq!(qemu_dirty(base, "new"), places(&[4]));
    for (name, said) in [("hole", "does not have it"), ("off", "disabled in")] {
        let BitmapFate::Dropped { reason } = fate(&report, name) else {
            panic!("{name}: {report:?}");
        };
        assert!(reason.contains(said), "{reason}");
    }
    let stored = Layer::open(base)
        .expect("open")
        .stored_bitmaps()
        .expect("whole");
    let mut left: Vec<_> = stored.into_iter().map(|one| one.name).collect();
    left.sort();
    assert_eq!(left, [&b"above"[..], b"all", b"frozen", b"lowest", b"new"]);
    require_clean(&files[2], "");
}

#[test]
fn bitmaps_of_the_base_that_the_caller_chooses_go_or_stay_and_none_stays_that_would_say_too_little()
{
    let dir = tempfile::tempdir().expect("temp dir");
    let files = chain_with_bitmaps(dir.path());
    let before = std::fs::read(&files[2].path).expect("read");
    for (name, said) in [("all", "records writes"), ("new", "has no bitmap")] {
        let mut wrong = options(2);
        wrong.chosen = vec![(name.into(), Chosen::Leave)];
        let error = commit(&files, &wrong).expect_err("refused");
        assert!(error.to_string().contains(said), "{error}");
        assert!(std::fs::read(&files[2].path).expect("read") == before);
    }
    let mut chosen = options(2);
    chosen.chosen = vec![
        (b"lowest".to_vec(), Chosen::Remove),
        (b"frozen".to_vec(), Chosen::Leave),
    ];
    let report = commit(&files, &chosen).expect("commit");
    assert_eq!(*fate(&report, "frozen"), BitmapFate::Kept);
    assert!(matches!(
        fate(&report, "lowest"),
        BitmapFate::Dropped { .. }
    ));
    let stored = Layer::open(&files[2].path).expect("open");
    let stored = stored.stored_bitmaps().expect("whole");
    assert!(stored.iter().all(|one| one.name != b"lowest"));
    require_clean(&files[2], "");
}

#[test]
fn a_bitmap_that_cannot_be_complete_is_marked_instead_or_refuses_the_commit() {
    let dir = tempfile::tempdir().expect("temp dir");
    let files = chain_with_bitmaps(dir.path());
    let before = std::fs::read(&files[2].path).expect("read");
    let mut refuse = options(2);
    refuse.incomplete = Incomplete::Refuse;
    let error = commit(&files, &refuse).expect_err("bitmaps would be lost");
    assert!(error.to_string().contains("would be lost"), "{error}");
    assert!(std::fs::read(&files[2].path).expect("read") == before);
    let mut mark = options(2);
    mark.incomplete = Incomplete::Mark;
    let report = commit(&files, &mark).expect("commit");
    for name in ["hole", "off"] {
        assert!(
            matches!(fate(&report, name), BitmapFate::MarkedInstead { .. }),
            "{report:?}"
        );
        assert_eq!(qemu_dirty(&files[2].path, name), places(&[1, 2, 3, 4]));
    }
}

#[test]
fn a_base_that_is_longer_with_the_top_marks_what_is_new() {
    let dir = tempfile::tempdir().expect("temp dir");
    let [base, _, top] = names(dir.path());
    let below = create(&base, "1M", None);
    add(&base, "b");
    let above = create(&top, "4M", Some(&below));
    add(&top, "b");
    io(&top, "write -P 7 512k 64k");
    commit(&[above, below], &options(1)).expect("commit");
    let dirty = qemu_dirty(&base, "b");
    let expected = [512 << 10..576 << 10, 1 << 20..4 << 20];
    assert_eq!(dirty, expected);
}
