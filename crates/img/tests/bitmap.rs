//! `bitmap`: the same result as qemu-img, with the same words, and all of it or nothing.

mod both;

use both::Bench;
use stead_qcow2::{Bitmap, Layer};

/// Two images of one length with bitmaps that have marked something, one of another length, one of version 2.
fn images() -> Bench {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 8M; qemu-img bitmap --add a.qcow2 b0; qemu-img bitmap --add -g 4k a.qcow2 b1");
    bench.sh("qemu-io -c 'write -P 1 1M 100k' a.qcow2; qemu-img bitmap --disable a.qcow2 b0; qemu-io -c 'write -P 2 3M 5k' a.qcow2");
    bench.sh("qemu-img create -q -f qcow2 s.qcow2 8M; qemu-img bitmap --add -g 32k s.qcow2 b0; qemu-io -c 'write -P 3 7M 1M' s.qcow2");
    bench.sh("qemu-img create -q -f qcow2 short.qcow2 1M; qemu-img bitmap --add short.qcow2 b0");
    bench.sh("qemu-img create -q -f qcow2 -o compat=0.10 v2.qcow2 1M; qemu-img create -q -f raw r.raw 1M");
    bench
}

/// The bitmaps of an image, each with its bits.
fn bitmaps(bench: &Bench, name: &str) -> Vec<Bitmap> {
    let layer = Layer::open(&bench.path(name)).expect("whole");
    let mut stored = layer.stored_bitmaps().expect("whole");
    stored.sort_by(|a, b| a.name.cmp(&b.name));
    let bits = stored.iter().map(|one| layer.read_bitmap(one));
    bits.collect::<Result<_, _>>().expect("readable")
}

#[test]
fn bitmaps_are_added_removed_changed_and_merged_alike() {
    let bench = images();
    for line in [
        "--add a.qcow2 n",
        "--add -g 64k a.qcow2 n",
        "--add --granularity=512 a.qcow2 n",
        "--add -g 2G a.qcow2 n",
        "--add -g 0 -f qcow2 a.qcow2 n",
        "--add --disable a.qcow2 n",
        "--add --image-opts driver=qcow2,file.filename=a.qcow2 n",
        "--add a.qcow2 $(printf 'x%.0s' $(seq 1023))",
        "--remove a.qcow2 b0",
        "--remove --add a.qcow2 b0",
        "--clear a.qcow2 b1",
        "--enable a.qcow2 b0",
        "--enable a.qcow2 b1",
        "--disable a.qcow2 b1",
        "--clear --enable --disable a.qcow2 b0",
        "--merge b0 a.qcow2 b1",
        "--merge b1 a.qcow2 b0",
        "--merge b0 a.qcow2 b0",
        "--add --merge b0 --merge b1 a.qcow2 n",
        "--merge b0 -b s.qcow2 a.qcow2 b1",
        "--merge b0 -b s.qcow2 -F qcow2 a.qcow2 b0",
        "--clear --merge b0 -b s.qcow2 a.qcow2 b0",
    ] {
        let line = format!("bitmap {line}");
        bench.same_image(&line, "a.qcow2");
        bench.sh("cp a.qcow2 kept.qcow2");
        assert!(bench.theirs(&line).status.success(), "{line}");
        bench.sh("mv a.qcow2 theirs.qcow2; cp kept.qcow2 a.qcow2");
        assert!(bench.ours(&line).status.success(), "{line}");
        let [theirs, ours] = ["theirs.qcow2", "a.qcow2"].map(|name| bitmaps(&bench, name));
        assert_eq!(theirs, ours, "qemu-img (left) and ours: {line}");
        bench.sh("cp kept.qcow2 a.qcow2");
    }
}

#[test]
fn what_cannot_be_is_refused_in_the_same_words() {
    let bench = images();
    bench.sh("qemu-img create -q -f qcow2 used.qcow2 1M; qemu-img bitmap --add used.qcow2 b0; qemu-img bitmap --add used.qcow2 b1");
    bench.sh("qemu-io -c 'write 0 64k' -c 'sigraise 9' used.qcow2 >/dev/null 2>&1 || true; qemu-img bitmap --add used.qcow2 n");
    bench.same_refusal(&[
        "bitmap",
        "bitmap a.qcow2 b0",
        "bitmap -q",
        "bitmap -g x",
        "bitmap --clear a.qcow2",
        "bitmap --clear a.qcow2 b0 b1",
        "bitmap -g 64k --clear a.qcow2 b0",
        "bitmap -b s.qcow2 --clear a.qcow2",
        "bitmap -F qcow2 --merge b1 a.qcow2 b0",
        "bitmap --add a.qcow2 b0",
        "bitmap --add a.qcow2 ''",
        "bitmap --add -g 12 a.qcow2 n",
        "bitmap --add -g 256 a.qcow2 b0",
        "bitmap --add -g 1000 a.qcow2 n",
        "bitmap --add -g 4G a.qcow2 n",
        "bitmap --add -g foo a.qcow2 n",
        "bitmap --add -g -1 a.qcow2 n",
        "bitmap --add -g 9E a.qcow2 n",
        "bitmap --remove a.qcow2 nope",
        "bitmap --clear a.qcow2 nope",
        "bitmap --enable a.qcow2 nope",
        "bitmap --disable a.qcow2 nope",
        "bitmap --merge nope a.qcow2 b0",
        "bitmap --merge b0 a.qcow2 nope",
        "bitmap --merge nope a.qcow2 nope2",
        "bitmap --merge nope -b s.qcow2 a.qcow2 b0",
        "bitmap --merge b0 -b short.qcow2 a.qcow2 b0",
        "bitmap --merge b0 -b s.qcow2 -F raw a.qcow2 b0",
        "bitmap --merge b0 -b s.qcow2 -F bogus a.qcow2 b0",
        "bitmap --merge b0 -b none a.qcow2 b0",
        "bitmap --merge b0 -b a.qcow2 a.qcow2 b0",
        "bitmap --clear -f raw r.raw b0",
        "bitmap --add none b0",
        "bitmap --add -f bogus a.qcow2 n",
        "bitmap --add -f qcow2 --image-opts driver=qcow2,file.filename=a.qcow2 n",
        "bitmap --clear used.qcow2 b0",
        "bitmap --enable used.qcow2 b0",
        "bitmap --merge n used.qcow2 b0",
        "bitmap --merge b0 used.qcow2 n",
    ]);
    // Their words have names of nodes, which are numbers.
    bench.same_status(&[
        "bitmap --add v2.qcow2 n",
        "bitmap --add -f raw r.raw n",
        "bitmap --add a.qcow2 $(printf 'x%.0s' $(seq 1024))",
    ]);
    bench.same_image("bitmap --remove used.qcow2 b0", "used.qcow2");
}

#[test]
fn several_steps_are_done_together_or_not_at_all() {
    let bench = images();
    bench.sh("cp a.qcow2 before.qcow2; cp a.qcow2 theirs.qcow2");
    let output = bench.ours("bitmap --add --merge b0 --merge nope a.qcow2 n");
    assert_eq!(output.status.code(), Some(1));
    bench.sh("cmp a.qcow2 before.qcow2");
    // qemu-img leaves what it did before.
    let output = bench.theirs("bitmap --add --merge b0 --merge nope theirs.qcow2 n");
    assert_eq!(output.status.code(), Some(1));
    bench.sh("qemu-img info theirs.qcow2 | grep -q 'name: n$'");
}

#[test]
fn a_dry_run_changes_nothing_and_the_report_says_what_was_needed() {
    let bench = images();
    bench.sh("cp a.qcow2 before.qcow2");
    let text = bench.ours("bitmap --dry-run --add a.qcow2 n");
    assert!(String::from_utf8_lossy(&text.stdout).contains("free bytes"));
    let planned = bench.ours("bitmap --dry-run --json --add --merge b0 a.qcow2 n");
    bench.sh("cmp a.qcow2 before.qcow2");
    let done = bench.ours("bitmap --json --add --merge b0 a.qcow2 n");
    let [planned, done] = [planned, done]
        .map(|output| serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON"));
    assert_eq!(
        (&planned["outcome"], &done["outcome"]),
        (&"not-begun".into(), &"done".into())
    );
    assert_eq!(planned["room"], done["room"]);
}
