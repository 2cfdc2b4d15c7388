//! Small file systems of a test's own: full, read-only or sharing blocks when the test wants it.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system, unmounted at the end.
#[derive(Debug)]
pub struct Mount {
    folder: PathBuf,
    image: Option<PathBuf>,
}

impl Mount {
    /// A tmpfs of so many bytes on `folder`.
    pub fn tmpfs(folder: &Path, bytes: u64) -> Self {
        stead_sys::durable::create_dir(folder, 0o711).expect("folder");
        let options = format!("size={bytes},mode=0711");
        run(
            "mount",
            [
                "-t".as_ref(),
                "tmpfs".as_ref(),
                "-o".as_ref(),
                options.as_ref(),
                "tmpfs".as_ref(),
                folder.as_os_str(),
            ],
        );
        Self {
            folder: folder.to_owned(),
            image: None,
        }
    }

    /// A file system made by `mkfs` (`mkfs.ext4`, `mkfs.xfs`) in a sparse file of so many bytes beside `folder`.
    pub fn image(folder: &Path, mkfs: &str, bytes: u64) -> Self {
        stead_sys::durable::create_dir(folder, 0o711).expect("folder");
        let image = folder.with_extension("img");
        stead_sys::durable::remove_file(&image).expect("remove an earlier image");
        let file = stead_sys::durable::create_scratch(&image, 0o600).expect("image");
        file.set_len(bytes).expect("size");
        run(mkfs, ["-q".as_ref(), image.as_os_str()]);
        run(
            "mount",
            [
                "-o".as_ref(),
                "loop".as_ref(),
                image.as_os_str(),
                folder.as_os_str(),
            ],
        );
        Self {
            folder: folder.to_owned(),
            image: Some(image),
        }
    }

    /// The folder it is mounted on.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Allows no writing any more, or allows it again.
    pub fn set_read_only(&self, read_only: bool) {
        let options = if read_only {
            "remount,ro"
        } else {
            "remount,rw"
        };
        run(
            "mount",
            ["-o".as_ref(), options.as_ref(), self.folder.as_os_str()],
        );
    }

    /// Bytes that may still be written.
    pub fn available_bytes(&self) -> u64 {
        stead_sys::space::available_bytes(&self.folder).expect("ask for room")
    }

    /// Fills it until only so many bytes are left; removing the file gives the room back.
    pub fn fill(&self, leave_bytes: u64) -> PathBuf {
        use std::io::Write;
        const BLOCK: usize = 1 << 20;
        let path = self.folder.join("filler");
        let mut file = stead_sys::durable::create_scratch(&path, 0o600).expect("filler");
        let block = vec![0xa5; BLOCK];
        while self.available_bytes() > leave_bytes + BLOCK as u64 {
            file.write_all(&block).expect("fill");
        }
        path
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a failed test may leave a process that works in it.
        let status = Command::new("umount").arg("-l").arg(&self.folder).status();
        if !status.as_ref().is_ok_and(std::process::ExitStatus::success) {
            eprintln!("unmount {}: {status:?}", self.folder.display());
        }
        if let Some(image) = &self.image
            && let Err(error) = fs::remove_file(image)
        {
            eprintln!("remove {}: {error}", image.display());
        }
    }
}

fn run<const N: usize>(program: &str, arguments: [&OsStr; N]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect(program);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
