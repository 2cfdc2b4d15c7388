//! The guests' memory, and how much of the host's it takes.

use crate::error::{BenchError, Doing, Result};

/// RAM of every guest that is measured.
pub const MEMORY_BYTES: u64 = 512 << 20;

/// The proportional set sizes of processes, added up, in bytes.
///
/// # Errors
/// When one has ended.
pub fn pss_of(pids: &[i32]) -> Result<u64> {
    pids.iter().try_fold(0, |sum, pid| Ok(sum + pss(*pid)?))
}

fn pss(pid: i32) -> Result<u64> {
    let doing = "read a VM's proportional set size";
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).doing(doing)?;
    let kib = text
        .lines()
        .find_map(|line| {
            line.strip_prefix("Pss:")?
                .trim()
                .strip_suffix(" kB")?
                .parse::<u64>()
                .ok()
        })
        .ok_or_else(|| BenchError::new(doing, "there is no line Pss"))?;
    Ok(kib * 1024)
}
