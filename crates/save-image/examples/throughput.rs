//! How fast an image is written and verified: a migration stream of a gibibyte of noise, in memory before it starts.
//!
//!     cargo run --release -p stead-save-image --example throughput FOLDER
//!
//! Compare with `dd if=/dev/zero of=FOLDER/dd bs=2M count=512 oflag=direct conv=fsync`.
#![allow(
    clippy::disallowed_methods,
    reason = "what it writes is removed at once"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::path::PathBuf;
use std::time::Instant;

use common::{streams, whole, write_stream};
use stead_save_image::Format;

/// How often the same 64 MiB of RAM are in the stream.
const ROUNDS: usize = 16;

fn main() {
    let folder = PathBuf::from(std::env::args().nth(1).expect("usage: throughput FOLDER"));
    let stream = streams::large_in_rounds(64, ROUNDS);
    for format in [Format::Raw, Format::Zstd] {
        let path = folder.join("throughput.save");
        let tell = |what, begun: Instant| {
            let seconds = begun.elapsed().as_secs_f64();
            let rate = stream.len() as f64 / 1e6 / seconds;
            println!("{} {what}: {seconds:.2} s, {rate:.0} MB/s", format.name());
        };
        let begun = Instant::now();
        write_stream(&path, format, &stream);
        tell("write", begun);
        let begun = Instant::now();
        whole(&path).expect("a whole image");
        tell("verify", begun);
        stead_sys::durable::remove_file(&path).expect("remove");
    }
}
