//! The initial RAM disk: the agent as `/init`, the modules it loads, and nothing else.
//!
//! It is stored uncompressed: two megabytes load in no time, and a guest without hardware
//! acceleration would unpack them slowly.
//!
//! # Source
//! Linux `Documentation/driver-api/early-userspace/buffer-format.rst` (cpio newc).

use std::collections::BTreeSet;
use std::io::{self, Write as _};

use cpio::newc::{Builder, ModeFileType, trailer};

use crate::kernel::Module;

/// The kernel finds the end of an archive by its trailer; the padding is what cpio's own tools write.
const BLOCK_BYTES: usize = 512;
/// The folders that `/init` mounts on or reads from.
const FOLDERS: [&str; 4] = ["dev", "modules", "proc", "sys"];
/// The console's device number: where `/init` writes before it has mounted `/dev`.
const CONSOLE: (u32, u32) = (5, 1);

/// The archive with `agent` as `/init`, and `modules` under `/modules` with their order in
/// `/modules/order`, one file name a line. The same input gives the same bytes.
///
/// # Errors
/// When a file is larger than the format can say (4 GiB).
pub(crate) fn archive(agent: &[u8], modules: &[Module]) -> io::Result<Vec<u8>> {
    let names: BTreeSet<&str> = modules
        .iter()
        .map(|module| module.file_name.as_str())
        .collect();
    assert_eq!(names.len(), modules.len(), "two modules of one name");
    let order: String = modules
        .iter()
        .map(|module| format!("{}\n", module.file_name))
        .collect();
    let mut archive = Archive::default();
    for folder in FOLDERS {
        archive.add(folder, &Entry::Folder)?;
    }
    archive.add("dev/console", &Entry::Console)?;
    archive.add("init", &Entry::Program(agent))?;
    archive.add("modules/order", &Entry::File(order.as_bytes()))?;
    for module in modules {
        archive.add(
            &format!("modules/{}", module.file_name),
            &Entry::File(&module.bytes),
        )?;
    }
    let mut bytes = trailer(archive.bytes)?;
    bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
    Ok(bytes)
}

#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

enum Entry<'a> {
    Folder,
    Console,
    Program(&'a [u8]),
    File(&'a [u8]),
}

impl Entry<'_> {
    fn content(&self) -> &[u8] {
        match self {
            Self::Folder | Self::Console => &[],
            Self::Program(bytes) | Self::File(bytes) => bytes,
        }
    }

    fn describe(&self, entry: Builder) -> Builder {
        match self {
            Self::Folder => entry
                .mode(0o755)
                .nlink(2)
                .set_mode_file_type(ModeFileType::Directory),
            Self::Console => entry
                .mode(0o600)
                .set_mode_file_type(ModeFileType::Char)
                .rdev_major(CONSOLE.0)
                .rdev_minor(CONSOLE.1),
            Self::Program(_) => entry.mode(0o755).set_mode_file_type(ModeFileType::Regular),
            Self::File(_) => entry.mode(0o644).set_mode_file_type(ModeFileType::Regular),
        }
    }
}

impl Archive {
    fn add(&mut self, path: &str, entry: &Entry<'_>) -> io::Result<()> {
        let size = u32::try_from(entry.content().len()).map_err(io::Error::other)?;
        self.entries += 1;
        let described = entry.describe(Builder::new(path).ino(self.entries).nlink(1));
        let mut writer = described.write(std::mem::take(&mut self.bytes), size);
        writer.write_all(entry.content())?;
        self.bytes = writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpio::newc::Reader;
    use std::io::Read as _;

    fn module(name: &str, bytes: &[u8]) -> Module {
        Module {
            file_name: name.to_owned(),
            bytes: bytes.to_vec(),
        }
    }

    #[test]
    fn the_archive_holds_the_agent_the_modules_and_their_order() {
        let modules = [module("b.ko", b"first"), module("a.ko", b"second!")];
        let bytes = archive(b"agent", &modules).expect("small files");
        assert_eq!(
            bytes,
            archive(b"agent", &modules).expect("small files"),
            "not reproducible"
        );
        let mut found = Vec::new();
        let mut rest = bytes.as_slice();
        loop {
            let mut reader = Reader::new(rest).expect("an entry");
            if reader.entry().is_trailer() {
                break;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut content = Vec::new();
            reader.read_to_end(&mut content).expect("content");
            rest = reader.finish().expect("next entry");
            found.push((name, mode, content));
        }
        let get = |name: &str| found.iter().find(|entry| entry.0 == name).expect(name);
        assert_eq!(get("init").1, 0o100_755);
        assert_eq!(get("init").2, b"agent");
        assert_eq!(get("modules").1, 0o040_755);
        assert_eq!(get("modules/order").2, b"b.ko\na.ko\n");
        assert_eq!(get("modules/a.ko").2, b"second!");
        assert_eq!(get("dev/console").1, 0o020_600);
        assert_eq!(found.len(), FOLDERS.len() + 5);
    }

    #[test]
    #[should_panic(expected = "two modules of one name")]
    fn two_modules_of_one_name_are_our_own_mistake() {
        drop(archive(
            b"agent",
            &[module("a.ko", b"1"), module("a.ko", b"2")],
        ));
    }
}
