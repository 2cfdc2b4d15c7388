//! The guest agent: `stead-agent`.
//!
//! One static binary, some roles:
//!
//! | started as | role | module |
//! |---|---|---|
//! | `/init`, process 1 | loads modules, mounts the root, runs its init | [`init`] |
//! | `stead-agent serve` | answers the host on every port | [`serve`] |
//! | `stead-agent launch` | becomes a command; started by `serve` only | [`launch`] |
//! | `stead-agent upgrade` | asks the running agent to become another | [`control`], [`upgrade`] |
//! | `stead-agent resume` | `serve`, in the place of an agent in the same process | [`upgrade`] |
//!
//! What may happen when is decided by [`stead_agent_proto::guest::Agent`]; this crate is its hands.
#![forbid(unsafe_code)]

mod account;
mod adopt;
mod cgroup;
mod chores;
mod command;
mod control;
mod core;
mod drain;
mod error;
mod file_streams;
mod freeze;
mod handover;
mod inbox;
mod init;
mod launch;
mod limits;
mod listen;
mod mounts;
mod persona;
mod port;
mod pty;
mod reaper;
mod serve;
mod setup;
mod shutdown;
mod standstill;
mod succession;
mod tool;
mod transport;
mod upgrade;
mod workload;

use std::ffi::OsString;
use std::process::ExitCode;

use crate::error::AgentError;
use crate::succession::Inherited;

const USAGE: &str = "usage: stead-agent serve [options]
       stead-agent upgrade [--control NAME] FILE DIGEST
  --socket PATH            listen there instead of on virtio-serial ports
  --vsock PORT             listen there instead, for the host only
  --vsock-local PORT       listen there for this machine's own processes, and leave the machine alone
  --stdin-socket           serve the one connection that is standard input
  --no-clock               leave the clock alone, and say so
  --no-entropy             leave the random number generator alone, and say so
  --no-hostname            leave the host name alone, and say so
  --control NAME           take orders from inside at this abstract socket
  --allow-shutdown         with a socket: shut the machine down when told to
  --freeze-program PATH    what freezes and thaws (default: fsfreeze; needed with a socket)
  --mounts PATH            where mounts are listed (default: /proc/self/mountinfo)";

fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let program = arguments.next().unwrap_or_default();
    let rest: Vec<_> = arguments.collect();
    if program == "/init" && std::process::id() == 1 {
        init::run(&rest);
    }
    // A thread that panics must not leave a half-dead agent behind: init starts a new one.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    let result = match rest.split_first() {
        Some((mode, options)) if mode == "serve" => serve(options, Inherited::default()),
        Some((mode, options)) if mode == upgrade::RESUME => resume(options),
        Some((mode, arguments)) if mode == "upgrade" => control::upgrade(arguments),
        Some((mode, [])) if mode == "launch" => launch::run(),
        Some((mode, [])) if mode == "--version" => {
            println!("stead-agent {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Some(_) | None => Err(AgentError::Usage(USAGE.to_owned())),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stead-agent: {}", error::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve(options: &[OsString], inherited: Inherited) -> Result<(), AgentError> {
    let (options, control) = control::listen(options)?;
    limits::raise_own()?;
    serve::run(&options, control, inherited)
}

fn resume(options: &[OsString]) -> Result<(), AgentError> {
    // What is lost of the agent before is no reason to be none.
    let inherited = upgrade::resume(options).unwrap_or_else(|error| {
        eprintln!("stead-agent: {}", error::chain(&error));
        Inherited::default()
    });
    serve(options, inherited)
}
