//! `commit`: the same result as qemu-img, with the same words.

mod both;

use both::Bench;

/// `top` over `mid` over the raw disk `base`; `long` and `tiny` over `other`, which is between them in length.
fn chain() -> Bench {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f raw base.raw 4M; qemu-io -f raw -c 'write -P 5 0 2M' base.raw");
    bench.sh("qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2; qemu-io -c 'write -P 6 1M 64k' mid.qcow2");
    bench.sh("qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2; qemu-io -c 'write -P 7 2M 100k' -c 'write -z 1M 64k' -c 'write -P 8 64k 4k' top.qcow2");
    bench
        .sh("qemu-img create -q -f qcow2 other.qcow2 3M; qemu-io -c 'write -P 9 0 3M' other.qcow2");
    bench.sh("qemu-img create -q -f qcow2 -b other.qcow2 -F qcow2 long.qcow2 8M; qemu-io -c 'write -P 1 7M 64k' long.qcow2");
    bench.sh("qemu-img create -q -f qcow2 -b other.qcow2 -F qcow2 tiny.qcow2 2M; qemu-io -c 'write -P 2 1M 64k' tiny.qcow2");
    bench
}

/// Every image of a chain reads alike after `line` by both, and is whole.
fn same_chain(line: &str) {
    let benches = [chain(), chain()];
    let [theirs, ours] = [benches[0].theirs(line), benches[1].ours(line)];
    assert_eq!(theirs.status.code(), Some(0), "{line}: {theirs:?}");
    assert_eq!(ours.status.code(), Some(0), "{line}: {ours:?}");
    assert_eq!(theirs.stdout, ours.stdout, "{line}");
    for name in ["top", "mid", "other", "long", "tiny"] {
        let seen = benches.each_ref().map(|bench| {
            bench.sh(&format!("qemu-img check -q {name}.qcow2; qemu-img map -f qcow2 {name}.qcow2 >/dev/null; qemu-img convert -f qcow2 -O raw {name}.qcow2 {name}.seen"));
            bench.sh(&format!("sha256sum {name}.seen; qemu-img info {name}.qcow2 | grep -v 'disk size'"))
        });
        assert_eq!(
            seen[0], seen[1],
            "qemu-img (left) and ours: {name} after {line}"
        );
    }
    let raw = benches
        .each_ref()
        .map(|bench| bench.sh("sha256sum base.raw"));
    assert_eq!(
        raw[0], raw[1],
        "qemu-img (left) and ours: base.raw after {line}"
    );
}

/// How many bytes an image has itself.
fn own_bytes(bench: &Bench, name: &str) -> u64 {
    let json = bench.sh(&format!("qemu-img map --output=json -f qcow2 {name}"));
    let map: Vec<serde_json::Value> = serde_json::from_str(&json).expect("JSON");
    let own = map.iter().filter(|one| one["depth"] == 0);
    own.map(|one| one["length"].as_u64().expect("a length"))
        .sum()
}

#[test]
fn chains_show_the_same_after_commits_by_both() {
    for line in [
        "top.qcow2",
        "mid.qcow2",
        "-d top.qcow2",
        "-q top.qcow2",
        "-b mid.qcow2 top.qcow2",
        "-b base.raw top.qcow2",
        "-b ./base.raw top.qcow2",
        "-b \"$PWD/base.raw\" -f qcow2 top.qcow2",
        "-d -b base.raw top.qcow2",
        "-r 1M -t writeback top.qcow2",
        "--image-opts driver=qcow2,file.filename=top.qcow2",
        "long.qcow2",
        "tiny.qcow2",
    ] {
        same_chain(&format!("commit {line}"));
    }
}

#[test]
fn the_top_is_emptied_unless_a_base_is_named_or_it_is_to_stay() {
    for (options, left) in [("", false), ("-d", true), ("-b mid.qcow2", true)] {
        let bench = chain();
        assert!(
            bench
                .ours(&format!("commit {options} top.qcow2"))
                .status
                .success()
        );
        assert_eq!(own_bytes(&bench, "top.qcow2") > 0, left, "{options}");
    }
}

#[test]
fn what_cannot_be_is_refused_in_the_same_words() {
    let bench = chain();
    bench.same_refusal(&[
        "commit",
        "commit top.qcow2 more",
        "commit -U top.qcow2",
        "commit -r foo top.qcow2",
        "commit -r -1 top.qcow2",
        "commit -t foo top.qcow2",
        "commit -f bogus top.qcow2",
        "commit -f qcow2 --image-opts driver=qcow2,file.filename=top.qcow2",
        "commit -b nope top.qcow2",
        "commit -b '' top.qcow2",
        "commit -b top.qcow2 top.qcow2",
        "commit other.qcow2",
        "commit base.raw",
        "commit -f raw base.raw",
        "commit nope",
    ]);
    bench.sh("mv mid.qcow2 away");
    bench.same_refusal(&["commit top.qcow2"]);
}

/// qemu-img goes on, and the internal snapshot shows other bytes from then on.
#[test]
fn an_internal_snapshot_that_would_show_other_bytes_is_not_overridden() {
    let bench = chain();
    bench.sh("qemu-img create -q -f qcow2 -b other.qcow2 -F qcow2 snap.qcow2; qemu-img snapshot -c kept snap.qcow2; qemu-io -c 'write -P 4 0 64k' snap.qcow2; cp other.qcow2 before.qcow2");
    let output = bench.ours("commit snap.qcow2");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("kept"));
    bench.sh("cmp other.qcow2 before.qcow2");
}

#[test]
fn a_bitmap_of_the_base_names_what_the_commit_changed() {
    let bench = chain();
    bench.sh("qemu-img bitmap --add mid.qcow2 b0");
    let output = bench.ours("commit --json top.qcow2");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["outcome"], "done");
    assert_eq!(report["bitmaps"][0]["name"], "b0");
    assert_eq!(report["bitmaps"][0]["fate"], "marked");
    bench.sh("qemu-img check -q mid.qcow2; qemu-img check -q top.qcow2");
}

#[test]
fn a_dry_run_changes_nothing_and_the_report_says_what_was_needed() {
    let bench = chain();
    bench.sh("for n in base.raw mid.qcow2 top.qcow2; do cp $n $n.before; done");
    for name in ["top.qcow2", "mid.qcow2"] {
        let text = bench.ours(&format!("commit --dry-run {name}"));
        assert!(
            String::from_utf8_lossy(&text.stdout).contains("free bytes"),
            "{name}"
        );
    }
    let planned = bench.ours("commit --dry-run --json top.qcow2");
    bench.sh("for n in base.raw mid.qcow2 top.qcow2; do cmp $n $n.before; done");
    let done = bench.ours("commit --json top.qcow2");
    let [planned, done] = [planned, done]
        .map(|output| serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON"));
    assert_eq!(
        (&planned["outcome"], &done["outcome"]),
        (&"not-begun".into(), &"done".into())
    );
    assert_eq!(planned["room"], done["room"]);
    assert_eq!(planned["image-room"], done["image-room"]);
}

/// A program that has an image open for writing, so that nobody else reads it; ended when dropped.
struct Writer(std::process::Child);

impl Writer {
    fn of(bench: &Bench, name: &str, format: &str) -> Self {
        let child = std::process::Command::new("qemu-io")
            .args(["-f", format])
            .arg(bench.path(name))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn();
        let mut child = child.expect("qemu-io");
        // It asks for a command when the image is open.
        let stdout = child.stdout.as_mut().expect("piped");
        std::io::Read::read_exact(stdout, &mut [0]).expect("a prompt");
        Self(child)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.0.kill().expect("killed");
        self.0.wait().expect("ended");
    }
}

#[test]
fn a_file_below_that_somebody_writes_to_is_not_read_and_its_user_is_named() {
    for (held, format) in [("other.qcow2", "qcow2"), ("data.raw", "raw")] {
        let bench = chain();
        bench.sh(
            "qemu-img create -q -f qcow2 -o data_file=data.raw -b base.raw -F raw data.qcow2 4M",
        );
        let _writer = Writer::of(&bench, held, format);
        let below = format == "qcow2";
        let image = if below { "tiny.qcow2" } else { "data.qcow2" };
        for line in [
            "commit IMAGE",
            "commit -d IMAGE",
            "rebase -b '' IMAGE",
            "convert -O raw IMAGE out",
            "compare IMAGE top.qcow2",
            "map IMAGE",
            "measure -O qcow2 IMAGE",
            "dd if=IMAGE of=out bs=1M count=1",
        ] {
            let line = line.replace("IMAGE", image);
            let [ours, theirs] = [bench.ours(&line), bench.theirs(&line)];
            // Of raw files, QEMU's tools let others go on writing.
            assert!(!below || !theirs.status.success(), "{line}: {theirs:?}");
            let text = String::from_utf8_lossy(&ours.stderr).into_owned();
            assert!(!ours.status.success(), "{line}: {text}");
            assert!(text.contains("qemu-io"), "{line}: {text}");
            assert!(text.contains(held), "{line}: {text}");
        }
        for line in [
            "map -U IMAGE",
            "convert -U -O raw IMAGE out",
            "measure -U -O qcow2 IMAGE",
        ] {
            let shared = bench.ours(&line.replace("IMAGE", image));
            assert!(shared.status.success(), "{line}: {shared:?}");
        }
        if below {
            let shared = bench.ours("rebase -U -b '' tiny.qcow2");
            assert!(shared.status.success(), "{shared:?}");
        }
    }
}

#[test]
fn a_commit_shows_how_far_it_is_and_ends_when_asked_with_everything_as_it_was() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 base.qcow2 4G; qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2");
    bench.sh("qemu-io -c 'write -P 3 0 192M' top.qcow2; sha256sum base.qcow2 top.qcow2 > before");
    let child = std::process::Command::new(bench.path("../bin/qemu-img"))
        .args(["commit", "-p", "top.qcow2"])
        .current_dir(bench.path("."))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn();
    let mut child = child.expect("ours");
    // It has begun to move data when more than the start is shown.
    let mut stdout = child.stdout.take().expect("piped");
    let (mut said, mut byte) = (Vec::new(), [0]);
    while said.iter().filter(|byte| **byte == b'%').count() < 2 {
        let read = std::io::Read::read(&mut stdout, &mut byte).expect("read");
        assert_eq!(read, 1, "it ended: {}", String::from_utf8_lossy(&said));
        said.push(byte[0]);
    }
    bench.sh(&format!("kill -INT {}", child.id()));
    std::io::Read::read_to_end(&mut stdout, &mut said).expect("read");
    let ended = child.wait_with_output().expect("ended");
    let text = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(130), "{text}");
    assert!(text.contains("cancelled"), "{text}");
    bench.sh("sha256sum -c before");
    let shown = bench.ours("commit -p top.qcow2");
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.status.success(), "{shown:?}");
    assert!(
        text.matches('%').count() > 4 && text.contains("(100.00/100%)"),
        "{text}"
    );
}
