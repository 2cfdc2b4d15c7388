//! Frames over a byte stream that may be cut anywhere.
//!
//! ```text
//! 00 │ stuffed( header 44 bytes │ payload 0..=65536 bytes │ CRC-32C 4 bytes ) │ 00
//! ```
//! Stuffing keeps the byte zero out of the frame, so that zero means "between frames" wherever the
//! stream is entered. A frame that a capture cut in half ends at the zero that the next frame begins
//! with; its checksum is wrong and it is discarded. The next frame is never touched by it. That also makes
//! the work linear: no byte is looked at again after a false start, which a search for a marker inside
//! payloads would have to do, and no half frame can make the reader wait for a length that never comes.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 2 | magic `SA` |
//! | 2 | 1 | protocol version, 2 |
//! | 3 | 1 | direction: 1 host to guest, 2 guest to host (a looped-back stream is no answer) |
//! | 4 | 1 | kind: 1 handshake, 2 session |
//! | 5 | 3 | zero |
//! | 8 | 8 | sequence number within session and direction, from 0 |
//! | 16 | 16 | epoch |
//! | 32 | 8 | nonce |
//! | 40 | 4 | length of the payload in bytes |
//! | 44 | n | payload: a message in postcard encoding |
//! | 44+n | 4 | CRC-32C over all before |
//!
//! Numbers are little-endian.

use std::fmt;

use crate::stuffing::{stuff, stuffed_limit, unstuff};
use crate::{Epoch, Nonce, ProtocolError};

/// The version of the protocol that this crate speaks.
pub const VERSION: u8 = 2;
/// The byte that stands between frames and never within one.
pub const DELIMITER: u8 = 0;
/// The size of the header.
pub const HEADER_BYTES: usize = 44;
/// The size of the checksum after the payload.
pub const CHECKSUM_BYTES: usize = 4;
/// What a frame's payload may be at most.
pub const MAX_PAYLOAD_BYTES: usize = 64 * 1024;
/// What a frame may be on the wire, without the zeros around it; the decoder keeps no more.
pub const MAX_STUFFED_BYTES: usize =
    stuffed_limit(HEADER_BYTES + MAX_PAYLOAD_BYTES + CHECKSUM_BYTES);

const MAGIC: [u8; 2] = *b"SA";
const AT_VERSION: usize = 2;
const AT_DIRECTION: usize = 3;
const AT_KIND: usize = 4;
const AT_ZERO: usize = 5;
const AT_SEQ: usize = 8;
const AT_EPOCH: usize = 16;
const AT_NONCE: usize = 32;
const AT_LENGTH: usize = 40;
const _: () = assert!(AT_LENGTH + 4 == HEADER_BYTES);

/// Which way a frame goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the host to the guest.
    ToGuest,
    /// From the guest to the host.
    ToHost,
}

/// Whether a frame makes a session or belongs to one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Hello, ready, failed.
    Handshake,
    /// Everything else.
    Session,
}

/// A frame whose checksum is right.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Frame {
    /// Which way it goes.
    pub direction: Direction,
    /// Whether it makes a session or belongs to one.
    pub kind: Kind,
    /// Its number within its session and direction, from 0.
    pub seq: u64,
    /// The life of the machine it belongs to.
    pub epoch: Epoch,
    /// The session it belongs to.
    pub nonce: Nonce,
    /// The encoded message.
    pub payload: Vec<u8>,
}

/// Why bytes between two zeros are no frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Longer than a frame can be.
    TooLong,
    /// Shorter than a frame can be.
    TooShort,
    /// The stuffing does not work out.
    Stuffing,
    /// The checksum is wrong: half a frame, two halves, or damage.
    Checksum,
    /// The length in the header is not the length that came.
    Length,
    /// Whole, but not of this protocol: magic, direction, kind or reserved bytes.
    Header,
    /// Whole, but of another version of the protocol.
    Version(u8),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => f.write_str("longer than a frame can be"),
            Self::TooShort => f.write_str("shorter than a frame can be"),
            Self::Stuffing => f.write_str("wrong byte stuffing"),
            Self::Checksum => f.write_str("wrong checksum"),
            Self::Length => f.write_str("wrong length"),
            Self::Header => f.write_str("unknown header"),
            Self::Version(found) => write!(f, "protocol version {found}, known is {VERSION}"),
        }
    }
}

/// What a [`Decoder`] finds in a stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Item {
    /// A whole frame.
    Frame(Frame),
    /// Bytes that are no frame; they are gone.
    Garbage {
        /// How many bytes, without the zeros around them.
        bytes: usize,
        /// Why they are no frame.
        fault: Fault,
    },
}

impl Frame {
    /// The frame as it goes over the wire, with a zero before and after it.
    ///
    /// # Errors
    /// [`ProtocolError::TooLarge`] when the payload is larger than [`MAX_PAYLOAD_BYTES`].
    pub fn encode(&self) -> Result<Vec<u8>, ProtocolError> {
        let too_large = || ProtocolError::TooLarge {
            found_bytes: self.payload.len(),
            limit_bytes: MAX_PAYLOAD_BYTES,
        };
        if self.payload.len() > MAX_PAYLOAD_BYTES {
            return Err(too_large());
        }
        let length = u32::try_from(self.payload.len())
            .ok()
            .ok_or_else(too_large)?;
        let mut plain = Vec::with_capacity(HEADER_BYTES + self.payload.len() + CHECKSUM_BYTES);
        plain.extend_from_slice(&self.header(length));
        plain.extend_from_slice(&self.payload);
        plain.extend_from_slice(&checksum(&plain).to_le_bytes());
        let mut wire = Vec::with_capacity(stuffed_limit(plain.len()) + 2);
        wire.push(DELIMITER);
        stuff(&plain, &mut wire);
        wire.push(DELIMITER);
        Ok(wire)
    }

    fn header(&self, length: u32) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..AT_VERSION].copy_from_slice(&MAGIC);
        header[AT_VERSION] = VERSION;
        header[AT_DIRECTION] = match self.direction {
            Direction::ToGuest => 1,
            Direction::ToHost => 2,
        };
        header[AT_KIND] = match self.kind {
            Kind::Handshake => 1,
            Kind::Session => 2,
        };
        header[AT_SEQ..AT_EPOCH].copy_from_slice(&self.seq.to_le_bytes());
        header[AT_EPOCH..AT_NONCE].copy_from_slice(&self.epoch.0);
        header[AT_NONCE..AT_LENGTH].copy_from_slice(&self.nonce.0.to_le_bytes());
        header[AT_LENGTH..].copy_from_slice(&length.to_le_bytes());
        header
    }

    fn parse(plain: &[u8]) -> Result<Self, Fault> {
        let (body, sum) = plain.split_last_chunk().ok_or(Fault::TooShort)?;
        let (header, payload) = body.split_first_chunk().ok_or(Fault::TooShort)?;
        if checksum(body) != u32::from_le_bytes(*sum) {
            return Err(Fault::Checksum);
        }
        let header: &[u8; HEADER_BYTES] = header;
        if header[..AT_VERSION] != MAGIC || header[AT_ZERO..AT_SEQ] != [0; 3] {
            return Err(Fault::Header);
        }
        if header[AT_VERSION] != VERSION {
            return Err(Fault::Version(header[AT_VERSION]));
        }
        let length = u32::from_le_bytes(field(header, AT_LENGTH));
        if payload.len() > MAX_PAYLOAD_BYTES || u32::try_from(payload.len()) != Ok(length) {
            return Err(Fault::Length);
        }
        Ok(Self {
            direction: match header[AT_DIRECTION] {
                1 => Direction::ToGuest,
                2 => Direction::ToHost,
                _ => return Err(Fault::Header),
            },
            kind: match header[AT_KIND] {
                1 => Kind::Handshake,
                2 => Kind::Session,
                _ => return Err(Fault::Header),
            },
            seq: u64::from_le_bytes(field(header, AT_SEQ)),
            epoch: Epoch(field(header, AT_EPOCH)),
            nonce: Nonce(u64::from_le_bytes(field(header, AT_NONCE))),
            payload: payload.to_vec(),
        })
    }
}

fn field<const N: usize>(header: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    std::array::from_fn(|index| header[at + index])
}

fn checksum(bytes: &[u8]) -> u32 {
    let sum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes);
    // A 32-bit checksum in a 64-bit number: the upper half is zero.
    (sum & u64::from(u32::MAX)) as u32
}

/// Finds the frames in a stream of any bytes.
///
/// It keeps at most [`MAX_STUFFED_BYTES`] and looks at each byte a fixed number of times.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Decoder {
    part: Vec<u8>,
    // Bytes of a run that is already longer than any frame; they are counted and not kept.
    overlong_bytes: usize,
}

impl Decoder {
    /// A decoder at the beginning of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes off the front of `input` until it has found something; nothing once `input` is empty.
    pub fn next_item(&mut self, input: &mut &[u8]) -> Option<Item> {
        while !input.is_empty() {
            let end = input.iter().position(|&byte| byte == DELIMITER);
            self.keep(&input[..end.unwrap_or(input.len())]);
            *input = &input[end.map_or(input.len(), |at| at + 1)..];
            if end.is_some()
                && let Some(item) = self.finish()
            {
                return Some(item);
            }
        }
        None
    }

    /// How many bytes of an unfinished frame are kept.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        self.part.len()
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.overlong_bytes == 0 && self.part.len() + bytes.len() <= MAX_STUFFED_BYTES {
            self.part.extend_from_slice(bytes);
            return;
        }
        self.overlong_bytes = self
            .overlong_bytes
            .saturating_add(self.part.len())
            .saturating_add(bytes.len());
        self.part.clear();
    }

    fn finish(&mut self) -> Option<Item> {
        let overlong_bytes = std::mem::take(&mut self.overlong_bytes);
        if overlong_bytes > 0 {
            return Some(Item::Garbage {
                bytes: overlong_bytes,
                fault: Fault::TooLong,
            });
        }
        if self.part.is_empty() {
            return None;
        }
        let bytes = self.part.len();
        let found = match unstuff(&mut self.part) {
            Some(length) => Frame::parse(&self.part[..length]),
            None => Err(Fault::Stuffing),
        };
        self.part.clear();
        Some(match found {
            Ok(frame) => Item::Frame(frame),
            Err(fault) => Item::Garbage { bytes, fault },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_on_the_wire_is_what_the_table_says() {
        let frame = Frame {
            direction: Direction::ToGuest,
            kind: Kind::Session,
            seq: 0x0102_0304_0506_0708,
            epoch: Epoch([0xee; 16]),
            nonce: Nonce(0x1112_1314_1516_1718),
            payload: b"hi".to_vec(),
        };
        let golden: &[u8] = &[
            0x00, // between frames
            0x06, b'S', b'A', 2, 1, 2, // magic, version, direction, kind; a zero follows
            0x01, 0x01, // two more zeros: reserved
            0x1c, 8, 7, 6, 5, 4, 3, 2, 1, // sequence number
            0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee,
            0xee, 0xee, // epoch
            0x18, 0x17, 0x16, // nonce begins
        ];
        let wire = frame.encode().expect("fits");
        assert_eq!(&wire[..9], &golden[..9]);
        let mut plain = wire[1..wire.len() - 1].to_vec();
        let length = unstuff(&mut plain).expect("stuffed");
        assert_eq!(length, HEADER_BYTES + 2 + CHECKSUM_BYTES);
        assert_eq!(&plain[..8], b"SA\x02\x01\x02\0\0\0");
        assert_eq!(plain[8..16], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(plain[16..32], [0xee; 16]);
        assert_eq!(
            plain[32..40],
            [0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11]
        );
        assert_eq!(plain[40..46], [2, 0, 0, 0, b'h', b'i']);
    }

    #[test]
    fn a_whole_frame_of_another_version_is_known_as_such_and_other_headers_are_refused() {
        let frame = Frame {
            direction: Direction::ToGuest,
            kind: Kind::Session,
            seq: 1,
            epoch: Epoch([1; 16]),
            nonce: Nonce(1),
            payload: b"payload".to_vec(),
        };
        let changed = |at: usize, value: u8| {
            let mut plain = frame.header(7).to_vec();
            plain.extend_from_slice(&frame.payload);
            plain[at] = value;
            let sum = checksum(&plain);
            plain.extend_from_slice(&sum.to_le_bytes());
            Frame::parse(&plain)
        };
        assert_eq!(changed(AT_VERSION, 2), Ok(frame.clone()));
        assert_eq!(changed(AT_VERSION, 1), Err(Fault::Version(1)));
        for (at, value) in [
            (0, b'X'),
            (AT_DIRECTION, 0),
            (AT_DIRECTION, 3),
            (AT_KIND, 0),
            (AT_KIND, 9),
            (AT_ZERO, 1),
        ] {
            assert_eq!(changed(at, value), Err(Fault::Header), "byte {at}");
        }
        for length in [6, 8, 0, 255] {
            assert_eq!(changed(AT_LENGTH, length), Err(Fault::Length));
        }
        assert_eq!(changed(AT_LENGTH + 3, 255), Err(Fault::Length));
    }

    #[test]
    fn the_checksum_is_crc_32c() {
        assert_eq!(
            checksum(b"123456789"),
            0xe306_9283,
            "the check value of RFC 3720"
        );
    }
}
