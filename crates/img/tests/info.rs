//! `info` says what qemu-img says of every kind of image.

mod both;

use both::{Bench, put};

#[test]
fn every_kind_of_image_is_described_alike() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f raw r.raw 10M; qemu-img create -q -f raw odd.raw 1000; printf abc > three");
    bench.sh("truncate -s 67108863 big.raw; : > empty");
    for (name, options) in [
        ("plain", ""),
        ("v2", "compat=0.10"),
        ("small", "cluster_size=512"),
        ("large", "cluster_size=2M"),
        ("lazy", "lazy_refcounts=on"),
        ("narrow", "refcount_bits=1"),
        ("wide", "refcount_bits=64"),
        ("zstd", "compression_type=zstd"),
        ("extended", "extended_l2=on"),
        ("data", "data_file=plain.data"),
        ("rawdata", "data_file=raw.data,data_file_raw=on"),
    ] {
        let options = if options.is_empty() {
            String::new()
        } else {
            format!("-o {options}")
        };
        bench.sh(&format!(
            "qemu-img create -q -f qcow2 {options} {name}.qcow2 1536M"
        ));
        bench.same(&[
            &format!("info {name}.qcow2"),
            &format!("info --output=json {name}.qcow2"),
        ]);
    }
    bench.same(&[
        "info r.raw",
        "info --output json r.raw",
        "info odd.raw",
        "info three",
        "info big.raw",
        "info empty",
        "info -f raw plain.qcow2",
        "info -f qcow2 r.raw",
        "info file:plain.qcow2",
        "info ./plain.qcow2",
        "info -U plain.qcow2",
        "info --backing-chain plain.qcow2",
        "info --backing-chain --output=json plain.qcow2",
        "info --image-opts driver=qcow2,file.filename=plain.qcow2",
        "info --image-opts driver=raw,offset=512,size=1M,file.driver=file,file.filename=r.raw",
        "info --image-opts driver=raw,offset=10M,size=1M,file.driver=file,file.filename=r.raw",
        r#"info 'json:{"driver":"raw","offset":513,"file.filename":"r.raw"}'"#,
        r#"info 'json:{"driver":"raw","size":1024,"file":{"driver":"file","filename":"r.raw"}}'"#,
        r#"info 'json:{"driver":"qcow2","file":{"driver":"file","filename":"plain.qcow2"}}'"#,
        r#"info 'json:{"file.filename":"plain.qcow2"}'"#,
        r#"info 'json:{"driver":"raw","bogus":1,"file.filename":"r.raw"}'"#,
        r#"info 'json:{"filename":"r.raw"}'"#,
        "info 'json:[1]'",
        "info --image-opts plain.qcow2",
        "info --image-opts filename=plain.qcow2",
        "info -f bogus plain.qcow2",
        "info nope",
        "info foo:bar",
        "info .",
        "info ''",
        "info",
        "info a b",
    ]);
}

#[test]
fn snapshots_bitmaps_and_flags_are_described_alike() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 64M");
    bench.sh("qemu-img snapshot -c one a.qcow2; qemu-img snapshot -c 'a rather long name of a snapshot' a.qcow2");
    bench
        .sh("qemu-img bitmap --add a.qcow2 b0; qemu-img bitmap --add -g 128k --disable a.qcow2 b1");
    bench.same(&["info a.qcow2", "info --output=json a.qcow2"]);
    bench.sh(
        "qemu-img create -q -f qcow2 -o compat=0.10 old.qcow2 1M; qemu-img snapshot -c s old.qcow2",
    );
    bench.same(&["info old.qcow2", "info --output=json old.qcow2"]);
    for (name, bits) in [("dirty", 1_u64), ("corrupt", 2)] {
        bench.sh(&format!("qemu-img create -q -f qcow2 {name}.qcow2 1M"));
        put(
            &bench.path(&format!("{name}.qcow2")),
            72,
            &bits.to_be_bytes(),
        );
        bench.same(&[
            &format!("info {name}.qcow2"),
            &format!("info --output=json {name}.qcow2"),
        ]);
    }
}

#[test]
fn names_of_images_below_are_told_and_followed_only_when_asked() {
    let bench = Bench::new();
    bench.sh("mkdir sub; qemu-img create -q -f qcow2 sub/base.qcow2 10M; qemu-img create -q -f raw sub/base.raw 5M");
    bench.sh("qemu-img create -q -f qcow2 -b base.raw -F raw sub/mid.qcow2 8M");
    bench.sh("qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 sub/top.qcow2");
    bench.sh("qemu-img create -q -f qcow2 -u -b missing.qcow2 -F qcow2 sub/lost.qcow2 10M");
    bench.sh("qemu-img create -q -f qcow2 -u -b nbd://localhost/x -F raw sub/nbd.qcow2 10M");
    // qemu-img no longer makes an image that does not state the format below; old ones do not.
    bench.sh("qemu-img create -q -f qcow2 sub/bare.qcow2 10M");
    let bare = bench.path("sub/bare.qcow2");
    put(&bare, 8, &600_u64.to_be_bytes());
    put(&bare, 16, &10_u32.to_be_bytes());
    put(&bare, 600, b"lost.qcow2");
    bench.same(&[
        "info sub/top.qcow2",
        "info --output=json sub/top.qcow2",
        "info $PWD/sub/top.qcow2",
        "info --backing-chain sub/top.qcow2",
        "info --backing-chain --output=json sub/top.qcow2",
        "info sub/lost.qcow2",
        "info --backing-chain sub/lost.qcow2",
        "info sub/nbd.qcow2",
        "info sub/bare.qcow2",
        "info --output=json sub/bare.qcow2",
    ]);
    let refused = bench.ours("info --backing-chain sub/nbd.qcow2");
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("'nbd'"),
        "{refused:?}"
    );
}

#[test]
fn a_chain_that_comes_back_to_itself_ends_in_an_error() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 -u -b b.qcow2 -F qcow2 a.qcow2 1M; qemu-img create -q -f qcow2 -u -b a.qcow2 -F qcow2 b.qcow2 1M");
    bench.same_status(&["info --backing-chain a.qcow2"]);
}

#[test]
fn an_image_in_use_is_refused_and_its_user_named_unless_sharing_is_asked_for() {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 1M");
    let server = bench.serve("a.qcow2");
    let (ours, theirs) = (bench.ours("info a.qcow2"), bench.theirs("info a.qcow2"));
    let shared = bench.ours("info -U a.qcow2");
    drop(server);
    let text = String::from_utf8_lossy(&ours.stderr).into_owned();
    let expected = String::from_utf8_lossy(&theirs.stderr).into_owned();
    assert!(text.starts_with(&expected), "{text:?} and {expected:?}");
    assert!(text.contains("qemu-nbd"), "{text}");
    assert_eq!(ours.status.code(), Some(1));
    assert!(shared.status.success(), "{shared:?}");
}
