//! Makes what the fuzzers of save images begin with: one small image of every kind. Sparse ones have a mebibyte at
//! least, which is too much for a fuzzer; the tests change them.
//!
//! They are in the repository (`fuzz/seeds/save_image`), so this is only run when a kind is added. A seed that is
//! there is left as it is.
//!
//!     cargo run -p stead-save-image --example fuzz_seeds fuzz/seeds/save_image
#![allow(
    clippy::disallowed_methods,
    reason = "seeds are files like any that a developer adds"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::io::Read;
use std::path::{Path, PathBuf};

use common::{Scratch, foreign, streams};
use stead_save_image::{Format, SaveImage};
use stead_sys::durable::{self, Existing};

fn main() {
    let folder = PathBuf::from(std::env::args().nth(1).expect("usage: fuzz_seeds FOLDER"));
    durable::create_dir(&folder, 0o755).expect("folder");
    let scratch = Scratch::new();
    let own = scratch.path("own");
    let stream = streams::tiny();
    for format in Format::ALL.into_iter().filter(|format| format.is_stream()) {
        common::write_stream(&own, format, &stream);
        let image = SaveImage::open(&own).expect("an image");
        let mut payload = Vec::new();
        image.payload().read_to_end(&mut payload).expect("read");
        let bytes = short(&foreign(format.number(), &payload, false), &payload);
        put(&folder, format.name(), &bytes);
        if format == Format::Zstd {
            put(&folder, "recorded", &std::fs::read(&own).expect("read"));
            put(
                &folder,
                "other-byte-order",
                &foreign(format.number(), &payload, true),
            );
        }
        durable::remove_file(&own).expect("remove");
    }
}

/// The image without the padding that only libvirt's own edits need: a fuzzer changes it often enough.
fn short(image: &[u8], payload: &[u8]) -> Vec<u8> {
    let texts = 92 + common::XML.len() + 1 + common::COOKIE.len() + 1;
    let mut bytes = image[..texts].to_vec();
    let data = u32::try_from(texts - 92).expect("short");
    bytes[20..24].copy_from_slice(&data.to_le_bytes());
    bytes.extend(payload);
    bytes
}

fn put(folder: &Path, name: &str, bytes: &[u8]) {
    let path = folder.join(name);
    if !path.exists() {
        durable::publish(&path, 0o644, bytes, Existing::Keep).expect("write");
    }
}
