//! `create`, `measure`, `convert` and `dd` make what qemu-img makes, and say what it says.

#![allow(
    clippy::disallowed_methods,
    reason = "files of a test need not be durable"
)]

mod both;

use both::{Bench, put};

#[test]
fn empty_images_are_alike_with_every_option() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 base.qcow2 64M; qemu-img create -q -f raw base.raw 10M; mkdir sub");
    bench.sh("qemu-img create -q -f qcow2 sub/base.qcow2 3M");
    for options in [
        "x.img 64M",
        "x.img 1.5G -o cluster_size=4k,lazy_refcounts=on,compat=1.1",
        "x.img 1536",
        "x.img 1000",
        "x.img 0",
        "x.img 64T",
        "x.img 0x100000",
        "-q x.img 1M",
        "-o size=5M x.img",
        "-o compat=0.10 x.img 1G",
        "-o compat=v2,cluster_size=2M x.img 1G",
        "-o cluster_size=512 x.img 10M",
        "-o cluster_size=64k -o cluster_size=8k x.img 10M",
        "-o refcount_bits=1 x.img 1G",
        "-o refcount_bits=64 x.img 1G",
        "-o refcount_bits=0x10 x.img 1G",
        "-o extended_l2=on x.img 1G",
        "-o extended_l2=on,cluster_size=16k x.img 1G",
        "-o compression_type=zstd x.img 1G",
        "-o lazy_refcounts x.img 1G",
        "-o nolazy_refcounts x.img 1G",
        "-o preallocation=metadata x.img 20M",
        "-o preallocation=falloc x.img 3M",
        "-o preallocation=full x.img 3M",
        "-o compat=0.10,preallocation=metadata x.img 10M",
        "-o extended_l2=on,preallocation=metadata x.img 10M",
        "-o nocow=on,extent_size_hint=1M x.img 1M",
        "-b base.qcow2 -F qcow2 x.img",
        "-b base.qcow2 -F qcow2 x.img 100M",
        "-b base.raw -F raw x.img 5M",
        "-b base.qcow2 -F qcow2 sub/x.img",
        "-o backing_file=base.qcow2,backing_fmt=qcow2 x.img",
        "-o backing_file=nope,backing_fmt=raw -b base.qcow2 -F qcow2 x.img",
        "-u -b nope -F raw x.img 1M",
        "-u -b 'a b,c' -F raw 'x y.img' 1M",
        "-o extended_l2=on,preallocation=metadata -b base.qcow2 -F qcow2 x.img",
    ] {
        let name = ["sub/x.img", "x y.img", "x.img"]
            .into_iter()
            .find(|n| options.contains(n));
        bench.same_image(&format!("create -f qcow2 {options}"), name.expect("a name"));
    }
    for options in [
        "x.img 10M",
        "x.img 1000",
        "x.img 0",
        "-o preallocation=falloc x.img 1M",
        "-o preallocation=full,nocow=on x.img 1M",
    ] {
        bench.same_image(&format!("create -f raw {options}"), "x.img");
        bench.same_image(&format!("create {options}"), "x.img");
    }
}

#[test]
fn what_cannot_be_made_is_refused_in_the_same_words() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 base.qcow2 64M; qemu-img create -q -f raw base.raw 10M; mkdir sub");
    bench.same_refusal(&[
        "create",
        "create -f qcow2",
        "create -f",
        "create -Z",
        "create --bogus",
        "create -f qcow2 x.img",
        "create -f foo x.img 1M",
        "create -f qcow2 x.img 1Q",
        "create -f qcow2 x.img -1",
        "create -f qcow2 x.img -- -1",
        "create -f qcow2 x.img 99999999999T",
        "create -f qcow2 x.img 8E",
        "create -f qcow2 x.img 1.5",
        "create -f qcow2 x.img 1MiB",
        "create -f qcow2 x.img 1M 2M",
        "create -f qcow2 x.img ''",
        "create -f qcow2 x.img 1E",
        "create -f qcow2 -o foo=1 x.img 1M",
        "create -f qcow2 -o =x x.img 1M",
        "create -f qcow2 -o '' x.img 1M",
        "create -f qcow2 -o , x.img 1M",
        "create -f qcow2 -o cluster_size=4k, x.img 1M",
        "create -f qcow2 -o cluster_size=1000 x.img 1M",
        "create -f qcow2 -o cluster_size=4M x.img 1M",
        "create -f qcow2 -o cluster_size=abc x.img 1M",
        "create -f qcow2 -o cluster_size x.img 1M",
        "create -f qcow2 -o compat=2 x.img 1M",
        "create -f qcow2 -o compat=1,,1 x.img 1M",
        "create -f qcow2 -o refcount_bits=3 x.img 1M",
        "create -f qcow2 -o refcount_bits=-1 x.img 1M",
        "create -f qcow2 -o refcount_bits=abc x.img 1M",
        "create -f qcow2 -o refcount_bits=128 x.img 1M",
        "create -f qcow2 -o lazy_refcounts=maybe x.img 1M",
        "create -f qcow2 -o compat=0.10,lazy_refcounts=on x.img 1M",
        "create -f qcow2 -o compat=0.10,refcount_bits=8 x.img 1M",
        "create -f qcow2 -o compat=0.10,extended_l2=on x.img 1M",
        "create -f qcow2 -o compat=0.10,compression_type=zstd x.img 1M",
        "create -f qcow2 -o compat=0.10,data_file=x x.img 1M",
        "create -f qcow2 -o extended_l2=on,cluster_size=4k x.img 1M",
        "create -f qcow2 -o preallocation=bogus x.img 1M",
        "create -f qcow2 -o compression_type=lz4 x.img 1M",
        "create -f qcow2 -o size=5M x.img 6M",
        "create -f qcow2 -o size=-1 x.img",
        "create -f qcow2 -o data_file_raw=on x.img 1M",
        "create -f qcow2 -o data_file=x,data_file_raw=on -b base.qcow2 -F qcow2 x.img 1M",
        "create -f qcow2 -o preallocation=full -b base.qcow2 -F qcow2 x.img",
        "create -f qcow2 -o cluster_size=512 x.img 1T",
        "create -f qcow2 -b base.qcow2 x.img",
        "create -f qcow2 -b base.raw x.img",
        "create -f qcow2 -u -b base.qcow2 x.img 1M",
        "create -f qcow2 -b nope -F qcow2 x.img",
        "create -f qcow2 -b nope -F qcow2 x.img 1M",
        "create -f qcow2 -b base.raw -F qcow2 x.img 1M",
        "create -f qcow2 -b base.qcow2 -F bogus x.img",
        "create -f qcow2 -u -b base.qcow2 -F bogus x.img 1M",
        "create -f qcow2 -b foo:x -F raw x.img",
        "create -f qcow2 -b sub -F raw x.img 1M",
        "create -f qcow2 -b '' x.img 1M",
        "create -f qcow2 -b x.img -F qcow2 x.img 5M",
        "create -f qcow2 -u -b nope -F raw x.img",
        "create -f qcow2 -F qcow2 x.img 1M",
        "create -f qcow2 nodir/x.img 1M",
        "create -f qcow2 sub 1M",
        "create -f qcow2 foo:x 1M",
        "create -f raw -b base.qcow2 x.img",
        "create -f raw -F raw x.img 1M",
        "create -f raw -o preallocation=metadata y.img 1M",
        "create -f raw -o preallocation=bogus y.img 1M",
        "create -f raw -o cluster_size=1 x.img 1M",
        "create -f raw -o nocow=maybe x.img 1M",
        "create --object foo -f qcow2 x.img 1M",
    ]);
}

#[test]
fn copies_have_the_same_bytes_and_the_same_description() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f raw base.raw 8M; qemu-io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 5M 200k' base.raw");
    bench.sh("qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2 9M; qemu-io -c 'write -P 3 1M 1M' -c 'write -z 512k 64k' top.qcow2");
    bench.sh(
        "qemu-img snapshot -c s1 top.qcow2; qemu-io -c 'write -P 4 2M 1M' top.qcow2; mkdir sub",
    );
    for line in [
        "top.qcow2 x.img",
        "-O raw top.qcow2 x.img",
        "-O qcow2 top.qcow2 x.img",
        "-q -p -O qcow2 top.qcow2 x.img",
        "-c -O qcow2 top.qcow2 x.img",
        "-c -O qcow2 -o compression_type=zstd top.qcow2 x.img",
        "-O qcow2 -o compat=0.10 top.qcow2 x.img",
        "-O qcow2 -o cluster_size=512,refcount_bits=64 top.qcow2 x.img",
        "-O qcow2 -o extended_l2=on top.qcow2 x.img",
        "-O qcow2 -o preallocation=metadata top.qcow2 x.img",
        "-O qcow2 -S 0 top.qcow2 x.img",
        "-O qcow2 -S 1k -W -m 4 -T none -t none -r 0 top.qcow2 x.img",
        "-O qcow2 -o size=20M top.qcow2 x.img",
        "-O qcow2 -l s1 top.qcow2 x.img",
        "-O qcow2 -l snapshot.name=s1 top.qcow2 x.img",
        "-O qcow2 -l 1 top.qcow2 x.img",
        "-O qcow2 -B base.raw -F raw top.qcow2 x.img",
        "-O qcow2 -o backing_file=base.raw,backing_fmt=raw top.qcow2 x.img",
        "-O qcow2 -B ../base.raw -F raw top.qcow2 sub/x.img",
        "-f raw -O qcow2 base.raw x.img",
        "-f qcow2 -C top.qcow2 x.img",
        "--image-opts driver=qcow2,file.filename=top.qcow2 x.img",
    ] {
        let name = if line.contains("sub/x.img") {
            "sub/x.img"
        } else {
            "x.img"
        };
        bench.same_image(&format!("convert {line}"), name);
    }
    bench.sh("rm -f x.img; qemu-img create -q -f qcow2 -o cluster_size=4k,compat=0.10 there.qcow2 20M; qemu-io -c 'write -P 9 0 20M' there.qcow2");
    bench.sh(
        "qemu-img create -q -f raw there.raw 20M; qemu-io -f raw -c 'write -P 9 0 9M' there.raw",
    );
    bench.same_image("convert -n -O raw top.qcow2 there.raw", "there.raw");
}

#[test]
fn an_image_that_is_written_over_keeps_its_options_and_holds_the_copy() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f raw base.raw 8M; qemu-io -f raw -c 'write -P 1 0 1M' base.raw");
    bench.sh("qemu-img create -q -f qcow2 -o cluster_size=4k,compat=0.10 there.qcow2 8M; qemu-io -c 'write -P 9 0 8M' there.qcow2");
    bench.same_image(
        "convert -n -f raw -O qcow2 base.raw there.qcow2",
        "there.qcow2",
    );
    // With a snapshot in it qemu-img writes over its active state; we cannot yet, and leave it alone.
    bench.sh("qemu-img snapshot -c s there.qcow2; cp there.qcow2 before.qcow2");
    let refused = bench.ours("convert -n -f raw -O qcow2 base.raw there.qcow2");
    assert_eq!(refused.status.code(), Some(1));
    bench.sh("cmp there.qcow2 before.qcow2");
}

#[test]
fn what_cannot_be_copied_is_refused_in_the_same_words() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 8M; qemu-img create -q -f raw r.raw 8M; qemu-img create -q -f raw short.raw 1M; mkdir sub");
    bench.same_refusal(&[
        "convert",
        "convert -O qcow2 a.qcow2",
        "convert -O qcow2 nope x.img",
        "convert -O bogus a.qcow2 x.img",
        "convert -O qcow2 -n a.qcow2 new.img",
        "convert -O raw -n a.qcow2 new.img",
        "convert -n -O raw a.qcow2 short.raw",
        "convert -n -O qcow2 a.qcow2 short.raw",
        "convert -n -o compat=v3 -O qcow2 a.qcow2 r.raw",
        "convert -O qcow2 -c -o preallocation=full a.qcow2 x.img",
        "convert -O raw -c a.qcow2 x.img",
        "convert -O qcow2 -S 100 a.qcow2 x.img",
        "convert -O qcow2 -S 17M a.qcow2 x.img",
        "convert -O qcow2 -S x a.qcow2 x.img",
        "convert -O qcow2 -m 0 a.qcow2 x.img",
        "convert -O qcow2 -m 17 a.qcow2 x.img",
        "convert -O qcow2 -m x a.qcow2 x.img",
        "convert -O qcow2 -l nosnap a.qcow2 x.img",
        "convert -O qcow2 -l snapshot.foo=x a.qcow2 x.img",
        "convert -O qcow2 -B a.qcow2 a.qcow2 x.img",
        "convert -O qcow2 -o backing_file=a.qcow2 a.qcow2 x.img",
        "convert -O raw -B a.qcow2 a.qcow2 x.img",
        "convert -O qcow2 -F qcow2 a.qcow2 x.img",
        "convert -O qcow2 -B r.raw -F bogus a.qcow2 x.img",
        "convert -C -S 4k a.qcow2 x.img",
        "convert -C -c -O qcow2 a.qcow2 x.img",
        "convert -C --salvage a.qcow2 x.img",
        "convert --target-is-zero a.qcow2 x.img",
        "convert --target-image-opts a.qcow2 driver=raw,file.filename=r.raw",
        "convert -n -O raw --target-image-opts a.qcow2 driver=raw,file.filename=r.raw",
        "convert --skip-broken-bitmaps a.qcow2 x.img",
        "convert --bitmaps -O raw a.qcow2 x.img",
        "convert --bitmaps -O qcow2 r.raw x.img",
        "convert -t bogus a.qcow2 x.img",
        "convert -T bogus a.qcow2 x.img",
        "convert -r x a.qcow2 x.img",
        "convert a.qcow2 a.qcow2",
        "convert -O qcow2 a.qcow2 nodir/x.img",
        "convert -O qcow2 a.qcow2 sub",
        "convert -O qcow2 a.qcow2 foo:x",
        "convert foo:x x.img",
        "convert -O qcow2 -o foo a.qcow2 x.img",
        "convert -O qcow2 -o cluster_size=x a.qcow2 x.img",
        "convert -O qcow2 -o , a.qcow2 x.img",
        "convert -O qcow2 -o cluster_size=3k a.qcow2 x.img",
        "convert -O raw -o preallocation=bogus a.qcow2 x.img",
        "convert -O raw -o preallocation=metadata a.qcow2 x.img",
        "convert -f qcow2 --image-opts driver=qcow2,file.filename=a.qcow2 x.img",
        "convert -D a.qcow2 x.img",
        "convert --object foo a.qcow2 x.img",
        "convert -f qcow2 r.raw x.img",
    ]);
    // qemu-img has made the new image when it finds that the one below it is not there.
    bench.same_status(&["convert -O qcow2 -B nope -F raw a.qcow2 y.img"]);
}

#[test]
fn sizes_are_measured_alike() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f raw r.raw 10M; qemu-io -f raw -c 'write -P 1 0 1M' r.raw; qemu-img create -q -f qcow2 -b r.raw -F raw o.qcow2; qemu-io -c 'write -P 3 1M 1M' o.qcow2");
    bench.sh("qemu-img create -q -f qcow2 b.qcow2 64M; qemu-img bitmap --add b.qcow2 b0; qemu-img bitmap --add -g 512 b.qcow2 b1; printf abc > three; qemu-img snapshot -c s o.qcow2");
    for line in [
        "o.qcow2",
        "-O qcow2 o.qcow2",
        "-O qcow2 -l s o.qcow2",
        "-O qcow2 r.raw",
        "-O qcow2 b.qcow2",
        "-O raw b.qcow2",
        "-O qcow2 three",
        "three",
        "--size 1G -O qcow2",
        "--size 1G",
        "--size 1 -O qcow2",
        "-O qcow2 -o cluster_size=4k --size 1G",
        "-O qcow2 -o cluster_size=512,refcount_bits=64 --size 1G",
        "-O qcow2 -o extended_l2=on --size 1M",
        "-O qcow2 -o preallocation=full --size 1M",
        "-O qcow2 -o compat=0.10,refcount_bits=1 --size 1M",
        "-O qcow2 -o cluster_size=x --size 1M",
        "-O qcow2 -o cluster_size=3k --size 1M",
        "-O qcow2 -o foo=x --size 1M",
        "-O qcow2 --size 1E",
        "-O qcow2 --size 9E",
        "-O bogus --size 1G",
        "--size x",
        "--size 1G o.qcow2",
        "o.qcow2 r.raw",
        "",
        "-O qcow2 nope",
        "-O qcow2 -l nosnap o.qcow2",
        "--output=xml --size 1",
    ] {
        bench.same(&[
            &format!("measure {line}"),
            &format!("measure --output=json {line}"),
        ]);
    }
    let exact = bench.ours("measure --exact -O qcow2 o.qcow2");
    let exact = String::from_utf8_lossy(&exact.stdout).into_owned();
    assert!(
        bench
            .ours("convert -O qcow2 o.qcow2 x.img")
            .status
            .success()
    );
    let length = std::fs::metadata(bench.path("x.img"))
        .expect("the copy")
        .len();
    assert!(
        exact.contains(&format!("exact size: {length}\n")),
        "{exact} and {length}"
    );
}

#[test]
fn a_new_image_never_takes_the_place_of_one_in_use_and_a_failed_copy_leaves_what_was_there() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 1M; qemu-img create -q -f qcow2 -u -b gone -F raw lost.qcow2 1M; cp a.qcow2 before.qcow2");
    let failed = bench.ours("convert -O qcow2 lost.qcow2 a.qcow2");
    assert_eq!(failed.status.code(), Some(1));
    bench.sh("cmp a.qcow2 before.qcow2");
    let server = bench.serve("a.qcow2");
    let refused = [
        bench.ours("create -f qcow2 a.qcow2 2M"),
        bench.ours("convert -O qcow2 before.qcow2 a.qcow2"),
    ];
    drop(server);
    for refused in refused {
        let text = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(1), "{text}");
        assert!(
            text.contains("write") && text.contains("qemu-nbd"),
            "{text}"
        );
    }
    bench.sh("cmp a.qcow2 before.qcow2");
}

#[test]
fn a_report_says_what_was_made_and_a_dry_run_makes_nothing() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f raw r.raw 10M; qemu-io -f raw -c 'write -P 1 0 1M' r.raw");
    let dry = bench.ours("convert --dry-run --json -O qcow2 r.raw x.img");
    assert!(
        dry.status.success() && !bench.path("x.img").exists(),
        "{dry:?}"
    );
    let made = bench.ours("convert --json --verify content -O qcow2 r.raw x.img");
    let [dry, made] = [dry, made]
        .map(|output| serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("JSON"));
    assert_eq!(dry["outcome"], "not-begun");
    assert_eq!(made["outcome"], "done");
    assert_eq!(made["verified"], "content");
    assert_eq!(dry["file-bytes"], made["file-bytes"]);
    let length = std::fs::metadata(bench.path("x.img"))
        .expect("the copy")
        .len();
    assert_eq!(made["file-bytes"], length);
}

#[test]
fn parts_of_disks_are_copied_alike() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 8M; qemu-io -c 'write -P 1 0 1M' -c 'write -P 2 2M 1M' a.qcow2; qemu-img create -q -f raw r.raw 3M; qemu-io -f raw -c 'write -P 5 1M 1M' r.raw; mkdir sub");
    for line in [
        "if=a.qcow2 of=x.img",
        "if=a.qcow2 of=x.img bs=1M count=2",
        "-O qcow2 if=a.qcow2 of=x.img bs=1M count=3 skip=1",
        "if=a.qcow2 of=x.img bs=1000 count=3 skip=1",
        "-f raw if=r.raw of=x.img bs=64k skip=20",
        "bs=1M count=0 if=a.qcow2 of=x.img",
        "if=a.qcow2 of=x.img skip=1G bs=1M",
        "--image-opts if=driver=qcow2,file.filename=a.qcow2 of=x.img bs=1k count=2k",
    ] {
        bench.same_image(&format!("dd {line}"), "x.img");
    }
    let part = "driver=raw,offset=1M,size=1M,file.filename=r.raw";
    bench.same_image(&format!("convert --image-opts {part} x.img"), "x.img");
    bench.same_image(
        &format!("convert -O qcow2 --image-opts {part} x.img"),
        "x.img",
    );
    bench.same_image(
        &format!("dd --image-opts bs=1k skip=3 if={part} of=x.img"),
        "x.img",
    );
    bench.same_refusal(&[
        "dd",
        "dd foo",
        "dd if=a.qcow2",
        "dd of=x.img",
        "dd if=nope of=x.img",
        "dd if=a.qcow2 of=x.img bs=0",
        "dd if=a.qcow2 of=x.img bs=3G",
        "dd if=a.qcow2 of=x.img bs=x",
        "dd if=a.qcow2 of=x.img count=x",
        "dd if=a.qcow2 of=x.img count=-1",
        "dd if=a.qcow2 of=x.img skip=x",
        "dd if=a.qcow2 of=x.img foo=x",
        "dd -O bogus if=a.qcow2 of=x.img",
        "dd -f bogus if=a.qcow2 of=x.img",
        "dd if=a.qcow2 of=nodir/x",
        "dd if=a.qcow2 of=sub",
        "dd if=foo:a of=x.img",
        "dd if=a.qcow2 of=foo:x",
        "dd -n if=a.qcow2 of=x.img",
    ]);
}

#[test]
fn a_copy_keeps_bitmaps_and_snapshots_when_asked_and_says_which_it_cannot_keep() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 8M; qemu-img snapshot -c s1 a.qcow2; qemu-io -c 'write -P 1 0 1M' a.qcow2; qemu-img bitmap --add a.qcow2 b0; qemu-img bitmap --add --disable -g 128k a.qcow2 b1");
    bench.same_image("convert --bitmaps -O qcow2 a.qcow2 x.img", "x.img");
    let kept = bench.ours("convert --json --bitmaps --snapshots -O qcow2 a.qcow2 x.img");
    let report: serde_json::Value = serde_json::from_slice(&kept.stdout).expect("JSON");
    assert_eq!(report["snapshots"], 1);
    assert_eq!(report["bitmaps"], serde_json::json!(["b0", "b1"]));
    bench.sh("qemu-img snapshot -l x.img | grep -q s1; qemu-img check -q x.img; qemu-img compare -q a.qcow2 x.img; rm x.img");
    // The flags of the first bitmap are 12 bytes into the directory, which the header extension names.
    let bytes = std::fs::read(bench.path("a.qcow2")).expect("the image");
    let extension = bytes
        .windows(4)
        .position(|four| four == [0x23, 0x85, 0x28, 0x75])
        .expect("bitmaps");
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    put(&bench.path("a.qcow2"), word(extension + 24) + 15, &[3]);
    bench.same_refusal(&["convert --bitmaps -O qcow2 a.qcow2 x.img"]);
    bench.same_image(
        "convert --bitmaps --skip-broken-bitmaps -O qcow2 a.qcow2 x.img",
        "x.img",
    );
}

#[test]
fn a_copy_tells_how_far_it_is_when_signalled_and_leaves_nothing_when_it_is_ended() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f raw r.raw 2G; mkdir out");
    // Nothing is left out, so it takes a while.
    let command = "sh -c 'exec ../bin/qemu-img convert -O qcow2 -c -S 0 r.raw out/x.img'";
    let mut child = std::process::Command::new("sh")
        .args(["-c", &format!("exec {command}")])
        .current_dir(bench.path("."))
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("ours");
    let pid = child.id();
    let signal = |name: &str| bench.sh(&format!("kill -{name} {pid}"));
    let begun = || {
        std::fs::read_dir(bench.path("out"))
            .expect("the folder")
            .count()
            > 0
    };
    while !begun() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    signal("USR1");
    let mut stderr = child.stderr.take().expect("piped");
    let (mut said, mut byte) = (Vec::new(), [0]);
    while !said.ends_with(b"/100%)") {
        let read = std::io::Read::read(&mut stderr, &mut byte).expect("read");
        assert_eq!(read, 1, "it ended: {}", String::from_utf8_lossy(&said));
        said.push(byte[0]);
    }
    signal("TERM");
    std::io::Read::read_to_end(&mut stderr, &mut said).expect("read");
    let status = child.wait().expect("ended");
    let text = String::from_utf8_lossy(&said);
    assert_eq!(status.code(), Some(130), "{text}");
    assert!(text.contains("cancelled"), "{text}");
    assert!(!begun(), "an unfinished file stays");
}

#[test]
fn several_disks_become_one_with_their_holes() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f raw r.raw 1M; qemu-io -f raw -c 'write -P 1 64k 64k' -c 'write -P 2 1023k 1k' r.raw; printf odd > odd");
    bench.sh("qemu-img create -q -f qcow2 -b r.raw -F raw o.qcow2 3M; qemu-io -c 'write -P 3 2M 100k' -c 'write -z 64k 4k' o.qcow2");
    bench.sh(
        "qemu-img convert -c -O qcow2 o.qcow2 c.qcow2; qemu-img snapshot -c s o.qcow2; : > empty",
    );
    for line in [
        "-O raw r.raw o.qcow2 c.qcow2 new",
        "-O qcow2 o.qcow2 r.raw new",
        "-O qcow2 odd r.raw odd o.qcow2 new",
        "-c -O qcow2 r.raw c.qcow2 c.qcow2 new",
        "-O raw -f raw odd empty odd new",
        "-S 0 -O qcow2 r.raw r.raw new",
        "-O qcow2 -o cluster_size=4k odd o.qcow2 new",
    ] {
        bench.same_image(&format!("convert {line}"), "new");
    }
    bench.sh("truncate -s 8M there");
    bench.same_image("convert -n -O raw r.raw o.qcow2 there", "there");
    bench.same_refusal(&[
        "convert -O qcow2 -l s o.qcow2 o.qcow2 new",
        "convert -O qcow2 --bitmaps o.qcow2 o.qcow2 new",
        "convert -O qcow2 -B r.raw -F raw r.raw o.qcow2 new",
        "convert -O raw r.raw nope new",
        "convert -n -O raw o.qcow2 o.qcow2 o.qcow2 there",
    ]);
    let ours = bench.ours("convert --dry-run --json -O qcow2 r.raw o.qcow2 new");
    let made = bench.ours("convert --verify content --json -O qcow2 r.raw o.qcow2 new");
    let bytes = |output: &std::process::Output| {
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        json["file-bytes"].clone()
    };
    assert_eq!(bytes(&ours), bytes(&made));
}
