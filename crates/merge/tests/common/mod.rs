//! Chains made by qemu-img, and what a backup would make of them.

#![allow(dead_code, reason = "each test file uses a part of this")]
#![allow(
    clippy::disallowed_methods,
    reason = "copies of images in tests need not be durable"
)]

pub mod vm;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use stead_merge::{Event, MergeRequest, Watch};
use stead_qcow2::{Bitmap, Chain, LayerFile, LayerFormat, OpenPolicy};

/// Runs a shell line that must succeed, and gives its output.
pub fn sh(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().expect("sh");
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{line}\n{out}{err}");
    out.into_owned()
}

/// A watch that hears nothing.
pub fn silent() -> Watch<'static> {
    Watch {
        tell: &|_: Event| {},
        cancel: None,
    }
}

pub fn open(active: &Path) -> Chain {
    let file = LayerFile {
        path: active.to_owned(),
        format: LayerFormat::Qcow2,
    };
    Chain::open_following(&file, &OpenPolicy::NAMES).expect("a whole chain")
}

pub fn content(active: &Path) -> Vec<u8> {
    let chain = open(active);
    let mut bytes = vec![0; usize::try_from(chain.len()).expect("small")];
    chain.read_at(0, &mut bytes).expect("readable");
    bytes
}

/// The bitmap of a chain: that of the active layer and of those below it without a gap. `None` where a backup
/// program has nothing to rely on.
pub fn bitmap(active: &Path, name: &str) -> Option<Bitmap> {
    let chain = open(active);
    let mut all: Option<Bitmap> = None;
    for layer in (0..chain.depth()).map_while(|index| chain.layer(index)) {
        let stored = layer.stored_bitmaps().expect("whole");
        let Some(stored) = stored.into_iter().find(|one| one.name == name.as_bytes()) else {
            break;
        };
        if stored.in_use || !stored.auto {
            return None;
        }
        let bits = layer.read_bitmap(&stored).expect("usable");
        match &mut all {
            Some(all) => all.merge(&bits),
            None => all = Some(bits),
        }
    }
    all
}

/// What a full backup and the increment that the bitmap names make together.
pub fn restored(full: &[u8], active: &Path, name: &str) -> Option<Vec<u8>> {
    let bits = bitmap(active, name)?;
    let disk = content(active);
    let mut restored = full.to_vec();
    restored.resize(disk.len(), 0);
    for range in bits.dirty_ranges() {
        let [from, to] = [range.start, range.end].map(|at| usize::try_from(at).expect("small"));
        restored[from..to].copy_from_slice(&disk[from..to]);
    }
    Some(restored)
}

/// active → child → top → mid → base, with bitmaps that are shared, stale and of the upper layers only.
pub struct World {
    pub dir: tempfile::TempDir,
    pub disk: Vec<u8>,
    /// What the disk was when each bitmap began.
    pub fulls: Vec<(&'static str, Vec<u8>)>,
}

pub const LAYERS: [&str; 5] = ["active", "child", "top", "mid", "base"];

impl World {
    pub fn new(options: &str) -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let at = dir.path().display().to_string();
        let create = |name: &str, below: Option<&str>| {
            let size = if below.is_none() { "8M" } else { "" };
            let below = below.map(|below| format!("-b {below}.qcow2 -F qcow2"));
            let below = below.unwrap_or_default();
            sh(&format!(
                "cd {at} && qemu-img create -q -f qcow2 {options} {below} {name}.qcow2 {size}"
            ));
        };
        let add = |image: &str, name: &str| {
            sh(&format!(
                "cd {at} && qemu-img bitmap --add {image}.qcow2 {name}"
            ));
        };
        let write = |image: &str, commands: &[&str]| {
            let commands: Vec<String> = commands.iter().map(|one| format!("-c '{one}'")).collect();
            sh(&format!(
                "cd {at} && qemu-io -f qcow2 {} {image}.qcow2",
                commands.join(" ")
            ));
        };
        let at_path = |image: &str| dir.path().join(format!("{image}.qcow2"));
        create("base", None);
        write("base", &["write -P 1 0 2M", "write -P 1 4M 3M"]);
        for name in ["shared", "stale-1", "stale-2"] {
            add("base", name);
        }
        let shared = content(&at_path("base"));
        write("base", &["write -P 2 1M 2M"]);
        create("mid", Some("base"));
        add("mid", "shared");
        write("mid", &["write -P 3 2M 2M"]);
        create("top", Some("mid"));
        add("top", "shared");
        add("top", "late");
        let late = content(&at_path("top"));
        write(
            "top",
            &[
                "write -P 4 512k 512k",
                "write -z 3M 512k",
                "write -P 4 5M 1M",
            ],
        );
        for (name, below, command) in [
            ("child", "top", "write -P 5 6M 1M"),
            ("active", "child", "write -P 6 7M 200k"),
        ] {
            create(name, Some(below));
            add(name, "shared");
            add(name, "late");
            write(name, &[command]);
        }
        let disk = content(&at_path("active"));
        Self {
            disk,
            fulls: vec![("shared", shared), ("late", late)],
            dir,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.qcow2"))
    }

    pub fn request(&self) -> MergeRequest {
        MergeRequest {
            chain: self.path("active"),
            top: Some(self.path("top")),
            base: Some(self.path("base")),
            records: self.dir.path().join("records"),
            ..MergeRequest::default()
        }
    }

    pub fn record(&self) -> PathBuf {
        self.dir.path().join(".base.qcow2.stead-merge")
    }

    /// Keeps all images, to be brought back by [`World::back`].
    pub fn keep(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let all = LAYERS.iter().map(|name| self.path(name));
        all.map(|path| (path.clone(), fs::read(&path).expect("there")))
            .collect()
    }

    pub fn back(&self, kept: &[(PathBuf, Vec<u8>)]) {
        for (path, bytes) in kept {
            fs::write(path, bytes).expect("written");
        }
        if self.record().exists() {
            fs::remove_file(self.record()).expect("removed");
        }
    }

    /// The disk is what it was, and every bitmap brings its full backup up to date.
    pub fn require_whole(&self, story: &str) {
        let active = self.path("active");
        assert!(content(&active) == self.disk, "another disk: {story}");
        for (name, full) in &self.fulls {
            let restored = restored(full, &active, name);
            let restored = restored.unwrap_or_else(|| panic!("{name} is gone: {story}"));
            assert!(restored == self.disk, "{name} says too little: {story}");
        }
        for name in LAYERS {
            let path = self.path(name);
            if path.exists() {
                sh(&format!("qemu-img check -q -f qcow2 {}", path.display()));
            }
        }
    }
}

/// A block device over a file, while root can have one.
pub struct Loop {
    pub device: PathBuf,
    file: tempfile::NamedTempFile,
}

impl Loop {
    /// `None` where loop devices cannot be had.
    pub fn new(bytes: u64) -> Option<Self> {
        let file = tempfile::NamedTempFile::new_in(shared_memory()).expect("temp file");
        file.as_file().set_len(bytes).expect("length");
        let made = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(file.path())
            .output();
        let made = made.ok().filter(|made| made.status.success())?;
        let device = String::from_utf8(made.stdout).expect("text");
        Some(Self {
            device: PathBuf::from(device.trim()),
            file,
        })
    }

    /// Another length, as `lvextend` gives it.
    pub fn resize(&self, bytes: u64) {
        self.file.as_file().set_len(bytes).expect("length");
        sh(&format!("losetup -c {}", self.device.display()));
    }

    pub fn backing(&self) -> &Path {
        self.file.path()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("-d").arg(&self.device).status();
        assert!(
            detached.is_ok_and(|status| status.success()),
            "the loop device is detached"
        );
    }
}

/// A small file system in the place of a world's folder.
pub struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    /// `None` where one cannot be had.
    pub fn over(folder: &'a Path, bytes: u64) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o"])
            .arg(format!("size={bytes}"));
        let mounted = mount.arg("tmpfs").arg(folder).status().ok()?;
        mounted.success().then_some(Self(folder))
    }

    /// Leaves so many bytes free.
    pub fn fill(&self, leave: u64) {
        let free = stead_sys::space::available_bytes(self.0).expect("free");
        let length = usize::try_from(free.saturating_sub(leave)).expect("small");
        fs::write(self.0.join("filler"), vec![1; length]).expect("filled");
    }

    pub fn make_room(&self) {
        fs::remove_file(self.0.join("filler")).expect("removed");
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        // A test that failed may still have files open there.
        drop(Command::new("umount").arg("-l").arg(self.0).status());
    }
}

pub fn shared_memory() -> PathBuf {
    let shm = PathBuf::from("/dev/shm");
    if shm.is_dir() {
        shm
    } else {
        std::env::temp_dir()
    }
}

/// The flags that qemu-img shows for a bitmap.
pub fn qemu_flags(image: &Path, name: &str) -> Option<Vec<String>> {
    let text = sh(&format!(
        "qemu-img info -f qcow2 --output=json {}",
        image.display()
    ));
    let info: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let all = info["format-specific"]["data"]["bitmaps"]
        .as_array()?
        .clone();
    let one = all.into_iter().find(|one| one["name"] == name)?;
    let flags = one["flags"].as_array()?.iter();
    Some(
        flags
            .filter_map(|flag| flag.as_str().map(str::to_owned))
            .collect(),
    )
}
