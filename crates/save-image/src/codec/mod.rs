//! The payload's compressors and decompressors: streaming, with bounded memory whatever the payload says.

mod lzop;

use std::io::{self, BufReader, Read, Write};

use crate::format::Format;

/// The most memory that an xz stream may ask for, in bytes; the program's highest level needs 65 MiB.
const XZ_MEMORY_BYTES: u64 = 256 << 20;
/// The largest window of a zstd frame, as a power of two; the program accepts this much without being asked to.
const ZSTD_WINDOW_LOG2_MAX: u32 = 27;
/// Fast levels: the VM stands still while its state is written.
const GZIP_LEVEL: u32 = 3;
const XZ_LEVEL: u32 = 1;
const ZSTD_LEVEL: i32 = 1;
const ZSTD_THREADS: u32 = 2;
const READ_BYTES: usize = 256 << 10;

/// Compresses what is written to it into `W`.
pub(crate) enum Encoder<W: Write> {
    Raw(W),
    Gzip(flate2::write::GzEncoder<W>),
    Bzip2(bzip2::write::BzEncoder<W>),
    Xz(liblzma::write::XzEncoder<W>),
    Lzop(lzop::Encoder<W>),
    Zstd(zstd::stream::write::Encoder<'static, W>),
}

impl<W: Write> Encoder<W> {
    /// `None` where the format is no stream.
    pub fn new(format: Format, output: W) -> io::Result<Option<Self>> {
        Ok(Some(match format {
            Format::Raw => Self::Raw(output),
            Format::Gzip => {
                let level = flate2::Compression::new(GZIP_LEVEL);
                Self::Gzip(flate2::write::GzEncoder::new(output, level))
            }
            Format::Bzip2 => {
                let level = bzip2::Compression::best();
                Self::Bzip2(bzip2::write::BzEncoder::new(output, level))
            }
            Format::Xz => Self::Xz(liblzma::write::XzEncoder::new(output, XZ_LEVEL)),
            Format::Lzop => Self::Lzop(lzop::Encoder::new(output)?),
            Format::Zstd => Self::Zstd(zstd_encoder(output)?),
            Format::Sparse => return Ok(None),
        }))
    }

    /// Ends the compressed stream.
    pub fn finish(self) -> io::Result<W> {
        match self {
            Self::Raw(output) => Ok(output),
            Self::Gzip(encoder) => encoder.finish(),
            Self::Bzip2(encoder) => encoder.finish(),
            Self::Xz(encoder) => encoder.finish(),
            Self::Lzop(encoder) => encoder.finish(),
            Self::Zstd(encoder) => encoder.finish(),
        }
    }
}

fn zstd_encoder<W: Write>(output: W) -> io::Result<zstd::stream::write::Encoder<'static, W>> {
    let mut encoder = zstd::stream::write::Encoder::new(output, ZSTD_LEVEL)?;
    encoder.multithread(ZSTD_THREADS)?;
    encoder.include_checksum(true)?;
    Ok(encoder)
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Raw(output) => output.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Bzip2(encoder) => encoder.write(bytes),
            Self::Xz(encoder) => encoder.write(bytes),
            Self::Lzop(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    /// Nothing is flushed before the end: a half-filled block would only be larger.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The decompressed payload; several members in a row are one payload, and anything else behind the last one
/// is an error. `None` where the format is no stream.
pub(crate) fn decoder<'a>(
    format: Format,
    input: impl Read + Send + 'a,
) -> io::Result<Option<Box<dyn Read + Send + 'a>>> {
    let input = BufReader::with_capacity(READ_BYTES, input);
    Ok(Some(match format {
        Format::Raw => Box::new(input),
        Format::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Format::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(input)),
        Format::Xz => Box::new(xz_decoder(input)?),
        Format::Lzop => Box::new(lzop::Decoder::new(input)?),
        Format::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG2_MAX)?;
            Box::new(decoder)
        }
        Format::Sparse => return Ok(None),
    }))
}

fn xz_decoder<R: io::BufRead>(input: R) -> io::Result<liblzma::bufread::XzDecoder<R>> {
    use liblzma::stream::{CONCATENATED, Stream};
    let stream = Stream::new_stream_decoder(XZ_MEMORY_BYTES, CONCATENATED)?;
    Ok(liblzma::bufread::XzDecoder::new_stream(input, stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let noise = (0..400_000_u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8);
        noise
            .chain((0..300_000).map(|n| (n / 1000) as u8))
            .collect()
    }

    pub fn packed(format: Format, bytes: &[u8]) -> Vec<u8> {
        let mut encoder = Encoder::new(format, Vec::new())
            .expect("start")
            .expect("a stream");
        for piece in bytes.chunks(77_777) {
            encoder.write_all(piece).expect("write");
        }
        encoder.finish().expect("finish")
    }

    fn unpacked(format: Format, bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut decoder = decoder(format, bytes)?.expect("a stream");
        let mut all = Vec::new();
        decoder.read_to_end(&mut all)?;
        Ok(all)
    }

    const PACKED: [Format; 5] = [
        Format::Gzip,
        Format::Bzip2,
        Format::Xz,
        Format::Lzop,
        Format::Zstd,
    ];

    #[test]
    fn what_is_compressed_comes_back_and_starts_as_its_format_does() {
        let sample = sample();
        for format in PACKED {
            for length in [0, 1, 1000, sample.len()] {
                let packed = packed(format, &sample[..length]);
                assert_eq!(Format::of_payload(&packed), Some(format));
                assert!(unpacked(format, &packed).expect("whole") == sample[..length]);
            }
        }
    }

    #[test]
    fn two_members_in_a_row_are_one_payload() {
        for format in PACKED {
            let mut both = packed(format, b"one ");
            both.extend(packed(format, b"two"));
            assert_eq!(
                unpacked(format, &both).expect("whole"),
                b"one two",
                "{format:?}"
            );
        }
    }

    #[test]
    fn a_compressed_payload_cut_off_anywhere_or_with_something_behind_it_is_an_error() {
        let sample = &sample()[..3000];
        for format in PACKED {
            let packed = packed(format, sample);
            for cut in 0..packed.len() {
                let result = unpacked(format, &packed[..cut]);
                // Nothing at all is a payload of no members; that it is no stream is found behind this.
                let empty = cut == 0 && result.as_ref().is_ok_and(Vec::is_empty);
                assert!(empty || result.is_err(), "{format:?} cut at {cut}");
            }
            let longer = [packed.as_slice(), b"garbage behind it"].concat();
            assert!(unpacked(format, &longer).is_err(), "{format:?}");
        }
    }
}
