//! Which operations on one sandbox exclude each other.
//!
//! Everything that changes a sandbox takes its lock; a command that finds it taken waits for a
//! bounded time and then says who has it. `exec`, `ls`, `show` and `logs` take no lock.

use std::path::Path;
use std::time::{Duration, Instant};

use stead_sys::lock::{Attempt, FileLock};

use crate::error::{AtFile, EngineError, Kind, Result};
use crate::event::Watch;

/// How often a taken lock is tried again. It only bounds how late a free lock is noticed.
const RETRY: Duration = Duration::from_millis(20);

/// Takes the lock at `path` for `purpose` on `object`, waiting at most `wait`.
pub(crate) async fn lock(
    path: &Path,
    object: &str,
    purpose: &str,
    wait: Duration,
    watch: &Watch,
) -> Result<FileLock> {
    let own = format!("{purpose}, process {}", std::process::id());
    let begun = Instant::now();
    let mut told = false;
    loop {
        match FileLock::attempt(path, &own).at("lock", path)? {
            Attempt::Locked(lock) => return Ok(lock),
            Attempt::HeldBy(holder) => {
                watch.check(purpose)?;
                if begun.elapsed() >= wait {
                    return Err(EngineError::new(
                        Kind::Conflict,
                        format!("{purpose} {object}"),
                        format!("it is held by: {holder} (waited {} s)", wait.as_secs()),
                    )
                    .left("nothing was changed")
                    .next("wait for that command, or give --wait a longer time"));
                }
                if !told {
                    watch.notice(format!("{object} is held by: {holder}; waiting"));
                    told = true;
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
