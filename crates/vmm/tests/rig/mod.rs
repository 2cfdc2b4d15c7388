//! Real VMs for the tests: a guest of one boot sector that counts, checks its own memory and disk, and
//! says so on its serial port (`tests/guest/counter.s`).

#![allow(dead_code, reason = "each test file uses a part of this")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use stead_vmm::{
    Accelerator, CaptureRequest, Disk, DiskChain, Launch, Layer, LayerFormat, Machine, NewOverlay,
    ProcessId, Qemu, Ram, RamSharing, STATE_BYTES_MAX, Vm,
};

const GUEST: &[u8; 512] = include_bytes!("../guest/counter.bin");
/// Where the guest's sector holds how many pages it fills.
const PAGES_AT: usize = 0x1f0;
/// Where the guest's RAM holds its counter.
const COUNTER_AT: u64 = 0x8000;
/// Where its disk holds it.
const DISK_COUNTER_AT: u64 = 512;
pub const DISK_BYTES: u64 = 64 << 20;
pub const MIB: u64 = 1 << 20;

pub struct Rig {
    pub folder: tempfile::TempDir,
    pub qemu: Qemu,
    pub memory_bytes: u64,
    pub disks: Vec<String>,
    pages: u32,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(128 * MIB, 4096, &["vda"])
    }

    /// `pages` of 4 KiB are what the guest fills, from 16 MiB on.
    pub fn with(memory_bytes: u64, pages: u32, disks: &[&str]) -> Self {
        Self {
            folder: tempfile::tempdir().expect("temp dir"),
            qemu: Qemu::detect(None).expect("QEMU is installed"),
            memory_bytes,
            disks: disks.iter().map(|id| (*id).to_owned()).collect(),
            pages,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A raw base with the guest for `vda`, an empty one for the others.
    pub fn base(&self, disk: &str) -> PathBuf {
        let path = self.path(&format!("{disk}.base"));
        if !path.exists() {
            let file = create(&path, DISK_BYTES);
            if disk == "vda" {
                let mut sector = *GUEST;
                sector[PAGES_AT..PAGES_AT + 4].copy_from_slice(&self.pages.to_le_bytes());
                file.write_all_at(&sector, 0).expect("write the guest");
            }
        }
        path
    }

    /// An empty overlay named `name`; its header names `below`, so that qemu-img can read the chain.
    pub fn overlay(&self, name: &str, below: &Path, format: &str) -> PathBuf {
        let path = self.path(name);
        let below = below.to_str().expect("UTF-8");
        let made = path.to_str().expect("UTF-8");
        run(
            "qemu-img",
            &[
                "create", "-q", "-f", "qcow2", "-b", below, "-F", format, made,
            ],
        );
        path
    }

    /// Overlays above the present tops, as a capture takes them.
    pub fn next_overlays(&self, vm: &mut Vm, tag: &str) -> Vec<NewOverlay> {
        let chains = vm.disks().expect("chains");
        chains
            .iter()
            .map(|chain| NewOverlay {
                disk: chain.disk.clone(),
                path: self.overlay(&format!("{}.{tag}", chain.disk), &chain.top().path, "qcow2"),
            })
            .collect()
    }

    pub fn ram(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        if !path.exists() {
            drop(create(&path, self.memory_bytes));
        }
        path
    }

    pub fn machine(&self) -> Machine {
        Machine {
            qemu_version: self.qemu.version(),
            machine_type: self.qemu.default_machine_type().expect("q35").to_owned(),
            cpu_model: "Westmere-v1,+rdrand".to_owned(),
            cpus: 1,
            memory_bytes: self.memory_bytes,
            accelerator: Accelerator::Tcg,
            disks: self.disks.clone(),
            agent_ports: 8,
        }
    }

    /// A fresh machine with its own overlays.
    pub fn launch(&self, name: &str) -> Launch {
        let chain = |disk: &String| {
            let base = self.base(disk);
            let top = self.overlay(&format!("{disk}.{name}"), &base, "raw");
            vec![
                layer(&base, LayerFormat::Raw),
                layer(&top, LayerFormat::Qcow2),
            ]
        };
        let chains = self.disks.iter().map(chain).collect();
        self.launch_on(
            name,
            &self.ram(&format!("{name}.ram")),
            RamSharing::Shared,
            chains,
        )
    }

    pub fn launch_on(
        &self,
        name: &str,
        ram: &Path,
        sharing: RamSharing,
        chains: Vec<Vec<Layer>>,
    ) -> Launch {
        let ids = self.disks.iter().cloned();
        Launch {
            machine: self.machine(),
            name: name.to_owned(),
            dir: self.path(&format!("{name}.vm")),
            ram: Ram {
                path: ram.to_owned(),
                sharing,
            },
            disks: ids
                .zip(chains)
                .map(|(id, chain)| Disk { id, chain })
                .collect(),
            boot: None,
            run_as: None,
        }
    }

    /// A machine over what lies below the tops of `chains`, each disk with a new overlay.
    pub fn fork(
        &self,
        name: &str,
        ram: &Path,
        sharing: RamSharing,
        chains: &[DiskChain],
    ) -> Launch {
        let chain = |disk: &String| {
            let captured = chains.iter().find(|c| &c.disk == disk).expect("the disk");
            let frozen = &captured.layers[..captured.layers.len() - 1];
            let mut layers: Vec<Layer> = frozen.iter().map(|l| layer(&l.path, l.format)).collect();
            let below = &layers.last().expect("a frozen layer").path;
            let top = self.overlay(&format!("{disk}.{name}"), below, "qcow2");
            layers.push(layer(&top, LayerFormat::Qcow2));
            layers
        };
        let chains = self.disks.iter().map(chain).collect();
        self.launch_on(name, ram, sharing, chains)
    }

    /// Boots a guest and waits until it counts.
    pub fn boot(&self, name: &str) -> (Vm, Launch) {
        let launch = self.launch(name);
        let mut vm = launch.boot(&self.qemu).expect("boot");
        vm.resume().expect("resume");
        wait_count(&vm, 5);
        (vm, launch)
    }
}

/// A test that fails must not leave its VMs behind.
impl Drop for Rig {
    fn drop(&mut self) {
        let entries = fs::read_dir("/proc").expect("/proc");
        for entry in entries.flatten() {
            let inside = fs::read_link(entry.path().join("cwd"))
                .is_ok_and(|folder| folder.starts_with(self.folder.path()));
            let pid = entry.file_name().to_string_lossy().parse();
            if let (true, Ok(pid)) = (inside, pid)
                && let Ok(process) = ProcessId::of(pid)
            {
                drop(process.kill());
            }
        }
    }
}

pub fn layer(path: &Path, format: LayerFormat) -> Layer {
    Layer {
        path: path.to_owned(),
        format,
    }
}

pub fn create(path: &Path, length: u64) -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .expect("create");
    file.set_len(length).expect("set the length");
    file
}

pub fn request<'a>(overlays: &'a [NewOverlay], ram: &'a File) -> CaptureRequest<'a> {
    CaptureRequest {
        overlays,
        ram: Some(ram),
        state_bytes_max: STATE_BYTES_MAX,
        at: &|_| std::ops::ControlFlow::Continue(()),
    }
}

/// Every count the guest has printed. Panics if it complains about its memory or disk.
pub fn counts(folder: &Path) -> Vec<u32> {
    let said = fs::read_to_string(folder.join(stead_vmm::dir::SERIAL_LOG)).expect("serial log");
    let whole_lines = said.rsplit_once('\n').map_or("", |(lines, _)| lines);
    assert!(
        !whole_lines.contains('M'),
        "the guest's memory changed: {said}"
    );
    assert!(
        !whole_lines.contains('D'),
        "the guest's disk failed: {said}"
    );
    whole_lines
        .lines()
        // A captured guest may have been in the middle of a line.
        .filter(|line| line.len() == 8)
        .map(|line| u32::from_str_radix(line, 16).expect("a count"))
        .collect()
}

/// Waits until the guest has counted to `least` and gives where it is.
pub fn wait_count(vm: &Vm, least: u32) -> u32 {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(count) = counts(vm.dir())
            .last()
            .copied()
            .filter(|count| *count >= least)
        {
            return count;
        }
        assert!(
            Instant::now() < until,
            "the guest does not count to {least}: {:?}",
            counts(vm.dir())
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Makes sure that the guest counts on from where it is now.
pub fn counts_on(vm: &Vm) {
    let now = counts(vm.dir()).last().copied().unwrap_or(0);
    wait_count(vm, now + 3);
}

pub fn counter_in_ram(ram: &Path) -> u32 {
    counter(&File::open(ram).expect("open the RAM"), COUNTER_AT)
}

/// The counter on the disk that ends with `layer`, read by qemu-img. It takes the layer's locks: were
/// the layer still open for writing, it would fail.
pub fn counter_on_disk(layer: &Path) -> u32 {
    let flat = layer.with_extension("flat");
    let (from, to) = (
        layer.to_str().expect("UTF-8"),
        flat.to_str().expect("UTF-8"),
    );
    run(
        "qemu-img",
        &["convert", "-f", "qcow2", "-O", "raw", from, to],
    );
    let found = counter(&File::open(&flat).expect("open"), DISK_COUNTER_AT);
    fs::remove_file(&flat).expect("remove");
    found
}

fn counter(file: &File, at: u64) -> u32 {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, at)
        .expect("read the counter");
    u32::from_le_bytes(bytes)
}

/// The guest counts in RAM first and then writes the count to its disk.
pub fn assert_one_instant(ram: &Path, layer: &Path) -> u32 {
    check_image(layer);
    let (in_ram, on_disk) = (counter_in_ram(ram), counter_on_disk(layer));
    assert!(
        on_disk == in_ram || on_disk + 1 == in_ram,
        "RAM says {in_ram}, disk says {on_disk}"
    );
    in_ram
}

pub fn check_image(path: &Path) {
    run(
        "qemu-img",
        &["check", "-q", "-f", "qcow2", path.to_str().expect("UTF-8")],
    );
}

pub fn content(path: &Path) -> Vec<u8> {
    fs::read(path).expect("read")
}

pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("start");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
