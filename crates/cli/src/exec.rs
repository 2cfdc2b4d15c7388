//! `stead exec`, `shell` and `attach`: standard streams, terminal, signals and the exit status, passed on.

use std::time::Duration;

use stead_engine::{
    Engine, EngineError, ExecCommand, ExecEnd, ExecIo, ExecKey, Kind, NotStarted, Result, Told,
    Watch, command_key,
};
use tokio::io::AsyncRead;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::{AttachArgs, ExecArgs, ShellArgs};
use crate::{print, terminal};

/// The exit status when stead itself failed, as docker has it.
const FAILED: u8 = 125;
/// The exit status when the command could not be run, as shells have it.
const NOT_RUNNABLE: u8 = 126;
/// The exit status when the command was not found, as shells have it.
const NOT_FOUND: u8 = 127;
/// The exit status when the command timed out, as timeout(1) has it.
const TIMED_OUT: u8 = 124;
/// Signals that are passed on to the command.
const FORWARDED: [SignalKind; 4] = [
    SignalKind::interrupt(),
    SignalKind::quit(),
    SignalKind::user_defined1(),
    SignalKind::user_defined2(),
];
/// Signals that are passed on, unless the command has this terminal: then it is left.
const ENDING: [SignalKind; 2] = [SignalKind::terminate(), SignalKind::hangup()];
/// The user's own shell, as a login shell.
const LOGIN_SHELL: &str = "exec \"${SHELL:-/bin/sh}\" -l";

pub async fn run(engine: &Engine, args: ExecArgs, watch: &Watch, json: bool) -> Result<u8> {
    let command = command(&args)?;
    if args.detach {
        let key = engine.exec_detached(&args.name, command).await?;
        return Ok(if json {
            print::json(&serde_json::json!({ "session": key.to_string() }))
        } else {
            print::line(&key.to_string())
        });
    }
    let carried = Carried {
        name: args.name,
        input: !args.no_stdin,
        at_terminal: args.tty,
    };
    carried
        .carry(engine, What::Run(Box::new(command)), watch)
        .await
}

pub async fn shell(engine: &Engine, args: ShellArgs, watch: &Watch) -> Result<u8> {
    let command = ExecCommand {
        argv: ["/bin/sh", "-c", LOGIN_SHELL].map(str::to_owned).to_vec(),
        user: args.user,
        stdin: true,
        terminal: Some(terminal::like_this()),
        ..ExecCommand::default()
    };
    let carried = Carried {
        name: args.name,
        input: true,
        at_terminal: true,
    };
    carried
        .carry(engine, What::Run(Box::new(command)), watch)
        .await
}

pub async fn attach(engine: &Engine, args: AttachArgs, watch: &Watch) -> Result<u8> {
    let found = engine.session(&args.name, &args.session).await?;
    let carried = Carried {
        name: args.name,
        // The end of a file that was not meant for it would be the end of the command's input.
        input: !args.no_stdin && (args.interactive || terminal::is_there()),
        at_terminal: found.terminal,
    };
    carried
        .carry(engine, What::Attach(found.key()?), watch)
        .await
}

/// What is listened to.
enum What {
    Run(Box<ExecCommand>),
    Attach(ExecKey),
}

/// How its streams are carried.
struct Carried {
    name: String,
    input: bool,
    at_terminal: bool,
}

impl Carried {
    async fn carry(&self, engine: &Engine, what: What, watch: &Watch) -> Result<u8> {
        let (tell, told) = mpsc::channel(8);
        let has_terminal = self.at_terminal && self.input && terminal::is_there();
        tell_signals(&tell, has_terminal)?;
        if self.at_terminal && terminal::is_there() {
            tell_sizes(&tell)?;
        }
        let raw = match has_terminal {
            true => Some(terminal::Raw::begin()?),
            false => None,
        };
        let stdin: Box<dyn AsyncRead + Send + Unpin> = match (self.input, has_terminal) {
            (false, _) => Box::new(tokio::io::empty()),
            (true, true) => Box::new(terminal::typed(tell)),
            (true, false) => Box::new(tokio::io::stdin()),
        };
        let io = ExecIo {
            stdin,
            stdout: tokio::io::stdout(),
            stderr: tokio::io::stderr(),
        };
        let end = match what {
            What::Run(command) => engine.exec(&self.name, *command, io, told).await,
            What::Attach(key) => engine.attach(&self.name, key, io, told).await,
        };
        drop(raw);
        Ok(match end? {
            ExecEnd::Code(code) => code,
            ExecEnd::Signal(signal) => 128_u8.saturating_add(signal),
            ExecEnd::TimedOut => TIMED_OUT,
            ExecEnd::Detached { key } => {
                watch.notice(format!(
                    "left; it goes on, and `stead attach {} {key}` takes it up",
                    self.name
                ));
                0
            }
        })
    }
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
        stdin: !args.no_stdin && (args.interactive || !args.detach),
        timeout,
        terminal: args.tty.then(terminal::like_this),
        limits: args.limits.clone(),
        key: args.key.as_deref().map(command_key),
    })
}

fn usage(found: String) -> EngineError {
    EngineError::new(Kind::Usage, "exec", found)
}

fn tell_signals(tell: &mpsc::Sender<Told>, has_terminal: bool) -> Result<()> {
    for kind in FORWARDED {
        forward(kind, tell, move || Told::Signal(kind.as_raw_value()))?;
    }
    for kind in ENDING {
        forward(kind, tell, move || match has_terminal {
            true => Told::Detach,
            false => Told::Signal(kind.as_raw_value()),
        })?;
    }
    Ok(())
}

/// The terminal's size, now and whenever it changes.
fn tell_sizes(tell: &mpsc::Sender<Told>) -> Result<()> {
    let resize = || {
        let (rows, cols) = terminal::size();
        Told::Resize { rows, cols }
    };
    // The channel is empty, and nobody else has it yet.
    tell.try_send(resize()).unwrap_or_default();
    forward(SignalKind::window_change(), tell, resize)
}

fn forward(
    kind: SignalKind,
    tell: &mpsc::Sender<Told>,
    what: impl Fn() -> Told + Send + 'static,
) -> Result<()> {
    let mut arrivals = signal(kind)
        .map_err(|error| EngineError::new(Kind::Internal, "catch signals", "").because(error))?;
    let tell = tell.clone();
    tokio::spawn(async move {
        while arrivals.recv().await.is_some() {
            if tell.send(what()).await.is_err() {
                break;
            }
        }
    });
    Ok(())
}
