//! Listeners that survive what happens to them.
//!
//! A restore or a reset of the transport may end a listener or only the connections that it had let in. Accepting
//! blocks in the kernel, so one event never hides another: what waits is let in one by one until nothing waits. A
//! listener that has failed is replaced, *exactly once for each failure*: the old one is closed before the new one
//! is made, so two never share an address, and nobody else makes any.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_LOCAL, VsockListener};

use crate::transport::Transport;

/// How long to wait when the kernel has no descriptor or no memory for one more connection, and before a listener
/// is replaced that failed without having let in anybody.
const PAUSE: Duration = Duration::from_millis(20);
/// So many listeners in a row may fail without having let in anybody.
const MAX_FRUITLESS: u32 = 50;

/// What lets hosts in.
pub(crate) trait Listener {
    /// Waits for the next connection; nothing when it is one that may not come in.
    fn accept(&self) -> io::Result<Option<Box<dyn Transport>>>;
}

/// Who may come in over vsock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peers {
    /// The host only: a process of the guest must not become root by asking.
    Host,
    /// Processes of this machine only.
    Local,
}

impl Peers {
    fn include(self, cid: u32) -> bool {
        match self {
            Self::Host => cid == VMADDR_CID_HOST,
            Self::Local => cid == VMADDR_CID_LOCAL,
        }
    }
}

/// A vsock port of whatever number this machine has: it may be another one after a restore.
#[derive(Debug)]
pub(crate) struct VsockDoor {
    listener: VsockListener,
    peers: Peers,
}

impl VsockDoor {
    pub(crate) fn open(port: u32, peers: Peers) -> io::Result<Self> {
        let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
        Ok(Self { listener, peers })
    }
}

impl Listener for VsockDoor {
    fn accept(&self) -> io::Result<Option<Box<dyn Transport>>> {
        let (stream, peer) = self.listener.accept()?;
        let may = self.peers.include(peer.cid());
        Ok(may.then(|| Box::new(stream) as Box<dyn Transport>))
    }
}

/// A unix socket. One that is there already is somebody else's.
#[derive(Debug)]
pub(crate) struct UnixDoor(UnixListener);

impl UnixDoor {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        UnixListener::bind(path).map(Self)
    }
}

impl Listener for UnixDoor {
    fn accept(&self) -> io::Result<Option<Box<dyn Transport>>> {
        let (stream, _) = self.0.accept()?;
        Ok(Some(Box::new(stream)))
    }
}

/// Lets hosts in until no listener can be opened any more, or they fail in vain again and again; gives the reason.
pub(crate) fn serve<L: Listener>(
    mut open: impl FnMut() -> io::Result<L>,
    mut enter: impl FnMut(Box<dyn Transport>),
) -> io::Error {
    let mut fruitless = 0;
    loop {
        let listener = match open() {
            Ok(listener) => listener,
            Err(error) => return error,
        };
        let mut entered = false;
        let failure = accept_all(&listener, |transport| {
            entered = true;
            enter(transport);
        });
        fruitless = if entered { 0 } else { fruitless + 1 };
        if fruitless == MAX_FRUITLESS {
            return failure;
        }
        eprintln!("stead-agent: a listener failed and is replaced: {failure}");
        // Its address is free only then.
        drop(listener);
        if fruitless > 0 {
            thread::sleep(PAUSE);
        }
    }
}

/// Lets in one after the other until the listener itself fails.
fn accept_all(listener: &impl Listener, mut enter: impl FnMut(Box<dyn Transport>)) -> io::Error {
    loop {
        match listener.accept() {
            Ok(Some(transport)) => enter(transport),
            Ok(None) => {}
            Err(error) => match Errno::from_io_error(&error) {
                // One connection has ended before it came in, or nothing has happened.
                Some(Errno::CONNABORTED | Errno::INTR | Errno::AGAIN) => {}
                Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    thread::sleep(PAUSE);
                }
                Some(_) | None => return error,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::VecDeque;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// What happens at a listener, in order.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Event {
        Connection,
        Stranger,
        Aborted,
        Interrupted,
        Shortage,
        Reset,
    }

    struct Scripted<'a> {
        events: &'a RefCell<VecDeque<Event>>,
        open: &'a RefCell<u32>,
    }

    impl Drop for Scripted<'_> {
        fn drop(&mut self) {
            *self.open.borrow_mut() -= 1;
        }
    }

    impl Listener for Scripted<'_> {
        fn accept(&self) -> io::Result<Option<Box<dyn Transport>>> {
            let errno = match self.events.borrow_mut().pop_front() {
                Some(Event::Connection) => {
                    let (ours, _theirs) = UnixStream::pair()?;
                    return Ok(Some(Box::new(ours)));
                }
                Some(Event::Stranger) => return Ok(None),
                Some(Event::Aborted) => Errno::CONNABORTED,
                Some(Event::Interrupted) => Errno::INTR,
                Some(Event::Shortage) => Errno::MFILE,
                Some(Event::Reset) | None => Errno::CONNRESET,
            };
            Err(errno.into())
        }
    }

    /// Plays events; how many listeners were opened, and how many hosts came in.
    fn play(events: &[Event]) -> (u32, u32) {
        let events = RefCell::new(events.iter().copied().collect::<VecDeque<_>>());
        let open = RefCell::new(0);
        let (mut opened, mut entered) = (0, 0);
        let ended = serve(
            || {
                if events.borrow().is_empty() && opened > 0 {
                    return Err(Errno::NODEV.into());
                }
                opened += 1;
                *open.borrow_mut() += 1;
                assert_eq!(*open.borrow(), 1, "the old listener is closed first");
                Ok(Scripted {
                    events: &events,
                    open: &open,
                })
            },
            |_| entered += 1,
        );
        assert_eq!(Errno::from_io_error(&ended), Some(Errno::NODEV));
        (opened, entered)
    }

    #[test]
    fn a_listener_that_fails_is_replaced_once_for_each_failure_and_never_otherwise() {
        use Event::*;
        // The end of the script is a failure too, after which nothing can be opened.
        assert_eq!(play(&[Connection, Connection, Connection]), (1, 3));
        assert_eq!(play(&[Connection, Reset, Connection]), (2, 2));
        assert_eq!(
            play(&[Connection, Reset, Reset, Connection, Reset, Connection]),
            (4, 3)
        );
        assert_eq!(
            play(&[
                Aborted,
                Connection,
                Interrupted,
                Shortage,
                Stranger,
                Connection
            ]),
            (1, 2)
        );
    }

    #[test]
    fn a_listener_that_fails_for_ever_ends_in_its_error() {
        let mut opened = 0;
        let (events, open) = (RefCell::default(), RefCell::new(u32::MAX));
        let ended = serve(
            || {
                opened += 1;
                Ok(Scripted {
                    events: &events,
                    open: &open,
                })
            },
            |_| {},
        );
        assert_eq!(Errno::from_io_error(&ended), Some(Errno::CONNRESET));
        assert_eq!(opened, MAX_FRUITLESS);
    }

    #[test]
    fn over_vsock_only_the_host_is_let_in_unless_the_machine_itself_is_meant() {
        const GUEST: u32 = 3;
        assert!(Peers::Host.include(VMADDR_CID_HOST));
        assert!(!Peers::Host.include(VMADDR_CID_LOCAL) && !Peers::Host.include(GUEST));
        assert!(Peers::Local.include(VMADDR_CID_LOCAL));
        assert!(!Peers::Local.include(VMADDR_CID_HOST) && !Peers::Local.include(GUEST));
    }
}
