//! What machine this is, as far as it matters to the figures.

use std::path::Path;

use stead_engine::SandboxInfo;

use crate::error::{Doing, Result};
use crate::program;

/// Facts for the head of the report; no names and no paths.
///
/// # Errors
/// When the system cannot be asked.
pub async fn of_machine(plain: &Path, runs: usize) -> Result<Vec<(&'static str, String)>> {
    let qemu = program::run("qemu-system-x86_64", &["--version"]).await?;
    let release =
        std::fs::read_to_string("/proc/sys/kernel/osrelease").doing("read the kernel's release")?;
    let load = std::fs::read_to_string("/proc/loadavg").doing("read the load")?;
    Ok(vec![
        ("processor", processor()?),
        ("memory", format!("{} GiB", memory_bytes()? >> 30)),
        ("kernel", release.trim().to_owned()),
        ("QEMU", qemu.lines().next().unwrap_or_default().to_owned()),
        (
            "file system",
            format!(
                "{} (reflink: no); XFS with reflink in a loop-mounted file on it",
                file_system(plain).await?
            ),
        ),
        ("runs", format!("{runs} of each, alternating")),
        (
            "load before the run",
            load.split(' ').take(3).collect::<Vec<_>>().join(" "),
        ),
    ])
}

/// What all guests are.
pub fn of_guest(like: &SandboxInfo) -> (&'static str, String) {
    let guest = format!(
        "{} vCPU, {} MiB, {}, {}, Debian, about 100 MB of page cache, a process with 24 MiB of random bytes",
        like.cpus,
        like.memory_bytes >> 20,
        like.accelerator,
        like.machine_type
    );
    ("guest", guest)
}

fn processor() -> Result<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").doing("read the processor's name")?;
    let count = text
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, name)| name);
    Ok(format!("{count} × {model}"))
}

fn memory_bytes() -> Result<u64> {
    memory("MemTotal:")
}

/// Bytes of memory that programs could have now.
///
/// # Errors
/// When the kernel does not say.
pub fn available_memory() -> Result<u64> {
    memory("MemAvailable:")
}

fn memory(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").doing("read the memory's size")?;
    let kib = text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    });
    Ok(kib.unwrap_or_default() * 1024)
}

async fn file_system(path: &Path) -> Result<String> {
    let path = path.display().to_string();
    program::run("findmnt", &["-n", "-o", "FSTYPE", "-T", &path]).await
}
