//! Reaping orphans, when the agent is process 1.
//!
//! The agent's own children are reaped by whoever started them. The reaper looks at who has ended without taking
//! it, takes only strangers, and waits for the owner when it is a child of the agent.

use std::collections::HashSet;
use std::fs;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};

/// How long to wait when there is nothing to reap.
const PAUSE: Duration = Duration::from_millis(200);

/// Children of the agent that their owners reap.
static OWNED: Mutex<Option<HashSet<i32>>> = Mutex::new(None);
static RELEASED: Condvar = Condvar::new();

/// A child that its owner reaps. Dropping it, after reaping, lets the reaper go on.
#[derive(Debug)]
pub(crate) struct Owned(i32);

impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(owned) = lock().as_mut() {
            owned.remove(&self.0);
        }
        RELEASED.notify_all();
    }
}

/// Starts a child and notes that its owner reaps it, before the reaper can see it end.
pub(crate) fn own<E>(
    start: impl FnOnce() -> Result<std::process::Child, E>,
) -> Result<(std::process::Child, Owned), E> {
    let mut owned = lock();
    let child = start()?;
    let pid = Pid::from_child(&child).as_raw_nonzero().get();
    owned.get_or_insert_default().insert(pid);
    Ok((child, Owned(pid)))
}

/// Notes that a child which another agent in this process started is reaped by whoever holds the result.
pub(crate) fn adopt(pid: i32) -> Owned {
    lock().get_or_insert_default().insert(pid);
    Owned(pid)
}

/// The children of a process, ended ones among them.
pub(crate) fn children_of(parent: i32) -> Vec<i32> {
    let parent = parent.to_string();
    processes(|stat| matches!(state_and_parent(stat), Some((_, found)) if found == parent))
}

/// Reaps orphans for ever. Only for process 1.
pub(crate) fn run() {
    loop {
        match waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
            Ok(_) | Err(Errno::INTR) => reap_strangers(),
            // There are no children at all; an orphan would only come from a child.
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

fn reap_strangers() {
    let owned = lock();
    let is_owned = |pid: i32| owned.as_ref().is_some_and(|owned| owned.contains(&pid));
    let strangers: Vec<i32> = ended_children()
        .into_iter()
        .filter(|&pid| !is_owned(pid))
        .collect();
    if strangers.is_empty() {
        // Only children that their owners reap have ended: wait for the owners.
        drop(RELEASED.wait_timeout(owned, PAUSE));
        return;
    }
    for pid in strangers.into_iter().filter_map(Pid::from_raw) {
        if let Err(error) = waitid(
            WaitId::Pid(pid),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        ) {
            eprintln!("stead-agent: reap {pid:?}: {error}");
        }
    }
}

/// The zombies among the children of process 1.
fn ended_children() -> Vec<i32> {
    processes(is_ended_child)
}

/// The processes of which the kernel says what is wanted.
fn processes(is_wanted: impl Fn(&str) -> bool) -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| is_wanted(&stat))
        })
        .collect()
}

fn is_ended_child(stat: &str) -> bool {
    state_and_parent(stat) == Some(("Z", "1"))
}

/// proc(5), `/proc/pid/stat`: the name in parentheses may hold anything; state and parent follow it.
fn state_and_parent(stat: &str) -> Option<(&str, &str)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    Some((fields.next()?, fields.next()?))
}

fn lock() -> MutexGuard<'static, Option<HashSet<i32>>> {
    OWNED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_zombies_of_process_1_are_strangers() {
        assert!(is_ended_child("7 (a) Z b) Z 1 7 7"));
        assert!(!is_ended_child("7 (a) S 1 7 7"));
        assert!(!is_ended_child("7 (Z 1) Z 2 7 7"));
        assert!(!is_ended_child(""));
    }
}
