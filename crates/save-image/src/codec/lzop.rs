//! lzop files: a header, blocks of LZO1X each with its lengths and a checksum, and a length of 0 as the end.
//!
//! ```text
//! 89 4c 5a 4f 00 0d 0a 1a 0a                          magic
//! be16 version  be16 library  be16 version needed     0x0940 and newer
//! u8 method  u8 level  be32 flags  [be32 filter]  be32 mode  be32 time  be32 time, upper half
//! u8 length, name  be32 checksum of all but the magic
//! be32 length  be32 stored length  checksums  data    blocks; stored as it is where both lengths are equal
//! be32 0                                              end
//! ```
//!
//! # Source
//! The layout is described in several places, among them the manual page of lzop and the readers of other
//! projects; the blocks are the `lzokay` crate's.

use std::io::{self, BufRead, Read, Write};

const MAGIC: &[u8; 9] = b"\x89LZO\0\r\n\x1a\n";
/// What this writer says it is, and what a reader must be: the version whose layout is above.
const VERSION: u16 = 0x1030;
const LIBRARY: u16 = 0x2080;
const VERSION_NEEDED: u16 = 0x0940;
const VERSION_MAX: u16 = 0x1fff;
/// LZO1X-1; 2 and 3 are decompressed alike.
const METHOD: u8 = 1;
const METHODS: std::ops::RangeInclusive<u8> = 1..=3;
const LEVEL: u8 = 3;
/// What a block of ours has at most, in bytes; the program's own size.
const BLOCK_BYTES: usize = 256 << 10;
/// What a block of others may have at most, in bytes; the program's own limit.
const BLOCK_BYTES_MAX: u32 = 64 << 20;

mod flag {
    pub const ADLER_DATA: u32 = 0x1;
    pub const ADLER_STORED: u32 = 0x2;
    pub const EXTRA: u32 = 0x40;
    pub const CRC_DATA: u32 = 0x100;
    pub const CRC_STORED: u32 = 0x200;
    pub const MULTIPART: u32 = 0x400;
    pub const FILTER: u32 = 0x800;
    pub const CRC_HEADER: u32 = 0x1000;
}

fn adler32(bytes: &[u8]) -> u32 {
    const MODULUS: u32 = 65_521;
    /// How many bytes can be summed before a sum overflows.
    const RUN: usize = 5552;
    let (mut low, mut high) = (1_u32, 0_u32);
    for run in bytes.chunks(RUN) {
        for byte in run {
            low += u32::from(*byte);
            high += low;
        }
        low %= MODULUS;
        high %= MODULUS;
    }
    high << 16 | low
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// Writes an lzop file.
pub(crate) struct Encoder<W: Write> {
    output: W,
    block: Vec<u8>,
}

impl<W: Write> Encoder<W> {
    pub fn new(mut output: W) -> io::Result<Self> {
        let mut header = Vec::new();
        for number in [VERSION, LIBRARY, VERSION_NEEDED] {
            header.extend(number.to_be_bytes());
        }
        header.extend([METHOD, LEVEL]);
        // Flags, the mode of a plain file, no time, and no name.
        for number in [flag::ADLER_DATA, 0o100_600, 0, 0] {
            header.extend(number.to_be_bytes());
        }
        header.push(0);
        let checksum = adler32(&header);
        output.write_all(MAGIC)?;
        output.write_all(&header)?;
        output.write_all(&checksum.to_be_bytes())?;
        Ok(Self {
            output,
            block: Vec::with_capacity(BLOCK_BYTES),
        })
    }

    fn write_block(&mut self) -> io::Result<()> {
        let packed = lzokay::compress::compress(&self.block).map_err(|error| failed(&error))?;
        let stored = if packed.len() < self.block.len() {
            &packed
        } else {
            &self.block
        };
        for number in [length(&self.block)?, length(stored)?, adler32(&self.block)] {
            self.output.write_all(&number.to_be_bytes())?;
        }
        self.output.write_all(stored)?;
        self.block.clear();
        Ok(())
    }

    pub fn finish(mut self) -> io::Result<W> {
        if !self.block.is_empty() {
            self.write_block()?;
        }
        self.output.write_all(&[0; 4])?;
        Ok(self.output)
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(BLOCK_BYTES - self.block.len());
        self.block.extend_from_slice(&bytes[..count]);
        if self.block.len() == BLOCK_BYTES {
            self.write_block()?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn length(bytes: &[u8]) -> io::Result<u32> {
    u32::try_from(bytes.len()).map_err(io::Error::other)
}

fn failed(error: &lzokay::Error) -> io::Error {
    damaged(format!("LZO block: {error:?}"))
}

fn damaged(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// Reads lzop files in a row.
pub(crate) struct Decoder<R> {
    input: R,
    flags: u32,
    /// Whether a block may come next, or the end of the file.
    in_member: bool,
    block: Vec<u8>,
    /// How much of the block was given away.
    given: usize,
}

impl<R: BufRead> Decoder<R> {
    pub fn new(input: R) -> io::Result<Self> {
        let mut decoder = Self {
            input,
            flags: 0,
            in_member: false,
            block: Vec::new(),
            given: 0,
        };
        decoder.read_header()?;
        Ok(decoder)
    }

    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn number(&mut self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(self.bytes()?))
    }

    fn read_header(&mut self) -> io::Result<()> {
        if &self.bytes()? != MAGIC {
            return Err(damaged("no lzop header"));
        }
        let mut header = self.bytes::<8>()?.to_vec();
        let version = u16::from_be_bytes([header[0], header[1]]);
        let needed = u16::from_be_bytes([header[4], header[5]]);
        if !(VERSION_NEEDED..=VERSION_MAX).contains(&version) || needed > VERSION_MAX {
            return Err(damaged(format!("lzop version {version:#06x} is not known")));
        }
        if !METHODS.contains(&header[6]) {
            return Err(damaged(format!("lzop method {} is not known", header[6])));
        }
        self.flags = self.number()?;
        header.extend(self.flags.to_be_bytes());
        if self.flags & (flag::FILTER | flag::MULTIPART) != 0 {
            return Err(damaged("lzop file with a filter or of several parts"));
        }
        header.extend(self.bytes::<13>()?);
        let mut name = vec![0; usize::from(header[header.len() - 1])];
        self.input.read_exact(&mut name)?;
        header.extend(name);
        self.check_header(&header)?;
        self.skip_extra()?;
        self.in_member = true;
        Ok(())
    }

    fn check_header(&mut self, header: &[u8]) -> io::Result<()> {
        let by_crc = self.flags & flag::CRC_HEADER != 0;
        let expected = if by_crc {
            crc32(header)
        } else {
            adler32(header)
        };
        let found = self.number()?;
        if found != expected {
            return Err(damaged("the checksum of the lzop header is wrong"));
        }
        Ok(())
    }

    fn skip_extra(&mut self) -> io::Result<()> {
        if self.flags & flag::EXTRA == 0 {
            return Ok(());
        }
        let length = u64::from(self.number()?) + 4;
        let skipped = io::copy(&mut self.input.by_ref().take(length), &mut io::sink())?;
        if skipped < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Reads the next block; `false` at the end of the last member.
    fn next_block(&mut self) -> io::Result<bool> {
        loop {
            if !self.in_member {
                if self.input.fill_buf()?.is_empty() {
                    return Ok(false);
                }
                self.read_header()?;
            }
            let length = self.number()?;
            if length > 0 {
                self.read_block(length)?;
                return Ok(true);
            }
            self.in_member = false;
        }
    }

    fn read_block(&mut self, length: u32) -> io::Result<()> {
        let stored = self.number()?;
        if length > BLOCK_BYTES_MAX || stored > length || stored == 0 {
            return Err(damaged(format!(
                "an lzop block of {stored} bytes for {length}, {BLOCK_BYTES_MAX} at most"
            )));
        }
        let of_data = [self.sum(flag::ADLER_DATA)?, self.sum(flag::CRC_DATA)?];
        let packed = stored < length;
        let of_stored = if packed {
            [self.sum(flag::ADLER_STORED)?, self.sum(flag::CRC_STORED)?]
        } else {
            [None, None]
        };
        let mut bytes = Vec::new();
        self.input
            .by_ref()
            .take(u64::from(stored))
            .read_to_end(&mut bytes)?;
        if bytes.len() as u64 != u64::from(stored) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        check(&bytes, of_stored)?;
        self.block = if packed {
            unpack(&bytes, length)?
        } else {
            bytes
        };
        self.given = 0;
        check(&self.block, of_data)
    }

    fn sum(&mut self, flag: u32) -> io::Result<Option<u32>> {
        if self.flags & flag == 0 {
            return Ok(None);
        }
        self.number().map(Some)
    }
}

fn unpack(bytes: &[u8], length: u32) -> io::Result<Vec<u8>> {
    let mut block = vec![0; usize::try_from(length).map_err(io::Error::other)?];
    let found =
        lzokay::decompress::decompress(bytes, &mut block).map_err(|error| failed(&error))?;
    if found != block.len() {
        return Err(damaged(format!(
            "an lzop block of {found} bytes, expected {length}"
        )));
    }
    Ok(block)
}

/// Compares Adler-32 and CRC-32, each where it is given.
fn check(bytes: &[u8], [adler, crc]: [Option<u32>; 2]) -> io::Result<()> {
    let right =
        adler.is_none_or(|sum| sum == adler32(bytes)) && crc.is_none_or(|sum| sum == crc32(bytes));
    if right {
        return Ok(());
    }
    Err(damaged("the checksum of an lzop block is wrong"))
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.given == self.block.len() && !self.next_block()? {
            return Ok(0);
        }
        let left = &self.block[self.given..];
        let count = left.len().min(bytes.len());
        bytes[..count].copy_from_slice(&left[..count]);
        self.given += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_their_definitions() {
        assert_eq!(adler32(b"Wikipedia"), 0x11e6_0398);
        assert_eq!(adler32(&vec![0xff; 100_000]), {
            let (mut low, mut high) = (1_u64, 0_u64);
            for _ in 0..100_000 {
                low = (low + 255) % 65_521;
                high = (high + low) % 65_521;
            }
            (high << 16 | low) as u32
        });
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn a_block_that_announces_gigabytes_or_more_than_it_is_costs_nothing() {
        let mut file = Encoder::new(Vec::new()).expect("start").output;
        for lengths in [
            [u32::MAX, 16],
            [BLOCK_BYTES_MAX, u32::MAX],
            [16, 17],
            [16, 0],
        ] {
            let start = file.len();
            lengths.iter().for_each(|n| file.extend(n.to_be_bytes()));
            let mut decoder = Decoder::new(file.as_slice()).expect("header");
            let error = decoder.read(&mut [0; 9]).expect_err("refused");
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            file.truncate(start);
        }
    }
}
