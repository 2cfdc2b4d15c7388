//! Outside programs that a peer consists of, or that a measurement needs.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Stdio;

use tokio::process::Command;

use crate::error::{BenchError, Doing, Result};

/// Runs a program to its end; it must succeed. Gives what it printed.
///
/// # Errors
/// When it cannot be started or its status is not 0; with what it said.
pub async fn run<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, arguments: &[S]) -> Result<String> {
    let program = program.as_ref();
    let attempt = format!("run {}", program.display());
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .doing(&attempt)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(BenchError::new(
        attempt,
        format!("{}: {}", output.status, said.trim()),
    ))
}

/// The length of a file in bytes.
///
/// # Errors
/// When it is not there.
pub fn length(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path).doing("measure a file")?.len())
}

/// The bytes of all files below a folder.
///
/// # Errors
/// When it cannot be listed.
pub fn bytes_below(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder).doing("list a folder")? {
        let entry = entry.doing("list a folder")?;
        let kind = entry.file_type().doing("look at a file")?;
        sum += if kind.is_dir() {
            bytes_below(&entry.path())?
        } else {
            length(&entry.path())?
        };
    }
    Ok(sum)
}
