//! Commits a qcow2 top into the file below it and empties the top: `commit TOP BASE [raw]`. For measurements.

use std::time::Instant;

use stead_qcow2::ops::commit::{CommitOptions, commit};
use stead_qcow2::{Control, LayerFile, LayerFormat};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let top = args.next().ok_or("commit TOP BASE [raw]")?;
    let base = args.next().ok_or("commit TOP BASE [raw]")?;
    let format = match args.next().as_deref() {
        Some("raw") => LayerFormat::Raw,
        Some(_) | None => LayerFormat::Qcow2,
    };
    let file = |path: String, format| LayerFile {
        path: path.into(),
        format,
    };
    let files = [file(top, LayerFormat::Qcow2), file(base, format)];
    let options = CommitOptions {
        empty_top: true,
        ..CommitOptions::default()
    };
    let start = Instant::now();
    let report = commit(&files, &options, &Control::default())?;
    println!("{:?} {report:?}", start.elapsed());
    Ok(())
}
