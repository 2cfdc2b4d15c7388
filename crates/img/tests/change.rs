//! `snapshot`, `resize` and `recover`: the same result as qemu-img, with the same words.

mod both;

use both::Bench;

fn image() -> Bench {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 8M; qemu-io -c 'write -P 1 0 1M' a.qcow2; qemu-img snapshot -c s1 a.qcow2");
    bench.sh("qemu-io -c 'write -P 2 512k 1M' a.qcow2; qemu-img snapshot -c s2 a.qcow2; qemu-img snapshot -c s1 a.qcow2; qemu-io -c 'write -P 3 4M 64k' a.qcow2");
    bench.sh("qemu-img create -q -f raw r.raw 4M; qemu-io -f raw -c 'write -P 5 0 4M' r.raw; qemu-img create -q -f qcow2 -b r.raw -F raw o.qcow2 3M");
    bench
}

#[test]
fn snapshots_are_listed_made_applied_and_removed_alike() {
    let bench = image();
    bench.same(&[
        "snapshot -l a.qcow2",
        "snapshot -l -U a.qcow2",
        "snapshot -l -q a.qcow2",
        "snapshot -l --image-opts driver=qcow2,file.filename=a.qcow2",
        "snapshot -l o.qcow2",
        "snapshot -l r.raw",
    ]);
    for line in [
        "-c s3 a.qcow2",
        "-c s1 a.qcow2",
        "-c 'a name' -q a.qcow2",
        "-c '' a.qcow2",
        "-c x --image-opts driver=qcow2,file.filename=a.qcow2",
        "-a s1 a.qcow2",
        "-a s2 a.qcow2",
        "-a 2 a.qcow2",
        "-a 3 a.qcow2",
        "-d s1 a.qcow2",
        "-d s2 a.qcow2",
    ] {
        bench.same_image(&format!("snapshot {line}"), "a.qcow2");
    }
    bench.same_image("snapshot -c s o.qcow2", "o.qcow2");
    bench.same_refusal(&[
        "snapshot -d nope a.qcow2",
        "snapshot -d 2 a.qcow2",
        "snapshot -a nope a.qcow2",
        "snapshot -c x -d y a.qcow2",
        "snapshot -l -l a.qcow2",
        "snapshot -U -c z a.qcow2",
        "snapshot -c x r.raw",
        "snapshot -a x r.raw",
        "snapshot -d x r.raw",
        "snapshot -c x nope",
        "snapshot -l foo:a",
        "snapshot -f a.qcow2",
        "snapshot",
        "snapshot a b",
    ]);
}

#[test]
fn a_check_tells_of_a_possible_loss_in_one_line_and_in_full_when_asked() {
    let bench = image();
    let text = |line: &str| String::from_utf8_lossy(&bench.ours(line).stderr).into_owned();
    assert_eq!(text("check a.qcow2").lines().count(), 1);
    assert!(text("check --notes a.qcow2").contains("(s2)"));
    bench.same(&["check a.qcow2", "check --output=json a.qcow2"]);
}

#[test]
fn every_view_of_an_image_has_the_same_bytes_after_a_snapshot_was_removed() {
    let bench = image();
    bench.sh("cp a.qcow2 theirs.qcow2; qemu-img snapshot -d s2 theirs.qcow2");
    assert!(bench.ours("snapshot -d s2 a.qcow2").status.success());
    for view in ["", "-l 1", "-l 3"] {
        bench.sh(&format!("qemu-img convert {view} a.qcow2 ours.raw; qemu-img convert {view} theirs.qcow2 theirs.raw; cmp ours.raw theirs.raw"));
    }
}

#[test]
fn disks_get_another_length_alike() {
    let bench = image();
    bench.sh("qemu-img bitmap --add o.qcow2 b0");
    for line in [
        "a.qcow2 16M",
        "a.qcow2 +1M",
        "a.qcow2 +0",
        "-q a.qcow2 9M",
        "--shrink a.qcow2 -1M",
        "--shrink -f qcow2 a.qcow2 512",
        "--image-opts driver=qcow2,file.filename=a.qcow2 12M",
    ] {
        bench.same_image(&format!("resize {line}"), "a.qcow2");
    }
    for mode in ["metadata", "falloc", "full"] {
        bench.same_image(
            &format!("resize --preallocation={mode} a.qcow2 +9M"),
            "a.qcow2",
        );
        bench.same_image(
            &format!("resize --preallocation={mode} o.qcow2 16M"),
            "o.qcow2",
        );
    }
    bench.same_image("resize o.qcow2 4M", "o.qcow2");
    bench.same_image("resize o.qcow2 16M", "o.qcow2");
    for line in [
        "-f raw r.raw 16M",
        "r.raw 16M",
        "-f raw r.raw +512",
        "-f raw --shrink r.raw 1000",
        "-f raw --shrink r.raw -1M",
        "-f raw --preallocation=falloc r.raw 5M",
        "-f raw --preallocation=full r.raw 5M",
    ] {
        bench.same_image(&format!("resize {line}"), "r.raw");
    }
    bench.same_refusal(&[
        "resize",
        "resize a.qcow2",
        "resize a.qcow2 foo",
        "resize a.qcow2 +x",
        "resize a.qcow2 131M+1",
        "resize a.qcow2 -1M",
        "resize a.qcow2 -- -1M",
        "resize a.qcow2 -500M",
        "resize --shrink a.qcow2 -500M",
        "resize --shrink a.qcow2 0",
        "resize a.qcow2 1000",
        "resize a.qcow2 13000000",
        "resize a.qcow2 16E",
        "resize a.qcow2 8M --",
        "resize a.qcow2 a.qcow2 1M",
        "resize nope 1M",
        "resize -f raw r.raw 2M",
        "resize -f raw r.raw 8E",
        "resize -f bogus a.qcow2 1M",
        "resize --preallocation=foo a.qcow2 130M",
        "resize -f raw --preallocation=metadata r.raw 30M",
        "resize --preallocation=full --shrink a.qcow2 1M",
        "resize --preallocation=falloc a.qcow2 8M",
        "resize -f raw --preallocation=full --shrink r.raw 1M",
    ]);
    bench.same_status(&["resize a.qcow2 1E"]);
}

#[test]
fn a_dry_run_changes_nothing_and_the_report_says_what_was_needed() {
    let bench = image();
    bench.sh("cp a.qcow2 before.qcow2");
    for line in [
        "snapshot --dry-run -c x a.qcow2",
        "snapshot --dry-run -a s1 a.qcow2",
        "snapshot --dry-run -d s1 a.qcow2",
        "resize --dry-run a.qcow2 1G",
    ] {
        let output = bench.ours(line);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains("free bytes"),
            "{line}: {output:?}"
        );
    }
    bench.sh("cmp a.qcow2 before.qcow2");
    let planned = bench.ours("resize --dry-run --json a.qcow2 1G");
    let done = bench.ours("resize --json a.qcow2 1G");
    let [planned, done] = [planned, done]
        .map(|output| serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON"));
    assert_eq!(
        (&planned["outcome"], &done["outcome"]),
        (&"not-begun".into(), &"done".into())
    );
    assert_eq!(planned["room"], done["room"]);
    let length = std::fs::metadata(bench.path("a.qcow2"))
        .expect("the image")
        .len();
    assert_eq!(done["room"]["end-bytes"], length);
}

#[test]
fn an_image_in_use_is_not_changed_and_its_user_is_named() {
    let bench = image();
    let server = bench.serve("a.qcow2");
    let lines = [
        "snapshot -c x a.qcow2",
        "resize a.qcow2 1G",
        "rebase -b '' a.qcow2",
        "rebase -u a.qcow2",
        "bitmap --add a.qcow2 n",
        "recover a.qcow2",
    ];
    let refused = lines.map(|line| (bench.ours(line), bench.theirs(line)));
    drop(server);
    for (line, (ours, theirs)) in lines.iter().zip(refused) {
        let [ours_text, theirs_text] =
            [&ours, &theirs].map(|output| String::from_utf8_lossy(&output.stderr).into_owned());
        assert_eq!(ours.status.code(), Some(1), "{line}");
        assert!(ours_text.contains("qemu-nbd"), "{line}: {ours_text}");
        if *line != "recover a.qcow2" {
            assert!(
                ours_text.starts_with(&theirs_text),
                "{ours_text:?} and {theirs_text:?}"
            );
        }
    }
    assert_eq!(
        bench.ours("recover a.qcow2").stdout,
        b"No change was in progress.\n"
    );
}

#[test]
fn help_and_version_are_there_under_both_names() {
    let bench = Bench::new();
    let text = |line: &str| {
        let output = bench.ours(line);
        assert!(output.status.success(), "{line}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(text("--version").starts_with("qemu-img version 7.2.0 "));
    let help = text("--help");
    assert!(help.contains("Supported formats: raw qcow2\n"));
    for command in [
        "create", "info", "check", "map", "measure", "convert", "compare", "dd", "amend", "resize",
        "snapshot", "rebase", "bitmap", "commit", "recover",
    ] {
        assert!(help.contains(&format!("\n  {command}")), "{command}");
        let own = text(&format!("{command} --help"));
        assert!(own.contains("Example:\n  qemu-img "), "{command}");
        assert_eq!(own, text(&format!("{command} -h")));
    }
    bench.same_refusal(&["", "foo", "--bogus", "-T"]);
}

#[test]
fn reserved_room_is_there_reads_as_zeros_and_is_known_beforehand() {
    let bench = image();
    // What was in use before is free now, and full of something.
    bench.sh("qemu-io -c 'write -P 9 2M 2M' a.qcow2; qemu-img snapshot -a s1 a.qcow2; qemu-img snapshot -d s2 a.qcow2; qemu-img convert -O raw a.qcow2 a.raw; truncate -s 24M a.raw; cp a.qcow2 first.qcow2");
    for (mode, least, most) in [("metadata", 0, 8), ("falloc", 16, 32), ("full", 16, 32)] {
        bench.sh("cp first.qcow2 a.qcow2");
        let line = format!("--json --preallocation={mode} a.qcow2 24M");
        let planned = bench.ours(&format!("resize --dry-run {line}"));
        bench.sh("cmp first.qcow2 a.qcow2");
        let done = bench.ours(&format!("resize {line}"));
        assert!(done.status.success(), "{mode}: {done:?}");
        let [planned, done] = [planned, done].map(|output| {
            serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON")
        });
        assert_eq!(planned["room"], done["room"], "{mode}");
        bench.sh("qemu-img check -q a.qcow2; qemu-img compare -q -F raw a.qcow2 a.raw");
        let map = bench.sh("qemu-img map --output=json a.qcow2");
        assert!(map.contains("offset"), "{mode}: {map}");
        use std::os::unix::fs::MetadataExt;
        let found = std::fs::metadata(bench.path("a.qcow2")).expect("the image");
        let taken = (found.blocks() * 512) >> 20;
        assert!((least..most).contains(&taken), "{mode}: {taken} MiB");
        let allocated = bench.ours("check a.qcow2");
        let text = String::from_utf8_lossy(&allocated.stdout).into_owned();
        assert!(text.contains("/384"), "{mode}: {text}");
    }
}
