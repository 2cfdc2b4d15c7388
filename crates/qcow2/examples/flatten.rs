//! Fills everything that an image and its internal snapshots show of the files below, and names none any more:
//! `cargo run --release --example flatten -- IMAGE`.

use std::path::PathBuf;
use std::time::Instant;

use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::{Chain, Control, LayerFile, LayerFormat, OpenPolicy, ops};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = PathBuf::from(std::env::args_os().nth(1).ok_or("name an image")?);
    let top = LayerFile {
        path: path.clone(),
        format: LayerFormat::Qcow2,
    };
    let started = Instant::now();
    let below = Chain::open_following(&top, &OpenPolicy::NAMES)?.below(1);
    let mut editor = Editor::open(&path, EditOptions::default())?;
    let done = ops::rebase::flatten(&mut editor, below.as_ref(), &Control::default())?;
    println!(
        "{} bytes filled in {:?}; the file has {} bytes",
        done.value.bytes,
        started.elapsed(),
        done.room.end_bytes
    );
    Ok(())
}
