//! Disks made and written by QEMU's tools, and what their backups must show.

#![allow(dead_code, reason = "each test file uses a part of this")]
#![allow(
    clippy::disallowed_methods,
    reason = "files of tests need not be durable"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use stead_backup::{
    BackupError, BackupReport, BackupRequest, DiskSource, Event, RestoreFormat, RestoreRequest,
    Wanted, Watch, restore, run, verify,
};

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

/// A disk and a folder of backups.
pub struct World {
    pub dir: tempfile::TempDir,
    pub disk: PathBuf,
    pub folder: PathBuf,
}

impl World {
    /// A disk of 8 MiB with some data in it.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        let world = Self {
            disk: dir.path().join("disk.qcow2"),
            folder: dir.path().join("backups"),
            dir,
        };
        let disk = world.disk.display();
        sh(&format!("qemu-img create -q -f qcow2 {disk} 8M"));
        world.io(&["write -P 1 0 3M", "write -P 2 5M 100k"]);
        world
    }

    /// Commands of qemu-io on the disk.
    pub fn io(&self, commands: &[&str]) {
        io(&self.disk, commands);
    }

    pub fn request(&self, wanted: Wanted) -> BackupRequest {
        BackupRequest {
            disk: DiskSource::Image(self.disk.clone()),
            bitmap: "daily".into(),
            to: self.folder.clone(),
            wanted,
            compress: true,
        }
    }

    pub fn backup(&self, wanted: Wanted) -> Result<BackupReport, BackupError> {
        run(&self.request(wanted), silent())
    }

    /// What the guest sees, as QEMU says.
    pub fn content(&self) -> Vec<u8> {
        content(&self.disk)
    }

    /// The bytes of a backup's disk.
    pub fn restored(&self, id: &str) -> Result<Vec<u8>, BackupError> {
        let to = self.dir.path().join("restored.raw");
        let request = RestoreRequest {
            from: self.folder.clone(),
            backup: id.to_owned(),
            to: to.clone(),
            format: RestoreFormat::Raw,
            replace: true,
        };
        restore(&request, silent())?;
        Ok(fs::read(&to).expect("there"))
    }

    pub fn require(&self, id: &str, expected: &[u8], story: &str) {
        let found = self.restored(id);
        let found = found.unwrap_or_else(|error| panic!("{story}: {error}"));
        assert!(found == expected, "another disk is restored: {story}");
    }

    pub fn require_all_whole(&self, story: &str) {
        for verdict in verify(&self.folder, None, silent()).expect("readable") {
            assert!(verdict.whole, "{story}: {verdict:?}");
        }
    }

    pub fn bitmaps(&self) -> Vec<String> {
        bitmaps(&self.disk)
    }

    /// The files in the folder, with their bytes.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let Ok(entries) = fs::read_dir(&self.folder) else {
            return Vec::new();
        };
        let paths = entries.map(|entry| entry.expect("listed").path());
        let mut files: Vec<_> = paths
            .filter(|path| !path.ends_with(".lock"))
            .map(|path| (path.clone(), fs::read(&path).expect("there")))
            .collect();
        files.sort();
        files
    }
}

pub fn io(image: &Path, commands: &[&str]) {
    let commands: Vec<String> = commands.iter().map(|one| format!("-c '{one}'")).collect();
    sh(&format!(
        "qemu-io -f qcow2 {} {}",
        commands.join(" "),
        image.display()
    ));
}

pub fn content(image: &Path) -> Vec<u8> {
    let raw = image.with_extension("content");
    sh(&format!(
        "qemu-img convert -f qcow2 -O raw {} {}",
        image.display(),
        raw.display()
    ));
    let bytes = fs::read(&raw).expect("there");
    fs::remove_file(&raw).expect("removed");
    bytes
}

/// The names of the bitmaps that QEMU finds, and whether each can be used.
pub fn bitmaps(image: &Path) -> Vec<String> {
    let info = sh(&format!(
        "qemu-img info --output=json -f qcow2 {}",
        image.display()
    ));
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    let all = info["format-specific"]["data"]["bitmaps"].as_array();
    let name = |bitmap: &serde_json::Value| bitmap["name"].as_str().map(str::to_owned);
    all.map(|all| all.iter().filter_map(name).collect())
        .unwrap_or_default()
}
