//! What a command takes besides time.

use std::ffi::OsStr;
use std::fs;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::error::{BenchError, Doing, Result};

/// How often a command is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// What a command used.
#[derive(Debug, Clone, Copy, Default)]
pub struct Used {
    /// The most memory that it had at once, in bytes, as far as it is seen every millisecond.
    pub peak_bytes: u64,
    /// The bytes that it caused to be written to disks, as the kernel counts them: pages, once while they are dirty.
    pub written_bytes: u64,
}

/// Runs a command to its end, which must be a success.
///
/// # Errors
/// When it cannot be started or fails.
pub async fn command(program: &OsStr, arguments: &[String]) -> Result<Used> {
    let doing = "run a command that is looked at";
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .doing(doing)?;
    let pid = child
        .id()
        .ok_or_else(|| BenchError::new(doing, "it has no id"))?;
    let mut used = Used::default();
    // It is not waited for, so it stays to be looked at when it has ended.
    while !has_ended(pid)? {
        used.peak_bytes = peak(pid)?.unwrap_or(used.peak_bytes);
        tokio::time::sleep(LOOK_EVERY).await;
    }
    used.written_bytes = written(pid)?;
    let status = child.wait().await.doing(doing)?;
    if !status.success() {
        let what = format!("{}: {status}", arguments.join(" "));
        return Err(BenchError::new(doing, what));
    }
    Ok(used)
}

fn has_ended(pid: u32) -> Result<bool> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).doing("look at a command")?;
    // The name, in brackets, may contain anything.
    let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
    Ok(state.starts_with('Z'))
}

/// The most memory so far; `None` when it has ended meanwhile.
fn peak(pid: u32) -> Result<Option<u64>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).doing("look at a command")?;
    let kib = status.lines().find_map(|line| {
        let line = line.strip_prefix("VmHWM:")?.trim();
        line.strip_suffix(" kB")?.parse::<u64>().ok()
    });
    Ok(kib.map(|kib| kib * 1024))
}

/// The bytes that this process caused to be written so far, as [`Used::written_bytes`].
///
/// # Errors
/// When the system does not tell.
pub fn own_written() -> Result<u64> {
    written(std::process::id())
}

/// What was thrown away before it reached a disk, as that of nameless files, does not count.
fn written(pid: u32) -> Result<u64> {
    let doing = "count what a command wrote";
    let io = fs::read_to_string(format!("/proc/{pid}/io")).doing(doing)?;
    let number = |name: &str| {
        let line = io.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|bytes| bytes.trim().parse::<u64>().ok())
            .ok_or_else(|| BenchError::new(doing, format!("there is no line {name}")))
    };
    Ok(number("write_bytes:")?.saturating_sub(number("cancelled_write_bytes:")?))
}
