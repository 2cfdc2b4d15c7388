//! A QEMU without a guest that has a chain open: the disk is written through its NBD server, as a guest would through
//! virtio.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stead_merge::{Event, MergeRequest, Watch, run_live};
use stead_qcow2::Layer;
use stead_vmm::block_jobs;

use super::World;

/// A QEMU that has the chain open, its active layer for writing.
pub struct Vm {
    qemu: Child,
    folder: PathBuf,
}

impl Vm {
    pub fn start(world: &World) -> Self {
        Self::start_on(world.dir.path(), &world.path("active"))
    }

    /// On that active layer, with its sockets in `folder`.
    pub fn start_on(folder: &Path, active: &Path) -> Self {
        let folder = folder.to_owned();
        let is_raw = active.extension().is_some_and(|end| end == "raw");
        let driver = if is_raw { "raw" } else { "qcow2" };
        let active = active.display();
        let qemu = Command::new("qemu-system-x86_64")
            .args(["-machine", "none", "-nodefaults", "-display", "none", "-S"])
            .arg("-qmp")
            .arg(format!("unix:{}/qmp,server=on,wait=off", folder.display()))
            .arg("-blockdev")
            .arg(format!("driver=file,node-name=disk.f,filename={active}"))
            .arg("-blockdev")
            .arg(format!("driver={driver},node-name=disk,file=disk.f"))
            .stdin(Stdio::null())
            .spawn()
            .expect("QEMU");
        let vm = Self { qemu, folder };
        let begun = Instant::now();
        while block_jobs::connect(&vm.socket()).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(30), "QEMU listens");
            std::thread::sleep(Duration::from_millis(10));
        }
        let nbd = vm.folder.join("nbd").display().to_string();
        let address = json!({ "addr": { "type": "unix", "data": { "path": nbd } } });
        vm.ask("nbd-server-start", address);
        let export = json!({ "type": "nbd", "id": "e", "node-name": "disk", "name": "disk", "writable": true });
        vm.ask("block-export-add", export);
        vm
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.join("qmp")
    }

    pub fn ask(&self, command: &str, arguments: Value) -> Value {
        let mut qmp = block_jobs::connect(&self.socket()).expect("QMP");
        qmp.execute(command, arguments).expect("answered")
    }

    /// The node that the disk is written through now.
    pub fn active_node(&self) -> String {
        let exports = self.ask("query-block-exports", json!({}));
        assert_eq!(exports.as_array().map(Vec::len), Some(1), "{exports}");
        exports[0]["node-name"].as_str().expect("a name").to_owned()
    }

    /// Ends it in order: bitmaps are stored.
    pub fn quit(mut self) {
        let mut qmp = block_jobs::connect(&self.socket()).expect("QMP");
        qmp.execute::<Value>("quit", json!({})).expect("quits");
        self.qemu.wait().expect("ends");
        self.clean();
    }

    pub fn kill(&mut self) {
        self.qemu.kill().expect("killed");
        self.qemu.wait().expect("ends");
        self.clean();
    }

    fn clean(&self) {
        for name in ["qmp", "nbd"] {
            let path = self.folder.join(name);
            if path.exists() {
                fs::remove_file(path).expect("removed");
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        drop(self.qemu.kill());
        drop(self.qemu.wait());
    }
}

/// Writes to the disk until it is stopped, and knows what it wrote.
pub struct Writer {
    qemu_io: Child,
    /// Pattern, and where: 64 KiB each.
    written: Vec<(u8, usize)>,
    /// The number of the first piece: others are written elsewhere, with other patterns.
    pub first: usize,
}

pub const PIECE: usize = 64 << 10;

impl Writer {
    /// One that is connected: QEMU 7.2 may hang when somebody connects while it holds the disk.
    pub fn start(vm: &Vm) -> Self {
        let nbd = format!("nbd+unix:///disk?socket={}/nbd", vm.folder.display());
        let told = vm.folder.join("writer");
        let stdout = fs::File::create(&told).expect("made");
        let mut qemu_io = Command::new("qemu-io")
            .args(["-f", "raw", &nbd])
            .stdin(Stdio::piped())
            .stdout(stdout)
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-io");
        let stdin = qemu_io.stdin.as_mut().expect("piped");
        writeln!(stdin, "read 0 512").expect("qemu-io runs");
        let begun = Instant::now();
        while !fs::read_to_string(&told)
            .expect("text")
            .contains("read 512")
        {
            assert!(begun.elapsed() < Duration::from_secs(30), "it connects");
            std::thread::sleep(Duration::from_millis(2));
        }
        Self {
            qemu_io,
            written: Vec::new(),
            first: 0,
        }
    }

    /// Writes one piece somewhere.
    pub fn write(&mut self) {
        let number = self.first + self.written.len();
        let pattern = 100 + u8::try_from(number % 100).expect("small");
        let at = (number * 37 % 128) * PIECE;
        let stdin = self.qemu_io.stdin.as_mut().expect("piped");
        writeln!(stdin, "write -P {pattern} {at} {PIECE}").expect("qemu-io runs");
        self.written.push((pattern, at));
    }

    /// Waits until everything is written, and says what the disk has now.
    pub fn finish(mut self, disk: &[u8]) -> Vec<u8> {
        let mut stdin = self.qemu_io.stdin.take().expect("piped");
        stdin.write_all(b"flush\nquit\n").expect("qemu-io runs");
        drop(stdin);
        assert!(self.qemu_io.wait().expect("ends").success());
        let mut disk = disk.to_vec();
        for (pattern, at) in &self.written {
            disk[*at..at + PIECE].fill(*pattern);
        }
        disk
    }
}

/// Merges while the disk is written to.
pub fn merge_under_load(
    world: &mut World,
    vm: &Vm,
    request: &MergeRequest,
) -> stead_merge::LiveReport {
    merge_under(world, Writer::start(vm), request)
}

/// As [`merge_under_load`], by a writer that is connected already.
pub fn merge_under(
    world: &mut World,
    writer: Writer,
    request: &MergeRequest,
) -> stead_merge::LiveReport {
    let writer = Mutex::new(writer);
    let tell = |_: Event| writer.lock().expect("lock").write();
    let watch = Watch {
        tell: &tell,
        cancel: None,
    };
    let report = run_live(request, watch).expect("merged");
    world.disk = writer.into_inner().expect("lock").finish(&world.disk);
    report
}

/// For the VM that runs on a world.
pub fn live(world: &World) -> MergeRequest {
    MergeRequest {
        qmp: Some(world.dir.path().join("qmp")),
        ..world.request()
    }
}

/// Bitmaps of a layer, by what its file says, that a backup could use.
pub fn usable(path: &Path) -> Vec<String> {
    let stored = Layer::inspect(path).expect("whole").stored_bitmaps();
    let stored = stored.expect("readable");
    let usable = stored.iter().filter(|one| !one.in_use && one.auto);
    let mut names: Vec<String> = usable
        .map(|one| String::from_utf8_lossy(&one.name).into_owned())
        .collect();
    names.sort();
    names
}
