//! Opening a file for reading whose name somebody else may have chosen.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// Opens a regular file or a block device for reading.
///
/// Anything else is refused without side effects: opening a named pipe would wait for a writer, and a
/// character device may never end.
///
/// # Errors
/// When there is no such file, it may not be read, or it is of another kind
/// ([`io::ErrorKind::InvalidInput`]).
pub fn open(path: &Path) -> io::Result<File> {
    // Without NONBLOCK the open itself could wait; on a regular file it changes nothing.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    require_image_kind(&file)?;
    Ok(file)
}

fn require_image_kind(file: &File) -> io::Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let kind = file.metadata()?.file_type();
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "it is neither a regular file nor a block device",
    ))
}

/// Which file it is, whatever its name: device and inode.
///
/// # Errors
/// When the file cannot be asked.
pub fn identity(file: &File) -> io::Result<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    let metadata = file.metadata()?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_a_folder_and_a_character_device_are_refused_at_once() {
        let dir = tempfile::tempdir().expect("temp dir");
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.expect("mkfifo is installed").success());
        for path in [pipe.as_path(), dir.path(), Path::new("/dev/zero")] {
            let error = open(path).expect_err("refused");
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path:?}");
        }
        let file = dir.path().join("file");
        crate::durable::create_scratch(&file, 0o600).expect("create");
        open(&file).expect("a regular file");
    }
}
