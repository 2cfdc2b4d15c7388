//! Info, map and compare say what `qemu-img` says.

mod images;

use std::ops::Range;
use std::path::Path;
use std::process::Command;

use images::{Random, RandomChain, format_name, layer, make_chain, run, sh};
use serde_json::Value;
use stead_qcow2::{
    Chain, Comparison, Difference, LayerFile, LayerFormat, OpenPolicy, compare, info, info_chain,
};

fn seeds(theme: u64) -> Range<u64> {
    let count = std::env::var("STEAD_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok());
    let first = theme * 1_000_000;
    first..first + count.unwrap_or(10)
}

fn json(line: &str) -> Value {
    serde_json::from_str(&sh(line)).expect("JSON")
}

fn assert_info(file: &LayerFile, story: &str) {
    let ours = serde_json::to_value(info(file).expect("info")).expect("JSON");
    let theirs = json(&format!(
        "qemu-img info --output=json -f {} {}",
        format_name(file.format),
        file.path.display()
    ));
    assert_eq!(ours, theirs, "{story}");
}

#[test]
fn info_is_that_of_qemu_for_every_image_of_random_chains() {
    let dir = tempfile::tempdir().expect("temp dir");
    let mut bitmaps = 0;
    for seed in seeds(41) {
        let made = make_chain(dir.path(), seed);
        for file in &made.files {
            let add = ["bitmap", "--add", "-g", "4096", "-f", "qcow2"];
            let added = Command::new("qemu-img")
                .args(add)
                .arg(&file.path)
                .arg("b0")
                .output();
            bitmaps += u64::from(added.expect("installed").status.success());
            assert_info(file, &made.story);
        }
        let top = made.top();
        let chain = info_chain(top, &OpenPolicy::NAMES).expect("info");
        let ours = serde_json::to_value(chain).expect("JSON");
        let theirs = json(&format!(
            "qemu-img info --backing-chain --output=json -f {} {}",
            format_name(top.format),
            top.path.display()
        ));
        assert_eq!(ours, theirs, "{}", made.story);
    }
    assert!(bitmaps > 3, "{bitmaps} bitmaps");
}

#[test]
fn info_is_that_of_qemu_for_features_one_by_one() {
    let dir = tempfile::tempdir().expect("temp dir");
    let data = dir.path().join("data");
    let options = [
        "compat=0.10".to_owned(),
        "lazy_refcounts=on,refcount_bits=1".to_owned(),
        "extended_l2=on,compression_type=zstd".to_owned(),
        format!("data_file={},data_file_raw=on", data.display()),
        format!("data_file={}", data.display()),
    ];
    for (number, options) in options.into_iter().enumerate() {
        let path = dir.path().join(number.to_string());
        sh(&format!(
            "qemu-img create -q -f qcow2 -o {options} {} 3M",
            path.display()
        ));
        assert_info(&layer(path, LayerFormat::Qcow2), &options);
    }
}

fn qemu_map(top: &LayerFile) -> Vec<Value> {
    let text = sh(&format!(
        "qemu-img map --output=json -f {} {}",
        format_name(top.format),
        top.path.display()
    ));
    serde_json::from_str(&text).expect("JSON")
}

fn our_map(chain: &Chain, known: &[Value]) -> Vec<Value> {
    let compressed = known.iter().any(|entry| entry.get("compressed").is_some());
    let entries = chain.map(0).map(|entry| {
        let entry = entry.expect("a good chain");
        assert_eq!(entry.file.is_some(), entry.offset.is_some());
        let mut value = serde_json::to_value(entry).expect("JSON");
        // Older versions of QEMU do not tell what is compressed.
        if !compressed && let Some(fields) = value.as_object_mut() {
            fields.remove("compressed");
        }
        value
    });
    entries.collect()
}

fn assert_map(chain: &Chain, top: &LayerFile, story: &str) {
    let theirs = qemu_map(top);
    let ours = our_map(chain, &theirs);
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "{story}");
    }
    assert_eq!(ours.len(), theirs.len(), "{story}");
}

#[test]
fn the_map_is_that_of_qemu_entry_by_entry() {
    let dir = tempfile::tempdir().expect("temp dir");
    for seed in seeds(42) {
        let made = make_chain(dir.path(), seed);
        assert_map(&made.open(), made.top(), &made.story);
    }
}

#[test]
fn the_map_of_preallocated_images_and_data_files_is_that_of_qemu() {
    let dir = tempfile::tempdir().expect("temp dir");
    let data = dir.path().join("data");
    for (number, options) in [
        "preallocation=metadata".to_owned(),
        "preallocation=metadata,extended_l2=on".to_owned(),
        "preallocation=metadata,cluster_size=4k".to_owned(),
        "preallocation=falloc".to_owned(),
        format!("data_file={},data_file_raw=on", data.display()),
        format!("data_file={}", data.display()),
    ]
    .into_iter()
    .enumerate()
    {
        let path = dir.path().join(number.to_string());
        let name = path.display().to_string();
        sh(&format!(
            "qemu-img create -q -f qcow2 -o {options} {name} 5M"
        ));
        let words = ["-c", "write -P 4 64k 100k", "-c", "write -z 1M 200k", &name];
        run("qemu-io", &words.map(str::to_owned));
        let top = layer(&path, LayerFormat::Qcow2);
        let chain = Chain::open_following(&top, &OpenPolicy::NAMES).expect("open");
        assert_map(&chain, &top, &options);
    }
}

/// Exit status and what was printed.
fn qemu_compare(a: &LayerFile, b: &LayerFile, strict: bool) -> (i32, String) {
    let mut command = Command::new("qemu-img");
    command.args([
        "compare",
        "-f",
        format_name(a.format),
        "-F",
        format_name(b.format),
    ]);
    if strict {
        command.arg("-s");
    }
    let output = command
        .arg(&a.path)
        .arg(&b.path)
        .output()
        .expect("installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    (output.status.code().expect("a status"), text)
}

/// As `qemu-img compare` tells it.
fn told(found: &Comparison) -> (i32, String) {
    let mut text = String::new();
    // It warns where the shorter disk ends, and only if it comes that far.
    let shorter = found.lengths[0].min(found.lengths[1]);
    let reached = match found.difference {
        None => true,
        Some(Difference::Content { at, .. } | Difference::Status { at }) => at >= shorter,
        Some(Difference::Length) => false,
    };
    if reached && found.lengths[0] != found.lengths[1] {
        text += "Warning: Image size mismatch!\n";
    }
    text += &match found.difference {
        None => "Images are identical.\n".to_owned(),
        Some(Difference::Length) => "Strict mode: Image size mismatch!\n".to_owned(),
        Some(Difference::Status { at }) => {
            format!("Strict mode: Offset {at} block status mismatch!\n")
        }
        Some(Difference::Content { sector, .. }) => {
            format!("Content mismatch at offset {sector}!\n")
        }
    };
    (i32::from(found.difference.is_some()), text)
}

/// A copy of the disk in another shape, with a change somewhere.
fn changed_copy(dir: &Path, made: &RandomChain, random: &mut Random, seed: u64) -> LayerFile {
    let format = random.pick(&[LayerFormat::Raw, LayerFormat::Qcow2]);
    let path = dir.join(format!("{seed}.copy"));
    let top = made.top();
    sh(&format!(
        "qemu-img convert -f {} -O {} {} {}",
        format_name(top.format),
        format_name(format),
        top.path.display(),
        path.display()
    ));
    let size = made.open().len();
    if random.chance(2) {
        let at = random.below(size);
        let length = 1 + random.below((size - at).min(3000));
        let byte = random.below(4);
        let args = [
            "-f",
            format_name(format),
            "-c",
            &format!("write -P {byte} {at} {length}"),
        ];
        let path = path.display().to_string();
        run(
            "qemu-io",
            &args
                .into_iter()
                .chain([&*path])
                .map(str::to_owned)
                .collect::<Vec<_>>(),
        );
    }
    if random.chance(3) {
        sh(&format!(
            "qemu-img resize -q -f {} {} {}",
            format_name(format),
            path.display(),
            size + 512 * random.below(3000)
        ));
    }
    layer(path, format)
}

#[test]
fn a_comparison_is_that_of_qemu_with_the_same_first_difference() {
    let dir = tempfile::tempdir().expect("temp dir");
    let (mut alike, mut different) = (0, 0);
    for seed in seeds(43) {
        let mut random = Random::new(seed);
        let made = make_chain(dir.path(), seed);
        let other = changed_copy(dir.path(), &made, &mut random, seed);
        let chains = [
            made.open(),
            Chain::open(std::slice::from_ref(&other)).expect("open"),
        ];
        let found = compare(&chains[0], &chains[1], false, |_| true).expect("read");
        let found = found.expect("it was not stopped");
        assert_eq!(
            told(&found),
            qemu_compare(made.top(), &other, false),
            "{}",
            made.story
        );
        assert_content(&chains, &found);
        alike += u64::from(found.difference.is_none());
        different += u64::from(found.difference.is_some());
    }
    assert!(
        alike > 0 && different > 0,
        "{alike} alike, {different} different"
    );
}

/// The byte named is different, and none before it is.
fn assert_content(chains: &[Chain; 2], found: &Comparison) {
    let longest = found.lengths[0].max(found.lengths[1]);
    let [a, b] = [0, 1].map(|side| {
        let mut bytes = vec![0; usize::try_from(longest).expect("fits")];
        let there = usize::try_from(chains[side].len()).expect("fits");
        chains[side].read_at(0, &mut bytes[..there]).expect("read");
        bytes
    });
    let first = a.iter().zip(&b).position(|(a, b)| a != b);
    let told = match found.difference {
        Some(Difference::Content { at, .. }) => usize::try_from(at).ok(),
        Some(Difference::Length | Difference::Status { .. }) | None => None,
    };
    assert_eq!(told, first);
}

/// QEMU takes "this run reaches the disk's end" for a part of the status, so it may name the start of
/// the run before.
fn status_as_qemu(at: u64, (code, text): &(i32, String)) {
    let theirs = text.strip_prefix("Strict mode: Offset ");
    let theirs = theirs.and_then(|text| text.strip_suffix(" block status mismatch!\n"));
    let theirs: u64 = theirs.expect(text).parse().expect("a number");
    assert!(*code == 1 && theirs <= at, "{at} {text}");
}

#[test]
fn a_strict_comparison_sees_lengths_and_holes_as_qemu_does() {
    let dir = tempfile::tempdir().expect("temp dir");
    let path = |name: &str| layer(dir.path().join(name), LayerFormat::Qcow2);
    let make = |name: &str, size: &str, commands: &[&str]| {
        let file = path(name);
        let name = file.path.display().to_string();
        sh(&format!("qemu-img create -q -f qcow2 {name} {size}"));
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        run(
            "qemu-io",
            &commands
                .chain([&*name])
                .map(str::to_owned)
                .collect::<Vec<_>>(),
        );
        file
    };
    let files = [
        make("a", "3M", &["write -P 1 64k 64k"]),
        make("b", "3M", &["write -P 1 64k 64k", "write -P 0 1M 64k"]),
        make("c", "3M", &["write -P 1 64k 64k", "write -z 1M 64k"]),
        make("d", "4M", &["write -P 1 64k 64k"]),
        make("e", "3M", &["write -P 1 64k 64k"]),
        make("f", "3M", &["write -c -P 1 64k 64k"]),
    ];
    for a in &files {
        for b in &files {
            for strict in [false, true] {
                let chains =
                    [a, b].map(|file| Chain::open(std::slice::from_ref(file)).expect("open"));
                let found = compare(&chains[0], &chains[1], strict, |_| true).expect("read");
                let found = found.expect("it was not stopped");
                let (ours, theirs) = (told(&found), qemu_compare(a, b, strict));
                if let Some(Difference::Status { at }) = found.difference {
                    status_as_qemu(at, &theirs);
                } else {
                    assert_eq!(ours, theirs, "{strict} {a:?} {b:?}");
                }
            }
        }
    }
    let chains =
        [&files[0], &files[4]].map(|file| Chain::open(std::slice::from_ref(file)).expect("open"));
    assert_eq!(
        compare(&chains[0], &chains[1], true, |_| false).expect("read"),
        None
    );
}
