//! What an agent hands over to the one that takes its place in the same process.
//!
//! ```text
//!   old agent: memfd {children, state} + descriptors ──▶ socket pair ──▶ standard input ──exec──▶ new agent: receive
//! ```
//! Descriptors travel as messages in a socket that the new program finds as its standard input. So all others can be closed
//! by the exec as ever, none has to be found again by its number, and no unsafe code is needed. Everything that can fail
//! fails before the exec, while the old agent still works.
//!
//! The state is opaque here: what the sessions need to be found again, in an encoding of theirs.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::MemfdFlags;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use crate::error::{AgentError, Attempt};

/// The first bytes of the record, with its version: another agent's may be newer.
const MAGIC: [u8; 8] = *b"SHANDOV1";
/// The longest record, in bytes: the replay buffers of all commands and some more.
const MAX_RECORD_BYTES: u64 = 16 << 20;
/// How many children are handed over.
pub(crate) const MAX_CHILDREN: usize = 4096;
/// How many descriptors one message carries; the kernel takes 253 (`SCM_MAX_FD`).
const BATCH: usize = 128;

/// What goes over.
#[derive(Debug, Default)]
pub(crate) struct Handover {
    /// Children of the process; they stay so.
    pub(crate) children: Vec<Heir>,
    /// What the sessions need.
    pub(crate) state: Vec<u8>,
}

/// A child, with the agent's ends of its streams.
#[derive(Debug)]
pub(crate) struct Heir {
    /// Its process number.
    pub(crate) pid: i32,
    /// By which the host knows it, when it is a command.
    pub(crate) key: Option<[u8; 16]>,
    /// Where its input is written; kept open, since an end would make it take half an input for a whole one.
    pub(crate) stdin: Option<OwnedFd>,
    /// Where its output is read. They do not block.
    pub(crate) outputs: Vec<OwnedFd>,
}

impl Heir {
    fn descriptors(&self) -> impl Iterator<Item = &OwnedFd> {
        self.stdin.iter().chain(&self.outputs)
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    children: Vec<ChildRecord>,
    state: Vec<u8>,
}

/// The descriptors of each child follow one another in the order of the children: input, outputs.
#[derive(Debug, Serialize, Deserialize)]
struct ChildRecord {
    pid: i32,
    key: Option<[u8; 16]>,
    stdin: bool,
    outputs: u8,
}

impl Handover {
    /// Puts everything into a socket, and gives its other end.
    ///
    /// # Errors
    /// When the kernel refuses, or there is more than can be handed over.
    pub(crate) fn send(&self) -> Result<OwnedFd, AgentError> {
        let record = self.record()?;
        let (own, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .attempt(|| "make a socket pair".to_owned())?;
        let file = memory_file(&record)?;
        send_batch(&own, &[file.as_fd()])?;
        for batch in self.descriptors().chunks(BATCH) {
            send_batch(&own, batch)?;
        }
        Ok(other)
    }

    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let all = self.children.iter().flat_map(Heir::descriptors);
        all.map(AsFd::as_fd).collect()
    }

    fn record(&self) -> Result<Vec<u8>, AgentError> {
        let too_many = |what: &str| io::Error::other(format!("too many {what}"));
        let child = |heir: &Heir| {
            Ok(ChildRecord {
                pid: heir.pid,
                key: heir.key,
                stdin: heir.stdin.is_some(),
                outputs: u8::try_from(heir.outputs.len())
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?,
            })
        };
        let encode = || {
            if self.children.len() > MAX_CHILDREN {
                return Err(too_many("children"));
            }
            let record = Record {
                children: self.children.iter().map(child).collect::<io::Result<_>>()?,
                state: self.state.clone(),
            };
            let bytes = postcard::to_extend(&record, MAGIC.to_vec())
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
            if bytes.len() as u64 > MAX_RECORD_BYTES {
                return Err(too_many("bytes of state"));
            }
            Ok(bytes)
        };
        encode().attempt(|| "write down what is to be handed over".to_owned())
    }

    /// Takes everything out of the socket.
    ///
    /// # Errors
    /// When it is not what [`Handover::send`] puts there.
    pub(crate) fn receive(socket: BorrowedFd<'_>) -> Result<Self, AgentError> {
        let take = || {
            let mut first = receive_batch(socket)?;
            let file = first.pop().ok_or_else(|| wrong("no record came"))?;
            let record = decode(&read_record(file)?)?;
            let fds = |child: &ChildRecord| usize::from(child.stdin) + usize::from(child.outputs);
            let wanted: usize = record.children.iter().map(fds).sum();
            let mut descriptors = Vec::new();
            while descriptors.len() < wanted {
                descriptors.extend(receive_batch(socket)?);
            }
            assemble(record, descriptors)
        };
        take().attempt(|| "take over from the agent before".to_owned())
    }
}

fn assemble(record: Record, descriptors: Vec<OwnedFd>) -> io::Result<Handover> {
    let mut descriptors = descriptors.into_iter();
    let mut children = Vec::new();
    for child in record.children {
        let mut next = || {
            descriptors
                .next()
                .ok_or_else(|| wrong("a descriptor is missing"))
        };
        children.push(Heir {
            pid: child.pid,
            key: child.key,
            stdin: child.stdin.then(&mut next).transpose()?,
            outputs: (0..child.outputs)
                .map(|_| next())
                .collect::<io::Result<_>>()?,
        });
    }
    Ok(Handover {
        children,
        state: record.state,
    })
}

fn memory_file(bytes: &[u8]) -> Result<File, AgentError> {
    let fill = || {
        let mut file = File::from(rustix::fs::memfd_create(
            "stead-handover",
            MemfdFlags::CLOEXEC,
        )?);
        file.write_all(bytes)?;
        Ok::<_, io::Error>(file)
    };
    fill().attempt(|| "put what is to be handed over into memory".to_owned())
}

fn read_record(file: OwnedFd) -> io::Result<Vec<u8>> {
    let mut file = File::from(file);
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(MAX_RECORD_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> io::Result<Record> {
    let body = bytes
        .strip_prefix(&MAGIC)
        .ok_or_else(|| wrong("the record is of another version"))?;
    if bytes.len() as u64 > MAX_RECORD_BYTES {
        return Err(wrong("the record is too long"));
    }
    let record: Record = postcard::from_bytes(body)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    if record.children.len() > MAX_CHILDREN || record.children.iter().any(|child| child.pid < 1) {
        return Err(wrong("the record names children that cannot be"));
    }
    Ok(record)
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Never blocks: what does not fit into the socket is an error, since nobody reads yet.
fn send_batch(socket: &OwnedFd, fds: &[BorrowedFd<'_>]) -> Result<(), AgentError> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(
        control.push(SendAncillaryMessage::ScmRights(fds)),
        "the buffer has room for a batch"
    );
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(b"f")], &mut control, flags)
        .attempt(|| "hand descriptors over".to_owned())
        .map(drop)
}

fn receive_batch(socket: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        flags,
    )?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 || fds.is_empty() {
        return Err(wrong("it ended early"));
    }
    Ok(fds)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;

    #[test]
    fn descriptors_and_state_arrive_as_they_were_sent_however_many() {
        let mut handover = Handover {
            state: vec![7; 1 << 20],
            ..Handover::default()
        };
        let mut readers = Vec::new();
        for pid in 1..200 {
            let (reader, stdin) = pipe().expect("pipe");
            let (output, _writer) = pipe().expect("pipe");
            readers.push(reader);
            handover.children.push(Heir {
                pid,
                key: (pid % 2 == 0).then_some([3; 16]),
                stdin: (pid % 3 > 0).then_some(stdin),
                outputs: vec![output],
            });
        }
        let socket = handover.send().expect("sent");
        let taken = Handover::receive(socket.as_fd()).expect("taken");
        assert_eq!(taken.state, handover.state);
        assert_eq!(taken.children.len(), handover.children.len());
        for ((old, new), reader) in handover.children.iter().zip(&taken.children).zip(&readers) {
            assert_eq!(
                (old.pid, old.key, old.outputs.len()),
                (new.pid, new.key, new.outputs.len())
            );
            assert_eq!(old.stdin.is_some(), new.stdin.is_some());
            if let Some(stdin) = &new.stdin {
                let number = new.pid.to_le_bytes();
                rustix::io::write(stdin, &number).expect("written");
                let mut found = [0; 4];
                rustix::io::read(reader, &mut found).expect("read");
                assert_eq!(found, number, "another child's descriptor");
            }
        }
    }

    #[test]
    fn whatever_else_comes_is_an_error() {
        for length in 0..MAGIC.len() {
            assert!(decode(&MAGIC[..length]).is_err());
        }
        let record = Handover {
            children: vec![Heir {
                pid: 5,
                key: Some([1; 16]),
                stdin: None,
                outputs: Vec::new(),
            }],
            state: vec![1, 2, 3],
        }
        .record()
        .expect("small");
        for length in 0..record.len() {
            assert!(decode(&record[..length]).is_err(), "cut at {length}");
        }
        for at in 0..record.len() {
            let mut changed = record.clone();
            changed[at] ^= 0xff;
            if let Ok(record) = decode(&changed) {
                // Fewer descriptors than it names.
                drop(assemble(record, Vec::new()));
            }
        }
        let (one, other) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .expect("pair");
        assert!(Handover::receive(one.as_fd()).is_err(), "nothing came");
        rustix::io::write(&other, b"f").expect("written");
        assert!(
            Handover::receive(one.as_fd()).is_err(),
            "no descriptor came"
        );
    }
}
