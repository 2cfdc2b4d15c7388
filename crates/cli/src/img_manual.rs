//! `stead img` as manual pages and completion see it: its own crate reads its command lines, and says here which
//! commands and options there are.

use clap::{Arg, ArgAction, Command, CommandFactory, ValueHint};
use stead_img::{CommandManual, OptionManual};

use crate::args::Cli;

/// The whole command line, `stead img` with its commands.
pub fn whole() -> Command {
    Cli::command().mut_subcommand("img", |img| {
        let mut whole =
            Command::new("img").subcommands(stead_img::manual("stead img").iter().map(command));
        if let Some(about) = img.get_about() {
            whole = whole.about(about.clone());
        }
        match img.get_after_help() {
            Some(text) => whole.after_help(text.clone()),
            None => whole,
        }
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
            assert!(page.contains("Example"), "{page}");
        }
    }
}
