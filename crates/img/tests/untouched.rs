//! Looking at an image never writes to it, and one that is refused is left as it was, times and auto-clear bits included.

mod both;

use std::fs;
use std::os::unix::fs::MetadataExt;

use both::{Bench, put};

/// Commands that only read. `IMAGE` is the image.
const READS: [&str; 15] = [
    "info IMAGE",
    "info --output=json IMAGE",
    "info --backing-chain IMAGE",
    "check IMAGE",
    "check --output=json --notes IMAGE",
    "check --backing IMAGE",
    "map IMAGE",
    "map --output=json IMAGE",
    "measure -O qcow2 IMAGE",
    "measure --exact -O qcow2 IMAGE",
    "compare IMAGE IMAGE",
    "snapshot -l IMAGE",
    "convert -O raw IMAGE ../out",
    "convert -O qcow2 --dry-run IMAGE ../none",
    "dd if=IMAGE of=../out bs=64k count=3",
];

/// Commands that would change the image.
const CHANGES: [&str; 9] = [
    "resize IMAGE 17M",
    "resize --shrink IMAGE 1M",
    "snapshot -c new IMAGE",
    "snapshot -a s IMAGE",
    "snapshot -d s IMAGE",
    "bitmap --add IMAGE new",
    "bitmap --clear IMAGE b",
    "rebase -u -b '' IMAGE",
    "commit IMAGE",
];

/// What is known of a file: its bytes, length, and times of the last write and the last change of status.
type Seen = (Vec<u8>, u64, [i64; 4]);

/// All files; the bytes of those that `line` names.
fn seen(bench: &Bench, line: &str) -> Vec<(String, Seen)> {
    let mut all: Vec<_> = fs::read_dir(bench.path("."))
        .expect("a folder")
        .map(|entry| {
            let path = entry.expect("an entry").path();
            let stat = fs::metadata(&path).expect("there");
            let times = [
                stat.mtime(),
                stat.mtime_nsec(),
                stat.ctime(),
                stat.ctime_nsec(),
            ];
            let name = path.file_name().expect("a name").to_string_lossy();
            let named = line
                .split(' ')
                .any(|word| word == name || word == format!("if={name}"));
            let bytes = named.then(|| fs::read(&path).expect("read"));
            let name = name.into_owned();
            (name, (bytes.unwrap_or_default(), stat.len(), times))
        })
        .collect();
    all.sort();
    all
}

/// Runs `line`, after which all files are what they were; its exit status and what it said.
fn untouched(bench: &Bench, line: &str) -> (Option<i32>, String) {
    let before = seen(bench, line);
    let output = bench.ours(line);
    let after = seen(bench, line);
    for (before, after) in before.iter().zip(&after) {
        assert!(before == after, "{line} changed {}: {output:?}", before.0);
    }
    assert_eq!(before.len(), after.len(), "{line} left a file");
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// An overlay with an internal snapshot and a bitmap. Bit 5 of the auto-clear bits, which nobody knows, is set.
fn image() -> Bench {
    let bench = Bench::new();
    bench.sh(
        "qemu-img create -q -f raw base 4M; qemu-io -f raw -c 'write -P 7 0 1M' base
         qemu-img create -q -f qcow2 -b base -F raw good; qemu-io -c 'write -P 1 1M 300k' good
         qemu-img snapshot -c s good; qemu-img bitmap --add good b; qemu-io -c 'write -P 2 3M 1M' good",
    );
    put(&bench.path("good"), 95, &[1 | 1 << 5]);
    bench
}

#[test]
fn reading_an_image_never_writes_to_it() {
    let bench = image();
    bench.sh("cp good leaky; cp good dirty; cp good corrupt");
    put(&bench.path("dirty"), 79, &[1]);
    put(&bench.path("corrupt"), 79, &[2]);
    put(&bench.path("leaky"), 95, &[0]);
    for name in ["good", "leaky", "dirty", "corrupt"] {
        for line in READS {
            let line = line.replace("IMAGE", name);
            let (status, text) = untouched(&bench, &line);
            let sound = name == "good" || name == "dirty";
            assert!(!sound || status == Some(0), "{line}: {text}");
        }
        for line in CHANGES {
            let takes_dry_run = !line.starts_with("bitmap --clear");
            if takes_dry_run {
                untouched(&bench, &format!("{line} --dry-run").replace("IMAGE", name));
            }
        }
    }
}

#[test]
fn an_image_that_is_refused_is_left_as_it_was() {
    let bench = image();
    // What is written, and where.
    for (name, at, bytes) in [
        ("dirty", 79, &[1][..]),
        ("corrupt", 79, &[2]),
        ("feature", 78, &[4]),
        ("highest", 72, &[0x80]),
        ("version", 7, &[9]),
        ("magic", 0, &[0]),
        ("cluster", 23, &[40]),
        ("l1", 40, &[0xff; 8]),
        ("refcounts", 48, &[0xff; 8]),
        ("snapshots", 64, &[0xff; 8]),
        ("encrypted", 35, &[1]),
    ] {
        bench.sh(&format!("cp good {name}"));
        put(&bench.path(name), at, bytes);
        for line in READS {
            untouched(&bench, &line.replace("IMAGE", name));
        }
        for line in CHANGES {
            let line = line.replace("IMAGE", name);
            let (status, text) = untouched(&bench, &format!("{line} -f qcow2"));
            assert_ne!(status, Some(0), "{line}: {text}");
        }
    }
    let _user = bench.serve("good");
    for line in CHANGES {
        let (status, text) = untouched(&bench, &line.replace("IMAGE", "good"));
        assert_ne!(status, Some(0), "{line}: {text}");
    }
}

/// An encrypted image with data, made by QEMU.
fn encrypted(bench: &Bench, method: &str) {
    let secret = "--object secret,id=s,data=x";
    let quick = match method {
        "luks" => ",encrypt.iter-time=10",
        _ => "",
    };
    bench.sh(&format!(
        "for n in 1 2 3 4 5; do # It measures how fast it hashes, and on a busy machine that fails.
         qemu-img create -q -f qcow2 {secret} -o encrypt.format={method},encrypt.key-secret=s{quick} i 8M && break; done
         qemu-io {secret} --image-opts -c 'write -P 5 1M 300k' driver=qcow2,encrypt.format={method},encrypt.key-secret=s,file.filename=i"
    ));
}

#[test]
fn an_encrypted_image_is_described_and_checked_and_refused_by_name_for_its_data() {
    for (method, name) in [("luks", "LUKS"), ("aes", "AES")] {
        let bench = Bench::new();
        encrypted(&bench, method);
        for line in ["info i", "info --output=json i"] {
            let (status, text) = untouched(&bench, line);
            assert_eq!(status, Some(0), "{text}");
            assert!(
                text.contains("encrypted") && text.contains(method),
                "{text}"
            );
        }
        let (status, text) = untouched(&bench, "check --output=json i");
        assert_eq!(status, Some(0), "{text}");
        assert!(text.contains("\"allocated-clusters\": 5"), "{text}");
        for line in [
            "map i",
            "compare i i",
            "convert -O raw i ../out",
            "dd if=i of=../out",
            "rebase -u -b '' i",
            "rebase -b '' i",
            "snapshot -c x i",
            "resize i 9M",
            "bitmap --add i b",
        ] {
            let (status, text) = untouched(&bench, line);
            assert_ne!(status, Some(0), "{line}: {text}");
            assert!(text.contains(name), "{line}: {text}");
            assert!(!fs::exists(bench.path("../out")).expect("looked"), "{line}");
        }
        // Damage of its metadata is found: a refcount of 0 for the L1 table, which is the fourth cluster.
        put(&bench.path("i"), 0x20000 + 6, &[0, 0]);
        let (status, text) = untouched(&bench, "check i");
        assert_eq!(status, Some(2), "{text}");
        // The place of the LUKS header itself.
        if method == "luks" {
            put(&bench.path("i"), 0x20000 + 6, &[0, 1]);
            let all = fs::read(bench.path("i")).expect("read");
            let at = all
                .windows(4)
                .position(|word| word == [0x05, 0x37, 0xbe, 0x77]);
            let at = u64::try_from(at.expect("the extension")).expect("fits");
            put(&bench.path("i"), at + 8, &[0x10]);
            let (status, text) = untouched(&bench, "check i");
            assert_eq!(status, Some(2), "{text}");
            assert!(text.contains("EncryptionHeader"), "{text}");
        }
    }
}
