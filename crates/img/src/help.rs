//! `--help` and `--version`.

use crate::command::{COMMANDS, Command};

/// The qemu-img whose options, texts and exit statuses are kept.
const TAKES_THE_PLACE_OF: &str = "7.2.0";
/// How wide a screen is, in characters.
const COLUMNS: usize = 100;

/// The version, in the form that scripts look for.
pub(crate) fn version(program: &str) -> String {
    let own = env!("CARGO_PKG_VERSION");
    if program == "qemu-img" {
        return format!("qemu-img version {TAKES_THE_PLACE_OF} (stead img {own})\n");
    }
    format!("{program} {own} (takes the place of qemu-img {TAKES_THE_PLACE_OF})\n")
}

/// What the program can do.
pub(crate) fn all(program: &str) -> String {
    let mut text = version(program);
    text.push_str(&format!(
        "usage: {program} [standard options] command [command options]\n\n\
         Create, examine, change and repair disk images. An operation succeeds with its result proven, or\n\
         fails and leaves what was there.\n\n\
         Standard options:\n  \
         -h, --help     this text; behind a command, the text for that command\n  \
         -V, --version  the version\n  \
         -T, --trace    accepted and ignored\n\n\
         Commands:\n"
    ));
    for command in COMMANDS {
        text.push_str(&format!("  {:<9} {}\n", command.name, command.about));
    }
    text.push_str(&format!(
        "\nSizes are bytes, or have a suffix: k, M, G, T, P, E (powers of 1024), for instance 1.5G.\n\n\
         Supported formats: raw qcow2\n\n\
         Example:\n  {program} info --output=json disk.qcow2\n"
    ));
    text
}

/// What one command can do.
pub(crate) fn of(command: &Command, program: &str) -> String {
    let help = command.help.replace("{program}", program);
    fitted(&format!(
        "usage: {program} {} {}\n\n{}.\n\n{help}",
        command.name, command.usage, command.about
    ))
}

/// The text with long lines broken at blanks; what goes on is indented as the text of its line is.
fn fitted(text: &str) -> String {
    let mut fitted = String::new();
    for line in text.lines() {
        let indent = " ".repeat(hanging_indent(line));
        let mut rest = line.to_owned();
        while let Some(end) = break_of(&rest, indent.len()) {
            fitted.push_str(rest[..end].trim_end());
            fitted.push('\n');
            rest = format!("{indent}{}", rest[end..].trim_start());
        }
        fitted.push_str(&rest);
        fitted.push('\n');
    }
    fitted
}

/// Where a line that is too long is broken: the last blank that is not in its indentation.
fn break_of(line: &str, indent: usize) -> Option<usize> {
    let (limit, _) = line.char_indices().nth(COLUMNS)?;
    line[..=limit].rfind(' ').filter(|at| *at > indent)
}

/// Behind `usage: `, or where the second column of a list of options begins.
fn hanging_indent(line: &str) -> usize {
    if line.starts_with("usage: ") {
        return "usage: ".len();
    }
    let start = line.len() - line.trim_start().len();
    let second = line[start..].find("  ").filter(|_| start > 0);
    second.map_or(start, |at| {
        let gap = &line[start + at..];
        start + at + gap.len() - gap.trim_start().len()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lines_are_broken_at_blanks_and_go_on_where_their_text_began() {
        let long = "word ".repeat(30);
        let text = format!("usage: x {long}\n  -a, --all  {long}\nshort\n{long}");
        let lines: Vec<String> = fitted(&text).lines().map(str::to_owned).collect();
        assert!(lines.iter().all(|line| line.chars().count() <= COLUMNS));
        assert!(lines[1].starts_with("       word"), "{lines:?}");
        assert!(lines[3].starts_with("             word"), "{lines:?}");
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(words(&lines.join("\n")), words(&text));
    }

    #[test]
    fn every_help_fits_the_screen() {
        for command in COMMANDS {
            let help = of(command, "stead img");
            for line in help.lines() {
                assert!(line.chars().count() <= COLUMNS, "{}: {line}", command.name);
            }
        }
    }
}
