//! What is done with any bytes as a save image, by the fuzzers and by the tests that replay their inputs.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use stead_save_image::{Control, Report, SaveImage, SaveImageError, extract_to};

thread_local! {
    /// One file for all inputs: to create one costs more than to read it.
    static FILE: RefCell<Option<File>> = const { RefCell::new(None) };
}

/// Header, texts and record: what is known before the payload is read.
pub fn head(bytes: &[u8]) {
    if let Ok(image) = open(bytes) {
        let info = image.info();
        assert_eq!(info.xml_bytes, image.xml().len() as u64);
        assert!(info.payload_at < bytes.len() as u64, "a payload has a byte");
    }
}

/// Everything, the payload too.
pub fn image(bytes: &[u8]) {
    let Ok(report) = verified(bytes) else {
        return;
    };
    assert_eq!(report.whole, report.clone().require_whole().is_ok());
    if let (true, Some(hash), Ok(image)) = (report.whole, &report.stream_hash, open(bytes)) {
        let mut stream = blake3::Hasher::new();
        // What is whole comes out again, and is what it was said to be.
        extract_to(&image, &mut stream, &Control::silent()).expect("a whole image");
        assert_eq!(stream.finalize().to_hex().as_str(), hash);
    }
}

/// What a verification says of these bytes.
pub fn verified(bytes: &[u8]) -> Result<Report, SaveImageError> {
    open(bytes)?.verify(&Control::silent())
}

fn open(bytes: &[u8]) -> Result<SaveImage, SaveImageError> {
    let file = file_with(bytes).expect("a scratch file");
    SaveImage::from_file(file, Path::new("input"))
}

fn file_with(bytes: &[u8]) -> io::Result<File> {
    FILE.with_borrow_mut(|kept| {
        let file = match kept.take() {
            Some(file) => file,
            None => tempfile::tempfile()?,
        };
        file.set_len(0)?;
        file.write_all_at(bytes, 0)?;
        let copy = file.try_clone()?;
        *kept = Some(file);
        Ok(copy)
    })
}
