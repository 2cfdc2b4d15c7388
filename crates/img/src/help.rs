//! `--help` and `--version`.

use crate::command::{COMMANDS, Command};

/// The qemu-img whose options, texts and exit statuses are kept.
const TAKES_THE_PLACE_OF: &str = "7.2.0";

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
    text.push_str(
        "\nSizes are bytes, or have a suffix: k, M, G, T, P, E (powers of 1024), for instance 1.5G.\n\n\
         Supported formats: raw qcow2\n",
    );
    text
}

/// What one command can do.
pub(crate) fn of(command: &Command, program: &str) -> String {
    let help = command.help.replace("{program}", program);
    format!(
        "usage: {program} {} {}\n\n{}.\n\n{help}",
        command.name, command.usage, command.about
    )
}
