//! Faults put back in on purpose, between the machines and what is around them: the search must find each.

use stead_agent_proto::frame::Item;
use stead_agent_proto::guest::Agent;
use stead_agent_proto::message::{GuestMessage, HostMessage, Message, Phase};
use stead_agent_proto::{ExecKey, Frame};

use crate::hosts::Line;
use crate::world::World;

/// Which fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    None,
    /// The report's own: a second signal, at any later time, registers once more what hosts connect to.
    SecondRebind,
    /// Its effect alone, not counted: what has come and was not taken is not looked at before more comes.
    LostEdge,
    /// A host takes any answer for its own.
    OldAnswers,
    /// A host takes the guest for ready before the release was answered.
    ReleaseNotAwaited,
    /// The guest lets its workload go on when it acknowledges.
    ThawAtReady,
    /// The guest lets its workload go on when the host that froze it has gone.
    ThawWhenAlone,
    /// The agent forgets keys.
    KeysForgotten,
    /// Programs are started without asking the machine.
    StartUnasked,
    /// A machine that goes on after a capture is greeted like a copy.
    SourceGreeted,
}

impl Mutant {
    pub fn to_guest(self, item: Item) -> Item {
        match item {
            Item::Frame(frame) if self == Self::KeysForgotten => Item::Frame(forget_key(frame)),
            other => other,
        }
    }

    pub fn to_host(self, item: Item, line: &Line) -> Item {
        match item {
            Item::Frame(frame) if self == Self::OldAnswers => Item::Frame(accept(frame, line)),
            other => other,
        }
    }

    pub fn may_start(self, agent: &mut Agent, key: ExecKey) -> bool {
        match self {
            Self::StartUnasked => true,
            _ => agent.may_start(key),
        }
    }

    pub fn after_step(self, world: &mut World, phase: Phase) {
        if phase != Phase::Ports {
            return;
        }
        match self {
            Self::SecondRebind | Self::LostEdge => world.rebind = true,
            Self::ThawAtReady if world.guest.stands => {
                world.guest.stands = false;
                world.ledger.on_workload_thawed();
            }
            _ => {}
        }
    }
}

/// The command under a key of its session alone, as if no session knew of another's.
fn forget_key(frame: Frame) -> Frame {
    match HostMessage::from_frame(&frame) {
        Ok(HostMessage::Exec {
            id, key, request, ..
        }) => {
            let mut own = key.0;
            own[8..].copy_from_slice(&frame.nonce.0.to_le_bytes());
            let message = HostMessage::Exec {
                id,
                key: ExecKey(own),
                again: None,
                request,
            };
            let payload = message.to_payload().expect("it fitted before");
            Frame { payload, ..frame }
        }
        Ok(_) | Err(_) => frame,
    }
}

/// The frame as if it were of the host's own session, and the next in it.
fn accept(frame: Frame, line: &Line) -> Frame {
    let epoch = line.session.epoch();
    let payload = match GuestMessage::from_frame(&frame) {
        Ok(GuestMessage::Ready(mut ready)) => {
            ready.epoch = epoch;
            GuestMessage::Ready(ready)
                .to_payload()
                .expect("it fitted before")
        }
        Ok(_) | Err(_) => frame.payload,
    };
    Frame {
        epoch,
        nonce: line.nonce,
        payload,
        ..frame
    }
}
