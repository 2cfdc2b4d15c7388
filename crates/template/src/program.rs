//! Running the outside programs that build a template: each in its own process group, with bounded
//! output, a time limit, and an end when the caller asks for one.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use crate::error::TemplateError;
use crate::progress::Step;

/// The most that is kept of a program's standard output, in bytes.
const OUTPUT_BYTES_MAX: u64 = 64 << 20;
/// The longest single line that is passed on, in bytes; longer ones arrive in pieces.
const LINE_BYTES_MAX: u64 = 4096;
/// How many of the last lines of the error output end up in an error.
const LINES_KEPT: usize = 12;
/// How long one program may run. The slowest, installing packages, takes about a minute.
const RUN_LIMIT: Duration = Duration::from_secs(40 * 60);
/// How long a program may take to clean up after SIGTERM (mmdebstrap removes its mounts).
const TERM_LIMIT: Duration = Duration::from_secs(20);

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// When the program is missing, fails, takes too long, or the caller asks to stop; the program and
/// all it started have ended then.
pub(crate) fn run(
    command: &mut Command,
    doing: &str,
    step: &Step<'_>,
) -> Result<Vec<u8>, TemplateError> {
    run_guarded(command, doing, step, &|| Ok(()))
}

/// As [`run`]; `guard` is asked again and again, and once it fails the program is ended.
pub(crate) fn run_guarded(
    command: &mut Command,
    doing: &str,
    step: &Step<'_>,
    guard: &dyn Fn() -> Result<(), TemplateError>,
) -> Result<Vec<u8>, TemplateError> {
    step.go_on()?;
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|error| not_started(error, &program, doing))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        let output = scope.spawn(move || stdout.map_or_else(|| Ok(Vec::new()), read_bounded));
        let said = scope.spawn(move || stderr.map_or_else(Vec::new, |pipe| last_lines(pipe, step)));
        let ended = wait(&mut child, &program, doing, &|| {
            step.go_on().and_then(|()| guard())
        });
        let (Ok(output), Ok(said)) = (output.join(), said.join()) else {
            unreachable!("the readers do not panic");
        };
        let status = ended?;
        if !status.success() {
            return Err(TemplateError::ProgramFailed {
                doing: doing.to_owned(),
                program,
                status: status.to_string(),
                said: said.join(" | "),
            });
        }
        output.map_err(|error| TemplateError::Answer {
            doing: doing.to_owned(),
            program,
            found: error.to_string(),
            expected: format!("at most {OUTPUT_BYTES_MAX} bytes"),
        })
    })
}

/// Whether `program` can be started on this host.
pub(crate) fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

fn not_started(error: io::Error, program: &str, doing: &str) -> TemplateError {
    if error.kind() == io::ErrorKind::NotFound {
        return TemplateError::ProgramMissing {
            doing: doing.to_owned(),
            program: program.to_owned(),
        };
    }
    TemplateError::ProgramFailed {
        doing: doing.to_owned(),
        program: program.to_owned(),
        status: "no start".to_owned(),
        said: error.to_string(),
    }
}

/// Waits for the end of `child`; whatever of its group is left then is killed, so that the readers
/// of its pipes end too.
fn wait(
    child: &mut Child,
    program: &str,
    doing: &str,
    guard: &dyn Fn() -> Result<(), TemplateError>,
) -> Result<ExitStatus, TemplateError> {
    let group = Pid::from_child(child);
    let started = Instant::now();
    let result = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) => {}
            Err(error) => break Err(not_started(error, program, doing)),
        }
        if let Err(error) = guard() {
            break Err(error);
        }
        if started.elapsed() > RUN_LIMIT {
            break Err(TemplateError::ProgramTooSlow {
                doing: doing.to_owned(),
                program: program.to_owned(),
                limit_s: RUN_LIMIT.as_secs(),
            });
        }
        thread::sleep(Step::POLL);
    };
    if result.is_err() {
        end(child, group);
    }
    kill_rest(group);
    result
}

/// Asks the group to end, waits a while for its leader, and then makes it end.
fn end(child: &mut Child, group: Pid) {
    if kill_process_group(group, Signal::TERM).is_err() {
        return;
    }
    let asked = Instant::now();
    while asked.elapsed() < TERM_LIMIT {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        thread::sleep(Step::POLL);
    }
    kill_rest(group);
    // The leader has been killed; waiting collects it and cannot fail in a way that matters.
    if let Err(error) = child.wait() {
        debug_assert!(false, "waiting for a killed child: {error}");
    }
}

/// Kills what is left of a process group; a group that is gone already is what we want.
fn kill_rest(group: Pid) {
    match kill_process_group(group, Signal::KILL) {
        Ok(()) | Err(_) => {}
    }
}

fn read_bounded(pipe: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut limited = pipe.take(OUTPUT_BYTES_MAX + 1);
    limited.read_to_end(&mut bytes)?;
    if bytes.len() as u64 > OUTPUT_BYTES_MAX {
        // Keep the pipe flowing, so that the program can end.
        io::copy(&mut limited.into_inner(), &mut io::sink())?;
        return Err(io::Error::other("more output than any sound answer"));
    }
    Ok(bytes)
}

/// Passes every line on and keeps the last few.
fn last_lines(pipe: impl Read, step: &Step<'_>) -> Vec<String> {
    let mut kept = std::collections::VecDeque::with_capacity(LINES_KEPT);
    let mut reader = BufReader::new(pipe);
    let mut line = Vec::new();
    while let Ok(1..) = reader
        .by_ref()
        .take(LINE_BYTES_MAX)
        .read_until(b'\n', &mut line)
    {
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        line.clear();
        step.line(&text);
        if kept.len() == LINES_KEPT {
            kept.pop_front();
        }
        kept.push_back(text);
    }
    kept.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::{Stage, Watch};
    use std::sync::atomic::{AtomicBool, Ordering};

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.arg("-c").arg(script);
        command
    }

    fn step() -> Step<'static> {
        Watch::silent().begin(Stage::Index).expect("not cancelled")
    }

    #[test]
    fn a_program_that_fails_is_quoted() {
        let error =
            run(&mut shell("echo no room >&2; exit 3"), "packing", &step()).expect_err("exit 3");
        assert!(
            matches!(&error, TemplateError::ProgramFailed { said, .. } if said == "no room"),
            "{error}"
        );
        assert!(error.to_string().contains("exit status: 3"), "{error}");
    }

    #[test]
    fn a_program_that_is_missing_is_named() {
        let error =
            run(&mut Command::new("no-such-program"), "packing", &step()).expect_err("missing");
        assert!(
            matches!(&error, TemplateError::ProgramMissing { program, .. } if program == "no-such-program")
        );
    }

    #[test]
    fn stopping_ends_the_program_and_what_it_started() {
        let (cancel, folder) = (
            AtomicBool::new(false),
            tempfile::tempdir().expect("temp dir"),
        );
        let pid_file = folder.path().join("pid");
        let watch = Watch::new(&|_| {}, &cancel);
        let step = watch.begin(Stage::RootFilesystem).expect("not cancelled");
        let script = format!("sleep 100 & echo $! > {}; wait", pid_file.display());
        let error = thread::scope(|scope| {
            let running = scope.spawn(|| run(&mut shell(&script), "installing", &step));
            while std::fs::read_to_string(&pid_file)
                .unwrap_or_default()
                .is_empty()
            {
                thread::sleep(Step::POLL);
            }
            cancel.store(true, Ordering::Relaxed);
            running.join().expect("no panic").expect_err("cancelled")
        });
        assert!(matches!(
            error,
            TemplateError::Cancelled {
                stage: Stage::RootFilesystem
            }
        ));
        let pid = std::fs::read_to_string(&pid_file)
            .expect("pid")
            .trim()
            .to_owned();
        // It was killed; how soon the kernel gets to it is the kernel's affair. Nobody else would end it in
        // this time.
        let begun = std::time::Instant::now();
        loop {
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if state.is_empty() || state.contains(") Z ") {
                break;
            }
            let waited = begun.elapsed();
            assert!(waited.as_secs() < 30, "the grandchild lives: {state}");
            thread::sleep(Step::POLL);
        }
    }

    #[test]
    fn endless_output_costs_an_error_and_no_memory() {
        let script = format!("head -c {} /dev/zero", OUTPUT_BYTES_MAX + 4096);
        let error = run(&mut shell(&script), "asking", &step()).expect_err("too much");
        assert!(matches!(error, TemplateError::Answer { .. }), "{error}");
    }
}
