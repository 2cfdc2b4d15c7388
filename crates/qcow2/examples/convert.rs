//! Copies an image as `qemu-img convert` does, and says how long it took:
//! `convert SOURCE_FORMAT SOURCE TARGET_FORMAT TARGET [zlib|zstd] [cached]`.

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use stead_qcow2::{
    Chain, Compression, Control, ConvertOptions, Durability, LayerFile, LayerFormat, NewFormat,
    Preallocation, Qcow2Options, Target, convert,
};
use stead_sys::durable::Existing;

fn format(name: &str) -> Result<LayerFormat, String> {
    match name {
        "raw" => Ok(LayerFormat::Raw),
        "qcow2" => Ok(LayerFormat::Qcow2),
        other => Err(format!("unknown format {other}")),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [source_format, source, target_format, target, rest @ ..] = &args[..] else {
        return Err("SOURCE_FORMAT SOURCE TARGET_FORMAT TARGET [zlib|zstd] [cached]".into());
    };
    let source = Chain::open(&[LayerFile {
        path: PathBuf::from(source),
        format: format(source_format)?,
    }])?;
    let method = rest.first().map(String::as_str);
    let qcow2 = Qcow2Options {
        compression: match method {
            Some("zstd") => Compression::Zstd,
            Some(_) | None => Compression::Zlib,
        },
        ..Qcow2Options::default()
    };
    let options = ConvertOptions {
        format: match format(target_format)? {
            LayerFormat::Raw => NewFormat::Raw {
                preallocation: Preallocation::Off,
            },
            LayerFormat::Qcow2 => NewFormat::Qcow2(qcow2),
        },
        compressed: matches!(method, Some("zlib" | "zstd")),
        durability: if rest.iter().any(|word| word == "cached") {
            Durability::Cached
        } else {
            Durability::Synced
        },
        ..ConvertOptions::default()
    };
    let target = Target::New {
        path: PathBuf::from(target),
        mode: 0o644,
        existing: Existing::Replace,
    };
    let start = Instant::now();
    let made = convert(&source, &target, &options, &Control::default())?;
    println!("{:.3} s, {made:?}", start.elapsed().as_secs_f64());
    Ok(())
}
