//! The record of a backup: what it is, what it stands on, and the hashes that prove it.
//!
//! ```text
//! ID.json    {"record": {…}, "blake3": hash of the record, as compact JSON}
//! ID.hashes  a BLAKE3 hash of 32 bytes for each MiB of the disk
//! ID.qcow2   the content; of an incremental one, what changed, over its parent's
//! ```
//! A record is untrusted until its hash was found right; its id, and so the names of its files, can only be hex digits.

use serde::{Deserialize, Serialize};

/// The version of the record that is written and read.
const VERSION: u32 = 1;
/// The longest record that is read, in bytes.
pub(crate) const MAX_RECORD_BYTES: u64 = 64 << 10;
/// Hex digits of an id: 128 random bits.
const ID_DIGITS: usize = 32;
/// The largest disk that is backed up: 64 TiB, which is also the engine's limit.
const MAX_DISK_BYTES: u64 = stead_qcow2::MAX_VIRTUAL_BYTES;

/// What a backup holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackupKind {
    /// The whole disk.
    Full,
    /// What changed since its parent.
    Incremental,
}

impl BackupKind {
    /// The word for people and programs.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
        }
    }
}

/// What a backup is, wherever it lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Facts {
    /// The backup's id: 32 hex digits.
    pub id: String,
    /// What it holds.
    pub kind: BackupKind,
    /// The id of the backup that an incremental one was made after.
    pub parent: Option<String>,
    /// The disk, as it was named.
    pub disk: String,
    /// The name of the bitmaps, without an id.
    pub bitmap: String,
    /// When it was begun, in UTC.
    pub time: String,
    /// The disk's length in bytes.
    pub disk_bytes: u64,
    /// How many bytes of the disk were looked at as changed.
    pub changed_bytes: u64,
    /// How many bytes it takes of its own.
    pub stored_bytes: u64,
    /// Why it is a full one though an incremental one was wanted.
    pub why_full: Option<String>,
}

/// The record of a backup in a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Record {
    /// The version of the record.
    pub version: u32,
    /// The backup's id: 32 hex digits.
    pub id: String,
    /// What it holds.
    pub kind: BackupKind,
    /// The id of the backup that an incremental one stands on.
    pub parent: Option<String>,
    /// The disk, as it was named.
    pub disk: String,
    /// The name of the bitmaps, without an id.
    pub bitmap: String,
    /// When it was begun, in UTC.
    pub time: String,
    /// The disk's length in bytes.
    pub disk_bytes: u64,
    /// How many bytes of the disk were looked at as changed.
    pub changed_bytes: u64,
    /// The length of the image in bytes.
    pub image_bytes: u64,
    /// BLAKE3 of the image.
    pub image_blake3: String,
    /// BLAKE3 of the hashes of the disk's content.
    pub content_blake3: String,
    /// Why it is a full one though an incremental one was wanted.
    pub why_full: Option<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    record: Record,
    blake3: String,
}

/// The name of the bitmap that records since the backup `id`.
pub(crate) fn bitmap_name(name: &str, id: &str) -> Vec<u8> {
    format!("{name}@{id}").into_bytes()
}

/// The id in the name of a bitmap of ours.
pub(crate) fn id_in<'a>(bitmap: &'a [u8], name: &str) -> Option<&'a str> {
    let rest = bitmap.strip_prefix(name.as_bytes())?.strip_prefix(b"@")?;
    std::str::from_utf8(rest).ok().filter(|id| is_id(id))
}

/// Whether `text` is an id of a backup: 32 hex digits, and nothing that could leave a folder.
#[must_use]
pub fn is_id(text: &str) -> bool {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == ID_DIGITS && text.bytes().all(digit)
}

impl Facts {
    /// What is wrong with the facts of the backup `id`, as far as they tell.
    #[must_use]
    pub fn refusal(&self, id: &str) -> Option<String> {
        if self.id != id || !is_id(id) {
            return Some(format!("it is that of {}", self.id));
        }
        if self.disk_bytes > MAX_DISK_BYTES {
            return Some(format!(
                "a disk of {} bytes is above 64 TiB",
                self.disk_bytes
            ));
        }
        let stands_on = self.parent.as_deref();
        let right = match self.kind {
            BackupKind::Full => stands_on.is_none(),
            BackupKind::Incremental => {
                stands_on.is_some_and(|parent| is_id(parent) && parent != id)
            }
        };
        (!right).then(|| "its parent does not fit its kind".into())
    }
}

impl Record {
    pub fn of(
        facts: Facts,
        image_bytes: u64,
        image_blake3: String,
        content_blake3: String,
    ) -> Self {
        Self {
            version: VERSION,
            id: facts.id,
            kind: facts.kind,
            parent: facts.parent,
            disk: facts.disk,
            bitmap: facts.bitmap,
            time: facts.time,
            disk_bytes: facts.disk_bytes,
            changed_bytes: facts.changed_bytes,
            image_bytes,
            image_blake3,
            content_blake3,
            why_full: facts.why_full,
        }
    }

    pub fn facts(&self) -> Facts {
        Facts {
            id: self.id.clone(),
            kind: self.kind,
            parent: self.parent.clone(),
            disk: self.disk.clone(),
            bitmap: self.bitmap.clone(),
            time: self.time.clone(),
            disk_bytes: self.disk_bytes,
            changed_bytes: self.changed_bytes,
            stored_bytes: self.image_bytes,
            why_full: self.why_full.clone(),
        }
    }

    pub(crate) fn encode(&self) -> serde_json::Result<Vec<u8>> {
        let sealed = Sealed {
            blake3: seal(self)?,
            record: self.clone(),
        };
        serde_json::to_vec_pretty(&sealed)
    }

    /// The record in `bytes`, or why there is none.
    pub(crate) fn decode(bytes: &[u8], id: &str) -> Result<Self, String> {
        let sealed: Sealed =
            serde_json::from_slice(bytes).map_err(|error| format!("it is no record: {error}"))?;
        let found = seal(&sealed.record).map_err(|error| error.to_string())?;
        if found != sealed.blake3 {
            return Err("its hash is not the one that it states".into());
        }
        let record = sealed.record;
        record.refusal(id).map_or(Ok(record), Err)
    }

    /// What is wrong with it although it is as it was written.
    fn refusal(&self, id: &str) -> Option<String> {
        if self.version != VERSION {
            return Some(format!("version {} is not known", self.version));
        }
        self.facts().refusal(id)
    }
}

fn seal(record: &Record) -> serde_json::Result<String> {
    Ok(blake3::hash(&serde_json::to_vec(record)?)
        .to_hex()
        .to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            version: VERSION,
            id: "0123456789abcdef0123456789abcdef".into(),
            kind: BackupKind::Full,
            parent: None,
            disk: "disk.qcow2".into(),
            bitmap: "daily".into(),
            time: "2026-01-02T03:04:05Z".into(),
            disk_bytes: 1 << 30,
            changed_bytes: 1 << 20,
            image_bytes: 1 << 21,
            image_blake3: "00".repeat(32),
            content_blake3: "11".repeat(32),
            why_full: None,
        }
    }

    #[test]
    fn a_record_with_any_changed_byte_is_refused_or_says_the_same() {
        let record = record();
        let bytes = record.encode().expect("encoded");
        assert_eq!(Record::decode(&bytes, &record.id), Ok(record.clone()));
        let mut refused = 0;
        for at in 0..bytes.len() {
            for bit in [0, 3, 5] {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                match Record::decode(&changed, &record.id) {
                    Ok(same) => assert_eq!(same, record, "byte {at}"),
                    Err(_) => refused += 1,
                }
            }
        }
        assert!(refused > bytes.len() * 2);
        for end in 0..bytes.len() {
            assert!(Record::decode(&bytes[..end], &record.id).is_err(), "{end}");
        }
    }

    #[test]
    fn an_id_is_hex_digits_and_nothing_that_could_leave_the_folder() {
        for wrong in [
            "",
            "..",
            "../../../../../../../../etc/passwd",
            "ABCDEF6789abcdef0123456789abcdef",
        ] {
            assert!(!is_id(wrong), "{wrong}");
        }
        let id = "0123456789abcdef0123456789abcdef";
        assert_eq!(id_in(&bitmap_name("daily", id), "daily"), Some(id));
        assert_eq!(id_in(&bitmap_name("daily", id), "dail"), None);
        assert_eq!(id_in(b"daily", "daily"), None);
    }

    #[test]
    fn a_full_backup_has_no_parent_and_an_incremental_one_has_another() {
        let mut wrong = record();
        wrong.parent = Some("f".repeat(32));
        let id = wrong.id.clone();
        assert!(Record::decode(&wrong.encode().expect("encoded"), &id).is_err());
        wrong.kind = BackupKind::Incremental;
        assert!(Record::decode(&wrong.encode().expect("encoded"), &id).is_ok());
        wrong.parent = Some(id.clone());
        assert!(Record::decode(&wrong.encode().expect("encoded"), &id).is_err());
    }
}
