//! A commit says how far it is, ends when that is wanted, and joins any layers of a chain.

#![allow(
    clippy::disallowed_methods,
    reason = "a copy of an image to compare with need not be durable"
)]

mod images;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use images::{Random, convert, format_name, layer, run, sh};
use stead_qcow2::ops::commit::{CommitOptions, LongerBase, commit};
use stead_qcow2::{Control, Error, LayerFile, LayerFormat};

fn write(file: &LayerFile, commands: &[String]) {
    let mut args = vec!["-f".to_owned(), format_name(file.format).into()];
    for command in commands {
        args.extend(["-c".to_owned(), command.clone()]);
    }
    args.push(file.path.display().to_string());
    run("qemu-io", &args);
}

fn create(path: &Path, format: LayerFormat, below: Option<&LayerFile>) -> LayerFile {
    let backing = below.map_or_else(String::new, |below| {
        format!(
            "-b {} -F {}",
            below.path.display(),
            format_name(below.format)
        )
    });
    let name = format_name(format);
    let path_text = path.display();
    sh(&format!(
        "qemu-img create -q -f {name} {backing} {path_text} 4M"
    ));
    layer(path, format)
}

/// A top that writes over 1 MiB of the base and adds 1 MiB to it.
fn pair(dir: &Path, base: LayerFormat) -> [LayerFile; 2] {
    let below = create(&dir.join("base"), base, None);
    write(&below, &["write -P 1 0 1M".into()]);
    let above = create(&dir.join("top"), LayerFormat::Qcow2, Some(&below));
    write(&above, &["write -P 2 0 2M".into()]);
    [above, below]
}

#[test]
fn a_commit_that_is_cancelled_leaves_everything_as_it_was_and_one_that_cannot_be_is_done() {
    for format in [LayerFormat::Qcow2, LayerFormat::Raw] {
        let (mut cancelled, mut done) = (0, 0);
        for call in 0.. {
            let dir = tempfile::tempdir().expect("temp dir");
            let files = pair(dir.path(), format);
            let before = files
                .each_ref()
                .map(|file| std::fs::read(&file.path).expect("read"));
            let shown = convert(&files[0], &dir.path().join("shown"));
            let (cancel, told) = (AtomicBool::new(call == 0), Mutex::new(Vec::new()));
            let tell = |fraction: f64| {
                let mut told = told.lock().expect("no panic");
                told.push(fraction);
                cancel.fetch_or(told.len() == call, Ordering::SeqCst);
            };
            let control = Control {
                cancel: Some(&cancel),
                progress: Some(&tell),
            };
            let outcome = commit(&files, &CommitOptions::default(), &control);
            let after = files
                .each_ref()
                .map(|file| std::fs::read(&file.path).expect("read"));
            let told = told.into_inner().expect("no panic");
            assert!(told.is_sorted(), "{told:?}");
            match outcome {
                Err(Error::Cancelled { .. }) => {
                    assert!(before == after, "{format:?}, cancelled at {call}");
                    cancelled += 1;
                }
                Err(error) => panic!("{format:?}, call {call}: {error}"),
                Ok(report) => {
                    assert_eq!(told.last(), Some(&1.0));
                    assert!(report.in_place_bytes >= 1 << 20, "{report:?}");
                    assert!(convert(&files[1], &dir.path().join("seen")) == shown);
                    done += 1;
                    if call > told.len() {
                        break;
                    }
                }
            }
        }
        // Told while clusters were new, of the raw file only when it could not be cancelled any more.
        let least = if format == LayerFormat::Qcow2 { 2 } else { 1 };
        assert!(cancelled >= least && done >= 2, "{cancelled}, {done}");
    }
}

/// Six images over each other, top first, each with something of its own everywhere.
fn six(dir: &Path, base: LayerFormat) -> Vec<LayerFile> {
    let mut random = Random::new(6);
    let mut files: Vec<LayerFile> = Vec::new();
    for level in 0..6 {
        let format = if level == 0 { base } else { LayerFormat::Qcow2 };
        let file = create(&dir.join(format!("l{level}")), format, files.first());
        let commands = (0..12).map(|_| {
            let (at, length) = (random.below(7000) * 512, 512 * (1 + random.below(600)));
            match random.below(5) {
                0 => format!("write -z {at} {length}"),
                _ => format!("write -P {} {at} {length}", 1 + random.below(250)),
            }
        });
        write(&file, &commands.collect::<Vec<_>>());
        files.insert(0, file);
    }
    files
}

#[test]
fn any_layers_of_a_chain_are_committed_into_any_below_them() {
    let mut tried = 0;
    for format in [LayerFormat::Qcow2, LayerFormat::Raw] {
        for first in 0..5 {
            // With a raw base: those that end there.
            let last = first + 1..if format == LayerFormat::Raw { 1 } else { 6 };
            for base in last.chain((format == LayerFormat::Raw).then_some(5)) {
                joined(format, first, base);
                tried += 1;
            }
        }
    }
    assert_eq!(tried, 15 + 5);
}

/// The layers from `first` on, down to `base`, become one: `base`.
fn joined(format: LayerFormat, first: usize, base: usize) {
    let dir = tempfile::tempdir().expect("temp dir");
    let files = six(dir.path(), format);
    let [seen, mid] = ["seen", "mid"].map(|name| dir.path().join(name));
    let (whole, part) = (convert(&files[0], &seen), convert(&files[first], &mid));
    let options = CommitOptions {
        base: base - first,
        longer_base: LongerBase::Refuse,
        ..CommitOptions::default()
    };
    let text = format!("{first} to {base} over {format:?}");
    let report = commit(&files[first..], &options, &Control::default());
    report.unwrap_or_else(|error| panic!("{text}: {error}"));
    assert!(convert(&files[0], &seen) == whole, "{text}");
    assert!(convert(&files[base], &mid) == part, "{text}");
    for file in files
        .iter()
        .filter(|file| file.format == LayerFormat::Qcow2)
    {
        sh(&format!("qemu-img check -q {}", file.path.display()));
    }
    // Nothing needs the layers in between any more.
    if let Some(above) = first.checked_sub(1) {
        let below = &files[base];
        sh(&format!(
            "qemu-img rebase -u -b {} -F {} {}",
            below.path.display(),
            format_name(below.format),
            files[above].path.display()
        ));
        for file in &files[first..base] {
            std::fs::remove_file(&file.path).expect("there");
        }
        assert!(convert(&files[0], &seen) == whole, "{text}");
    }
}
