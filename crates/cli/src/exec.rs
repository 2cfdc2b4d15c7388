//! `stead exec`: standard streams, signals and the exit status, passed on.

use std::time::Duration;

use stead_engine::{Engine, EngineError, ExecCommand, ExecEnd, Kind, NotStarted, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::ExecArgs;

/// The exit status when stead itself failed, as docker has it.
const FAILED: u8 = 125;
/// The exit status when the command could not be run, as shells have it.
const NOT_RUNNABLE: u8 = 126;
/// The exit status when the command was not found, as shells have it.
const NOT_FOUND: u8 = 127;
/// The exit status when the command timed out, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// Signals that are passed on to the command.
const FORWARDED: [SignalKind; 6] = [
    SignalKind::interrupt(),
    SignalKind::terminate(),
    SignalKind::hangup(),
    SignalKind::quit(),
    SignalKind::user_defined1(),
    SignalKind::user_defined2(),
];

pub async fn run(engine: &Engine, args: ExecArgs) -> Result<u8> {
    let command = command(&args)?;
    let name = args.name;
    let (to_guest, signals) = mpsc::channel(8);
    for kind in FORWARDED {
        forward(kind, to_guest.clone())?;
    }
    let stdout = tokio::io::stdout();
    let stderr = tokio::io::stderr();
    let end = if args.no_stdin {
        engine
            .exec(&name, command, tokio::io::empty(), stdout, stderr, signals)
            .await?
    } else {
        engine
            .exec(&name, command, tokio::io::stdin(), stdout, stderr, signals)
            .await?
    };
    Ok(match end {
        ExecEnd::Code(code) => code,
        ExecEnd::Signal(signal) => 128_u8.saturating_add(signal),
        ExecEnd::TimedOut => TIMED_OUT,
    })
}

/// The exit status when the command did not run to its end.
pub fn status_of(error: &EngineError) -> u8 {
    match error.not_started() {
        Some(NotStarted::NotFound) => NOT_FOUND,
        Some(NotStarted::NotRunnable) => NOT_RUNNABLE,
        None if error.kind() == Kind::Cancelled => Kind::Cancelled.exit_code(),
        None => FAILED,
    }
}

fn command(args: &ExecArgs) -> Result<ExecCommand> {
    let env = args
        .env
        .iter()
        .map(|pair| {
            pair.split_once('=')
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .ok_or_else(|| usage(format!("--env {pair} is not NAME=VALUE")))
        })
        .collect::<Result<_>>()?;
    let timeout = match args.timeout {
        Some(seconds) => Some(
            Duration::try_from_secs_f64(seconds)
                .map_err(|error| usage(format!("--timeout {seconds}: {error}")))?,
        ),
        None => None,
    };
    Ok(ExecCommand {
        argv: args.command.clone(),
        env,
        cwd: args.cwd.clone(),
        user: args.user.clone(),
        stdin: !args.no_stdin,
        timeout,
    })
}

fn usage(found: String) -> EngineError {
    EngineError::new(Kind::Usage, "exec", found)
}

fn forward(kind: SignalKind, to_guest: mpsc::Sender<i32>) -> Result<()> {
    let mut arrivals = signal(kind)
        .map_err(|error| EngineError::new(Kind::Internal, "catch signals", "").because(error))?;
    tokio::spawn(async move {
        while arrivals.recv().await.is_some() {
            if to_guest.send(kind.as_raw_value()).await.is_err() {
                break;
            }
        }
    });
    Ok(())
}
