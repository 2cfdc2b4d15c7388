//! `stead img` as manual pages and completion see it: its own crate reads its command lines, and says here which
//! commands and options there are.

use clap::{Arg, ArgAction, Command, CommandFactory, Id, ValueHint};
use stead_img::{CommandManual, OptionManual};

use crate::args::Cli;

/// The whole command line, `stead img` with its commands.
pub fn whole() -> Command {
    let stead = Cli::command();
    let globals = stead.get_arguments().filter(|arg| arg.is_global_set());
    let globals: Vec<Arg> = globals.cloned().collect();
    let commands = stead_img::manual("stead img");
    let commands = commands
        .iter()
        .map(|manual| without_globals(command(manual), &globals));
    let mut img = without_globals(Command::new("img").subcommands(commands), &globals);
    if let Some(known) = stead.find_subcommand("img") {
        if let Some(about) = known.get_about() {
            img = img.about(about.clone());
        }
        if let Some(text) = known.get_after_help() {
            img = img.after_help(text.clone());
        }
    }
    stead.mut_subcommand("img", |_| img)
}

/// Options that every other command has are none of these commands: under the same names they are hidden.
fn without_globals(command: Command, globals: &[Arg]) -> Command {
    let own: Vec<Id> = command
        .get_arguments()
        .map(|arg| arg.get_id().clone())
        .collect();
    let foreign = globals.iter().filter(|arg| !own.contains(arg.get_id()));
    foreign.fold(command, |command, arg| {
        command.arg(arg.clone().global(false).hide(true))
    })
}

fn command(manual: &CommandManual) -> Command {
    let file = Arg::new("file")
        .value_name("FILE")
        .action(ArgAction::Append)
        .value_hint(ValueHint::FilePath);
    Command::new(manual.name)
        .about(manual.about)
        .args(manual.options.iter().map(option))
        .arg(file)
        .after_help(manual.help.clone())
}

fn option(manual: &OptionManual) -> Arg {
    let mut arg = Arg::new(manual.id).help(manual.about.clone());
    if let Some(short) = manual.short {
        arg = arg.short(short);
    }
    if let Some(long) = manual.long {
        arg = arg.long(long);
    }
    match manual.value {
        None => arg.action(ArgAction::SetTrue),
        Some(name) => arg
            .action(ArgAction::Set)
            .value_name(name)
            .value_hint(ValueHint::AnyPath),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_of_img_is_known_to_manual_pages_and_completion() {
        let mut whole = whole();
        whole.build();
        whole.clone().debug_assert();
        let img = whole.find_subcommand("img").expect("there is img");
        for manual in stead_img::manual("stead img") {
            let found = img.find_subcommand(manual.name).expect(manual.name);
            let mut page = Vec::new();
            clap_mangen::Man::new(found.clone())
                .render(&mut page)
                .expect("a page");
            let page = String::from_utf8_lossy(&page).into_owned();
            assert!(
                page.contains("Example") && !page.contains("STEAD_STORE"),
                "{page}"
            );
        }
    }
}
