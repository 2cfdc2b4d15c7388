//! The command `stead img`, which also takes the place of `qemu-img`: its options, texts, JSON and exit
//! statuses, over the engine in `stead-qcow2`.
//!
//! [`run`] takes a command line apart, asks the engine, prints, and says how it ended. Nothing here
//! reads or writes an image by itself. What differs from qemu-img on purpose is in `docs/stead-img.md`.
//!
//! | file | idea |
//! |---|---|
//! | `getopt`, `keyval`, `size` | how a command line, `-o` lists and sizes are read |
//! | `reference`, `format` | what a user calls an image; which formats there are |
//! | `create_options`, `new_image`, `target`, `overwrite` | what a new image is to be, and where it goes |
//! | `amend_options`, `data_file` | what is changed afterwards; how an image names its data file |
//! | `editing`, `raw_length` | images opened to be changed in place |
//! | `part` | parts of files that are images |
//! | `opened` | images and chains, opened under locks |
//! | `console`, `failure`, `open_error` | where it is printed, and why a command ended |
//! | `tree`, `json`, `report`, `progress` | reports for people and programs, and how far a command is |
//! | `manual` | the commands as data, for manual pages and completion |
//! | `command/` | one file for each subcommand |

#![forbid(unsafe_code)]

mod amend_options;
mod command;
mod common;
mod console;
mod create_options;
mod data_file;
mod editing;
mod failure;
mod format;
mod getopt;
mod help;
mod json;
mod keyval;
mod manual;
mod new_image;
mod open_error;
mod opened;
mod overwrite;
mod part;
mod progress;
mod raw_length;
mod reference;
mod report;
mod size;
mod snapshot_name;
mod snapshot_table;
mod target;
mod tree;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use command::{COMMANDS, Command};
use console::Console;
use failure::{Failure, Outcome};
use getopt::{Opt, Until};

pub use manual::{CommandManual, OptionManual, manual};

/// How a command ended: the exit status of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus(pub u8);

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status.0)
    }
}

/// What the program calls itself when it was started as `called`.
#[must_use]
pub fn program_name(called: &OsStr) -> &'static str {
    match Path::new(called).file_name() {
        Some(name) if name == "qemu-img" => "qemu-img",
        Some(_) | None => "stead img",
    }
}

/// What may stand before the subcommand.
const STANDARD: &[Opt] = &[
    Opt::flag("version", "V", &["version"]),
    Opt::value("trace", "T", &["trace"]),
];

/// Runs the command line `args`, which starts behind the program's name. `program_name` is what texts
/// on standard error start with.
#[must_use]
pub fn run(args: &[OsString], program_name: &str) -> ExitStatus {
    let mut console = Console::new(program_name);
    let ended = dispatch(args, &mut console).and_then(|status| {
        console.flush()?;
        Ok(status)
    });
    match ended {
        Ok(status) => ExitStatus(status),
        Err(failure) => {
            console.fail(&failure);
            ExitStatus(failure.status)
        }
    }
}

fn dispatch(args: &[OsString], console: &mut Console) -> Outcome<u8> {
    let program = console.program().to_owned();
    let wrong = |wrong: getopt::Wrong| Failure::usage(&program, wrong.text());
    let standard = getopt::parse(args, STANDARD, Until::FirstOperand).map_err(wrong)?;
    if standard.has("help") {
        console.print(&help::all(&program))?;
        return Ok(0);
    }
    if standard.has("version") {
        console.print(&help::version(&program))?;
        return Ok(0);
    }
    let Some((name, rest)) = standard.operands.split_first() else {
        return Err(Failure::usage(&program, "Not enough arguments"));
    };
    let Some(command) = COMMANDS.iter().find(|command| name == command.name) else {
        let name = name.to_string_lossy();
        return Err(Failure::usage(
            &program,
            format!("Command not found: {name}"),
        ));
    };
    run_command(command, rest, console)
}

fn run_command(command: &Command, args: &[OsString], console: &mut Console) -> Outcome<u8> {
    let program = console.program().to_owned();
    let asks = args.iter().any(|arg| arg == "--help" || arg == "-h");
    let (args, last) = match args.split_last() {
        Some((last, rest)) if command.last_is_operand && !asks => {
            if rest.is_empty() {
                return Err(Failure::usage(&program, "Not enough arguments"));
            }
            (rest, Some(last))
        }
        None if command.last_is_operand => {
            return Err(Failure::usage(&program, "Not enough arguments"));
        }
        Some(_) | None => (args, None),
    };
    let parsed = getopt::parse(args, command.opts, Until::End);
    let mut parsed = parsed.map_err(|wrong| Failure::usage(&program, wrong.text()))?;
    parsed.operands.extend(last.cloned());
    if parsed.has("help") {
        console.print(&help::of(command, &program))?;
        return Ok(0);
    }
    (command.run)(&parsed, console)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_name_qemu_img_makes_it_speak_as_qemu_img() {
        assert_eq!(program_name(OsStr::new("/usr/bin/qemu-img")), "qemu-img");
        assert_eq!(program_name(OsStr::new("qemu-img")), "qemu-img");
        assert_eq!(program_name(OsStr::new("./stead-img")), "stead img");
        assert_eq!(program_name(OsStr::new("")), "stead img");
    }

    #[test]
    fn every_command_has_an_example_in_its_help_and_no_option_twice() {
        for command in COMMANDS {
            assert!(command.help.contains("\nExample"), "{}", command.name);
            let mut names: Vec<String> = Vec::new();
            for opt in command.opts {
                names.extend(opt.shorts.chars().map(String::from));
                names.extend(opt.longs.iter().map(ToString::to_string));
            }
            let count = names.len();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), count, "{}", command.name);
        }
    }
}
