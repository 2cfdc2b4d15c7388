//! `stead save` on files, as people and programs call it: no sandbox, no libvirt.
#![allow(
    clippy::disallowed_methods,
    reason = "tests write scratch files that nobody keeps"
)]

#[path = "../../crates/save-image/tests/common/mod.rs"]
mod images;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use images::{COOKIE, Chance, Scratch, XML, foreign, new_image, stream, streams};
use serde_json::Value;
use stead_save_image::{Appears, Control, DiskContent, Format, Writer};
use stead_store::{ChunkSize, Progress, hash_source};
use stead_tests::mount::Mount;
use stead_tests::{Stead, finish, stead_program, until};

const PATIENCE: Duration = Duration::from_secs(60);
const DISK: &[u8] = b"what the disk held";

/// `stead save` with these arguments, in an environment without an editor or a worker.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(stead_program());
    command
        .env_remove("VISUAL")
        .env_remove("EDITOR")
        .arg("save")
        .args(args)
        .stdin(Stdio::null());
    command
}

fn save(args: &[&str]) -> Output {
    command(args).output().expect("run stead")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn name(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// What a command prints that must succeed and say nothing else.
fn ok(args: &[&str]) -> String {
    let output = save(args);
    assert!(
        output.status.success(),
        "{args:?}: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

fn json(args: &[&str]) -> Value {
    let printed = ok(&[args, &["--json"]].concat());
    serde_json::from_str(&printed).unwrap_or_else(|error| panic!("{args:?}: {error}: {printed}"))
}

/// Runs a command that must fail with this status, for people and for programs; gives its error.
fn fails(args: &[&str], status: i32) -> Value {
    let spoken = save(args);
    let told = text(&spoken.stderr);
    assert_eq!(spoken.status.code(), Some(status), "{args:?}: {told}");
    assert!(
        told.starts_with("stead: ") && told.contains("next: "),
        "{told}"
    );
    let output = save(&[args, &["--json"]].concat());
    let lines = text(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{args:?}: {lines}");
    let last = lines.lines().last().expect("an error");
    let error: Value = serde_json::from_str(last).expect("JSON");
    assert_eq!(error["event"], "error");
    assert_eq!(error["exit_code"], status);
    for part in ["kind", "attempt", "found", "left", "next"] {
        assert!(
            error[part].as_str().is_some_and(|text| !text.is_empty()),
            "{part}: {error}"
        );
    }
    error
}

/// An image that says what its disk held.
fn image(scratch: &Scratch, file: &str, format: Format) -> String {
    let path = scratch.path(file);
    let new = new_image(format);
    let mut writer =
        Writer::create(&path, &new, Appears::AtOnce, Control::silent()).expect("create");
    let tree = hash_source(&DISK.to_vec(), ChunkSize::DISK, 1, &Progress::silent()).expect("hash");
    let disk = DiskContent {
        name: "vda".to_owned(),
        bytes: DISK.len() as u64,
        hash: *tree.root.as_bytes(),
    };
    writer.set_disks(vec![disk]).expect("disks");
    writer.copy_from(stream()).expect("copy");
    writer.finish().expect("finish");
    name(&path).to_owned()
}

#[test]
fn an_image_is_shown_verified_and_its_xml_printed_for_people_and_for_programs() {
    let scratch = Scratch::new();
    let file = image(&scratch, "web.save", Format::Zstd);
    let shown = ok(&["info", &file]);
    for part in ["zstd", "running", "unproven", "blake3", "vda"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let info = json(&["info", &file]);
    assert_eq!(
        (&info["format"], &info["version"]),
        (&"zstd".into(), &2.into())
    );
    assert_eq!(info["was_running"], true);
    assert_eq!(info["record"]["stream_bytes"], stream().len());
    assert_eq!(info["record"]["disks"][0]["name"], "vda");
    assert!(ok(&["verify", &file]).contains("pc-q35-7.2"));
    let report = json(&["verify", &file]);
    assert_eq!(report["whole"], true);
    assert_eq!(report["stream"]["bytes"], stream().len());
    assert_eq!(ok(&["dump-xml", &file]), XML);
    assert_eq!(
        json(&["dump-xml", &file]),
        serde_json::json!({"xml": XML, "cookie": COOKIE})
    );
}

#[test]
fn a_disk_that_moved_on_is_told_apart_from_one_that_nothing_is_known_of() {
    let scratch = Scratch::new();
    let file = image(&scratch, "web.save", Format::Raw);
    let same = format!("vda={}", name(&scratch.put("same", DISK)));
    let other = format!("vda={}", name(&scratch.put("other", b"something else")));
    ok(&["verify", &file, "--disk", &same]);
    assert_eq!(json(&["verify", &file, "--disk", &same])["whole"], true);
    assert_eq!(
        fails(&["verify", &file, "--disk", &other], 5)["kind"],
        "damaged"
    );
    let unknown = same.replace("vda", "vdb");
    assert_eq!(
        fails(&["verify", &file, "--disk", &unknown], 3)["kind"],
        "not-found"
    );
    fails(&["verify", &file, "--disk", "vda=/no/such/file"], 3);
    assert_eq!(
        save(&["verify", &file, "--disk", "vda"]).status.code(),
        Some(2)
    );
}

#[test]
fn an_image_is_converted_to_every_format_and_its_stream_comes_out_the_same() {
    let scratch = Scratch::new();
    let file = image(&scratch, "web.save", Format::Zstd);
    for format in ["raw", "gzip", "bzip2", "xz", "lzop", "zstd"] {
        let to = scratch.path(format);
        let done = json(&["convert", &file, name(&to), "--format", format]);
        assert_eq!(done["recorded"], true);
        assert_eq!(done["bytes"], fs::metadata(&to).expect("made").len());
        assert_eq!(json(&["info", name(&to)])["format"], format);
        let out = save(&["extract", name(&to), "-"]);
        assert!(out.status.success() && out.stdout == stream(), "{format}");
    }
    let raw = scratch.path("raw");
    assert_eq!(
        fails(&["convert", &file, name(&raw), "--format", "xz"], 4)["kind"],
        "conflict"
    );
    assert_eq!(
        json(&["info", name(&raw)])["format"],
        "raw",
        "it stands as it was"
    );
    ok(&["convert", &file, name(&raw), "--format", "gzip", "--force"]);
    assert_eq!(json(&["info", name(&raw)])["format"], "gzip");
    ok(&["convert", &file, &file, "--format", "raw", "--force"]);
    let out = scratch.path("stream");
    assert_eq!(
        json(&["extract", &file, name(&out)])["bytes"],
        stream().len()
    );
    assert!(fs::read(&out).expect("read") == stream());
    assert_eq!(
        fails(&["extract", &file, name(&out)], 4)["kind"],
        "conflict"
    );
    assert!(ok(&["extract", &file, name(&out), "--force"]).contains("stream"));
    assert_eq!(
        save(&["convert", &file, "x", "--format", "lzma"])
            .status
            .code(),
        Some(2)
    );
}

#[test]
fn xml_is_replaced_from_a_file_or_standard_input() {
    let scratch = Scratch::new();
    let file = image(&scratch, "web.save", Format::Gzip);
    let longer = format!("<domain><name>{}</name></domain>", "x".repeat(200_000));
    let xml = scratch.put("new.xml", longer.as_bytes());
    let done = json(&["edit-xml", &file, "--xml", name(&xml)]);
    assert_eq!(done["recorded"], true);
    assert_eq!(ok(&["dump-xml", &file]), longer);
    ok(&["verify", &file]);
    let mut child = command(&["edit-xml", &file, "--xml", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("start");
    let mut input = child.stdin.take().expect("stdin");
    input.write_all(XML.as_bytes()).expect("send");
    drop(input);
    assert!(child.wait().expect("wait").success());
    assert_eq!(ok(&["dump-xml", &file]), XML);
    let wrong = scratch.put("wrong.xml", b"no domain");
    assert_eq!(
        fails(&["edit-xml", &file, "--xml", name(&wrong)], 2)["kind"],
        "usage"
    );
    fails(&["edit-xml", &file, "--xml", "/no/such/file"], 3);
    assert_eq!(ok(&["dump-xml", &file]), XML);
}

/// Runs `edit-xml` with an editor: a shell script that gets the file as `$1`.
fn edit_with(scratch: &Scratch, file: &str, script: &str) -> Output {
    let editor = scratch.put("editor", format!("{script}\n").as_bytes());
    let drafts = scratch.path("drafts");
    fs::create_dir_all(&drafts).expect("folder");
    command(&["edit-xml", file])
        .env("EDITOR", format!("sh {} --an-option", name(&editor)))
        .env("TMPDIR", &drafts)
        .output()
        .expect("run stead")
}

fn drafts(scratch: &Scratch) -> Vec<fs::DirEntry> {
    let entries = fs::read_dir(scratch.path("drafts")).expect("list");
    entries.map(|entry| entry.expect("entry")).collect()
}

#[test]
fn xml_is_edited_by_hand_and_nothing_of_it_is_left_lying_about() {
    let scratch = Scratch::new();
    let file = image(&scratch, "web.save", Format::Raw);
    let before = fs::read(&file).expect("read");
    let same = edit_with(&scratch, &file, "true");
    assert!(same.status.success());
    assert!(text(&same.stdout).contains("not changed"));
    assert!(fs::read(&file).expect("read") == before);
    // The option is the first argument: the editor's own words are kept apart.
    let edited = edit_with(&scratch, &file, "[ $# = 2 ] && sed -i s/web/db/ \"$2\"");
    assert!(edited.status.success(), "{}", text(&edited.stderr));
    assert_eq!(ok(&["dump-xml", &file]), XML.replace("web", "db"));
    ok(&["verify", &file]);
    assert!(drafts(&scratch).is_empty());
}

#[test]
fn an_edit_that_fails_changes_nothing_and_keeps_what_was_typed() {
    let scratch = Scratch::new();
    let file = image(&scratch, "web.save", Format::Raw);
    let before = fs::read(&file).expect("read");
    let failed = edit_with(&scratch, &file, "echo rubbish > \"$2\"; exit 3");
    assert_eq!(failed.status.code(), Some(2), "{}", text(&failed.stderr));
    assert!(drafts(&scratch).is_empty());
    let refused = edit_with(&scratch, &file, "echo hours of work > \"$2\"");
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused.stderr));
    let kept = drafts(&scratch);
    assert_eq!(kept.len(), 1);
    let path = kept[0].path();
    assert_eq!(fs::read_to_string(&path).expect("read"), "hours of work\n");
    assert!(
        text(&refused.stderr).contains(name(&path)),
        "{}",
        text(&refused.stderr)
    );
    assert!(fs::read(&file).expect("read") == before);
    let programs = command(&["edit-xml", &file, "--json"])
        .env("EDITOR", "true")
        .output();
    assert_eq!(programs.expect("run").status.code(), Some(2));
}

#[test]
fn an_image_that_somebody_else_changed_meanwhile_is_not_edited() {
    let scratch = Scratch::new();
    let file = image(&scratch, "web.save", Format::Raw);
    let other = scratch.put("other.xml", b"<domain>theirs</domain>");
    let script = format!(
        "sed -i s/web/db/ \"$2\"; {} save edit-xml {file} --xml {}",
        stead_program().display(),
        other.display()
    );
    let refused = edit_with(&scratch, &file, &script);
    assert_eq!(refused.status.code(), Some(4), "{}", text(&refused.stderr));
    assert_eq!(ok(&["dump-xml", &file]), "<domain>theirs</domain>");
}

/// Files that are no whole image, with the status they end with and a word of what is said.
fn refused(scratch: &Scratch) -> Vec<(String, i32, &'static str, &'static str)> {
    let whole = fs::read(image(scratch, "whole", Format::Zstd)).expect("read");
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = whole.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        changed
    };
    let cases = [
        (
            "other",
            b"ELF, or anything".to_vec(),
            2,
            "usage",
            "not a save image",
        ),
        ("empty", Vec::new(), 2, "usage", "not a save image"),
        (
            "partial",
            with(0, b"LibvirtQemudPart"),
            5,
            "damaged",
            "incomplete",
        ),
        (
            "newer",
            with(16, &[9, 0, 0, 0]),
            6,
            "incompatible",
            "version 9",
        ),
        (
            "format",
            with(28, &[9, 0, 0, 0]),
            6,
            "incompatible",
            "format 9",
        ),
        (
            "head",
            whole[..50].to_vec(),
            5,
            "damaged",
            "ends within its header",
        ),
        (
            "cut",
            whole[..5000].to_vec(),
            5,
            "damaged",
            "the file has 5000 bytes",
        ),
        ("texts", with(32, &[0xff; 4]), 5, "damaged", "cookie"),
    ];
    cases
        .into_iter()
        .map(|(file, bytes, status, kind, words)| {
            assert!(!words.is_empty());
            let path = name(&scratch.put(file, &bytes)).to_owned();
            (path, status, kind, words)
        })
        .collect()
}

#[test]
fn what_is_no_whole_image_ends_every_command_with_its_own_status_and_writes_nothing() {
    let scratch = Scratch::new();
    let xml = name(&scratch.put("new.xml", XML.as_bytes())).to_owned();
    let to = name(&scratch.path("to")).to_owned();
    let cases = refused(&scratch);
    let names = scratch.names();
    for (file, status, kind, words) in &cases {
        let commands: [&[&str]; 6] = [
            &["info", file],
            &["verify", file],
            &["dump-xml", file],
            &["edit-xml", file, "--xml", &xml],
            &["convert", file, &to, "--format", "raw"],
            &["extract", file, &to],
        ];
        for args in commands {
            let error = fails(args, *status);
            assert_eq!(error["kind"], *kind, "{error}");
            assert!(
                error["found"]
                    .as_str()
                    .is_some_and(|found| found.contains(words)),
                "{error}"
            );
            assert!(
                error["left"]
                    .as_str()
                    .is_some_and(|left| left.contains("nothing was"))
            );
        }
    }
    let missing = name(&scratch.path("missing")).to_owned();
    for one in ["info", "verify", "dump-xml"] {
        assert_eq!(fails(&[one, &missing], 3)["kind"], "not-found");
        assert_eq!(fails(&[one, name(scratch.0.path())], 2)["kind"], "usage");
        assert_eq!(save(&[one]).status.code(), Some(2));
    }
    assert_eq!(scratch.names(), names);
}

#[test]
fn damage_is_reported_with_its_range_and_ends_with_5() {
    let scratch = Scratch::new();
    let file = image(&scratch, "web.save", Format::Raw);
    let mut bytes = fs::read(&file).expect("read");
    let at = bytes.len() - 1000;
    bytes[at] ^= 1;
    let damaged = name(&scratch.put("damaged", &bytes)).to_owned();
    let output = save(&["verify", &damaged, "--json"]);
    assert_eq!(output.status.code(), Some(5));
    let report: Value = serde_json::from_slice(&output.stdout).expect("the report");
    assert_eq!(report["whole"], false);
    assert_eq!(report["damage"][0]["part"], "payload");
    let range = [&report["damage"][0]["from"], &report["damage"][0]["to"]];
    let [from, to] = range.map(|place| place.as_u64().expect("a place"));
    assert!(from <= at as u64 && (at as u64) < to, "{from} {to}");
    let shown = save(&["verify", &damaged]);
    assert!(text(&shown.stdout).contains("damaged  payload, bytes"));
    let to = name(&scratch.path("to")).to_owned();
    fails(&["convert", &damaged, &to, "--format", "zstd"], 5);
    fails(&["extract", &damaged, &to], 5);
    fails(&["extract", &damaged, "-"], 5);
    let piped = save(&["extract", &damaged, "-"]);
    assert!(
        piped.stdout.is_empty(),
        "nothing of a damaged image is passed on"
    );
    // The header says gzip, the payload is none.
    let lying = name(&scratch.put("lying", &foreign(1, stream(), false))).to_owned();
    assert!(
        fails(&["verify", &lying], 5)["found"]
            .as_str()
            .expect("text")
            .contains("raw")
    );
    // Structure alone can be proven of an image without a record.
    let plain = name(&scratch.put("plain", &foreign(0, stream(), false))).to_owned();
    assert!(ok(&["verify", &plain]).contains("unproven  no record"));
}

#[test]
fn a_sparse_image_is_shown_and_verified_and_refused_where_a_stream_is_needed() {
    let scratch = Scratch::new();
    let start = foreign(6, b"", false).len() as u64;
    let bytes = foreign(6, &streams::mapped(start), false);
    let file = name(&scratch.put("sparse", &bytes)).to_owned();
    assert_eq!(json(&["info", &file])["format"], "sparse");
    assert_eq!(json(&["verify", &file])["whole"], true);
    let to = name(&scratch.path("to")).to_owned();
    assert_eq!(fails(&["extract", &file, &to], 6)["kind"], "incompatible");
    fails(&["convert", &file, &to, "--format", "raw"], 6);
    assert_eq!(scratch.names(), ["sparse"]);
}

#[test]
fn hostile_files_end_with_an_error_and_never_with_a_panic_or_a_hang() {
    let scratch = Scratch::new();
    let mut chance = Chance(5);
    let recorded = |format: Format| fs::read(image(&scratch, format.name(), format)).expect("read");
    let start = foreign(6, b"", false).len() as u64;
    let seeds = [
        foreign(0, &streams::tiny(), false),
        recorded(Format::Gzip),
        recorded(Format::Zstd),
        foreign(6, &streams::mapped(start), false),
    ];
    let to = name(&scratch.path("to")).to_owned();
    for round in 0..48 {
        let mut bytes = seeds[round % seeds.len()].clone();
        for _ in 0..=chance.below(4) {
            let limit = if chance.below(2) == 0 {
                300
            } else {
                bytes.len()
            };
            let at = chance.below(limit);
            bytes[at] = [0, 0xff, 0x7f, 1][chance.below(4)];
        }
        let file = name(&scratch.put("hostile", &bytes)).to_owned();
        let commands: [&[&str]; 3] = [
            &["info", &file],
            &["verify", &file],
            &["convert", &file, &to, "--format", "raw", "--force"],
        ];
        let begun = Instant::now();
        for args in commands {
            let output = save(args);
            let status = output.status.code();
            let expected = matches!(status, Some(0 | 2 | 5 | 6));
            assert!(
                expected,
                "round {round}, {args:?}: {status:?} {}",
                text(&output.stderr)
            );
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "round {round}");
    }
}

/// Starts a command, interrupts it once a new file lies in the folder, and gives its status.
fn interrupted(scratch: &Scratch, args: &[&str]) -> Option<i32> {
    let before = scratch.names();
    let stead = Stead::start(&mut command(args));
    until(PATIENCE, || scratch.names() != before);
    stead.send("INT");
    let output = finish(stead, b"");
    assert_eq!(scratch.names(), before, "what was begun is gone");
    output.status.code()
}

#[test]
fn an_interrupt_ends_a_conversion_and_leaves_what_was_there() {
    let scratch = Scratch::new();
    let file = scratch.path("web.save");
    images::write_stream(&file, Format::Raw, &streams::large(48));
    let before = blake3::hash(&fs::read(&file).expect("read"));
    let to = name(&scratch.path("to")).to_owned();
    let file = name(&file).to_owned();
    for format in ["bzip2", "xz"] {
        let args = ["convert", &file, &to, "--format", format];
        assert_eq!(interrupted(&scratch, &args), Some(130), "{format}");
        let same = ["convert", &file, &file, "--format", format, "--force"];
        assert_eq!(interrupted(&scratch, &same), Some(130), "{format}");
    }
    assert_eq!(blake3::hash(&fs::read(&file).expect("read")), before);
}

#[test]
fn where_there_is_no_room_it_is_said_before_or_undone() {
    let scratch = Scratch::new();
    let source = scratch.path("web.save");
    images::write_stream(&source, Format::Zstd, &streams::large(8));
    let folder = scratch.path("small");
    let _mount = Mount::tmpfs(&folder, 4 << 20);
    let source = name(&source).to_owned();
    let to = name(&folder.join("to")).to_owned();
    let error = fails(&["convert", &source, &to, "--format", "raw"], 7);
    assert!(
        error["found"].as_str().expect("text").contains("it needs"),
        "{error}"
    );
    let error = fails(&["extract", &source, &to], 7);
    assert!(
        error["found"].as_str().expect("text").contains("it needs"),
        "{error}"
    );
    // How small it becomes is not known before: it fills up midway.
    fails(&["convert", &source, &to, "--format", "gzip"], 7);
    assert_eq!(fs::read_dir(&folder).expect("list").count(), 0);
}
