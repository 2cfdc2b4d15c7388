//! The subcommands.

mod amend;
mod bitmap;
mod check;
mod commit;
mod compare;
mod convert;
mod create;
mod dd;
mod info;
mod map;
mod measure;
mod rebase;
mod recover;
mod resize;
mod snapshot;

use crate::console::Console;
use crate::failure::Outcome;
use crate::getopt::{Opt, Parsed};

/// A subcommand.
pub(crate) struct Command {
    /// Its name.
    pub name: &'static str,
    /// What it does, in one line.
    pub about: &'static str,
    /// Its arguments.
    pub usage: &'static str,
    /// The rest of its help, with an example.
    pub help: &'static str,
    /// Its options.
    pub opts: &'static [Opt],
    /// The last argument is an operand even if it looks like an option (a size may be `-1G`).
    pub last_is_operand: bool,
    /// Does it; the exit status, when it ended as it should.
    pub run: fn(&Parsed, &mut Console) -> Outcome<u8>,
}

/// All subcommands, in the order in which help lists them.
pub(crate) const COMMANDS: &[Command] = &[
    create::COMMAND,
    info::COMMAND,
    check::COMMAND,
    map::COMMAND,
    measure::COMMAND,
    convert::COMMAND,
    compare::COMMAND,
    dd::COMMAND,
    amend::COMMAND,
    resize::COMMAND,
    snapshot::COMMAND,
    rebase::COMMAND,
    bitmap::COMMAND,
    commit::COMMAND,
    recover::COMMAND,
];
