//! Save images between a real libvirt and us, both ways; what is refused; what a killed saver leaves.
#![allow(
    clippy::disallowed_methods,
    reason = "tests change files that must be refused then"
)]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use stead_tests::libvirt::Libvirt;
use stead_tests::{TEMPLATE, Worker, golden_store, guest};

/// Counts on in memory and on the console.
const COUNT: &str = r#"setsid sh -c 'n=0; while :; do n=$((n + 1)); echo $n > /run/ticks; echo "tick $n" > /dev/ttyS0; sleep 0.2; done' > /dev/null 2>&1 < /dev/null &"#;

fn boot(worker: &Worker, name: &str) {
    worker.ok(&["create", TEMPLATE, "--name", name, "--memory", "256M"]);
    worker.shell(name, COUNT);
    worker.shell(name, "while ! [ -e /run/ticks ]; do sleep 0.05; done");
}

fn ticks(worker: &Worker, name: &str) -> u64 {
    number(&worker.shell(name, "cat /run/ticks"))
}

fn number(text: &str) -> u64 {
    let digits = text.trim().rsplit(' ').next().expect("a word");
    digits
        .parse()
        .unwrap_or_else(|_| panic!("no number in {text:?}"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn a_guest_goes_on_counting_from_us_to_libvirt_in_every_compression_and_back() {
    let worker = Worker::on(golden_store());
    let folder = tempfile::tempdir().expect("folder");
    boot(&worker, "a");
    let ours = folder.path().join("ours.save");
    let saved_at = ticks(&worker, "a");
    let report = worker.json(&["save", "write", "a", text(&ours)]);
    assert!(report["pause"]["paused_us"].as_u64() > Some(0));
    worker.ok(&["save", "verify", text(&ours)]);
    assert!(ticks(&worker, "a") > saved_at, "the source runs on");
    let mut last = saved_at;
    let mut image = ours.clone();
    for format in ["raw", "gzip", "bzip2", "xz", "lzop"] {
        let libvirt = Libvirt::start(&folder.path().join("libvirt"), format);
        let xml = libvirt.ok(&["save-image-dumpxml", text(&image)]);
        assert!(xml.contains("<name>a</name>"), "{xml}");
        libvirt.ok(&["restore", text(&image)]);
        let now = number(&libvirt.console_line("a", "tick "));
        assert!(now > last, "{format}: {last} then {now}");
        let next = folder.path().join(format!("{format}.save"));
        libvirt.ok(&["save", "a", text(&next)]);
        drop(libvirt);
        worker.ok(&["save", "verify", text(&next)]);
        let info = worker.json(&["save", "info", text(&next)]);
        assert_eq!(info["format"], format);
        (last, image) = (now, next);
    }
    worker.ok(&["save", "restore", text(&image), "--name", "back"]);
    assert!(ticks(&worker, "back") > last);
    let plain = folder.path().join("plain.save");
    worker.ok(&[
        "save",
        "convert",
        text(&image),
        text(&plain),
        "--format",
        "raw",
    ]);
    worker.ok(&["save", "restore", text(&plain), "--name", "plain"]);
    assert!(ticks(&worker, "plain") > last);
}

#[test]
fn a_sandbox_made_of_an_image_has_the_disk_and_the_memory_of_the_instant() {
    let worker = Worker::on(golden_store());
    let folder = tempfile::tempdir().expect("folder");
    worker.boot("a");
    let before = guest::fill(&worker, "a");
    let image = folder.path().join("a.save");
    worker.ok(&["save", "write", "a", text(&image), "--format", "zstd"]);
    guest::add_file(&worker, "a", "later", 100_000);
    worker.ok(&["save", "restore", text(&image), "--name", "b"]);
    let after = guest::look(&worker, "b");
    assert_eq!(
        (&after.files, &after.memory),
        (&before.files, &before.memory)
    );
    assert!(after.count > before.count);
    assert_ne!(
        guest::look(&worker, "a").files,
        before.files,
        "the source went on"
    );
    worker.fails(&["save", "write", "a", text(&image)], 4);
    let stopped = folder.path().join("stopped.save");
    worker.ok(&["save", "write", "b", text(&stopped), "--stop"]);
    assert_eq!(worker.state("b"), "stopped");
    worker.ok(&["compact", "b"]);
    worker.ok(&["save", "restore", text(&stopped), "--name", "c"]);
    assert_eq!(guest::look(&worker, "c").memory, before.memory);
    worker.ok(&["start", "b"]);
    assert_eq!(guest::look_at_disk(&worker, "b"), before.files);
    // The layers stay as long as the image does, whatever becomes of the sandbox.
    worker.ok(&["rm", "--force", "a", "b", "c"]);
    worker.ok(&["gc"]);
    worker.ok(&["save", "restore", text(&image), "--name", "d"]);
    assert_eq!(guest::look(&worker, "d").files, before.files);
    worker.ok(&["rm", "--force", "d"]);
    fs::remove_file(&image).expect("remove");
    fs::remove_file(&stopped).expect("remove");
    worker.ok(&["gc"]);
    let layers = worker.files();
    let left = layers.iter().filter(|file| file.ends_with(".qcow2"));
    assert_eq!(left.count(), 0, "{layers:?}");
}

#[test]
fn what_is_not_whole_or_does_not_fit_is_refused_before_anything_runs() {
    let worker = Worker::on(golden_store());
    let folder = tempfile::tempdir().expect("folder");
    let libvirt = Libvirt::start(&folder.path().join("libvirt"), "raw");
    boot(&worker, "a");
    let image = folder.path().join("a.save");
    worker.ok(&["save", "write", "a", text(&image), "--stop"]);
    let files = worker.files();
    let refused = |file: &Path, status: i32| {
        let error = worker.fails(&["save", "restore", text(file), "--name", "b"], status);
        assert_eq!(worker.files(), files, "{error}");
        assert!(worker.qemus().is_empty(), "{error}");
        format!("{error}")
    };

    let partial = folder.path().join("partial.save");
    fs::copy(&image, &partial).expect("copy");
    write(&partial, 0, b"LibvirtQemudPart");
    let said = refused(&partial, 5);
    for word in [
        "incomplete",
        "last written at",
        "nothing was changed or deleted",
    ] {
        assert!(said.contains(word), "{word} is not in {said}");
    }
    assert!(
        libvirt
            .fails(&["restore", text(&partial)])
            .contains("incomplete")
    );

    let short = folder.path().join("short.save");
    fs::copy(&image, &short).expect("copy");
    let length = fs::metadata(&short).expect("stat").len();
    let opened = OpenOptions::new().write(true).open(&short).expect("open");
    opened.set_len(length - 4096).expect("cut");
    refused(&short, 5);
    let flipped = folder.path().join("flipped.save");
    fs::copy(&image, &flipped).expect("copy");
    write(&flipped, length / 2, b"\xa5\x5a\xa5\x5a");
    refused(&flipped, 5);

    let other = folder.path().join("other.save");
    fs::copy(&image, &other).expect("copy");
    let xml = folder.path().join("other.xml");
    let dumped = worker.ok(&["save", "dump-xml", text(&image)]);
    let with_card = dumped.replace("<memballoon model='none'/>", "<sound model='ich9'/>");
    assert_ne!(with_card, dumped);
    fs::write(&xml, with_card).expect("write");
    worker.ok(&["save", "edit-xml", text(&other), "--xml", text(&xml)]);
    assert!(refused(&other, 6).contains("sound"));

    // Here the oracle is wrong: libvirt looks at nothing but the header. It runs a guest whose image lacks its end, one
    // whose memory has changed, and finds out that half of an image is missing when a QEMU runs out of bytes.
    let running = |image: &Path| {
        libvirt.ok(&["restore", text(image)]);
        assert_eq!(libvirt.ok(&["domstate", "a"]).trim(), "running");
        libvirt.ok(&["destroy", "a"]);
    };
    running(&short);
    running(&flipped);
    opened.set_len(length / 2).expect("cut");
    refused(&short, 5);
    let late = libvirt.fails(&["restore", text(&short)]);
    assert!(!late.contains("incomplete"), "{late}");

    let overlay = folder.path().join("a.save.vda.qcow2");
    write_to_overlay(&overlay);
    let said = refused(&image, 5);
    assert!(
        said.contains("vda") && said.contains("other content"),
        "{said}"
    );
}

/// What a guest of somebody else would do.
fn write_to_overlay(overlay: &Path) {
    let io = Command::new("qemu-io")
        .args(["-c", "write -P 0x77 64k 4k", text(overlay)])
        .output();
    assert!(io.expect("qemu-io is installed").status.success());
}

fn write(path: &Path, at: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("open");
    file.write_all_at(bytes, at).expect("write");
}

#[test]
fn a_killed_saver_leaves_the_vm_running_and_a_file_that_is_partial_or_whole() {
    let worker = Worker::on(golden_store());
    let folder = tempfile::tempdir().expect("folder");
    boot(&worker, "a");
    for step in ["overlays", "capture", "write", "finish", "complete"] {
        let image = folder.path().join(format!("{step}.save"));
        worker.crash(
            &["save", "write", "a", text(&image)],
            &format!("save:{step}"),
        );
        after_a_kill(&worker, &image);
    }
    let rounds = std::env::var("STEAD_SOAK").map_or(10, |_| 100);
    let whole = folder.path().join("whole.save");
    let begun = Instant::now();
    worker.ok(&["save", "write", "a", text(&whole)]);
    let took = begun.elapsed();
    for round in 0..rounds {
        let image = folder.path().join(format!("{round}.save"));
        let saver = worker.spawn(&["save", "write", "a", text(&image)]);
        std::thread::sleep(random_part(took));
        saver.send("KILL");
        saver.output();
        after_a_kill(&worker, &image);
        fs::remove_file(&image)
            .or_else(ignore_missing)
            .expect("remove");
    }
}

#[test]
fn a_checkpoint_becomes_a_save_image_and_a_save_image_a_checkpoint_without_a_vm() {
    let worker = Worker::with_own_store();
    let folder = tempfile::tempdir().expect("folder");
    boot(&worker, "a");
    worker.shell("a", "echo kept > /root/kept; sync");
    let at = ticks(&worker, "a");
    worker.ok(&["checkpoint", "create", "a", "--name", "one"]);
    worker.ok(&["rm", "--force", "a"]);
    let image = folder.path().join("one.save");
    let to = text(&image);
    worker.fails(
        &["save", "convert", "checkpoint:none", to, "--format", "raw"],
        3,
    );
    worker.fails(&["save", "convert", "checkpoint:one", to], 2);
    let converted = worker.run(&[
        "save",
        "convert",
        "checkpoint:one",
        to,
        "--format",
        "raw",
        "--json",
    ]);
    let said = String::from_utf8_lossy(&converted.stderr).into_owned();
    assert!(converted.status.success(), "{said}");
    assert!(said.contains("processes stand still"), "{said}");
    let made: serde_json::Value = serde_json::from_slice(&converted.stdout).expect("JSON");
    assert_eq!(made["overlays"].as_array().map(Vec::len), Some(1));
    worker.ok(&["save", "verify", to]);
    worker.fails(
        &["save", "convert", "checkpoint:one", to, "--format", "raw"],
        4,
    );
    assert!(worker.qemus().is_empty(), "nothing was started");

    worker.ok(&["save", "restore", to, "--name", "b"]);
    let seen = ticks(&worker, "b");
    assert!(seen > at, "{at} then {seen}");

    // And back, by way of an image that libvirt saved.
    let ours = folder.path().join("ours.save");
    let stop = worker.json(&["save", "write", "b", text(&ours), "--stop"]);
    assert_eq!(stop["overlays"].as_array().map(Vec::len), Some(1));
    let libvirt = Libvirt::start(&folder.path().join("libvirt"), "gzip");
    libvirt.ok(&["restore", text(&ours)]);
    let later = number(&libvirt.console_line("b", "tick "));
    assert!(later > seen, "{seen} then {later}");
    // What is said of an image made of a checkpoint is so: the guest runs, and its processes do not.
    libvirt.ok(&["restore", to]);
    let silence = libvirt.silence("a", Duration::from_secs(5));
    assert!(
        silence,
        "processes run although nobody has greeted the agent"
    );
    assert_eq!(libvirt.ok(&["domstate", "a"]).trim(), "running");
    libvirt.ok(&["destroy", "a"]);
    let theirs = folder.path().join("theirs.save");
    libvirt.ok(&["save", "b", text(&theirs)]);
    drop(libvirt);
    worker.fails(&["save", "convert", text(&theirs), "checkpoint:one"], 4);
    worker.ok(&["save", "convert", text(&theirs), "checkpoint:two"]);
    write_to_overlay(&folder.path().join("one.save.vda.qcow2"));
    let moved = worker.fails(&["save", "convert", to, "checkpoint:three"], 5);
    assert!(moved.to_string().contains("vda"), "{moved}");
    worker.ok(&["rm", "--force", "b"]);
    for image in [&image, &ours, &theirs] {
        fs::remove_file(image).expect("remove");
    }
    worker.ok(&["gc"]);
    assert_eq!(worker.checkpoints().len(), 2);
    worker.ok(&["fork", "two", "--name", "back"]);
    assert!(ticks(&worker, "back") > later);
    assert_eq!(worker.shell("back", "cat /root/kept"), "kept");
    worker.ok(&["fork", "one", "--name", "first"]);
    assert!(ticks(&worker, "first") > at);
}

fn ignore_missing(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound {
        return Ok(());
    }
    Err(error)
}

fn random_part(of: Duration) -> Duration {
    let mut bytes = [0; 4];
    let source = fs::File::open("/dev/urandom").expect("urandom");
    std::io::Read::read_exact(&mut &source, &mut bytes).expect("read");
    of.mul_f64(f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX))
}

/// The next command finds the VM running, and the file either says that it is incomplete or is whole.
fn after_a_kill(worker: &Worker, image: &Path) {
    let before = ticks(worker, "a");
    worker.shell("a", "sleep 0.5");
    assert!(ticks(worker, "a") > before, "the guest stands still");
    if !image.exists() {
        return;
    }
    let verified = worker.run(&["save", "verify", text(image)]);
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    match verified.status.code() {
        Some(0) => {}
        Some(5) => assert!(said.contains("incomplete"), "{said}"),
        other => panic!("{other:?}: {said}"),
    }
}

/// The steps of a hibernation, and whether memory has been taken when each begins.
const HIBERNATION: [(&str, bool); 9] = [
    ("checkpoint:staged", true),
    ("hibernate:commit", true),
    ("hibernate:overlays", false),
    ("hibernate:begin", false),
    ("hibernate:capture", false),
    ("checkpoint:captured", true),
    ("hibernate:read-back", true),
    ("hibernate:publish", true),
    ("checkpoint:committed", true),
];

#[test]
fn a_hibernation_that_died_with_its_vm_is_set_aside_and_the_vm_boots_from_its_disks() {
    let worker = Worker::with_own_store();
    boot(&worker, "a");
    worker.shell("a", "echo kept > /root/kept; sync");
    let quarantine = worker.data.join("quarantine");
    let kept = || fs::read_dir(&quarantine).map_or(0, Iterator::count);
    let steps = std::env::var("STEAD_SOAK").map_or(2, |_| HIBERNATION.len());
    let mut aside = 0;
    for (step, taken) in &HIBERNATION[..steps] {
        let pid = worker.pid("a");
        worker.crash(&["hibernate", "a"], step);
        stead_tests::kill(pid);
        let started = worker.run(&["start", "a"]);
        let said = String::from_utf8_lossy(&started.stderr).into_owned();
        assert!(started.status.success(), "{step}: {said}");
        let told = said.contains("incomplete since") && said.contains("set aside");
        assert_eq!(told, *taken, "{step}: {said}");
        aside += usize::from(*taken);
        assert_eq!(kept(), aside, "{step}: {said}");
        assert_eq!(worker.shell("a", "cat /root/kept"), "kept", "{step}");
        assert_eq!(worker.memory_files().len(), 2, "{step}: RAM and its mark");
    }
    for file in fs::read_dir(&quarantine).expect("quarantine") {
        let meta = file.expect("entry").metadata().expect("stat");
        assert_eq!(meta.len(), 256 << 20);
        assert!(meta.blocks() > 0, "the memory is there");
    }
    worker.ok(&["gc"]);
    worker.ok(&["rm", "--force", "a"]);
    assert_eq!(kept(), aside, "only a person throws it away");
}
