//! Parts of files: raw windows, and qcow2 images in them, whose room ends where the part ends.

mod both;

use both::Bench;

/// `w`: 64 KiB, then a qcow2 image with `room` more bytes, then something else.
fn bench(room: u64) -> (Bench, String) {
    let bench = Bench::new();
    bench.sh("qemu-img create -q -f qcow2 a.qcow2 8M; qemu-io -c 'write -P 1 0 1M' a.qcow2");
    bench.sh("head -c 65536 /dev/zero | tr '\\0' '\\252' > w; cat a.qcow2 >> w");
    let length = std::fs::metadata(bench.path("a.qcow2"))
        .expect("the image")
        .len();
    let size = length + room;
    bench.sh(&format!(
        "truncate -s {} w; head -c 65536 /dev/zero | tr '\\0' '\\273' >> w; cp w before",
        65536 + size
    ));
    (bench, qcow2(size))
}

fn qcow2(size: u64) -> String {
    let raw = raw(65536, size);
    format!(r#"'json:{{"driver":"qcow2","file":{raw}}}'"#)
}

fn raw(offset: u64, size: u64) -> String {
    format!(
        r#"{{"driver":"raw","offset":{offset},"size":{size},"file":{{"driver":"file","filename":"w"}}}}"#
    )
}

/// What stands around the image is as it was.
fn nothing_else_changed(bench: &Bench) {
    bench.sh("cmp -n 65536 w before; tail -c 65536 w > a; tail -c 65536 before > b; cmp a b");
}

#[test]
fn a_part_of_a_file_is_read_by_every_command_as_qemu_img_reads_it() {
    let (bench, image) = bench(1 << 20);
    bench.sh("truncate -s 4M sparse; qemu-io -f raw -c 'write -P 3 1M 64k' -c 'write -P 4 3M 4608' sparse");
    let raw = |size| {
        format!(
            r#"'json:{{"driver":"raw","offset":512,"size":{size},"file":{{"driver":"file","filename":"sparse"}}}}'"#
        )
    };
    let [one, two] = [raw(3 << 20), raw(1 << 20)];
    for command in [
        "info",
        "map",
        "map --output=json",
        "measure -O qcow2",
        "check",
    ] {
        bench.same(&[&format!("{command} {image}"), &format!("{command} {one}")]);
    }
    bench.same(&[
        &format!("compare {image} {image}"),
        &format!("compare {one} {two}"),
        &format!("compare {one} {image}"),
        &format!("snapshot -l {image}"),
        &format!("info --output=json {image}"),
        "measure --image-opts driver=raw,offset=512,size=1M,file.filename=sparse",
        "info --image-opts driver=raw,offset=512,size=1000,file.filename=sparse",
        "info --image-opts driver=raw,offset=512,size=64M,file.filename=sparse",
        "info --image-opts driver=raw,offset=5M,file.filename=sparse",
    ]);
    bench.same_image(&format!("convert -O qcow2 {one} new"), "new");
    bench.same_image(&format!("convert -O raw {image} new"), "new");
    bench.same_image(&format!("dd bs=64k skip=1 if={one} of=new"), "new");
    bench.sh("cmp w before");
}

#[test]
fn an_image_in_a_part_is_changed_and_nothing_around_it() {
    let (bench, image) = bench(4 << 20);
    for line in [
        format!("snapshot -c s {image}"),
        format!("bitmap --add --disable {image} b"),
        format!("amend -o lazy_refcounts=on {image}"),
        format!("resize {image} 9M"),
        format!("snapshot -a s {image}"),
        format!("rebase -u -b '' {image}"),
        format!("check -r all {image}"),
        format!("recover {image}"),
    ] {
        let output = bench.ours(&line);
        assert!(output.status.success(), "{line}: {output:?}");
        let checked = bench.theirs(&format!("check {image}"));
        assert!(checked.status.success(), "{line}: {checked:?}");
    }
    nothing_else_changed(&bench);
    let output = bench.theirs(&format!("info {image}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("name: b") && text.contains("lazy refcounts: true"),
        "{text}"
    );
    bench.sh(&format!(
        "qemu-img convert -O raw {image} out; qemu-io -f raw -c 'read -P 1 0 1M' out"
    ));
}

#[test]
fn a_part_without_room_is_refused_before_anything_is_written() {
    // qemu-img ends well, and there is no bitmap.
    let (theirs, image) = bench(1 << 16);
    let added = theirs.theirs(&format!("bitmap --add {image} b"));
    assert!(added.status.success(), "{added:?}");
    let info = theirs.theirs(&format!("info {image}"));
    assert!(!String::from_utf8_lossy(&info.stdout).contains("name: b"));

    let (bench, image) = bench(1 << 16);
    for line in [
        format!("bitmap --add {image} b"),
        format!("snapshot -c s {image}"),
        format!("amend -o refcount_bits=64 {image}"),
        format!("rebase -u -b x -F raw {image}"),
    ] {
        let output = bench.ours(&line);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let refused = !output.status.success() && text.contains("bytes are needed");
        assert!(refused || output.status.success(), "{line}: {text}");
        if refused {
            bench.sh("cmp w before");
        }
        let checked = bench.theirs(&format!("check -q {image}"));
        assert!(checked.status.success(), "{line}: {checked:?}");
    }
    let output = bench.ours(&format!("snapshot -c s {image}"));
    assert!(
        !output.status.success(),
        "there was too much room: {output:?}"
    );
    nothing_else_changed(&bench);
}

#[test]
fn a_raw_part_keeps_its_size_and_one_without_a_size_grows_with_its_file() {
    let (bench, _) = bench(0);
    let fixed = format!("'json:{}'", raw(65536, 1 << 20));
    let open = r#"'json:{"driver":"raw","offset":65536,"file":{"driver":"file","filename":"w"}}'"#;
    bench.same_refusal(&[
        &format!("resize {fixed} 2M"),
        &format!("resize --shrink {fixed} 512k"),
    ]);
    bench.same_image(&format!("resize {open} +1M"), "w");
    bench.same_image(&format!("resize --shrink {open} 512k"), "w");
}
