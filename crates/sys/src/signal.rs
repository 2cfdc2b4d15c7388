//! Signals that only leave a note, for programs without an executor.
#![allow(
    unsafe_code,
    reason = "a handler can be installed in no safe way; what it does is argued below"
)]

use std::ffi::c_int;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

static STOP: AtomicBool = AtomicBool::new(false);
static REPORT: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT, SIGTERM and SIGHUP only set the flag that is returned. The second of them ends the
/// process as ever.
///
/// # Errors
/// When the system refuses.
pub fn note_stop() -> io::Result<&'static AtomicBool> {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        install(signal, stop, SaFlags::SA_RESETHAND)?;
    }
    Ok(&STOP)
}

/// From now on SIGUSR1 only sets the flag that is returned; whoever acts on it clears it.
///
/// # Errors
/// When the system refuses.
pub fn note_report() -> io::Result<&'static AtomicBool> {
    install(Signal::SIGUSR1, report, SaFlags::SA_RESTART)?;
    Ok(&REPORT)
}

fn install(signal: Signal, handler: extern "C" fn(c_int), flags: SaFlags) -> io::Result<()> {
    let action = SigAction::new(SigHandler::Handler(handler), flags, SigSet::empty());
    // SAFETY: both handlers only store into an atomic of static lifetime, which may be done at any point of
    // any thread; they call nothing, allocate nothing and take no lock.
    unsafe { sigaction(signal, &action) }?;
    Ok(())
}

extern "C" fn stop(_signal: c_int) {
    STOP.store(true, Ordering::Relaxed);
}

extern "C" fn report(_signal: c_int) {
    REPORT.store(true, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_that_is_noted_does_not_end_the_process() {
        let flag = note_report().expect("installed");
        nix::sys::signal::raise(Signal::SIGUSR1).expect("sent");
        assert!(flag.swap(false, Ordering::Relaxed));
        assert!(!flag.load(Ordering::Relaxed));
    }
}
