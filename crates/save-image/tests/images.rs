//! What is written is read back, by us and by the programs that libvirt runs.
#![allow(
    clippy::disallowed_methods,
    reason = "tests make files that nobody needs after them"
)]

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use common::{COOKIE, Scratch, XML, foreign, new_image, stream, whole, write};
use stead_save_image::{
    Appears, Control, DiskContent, Format, Kind, SaveImage, Status, Writer, convert, edit_xml,
    extract, probe,
};
use stead_sys::durable::Existing;

const STREAMS: [Format; 6] = [
    Format::Raw,
    Format::Gzip,
    Format::Bzip2,
    Format::Xz,
    Format::Lzop,
    Format::Zstd,
];

fn silent() -> Control {
    Control::silent()
}

#[test]
fn an_image_of_every_format_is_read_back_whole_and_says_what_it_is() {
    let scratch = Scratch::new();
    for format in STREAMS {
        let path = scratch.path(format.name());
        write(&path, format);
        assert_eq!(probe(&path).expect("probe"), Status::Complete);
        let image = SaveImage::open(&path).expect("open");
        assert_eq!((image.xml(), image.cookie()), (XML, Some(COOKIE)));
        assert!(image.was_running());
        let info = image.info();
        assert_eq!(info.payload_at % 4096, 0, "aligned for direct writes");
        let record = info.record.expect("a record");
        assert_eq!(record.stream_bytes, stream().len() as u64);
        let report = image.verify(&silent()).expect("verify");
        assert!(report.whole && report.recorded, "{report:?}");
        let facts = report.stream.expect("walked");
        assert_eq!(facts.machine_type, "pc-q35-7.2");
        let mut found = Vec::new();
        image
            .stream()
            .expect("stream")
            .read_to_end(&mut found)
            .expect("read");
        assert!(found == stream(), "{format:?}");
        // The hash is BLAKE3's own: any other program finds the same.
        let mut payload = Vec::new();
        image.payload().read_to_end(&mut payload).expect("read");
        assert_eq!(
            record.payload_hash,
            blake3::hash(&payload).to_hex().as_str()
        );
    }
}

#[test]
fn the_bytes_are_where_libvirt_looks_for_them() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    write(&path, Format::Raw);
    let bytes = fs::read(&path).expect("read");
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
    assert_eq!(&bytes[..16], b"LibvirtQemudSave");
    assert_eq!([number(16), number(24), number(28)], [2, 1, 0]);
    assert_eq!(number(32) as usize, XML.len() + 1);
    assert!(bytes[36..92].iter().all(|byte| *byte == 0));
    let data = &bytes[92..92 + number(20) as usize];
    assert!(
        data.starts_with(
            [XML.as_bytes(), &[0], COOKIE.as_bytes(), &[0]]
                .concat()
                .as_slice()
        )
    );
    // Room for longer XML, as libvirt leaves it.
    let behind = XML.len() + COOKIE.len() + 2;
    assert!(data[behind..behind + 65536].iter().all(|byte| *byte == 0));
    assert!(&bytes[92 + number(20) as usize..] == stream());
}

/// Runs a program over bytes, or says that it is not installed.
fn through(program: &str, args: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}; scripts/setup dev installs it"));
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || {
        use std::io::Write;
        stdin.write_all(&input)
    });
    let output = child.wait_with_output().expect("run");
    feeder.join().expect("feeder").expect("feed");
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        output.status
    );
    output.stdout
}

/// What we compress, the program decompresses without a complaint; what it compresses, we read and verify.
fn agrees_with_its_program(format: Format) {
    let scratch = Scratch::new();
    let (ours, theirs) = (scratch.path("ours"), scratch.path("theirs"));
    write(&ours, format);
    let mut payload = Vec::new();
    let image = SaveImage::open(&ours).expect("open");
    image.payload().read_to_end(&mut payload).expect("read");
    assert!(through(format.name(), &["-dc"], &payload) == stream());
    let packed = through(format.name(), &["-c"], stream());
    fs::write(&theirs, foreign(format.number(), &packed, false)).expect("write");
    let report = SaveImage::open(&theirs)
        .expect("open")
        .verify(&silent())
        .expect("verify");
    assert!(report.whole && !report.recorded, "{report:?}");
    assert_eq!(
        report.stream_hash.as_deref(),
        Some(blake3::hash(stream()).to_hex().as_str())
    );
}

#[test]
fn gzip_reads_what_we_write_and_we_what_it_writes() {
    agrees_with_its_program(Format::Gzip);
}

#[test]
fn bzip2_reads_what_we_write_and_we_what_it_writes() {
    agrees_with_its_program(Format::Bzip2);
}

#[test]
fn xz_reads_what_we_write_and_we_what_it_writes() {
    agrees_with_its_program(Format::Xz);
}

#[test]
fn lzop_reads_what_we_write_and_we_what_it_writes() {
    agrees_with_its_program(Format::Lzop);
}

#[test]
fn zstd_reads_what_we_write_and_we_what_it_writes() {
    agrees_with_its_program(Format::Zstd);
}

#[test]
fn an_image_of_a_host_with_the_other_byte_order_is_read_alike() {
    let scratch = Scratch::new();
    let path = scratch.put("s390", &foreign(0, stream(), true));
    let image = SaveImage::open(&path).expect("open");
    assert_eq!((image.xml(), image.cookie()), (XML, Some(COOKIE)));
    assert_eq!(image.info().byte_order, "big");
    whole(&path).expect("whole");
}

#[test]
fn a_conversion_keeps_the_stream_the_texts_and_the_disks_and_appears_whole_or_not_at_all() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    let mut writer =
        Writer::create(&path, &new_image(Format::Raw), Appears::AtOnce, silent()).expect("create");
    let disk = DiskContent {
        name: "vda".to_owned(),
        bytes: 18,
        hash: [0xd1; 32],
    };
    writer.set_disks(vec![disk.clone()]).expect("disks");
    writer.copy_from(stream()).expect("copy");
    writer.finish().expect("finish");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("mode");
    let formats = [
        Format::Zstd,
        Format::Xz,
        Format::Lzop,
        Format::Bzip2,
        Format::Gzip,
        Format::Raw,
    ];
    for format in formats {
        // Over itself: the old file has the name until the new one is proven.
        convert(&path, &path, format, Existing::Replace, &silent()).expect("convert");
        let image = SaveImage::open(&path).expect("open");
        assert_eq!(
            (image.format(), image.disks()),
            (format, &[disk.clone()][..])
        );
        whole(&path).expect("whole");
    }
    let mode = fs::metadata(&path).expect("stat").permissions().mode() & 0o777;
    assert_eq!(mode, 0o640);
    let error = convert(&path, &path, Format::Gzip, Existing::Keep, &silent()).expect_err("there");
    assert_eq!(error.kind(), Kind::Exists);
    assert_eq!(scratch.names(), ["image"]);
    let image = SaveImage::open(&path).expect("open");
    image.verify_disk(&disk).expect("the same");
    let longer = DiskContent {
        bytes: 19,
        ..disk.clone()
    };
    let other = DiskContent {
        hash: [0xd2; 32],
        ..disk.clone()
    };
    for moved in [longer, other] {
        let error = image.verify_disk(&moved).expect_err("moved on");
        assert_eq!(error.kind(), Kind::Damaged);
    }
    let name = "vdb".to_owned();
    let unknown = image.verify_disk(&DiskContent { name, ..disk });
    let unknown = unknown.expect_err("unknown");
    assert_eq!(unknown.kind(), Kind::NotFound);
}

#[test]
fn edited_xml_longer_or_shorter_keeps_the_rest_and_its_record() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    write(&path, Format::Zstd);
    let long = format!("<domain>{}</domain>", "x".repeat(300_000));
    for xml in [long.as_str(), "<domain/>", XML] {
        let change = edit_xml(&path, xml, &silent()).expect("edit");
        assert!(change.recorded);
        let image = SaveImage::open(&path).expect("open");
        assert_eq!((image.xml(), image.cookie()), (xml, Some(COOKIE)));
        whole(&path).expect("whole");
    }
    let error = edit_xml(&path, "not XML", &silent()).expect_err("no domain");
    assert_eq!(error.kind(), Kind::Usage);
    // An image of libvirt's has no record, and none is invented for a payload that nobody vouches for.
    let theirs = scratch.put("theirs", &foreign(0, stream(), true));
    assert!(!edit_xml(&theirs, &long, &silent()).expect("edit").recorded);
    let report = SaveImage::open(&theirs)
        .expect("open")
        .verify(&silent())
        .expect("verify");
    assert!(report.whole && !report.recorded);
    assert_eq!(scratch.names(), ["image", "theirs"]);
}

#[test]
fn what_is_extracted_is_the_stream_and_of_a_damaged_image_nothing_is_extracted() {
    let scratch = Scratch::new();
    let (path, to) = (scratch.path("image"), scratch.path("stream"));
    write(&path, Format::Zstd);
    let image = SaveImage::open(&path).expect("open");
    extract(&image, &to, Existing::Keep, &silent()).expect("extract");
    assert!(fs::read(&to).expect("read") == stream());
    fs::remove_file(&to).expect("remove");
    let mut bytes = fs::read(&path).expect("read");
    let last = bytes.len() - 100;
    bytes[last] ^= 1;
    fs::write(&path, bytes).expect("write");
    let image = SaveImage::open(&path).expect("open");
    let error = extract(&image, &to, Existing::Keep, &silent()).expect_err("damaged");
    assert_eq!(error.kind(), Kind::Damaged);
    assert_eq!(scratch.names(), ["image"]);
}

#[test]
fn an_image_that_is_given_up_or_cancelled_leaves_nothing_and_one_in_the_way_stays() {
    let scratch = Scratch::new();
    let path = scratch.path("image");
    for appears in [Appears::AtOnce, Appears::WhenComplete(Existing::Keep)] {
        let control = silent();
        let image = new_image(Format::Raw);
        let mut writer = Writer::create(&path, &image, appears, control.clone()).expect("create");
        if appears == Appears::AtOnce {
            assert!(matches!(
                probe(&path).expect("probe"),
                Status::Incomplete { .. }
            ));
        }
        control.cancel();
        let error = writer.copy_from(stream()).expect_err("cancelled");
        assert_eq!(error.kind(), Kind::Cancelled);
        drop(writer);
        assert!(scratch.names().is_empty());
    }
    let other = scratch.put("image", b"something of the user's");
    let error = Writer::create(&other, &new_image(Format::Raw), Appears::AtOnce, silent());
    assert_eq!(error.expect_err("in the way").kind(), Kind::Exists);
    assert_eq!(fs::read(&other).expect("read"), b"something of the user's");
}

#[test]
fn a_copy_made_in_the_middle_of_a_save_is_refused_as_incomplete_since_when() {
    let scratch = Scratch::new();
    let (path, copy) = (scratch.path("image"), scratch.path("copy"));
    let image = new_image(Format::Raw);
    let mut writer = Writer::create(&path, &image, Appears::AtOnce, silent()).expect("create");
    writer.copy_from(&stream()[..500_000]).expect("half");
    fs::copy(&path, &copy).expect("copy");
    writer.copy_from(&stream()[500_000..]).expect("the rest");
    writer.finish().expect("finish");
    let error = SaveImage::open(&copy).expect_err("incomplete");
    assert_eq!(error.kind(), Kind::Incomplete);
    let text = error.to_string();
    assert!(
        text.contains("incomplete, and last written at 20"),
        "{text}"
    );
    assert!(text.contains("nothing was changed or deleted"), "{text}");
    whole(&path).expect("whole");
}
