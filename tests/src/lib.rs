//! What the end-to-end tests share: workers, a template built once, and ways to run `stead`.
//!
//! The tests run the real command against real QEMU guests. They need root and the programs that
//! `scripts/setup dev` installs. The Debian template is built once for all of them, in
//! `target/e2e`, into a store that the tests' workers fetch it from.
#![forbid(unsafe_code)]
#![allow(
    clippy::missing_panics_doc,
    clippy::disallowed_methods,
    clippy::must_use_candidate,
    reason = "tests panic to fail, and write scratch files that nobody keeps"
)]

pub mod guest;
pub mod libvirt;
pub mod mount;
pub mod steps;
pub mod storm;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use stead_sys::lock::{Attempt, FileLock};
use stead_sys::process::ProcessId;

/// How long a process that was killed may be seen.
const KILL_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a command may take to the step at which it is to stop.
const STOP_TIMEOUT: Duration = Duration::from_secs(300);

/// The template that every test may start from.
pub const TEMPLATE: &str = "debian";

/// The folder that holds the builds: `target`.
pub fn target_dir() -> PathBuf {
    let own = std::env::current_exe().expect("own path");
    let profile = own
        .ancestors()
        .find(|folder| folder.join("deps").is_dir() || folder.ends_with("deps"))
        .expect("tests run from the target folder");
    let profile = if profile.ends_with("deps") {
        profile.parent().expect("deps has a parent")
    } else {
        profile
    };
    profile
        .parent()
        .expect("a profile's folder has a parent")
        .to_owned()
}

/// The `stead` command of this build.
pub fn stead_program() -> PathBuf {
    let path = target_dir().join("debug/stead");
    assert!(
        path.is_file(),
        "{} is missing; run `make test`",
        path.display()
    );
    path
}

/// The static agent of this build.
pub fn agent_program() -> PathBuf {
    let path = target_dir().join("x86_64-unknown-linux-gnu/agent/stead-agent");
    assert!(
        path.is_file(),
        "{} is missing; run `make agent`",
        path.display()
    );
    path
}

/// A store that holds the template, built at first use and kept between runs.
pub fn golden_store() -> &'static Path {
    static STORE: OnceLock<PathBuf> = OnceLock::new();
    STORE.get_or_init(|| {
        let agent = blake3_of(&agent_program());
        let root = target_dir().join("e2e").join(agent);
        stead_sys::durable::create_dir(&root, 0o711).expect("folder");
        let _lock = wait_for_lock(&root.join("lock"));
        let store = root.join("store");
        if root.join("complete").exists() {
            return store;
        }
        for part in ["store", "builder"] {
            stead_sys::durable::remove_tree(&root.join(part)).expect("remove an unfinished build");
        }
        let builder = Worker {
            data: root.join("builder"),
            store: store.display().to_string(),
            env: Vec::new(),
            keep: true,
        };
        builder.ok(&["store", "init"]);
        builder.ok(&[
            "template",
            "build",
            TEMPLATE,
            "--agent",
            agent_program().to_str().expect("UTF-8"),
        ]);
        fs::write(root.join("complete"), b"").expect("mark");
        store
    })
}

fn wait_for_lock(path: &Path) -> FileLock {
    loop {
        match FileLock::attempt(path, "end-to-end tests").expect("lock") {
            Attempt::Locked(lock) => return lock,
            Attempt::HeldBy(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn blake3_of(path: &Path) -> String {
    let bytes = fs::read(path).expect("read");
    blake3::hash(&bytes).to_hex()[..16].to_owned()
}

/// A worker: a data directory of its own, taken down with everything in it at the end.
#[derive(Debug)]
pub struct Worker {
    /// Its data directory.
    pub data: PathBuf,
    /// Its store.
    pub store: String,
    /// Variables that its commands get besides the environment.
    pub env: Vec<(String, String)>,
    /// Whether its folder stays when it is dropped.
    pub keep: bool,
}

impl Worker {
    /// A fresh worker on the given store.
    pub fn on(store: &Path) -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let data = target_dir()
            .join("e2e/workers")
            .join(format!("{}-{number}", std::process::id()));
        stead_sys::durable::remove_tree(&data).expect("remove");
        Self::at(&data, &store.display().to_string())
    }

    /// A worker in this folder, on the store with this URL.
    pub fn at(data: &Path, store: &str) -> Self {
        Self {
            data: data.to_owned(),
            store: store.to_owned(),
            env: Vec::new(),
            keep: false,
        }
    }

    /// A fresh worker with a store of its own that has the template.
    pub fn with_own_store() -> Self {
        let mut worker = Self::on(golden_store());
        let store = worker.data.join("store");
        copy_tree(golden_store(), &store);
        worker.store = store.display().to_string();
        worker
    }

    /// The command with this worker's folders.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(stead_program());
        command
            .env("STEAD_TEMPLATE_CACHE", template_cache())
            .env_remove("STEAD_CRASH_AT")
            .env_remove("STEAD_STOP_AT")
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .arg("--data-dir")
            .arg(&self.data)
            .arg("--store")
            .arg(&self.store)
            .args(args)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, args: &[&str]) -> Output {
        let begun = Instant::now();
        let output = self.command(args).output().expect("run stead");
        eprintln!(
            "stead {}\n  status {:?} after {:.2?}\n  stderr {}",
            args.join(" "),
            output.status.code(),
            begun.elapsed(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        output
    }

    /// Runs a command that must succeed and gives what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(
            output.status.success(),
            "stead {} failed: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// Runs a command with `--json` that must succeed.
    pub fn json(&self, args: &[&str]) -> Value {
        let mut with_json = vec!["--json"];
        with_json.extend(args);
        serde_json::from_str(&self.ok(&with_json)).expect("JSON")
    }

    /// Runs a command that must fail with this exit status; gives its error (`kind`, `found`, …).
    pub fn fails(&self, args: &[&str], status: i32) -> Value {
        let mut with_json = vec!["--json"];
        with_json.extend(args);
        let output = self.run(&with_json);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{stderr}");
        error_of(&output).unwrap_or_else(|| panic!("no error in {stderr}"))
    }

    /// Runs a shell script in a guest; it must succeed.
    pub fn shell(&self, sandbox: &str, script: &str) -> String {
        self.ok(&["exec", "-n", sandbox, "--", "sh", "-c", script])
    }

    /// Starts a command and leaves it running.
    pub fn spawn(&self, args: &[&str]) -> Stead {
        Stead::start(&mut self.command(args))
    }

    /// Starts a command and waits until it has stopped as the step `at` begins.
    pub fn stopped_at(&self, args: &[&str], at: &str) -> Stead {
        let mut stead = Stead::start(self.command(args).env("STEAD_STOP_AT", at));
        let mut ended = None;
        until(STOP_TIMEOUT, || {
            ended = stead.try_wait().expect("look");
            ended.is_some() || stead.is_stopped()
        });
        assert!(ended.is_none(), "{args:?} did not reach {at}: {ended:?}");
        stead
    }

    /// Runs a command that kills itself as the step `at` begins.
    pub fn crash(&self, args: &[&str], at: &str) {
        let output = self
            .command(args)
            .env("STEAD_CRASH_AT", at)
            .output()
            .expect("run stead");
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(
            output.status.signal(),
            Some(9),
            "{args:?} did not reach {at}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Creates and boots a sandbox.
    pub fn boot(&self, name: &str) {
        self.ok(&["create", TEMPLATE, "--name", name]);
    }

    /// The process id of a sandbox's QEMU.
    pub fn pid(&self, sandbox: &str) -> i32 {
        let pid = self.json(&["show", sandbox])["pid"]
            .as_i64()
            .expect("it runs");
        i32::try_from(pid).expect("a pid fits")
    }

    /// The state of a sandbox.
    pub fn state(&self, sandbox: &str) -> String {
        self.json(&["show", sandbox])["state"]
            .as_str()
            .expect("state")
            .to_owned()
    }

    /// Process ids of every QEMU that works in this worker's folders.
    pub fn qemus(&self) -> Vec<i32> {
        let runs = self.data.join("run");
        fs::read_dir("/proc")
            .expect("/proc")
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid: &i32| {
                fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&runs))
            })
            .collect()
    }

    /// Files of the worker that hold state, by path within its folder: layers, RAM, run folders.
    pub fn files(&self) -> Vec<String> {
        let mut names = Vec::new();
        for folder in ["layers", "ram", "run", "build"] {
            let Ok(entries) = fs::read_dir(self.data.join(folder)) else {
                continue;
            };
            for entry in entries {
                let name = entry.expect("entry").file_name();
                names.push(format!("{folder}/{}", name.to_string_lossy()));
            }
        }
        names.sort();
        names
    }

    /// Files of the worker on the memory file system: live RAM, and what a capture stages there.
    pub fn memory_files(&self) -> Vec<String> {
        let mut names = Vec::new();
        for folder in memory_folders_of(&self.data) {
            for entry in fs::read_dir(&folder).expect("list") {
                names.push(entry.expect("entry").path().display().to_string());
            }
        }
        names.sort();
        names
    }

    /// The JSON of every checkpoint in the store.
    pub fn checkpoints(&self) -> Vec<Value> {
        let listed = self.json(&["checkpoint", "ls"]);
        listed.as_array().expect("a list").clone()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        for pid in self.qemus() {
            // A second panic, while a first one unwinds, would end all tests of the file.
            if let Err(error) = end(pid) {
                eprintln!("end QEMU {pid}: {error}");
            }
        }
        let memory = memory_folders_of(&self.data);
        for folder in memory.iter().chain([&self.data]) {
            if let Err(error) = stead_sys::durable::remove_tree(folder) {
                eprintln!("remove {}: {error}", folder.display());
            }
        }
    }
}

fn template_cache() -> PathBuf {
    match std::env::var_os("STEAD_TEMPLATE_CACHE") {
        Some(path) => path.into(),
        None => target_dir().join("template-cache"),
    }
}

/// The folders on the memory file system that belong to a worker.
pub fn memory_folders_of(data: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/dev/shm") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| fs::read_link(path.join("worker")).is_ok_and(|owner| owner == data))
        .collect()
}

/// Kills a process and waits until it is gone.
pub fn kill(pid: i32) {
    end(pid).unwrap_or_else(|error| panic!("end process {pid}: {error}"));
}

fn end(pid: i32) -> std::io::Result<()> {
    let Ok(process) = ProcessId::of(pid) else {
        return Ok(());
    };
    process.kill()?;
    let begun = Instant::now();
    while process.is_alive()? {
        if begun.elapsed() > KILL_TIMEOUT {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// A `stead` that a test has started. It does not outlive the test, stopped or not.
#[derive(Debug)]
pub struct Stead(Option<Child>);

impl Stead {
    /// Starts it with its streams piped.
    pub fn start(command: &mut Command) -> Self {
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Self::from(child.expect("start stead"))
    }

    /// Sends it a signal, by name.
    pub fn send(&self, signal: &str) {
        let sent = Command::new("/bin/kill")
            .args([&format!("-{signal}"), &self.id().to_string()])
            .status();
        assert!(sent.is_ok_and(|sent| sent.success()), "kill -{signal}");
    }

    /// Collects its end.
    pub fn output(mut self) -> Output {
        let child = self.0.take().expect("it is taken once");
        child.wait_with_output().expect("wait")
    }

    fn is_stopped(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.id())).is_ok_and(|stat| {
            stat.rsplit_once(')')
                .is_some_and(|(_, rest)| rest.trim_start().starts_with('T'))
        })
    }
}

impl From<Child> for Stead {
    /// Takes charge of one that was started.
    fn from(child: Child) -> Self {
        Self(Some(child))
    }
}

impl std::ops::Deref for Stead {
    type Target = Child;

    fn deref(&self) -> &Child {
        self.0.as_ref().expect("it is taken once")
    }
}

impl std::ops::DerefMut for Stead {
    fn deref_mut(&mut self) -> &mut Child {
        self.0.as_mut().expect("it is taken once")
    }
}

impl Drop for Stead {
    fn drop(&mut self) {
        let Some(child) = &mut self.0 else {
            return;
        };
        if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
            eprintln!("end stead {}: {error}", child.id());
        }
    }
}

/// Sends SIGINT, as Ctrl-C does, to a command once it listens to it: before, it would just be killed.
pub fn interrupt(command: &Child) {
    const SIGINT: u64 = 1 << (2 - 1);
    let pid = command.id();
    until(Duration::from_secs(10), || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let caught = u64::from_str_radix(caught.expect("SigCgt").trim(), 16).expect("a mask");
        caught & SIGINT != 0
    });
    signal(i32::try_from(pid).expect("a pid fits"), "INT");
}

/// Sends a signal by its name.
pub fn signal(pid: i32, name: &str) {
    let sent = Command::new("kill")
        .args([format!("-{name}"), pid.to_string()])
        .status();
    assert!(sent.is_ok_and(|status| status.success()), "kill -{name}");
}

/// Waits for something that must become true.
pub fn until(within: Duration, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(
            begun.elapsed() < within,
            "it did not happen within {within:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Copies a folder with everything in it.
pub fn copy_tree(from: &Path, to: &Path) {
    stead_sys::durable::create_dir(to, 0o711).expect("folder");
    for entry in fs::read_dir(from).expect("list") {
        let entry = entry.expect("entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("type").is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), &target).expect("copy");
        }
    }
}

/// Every file below a folder, with its length.
pub fn files_below(folder: &Path) -> Vec<(PathBuf, u64)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).expect("list") {
        let entry = entry.expect("entry");
        if entry.file_type().expect("type").is_dir() {
            files.extend(files_below(&entry.path()));
        } else {
            files.push((entry.path(), entry.metadata().expect("stat").len()));
        }
    }
    files
}

/// Flips one bit of a file, whatever its permissions.
pub fn flip(path: &Path, at: u64) {
    use std::os::unix::fs::FileExt;
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ 1], at).expect("write");
}

/// The error that a command with `--json` told.
pub fn error_of(output: &Output) -> Option<Value> {
    String::from_utf8_lossy(&output.stderr)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|value| value["event"] == "error")
}

/// Feeds a child's standard input and collects its end.
pub fn finish(child: impl Into<Stead>, input: &[u8]) -> Output {
    let mut child = child.into();
    let mut stdin = child.stdin.take().expect("piped");
    stdin.write_all(input).expect("feed");
    drop(stdin);
    child.output()
}
