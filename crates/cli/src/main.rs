//! The `stead` command: reads the command line, asks the engine, prints.
#![forbid(unsafe_code)]

mod args;
mod backup;
mod commands;
mod cp;
mod demo;
mod editor;
mod exec;
mod img_manual;
mod limit;
mod logs;
mod manual;
mod merge;
mod print;
mod progress;
mod save;
mod sessions;
mod size;
mod terminal;
mod trace;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    if let Some(status) = image_command() {
        return status;
    }
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(print::command_line(&error)),
    };
    if cli.global.json {
        print::speak_json();
    }
    trace::start(cli.global.verbose, cli.global.json);
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return ExitCode::from(print::internal("start the runtime", error)),
    };
    let code = runtime.block_on(commands::run(cli));
    // A read of standard input may still block a thread; nothing waits for it.
    runtime.shutdown_background();
    ExitCode::from(code)
}

/// `stead img …`, and everything under the name `qemu-img`: it has a command line of its own, and needs
/// neither engine nor runtime.
fn image_command() -> Option<ExitCode> {
    let mut args = std::env::args_os();
    let program = stead_img::program_name(&args.next()?);
    let mut args: Vec<_> = args.collect();
    if program != "qemu-img" {
        args.first().filter(|first| *first == "img")?;
        args.remove(0);
    }
    Some(stead_img::run(&args, program).into())
}
