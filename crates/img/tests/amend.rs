//! `amend` changes what qemu-img changes, in one step, and refuses what it refuses.

mod both;

use both::{Bench, put};

fn images() -> Bench {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 8M; qemu-io -c 'write -P 1 0 1M' -c 'write -z 2M 1M' a.qcow2");
    bench.sh("qemu-img snapshot -c s a.qcow2; qemu-io -c 'write -P 2 512k 1M' a.qcow2");
    bench.sh("qemu-img create -q -f raw r.raw 4M; qemu-io -f raw -c 'write -P 5 0 4M' r.raw");
    bench.sh("qemu-img create -q -f qcow2 -b r.raw -F raw o.qcow2 3M; qemu-io -c 'write -z 1M 1M' o.qcow2");
    bench.sh("qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 1M");
    bench.sh(
        "qemu-img create -q -f qcow2 -o data_file=d.data,data_file_raw=on x.qcow2 1M 2>/dev/null",
    );
    bench
}

#[test]
fn an_image_is_amended_as_qemu_img_amends_it() {
    let bench = images();
    for line in [
        "-o compat=0.10 a.qcow2",
        "-o compat=1.1 a.qcow2",
        "-o lazy_refcounts=on a.qcow2",
        "-o lazy_refcounts=on,refcount_bits=64 a.qcow2",
        "-o refcount_bits=2 -o size=9M a.qcow2",
        "-q -o refcount_bits=8,refcount_bits=32 a.qcow2",
        "-o size=4M a.qcow2",
        "-f qcow2 -t none -o data_file_raw=off a.qcow2",
        "--force -o compat=v3 a.qcow2",
        "--image-opts -o compat=v2 driver=qcow2,file.filename=a.qcow2",
    ] {
        bench.same_image(&format!("amend {line}"), "a.qcow2");
    }
    bench.same_image("amend -o compat=0.10 o.qcow2", "o.qcow2");
    bench.same_image("amend -o size=5M o.qcow2", "o.qcow2");
    for line in [
        "-o compat=1.1,lazy_refcounts=on,refcount_bits=4",
        "-o size=2M",
        "-o compat=0.10",
        "-o refcount_bits=16",
    ] {
        bench.same_image(&format!("amend {line} old.qcow2"), "old.qcow2");
    }
    bench.same_image("amend -o data_file_raw=on x.qcow2", "x.qcow2");
    bench.same_image("amend -o data_file_raw=off x.qcow2", "x.qcow2");
    bench.same_image("amend -o lazy_refcounts=on x.qcow2", "x.qcow2");
}

#[test]
fn what_cannot_be_amended_is_refused_in_the_same_words() {
    let bench = images();
    bench.sh("qemu-img create -q -f qcow2 -o extended_l2=on e.qcow2 1M");
    bench.sh("cp a.qcow2 s.qcow2; qemu-img amend -o size=16M s.qcow2");
    bench.sh("cp old.qcow2 n.qcow2; qemu-img amend -o compat=1.1,refcount_bits=4 n.qcow2");
    bench.same_refusal(&[
        "amend",
        "amend a.qcow2",
        "amend -o help",
        "amend -f raw -o help r.raw",
        "amend -o compat=1.1 a.qcow2 o.qcow2",
        "amend -o , a.qcow2",
        "amend -o compat=3 a.qcow2",
        "amend -o compat=0.10,lazy_refcounts=on a.qcow2",
        "amend -o refcount_bits=7 a.qcow2",
        "amend -o refcount_bits=x a.qcow2",
        "amend -o refcount_bits=8,compat=0.10 a.qcow2",
        "amend -o cluster_size=64k a.qcow2",
        "amend -o preallocation=full a.qcow2",
        "amend -o encryption=on a.qcow2",
        "amend -o bogus=1 a.qcow2",
        "amend -o nocow=on a.qcow2",
        "amend -o size=1000 a.qcow2",
        "amend -o size=abc a.qcow2",
        "amend -o lazy_refcounts=maybe a.qcow2",
        "amend -o data_file=foo a.qcow2",
        "amend -o data_file_raw=on a.qcow2",
        "amend -o backing_file=z a.qcow2",
        "amend -o backing_file=z,backing_fmt=raw o.qcow2",
        "amend -o backing_fmt=raw o.qcow2",
        "amend -f raw -o size=2M r.raw",
        "amend -o compat=1.1 nope",
        "amend -t bogus -o compat=1.1 a.qcow2",
        "amend -f bogus -o compat=1.1 a.qcow2",
        "amend -f qcow2 --image-opts -o compat=1.1 driver=qcow2,file.filename=a.qcow2",
        "amend -o lazy_refcounts=on old.qcow2",
        "amend -o refcount_bits=8 old.qcow2",
        "amend -o compat=0.10 n.qcow2",
        "amend -o compat=0.10 x.qcow2",
        "amend -o compat=0.10 e.qcow2",
        "amend -o compat=0.10 s.qcow2",
    ]);
}

#[test]
fn no_bitmap_is_lost_by_an_older_version_and_a_wrong_option_changes_nothing() {
    let bench = images();
    bench.sh("qemu-img bitmap --add old.qcow2 b 2>/dev/null || true; qemu-img bitmap --add a.qcow2 b; cp a.qcow2 before.qcow2");
    // qemu-img ends well, and the bitmap is gone.
    bench.sh(
        "cp a.qcow2 t.qcow2; qemu-img amend -o compat=0.10 t.qcow2; ! qemu-img info t.qcow2 | grep -q 'name: b'",
    );
    let ours = bench.ours("amend -o compat=0.10 a.qcow2");
    let text = String::from_utf8_lossy(&ours.stderr).into_owned();
    assert!(
        !ours.status.success() && text.contains("bitmaps"),
        "{ours:?}"
    );
    let ours = bench.ours("amend -o refcount_bits=8,data_file_raw=on a.qcow2");
    assert!(!ours.status.success());
    let dry = bench.ours("amend --dry-run -o refcount_bits=64,size=1G a.qcow2");
    assert!(dry.status.success(), "{dry:?}");
    bench.sh("cmp a.qcow2 before.qcow2");
}

#[test]
fn an_image_marked_dirty_is_found_whole_and_amended() {
    let bench = images();
    bench.sh("qemu-img amend -o lazy_refcounts=on a.qcow2");
    put(&bench.path("a.qcow2"), 72, &1_u64.to_be_bytes());
    bench.same_image("amend -o lazy_refcounts=off a.qcow2", "a.qcow2");
}

#[test]
fn a_report_says_what_was_done_and_help_lists_the_options() {
    let bench = images();
    let planned = bench.ours("amend --dry-run --json -o refcount_bits=64 a.qcow2");
    let done = bench.ours("amend -p --json -o refcount_bits=64 a.qcow2");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let json = &text[text.find('{').expect("JSON")..];
    let done: serde_json::Value = serde_json::from_str(json).expect("JSON");
    let planned: serde_json::Value = serde_json::from_slice(&planned.stdout).expect("JSON");
    assert_eq!(planned["outcome"], "not-begun");
    assert_eq!(done["outcome"], "done");
    assert_eq!(planned["room"], done["room"]);
    let theirs = bench.theirs("amend -f qcow2 -o help");
    let ours = bench.ours("amend -f qcow2 -o help");
    let names = |output: std::process::Output| {
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let names = text
            .lines()
            .skip(1)
            .filter_map(|line| line.split('=').next());
        let names = names.map(|name| name.trim().to_owned());
        names
            .filter(|name| !name.starts_with("encrypt."))
            .collect::<Vec<_>>()
    };
    assert_eq!(names(theirs), names(ours));
    bench.same_status(&["amend -o help a.qcow2"]);
}

#[test]
fn a_data_file_is_found_by_both_wherever_its_image_lies() {
    let bench = Bench::new();
    bench.sh("mkdir sub");
    let made = bench.ours("create -f qcow2 -o data_file=d.data sub/x.qcow2 1M");
    assert!(made.status.success(), "{made:?}");
    bench.sh(
        "qemu-io -c 'write -P 7 0 64k' sub/x.qcow2; cd sub; qemu-io -c 'read -P 7 0 64k' x.qcow2",
    );
    let read = bench.ours("map sub/x.qcow2");
    let text = String::from_utf8_lossy(&read.stdout).into_owned();
    assert!(read.status.success() && text.contains("d.data"), "{read:?}");
    // The name of a file beside the image stays short, as qemu-img writes it.
    let made = bench.ours("create -f qcow2 -o data_file=e.data y.qcow2 1M");
    assert!(made.status.success(), "{made:?}");
    assert!(
        bench
            .sh("qemu-img info y.qcow2")
            .contains("data file: e.data\n")
    );
    bench.sh("mv d.data moved.data");
    let amended = bench.ours("amend -o data_file=moved.data sub/x.qcow2");
    assert!(amended.status.success(), "{amended:?}");
    bench.sh("cd sub; qemu-io -c 'read -P 7 0 64k' x.qcow2 | grep -q 'read 65536'");
    let checked = bench.ours("convert -O raw sub/x.qcow2 x.raw");
    assert!(checked.status.success(), "{checked:?}");
    bench.sh("qemu-io -f raw -c 'read -P 7 0 64k' x.raw");
}
