//! `check` says what qemu-img says, in its words and with its exit status.

mod both;

use both::{Bench, put};

#[test]
fn a_whole_image_is_whole_for_both() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 64M");
    bench.sh("qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 5M 200k' a.qcow2");
    bench.sh("qemu-img convert -c -O qcow2 a.qcow2 c.qcow2");
    bench.sh("qemu-img create -q -f raw r.raw 1M");
    bench.same(&[
        "check a.qcow2",
        "check c.qcow2",
        "check --output=json a.qcow2",
        "check --output json c.qcow2",
        "check -q a.qcow2",
        "check -f qcow2 -U a.qcow2",
        "check -qf qcow2 -T none a.qcow2",
        "check --image-opts driver=qcow2,file.filename=a.qcow2",
        "check file:a.qcow2",
        "check r.raw",
        "check -f raw a.qcow2",
        "check --output=xml a.qcow2",
        "check",
        "check a.qcow2 c.qcow2",
        "check -T bogus a.qcow2",
        "check --bogus",
        "check -f",
        "check -f vmdk1 a.qcow2",
        "check -f qcow2 r.raw",
        "check nope",
        "check .",
        "check foo:bar",
        "check -f qcow2 --image-opts driver=qcow2,file.filename=a.qcow2",
        "check ''",
    ]);
}

#[test]
fn damage_is_counted_and_told_by_the_exit_status() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 64M");
    bench.sh("qemu-io -c 'write -P 1 0 1M' a.qcow2");
    // In a fresh image: refcount table, block, L1, L2 and data one cluster after the other.
    let l2 = 0x40000;
    let refcounts = 0x20000;
    for (name, changes) in [
        ("leak", vec![(l2, [0; 8])]),
        ("dirty", vec![(72, 1_u64.to_be_bytes())]),
        ("corrupt", vec![(72, 2_u64.to_be_bytes())]),
    ] {
        bench.sh(&format!("cp a.qcow2 {name}.qcow2"));
        for (at, bytes) in changes {
            put(&bench.path(&format!("{name}.qcow2")), at, &bytes);
        }
        bench.same(&[
            &format!("check --output=json {name}.qcow2"),
            &format!("check {name}.qcow2"),
        ]);
    }
    bench.sh("cp a.qcow2 low.qcow2");
    put(&bench.path("low.qcow2"), refcounts + 14, &[0, 0]);
    bench.same_status(&["check low.qcow2", "check -q low.qcow2"]);
    bench.sh("cp a.qcow2 copied.qcow2");
    put(&bench.path("copied.qcow2"), l2, &0x50000_u64.to_be_bytes());
    bench.same_status(&["check copied.qcow2"]);
    bench.sh("cp a.qcow2 cut.qcow2; truncate -s 393216 cut.qcow2");
    bench.same_status(&["check cut.qcow2"]);
}

#[test]
fn an_image_that_cannot_be_opened_is_refused_in_the_same_words() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 64M");
    for (name, at, bytes) in [
        ("feature", 72, &[0, 0, 0, 0, 0, 0, 0, 0x20][..]),
        ("highest", 72, &[0x80, 0, 0, 0, 0, 0, 0, 0]),
        ("version", 4, &[0, 0, 0, 4]),
        ("cluster", 20, &[0, 0, 0, 8]),
        ("magic", 0, &[0, 0, 0, 0]),
    ] {
        bench.sh(&format!("cp a.qcow2 {name}.qcow2"));
        put(&bench.path(&format!("{name}.qcow2")), at, bytes);
        bench.same(&[&format!("check -f qcow2 {name}.qcow2")]);
    }
    bench.sh("head -c 60 a.qcow2 > short.qcow2; : > empty.qcow2");
    bench.same(&[
        "check short.qcow2",
        "check empty.qcow2",
        "check -f qcow2 empty.qcow2",
    ]);
}

#[test]
fn a_base_that_was_changed_is_found_by_check_backing() {
    let bench = Bench::new();
    bench.sh(
        "qemu-img create -q -f raw base 8M; qemu-io -f raw -c 'write -P 7 0 1M' base; cp base same",
    );
    let run = |line: &str| {
        let output = bench.ours(line);
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.code(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    };
    let good = |line: &str| {
        let (status, text) = run(line);
        assert_eq!(status, Some(0), "{line}: {text}");
        text
    };
    good("create -q -f qcow2 -b base -F raw --record-backing top.qcow2");
    good("create -q -f qcow2 -b base -F raw plain.qcow2");
    let text = good("check --backing --progress top.qcow2");
    assert!(text.contains("(100.00/100%)"), "{text}");
    let text = good("check --backing plain.qcow2");
    assert!(text.contains("nothing was compared"), "{text}");
    // An image that is there gets a record, and nothing else of it changes.
    good("rebase -b base -F raw --record-backing plain.qcow2");
    let text = good("check --backing --output=json plain.qcow2");
    assert!(text.contains("\"backing-compared\": 1"), "{text}");
    put(&bench.path("base"), 5000, &[1]);
    for image in ["top.qcow2", "plain.qcow2"] {
        let (status, text) = run(&format!("check --backing {image}"));
        assert_eq!(status, Some(2), "{text}");
        assert!(
            text.contains("shows other bytes than when its content was recorded"),
            "{text}"
        );
        // Without the option no other file is opened.
        good(&format!("check {image}"));
    }
    // What it was in time: another file with the same bytes.
    good("rebase -u -b same -F raw top.qcow2");
    good("check --backing top.qcow2");
    for line in [
        "create -q -f qcow2 --record-backing x.qcow2 1M",
        "create -q -f raw --record-backing x.raw 1M",
        "rebase --record-backing -b '' top.qcow2",
        "rebase --record-backing -u -b same -F raw top.qcow2",
    ] {
        assert_eq!(run(line).0, Some(1), "{line}");
    }
    assert!(!bench.path("x.qcow2").exists() && !bench.path("x.raw").exists());
}
