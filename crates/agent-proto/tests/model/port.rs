//! What lies between host and guest: pieces of bytes in order, each a frame or part of one.

use std::collections::VecDeque;

use stead_agent_proto::frame::{Decoder, Item};

/// One port of the machine. What a host wrote stays in it when the host goes, and is in every copy of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Port {
    pub to_guest: VecDeque<Vec<u8>>,
    pub to_host: VecDeque<Vec<u8>>,
    decoder: Decoder,
    /// The guest is still to be told that a host has gone; it may never be.
    pub gone: bool,
    /// Something of the connection that there is now has reached the guest.
    pub heard: bool,
    // How many pieces of earlier connections come first.
    old: usize,
    /// The guest does not look at what lies here before more comes: only a put-back fault does this.
    pub asleep: bool,
}

/// Which way pieces go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    ToGuest,
    ToHost,
}

impl Port {
    /// A connection ends, if there was one, and another is made.
    pub fn connect(&mut self) {
        self.gone = true;
        self.heard = false;
        self.old = self.to_guest.len();
    }

    pub fn put(&mut self, wire: Vec<u8>) {
        self.to_guest.push_back(wire);
        self.asleep = false;
    }

    /// What the guest reads next.
    pub fn read(&mut self) -> Vec<Item> {
        let piece = self.take(Way::ToGuest);
        self.heard |= self.old == 0;
        self.old = self.old.saturating_sub(1);
        items(&mut self.decoder, &piece)
    }

    /// The guest has seen that nobody is there.
    pub fn forget_host(&mut self) {
        self.gone = false;
        self.decoder = Decoder::new();
    }

    /// The agent was restarted: what it had read of a frame is gone.
    pub fn forget_decoder(&mut self) {
        self.decoder = Decoder::new();
    }

    pub fn take(&mut self, way: Way) -> Vec<u8> {
        let taken = self.pieces(way).pop_front();
        taken.expect("only what lies in the port is taken")
    }

    pub fn has(&self, way: Way) -> bool {
        !match way {
            Way::ToGuest => self.to_guest.is_empty(),
            Way::ToHost => self.to_host.is_empty(),
        }
    }

    fn pieces(&mut self, way: Way) -> &mut VecDeque<Vec<u8>> {
        match way {
            Way::ToGuest => &mut self.to_guest,
            Way::ToHost => &mut self.to_host,
        }
    }

    /// The first piece never arrives.
    pub fn lose(&mut self, way: Way) {
        self.take(way);
        if way == Way::ToGuest {
            self.old = self.old.saturating_sub(1);
        }
    }

    /// Of the first piece, half arrives.
    pub fn cut(&mut self, way: Way, half: Half) {
        let front = self.pieces(way).front_mut();
        let piece = front.expect("only what lies in the port is cut");
        let middle = piece.len() / 2;
        match half {
            Half::First => piece.truncate(middle),
            Half::Second => drop(piece.drain(..middle)),
        }
    }

    /// The first piece arrives twice, the second time after all that lies here.
    pub fn repeat(&mut self, way: Way) {
        let pieces = self.pieces(way);
        let piece = pieces.front().cloned();
        pieces.extend(piece);
    }
}

/// Which half of a piece arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Half {
    First,
    Second,
}

pub fn items(decoder: &mut Decoder, bytes: &[u8]) -> Vec<Item> {
    let (mut input, mut found) = (bytes, Vec::new());
    while let Some(item) = decoder.next_item(&mut input) {
        found.push(item);
    }
    found
}
