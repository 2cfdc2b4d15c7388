//! The first 92 bytes.
//!
//! ```text
//!  0  16  magic: LibvirtQemudSave, or LibvirtQemudPart while it is being written
//! 16   4  version: 2 (1 had no compression)
//! 20   4  data length: bytes of XML, cookie and padding, from byte 92 to the payload
//! 24   4  1 if the VM ran when it was saved
//! 28   4  format of the payload
//! 32   4  cookie's offset, from byte 92 on; 0: none
//! 36  56  unused: kept as found
//! ```
//! Numbers are in the byte order of the host that wrote them; the version tells which.

/// Bytes of the header.
pub const HEADER_BYTES: usize = 92;
const MAGIC_BYTES: usize = 16;
pub(crate) const COMPLETE: &[u8; MAGIC_BYTES] = b"LibvirtQemudSave";
pub(crate) const PARTIAL: &[u8; MAGIC_BYTES] = b"LibvirtQemudPart";
/// The newest version known.
const VERSION: u32 = 2;
const UNUSED_BYTES: usize = 56;

/// The order of the bytes of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteOrder {
    /// As on x86 and ARM.
    Little,
    /// As on s390x.
    Big,
}

/// What the magic says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It was written to its end.
    Complete,
    /// It is being written, or its writer died.
    Partial,
}

/// A decoded header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Whether it was completed.
    pub state: State,
    /// The order of its numbers.
    pub order: ByteOrder,
    /// Its version, 1 or 2.
    pub version: u32,
    /// Bytes from the header to the payload.
    pub data_length: u32,
    /// Whether the VM ran: any number but 0.
    pub was_running: u32,
    /// The number of the payload's format, which may be unknown.
    pub format: u32,
    /// The cookie's offset behind the header, in bytes; 0: none.
    pub cookie_offset: u32,
    /// Bytes without a meaning yet.
    pub unused: [u8; UNUSED_BYTES],
}

/// Why bytes are no header that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Another magic.
    NotSaveImage,
    /// The magic is right, and the file ends within the header.
    Short(State),
    /// Neither 1 nor 2 in either byte order.
    Version(State, u32),
}

impl Header {
    /// A header of this version in little-endian order, as it is while the image is written.
    pub(crate) fn new(data_length: u32, was_running: bool, format: u32, cookie: u32) -> Self {
        Self {
            state: State::Partial,
            order: ByteOrder::Little,
            version: VERSION,
            data_length,
            was_running: u32::from(was_running),
            format,
            cookie_offset: cookie,
            unused: [0; UNUSED_BYTES],
        }
    }

    /// Decodes the beginning of a file.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Refused> {
        let state = match bytes.first_chunk::<MAGIC_BYTES>() {
            Some(magic) if magic == COMPLETE => State::Complete,
            Some(magic) if magic == PARTIAL => State::Partial,
            Some(_) | None => return Err(Refused::NotSaveImage),
        };
        let Some(bytes) = bytes.first_chunk::<HEADER_BYTES>() else {
            return Err(Refused::Short(state));
        };
        let (order, version) = version(bytes).map_err(|found| Refused::Version(state, found))?;
        let mut unused = [0; UNUSED_BYTES];
        unused.copy_from_slice(&bytes[36..HEADER_BYTES]);
        Ok(Self {
            state,
            order,
            version,
            data_length: number(bytes, 20, order),
            was_running: number(bytes, 24, order),
            // Version 1 knew one format, and its place may hold anything.
            format: if version == 1 {
                0
            } else {
                number(bytes, 28, order)
            },
            cookie_offset: if version == 1 {
                0
            } else {
                number(bytes, 32, order)
            },
            unused,
        })
    }

    /// The bytes, in the header's own order.
    pub(crate) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..MAGIC_BYTES].copy_from_slice(match self.state {
            State::Complete => COMPLETE,
            State::Partial => PARTIAL,
        });
        let numbers = [
            self.version,
            self.data_length,
            self.was_running,
            self.format,
            self.cookie_offset,
        ];
        for (place, number) in bytes[MAGIC_BYTES..36].chunks_exact_mut(4).zip(numbers) {
            place.copy_from_slice(&match self.order {
                ByteOrder::Little => number.to_le_bytes(),
                ByteOrder::Big => number.to_be_bytes(),
            });
        }
        bytes[36..].copy_from_slice(&self.unused);
        bytes
    }

    /// Where the payload starts, in bytes from the beginning of the file.
    #[must_use]
    pub fn payload_at(&self) -> u64 {
        HEADER_BYTES as u64 + u64::from(self.data_length)
    }
}

/// The order in which the version is one that is known, or the version if there is none.
fn version(bytes: &[u8; HEADER_BYTES]) -> Result<(ByteOrder, u32), u32> {
    let little = number(bytes, 16, ByteOrder::Little);
    let big = number(bytes, 16, ByteOrder::Big);
    if (1..=VERSION).contains(&little) {
        return Ok((ByteOrder::Little, little));
    }
    if (1..=VERSION).contains(&big) {
        return Ok((ByteOrder::Big, big));
    }
    Err(little.min(big))
}

fn number(bytes: &[u8; HEADER_BYTES], at: usize, order: ByteOrder) -> u32 {
    let mut four = [0; 4];
    four.copy_from_slice(&bytes[at..at + 4]);
    match order {
        ByteOrder::Little => u32::from_le_bytes(four),
        ByteOrder::Big => u32::from_be_bytes(four),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_of_either_byte_order_is_read_back_as_it_was_written() {
        for order in [ByteOrder::Little, ByteOrder::Big] {
            let mut header = Header::new(70_000, true, 5, 1234);
            header.order = order;
            header.unused[7] = 9;
            let bytes = header.encode();
            assert_eq!(&bytes[..16], PARTIAL);
            assert_eq!(Header::decode(&bytes), Ok(header));
        }
        assert_eq!(
            Header::new(1, true, 0, 0).encode()[16..24],
            [2, 0, 0, 0, 1, 0, 0, 0]
        );
    }

    #[test]
    fn other_files_cut_off_headers_and_newer_versions_are_told_apart() {
        let mut bytes = Header::new(1, true, 0, 0).encode();
        assert_eq!(Header::decode(b"QFI\xfb"), Err(Refused::NotSaveImage));
        assert_eq!(
            Header::decode(&bytes[..91]),
            Err(Refused::Short(State::Partial))
        );
        bytes[16] = 3;
        assert_eq!(
            Header::decode(&bytes),
            Err(Refused::Version(State::Partial, 3))
        );
        bytes[16] = 0;
        assert_eq!(
            Header::decode(&bytes),
            Err(Refused::Version(State::Partial, 0))
        );
    }
}
