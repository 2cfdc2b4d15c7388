//! The commands and their options as data, for manual pages and completion: taken from the help texts, so that
//! there is one text only.

use crate::command::{COMMANDS, Command};
use crate::help;

/// What there is to say of a command.
#[derive(Debug, Clone)]
pub struct CommandManual {
    /// Its name, for instance `convert`.
    pub name: &'static str,
    /// What it does, in one line.
    pub about: &'static str,
    /// The whole help text.
    pub help: String,
    /// The options that help describes.
    pub options: Vec<OptionManual>,
}

/// An option of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OptionManual {
    /// A name that no other option of the command has.
    pub id: &'static str,
    /// The letter that stands for it.
    pub short: Option<char>,
    /// Its long name.
    pub long: Option<&'static str>,
    /// What its value is called, where it takes one.
    pub value: Option<&'static str>,
    /// What it does.
    pub about: String,
}

/// All commands, in the order in which help lists them. `program` is what examples call the program.
#[must_use]
pub fn manual(program: &str) -> Vec<CommandManual> {
    let of = |command: &Command| CommandManual {
        name: command.name,
        about: command.about,
        help: help::of(command, program),
        options: options(command),
    };
    COMMANDS.iter().map(of).collect()
}

fn options(command: &Command) -> Vec<OptionManual> {
    let described = described(command.help);
    let find = |opt: &crate::getopt::Opt| {
        let short = opt.shorts.chars().next();
        let long = opt.longs.first().copied();
        let is_it = |name: &&str| match name.strip_prefix("--") {
            Some(long) => opt.longs.contains(&long),
            None => opt
                .shorts
                .chars()
                .any(|letter| name[1..] == *letter.to_string()),
        };
        let found = described.iter().find(|one| one.names.iter().any(is_it))?;
        let value = found.value.unwrap_or("VALUE");
        Some(OptionManual {
            id: opt.id,
            short,
            long,
            value: opt.takes_value.then_some(value),
            about: found.about.clone(),
        })
    };
    command.opts.iter().filter_map(find).collect()
}

/// A line of help, and those that go on with it.
struct Described {
    names: Vec<&'static str>,
    value: Option<&'static str>,
    about: String,
}

/// The lines that begin with options: `  -f, --format FMT      what it does`.
fn described(help: &'static str) -> Vec<Described> {
    let mut all: Vec<Described> = Vec::new();
    for line in help.lines() {
        let text = line.trim_start();
        let indent = line.len() - text.len();
        if indent >= 2 && text.starts_with('-') {
            let (head, about) = text.split_once("  ").unwrap_or((text, ""));
            all.push(Described::read(head, about.trim()));
        } else if indent > MAX_INDENT
            && let Some(last) = all.last_mut()
        {
            let gap = if last.about.is_empty() { "" } else { " " };
            last.about.push_str(gap);
            last.about.push_str(text);
        }
    }
    all
}

/// Where an option begins at most; what stands further right goes on with the line before.
const MAX_INDENT: usize = 10;

impl Described {
    fn read(head: &'static str, about: &str) -> Self {
        let mut described = Self {
            names: Vec::new(),
            value: None,
            about: about.to_owned(),
        };
        for part in head.split([' ', ',']).filter(|part| !part.is_empty()) {
            match part.starts_with('-') {
                true => described.names.push(part),
                false => described.value = Some(part),
            }
        }
        described
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_its_options_with_what_they_do() {
        let all = manual("stead img");
        assert_eq!(all.len(), COMMANDS.len());
        let convert = all.iter().find(|one| one.name == "convert");
        let convert = convert.expect("there is convert");
        let compress = convert.options.iter().find(|one| one.id == "compress");
        assert_eq!(
            compress,
            Some(&OptionManual {
                id: "compress",
                short: Some('c'),
                long: Some("compress"),
                value: None,
                about: "compress clusters".into(),
            })
        );
        for command in all {
            assert!(command.help.contains("stead img"), "{}", command.name);
            for option in command.options {
                assert!(!option.about.is_empty(), "{} {option:?}", command.name);
            }
        }
    }
}
