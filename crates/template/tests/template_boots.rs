//! A template built from the host's Debian sources is whole and starts its agent in QEMU.
//!
//! Needs root, the network (or a filled cache) and what `scripts/setup dev` installs. The cache is
//! `$STEAD_TEMPLATE_CACHE`, or `target/template-cache`, and is shared with the end-to-end tests. The
//! agent is `$STEAD_AGENT`, or what `scripts/build-agent` makes.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod in_guest;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stead_template::{
    Base, BuildSpec, BuiltTemplate, DISK_BYTES_DEFAULT, DiskIdentity, Progress, Recipe, Stage,
    TemplateError, Watch, build,
};

/// How long a guest may take to start its agent, on a busy machine without hardware acceleration.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// The agent's port; also in the agent and in the VM's command line.
const PORT: &str = "org.steadfast.agent.0";

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .unwrap()
        .to_owned()
}

fn cache() -> PathBuf {
    std::env::var_os("STEAD_TEMPLATE_CACHE")
        .map_or_else(|| workspace().join("target/template-cache"), PathBuf::from)
}

fn agent() -> &'static Path {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(|| match std::env::var_os("STEAD_AGENT") {
        Some(path) => PathBuf::from(path),
        None => {
            let built = Command::new(workspace().join("scripts/build-agent"))
                .stderr(Stdio::inherit())
                .output();
            let built = built.expect("scripts/build-agent");
            assert!(built.status.success(), "the agent does not build");
            PathBuf::from(String::from_utf8(built.stdout).unwrap().trim())
        }
    })
}

fn build_into(out: &Path, seed: &[u8], watch: &Watch<'_>) -> BuiltTemplate {
    build_of(Recipe::default(), out, seed, watch)
}

fn build_of(recipe: Recipe, out: &Path, seed: &[u8], watch: &Watch<'_>) -> BuiltTemplate {
    let spec = BuildSpec {
        recipe,
        size_bytes: DISK_BYTES_DEFAULT,
        identity: DiskIdentity::from_seed(seed),
        agent: agent(),
        cache: &cache(),
        out,
    };
    build(&spec, watch).unwrap_or_else(|error| panic!("{error}"))
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program)
        .args(arguments)
        .env(
            "PATH",
            format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap()),
        )
        .output()
        .unwrap_or_else(|error| panic!("{program}, from scripts/setup: {error}"))
}

/// What `debugfs` says to `request` about the disk.
fn debugfs(disk: &Path, request: &str) -> String {
    String::from_utf8(debugfs_bytes(disk, request)).unwrap()
}

fn debugfs_bytes(disk: &Path, request: &str) -> Vec<u8> {
    run("debugfs", &["-R", request, disk.to_str().unwrap()]).stdout
}

fn check_disk(template: &BuiltTemplate) {
    let disk = template.disk.to_str().unwrap();
    assert_eq!(fs::metadata(disk).unwrap().len(), template.size_bytes);
    assert!(
        fs::metadata(disk).unwrap().blocks() * 512 < template.size_bytes / 2,
        "not sparse"
    );
    let checked = run("e2fsck", &["-f", "-n", disk]);
    assert!(
        checked.status.success(),
        "{}",
        String::from_utf8_lossy(&checked.stdout)
    );
    let listed = debugfs(&template.disk, "ls -l /usr/local/sbin");
    assert!(
        listed.contains("100755") && listed.contains("stead-agent"),
        "{listed}"
    );
    assert_eq!(debugfs(&template.disk, "cat /etc/machine-id"), "");
    assert!(
        debugfs(&template.disk, "cat /etc/shadow").starts_with("root:*:"),
        "root can log in"
    );
    assert!(debugfs(&template.disk, "stat /sbin/init").contains("Type: symlink"));
    for name in ["git", "python3", "systemd", "kmod"] {
        assert!(
            template.packages.iter().any(|package| package.name == name),
            "{name} is not installed"
        );
    }
}

/// How many 4 KiB blocks differ.
fn differing_blocks(one: &Path, two: &Path) -> usize {
    let (mut one, mut two) = (File::open(one).unwrap(), File::open(two).unwrap());
    let (mut block_one, mut block_two) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut differing = 0;
    for at in (0..one.metadata().unwrap().len()).step_by(1 << 20) {
        one.seek(SeekFrom::Start(at)).unwrap();
        two.seek(SeekFrom::Start(at)).unwrap();
        one.read_exact(&mut block_one).unwrap();
        two.read_exact(&mut block_two).unwrap();
        let blocks = block_one.chunks(4096).zip(block_two.chunks(4096));
        differing += blocks.filter(|(one, two)| one != two).count();
    }
    differing
}

/// A guest that ends with the test.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Starts a guest with an agent's port and returns it with QEMU's monitor and the console's file.
fn boot(template: &BuiltTemplate, folder: &Path) -> (Guest, UnixStream, PathBuf) {
    let (monitor, console) = (folder.join("monitor.sock"), folder.join("console"));
    let listener = UnixListener::bind(&monitor).unwrap();
    let drive = format!(
        "file={},if=none,id=root,format=raw,snapshot=on",
        template.disk.display()
    );
    let port = format!("virtserialport,id=port,chardev=agent,name={PORT}");
    let agent = format!(
        "socket,id=agent,server=on,wait=off,path={}",
        folder.join("agent.sock").display()
    );
    let raw = format!(
        "socket,id=raw,server=on,wait=off,path={}",
        folder.join("raw.sock").display()
    );
    let child = Command::new("qemu-system-x86_64")
        .args([
            "-M",
            "q35",
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-m",
            "512",
        ])
        .arg("-kernel")
        .arg(&template.vmlinuz)
        .arg("-initrd")
        .arg(&template.initrd)
        .args(["-append", &template.cmdline])
        .args(["-drive", &drive, "-device", "virtio-blk-pci,drive=root"])
        .args([
            "-chardev",
            &agent,
            "-device",
            "virtio-serial-pci",
            "-device",
            &port,
        ])
        .args([
            "-chardev",
            &raw,
            "-device",
            "virtserialport,chardev=raw,name=raw",
        ])
        .args([
            "-object",
            "rng-random,id=rng,filename=/dev/urandom",
            "-device",
            "virtio-rng-pci,rng=rng",
        ])
        .args(["-qmp", &format!("unix:{}", monitor.display())])
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .spawn()
        .expect("qemu-system-x86_64, from scripts/setup");
    let (mut stream, _) = listener.accept().unwrap();
    stream
        .write_all(b"{\"execute\":\"qmp_capabilities\"}\n")
        .unwrap();
    (Guest(child), stream, console)
}

/// Waits until a program in the guest has opened the agent's port, which QEMU reports as an event, or
/// until the guest has ended; returns whether the port was opened.
fn agent_opens_its_port(monitor: UnixStream, console: &Path) -> bool {
    let said = || fs::read_to_string(console).unwrap_or_default();
    monitor.set_read_timeout(Some(BOOT_LIMIT)).unwrap();
    for line in BufReader::new(monitor).lines() {
        let line = line
            .unwrap_or_else(|error| panic!("no agent ({error}); the console says:\n{}", said()));
        if line.contains("VSERPORT_CHANGE") && line.contains("\"open\": true") {
            return true;
        }
    }
    false
}

#[test]
fn a_built_template_is_whole_boots_to_its_agent_and_is_rebuilt_in_seconds() {
    let folder = tempfile::tempdir_in(workspace().join("target")).unwrap();
    let started = Instant::now();
    let template = build_into(&folder.path().join("one"), b"worker 1", &Watch::silent());
    println!("first build: {:.1} s", started.elapsed().as_secs_f64());
    check_disk(&template);

    let (cached, never) = (AtomicBool::new(false), AtomicBool::new(false));
    let started = Instant::now();
    let report = |progress: Progress<'_>| match progress {
        Progress::Cached(Stage::RootFilesystem) => cached.store(true, Ordering::Relaxed),
        Progress::Stage(stage) => println!("{:5.1} s {stage}", started.elapsed().as_secs_f64()),
        Progress::Cached(_) | Progress::Line(_) => {}
    };
    let other = build_into(
        &folder.path().join("two"),
        b"worker 2",
        &Watch::new(&report, &never),
    );
    println!("second build: {:.1} s", started.elapsed().as_secs_f64());
    assert!(
        cached.load(Ordering::Relaxed),
        "packages were installed twice"
    );
    check_disk(&other);
    assert_eq!(template.packages, other.packages);
    let differing = differing_blocks(&template.disk, &other.disk);
    println!("blocks that differ: {differing}");
    assert!(
        differing > 1000,
        "two workers' disks must differ: {differing} blocks"
    );
    let git = debugfs_bytes(&template.disk, "cat /usr/bin/git");
    assert!(
        git.starts_with(b"\x7fELF") && git == debugfs_bytes(&other.disk, "cat /usr/bin/git"),
        "other files"
    );

    for (template, is_first) in [(&template, true), (&other, false)] {
        let run = tempfile::tempdir().unwrap();
        let started = Instant::now();
        let (_guest, monitor, console) = boot(template, run.path());
        assert!(
            agent_opens_its_port(monitor, &console),
            "the console says:\n{}",
            fs::read_to_string(console).unwrap()
        );
        println!("boot to agent: {:.1} s", started.elapsed().as_secs_f64());
        if is_first {
            in_guest::check(&run.path().join("agent.sock"), agent());
        }
    }
}

#[test]
fn a_minimal_template_boots_to_its_agent_as_process_1_which_does_all_that_it_does_elsewhere() {
    let folder = tempfile::tempdir_in(workspace().join("target")).unwrap();
    let recipe = Recipe {
        base: Base::Minimal,
        suite: None,
        packages: Vec::new(),
    };
    let started = Instant::now();
    let template = build_of(
        recipe,
        &folder.path().join("one"),
        b"minimal",
        &Watch::silent(),
    );
    println!("build: {:.1} s", started.elapsed().as_secs_f64());
    let disk = template.disk.to_str().unwrap();
    assert!(run("e2fsck", &["-f", "-n", disk]).status.success());
    let names: Vec<&str> = template
        .packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    assert_eq!(names, ["busybox-static"]);
    let started = Instant::now();
    let (mut guest, monitor, console) = boot(&template, folder.path());
    assert!(
        agent_opens_its_port(monitor, &console),
        "the console says:\n{}",
        fs::read_to_string(console).unwrap()
    );
    println!("boot to agent: {:.1} s", started.elapsed().as_secs_f64());
    let socket = folder.path().join("agent.sock");
    if std::env::var_os("STEAD_SOAK").is_some() {
        in_guest::how_fast(&socket, &folder.path().join("raw.sock"));
    }
    in_guest::check_minimal(&socket);
    let end = Instant::now() + BOOT_LIMIT;
    while guest.0.try_wait().unwrap().is_none() {
        let said = fs::read_to_string(&console).unwrap();
        assert!(Instant::now() < end, "it does not power off:\n{said}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_build_that_is_stopped_leaves_no_file_process_or_lock_behind() {
    let folder = tempfile::tempdir_in(workspace().join("target")).unwrap();
    let (cache, out) = (folder.path().join("cache"), folder.path().join("out"));
    let (installing, cancel) = (AtomicBool::new(false), AtomicBool::new(false));
    let report = |progress: Progress<'_>| match progress {
        Progress::Stage(Stage::RootFilesystem) => installing.store(true, Ordering::Relaxed),
        // mmdebstrap says this when it has begun to unpack packages.
        Progress::Line(line)
            if installing.load(Ordering::Relaxed) && line.contains("extracting") =>
        {
            cancel.store(true, Ordering::Relaxed);
        }
        Progress::Stage(_) | Progress::Cached(_) | Progress::Line(_) => {}
    };
    let spec = BuildSpec {
        recipe: Recipe {
            base: Base::Debian,
            suite: None,
            packages: Vec::new(),
        },
        size_bytes: DISK_BYTES_DEFAULT,
        identity: DiskIdentity::from_seed(b"stopped"),
        agent: agent(),
        cache: &cache,
        out: &out,
    };
    let error = build(&spec, &Watch::new(&report, &cancel)).expect_err("stopped");
    assert!(
        matches!(
            error,
            TemplateError::Cancelled {
                stage: Stage::RootFilesystem
            }
        ),
        "{error}"
    );
    assert!(!out.exists());
    let left: Vec<String> = fs::read_dir(&cache)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| {
            name.starts_with("scratch") || name.starts_with("rootfs") || name.starts_with('.')
        })
        .collect();
    assert!(left.is_empty(), "{left:?}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(cache.to_str().unwrap()), "{mounts}");
    for process in fs::read_dir("/proc").unwrap() {
        let root = fs::read_link(process.unwrap().path().join("root")).unwrap_or_default();
        assert!(
            !root.starts_with(&cache),
            "a process still lives in {}",
            root.display()
        );
    }
}

#[test]
fn a_guest_without_its_disk_ends_and_never_opens_the_port() {
    // The twin of the test above: without the root file system the same wait gives another answer.
    let folder = tempfile::tempdir_in(workspace().join("target")).unwrap();
    let mut template = build_into(&folder.path().join("one"), b"worker 1", &Watch::silent());
    template.disk = folder.path().join("empty.raw");
    stead_sys::durable::create_scratch(&template.disk, 0o600)
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    let (_guest, monitor, console) = boot(&template, folder.path());
    assert!(
        !agent_opens_its_port(monitor, &console),
        "an agent without a disk"
    );
    let said = fs::read_to_string(console).unwrap();
    assert!(
        said.contains("cannot start the machine"),
        "the console does not name the reason:\n{said}"
    );
}
