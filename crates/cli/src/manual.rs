//! `stead man`: the manual pages, one for each command.

use stead_engine::{EngineError, Kind};

use crate::args::ManArgs;
use crate::img_manual;
use crate::print;

/// Prints one page, or writes all of them into a folder.
pub fn run(args: &ManArgs) -> u8 {
    if let Some(folder) = &args.to {
        return match clap_mangen::generate_to(img_manual::whole(), folder) {
            Ok(()) => print::line(&folder.display().to_string()),
            Err(error) => print::internal(
                &format!("write manual pages to {}", folder.display()),
                error,
            ),
        };
    }
    let mut command = img_manual::whole().disable_help_subcommand(true);
    command.build();
    for name in &args.command {
        command = match command.find_subcommand(name) {
            Some(below) => below.clone(),
            None => return unknown(name),
        };
    }
    let mut page = Vec::new();
    match clap_mangen::Man::new(command).render(&mut page) {
        Ok(()) => print::bytes(&page),
        Err(error) => print::internal("write the manual page", error),
    }
}

fn unknown(name: &str) -> u8 {
    let error = EngineError::new(
        Kind::Usage,
        "find the manual page",
        format!("there is no command {name}"),
    )
    .next("`stead --help` lists the commands");
    print::error(&error, Kind::Usage.exit_code())
}
