//! File operations for the host, without a transport.
//!
//! [`Files::open`] takes a request and gives an [`Operation`]; nothing is done until it is pulled. The transport
//! pulls replies while there is credit for them, and pushes what the host sends:
//!
//! ```text
//!  Asked ── pull ──▶ Answered ── pull ──▶ Ended           one reply: stat, mkdir, remove, …
//!    │                   ▲
//!    ├─▶ Listing ────────┤ pages, pulled one by one
//!    ├─▶ Digesting ──────┤
//!    ├─▶ Reading ────────┤ chunks, pulled one by one
//!    └─▶ Writing ────────┘ chunks, pushed one by one; the answer comes after the last one or at a failure
//! ```
//! Every call blocks for one step of work on the disk: a chunk, a page, a few megabytes of hashing, the sync of a
//! written file, the removal of a tree. Dropping an operation ends it: a partial file that was being written stays for
//! the host to go on with, for [`LEFT_OVER_AFTER`] at least.

mod digest;
mod error;
mod list;
mod names;
mod read;
mod stat;
mod swept;
mod write;

use std::sync::Arc;

use stead_agent_proto::files::{FileError, FileInput, FileReply, FileRequest};
use stead_agent_proto::flow::MAX_CHUNK_BYTES;

use self::digest::Digesting;
use self::list::Listing;
use self::read::Reading;
use self::swept::Swept;
use self::write::Writing;

pub use self::swept::LEFT_OVER_AFTER;

/// What all operations of one agent share.
#[derive(Debug, Default)]
pub struct Files {
    swept: Arc<Swept>,
}

/// What an operation has for the transport.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pulled {
    /// A reply to send; if it [is data](FileReply::is_data), its encoded length takes room.
    Reply(FileReply),
    /// The next reply needs more room.
    NoRoom,
    /// Nothing until something is pushed.
    WantsInput,
    /// Nothing any more.
    Ended,
}

/// One operation.
#[derive(Debug)]
pub struct Operation {
    state: State,
    swept: Arc<Swept>,
}

#[derive(Debug)]
enum State {
    Asked(FileRequest),
    Listing(Listing),
    Digesting(Box<Digesting>),
    Reading(Box<Reading>),
    Writing(Box<Writing>),
    Answered(FileReply),
    Ended,
}

impl Files {
    /// Begins an operation; nothing is done yet.
    #[must_use]
    pub fn open(&self, request: FileRequest) -> Operation {
        Operation {
            state: State::Asked(request),
            swept: Arc::clone(&self.swept),
        }
    }
}

impl Operation {
    /// The next reply, if there is room for it: a full one, [`MAX_CHUNK_BYTES`], is asked for whatever it is.
    pub fn pull(&mut self, room_bytes: usize) -> Pulled {
        if matches!(self.state, State::Asked(_))
            && let State::Asked(request) = std::mem::replace(&mut self.state, State::Ended)
        {
            let begun = begin(request, &self.swept)
                .unwrap_or_else(|error| Begun::from(FileReply::Failed(error)));
            self.state = begun.state;
            if let Some(reply) = begun.first {
                return Pulled::Reply(reply);
            }
        }
        self.proceed(room_bytes)
    }

    fn proceed(&mut self, room_bytes: usize) -> Pulled {
        let has_room = room_bytes >= MAX_CHUNK_BYTES;
        let step = match &mut self.state {
            State::Listing(_) | State::Digesting(_) | State::Reading(_) if !has_room => {
                return Pulled::NoRoom;
            }
            State::Listing(listing) => listing.next(),
            State::Digesting(digesting) => digesting.next(),
            State::Reading(reading) => reading.next(),
            State::Writing(_) => return Pulled::WantsInput,
            State::Answered(reply) => Ok(reply.clone()),
            State::Asked(_) | State::Ended => return Pulled::Ended,
        };
        match step {
            Ok(reply) => {
                if reply.is_last() {
                    self.state = State::Ended;
                }
                Pulled::Reply(reply)
            }
            Err(error) => {
                self.state = State::Ended;
                Pulled::Reply(FileReply::Failed(error))
            }
        }
    }

    /// Takes what the host sends. After a failure it is thrown away: the host has not heard of it yet.
    pub fn push(&mut self, input: FileInput) {
        if !matches!(self.state, State::Writing(_)) {
            return;
        }
        let State::Writing(writing) = std::mem::replace(&mut self.state, State::Ended) else {
            unreachable!("it was looked at just now");
        };
        self.state = match writing.take(input) {
            Ok(Some(writing)) => State::Writing(writing),
            Ok(None) => State::Answered(FileReply::Done),
            Err(error) => State::Answered(FileReply::Failed(error)),
        };
    }

    /// Whether the last reply was pulled.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        matches!(self.state, State::Ended)
    }
}

struct Begun {
    state: State,
    first: Option<FileReply>,
}

impl From<FileReply> for Begun {
    fn from(reply: FileReply) -> Self {
        Self {
            state: State::Answered(reply),
            first: None,
        }
    }
}

fn begin(request: FileRequest, swept: &Swept) -> Result<Begun, FileError> {
    request.check().map_err(|found| error::malformed(&found))?;
    let done = |()| Begun::from(FileReply::Done);
    match request {
        FileRequest::Stat { path, follow } => {
            stat::stat(&path, follow).map(|metadata| FileReply::Stat(metadata).into())
        }
        FileRequest::List { path, follow } => Listing::begin(&path, follow).map(|listing| Begun {
            state: State::Listing(listing),
            first: None,
        }),
        FileRequest::Mkdir {
            path,
            parents,
            mode,
        } => names::make_folder(&path, parents, mode).map(done),
        FileRequest::Remove { path, recursive } => names::remove(&path, recursive).map(done),
        FileRequest::Rename { from, to, replace } => names::rename(&from, &to, replace).map(done),
        FileRequest::Symlink {
            path,
            target,
            replace,
        } => names::make_link(&path, &target, replace).map(done),
        FileRequest::ReadLink { path } => {
            names::read_link(&path).map(|target| FileReply::Link(target).into())
        }
        FileRequest::Read(request) => Reading::begin(&request).map(|(reading, first)| Begun {
            state: State::Reading(Box::new(reading)),
            first: Some(first),
        }),
        FileRequest::Write(request) => Writing::begin(request, swept).map(|writing| Begun {
            state: State::Writing(Box::new(writing)),
            first: Some(FileReply::WriteBegins),
        }),
        FileRequest::SetAttributes { path, attributes } => {
            stat::set_attributes(&path, &attributes).map(done)
        }
        FileRequest::Digest(request) => Digesting::begin(&request).map(|digesting| Begun {
            state: State::Digesting(Box::new(digesting)),
            first: None,
        }),
        FileRequest::Sync { path } => stat::sync(&path).map(done),
    }
}
