//! Images to try things with.
#![allow(dead_code, reason = "each test file uses some of it")]
#![allow(
    clippy::disallowed_methods,
    reason = "tests make files that nobody needs after them"
)]

pub mod streams;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use stead_save_image::{Appears, Control, Format, NewImage, SaveImage, SaveImageError, Writer};

pub const XML: &str = "<domain type='qemu'>\n  <name>web</name>\n</domain>\n";
pub const COOKIE: &str = "<qemusavecookie/>";

/// A migration stream that QEMU 7.2 wrote: 64 MiB of RAM, a q35.
pub fn stream() -> &'static [u8] {
    static STREAM: OnceLock<Vec<u8>> = OnceLock::new();
    STREAM.get_or_init(streams::golden)
}

pub fn new_image(format: Format) -> NewImage {
    NewImage {
        xml: XML.to_owned(),
        cookie: Some(COOKIE.to_owned()),
        was_running: true,
        format,
        payload_bytes: 0,
        mode: 0o600,
    }
}

pub fn write(path: &Path, format: Format) {
    write_stream(path, format, stream());
}

pub fn write_stream(path: &Path, format: Format, stream: &[u8]) {
    let image = new_image(format);
    let mut writer =
        Writer::create(path, &image, Appears::AtOnce, Control::silent()).expect("create");
    let copied = writer.copy_from(stream).expect("copy");
    assert_eq!(copied, stream.len() as u64);
    writer.finish().expect("finish");
}

/// An image as libvirt lays it out: no record, and a payload that starts anywhere.
pub fn foreign(format: u32, payload: &[u8], big_endian: bool) -> Vec<u8> {
    let data_length = (XML.len() + 1 + COOKIE.len() + 1 + 65536) as u32;
    let numbers = [2, data_length, 1, format, XML.len() as u32 + 1];
    let mut bytes = b"LibvirtQemudSave".to_vec();
    for number in numbers {
        bytes.extend(if big_endian {
            number.to_be_bytes()
        } else {
            number.to_le_bytes()
        });
    }
    bytes.resize(92, 0);
    bytes.extend(XML.as_bytes());
    bytes.push(0);
    bytes.extend(COOKIE.as_bytes());
    bytes.push(0);
    bytes.resize(92 + data_length as usize, 0);
    bytes.extend(payload);
    bytes
}

/// Whether the image opens and is whole in everything that can be known of it.
pub fn whole(path: &Path) -> Result<(), SaveImageError> {
    SaveImage::open(path)?
        .verify(&Control::silent())?
        .require_whole()
        .map(drop)
}

pub struct Scratch(pub tempfile::TempDir);

impl Scratch {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("temp dir"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).expect("write");
        path
    }

    /// The names of all files, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).expect("list");
        let mut names: Vec<_> = entries
            .map(|entry| {
                entry
                    .expect("entry")
                    .file_name()
                    .into_string()
                    .expect("a name")
            })
            .collect();
        names.sort();
        names
    }
}

/// The same numbers in every run.
pub struct Chance(pub u64);

impl Chance {
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}
