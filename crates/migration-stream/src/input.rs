//! The bytes of a stream, taken from the front, with their place for error texts.

use std::io::{self, BufReader, Read, Seek};

use crate::error::{Error, Result};

/// A stream being read. It knows where it is, and in which section.
#[derive(Debug)]
pub(crate) struct Input<R> {
    reader: R,
    at: u64,
    section: String,
    kept: Option<Kept>,
    /// How the reader steps over bytes without reading them, if it can.
    seek: Option<fn(&mut R, i64) -> io::Result<()>>,
}

impl<R: Read + Seek> Input<BufReader<R>> {
    /// As [`Input::new`], and steps over long ranges without reading them.
    pub fn seeking(reader: BufReader<R>) -> Self {
        let mut input = Self::new(reader);
        input.seek = Some(BufReader::seek_relative);
        input
    }
}

/// A copy of what was read, for [`crate::split_ram`].
#[derive(Debug)]
struct Kept {
    bytes: Vec<u8>,
    limit: u64,
}

impl<R: Read> Input<R> {
    pub fn new(reader: R) -> Self {
        Self {
            reader,
            at: 0,
            section: "the header".into(),
            kept: None,
            seek: None,
        }
    }

    /// As [`Input::new`], and keeps up to `limit` bytes of what is read.
    pub fn keeping(reader: R, limit: u64) -> Self {
        let mut input = Self::new(reader);
        input.kept = Some(Kept {
            bytes: Vec::new(),
            limit,
        });
        input
    }

    /// How many bytes were read.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Says what is being read from here on, for error texts.
    pub fn enter(&mut self, section: impl Into<String>) {
        self.section = section.into();
    }

    pub fn damaged(&self, at: u64, reason: impl Into<String>) -> Error {
        Error::Damaged {
            at,
            section: self.section.clone(),
            reason: reason.into(),
        }
    }

    pub fn unsupported(&self, at: u64, feature: impl Into<String>) -> Error {
        Error::Unsupported {
            at,
            section: self.section.clone(),
            feature: feature.into(),
        }
    }

    pub fn require(&self, holds: bool, at: u64, reason: impl FnOnce() -> String) -> Result<()> {
        if holds {
            return Ok(());
        }
        Err(self.damaged(at, reason()))
    }

    /// Fills `bytes`.
    pub fn read(&mut self, bytes: &mut [u8]) -> Result<()> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.some(&mut bytes[filled..])? {
                0 => {
                    return Err(Error::CutOff {
                        at: self.at,
                        section: self.section.clone(),
                        wanted: (bytes.len() - filled) as u64,
                    });
                }
                got => filled += got,
            }
        }
        Ok(())
    }

    /// Reads what is there, at most `bytes`; 0 at the end of the stream.
    fn some(&mut self, bytes: &mut [u8]) -> Result<usize> {
        let got = loop {
            match self.reader.read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Error::Io {
                        at: self.at,
                        source,
                    });
                }
                Ok(got) => break got,
            }
        };
        self.at += got as u64;
        self.keep(&bytes[..got])?;
        Ok(got)
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(kept) = &mut self.kept else {
            return Ok(());
        };
        if (kept.bytes.len() + bytes.len()) as u64 > kept.limit {
            return Err(Error::TooLarge {
                at: self.at,
                limit: kept.limit,
            });
        }
        kept.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// How many bytes are kept now; for [`Input::forget_from`].
    pub fn kept_length(&self) -> usize {
        self.kept.as_ref().map_or(0, |kept| kept.bytes.len())
    }

    /// Drops what was kept behind the first `length` bytes.
    pub fn forget_from(&mut self, length: usize) {
        if let Some(kept) = &mut self.kept {
            kept.bytes.truncate(length);
        }
    }

    /// What was kept.
    pub fn into_kept(self) -> Vec<u8> {
        self.kept.map(|kept| kept.bytes).unwrap_or_default()
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    pub fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// One byte, or `None` at the end of the stream.
    pub fn u8_or_end(&mut self) -> Result<Option<u8>> {
        let mut byte = [0];
        Ok((self.some(&mut byte)? == 1).then_some(byte[0]))
    }

    /// One byte of length and that many bytes of text.
    pub fn name(&mut self) -> Result<String> {
        let length = self.u8()?;
        self.text(usize::from(length))
    }

    /// `length` bytes of printable text; the caller has bounded `length`.
    pub fn text(&mut self, length: usize) -> Result<String> {
        let at = self.at;
        let mut bytes = vec![0; length];
        self.read(&mut bytes)?;
        let text = String::from_utf8(bytes)
            .map_err(|error| self.damaged(at, format!("a name is no text: {error}")))?;
        let printable = !text.is_empty() && text.chars().all(|c| !c.is_control());
        self.require(printable, at, || format!("a name is {text:?}"))?;
        Ok(text)
    }

    /// Reads `length` bytes and looks at none of them.
    pub fn skip(&mut self, length: u64) -> Result<()> {
        let mut buffer = [0; 8192];
        let mut left = length;
        while left > 0 {
            let step = left.min(buffer.len() as u64);
            self.read(&mut buffer[..step as usize])?;
            left -= step;
        }
        Ok(())
    }

    /// Goes on behind the next `length` bytes; where they lie behind the end, the next read says so.
    pub fn step_over(&mut self, length: u64) -> Result<()> {
        let Some(seek) = self.seek else {
            return self.skip(length);
        };
        let Ok(by) = i64::try_from(length) else {
            return Err(self.damaged(self.at, format!("{length} bytes are to follow")));
        };
        seek(&mut self.reader, by).map_err(|source| Error::Io {
            at: self.at,
            source,
        })?;
        self.at += length;
        Ok(())
    }

    /// Reads `length` bytes, a multiple of 8, and counts the bits that are 1.
    pub fn ones(&mut self, length: u64) -> Result<u64> {
        assert!(length.is_multiple_of(8), "bits come in words");
        let mut buffer = [0; 8192];
        let (mut left, mut count) = (length, 0);
        while left > 0 {
            let step = left.min(buffer.len() as u64);
            let bytes = &mut buffer[..step as usize];
            self.read(bytes)?;
            let (words, _) = bytes.as_chunks();
            for word in words {
                count += u64::from(u64::from_ne_bytes(*word).count_ones());
            }
            left -= step;
        }
        Ok(count)
    }

    /// Reads all that follows.
    pub fn rest(&mut self) -> Result<()> {
        let mut buffer = [0; 8192];
        while self.some(&mut buffer)? > 0 {}
        Ok(())
    }
}
