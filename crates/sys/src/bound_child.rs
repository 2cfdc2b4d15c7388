//! Children that do not outlive who started them, not even when that is killed.
//!
//! The kernel can send a signal to a process when its parent dies, but by "parent" it means the *thread* that started
//! it: a child started by a thread that ends would be killed while it is wanted. So a [`BoundChild`] stays in the thread
//! that started it (it is not `Send`), and is ended with it.
#![allow(
    unsafe_code,
    reason = "a child can set its own signal only between fork and exec; what it does there is argued below"
)]

use std::io;
use std::marker::PhantomData;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

/// A child that is killed when it is dropped, and when this thread or process ends in any way.
///
/// A child that takes other rights while it runs (a program with the set-user-ID bit) loses the bond.
#[derive(Debug)]
pub struct BoundChild {
    /// The process.
    pub child: Child,
    _stays_in_its_thread: PhantomData<*const ()>,
}

impl BoundChild {
    /// Starts `command`, under the user that it names if it does.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(command: &mut Command) -> io::Result<Self> {
        let parent = getpid();
        // SAFETY: between fork and exec of a program with threads only what is safe in a signal handler may be done:
        // these are two system calls, which take no lock and allocate nothing; `parent` is a number.
        unsafe { command.pre_exec(move || end_with(parent)) };
        Ok(Self {
            child: command.spawn()?,
            _stays_in_its_thread: PhantomData,
        })
    }
}

fn end_with(parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // Had the parent died before, the signal would never come.
    if getppid() == Some(parent) {
        Ok(())
    } else {
        Err(io::ErrorKind::NotFound.into())
    }
}

impl Drop for BoundChild {
    fn drop(&mut self) {
        // Of a child that was waited for, neither does anything. One that cannot be killed ends with this process.
        if self.child.kill().is_ok() {
            drop(self.child.wait());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::ProcessId;

    fn sleeper() -> BoundChild {
        BoundChild::spawn(Command::new("sleep").arg("60")).expect("spawn")
    }

    fn identity(child: &BoundChild) -> ProcessId {
        ProcessId::of(i32::try_from(child.child.id()).expect("a process id")).expect("it runs")
    }

    #[test]
    fn a_child_ends_when_it_is_dropped_and_when_its_thread_ends() {
        let kept = sleeper();
        let dropped = sleeper();
        let gone = identity(&dropped);
        drop(dropped);
        assert!(!gone.is_alive().expect("ask"));
        // The thread ends without dropping it.
        let leaked = std::thread::spawn(|| {
            let child = sleeper();
            let id = identity(&child);
            std::mem::forget(child);
            id
        });
        let leaked = leaked.join().expect("join");
        for _ in 0..2000 {
            if !leaked.is_alive().expect("ask") {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(!leaked.is_alive().expect("ask"));
        assert!(identity(&kept).is_alive().expect("ask"));
    }
}
