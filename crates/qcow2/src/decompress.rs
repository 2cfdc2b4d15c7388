//! Compressed clusters: exactly one cluster out of them, or an error.
//!
//! A compressed cluster carries no checksum (zlib's are raw deflate streams, QEMU's zstd frames have
//! none), so a flipped bit can give other bytes of the right length. Only content hashes see that.

use flate2::{Decompress, FlushDecompress};

use crate::header::Compression;

/// Fills `out` from the compressed bytes, or says why that cannot be.
pub(crate) fn decompress(
    method: Compression,
    compressed: &[u8],
    out: &mut [u8],
) -> Result<(), String> {
    match method {
        Compression::Zlib => inflate(compressed, out),
        Compression::Zstd => zstd_frames(compressed, out),
    }
}

/// Bytes behind the stream are ignored: the last sector is shared or padded.
fn inflate(compressed: &[u8], out: &mut [u8]) -> Result<(), String> {
    let mut stream = Decompress::new(false);
    stream
        .decompress(compressed, out, FlushDecompress::Finish)
        .map_err(|error| error.to_string())?;
    let got = stream.total_out();
    if got == out.len() as u64 {
        return Ok(());
    }
    Err(format!("it gives {got} bytes instead of {}", out.len()))
}

/// Frame by frame into `out`, without a window buffer, so that no frame can ask for memory.
fn zstd_frames(compressed: &[u8], out: &mut [u8]) -> Result<(), String> {
    let mut decompressor =
        zstd::bulk::Decompressor::new().map_err(|error| format!("no decompressor: {error}"))?;
    let (mut from, mut to) = (0, 0);
    while to < out.len() {
        let frame = zstd::zstd_safe::find_frame_compressed_size(&compressed[from..])
            .map_err(|code| zstd::zstd_safe::get_error_name(code).to_owned())?;
        let input = &compressed[from..from + frame];
        let got = decompressor
            .decompress_to_buffer(input, &mut out[to..])
            .map_err(|error| error.to_string())?;
        if got == 0 {
            return Err(format!("it gives {to} bytes instead of {}", out.len()));
        }
        from += frame;
        to += got;
    }
    Ok(())
}
