//! `rebase`: the same result as qemu-img, with the same words, and nothing lost.

mod both;

use both::Bench;

/// `top` over `mid` over the raw disk `base`, and `other`, a copy of `mid` that shows something else in places.
fn chain() -> Bench {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f raw base.raw 4M; qemu-io -f raw -c 'write -P 5 0 2M' base.raw");
    bench.sh("qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2; qemu-io -c 'write -P 6 1M 64k' mid.qcow2");
    bench.sh("qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2; qemu-io -c 'write -P 7 2M 64k' top.qcow2");
    bench.sh("qemu-img create -q -f qcow2 -b base.raw -F raw other.qcow2; qemu-io -c 'write -P 9 512k 1M' other.qcow2");
    bench.sh("qemu-img create -q -f qcow2 short.qcow2 1M; qemu-io -c 'write -P 8 0 1M' short.qcow2; qemu-img create -q -f qcow2 alone.qcow2 4M");
    bench
}

#[test]
fn images_get_another_backing_file_or_none_alike() {
    let bench = chain();
    for line in [
        "-b base.raw -F raw top.qcow2",
        "-b other.qcow2 -F qcow2 top.qcow2",
        "-b short.qcow2 -F qcow2 top.qcow2",
        "-b mid.qcow2 -F qcow2 top.qcow2",
        "-b ./mid.qcow2 -F qcow2 -q -f qcow2 top.qcow2",
        "-b \"$PWD/mid.qcow2\" -F qcow2 top.qcow2",
        "-b '' top.qcow2",
        "-b '' -F raw -U -t none -T unsafe top.qcow2",
        "-q -p -b '' top.qcow2",
        "-b '' --image-opts driver=qcow2,file.filename=top.qcow2",
        "-u top.qcow2",
        "-u -b '' top.qcow2",
        "-u -b base.raw -F raw top.qcow2",
        "-u -b nope -F raw top.qcow2",
    ] {
        bench.same_image(&format!("rebase {line}"), "top.qcow2");
    }
    for line in [
        "-b '' alone.qcow2",
        "-b base.raw -F raw alone.qcow2",
        "-u -b base.raw -F raw alone.qcow2",
    ] {
        bench.same_image(&format!("rebase {line}"), "alone.qcow2");
    }
    bench.same_status(&["rebase -p -b base.raw -F raw top.qcow2"]);
}

#[test]
fn what_cannot_be_is_refused_in_the_same_words() {
    let bench = chain();
    bench.sh("cp top.qcow2 before.qcow2");
    bench.same_refusal(&[
        "rebase",
        "rebase top.qcow2",
        "rebase -t foo top.qcow2",
        "rebase -b '' top.qcow2 more",
        "rebase -b '' -t foo top.qcow2",
        "rebase -b '' -T foo top.qcow2",
        "rebase -b '' nope",
        "rebase -u -F bogus nope",
        "rebase -b nope -F raw top.qcow2",
        "rebase -b nope top.qcow2",
        "rebase -b nope -F bogus top.qcow2",
        "rebase -u -F bogus top.qcow2",
        "rebase -b top.qcow2 -F qcow2 top.qcow2",
        "rebase -b '' -f bogus top.qcow2",
        "rebase -b '' -f qcow2 --image-opts driver=qcow2,file.filename=top.qcow2",
        "rebase -u -b base.raw top.qcow2",
        "rebase -b '' -f raw base.raw",
        "rebase -u -f raw base.raw",
        "rebase -u -b x -F raw -f raw base.raw",
        "rebase -u -b $(printf 'x%.0s' $(seq 1024)) -F raw top.qcow2",
        "rebase --bogus",
    ]);
    bench.sh("cmp top.qcow2 before.qcow2");
    // qemu-img copies first, and refuses then.
    assert!(
        !bench
            .ours("rebase -b other.qcow2 top.qcow2")
            .status
            .success()
    );
    bench.sh("cmp top.qcow2 before.qcow2");
    bench.same_refusal(&["rebase -b other.qcow2 top.qcow2"]);
    bench.sh("mv mid.qcow2 away; cp before.qcow2 top.qcow2");
    bench.same_refusal(&["rebase -b '' top.qcow2"]);
    bench.same_image("rebase -u -b away -F qcow2 top.qcow2", "top.qcow2");
}

/// Where the oracle is wrong: it says that all is well, and the internal snapshot is zeros.
#[test]
fn qemu_img_loses_an_internal_snapshot_by_a_flatten_and_ours_keeps_it() {
    let bench = chain();
    bench.sh("qemu-img snapshot -c kept top.qcow2; qemu-io -c 'write -P 1 0 256k' top.qcow2");
    let view = |name: &str, to: &str| {
        bench.sh(&format!("qemu-img convert -f qcow2 -l snapshot.name=kept -O raw {name} {to}.kept; qemu-img convert -f qcow2 -O raw {name} {to}.now"));
    };
    view("top.qcow2", "before");
    bench.sh("cp top.qcow2 theirs.qcow2; cp top.qcow2 ours.qcow2");
    assert!(bench.theirs("rebase -b '' theirs.qcow2").status.success());
    assert!(bench.ours("rebase -b '' ours.qcow2").status.success());
    bench.sh("qemu-img check -q theirs.qcow2; qemu-img check -q ours.qcow2");
    view("theirs.qcow2", "theirs");
    view("ours.qcow2", "ours");
    bench.sh("cmp before.now theirs.now; cmp before.now ours.now; cmp before.kept ours.kept");
    bench.sh("! cmp -s before.kept theirs.kept");

    assert!(
        bench
            .ours("rebase -b other.qcow2 -F qcow2 top.qcow2")
            .status
            .success()
    );
    view("top.qcow2", "rebased");
    bench.sh(
        "cmp before.now rebased.now; cmp before.kept rebased.kept; qemu-img check -q top.qcow2",
    );
}

#[test]
fn a_dry_run_changes_nothing_and_the_report_says_what_was_needed() {
    let bench = chain();
    bench.sh("cp top.qcow2 before.qcow2");
    for line in [
        "-b '' top.qcow2",
        "-u -b x -F raw top.qcow2",
        "-b other.qcow2 -F qcow2 top.qcow2",
    ] {
        let output = bench.ours(&format!("rebase --dry-run {line}"));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains("free bytes"),
            "{line}: {output:?}"
        );
    }
    bench.sh("cmp top.qcow2 before.qcow2");
    let planned = bench.ours("rebase --dry-run --json -b '' top.qcow2");
    let done = bench.ours("rebase --json -b '' top.qcow2");
    let [planned, done] = [planned, done]
        .map(|output| serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON"));
    assert_eq!(
        (&planned["outcome"], &done["outcome"]),
        (&"not-begun".into(), &"done".into())
    );
    assert_eq!(planned["room"], done["room"]);
}
