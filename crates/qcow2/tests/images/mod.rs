//! Random chains of images, made by QEMU's own tools from a seed.
#![allow(dead_code, reason = "each test file uses a part")]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use stead_qcow2::edit::{EditOptions, Editor};
use stead_qcow2::{Chain, Layer, LayerFile, LayerFormat, Result, check};

/// How long a server may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a program and gives what it printed.
pub fn run(program: &str, args: &[String]) -> String {
    let output = Command::new(program).args(args).output().expect("run");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {args:?}: {text}{errors}"
    );
    text
}

/// Runs a program given as words separated by blanks.
pub fn sh(line: &str) -> String {
    let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    run(&words[0], &words[1..])
}

/// A path as it stands on a command line.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("temp paths are text")
}

/// An image open for changes, with a small cache, so that tables are written and read again while they are worked on.
pub fn editor(path: &Path) -> Result<Editor> {
    let options = EditOptions {
        cache_bytes: 1 << 16,
        allow_dirty: true,
    };
    Editor::open(path, options)
}

/// Neither we nor qemu-img find anything wrong in the image.
pub fn require_whole(path: &Path, story: &str) {
    let report = check(&Layer::open(path).expect("whole")).expect("readable");
    assert!(report.is_clean(), "{:?}\n{story}", report.findings);
    let args = ["check", "-q", "-f", "qcow2", text(path)];
    let output = Command::new("qemu-img").args(args).output();
    let output = output.expect("qemu-img is installed");
    let found = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{found}\n{story}");
}

/// Numbers from a seed (xorshift64*), the same in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % bound
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).expect("small")]
    }

    pub fn chance(&mut self, one_in: u64) -> bool {
        self.below(one_in) == 0
    }
}

/// A chain of files, top first, and how it was made.
pub struct RandomChain {
    pub files: Vec<LayerFile>,
    pub story: String,
}

impl RandomChain {
    pub fn open(&self) -> Chain {
        match Chain::open(&self.files) {
            Ok(chain) => chain,
            Err(error) => panic!("{error}\n{}", self.story),
        }
    }

    pub fn top(&self) -> &LayerFile {
        &self.files[0]
    }
}

pub fn format_name(format: LayerFormat) -> &'static str {
    match format {
        LayerFormat::Raw => "raw",
        LayerFormat::Qcow2 => "qcow2",
    }
}

/// Makes a chain of one to four files in `dir`.
pub fn make_chain(dir: &Path, seed: u64) -> RandomChain {
    let mut random = Random::new(seed);
    let mut made = RandomChain {
        files: Vec::new(),
        story: format!("seed {seed}\n"),
    };
    let depth = 1 + random.below(4);
    let bits = random.pick(&[9, 10, 12, 14, 14, 15, 16, 16, 17, 21]);
    let usual_sectors = (1_u64 << bits) / 512 * (40 + random.below(200)) + random.below(300);
    for level in 0..depth {
        let sectors = match random.below(4) {
            0 => usual_sectors / 2 + random.below(usual_sectors),
            _ => usual_sectors,
        };
        let size = (sectors * 512).min(24 << 20);
        let path = dir.join(format!("{seed}-{level}"));
        let format = if level == 0 && depth > 1 && random.chance(2) {
            LayerFormat::Raw
        } else {
            LayerFormat::Qcow2
        };
        create(&mut random, &mut made, &path, format, size, bits);
        fill(&mut random, &mut made, &path, format, size, bits);
        made.files.insert(0, LayerFile { path, format });
    }
    made
}

fn create(
    random: &mut Random,
    made: &mut RandomChain,
    path: &Path,
    format: LayerFormat,
    size: u64,
    usual_bits: u32,
) {
    let mut line = format!("qemu-img create -q -f {} ", format_name(format));
    if format == LayerFormat::Qcow2 {
        let bits = if random.chance(3) {
            random.pick(&[9, 12, 14, 16])
        } else {
            usual_bits
        };
        let v3 = !random.chance(4);
        line += &format!(
            "-o cluster_size={},compat={} ",
            1_u64 << bits,
            if v3 { "1.1" } else { "0.10" }
        );
        if v3 {
            line += &format!("-o compression_type={} ", random.pick(&["zlib", "zstd"]));
            line += &format!("-o refcount_bits={} ", random.pick(&[8, 16, 16, 32, 64]));
            if bits >= 14 && random.chance(2) {
                line += "-o extended_l2=on ";
            }
            if random.chance(3) {
                line += "-o lazy_refcounts=on ";
            }
        }
        if let Some(below) = made.files.first() {
            line += &format!(
                "-b {} -F {} ",
                below.path.display(),
                format_name(below.format)
            );
        }
    }
    line += &format!("{} {size}", path.display());
    sh(&line);
    made.story += &format!("{line}\n");
}

fn fill(
    random: &mut Random,
    made: &mut RandomChain,
    path: &Path,
    format: LayerFormat,
    size: u64,
    bits: u32,
) {
    let rounds = if format == LayerFormat::Qcow2 && random.chance(3) {
        2
    } else {
        1
    };
    for round in 0..rounds {
        let mut args = vec!["-f".to_owned(), format_name(format).to_owned()];
        args.extend(["-d".into(), "unmap".into()]);
        for _ in 0..random.below(20) {
            let command = operation(random, format, size, bits);
            args.extend(["-c".to_owned(), command]);
        }
        args.push(path.display().to_string());
        made.story += &format!("qemu-io {args:?}\n");
        // QEMU refuses to compress over a cluster that is there: such a write fails and changes nothing.
        let output = Command::new("qemu-io").args(&args).output();
        drop(output.expect("qemu-io is installed"));
        if round + 1 < rounds {
            let line = format!("qemu-img snapshot -c round{round} {}", path.display());
            // QEMU refuses where a refcount would not fit its bits.
            let words: Vec<&str> = line.split_whitespace().collect();
            let output = Command::new(words[0]).args(&words[1..]).output();
            drop(output.expect("qemu-img is installed"));
            made.story += &format!("{line}\n");
        }
    }
}

fn operation(random: &mut Random, format: LayerFormat, size: u64, bits: u32) -> String {
    let cluster = 1_u64 << bits;
    let aligned = random.chance(2);
    let unit = if aligned { cluster } else { 512 };
    let at = (random.below(size) / unit * unit).min(size - 512);
    let most = if random.chance(4) {
        size / 2
    } else {
        cluster * 4
    };
    let length = ((1 + random.below(most)).next_multiple_of(unit)).min(size - at);
    let byte = 1 + random.below(250);
    let kind = random.below(if format == LayerFormat::Qcow2 { 9 } else { 6 });
    match kind {
        0..=3 => format!("write -P {byte} {at} {length}"),
        4 => format!("write -z {at} {length}"),
        5 => format!("discard {at} {length}"),
        6 => format!("write -z -u {at} {length}"),
        _ => {
            // Compressed writes are of whole clusters; 2 MiB is one whatever the layer's size is.
            let at = at / (2 << 20) * (2 << 20);
            let length = (size - at).min(2 << 20);
            format!("write -c -P {byte} {at} {length}")
        }
    }
}

/// What a reader with QEMU sees.
pub fn convert(top: &LayerFile, to: &Path) -> Vec<u8> {
    let format = format_name(top.format);
    sh(&format!(
        "qemu-img convert -f {format} -O raw {} {}",
        top.path.display(),
        to.display()
    ));
    std::fs::read(to).expect("read")
}

pub fn layer(path: impl Into<PathBuf>, format: LayerFormat) -> LayerFile {
    LayerFile {
        path: path.into(),
        format,
    }
}

/// The ranges that QEMU finds dirty: `qemu-nbd` shows a bitmap, and a map over it has holes where it is set.
pub fn qemu_dirty(path: &Path, name: &str) -> Vec<Range<u64>> {
    let socket = path.with_extension("sock");
    let mut server = Command::new("qemu-nbd")
        .args(["-r", "-f", "qcow2", "-B", name, "-k"])
        .arg(&socket)
        .arg(path)
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-nbd is installed");
    let start = Instant::now();
    while !socket.exists() {
        assert!(start.elapsed() < PATIENCE, "qemu-nbd does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        socket.display()
    );
    let text = sh(&format!(
        "qemu-img map --output=json --image-opts {options}"
    ));
    // It ends with its last client.
    server.wait().expect("wait");
    let map: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let dirty = map.iter().filter(|entry| entry["data"] == false);
    dirty
        .map(|entry| {
            let start = entry["start"].as_u64().expect("a number");
            start..start + entry["length"].as_u64().expect("a number")
        })
        .collect()
}
