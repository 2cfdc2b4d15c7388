//! Makes the images that the fuzzers begin with: `cargo run --package stead-qcow2 --example fuzz_seeds -- FOLDER`,
//! which needs `qemu-img` and `qemu-io`. Each is small, and together they have every feature of the format.
//!
//! They are in the repository (`fuzz/seeds`), so this is only run when a feature is added. A seed that is there is
//! replaced by one that says the same with other times in it.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::ops::commit::{CommitOptions, RawBase, commit_into_raw};
use stead_qcow2::ops::rebase::{BackingFile, rename};
use stead_qcow2::{Control, Layer, Result as ImageResult};
use stead_sim::RecordedDisk;
use stead_sim::disk::Event;
use stead_sys::storage::Storage;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Name, options of the format, and whether it has internal snapshots and bitmaps.
const KINDS: [(&str, &str, bool); 8] = [
    ("v3", "cluster_size=512", true),
    ("v2", "cluster_size=512,compat=0.10", true),
    (
        "zstd",
        "cluster_size=1k,compression_type=zstd,refcount_bits=8",
        true,
    ),
    (
        "lazy",
        "cluster_size=512,lazy_refcounts=on,refcount_bits=64",
        true,
    ),
    ("one-bit", "cluster_size=512,refcount_bits=1", false),
    ("subclusters", "cluster_size=16k,extended_l2=on", false),
    ("default", "cluster_size=4k", false),
    ("old", "cluster_size=4k,compat=0.10", false),
];
/// The length of a disk, in bytes.
const DISK: u64 = 20 << 10;

fn run(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output()?;
    if output.status.success() {
        return Ok(());
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {args:?}: {errors}").into())
}

fn qemu_img(line: &str) -> Result<()> {
    run("qemu-img", &line.split_whitespace().collect::<Vec<_>>())
}

fn qemu_io(image: &Path, commands: &[&str]) -> Result<()> {
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    for command in commands {
        args.extend(["-c", *command]);
    }
    let name = image.display().to_string();
    args.push(&name);
    run("qemu-io", &args)
}

struct Seeds {
    /// Where they go.
    to: PathBuf,
    /// Where images are made.
    dir: tempfile::TempDir,
}

impl Seeds {
    fn keep(&self, target: &str, name: &str, bytes: &[u8]) -> Result<()> {
        let folder = self.to.join(target);
        std::fs::create_dir_all(&folder)?;
        #[allow(clippy::disallowed_methods, reason = "a scratch file of a developer")]
        std::fs::write(folder.join(name), bytes)?;
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// An image with data, compressed data, zeros and, if `rich`, internal snapshots and bitmaps.
    fn image(&self, name: &str, options: &str, rich: bool) -> Result<Vec<u8>> {
        let path = self.path(name);
        let shown = path.display();
        qemu_img(&format!("create -q -f qcow2 -o {options} {shown} {DISK}"))?;
        qemu_io(&path, &["write -P 1 0 1k", "write -c -P 2 16k 4k"])?;
        if rich {
            qemu_img(&format!("snapshot -c first {shown}"))?;
            if !options.contains("0.10") {
                qemu_img(&format!("bitmap --add -g 512 {shown} b0"))?;
                qemu_img(&format!("bitmap --add --disable -g 65536 {shown} b1"))?;
            }
        }
        let zeros = if options.contains("0.10") {
            "write -P 0 2k 1k"
        } else {
            "write -z 2k 1k"
        };
        qemu_io(&path, &["write -P 3 512 2k", zeros, "write -P 4 17k 512"])?;
        if rich {
            qemu_img(&format!("snapshot -c second {shown}"))?;
            qemu_io(&path, &["write -P 5 8k 512"])?;
        }
        Ok(std::fs::read(&path)?)
    }

    fn images(&self) -> Result<()> {
        for (name, options, rich) in KINDS {
            let bytes = self.image(name, options, rich)?;
            self.keep("header", name, &bytes[..512])?;
            self.keep("image", name, &bytes)?;
            let layer = Layer::inspect(&self.path(name))?;
            let header = layer.header();
            let snapshots = (header.internal_snapshots > 0).then_some(header.snapshot_table.0);
            let bitmaps = layer.stored_bitmaps()?;
            let directory = header.bitmaps.as_ref().filter(|_| !bitmaps.is_empty());
            let places = [
                ("snapshots", snapshots),
                ("bitmaps", directory.map(|found| found.directory.0)),
            ];
            for (what, place) in places {
                if let Some(at) = place {
                    let at = usize::try_from(at)?;
                    let mut input = vec![2];
                    input.extend(bytes[at..].iter().take(160));
                    self.keep("directories", &format!("{name}-{what}"), &input)?;
                }
            }
        }
        Ok(())
    }

    /// An image whose guest data lies elsewhere.
    fn data_file(&self) -> Result<()> {
        let path = self.path("outside");
        let (shown, data) = (path.display(), self.path("data"));
        let options = format!(
            "cluster_size=512,data_file={},data_file_raw=on",
            data.display()
        );
        qemu_img(&format!("create -q -f qcow2 -o {options} {shown} {DISK}"))?;
        qemu_io(&path, &["write -P 1 0 3k"])?;
        qemu_img(&format!("amend -f qcow2 -o data_file=data {shown}"))?;
        let bytes = std::fs::read(&path)?;
        self.keep("header", "data-file", &bytes[..512])?;
        self.keep("image", "data-file", &bytes)
    }

    fn encrypted(&self) -> Result<()> {
        let shown = self.path("secret").display().to_string();
        let secret = "secret,id=s,data=word";
        let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
        run(
            "qemu-img",
            &[
                "create", "-q", "-f", "qcow2", "--object", secret, "-o", options, &shown, "20k",
            ],
        )?;
        let bytes = std::fs::read(&shown)?;
        self.keep("header", "encrypted", &bytes[..512])
    }

    /// The upper image's length in two bytes, the upper image, the one below.
    fn chains(&self) -> Result<()> {
        let below = self.path("below");
        let shown = below.display();
        for format in ["qcow2", "raw"] {
            let options = if format == "qcow2" {
                "-o cluster_size=512"
            } else {
                ""
            };
            qemu_img(&format!("create -q -f {format} {options} {shown} 13k"))?;
            run(
                "qemu-io",
                &["-f", format, "-c", "write -P 7 1k 11k", &shown.to_string()],
            )?;
            let name = format!("over-{format}");
            let top = self.path(&name);
            qemu_img(&format!(
                "create -q -f qcow2 -o cluster_size=512 -b {shown} -F {format} {} {DISK}",
                top.display()
            ))?;
            qemu_io(&top, &["write -P 1 0 2k", "write -z 4k 1k"])?;
            qemu_img(&format!(
                "rebase -u -f qcow2 -b below -F {format} {}",
                top.display()
            ))?;
            let [top, below] = [&top, &below].map(std::fs::read);
            let (top, below) = (top?, below?);
            let mut input = u16::try_from(top.len())?.to_be_bytes().to_vec();
            input.extend(top);
            input.extend(below);
            self.keep("chain", &name, &input)?;
        }
        Ok(())
    }

    /// Images in progress: everything up to the mark has reached the disk.
    fn in_progress(&self) -> Result<()> {
        let name = [b'n'; 500];
        let long_name = BackingFile {
            name: &name,
            format: Some(b"raw"),
        };
        for kind in ["zstd", "old", "default"] {
            let bytes = std::fs::read(self.path(kind))?;
            let marked = marked(bytes, |editor| rename(editor, Some(long_name)).map(drop))?;
            self.keep("recover", &format!("name-{kind}"), &marked)?;
        }
        let raw = self.path("below");
        let top = std::fs::read(self.path("over-raw"))?;
        let raw: Arc<dyn Storage> = Arc::new(RecordedDisk::new(std::fs::read(raw)?));
        let marked = marked(top, |editor| {
            let base = RawBase::on_storage(raw, PathBuf::from("/raw"));
            commit_into_raw(
                editor,
                &[],
                &base,
                &CommitOptions::default(),
                &Control::default(),
            )
            .map(drop)
        })?;
        self.keep("recover", "commit-into-raw", &marked)
    }
}

/// What a change leaves that ends right after an image of `bytes` is marked as in progress.
fn marked(bytes: Vec<u8>, change: impl FnOnce(&mut Editor) -> ImageResult<()>) -> Result<Vec<u8>> {
    let disk = Arc::new(RecordedDisk::new(bytes));
    let storage = Arc::clone(&disk) as Arc<dyn Storage>;
    let mut editor = Editor::on_storage(storage, Path::new("seed"), EditOptions::default())?;
    change(&mut editor)?;
    let history = disk.history();
    let is_mark =
        |event: &Event| matches!(event, Event::Write { at: 0, bytes } if bytes.len() == 512);
    let mark = history.events().iter().position(is_mark);
    Ok(history.prefix(mark.ok_or("the change has no journal")? + 1))
}

fn main() -> Result<()> {
    let to = std::env::args_os().nth(1).ok_or("name a folder")?;
    let seeds = Seeds {
        to: to.into(),
        dir: tempfile::tempdir()?,
    };
    seeds.images()?;
    seeds.data_file()?;
    seeds.encrypted()?;
    seeds.chains()?;
    seeds.in_progress()
}
