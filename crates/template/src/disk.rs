//! The disk: an ext4 file system on the whole device, written from a folder.

use std::fmt;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};
use stead_sys::durable::{Existing, Partial};

use crate::Stage;
use crate::error::{OnPath, TemplateError};
use crate::program::run;
use crate::progress::{Step, Watch};
use crate::rootfs::EPOCH_S;

/// The smallest disk that the default packages fit on with room to work, in bytes.
pub const DISK_BYTES_MIN: u64 = 512 << 20;
/// The largest disk, in bytes (ext4 with 4 KiB blocks ends at 16 TiB; this is what a host can hold).
pub const DISK_BYTES_MAX: u64 = 8 << 40;
const BLOCK_BYTES: u64 = 4096;

/// What every ext4 of ours has, whatever the host's `mke2fs.conf` says. `metadata_csum` without
/// `metadata_csum_seed` binds all metadata to the UUID: an overlay put on another build of the same
/// files is noticed by the guest at the first block.
const FEATURES: &str = "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,\
    sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum";

/// 4 MiB is the least a journal of this block size works well with and 16 the most a small guest uses.
const JOURNAL_MIB: u32 = 16;

/// What makes a disk itself: two disks of the same files with different identities differ in almost
/// every metadata block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIdentity {
    /// The file system's UUID.
    pub uuid: [u8; 16],
    /// The seed of the directory hash, likewise a UUID.
    pub hash_seed: [u8; 16],
}

impl DiskIdentity {
    /// The identity that belongs to `seed`; the same seed gives the same identity everywhere.
    #[must_use]
    pub fn from_seed(seed: &[u8]) -> Self {
        let derive = |context: &str| {
            let mut uuid = [0; 16];
            uuid.copy_from_slice(&blake3::derive_key(context, seed)[..16]);
            // RFC 9562, section 5.8: version 8 (custom) and the variant bits.
            uuid[6] = (uuid[6] & 0x0f) | 0x80;
            uuid[8] = (uuid[8] & 0x3f) | 0x80;
            uuid
        };
        Self {
            uuid: derive("steadfast 2026 template disk uuid"),
            hash_seed: derive("steadfast 2026 template disk hash seed"),
        }
    }
}

struct Hyphenated<'a>(&'a [u8; 16]);

impl fmt::Display for Hyphenated<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if [4, 6, 8, 10].contains(&index) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Refuses a size that no disk of ours has.
pub(crate) fn check_size(size_bytes: u64) -> Result<(), TemplateError> {
    if (DISK_BYTES_MIN..=DISK_BYTES_MAX).contains(&size_bytes)
        && size_bytes.is_multiple_of(BLOCK_BYTES)
    {
        return Ok(());
    }
    Err(TemplateError::Invalid {
        what: "the disk's size in bytes",
        found: size_bytes.to_string(),
        expected: format!("a multiple of {BLOCK_BYTES} from {DISK_BYTES_MIN} to {DISK_BYTES_MAX}"),
    })
}

/// Writes the files below `tree` as an ext4 file system of `size_bytes` and publishes it, checked, as `target`.
///
/// # Durability
/// When this returns `Ok`, the disk has reached the host's disk under its name.
pub(crate) fn make(
    tree: &Path,
    size_bytes: u64,
    identity: &DiskIdentity,
    target: &Path,
    watch: &Watch<'_>,
) -> Result<(), TemplateError> {
    let step = watch.begin(Stage::Disk)?;
    let partial = Partial::create(target, 0o644).on("creating", target)?;
    partial.file().set_len(size_bytes).on("sizing", target)?;
    run(
        &mut mke2fs(tree, identity, partial.temp_path()),
        "making the disk",
        &step,
    )?;
    check(partial.temp_path(), &watch.begin(Stage::CheckDisk)?)?;
    partial
        .publish(Existing::Replace)
        .on("publishing", target)?;
    Ok(())
}

fn mke2fs(tree: &Path, identity: &DiskIdentity, disk: &Path) -> Command {
    let mut command = Command::new("mke2fs");
    command
        .args([
            "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0",
        ])
        .args(["-O", FEATURES])
        .args(["-J", &format!("size={JOURNAL_MIB}")])
        .args(["-U", &Hyphenated(&identity.uuid).to_string()])
        .arg("-E")
        // Nothing is left for the guest's kernel to initialise: that would be written into every overlay.
        .arg(format!(
            "hash_seed={},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,nodiscard",
            Hyphenated(&identity.hash_seed)
        ))
        .arg("-d")
        .arg(tree)
        .arg(disk)
        .env("PATH", path_with_sbin())
        .env("SOURCE_DATE_EPOCH", EPOCH_S)
        .env("E2FSPROGS_FAKE_TIME", EPOCH_S);
    command
}

/// Runs `e2fsck` without letting it write.
pub(crate) fn check(disk: &Path, step: &Step<'_>) -> Result<(), TemplateError> {
    let mut command = Command::new("e2fsck");
    command
        .args(["-f", "-n"])
        .arg(disk)
        .env("PATH", path_with_sbin());
    run(&mut command, "checking the disk", step).map(drop)
}

/// The host's search path with the folders of system programs, which a user's path may lack.
pub(crate) fn path_with_sbin() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/local/sbin:/usr/sbin:/sbin")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_its_seeds_and_nobody_elses() {
        let (one, two) = (
            DiskIdentity::from_seed(b"worker 1"),
            DiskIdentity::from_seed(b"worker 2"),
        );
        assert_eq!(one, DiskIdentity::from_seed(b"worker 1"));
        assert_ne!(one.uuid, two.uuid);
        assert_ne!(one.hash_seed, two.hash_seed);
        assert_ne!(one.uuid, one.hash_seed);
    }

    #[test]
    fn an_identity_prints_as_a_uuid() {
        let text = Hyphenated(&DiskIdentity::from_seed(b"x").uuid).to_string();
        assert_eq!(text.len(), 36);
        assert_eq!(
            text.split('-').map(str::len).collect::<Vec<_>>(),
            [8, 4, 4, 4, 12]
        );
        assert_eq!(&text[14..15], "8", "RFC 9562 version");
    }

    #[test]
    fn a_size_is_whole_blocks_within_bounds() {
        for bad in [
            0,
            DISK_BYTES_MIN - 4096,
            DISK_BYTES_MIN + 1,
            DISK_BYTES_MAX + 4096,
            u64::MAX,
        ] {
            assert!(check_size(bad).is_err(), "{bad}");
        }
        for good in [DISK_BYTES_MIN, 2 << 30, DISK_BYTES_MAX] {
            assert!(check_size(good).is_ok(), "{good}");
        }
    }
}
