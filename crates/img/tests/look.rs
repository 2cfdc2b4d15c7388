//! `map` and `compare` say what qemu-img says.

mod both;

use both::Bench;

/// A chain of three with data, zeros and holes, and the same disk in other forms.
fn chain() -> Bench {
    let bench = Bench::new();
    bench.sh("mkdir sub; qemu-img create -q -f raw sub/base.raw 64M; qemu-io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 40M 200k' sub/base.raw");
    bench.sh("qemu-img create -q -f qcow2 -b base.raw -F raw sub/mid.qcow2; qemu-io -c 'write -P 3 1M 1M' -c 'write -z 512k 64k' sub/mid.qcow2");
    bench.sh("qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 -o cluster_size=4k sub/top.qcow2 80M; qemu-io -c 'write -P 4 5M 12k' -c 'write -z 40M 64k' sub/top.qcow2");
    bench.sh("qemu-img convert -O raw sub/top.qcow2 flat.raw; qemu-img convert -O qcow2 sub/top.qcow2 flat.qcow2");
    bench.sh("qemu-img convert -c -O qcow2 sub/top.qcow2 packed.qcow2");
    bench.sh("qemu-img create -q -f qcow2 -o preallocation=metadata full.qcow2 8M; qemu-img create -q -f qcow2 empty.qcow2 8M");
    bench.sh(": > zero; printf abc > three");
    bench
}

#[test]
fn maps_are_alike() {
    let bench = chain();
    for image in [
        "sub/top.qcow2",
        "sub/mid.qcow2",
        "sub/base.raw",
        "flat.raw",
        "flat.qcow2",
        "packed.qcow2",
        "full.qcow2",
        "empty.qcow2",
        "zero",
        "three",
    ] {
        bench.same(&[
            &format!("map {image}"),
            &format!("map --output=json {image}"),
        ]);
    }
    bench.same(&[
        "map --start-offset=1M --max-length=512k sub/top.qcow2",
        "map -s 1M -l 512k --output=json sub/top.qcow2",
        "map --output=json --start-offset=1000 --max-length=10 flat.qcow2",
        "map --output=json --start-offset=100M sub/top.qcow2",
        "map --start-offset=100M sub/top.qcow2",
        "map --max-length=0 --output=json flat.qcow2",
        "map -f raw flat.qcow2",
        "map -U flat.qcow2",
        "map --image-opts driver=qcow2,file.filename=flat.qcow2",
        "map --start-offset=x flat.qcow2",
        "map --max-length=-1 flat.qcow2",
        "map --start-offset=9E flat.qcow2",
        "map --output=xml flat.qcow2",
        "map",
        "map nope",
    ]);
}

#[test]
fn comparisons_are_alike() {
    let bench = chain();
    bench.sh("cp flat.raw other.raw; printf x | dd of=other.raw bs=1 seek=41943041 conv=notrunc status=none");
    bench.sh("cp flat.raw longer.raw; truncate -s 90M longer.raw; cp longer.raw tail.raw; printf x | dd of=tail.raw bs=1 seek=88M conv=notrunc status=none");
    let images = [
        "sub/top.qcow2",
        "flat.raw",
        "flat.qcow2",
        "other.raw",
        "longer.raw",
        "tail.raw",
    ];
    // In strict mode qemu-img also tells a hole that reaches the end of the file from one that does not, and
    // names that place; we name the first byte that is allocated in one file only.
    let only_the_end =
        |a, b| (a, b) == ("longer.raw", "tail.raw") || (a, b) == ("tail.raw", "longer.raw");
    for a in images {
        for b in images {
            if only_the_end(a, b) {
                bench.same(&[&format!("compare {a} {b}")]);
                bench.same_status(&[&format!("compare -s {a} {b}")]);
                continue;
            }
            bench.same(&[&format!("compare {a} {b}"), &format!("compare -s {a} {b}")]);
        }
    }
    bench.same(&[
        "compare -q flat.raw other.raw",
        "compare -f raw -F qcow2 flat.raw flat.qcow2",
        "compare -f raw -F raw flat.raw flat.qcow2",
        "compare -f bogus flat.raw flat.qcow2",
        "compare three zero",
        "compare flat.raw",
        "compare flat.raw flat.raw flat.raw",
        "compare nope flat.raw",
        "compare flat.raw nope",
        "compare -T bogus flat.raw flat.raw",
        "compare --output=json flat.raw flat.raw",
    ]);
}

#[test]
fn an_image_below_that_is_missing_is_named_in_the_same_words() {
    let bench = Bench::new();
    bench.sh("mkdir sub; qemu-img create -q -f qcow2 -u -b missing.qcow2 -F qcow2 sub/lost.qcow2 10M; qemu-img create -q -f qcow2 a.qcow2 10M");
    bench.sh("qemu-img create -q -f qcow2 -u -b a.raw -F qcow2 wrong.qcow2 10M; qemu-img create -q -f raw a.raw 1M");
    bench.same(&[
        "map sub/lost.qcow2",
        "compare sub/lost.qcow2 a.qcow2",
        "compare a.qcow2 sub/lost.qcow2",
        "map wrong.qcow2",
    ]);
    let refused = bench.ours("map --no-follow wrong.qcow2");
    assert_eq!(refused.status.code(), Some(1));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("a.raw") && text.contains("allow"), "{text}");
}

#[test]
fn progress_ends_at_a_hundred_and_the_result_follows() {
    let bench = chain();
    for line in [
        "compare -p flat.raw flat.qcow2",
        "compare -p empty.qcow2 empty.qcow2",
    ] {
        let ours = String::from_utf8_lossy(&bench.ours(line).stdout).into_owned();
        let theirs = String::from_utf8_lossy(&bench.theirs(line).stdout).into_owned();
        for said in [&ours, &theirs] {
            assert!(said.starts_with("    (0.00/100%)\r"), "{said:?}");
            assert!(
                said.ends_with("    (100.00/100%)\rImages are identical.\n\n"),
                "{said:?}"
            );
        }
    }
}

#[test]
fn for_programs_progress_is_json_lines_on_standard_error_and_the_result_stays_one_document() {
    let bench = chain();
    for line in [
        "check --progress --output=json flat.qcow2",
        "map --progress --output=json flat.qcow2",
        "measure --progress --output=json -O qcow2 flat.qcow2",
        "snapshot --progress --json -c one flat.qcow2",
        "resize --progress --json flat.qcow2 +1M",
        "bitmap --progress --json --add flat.qcow2 b",
    ] {
        let ours = bench.ours(line);
        assert!(ours.status.success(), "{line}: {ours:?}");
        serde_json::from_slice::<serde_json::Value>(&ours.stdout).expect(line);
        let text = String::from_utf8(ours.stderr).expect("text");
        let told = text.lines().map(|event| {
            let event: serde_json::Value = serde_json::from_str(event).expect(line);
            assert_eq!(event["event"], "progress", "{line}");
            event["done"].as_f64().expect("a number")
        });
        let told: Vec<f64> = told.collect();
        assert!(told.is_sorted(), "{line}: {told:?}");
        assert_eq!((told.first(), told.last()), (Some(&0.0), Some(&100.0)));
    }
}
