//! Taking a template that somebody else made: a disk, a kernel and an initial RAM disk.
//!
//! All three files are untrusted. A disk image can name other files on this host as its backing or data
//! file, so what it is gets decided from its first bytes, here, before any program opens it: a qcow2
//! image that names another file is refused, and everything else that is not recognisably another
//! format is raw. `qemu-img` is then told the format and never guesses.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use stead_sys::copy;
use stead_sys::durable::{self, Existing, Partial};
use stead_sys::space;

use crate::build::{BuiltTemplate, CMDLINE, DISK_NAME, INITRD_NAME, VMLINUZ_NAME};
use crate::error::{OnPath, TemplateError};
use crate::program::run_guarded;
use crate::progress::{Step, Watch};
use crate::{DISK_BYTES_MAX, Stage};

/// The largest kernel image or initial RAM disk, in bytes.
const BOOT_FILE_BYTES_MAX: u64 = 1 << 30;
/// The longest command line that x86 kernels take, in bytes.
const CMDLINE_BYTES_MAX: usize = 2047;
const SECTOR_BYTES: u64 = 512;
/// A conversion is stopped before it leaves less room than this, in bytes.
const ROOM_LEFT_BYTES: u64 = 256 << 20;

/// What to import.
#[derive(Debug, Clone)]
pub struct ImportSpec<'a> {
    /// A raw or qcow2 disk image without backing file.
    pub disk: &'a Path,
    /// A Linux kernel for x86-64 (bzImage).
    pub kernel: &'a Path,
    /// Its initial RAM disk, which must start the agent or something that does.
    pub initrd: &'a Path,
    /// The kernel's command line; [`CMDLINE`] where none is given.
    pub cmdline: Option<&'a str>,
    /// Where the template goes; made if missing.
    pub out: &'a Path,
}

/// Checks the three files and publishes copies of them as a template.
///
/// # Durability
/// When this returns `Ok`, all three files have reached the disk. After an error some of them may be in
/// `spec.out`, each of them whole.
///
/// # Errors
/// [`TemplateError::Unsuitable`] for a file that is not what it has to be, before anything is written;
/// the others as they say.
pub fn import(spec: &ImportSpec<'_>, watch: &Watch<'_>) -> Result<BuiltTemplate, TemplateError> {
    let step = watch.begin(Stage::Inspect)?;
    let cmdline = spec.cmdline.unwrap_or(CMDLINE);
    check_cmdline(cmdline)?;
    let kernel = read_boot_file(spec.kernel)?;
    check_kernel(&kernel).map_err(|problem| problem.of(spec.kernel))?;
    let initrd = read_boot_file(spec.initrd)?;
    check_initrd(&initrd).map_err(|problem| problem.of(spec.initrd))?;
    let image = Image::open(spec.disk)?;
    if spec.cmdline.is_none() {
        image.check_root_is_the_whole_disk()?;
    }
    step.go_on()?;

    let (disk, vmlinuz, out_initrd) = (
        spec.out.join(DISK_NAME),
        spec.out.join(VMLINUZ_NAME),
        spec.out.join(INITRD_NAME),
    );
    durable::create_dir(spec.out, 0o755).on("creating", spec.out)?;
    for (path, bytes) in [(&vmlinuz, &kernel), (&out_initrd, &initrd)] {
        durable::publish(path, 0o644, bytes, Existing::Replace).on("writing", path)?;
    }
    let size_bytes = image.convert(&disk, &watch.begin(Stage::Convert)?)?;
    Ok(BuiltTemplate {
        disk,
        size_bytes,
        vmlinuz,
        initrd: out_initrd,
        cmdline: cmdline.to_owned(),
        suite: None,
        kernel: None,
        packages: Vec::new(),
    })
}

/// What is wrong with a file's content, before the file's name is known.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Problem {
    found: String,
    expected: &'static str,
}

impl Problem {
    fn new(found: impl Into<String>, expected: &'static str) -> Self {
        Self {
            found: found.into(),
            expected,
        }
    }

    fn of(self, path: &Path) -> TemplateError {
        TemplateError::Unsuitable {
            path: path.to_owned(),
            found: self.found,
            expected: self.expected.to_owned(),
        }
    }
}

fn check_cmdline(cmdline: &str) -> Result<(), TemplateError> {
    if cmdline.len() <= CMDLINE_BYTES_MAX && !cmdline.chars().any(char::is_control) {
        return Ok(());
    }
    Err(TemplateError::Invalid {
        what: "the kernel's command line",
        found: format!("{} bytes", cmdline.len()),
        expected: format!("at most {CMDLINE_BYTES_MAX} bytes in one line"),
    })
}

fn read_boot_file(path: &Path) -> Result<Vec<u8>, TemplateError> {
    let file = open_regular(path)?;
    let length = file.metadata().on("reading", path)?.len();
    if length > BOOT_FILE_BYTES_MAX {
        return Err(Problem::new(format!("{length} bytes"), "at most 1 GiB").of(path));
    }
    let mut bytes = Vec::new();
    file.take(BOOT_FILE_BYTES_MAX)
        .read_to_end(&mut bytes)
        .on("reading", path)?;
    Ok(bytes)
}

/// Opens a file and refuses folders, devices and pipes, which could block or never end.
fn open_regular(path: &Path) -> Result<File, TemplateError> {
    if !std::fs::metadata(path).on("opening", path)?.is_file() {
        return Err(Problem::new("no regular file", "a regular file").of(path));
    }
    File::open(path).on("opening", path)
}

fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(length)?)?;
    Some(
        field
            .iter()
            .rev()
            .fold(0, |value, byte| (value << 8) | u64::from(*byte)),
    )
}

/// A whole bzImage for x86-64.
///
/// # Source
/// Linux `Documentation/arch/x86/boot.rst`: `setup_sects` 0x1f1, `syssize` 0x1f4 (units of 16 bytes),
/// `boot_flag` 0x1fe, `header` 0x202, `version` 0x206, `loadflags` 0x211, `xloadflags` 0x236.
fn check_kernel(image: &[u8]) -> Result<(), Problem> {
    const EXPECTED: &str = "a Linux kernel for x86-64 (bzImage)";
    let read = |at, length| {
        number(image, at, length).ok_or_else(|| Problem::new("a file that is too short", EXPECTED))
    };
    if read(0x1fe, 2)? != 0xaa55 || image.get(0x202..0x206) != Some(b"HdrS") {
        return Err(Problem::new(
            "no Linux boot header (`HdrS` at 0x202)",
            EXPECTED,
        ));
    }
    // xloadflags came with protocol 2.12 (Linux 3.8).
    if read(0x206, 2)? < 0x020c || read(0x211, 1)? & 1 == 0 || read(0x236, 2)? & 1 == 0 {
        return Err(Problem::new(
            "a kernel that does not start in 64-bit mode",
            EXPECTED,
        ));
    }
    // Zero stands for four, for the sake of very old kernels.
    let setup_sectors = match read(0x1f1, 1)? {
        0 => 4,
        sectors => sectors,
    };
    let whole = (setup_sectors + 1) * SECTOR_BYTES + read(0x1f4, 4)? * 16;
    if (image.len() as u64) < whole {
        return Err(Problem::new(
            format!("{} of {whole} bytes: it is cut off", image.len()),
            EXPECTED,
        ));
    }
    Ok(())
}

/// What a compressed archive starts with, for the compressions that Linux knows.
const COMPRESSED: [&[u8]; 7] = [
    b"\x1f\x8b",
    b"\xfd7zXZ\0",
    b"\x28\xb5\x2f\xfd",
    b"\x02\x21\x4c\x18",
    b"BZh",
    b"\x5d\0\0",
    b"\x89LZO",
];

/// A cpio archive whose entries are whole, or something compressed, which only the kernel will look into.
fn check_initrd(archive: &[u8]) -> Result<(), Problem> {
    const EXPECTED: &str = "a cpio archive (newc), plain or compressed";
    if COMPRESSED.iter().any(|magic| archive.starts_with(magic)) {
        return Ok(());
    }
    let mut at = 0_usize;
    let mut entries = 0_u64;
    loop {
        let rest = archive.get(at..).unwrap_or_default();
        let entry = newc_entry(rest).ok_or_else(|| {
            let found = match entries {
                0 => "neither cpio nor a known compression".to_owned(),
                _ => format!("a damaged or cut entry after {entries} whole ones"),
            };
            Problem::new(found, EXPECTED)
        })?;
        if entry.is_trailer {
            return Ok(());
        }
        // An entry has at least its header's length, so this ends.
        at += entry.length;
        entries += 1;
    }
}

struct NewcEntry {
    is_trailer: bool,
    length: usize,
}

/// Measures the entry at the start of `bytes`.
///
/// # Source
/// Linux `Documentation/driver-api/early-userspace/buffer-format.rst`: 110 bytes of header, of which
/// `c_filesize` at 54 and `c_namesize` at 94; name and content are padded to four bytes.
fn newc_entry(bytes: &[u8]) -> Option<NewcEntry> {
    const HEADER_BYTES: usize = 110;
    if !bytes.starts_with(b"070701") && !bytes.starts_with(b"070702") {
        return None;
    }
    let field = |at: usize| {
        let digits = std::str::from_utf8(bytes.get(at..at + 8)?).ok()?;
        usize::try_from(u32::from_str_radix(digits, 16).ok()?).ok()
    };
    let (content, name) = (field(54)?, field(94)?);
    let name_end = HEADER_BYTES.checked_add(name)?;
    let length = name_end
        .checked_next_multiple_of(4)?
        .checked_add(content)?
        .checked_next_multiple_of(4)?;
    let is_trailer = bytes.get(HEADER_BYTES..name_end)? == b"TRAILER!!!\0";
    (is_trailer || bytes.len() >= length).then_some(NewcEntry { is_trailer, length })
}

/// Other formats, by what they start with: taken for raw they would be a disk of nonsense.
const OTHER_FORMATS: [(&[u8], &str); 7] = [
    (b"QED\0", "a QED image"),
    (b"KDMV", "a VMDK image"),
    (b"# Disk DescriptorFile", "a VMDK description"),
    (b"vhdxfile", "a VHDX image"),
    (b"conectix", "a VHD image"),
    (b"LUKS\xba\xbe", "an encrypted image (LUKS)"),
    (b"<<< ", "a VDI image"),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

/// A disk image that has passed inspection.
#[derive(Debug)]
struct Image {
    path: PathBuf,
    file: File,
    format: Format,
    size_bytes: u64,
}

impl Image {
    fn open(path: &Path) -> Result<Self, TemplateError> {
        let file = open_regular(path)?;
        let length = file.metadata().on("reading", path)?.len();
        let mut head = Vec::new();
        Read::by_ref(&mut &file)
            .take(512)
            .read_to_end(&mut head)
            .on("reading", path)?;
        let (format, size_bytes) = inspect(&head, length).map_err(|problem| problem.of(path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            format,
            size_bytes,
        })
    }

    /// The default command line mounts the whole disk: one with a partition table needs another.
    fn check_root_is_the_whole_disk(&self) -> Result<(), TemplateError> {
        if self.format == Format::Qcow2 {
            return Ok(());
        }
        let mut sector = [0; 1024];
        match self.file.read_exact_at(&mut sector, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error).on("reading", &self.path),
        }
        if sector[510..512] == [0x55, 0xaa] || sector[512..].starts_with(b"EFI PART") {
            let expected =
                "a file system on the whole disk, or a command line that says where the root is";
            return Err(Problem::new("a partition table", expected).of(&self.path));
        }
        Ok(())
    }

    /// Publishes the disk as a sparse raw file and returns its size in bytes.
    fn convert(&self, target: &Path, step: &Step<'_>) -> Result<u64, TemplateError> {
        let partial = Partial::create(target, 0o644).on("creating", target)?;
        match self.format {
            Format::Raw => {
                self.check_room(
                    target,
                    space::allocated_bytes(&self.path).on("measuring", &self.path)?,
                )?;
                copy::clone_or_copy(&self.file, partial.file()).on("copying", target)?;
            }
            Format::Qcow2 => {
                self.check_room(
                    target,
                    self.file.metadata().on("reading", &self.path)?.len(),
                )?;
                let mut convert = self.qemu_img(partial.temp_path());
                // A small image can expand to any size: many entries of its tables can name one cluster.
                let guard = || self.check_room(target, ROOM_LEFT_BYTES);
                run_guarded(&mut convert, "converting the disk", step, &guard)?;
            }
        }
        step.go_on()?;
        self.check_result(partial.temp_path())?;
        partial
            .publish(Existing::Replace)
            .on("publishing", target)?;
        Ok(self.size_bytes)
    }

    /// The image with its format given and its backing file denied, whatever its header says by now.
    fn qemu_img(&self, target: &Path) -> Command {
        let path = std::path::absolute(&self.path).unwrap_or_else(|_unchanged| self.path.clone());
        let node = serde_json::json!({
            "driver": "qcow2",
            "backing": null,
            "file": { "driver": "file", "filename": path.to_string_lossy(), "locking": "auto" },
        });
        let mut command = Command::new("qemu-img");
        command
            .args(["convert", "-O", "raw", "-S", "64k"])
            .arg(format!("json:{node}"))
            .arg(target);
        command
    }

    fn check_room(&self, target: &Path, required_bytes: u64) -> Result<(), TemplateError> {
        let folder = target.parent().unwrap_or(target);
        let available_bytes = space::available_bytes(folder).on("measuring", folder)?;
        if available_bytes < required_bytes {
            let path = folder.to_owned();
            return Err(TemplateError::NoRoom {
                path,
                required_bytes,
                available_bytes,
            });
        }
        Ok(())
    }

    fn check_result(&self, copy: &Path) -> Result<(), TemplateError> {
        let length = std::fs::metadata(copy).on("reading", copy)?.len();
        if length == self.size_bytes {
            return Ok(());
        }
        let found = format!("a copy of {length} bytes");
        Err(TemplateError::Unsuitable {
            path: self.path.clone(),
            found,
            expected: format!("{} bytes; did the image change meanwhile?", self.size_bytes),
        })
    }
}

/// Decides from an image's first bytes and its length what it is and how large its disk.
fn inspect(head: &[u8], length: u64) -> Result<(Format, u64), Problem> {
    const EXPECTED: &str = "a raw or qcow2 disk image";
    if let Some((_, name)) = OTHER_FORMATS
        .iter()
        .find(|(magic, _)| head.starts_with(magic))
    {
        return Err(Problem::new(*name, EXPECTED));
    }
    let (format, size_bytes) = if head.starts_with(b"QFI\xfb") {
        (Format::Qcow2, inspect_qcow2(head)?)
    } else {
        (Format::Raw, length)
    };
    if size_bytes == 0 || size_bytes > DISK_BYTES_MAX || !size_bytes.is_multiple_of(SECTOR_BYTES) {
        let found = format!("a disk of {size_bytes} bytes");
        return Err(Problem::new(
            found,
            "whole sectors of 512 bytes, at most 8 TiB",
        ));
    }
    Ok((format, size_bytes))
}

/// The disk's size, of a qcow2 image that stands alone.
///
/// # Source
/// QEMU `docs/interop/qcow2.rst`, "Header": big-endian; version at 4, backing file offset at 8, size at
/// 24, encryption method at 32, incompatible features at 72 (version 3), of which bit 2 is an external
/// data file.
fn inspect_qcow2(head: &[u8]) -> Result<u64, Problem> {
    const EXPECTED: &str = "a qcow2 image, version 2 or 3, that stands alone";
    let field = |at: usize, length: usize| {
        let bytes = head
            .get(at..at + length)
            .ok_or_else(|| Problem::new("a cut header", EXPECTED))?;
        Ok::<u64, Problem>(
            bytes
                .iter()
                .fold(0, |value, byte| (value << 8) | u64::from(*byte)),
        )
    };
    let version = field(4, 4)?;
    if version != 2 && version != 3 {
        return Err(Problem::new(format!("qcow2 version {version}"), EXPECTED));
    }
    if field(8, 8)? != 0 {
        return Err(Problem::new("an image with a backing file", EXPECTED));
    }
    if field(32, 4)? != 0 {
        return Err(Problem::new("an encrypted image", EXPECTED));
    }
    if version == 3 && field(72, 8)? & (1 << 2) != 0 {
        return Err(Problem::new(
            "an image with an external data file",
            EXPECTED,
        ));
    }
    field(24, 8)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::disallowed_methods,
        reason = "scratch files of a test need not last"
    )]

    use super::*;
    use proptest::prelude::*;

    /// A whole bzImage of one setup sector and `paragraphs` times 16 bytes of kernel.
    fn bz_image(paragraphs: u32) -> Vec<u8> {
        let mut image = vec![0; 1024 + paragraphs as usize * 16];
        image[0x1f1] = 1;
        image[0x1f4..0x1f8].copy_from_slice(&paragraphs.to_le_bytes());
        image[0x1fe..0x200].copy_from_slice(&0xaa55_u16.to_le_bytes());
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x211] = 1;
        image[0x236] = 1;
        image
    }

    fn qcow2(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut head = vec![0; 512];
        head[..4].copy_from_slice(b"QFI\xfb");
        head[7] = 3;
        head[24..32].copy_from_slice(&(1_u64 << 30).to_be_bytes());
        change(&mut head);
        head
    }

    fn qemu_img(arguments: &[&str]) {
        let done = Command::new("qemu-img")
            .args(arguments)
            .output()
            .expect("qemu-img, from scripts/setup");
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
    }

    /// A folder with sound boot files; `disk` is the caller's.
    struct Files(tempfile::TempDir);

    impl Files {
        fn new() -> Self {
            let files = Self(tempfile::tempdir().expect("temp dir"));
            std::fs::write(files.path("kernel"), bz_image(4)).expect("kernel");
            std::fs::write(
                files.path("initrd"),
                crate::initramfs::archive(b"x", &[]).expect("small"),
            )
            .expect("initrd");
            files
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn text(&self, name: &str) -> String {
            self.path(name).to_string_lossy().into_owned()
        }

        fn import(&self, disk: &str) -> Result<BuiltTemplate, TemplateError> {
            let spec = ImportSpec {
                disk: &self.path(disk),
                kernel: &self.path("kernel"),
                initrd: &self.path("initrd"),
                cmdline: None,
                out: &self.path("out"),
            };
            import(&spec, &Watch::silent())
        }
    }

    #[test]
    fn a_kernel_that_is_cut_anywhere_is_refused() {
        let image = bz_image(4);
        check_kernel(&image).expect("whole");
        for length in 0..image.len() {
            assert!(check_kernel(&image[..length]).is_err(), "cut to {length}");
        }
        let cut = check_kernel(&image[..image.len() - 1]).expect_err("cut");
        assert!(cut.found.contains("cut off"), "{cut:?}");
    }

    #[test]
    fn what_is_no_64_bit_kernel_is_refused() {
        for (at, byte) in [
            (0x202, b'h'),
            (0x1ff, 0),
            (0x211, 0),
            (0x236, 0),
            (0x207, 1),
        ] {
            let mut image = bz_image(4);
            image[at] = byte;
            assert!(check_kernel(&image).is_err(), "byte {at:#x}");
        }
        assert!(check_kernel(&[0xff; 4096]).is_err());
    }

    #[test]
    fn an_archive_that_is_cut_before_its_trailer_is_refused() {
        let archive = crate::initramfs::archive(b"agent", &[]).expect("small");
        check_initrd(&archive).expect("whole");
        let trailer = archive
            .windows(10)
            .position(|bytes| bytes == b"TRAILER!!!")
            .expect("a trailer");
        for length in 0..trailer + 11 {
            assert!(check_initrd(&archive[..length]).is_err(), "cut to {length}");
        }
        check_initrd(b"\x1f\x8b rest").expect("compressed: the kernel looks inside");
        assert!(check_initrd(b"#!/bin/sh").is_err());
    }

    #[test]
    fn hostile_lengths_in_an_archive_are_refused() {
        for field_at in [54, 94] {
            let mut archive = crate::initramfs::archive(b"agent", &[]).expect("small");
            archive[field_at..field_at + 8].copy_from_slice(b"FFFFFFFF");
            assert!(check_initrd(&archive).is_err(), "field at {field_at}");
        }
    }

    #[test]
    fn an_image_that_names_other_files_or_hides_its_content_is_refused() {
        let alone = qcow2(|_| {});
        assert_eq!(inspect(&alone, 512), Ok((Format::Qcow2, 1 << 30)));
        let cases: [(usize, u8, &str); 5] = [
            (15, 1, "backing file"),
            (79, 4, "external data file"),
            (35, 1, "encrypted"),
            (7, 4, "version 4"),
            (24, 0xff, "a disk of"),
        ];
        for (at, byte, named) in cases {
            let error = inspect(&qcow2(|head| head[at] = byte), 512).expect_err(named);
            assert!(error.found.contains(named), "{error:?}");
        }
        for length in 4..80 {
            assert!(inspect(&alone[..length], 512).is_err(), "cut to {length}");
        }
    }

    #[test]
    fn other_formats_are_named_not_taken_for_raw() {
        for (magic, name) in OTHER_FORMATS {
            let mut head = magic.to_vec();
            head.resize(512, 0);
            assert_eq!(inspect(&head, 1 << 20).expect_err(name).found, name);
        }
        assert_eq!(inspect(&[0; 512], 1 << 20), Ok((Format::Raw, 1 << 20)));
        assert!(inspect(&[0; 512], 513).is_err() && inspect(&[], 0).is_err());
    }

    #[test]
    fn a_qcow2_disk_becomes_the_same_raw_disk() {
        let files = Files::new();
        let content: Vec<u8> = (0..4 << 20)
            .map(|at: u32| u8::try_from(at / 4096 % 251).expect("small"))
            .collect();
        std::fs::write(files.path("raw"), &content).expect("raw");
        qemu_img(&[
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-c",
            &files.text("raw"),
            &files.text("disk.qcow2"),
        ]);
        let built = files.import("disk.qcow2").expect("import");
        assert_eq!(built.size_bytes, 4 << 20);
        assert!(
            std::fs::read(&built.disk).expect("disk") == content,
            "other content"
        );
        assert_eq!(std::fs::read(&built.vmlinuz).expect("kernel"), bz_image(4));
        let built = files.import("raw").expect("import of raw");
        assert!(
            std::fs::read(&built.disk).expect("disk") == content,
            "other content"
        );
    }

    #[test]
    fn a_real_overlay_is_refused_before_anything_is_written() {
        let files = Files::new();
        std::fs::write(files.path("secret"), vec![7; 1 << 20]).expect("a file of the host");
        let overlay = files.text("overlay");
        qemu_img(&[
            "create",
            "-f",
            "qcow2",
            "-F",
            "raw",
            "-b",
            &files.text("secret"),
            &overlay,
        ]);
        let error = files.import("overlay").expect_err("names another file");
        assert!(error.to_string().contains("backing file"), "{error}");
        qemu_img(&[
            "create",
            "-f",
            "qcow2",
            "-o",
            &format!("data_file={}", files.text("data")),
            &overlay,
            "1M",
        ]);
        let error = files.import("overlay").expect_err("names another file");
        assert!(error.to_string().contains("data file"), "{error}");
        assert!(!files.path("out").exists());
    }

    #[test]
    fn a_backing_file_named_after_inspection_is_still_not_read() {
        let files = Files::new();
        std::fs::write(files.path("secret"), vec![7; 1 << 20]).expect("a file of the host");
        qemu_img(&["create", "-f", "qcow2", &files.text("disk"), "1M"]);
        let image = Image::open(&files.path("disk")).expect("stands alone");
        qemu_img(&[
            "rebase",
            "-u",
            "-F",
            "raw",
            "-b",
            &files.text("secret"),
            &files.text("disk"),
        ]);
        let step = Watch::silent()
            .begin(Stage::Convert)
            .expect("not cancelled");
        if image.convert(&files.path("copy"), &step).is_ok() {
            let copied = std::fs::read(files.path("copy")).expect("copy");
            assert!(
                copied.iter().all(|byte| *byte == 0),
                "the host's file was read"
            );
        }
        // The twin: with backing files allowed, the same image does give the secret away.
        qemu_img(&[
            "convert",
            "-O",
            "raw",
            &files.text("disk"),
            &files.text("open"),
        ]);
        assert!(
            std::fs::read(files.path("open"))
                .expect("open")
                .contains(&7)
        );
    }

    #[test]
    fn a_partitioned_disk_needs_a_command_line() {
        let files = Files::new();
        let mut disk = vec![0; 1 << 20];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(files.path("disk"), &disk).expect("disk");
        assert!(
            files
                .import("disk")
                .expect_err("partitions")
                .to_string()
                .contains("partition table")
        );
        let spec = ImportSpec {
            disk: &files.path("disk"),
            kernel: &files.path("kernel"),
            initrd: &files.path("initrd"),
            cmdline: Some("root=/dev/vda1"),
            out: &files.path("out"),
        };
        assert_eq!(
            import(&spec, &Watch::silent()).expect("told where").cmdline,
            "root=/dev/vda1"
        );
    }

    #[test]
    fn folders_devices_and_long_command_lines_are_refused() {
        let files = Files::new();
        std::fs::write(files.path("disk"), vec![0; 4096]).expect("disk");
        assert!(files.import("").is_err(), "a folder");
        assert!(Image::open(Path::new("/dev/zero")).is_err(), "a device");
        assert!(check_cmdline(&"x".repeat(CMDLINE_BYTES_MAX + 1)).is_err());
        assert!(check_cmdline("root=/dev/vda\ninit=/bin/sh").is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_get_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..1500), which in 0..3_u8) {
            let mut bytes = bytes;
            // Get past the first look now and then.
            match which {
                0 => bytes.splice(0..0, *b"070701").for_each(drop),
                1 => bytes.splice(0..0, *b"QFI\xfb").for_each(drop),
                _ => {}
            }
            drop((check_kernel(&bytes), check_initrd(&bytes), inspect(&bytes, bytes.len() as u64)));
        }
    }
}
