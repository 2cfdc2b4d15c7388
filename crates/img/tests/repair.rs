//! `check -r` makes right what qemu-img makes right, says so in its words, and leaves what would take a guess.

mod both;

use both::{Bench, put};

/// In a fresh image: refcount table, block, L1, L2 and data one cluster after the other.
const L2: u64 = 0x40000;
const REFCOUNTS: u64 = 0x20000;

fn damaged() -> Bench {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 64M; qemu-io -c 'write -P 1 0 1M' a.qcow2");
    for (name, changes) in [
        ("leak", vec![(L2, &[0; 8][..])]),
        ("low", vec![(REFCOUNTS + 14, &[0, 0])]),
        ("both", vec![(REFCOUNTS + 14, &[0, 0]), (L2, &[0; 8])]),
        ("dirty", vec![(72, &[0, 0, 0, 0, 0, 0, 0, 1])]),
        ("corrupt", vec![(72, &[0, 0, 0, 0, 0, 0, 0, 2])]),
    ] {
        bench.sh(&format!("cp a.qcow2 {name}.qcow2"));
        for (at, bytes) in changes {
            put(&bench.path(&format!("{name}.qcow2")), at, bytes);
        }
    }
    bench
}

/// What stands on standard output, without where the file ends (we write refcounts beside the old ones) and how many
/// corruptions there were (a refcount that is too low and the flag that says so are two for us).
fn repaired(bench: &Bench, program: &str, name: &str, options: &str) -> (Option<i32>, String) {
    bench.sh(&format!("cp {name}.qcow2 t.qcow2"));
    let line = format!("check {options} t.qcow2");
    let output = match program {
        "ours" => bench.ours(&line),
        _ => bench.theirs(&line),
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let left_out = |line: &&str| {
        line.starts_with("Image end offset")
            || line.ends_with("1 corruptions")
            || line.ends_with("2 corruptions")
    };
    let text: Vec<&str> = text.lines().filter(|line| !left_out(line)).collect();
    (output.status.code(), text.join("\n"))
}

#[test]
fn what_can_be_repaired_is_repaired_and_told_in_the_same_words() {
    let bench = damaged();
    for (name, options) in [
        ("a", "-r all"),
        ("leak", "-r leaks"),
        ("leak", "--repair=all"),
        ("leak", "-q -r all"),
        ("low", "-r all"),
        ("both", "-r all"),
        ("dirty", "-r all"),
        ("corrupt", "-r all"),
    ] {
        let theirs = repaired(&bench, "theirs", name, options);
        let ours = repaired(&bench, "ours", name, options);
        assert_eq!(theirs, ours, "{name} {options}");
        // The image that ours left.
        bench.sh("qemu-img check -q t.qcow2; ! qemu-img info t.qcow2 | grep -q 'corrupt: true'");
        let known = if ["leak", "both"].contains(&name) {
            "64k"
        } else {
            "0"
        };
        bench.sh(&format!("qemu-io -c 'read -P 1 {known} 512k' t.qcow2"));
    }
    let json = repaired(&bench, "ours", "both", "-r all --output=json").1;
    let json: serde_json::Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(
        (&json["leaks-fixed"], &json["corruptions-fixed"]),
        (&1.into(), &2.into())
    );
    assert_eq!(json["stead"]["repair"]["outcome"], "done");
    bench.same_refusal(&[
        "check -r foo a.qcow2",
        "check -U -r all a.qcow2",
        "check -f raw -r all a.qcow2",
        "check -r",
    ]);
}

#[test]
fn what_would_take_a_guess_is_told_and_the_image_is_as_it_was() {
    let bench = damaged();
    bench.sh("cp a.qcow2 cut.qcow2; truncate -s 393216 cut.qcow2; cp cut.qcow2 before.qcow2");
    for options in ["-r all", "-r leaks", "-r all --output=json"] {
        let output = bench.ours(&format!("check {options} cut.qcow2"));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("Nothing was repaired"), "{text}");
        bench.sh("cmp cut.qcow2 before.qcow2");
    }
    bench.same_status(&["check -r all cut.qcow2"]);
    // Leaks alone: qemu-img refuses where anything else is wrong; ours gives back what is lost.
    let output = repaired(&bench, "ours", "both", "-r leaks");
    assert_eq!(output.0, Some(2));
    assert!(output.1.contains("1 leaked clusters\n    0 corruptions"));
}

#[test]
fn a_dry_run_of_a_repair_writes_nothing_and_says_what_it_takes() {
    let bench = damaged();
    bench.sh("cp both.qcow2 before.qcow2");
    let output = bench.ours("check --dry-run -r all both.qcow2");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && text.contains("free bytes"),
        "{output:?}"
    );
    let json = bench.ours("check --dry-run -r all --output=json a.qcow2");
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(json["outcome"], "nothing-to-do");
    bench.sh("cmp both.qcow2 before.qcow2");
    assert!(!bench.ours("check --dry-run a.qcow2").status.success());
}

#[test]
fn a_bitmap_that_cannot_be_used_is_dropped_and_named() {
    let bench = damaged();
    bench.sh("qemu-img bitmap --add a.qcow2 good; qemu-img bitmap --add a.qcow2 bad");
    // The first entry of the directory: a table that lies nowhere.
    let bytes = std::fs::read(bench.path("a.qcow2")).expect("the image");
    let name = bytes.windows(3).position(|three| three == b"bad");
    let entry = name.expect("its name") - 24;
    put(
        &bench.path("a.qcow2"),
        u64::try_from(entry).expect("small"),
        &(1_u64 << 40).to_be_bytes(),
    );
    let output = bench.ours("check -r all a.qcow2");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.contains("'bad' was dropped"), "{text}");
    let info = bench.sh("qemu-img info a.qcow2; qemu-img check -q a.qcow2");
    assert!(
        info.contains("name: good") && !info.contains("name: bad"),
        "{info}"
    );
}

#[test]
fn a_hollowed_snapshot_comes_back_only_when_the_user_states_that_the_disk_was_the_same() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f raw b.raw 4M; qemu-io -f raw -c 'write -P 0xaa 0 4M' b.raw");
    bench.sh("qemu-img create -q -f qcow2 -b b.raw -F raw o.qcow2; qemu-img snapshot -c cp o.qcow2; qemu-img rebase -b '' o.qcow2; cp o.qcow2 before.qcow2");
    let refused = bench.ours("check --restore-snapshot cp o.qcow2");
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && text.contains("--active-was-same"),
        "{text}"
    );
    let planned = bench.ours("check --dry-run --restore-snapshot cp --active-was-same o.qcow2");
    assert!(planned.status.success(), "{planned:?}");
    let unknown = bench.ours("check --restore-snapshot nope --active-was-same o.qcow2");
    assert!(!unknown.status.success(), "{unknown:?}");
    bench.sh("cmp o.qcow2 before.qcow2");
    let done = bench.ours("check -r all --restore-snapshot cp --active-was-same o.qcow2");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(
        done.status.success() && text.contains("got 4194304 bytes back"),
        "{done:?}"
    );
    bench.sh(
        "qemu-img check -q o.qcow2; qemu-img convert -l cp -O raw o.qcow2 s.raw; cmp s.raw b.raw",
    );
}
