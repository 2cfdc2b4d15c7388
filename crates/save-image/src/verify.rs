//! Proving an image: every byte against its record, and the migration stream to its end mark.

use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde::Serialize;
use stead_migration_stream::{Error as StreamError, Options, StreamReport, walk, walk_mapped};

use crate::control::{Control, is_cancelled};
use crate::error::{Kind, Result, SaveImageError};
use crate::format::Format;
use crate::head::BLOCK_BYTES;
use crate::image::{Payload, Recorded, SaveImage};
use crate::record::{DiskContent, Record, hex, is_marked};
use crate::replay::Replay;
use crate::tree::{LEAF_LOG2_MAX, Leaves, Tree};

/// How far a record is looked for that is not where the header says, in bytes; all heads of ours are shorter.
const SEARCH_BYTES: u64 = 32 << 20;
/// Where a record says its own place, in bytes.
const OWN_PLACE: std::ops::Range<usize> = 24..32;
const STEP_BYTES: usize = 1 << 20;
/// The most ranges that are named one by one.
const RANGES_MAX: usize = 1000;

/// A part of the file that is not as it must be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// `head` (header, XML, cookie, padding, record), `payload` or `stream` (the payload's meaning).
    pub part: &'static str,
    /// The first byte of the range, from the beginning of the file.
    pub from: u64,
    /// The first byte behind it.
    pub to: u64,
    /// What is wrong.
    pub what: String,
}

/// What the migration stream holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StreamFacts {
    /// The machine type.
    pub machine_type: String,
    /// Bytes of the stream.
    pub bytes: u64,
    /// How many sections it has: devices and RAM.
    pub sections: usize,
    /// Bytes of RAM that the VM has.
    pub ram_bytes: u64,
}

/// The outcome of a verification.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The file.
    pub path: PathBuf,
    /// Whether its record or its structure proves it, and nothing is wrong with it.
    pub whole: bool,
    /// Whether it has a record.
    pub recorded: bool,
    /// What is wrong.
    pub damage: Vec<Damage>,
    /// What is proven.
    pub proven: Vec<String>,
    /// What could not be proven, and why.
    pub unproven: Vec<String>,
    /// What the stream holds, if it could be read.
    pub stream: Option<StreamFacts>,
    /// BLAKE3 of the stream, in hexadecimal, if it could be read.
    pub stream_hash: Option<String>,
}

impl Report {
    /// Turns anything but a whole image into an error.
    ///
    /// # Errors
    /// [`Kind::Damaged`], naming the first damaged range; [`Kind::Unsupported`] when neither a record nor a structure
    /// that this reader knows proves the image.
    pub fn require_whole(self) -> Result<Self> {
        let attempt = format!("verify {}", self.path.display());
        let Some(first) = self.damage.first() else {
            if self.whole {
                return Ok(self);
            }
            let found = self.unproven.join("; ");
            return Err(SaveImageError::new(Kind::Unsupported, attempt, found));
        };
        let more = match self.damage.len() - 1 {
            0 => String::new(),
            more => format!(", and {more} more"),
        };
        let Damage {
            part,
            from,
            to,
            what,
        } = first;
        let found = format!("{part}, bytes {from} to {to}: {what}{more}");
        Err(SaveImageError::new(Kind::Damaged, attempt, found))
    }

    fn prove(&mut self, what: impl Into<String>) {
        self.proven.push(what.into());
    }

    fn doubt(&mut self, what: impl Into<String>) {
        self.unproven.push(what.into());
    }

    fn damaged(&mut self, part: &'static str, from: u64, to: u64, what: impl Into<String>) {
        let what = what.into();
        self.damage.push(Damage {
            part,
            from,
            to,
            what,
        });
    }
}

impl SaveImage {
    /// Reads everything and says what is proven, what is damaged, and what nobody can know.
    ///
    /// With a record, every byte of the file is compared with it. With or without, the payload is decompressed and
    /// its migration stream walked to the end mark.
    ///
    /// # Errors
    /// When the file cannot be read, the record is of a newer version, the payload is compressed in another way than the
    /// header says, or the caller cancelled. Damage is no error here: it is in the report.
    pub fn verify(&self, control: &Control) -> Result<Report> {
        let mut verification = Verification {
            image: self,
            control,
            report: Report {
                path: self.path().to_owned(),
                whole: false,
                recorded: !matches!(self.recorded, Recorded::Not),
                damage: Vec::new(),
                proven: Vec::new(),
                unproven: Vec::new(),
                stream: None,
                stream_hash: None,
            },
        };
        verification.record()?;
        if verification.report.damage.is_empty() {
            verification.stream()?;
        }
        let mut report = verification.report;
        // Nothing wrong was found; but unless something was also proven, nothing is known.
        let proven = matches!(self.recorded, Recorded::Whole(_)) || report.stream.is_some();
        report.whole = report.damage.is_empty() && proven;
        Ok(report)
    }

    /// Compares what a disk holds with what the record says of it.
    ///
    /// # Errors
    /// [`Kind::Damaged`] when the disk moved on since the VM was saved; [`Kind::NotFound`] when nothing is recorded of
    /// a disk of that name.
    pub fn verify_disk(&self, found: &DiskContent) -> Result<()> {
        let name = &found.name;
        let attempt = || self.attempt(&format!("compare disk {name} with"));
        let Some(recorded) = self.disks().iter().find(|disk| disk.name == *name) else {
            let found = "the image says nothing of a disk of this name";
            return Err(SaveImageError::new(Kind::NotFound, attempt(), found));
        };
        if found == recorded {
            return Ok(());
        }
        let text = format!(
            "the disk holds {} bytes with hash {}, and held {} with hash {} when the VM was saved",
            found.bytes,
            hex(&found.hash),
            recorded.bytes,
            hex(&recorded.hash)
        );
        Err(SaveImageError::new(Kind::Damaged, attempt(), text)
            .next("put the disk back as it was, or boot the VM from its disks without this image"))
    }
}

struct Verification<'a> {
    image: &'a SaveImage,
    control: &'a Control,
    report: Report,
}

impl Verification<'_> {
    fn failed(&self, source: io::Error) -> SaveImageError {
        SaveImageError::io("verify", self.image.path(), source)
    }

    fn record(&mut self) -> Result<()> {
        let head_bytes = self.image.header().payload_at();
        match &self.image.recorded {
            Recorded::Whole(record) => {
                self.report
                    .prove("header, XML, cookie and padding are as they were written");
                self.payload(record)
            }
            Recorded::Damaged(reason) => {
                self.report.damaged("head", 0, head_bytes, reason.clone());
                Ok(())
            }
            Recorded::Newer(version) => {
                let found = format!("its record has version {version}, which is not known");
                let attempt = self.image.attempt("verify");
                Err(SaveImageError::new(Kind::NewerVersion, attempt, found))
            }
            Recorded::Not => self.no_record(),
        }
    }

    /// A record at another place than the header says means that the header is wrong.
    fn no_record(&mut self) -> Result<()> {
        match self.stray_record().map_err(|source| self.failed(source))? {
            Some(at) => {
                let what = format!(
                    "the payload should start at byte {}, and a record stands at byte {at}",
                    self.image.header().payload_at()
                );
                self.report.damaged("head", 0, 92, what);
            }
            None => self.report.doubt(
                "no record: a changed page, register, or XML is not found, only a broken structure",
            ),
        }
        Ok(())
    }

    fn stray_record(&self) -> io::Result<Option<u64>> {
        let mut bytes = vec![0; STEP_BYTES];
        for at in (0..SEARCH_BYTES).step_by(STEP_BYTES) {
            let count = read_up_to(self.image.file(), &mut bytes, at)?;
            let blocks = bytes[..count]
                .chunks_exact(BLOCK_BYTES)
                .zip((at..).step_by(BLOCK_BYTES));
            for (block, place) in blocks {
                if is_marked(block) && block[OWN_PLACE] == place.to_le_bytes() {
                    return Ok(Some(place));
                }
            }
            if count < STEP_BYTES {
                break;
            }
        }
        Ok(None)
    }

    /// Every byte of the payload against the hashes of its parts.
    fn payload(&mut self, record: &Record) -> Result<()> {
        let found = self
            .hash_payload(record.leaf_log2, record.payload_bytes)
            .map_err(|source| self.failed(source))?;
        let start = record.payload_at;
        let expected = (record.payload_bytes, &record.leaves);
        if found.total < expected.0 {
            let what = format!("{} bytes are missing at the end", expected.0 - found.total);
            self.report
                .damaged("payload", start + found.total, start + expected.0, what);
        }
        if found.total > expected.0 {
            let what = "something stands behind the end";
            self.report
                .damaged("payload", start + expected.0, start + found.total, what);
        }
        for (from, to) in differing(expected.1, &found) {
            let to = (start + to).min(start + expected.0);
            self.report
                .damaged("payload", start + from, to, "its hash is another one");
        }
        if self.report.damage.is_empty() {
            if found.root != record.payload_hash {
                let to = start + found.total;
                self.report.damaged(
                    "payload",
                    start,
                    to,
                    "its parts are right and the whole is not",
                );
            }
            self.report
                .prove("every byte of the payload is as it was written");
        }
        Ok(())
    }

    fn hash_payload(&self, leaf_log2: u32, expected: u64) -> io::Result<Leaves> {
        let mut tree = Tree::with_leaves(leaf_log2);
        let mut payload = self.image.payload();
        let mut bytes = vec![0; STEP_BYTES];
        loop {
            self.control.check()?;
            let count = payload.read(&mut bytes)?;
            if count == 0 {
                return Ok(tree.finish());
            }
            tree.update(&bytes[..count]);
            self.control.tell(tree.total(), expected);
        }
    }

    /// What the payload means.
    fn stream(&mut self) -> Result<()> {
        // Tells another compression from damage.
        self.image.check_compression()?;
        match self.image.format() {
            Format::Sparse => return self.sparse(),
            Format::Raw => return self.raw_stream(),
            Format::Gzip | Format::Bzip2 | Format::Xz | Format::Lzop | Format::Zstd => {}
        }
        let open = || self.image.stream().map_err(io::Error::other);
        let mut replay = match Replay::new(open, self.control) {
            Ok(replay) => replay,
            Err(source) if is_cancelled(&source) => return Err(self.failed(source)),
            Err(source) => {
                self.stream_damaged(format!("it cannot be decompressed: {source}"));
                return Ok(());
            }
        };
        if let Recorded::Whole(record) = &self.image.recorded
            && (replay.length(), replay.hash()) != (record.stream_bytes, record.stream_hash)
        {
            self.stream_damaged("it decompresses to another stream than was written".to_owned());
            return Ok(());
        }
        self.report.stream_hash = Some(hex(&replay.hash()));
        self.report.prove("the payload decompresses to its end");
        self.walked(walk(&mut replay, Options::default()))
    }

    /// The payload is the stream: where there is a record, its bytes were hashed already.
    fn raw_stream(&mut self) -> Result<()> {
        let hash = match &self.image.recorded {
            Recorded::Whole(record) => {
                let payload = (record.payload_bytes, record.payload_hash);
                if payload != (record.stream_bytes, record.stream_hash) {
                    self.stream_damaged("it is not the stream that was written".to_owned());
                    return Ok(());
                }
                record.payload_hash
            }
            Recorded::Not | Recorded::Newer(_) | Recorded::Damaged(_) => {
                let leaves = self.hash_payload(LEAF_LOG2_MAX, self.image.payload_bytes());
                leaves.map_err(|source| self.failed(source))?.root
            }
        };
        self.report.stream_hash = Some(hex(&hash));
        self.walked(walk(self.heard(), Options::default()))
    }

    /// Pages lie at fixed places, and nothing says what they hold.
    fn sparse(&mut self) -> Result<()> {
        self.report.doubt(
            "the payload is sparse: its sections, bitmaps and the places of its pages are checked, its pages are not",
        );
        let start = self.image.header().payload_at();
        self.walked(walk_mapped(self.heard(), start))
    }

    fn heard(&self) -> Heard {
        Heard {
            payload: self.image.payload(),
            control: self.control.clone(),
        }
    }

    fn walked(&mut self, outcome: std::result::Result<StreamReport, StreamError>) -> Result<()> {
        match outcome {
            Ok(stream) => {
                self.report
                    .prove("the migration stream is whole, section by section to its end mark");
                self.report.stream = Some(facts(&stream));
            }
            Err(StreamError::Io { source, .. }) => return Err(self.failed(source)),
            Err(error @ (StreamError::Unsupported { .. } | StreamError::IgnoreShared { .. })) => {
                self.report
                    .doubt(format!("the structure of the stream: {error}"));
            }
            Err(error) => self.stream_damaged(error.to_string()),
        }
        Ok(())
    }

    fn stream_damaged(&mut self, what: String) {
        let start = self.image.header().payload_at();
        let end = start + self.image.payload_bytes();
        self.report.damaged("stream", start, end, what);
    }
}

/// A payload that is walked, with an ear for the wish to stop.
struct Heard {
    payload: Payload,
    control: Control,
}

impl Read for Heard {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.control.check()?;
        self.payload.read(bytes)
    }
}

impl Seek for Heard {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.payload.seek(to)
    }
}

fn facts(stream: &StreamReport) -> StreamFacts {
    StreamFacts {
        machine_type: stream.machine_type.clone(),
        bytes: stream.total_length,
        sections: stream.sections.len(),
        ram_bytes: stream.ram_blocks.iter().map(|block| block.length).sum(),
    }
}

/// The ranges of leaves that differ, neighbours joined; what is missing or too much was said already.
fn differing(expected: &[[u8; 32]], found: &Leaves) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let starts = (0_u64..).map(|leaf| leaf << found.leaf_log2);
    for ((one, other), start) in expected.iter().zip(&found.hashes).zip(starts) {
        if one == other {
            continue;
        }
        let end = start + (1 << found.leaf_log2);
        let full = ranges.len() == RANGES_MAX;
        match ranges.last_mut() {
            Some(last) if last.1 == start || full => last.1 = end,
            Some(_) | None => ranges.push((start, end)),
        }
    }
    ranges
}

fn read_up_to(file: &std::fs::File, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match file.read_at(&mut bytes[done..], at + done as u64)? {
            0 => break,
            count => done += count,
        }
    }
    Ok(done)
}
