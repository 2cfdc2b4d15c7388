//! The command line as people and programs meet it: help, JSON, completion, refusals, exit statuses.
#![allow(
    clippy::disallowed_methods,
    reason = "tests write scratch files that nobody keeps"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use stead_engine::Kind;
use stead_tests::mount::Mount;
use stead_tests::{Worker, agent_program, finish, flip, stead_program, target_dir};

/// A worker with an empty store and no template.
fn empty_worker() -> Worker {
    let mut worker = Worker::on(&target_dir());
    worker.store = worker.data.join("store").display().to_string();
    fs::create_dir_all(&worker.data).expect("folder");
    worker.ok(&["store", "init"]);
    worker
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs `stead` outside any worker.
fn plain(args: &[&str]) -> Output {
    Command::new(stead_program())
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("run stead")
}

fn help_of(path: &[String]) -> String {
    let mut args: Vec<&str> = path.iter().map(String::as_str).collect();
    args.push("--help");
    let output = plain(&args);
    assert!(
        output.status.success(),
        "{path:?} --help: {}",
        text(&output.stderr)
    );
    assert!(
        output.stderr.is_empty(),
        "{path:?} --help: {}",
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// The names in a help text's list of commands, without `help` itself.
fn subcommands(help: &str) -> Vec<String> {
    help.lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter(|line| line.starts_with("  ") && !line.starts_with("   "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

/// Every command, groups included, by walking through `--help`.
fn every_command() -> Vec<(Vec<String>, String)> {
    let mut found = Vec::new();
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.pop() {
        let help = help_of(&path);
        for name in subcommands(&help) {
            let mut below = path.clone();
            below.push(name);
            waiting.push(below);
        }
        found.push((path, help));
    }
    found
}

/// The command lines under `Example:`, continued ones as one.
fn examples(help: &str) -> Vec<String> {
    let text = help.split_once("Example:\n").map_or("", |(_, rest)| rest);
    text.replace("\\\n", " ")
        .lines()
        .map(|line| line.trim().to_owned())
        .filter(|line| !line.is_empty())
        .collect()
}

#[test]
fn every_command_explains_itself_with_an_example_that_the_command_line_accepts() {
    let all = every_command();
    assert!(all.len() >= 30, "only {} commands were found", all.len());
    for (path, help) in &all {
        let about = help.lines().next().unwrap_or_default();
        assert!(
            about.len() > 10,
            "{path:?} says nothing of itself: {about:?}"
        );
        let shown = examples(help);
        assert!(!shown.is_empty(), "{path:?} has no example");
        let own = format!("stead {}", path.join(" "));
        assert!(
            shown.iter().any(|line| line.contains(own.trim_end())),
            "{path:?}: no example shows it: {shown:?}"
        );
        for line in shown {
            example_is_accepted(&line);
        }
    }
}

/// Asks for the help of what an example says: everything before is parsed and must be right.
fn example_is_accepted(line: &str) {
    let stead = line
        .split('|')
        .map(str::trim)
        .find(|part| part.starts_with("stead "))
        .unwrap_or_else(|| panic!("no stead in {line:?}"));
    let words = Command::new("sh")
        .args([
            "-c",
            &format!(
                "printf '%s\\n' {}",
                stead.split('>').next().unwrap_or(stead)
            ),
        ])
        .output()
        .expect("split as a shell does");
    let words = text(&words.stdout);
    let mut args: Vec<&str> = words
        .lines()
        .skip(1)
        .take_while(|word| *word != "--")
        .collect();
    args.push("--help");
    let output = plain(&args);
    assert!(output.status.success(), "{line}: {}", text(&output.stderr));
}

#[test]
fn the_help_lists_every_exit_status_of_exec_and_all_text_fits_the_screen() {
    let all = every_command();
    let exec = &all
        .iter()
        .find(|(path, _)| path == &["exec".to_owned()])
        .expect("exec")
        .1;
    for status in ["124", "125", "126", "127", "128+N"] {
        assert!(exec.contains(status), "{status} is missing in {exec}");
    }
    for (path, help) in &all {
        let prose = help
            .lines()
            .filter(|line| !line.trim_start().starts_with("stead "));
        for line in prose {
            assert!(line.chars().count() <= 100, "{path:?}: {line}");
        }
    }
}

#[test]
fn listings_and_reports_are_json_for_programs() {
    let worker = empty_worker();
    for list in [vec!["ls"], vec!["template", "ls"], vec!["checkpoint", "ls"]] {
        assert_eq!(worker.json(&list), Value::Array(Vec::new()), "{list:?}");
    }
    let scrub = worker.json(&["verify"]);
    assert_eq!(scrub["damaged"], Value::Array(Vec::new()), "{scrub}");
    let gc = worker.json(&["gc"]);
    assert_eq!(gc["freed_bytes"], 0, "{gc}");
    let dry = worker.json(&["gc", "--dry-run"]);
    assert_eq!(dry["freed_bytes"], 0, "{dry}");
    let doctor = worker.json(&["doctor"]);
    assert!(
        doctor["findings"]
            .as_array()
            .is_some_and(|all| all.len() > 5),
        "{doctor}"
    );
    // Asked for before or after the command, it means the same.
    assert_eq!(worker.ok(&["ls", "--json"]), "[]");
}

#[test]
fn listings_for_people_have_a_heading_even_when_there_is_nothing() {
    let worker = empty_worker();
    for (list, heading) in [
        (vec!["ls"], "NAME"),
        (vec!["ps"], "NAME"),
        (vec!["template", "ls"], "NAME"),
        (vec!["checkpoint", "ls"], "NAME"),
    ] {
        let shown = worker.ok(&list);
        assert!(
            shown.starts_with(heading) && shown.lines().count() == 1,
            "{shown}"
        );
    }
}

#[test]
fn an_unknown_name_ends_with_status_3_and_a_next_step() {
    let worker = empty_worker();
    for args in [
        vec!["show", "nope"],
        vec!["logs", "nope"],
        vec!["start", "nope"],
        vec!["stop", "nope"],
        vec!["rm", "nope"],
        vec!["hibernate", "nope"],
        vec!["wake", "nope"],
        vec!["restore", "nope", "nope"],
        vec!["fork", "nope"],
        vec!["create", "nope"],
        vec!["template", "show", "nope"],
        vec!["template", "rm", "nope"],
        vec!["checkpoint", "create", "nope"],
        vec!["checkpoint", "show", "nope"],
        vec!["checkpoint", "verify", "nope"],
        vec!["checkpoint", "rm", "nope"],
    ] {
        let error = worker.fails(&args, 3);
        assert_eq!(error["kind"], "not-found", "{args:?}: {error}");
        assert_eq!(error["exit_code"], 3, "{args:?}: {error}");
        assert!(
            error["attempt"]
                .as_str()
                .is_some_and(|text| text.contains("nope")),
            "{error}"
        );
        assert!(
            error["next"].is_string(),
            "{args:?} says no next step: {error}"
        );
        let human = worker.run(&args);
        assert_eq!(human.status.code(), Some(3));
        assert!(human.stdout.is_empty(), "{args:?}: {}", text(&human.stdout));
        let shown = text(&human.stderr);
        assert!(
            shown.starts_with("stead: ") && shown.contains("\n  next: "),
            "{shown}"
        );
    }
    // exec keeps statuses below 125 for the command itself.
    let error = worker.fails(&["exec", "nope", "--", "true"], 125);
    assert_eq!(
        (&error["kind"], &error["exit_code"]),
        (&"not-found".into(), &125.into())
    );
}

#[test]
fn every_line_that_json_mode_writes_to_standard_error_is_json() {
    let worker = empty_worker();
    for args in [
        vec!["--json", "show", "nope"],
        vec!["--json", "show"],
        vec!["show", "nope", "--json", "--bogus"],
        vec!["--json", "create", "debian", "--memory", "lots"],
        vec!["--json", "nonsense"],
        vec![
            "--json",
            "template",
            "import",
            "x",
            "--disk",
            "/nonexistent",
            "--kernel",
            "/nonexistent",
            "--initrd",
            "/nonexistent",
        ],
        vec!["--json", "exec", "nope", "--env", "NOVALUE", "--", "true"],
    ] {
        let output = worker.run(&args);
        let status = output.status.code().expect("it exits");
        assert!(
            output.stdout.is_empty(),
            "{args:?}: {}",
            text(&output.stdout)
        );
        let lines = text(&output.stderr);
        let errors: Vec<Value> = lines
            .lines()
            .map(|line| {
                serde_json::from_str::<Value>(line)
                    .unwrap_or_else(|error| panic!("{args:?}: {error} in {line:?}"))
            })
            .filter(|event| event["event"] == "error")
            .collect();
        assert_eq!(errors.len(), 1, "{args:?}: {lines}");
        assert_eq!(errors[0]["exit_code"], status, "{args:?}: {lines}");
        assert!(
            errors[0]["found"]
                .as_str()
                .is_some_and(|text| !text.is_empty()),
            "{lines}"
        );
    }
}

#[test]
fn odd_arguments_are_refused_without_a_panic() {
    let worker = empty_worker();
    let long = "x".repeat(100_000);
    let usage: Vec<Vec<&str>> = vec![
        vec![],
        vec![""],
        vec!["create"],
        vec!["create", "debian", "--memory", ""],
        vec!["create", "debian", "--memory", "-1"],
        vec!["create", "debian", "--memory", "99999999999999999999G"],
        vec!["create", "debian", "--memory", "nan"],
        vec!["create", "debian", "--cpus", "0"],
        vec!["create", "debian", "--cpus", "65"],
        vec!["create", "debian", "--disk", "x"],
        vec!["create", "debian", "--accelerator", "xen"],
        vec!["fork", "c", "-n", "0"],
        vec!["fork", "c", "-n", "1001"],
        vec!["fork", "c", "-n", "-3"],
        vec!["fork", "c", "-n", "4294967297"],
        vec!["exec", "web"],
        vec!["exec", "web", "--"],
        vec!["exec", "--", "true"],
        vec!["--wait", "-1", "ls"],
        vec!["--wait", "18446744073709551616", "ls"],
        vec!["completion", "tcsh-or-so"],
        vec!["stop", "web", "--timeout", "-5"],
        vec!["logs", "web", "--tail", "-1"],
        vec!["demo", "--forks", "1"],
        vec!["template", "build", "x", "--minimal"],
        vec!["checkpoint"],
        vec!["rm"],
    ];
    for args in usage {
        let output = worker.run(&args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        calm(&args, &output);
    }
    let names = [
        "", " ", "-", "--", "..", "../..", "a/b", "a\nb", "ü", "%s", "'; --", "0", "*", &long,
    ];
    for name in names {
        for args in [
            vec!["show", "--", name],
            vec!["rm", "--force", "--", name],
            vec!["checkpoint", "show", "--", name],
            vec!["checkpoint", "rm", "--", name],
            vec!["template", "show", "--", name],
            vec!["create", "--", name],
            vec!["fork", "--", name],
            vec!["restore", "--", name, name],
        ] {
            let output = worker.command(&args).output().expect("run stead");
            assert!(
                matches!(output.status.code(), Some(2 | 3)),
                "{args:?} {:?}",
                output.status
            );
            calm(&args, &output);
        }
    }
    for wait in ["0", "18446744073709551615"] {
        worker.ok(&["--wait", wait, "ls"]);
    }
}

/// No panic, no backtrace, and something that a person can read.
fn calm(args: &[&str], output: &Output) {
    let said = text(&output.stderr);
    let shown: String = said.chars().take(500).collect();
    for word in ["panicked", "RUST_BACKTRACE", "stack backtrace", "unwrap"] {
        assert!(!said.contains(word), "{args:.100?}: {shown}");
    }
    assert!(!said.trim().is_empty(), "{args:.100?} says nothing");
    let given: usize = args.iter().map(|word| word.len()).sum();
    let bound = 3 * given + 5000;
    assert!(said.len() < bound, "{} bytes are said: {shown}", said.len());
}

#[test]
fn a_data_directory_or_store_that_cannot_be_used_is_named_without_a_panic() {
    let worker = empty_worker();
    let file = worker.data.join("a-file");
    fs::write(&file, b"no folder").expect("write");
    let file = file.display().to_string();
    for (args, status) in [
        (vec!["--data-dir", file.as_str(), "ls"], 2),
        (vec!["--data-dir", "/proc/nothing", "ls"], 2),
        (vec!["--store", file.as_str(), "checkpoint", "ls"], 8),
        (vec!["--store", "/proc/nothing", "checkpoint", "ls"], 8),
        (vec!["--store", "nonsense://x/y", "checkpoint", "ls"], 2),
        (vec!["--store", "s3://", "checkpoint", "ls"], 2),
    ] {
        let output = Command::new(stead_program())
            .env("STEAD_DATA_DIR", &worker.data)
            .args(&args)
            .stdin(Stdio::null())
            .output()
            .expect("run stead");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
        calm(&args, &output);
    }
}

#[test]
fn completion_scripts_are_accepted_by_their_shells() {
    for (shell, check) in [("bash", "bash"), ("zsh", "zsh"), ("fish", "fish")] {
        let script = plain(&["completion", shell]);
        assert!(
            script.status.success() && script.stdout.len() > 1000,
            "{shell}"
        );
        if shell != "bash" && Command::new(check).arg("-c").arg("true").output().is_err() {
            continue;
        }
        let parser = Command::new(check)
            .arg("-n")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start the shell");
        let parsed = finish(parser, &script.stdout);
        assert!(parsed.status.success(), "{shell}: {}", text(&parsed.stderr));
    }
    for shell in ["powershell", "elvish"] {
        assert!(plain(&["completion", shell]).status.success(), "{shell}");
    }
}

#[test]
fn the_manual_page_renders_without_a_warning() {
    let page = plain(&["man"]);
    assert!(page.status.success());
    let renderer = Command::new("groff")
        .args(["-man", "-Tutf8", "-ww", "-z"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    match renderer {
        Ok(child) => {
            let rendered = finish(child, &page.stdout);
            assert!(rendered.status.success(), "{}", text(&rendered.stderr));
            assert_eq!(text(&rendered.stderr), "", "groff warns");
        }
        Err(error) => eprintln!("groff is not here ({error}); only the source is looked at"),
    }
    let source = text(&page.stdout);
    assert!(
        source.contains(".TH stead 1") && source.contains(".SH SUBCOMMANDS"),
        "{source}"
    );
    for name in [
        "create",
        "exec",
        "checkpoint",
        "fork",
        "restore",
        "hibernate",
        "wake",
        "gc",
    ] {
        assert!(source.contains(name), "{name} is missing");
    }
}

#[test]
fn what_is_installed_has_a_page_for_every_command_and_completion_for_three_shells() {
    let worker = empty_worker();
    let prefix = worker.data.join("installed/usr");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/install");
    let installed = Command::new(script)
        .args([stead_program(), agent_program(), prefix.clone()])
        .output()
        .expect("run scripts/install");
    assert!(installed.status.success(), "{}", text(&installed.stderr));
    // What is below `img` is not the command line's own: its page points to the help.
    let own = |path: &[String]| path.len() < 2 || path[0] != "img";
    for (path, _) in every_command().into_iter().filter(|(path, _)| own(path)) {
        let page = [vec!["stead".to_owned()], path].concat().join("-");
        let page = prefix.join(format!("share/man/man1/{page}.1"));
        let source = fs::read_to_string(&page).unwrap_or_else(|_| panic!("{}", page.display()));
        assert!(source.contains(".SH SYNOPSIS"), "{}", page.display());
    }
    for (file, says) in [
        ("share/bash-completion/completions/stead", "complete -F"),
        ("share/zsh/site-functions/_stead", "#compdef stead"),
        (
            "share/fish/vendor_completions.d/stead.fish",
            "complete -c stead",
        ),
    ] {
        let script = fs::read_to_string(prefix.join(file)).expect(file);
        assert!(script.contains(says), "{file}");
    }
    for program in ["bin/stead", "lib/steadfast/stead-agent"] {
        assert!(prefix.join(program).is_file(), "{program}");
    }
    assert!(text(&plain(&["man", "checkpoint", "create"]).stdout).contains("Capture a sandbox"));
    assert_eq!(plain(&["man", "nonsense"]).status.code(), Some(2));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let worker = empty_worker();
    for args in [
        vec!["man"],
        vec!["completion", "bash"],
        vec!["doctor"],
        vec!["ls", "--json"],
    ] {
        let mut child = worker.spawn(&args);
        drop(child.stdout.take());
        let output = finish(child, b"");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {said}");
        assert!(!said.contains("panicked"), "{args:?}: {said}");
    }
}

#[test]
fn doctor_ends_with_0_where_sandboxes_can_run_and_1_where_they_cannot() {
    let worker = empty_worker();
    let report = worker.json(&["doctor"]);
    let findings = report["findings"].as_array().expect("findings");
    let of = |what: &str| {
        findings
            .iter()
            .find(|finding| finding["what"] == what)
            .unwrap_or_else(|| panic!("{what} is not looked at: {report}"))
    };
    for what in ["qemu", "machine", "rights", "store"] {
        assert_eq!(of(what)["advice"], "fine", "{report}");
    }
    for what in [
        "accelerator",
        "reflink",
        "room",
        "memory room",
        "mmdebstrap",
        "qemu-img",
    ] {
        assert!(of(what)["found"].is_string(), "{report}");
    }
    let shown = worker.ok(&["doctor"]);
    assert!(shown.lines().count() >= findings.len(), "{shown}");

    // Without QEMU on the path.
    let without = worker
        .command(&["doctor", "--json"])
        .env("PATH", worker.data.join("no-programs"))
        .output()
        .expect("run stead");
    assert_eq!(without.status.code(), Some(1), "{}", text(&without.stdout));
    let report: Value = serde_json::from_slice(&without.stdout).expect("JSON");
    let qemu = report["findings"]
        .as_array()
        .and_then(|all| all.iter().find(|finding| finding["what"] == "qemu"))
        .expect("qemu");
    assert_eq!(qemu["advice"], "need", "{report}");
    assert!(
        qemu["next"]
            .as_str()
            .is_some_and(|next| next.contains("qemu-system-x86"))
    );

    // Without a store.
    let mut elsewhere = empty_worker();
    elsewhere.store = elsewhere.data.join("no-store").display().to_string();
    let output = elsewhere.run(&["doctor"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stdout).contains("stead store init"),
        "{}",
        text(&output.stdout)
    );
}

/// The finding of `doctor --json` on what.
fn finding(worker: &Worker, what: &str) -> Value {
    let output = worker.run(&["doctor", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let findings = report["findings"].as_array().expect("findings").iter();
    let mut found = findings.filter(|finding| finding["what"] == what);
    found
        .next()
        .unwrap_or_else(|| panic!("no {what}: {report}"))
        .clone()
}

#[test]
fn doctor_works_where_the_data_directory_cannot_be_used_or_is_full() {
    let worker = empty_worker();
    let folder = worker.data.join("full");
    let full = Mount::tmpfs(&folder, 32 << 20);
    let full_worker = Worker::at(&full.folder().join("data"), &worker.store);
    let room = finding(&full_worker, "room");
    assert_eq!(room["advice"], "need", "{room}");
    assert!(room["next"].is_string(), "{room}");
    drop(full_worker);
    drop(full);

    let file = worker.data.join("a-file");
    fs::write(&file, b"no folder").expect("write");
    let unusable = Worker::at(&file, &worker.store);
    let data = finding(&unusable, "data");
    assert_eq!(data["advice"], "need", "{data}");
    let next = data["next"].as_str().unwrap_or_default();
    assert!(next.contains("--data-dir"), "{data}");
    for what in [
        "qemu",
        "/dev/kvm",
        "apt sources",
        "e2fsck",
        "unshare",
        "rights",
    ] {
        assert!(finding(&unusable, what)["found"].is_string());
    }
}

#[test]
fn a_damaged_index_is_reported_as_json_and_rebuilt_from_the_packs() {
    let worker = Worker::with_own_store();
    let indexes = fs::read_dir(std::path::Path::new(&worker.store).join("indexes"));
    let index = indexes
        .expect("indexes")
        .next()
        .expect("one")
        .expect("entry");
    flip(&index.path(), 500);
    let damaged = worker.fails(&["verify"], 5);
    assert_eq!(damaged["kind"], "damaged", "{damaged}");
    let name = index.file_name().to_string_lossy().into_owned();
    assert!(
        damaged["found"]
            .as_str()
            .is_some_and(|found| found.contains(&name)),
        "{damaged}"
    );
    let next = damaged["next"].as_str().unwrap_or_default();
    assert!(next.contains("stead store rebuild-index"), "{damaged}");
    let refused = worker.fails(&["gc"], 8);
    let next = refused["next"].as_str().unwrap_or_default();
    assert!(next.contains("stead store rebuild-index"), "{refused}");

    let rebuilt = worker.json(&["store", "rebuild-index"]);
    assert!(
        rebuilt["packs"].as_u64().is_some_and(|packs| packs > 0),
        "{rebuilt}"
    );
    assert_eq!(rebuilt["damaged"], Value::Array(Vec::new()), "{rebuilt}");
    assert_eq!(
        worker.json(&["verify"])["damaged"],
        Value::Array(Vec::new())
    );
    worker.ok(&["gc"]);
}

#[test]
fn steps_are_plain_lines_in_a_log_json_for_programs_and_not_there_when_quiet() {
    let worker = empty_worker();
    let told = |args: &[&str]| text(&worker.run(args).stderr);
    let plain = told(&["gc"]);
    assert!(
        plain.contains("stead: gc: look for what is in use\n"),
        "{plain}"
    );
    assert!(!plain.contains('\u{1b}'), "{plain:?}");
    assert_eq!(told(&["-q", "gc"]), "");
    fs::write(worker.data.join("layers/nobody.raw"), b"").expect("write");
    let lines = told(&["--json", "-v", "gc"]);
    let events: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect();
    let swept = |event: &&Value| event["event"] == "log" && event["message"] == "sweep";
    let swept = events
        .iter()
        .find(swept)
        .unwrap_or_else(|| panic!("{lines}"));
    assert!(
        swept["path"]
            .as_str()
            .is_some_and(|path| path.ends_with("nobody.raw")),
        "{swept}"
    );
}

/// Every class of failure; a new one does not compile until it is in the list.
fn every_kind() -> Vec<Kind> {
    let all = vec![
        Kind::Internal,
        Kind::Usage,
        Kind::NotFound,
        Kind::Conflict,
        Kind::Damaged,
        Kind::Incompatible,
        Kind::NoSpace,
        Kind::Store,
        Kind::Vm,
        Kind::Agent,
        Kind::Cancelled,
    ];
    for kind in &all {
        match kind {
            Kind::Internal
            | Kind::Usage
            | Kind::NotFound
            | Kind::Conflict
            | Kind::Damaged
            | Kind::Incompatible
            | Kind::NoSpace
            | Kind::Store
            | Kind::Vm
            | Kind::Agent
            | Kind::Cancelled => {}
        }
    }
    all
}

#[test]
fn the_table_of_exit_statuses_says_what_the_program_does() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/exit-codes.md");
    let document = fs::read_to_string(path).expect("docs/exit-codes.md");
    let mut documented = BTreeMap::new();
    for line in document.lines().filter(|line| line.starts_with('|')) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let Ok(status) = cells[0].parse::<u8>() else {
            continue;
        };
        let word = cells[1].trim_matches('`').to_owned();
        assert!(!cells[2].is_empty(), "{line} explains nothing");
        assert!(
            documented.insert(status, word).is_none(),
            "{status} is there twice"
        );
    }
    assert_eq!(documented.remove(&0).as_deref(), Some(""), "0 is done");
    let real: BTreeMap<u8, String> = every_kind()
        .into_iter()
        .map(|kind| (kind.exit_code(), kind.word().to_owned()))
        .collect();
    assert_eq!(documented, real);
    // exec uses the statuses above 123 for itself.
    let own: BTreeSet<u8> = real
        .keys()
        .copied()
        .filter(|status| *status >= 124)
        .collect();
    assert_eq!(own, BTreeSet::from([130]));
}

#[test]
fn the_version_is_told() {
    let output = plain(&["--version"]);
    assert!(output.status.success());
    let told = text(&output.stdout);
    assert_eq!(told.trim(), format!("stead {}", env!("CARGO_PKG_VERSION")));
}
