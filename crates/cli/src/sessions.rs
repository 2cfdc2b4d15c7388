//! `stead sessions`, and how guests are: `stead wait`, `stead show --health`.

use std::time::Duration;

use serde::Serialize;
use stead_engine::{Engine, Health, Result, SandboxInfo, SessionInfo};

use crate::args::{SessionsCommand, WaitArgs};
use crate::print;
use crate::size::human;

/// A sandbox with what its guest said.
#[derive(Debug, Serialize)]
pub struct Asked {
    #[serde(flatten)]
    pub sandbox: SandboxInfo,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
}

impl Asked {
    /// Asks the guest if that is wanted.
    pub async fn of(engine: &Engine, sandbox: SandboxInfo, wanted: bool) -> Result<Self> {
        let health = match wanted {
            true => Some(engine.health(&sandbox.id).await?),
            false => None,
        };
        Ok(Self { sandbox, health })
    }

    /// The state and, when it was asked for, how the guest is.
    pub fn state(&self) -> String {
        let state = self.sandbox.state.word();
        match &self.health {
            None => state.to_owned(),
            Some(health) => format!("{state}, {}", health.state.word()),
        }
    }
}

pub async fn run(engine: &Engine, command: SessionsCommand, json: bool) -> Result<u8> {
    match command {
        SessionsCommand::Ls(one) => {
            let all = engine.sessions(&one.name).await?;
            Ok(if json { print::json(&all) } else { list(&all) })
        }
        SessionsCommand::Kill(args) => {
            let told = engine
                .signal_session(&args.name, &args.session, args.signal)
                .await?;
            Ok(if json {
                print::json(&told)
            } else {
                print::line(&told.id)
            })
        }
    }
}

fn list(all: &[SessionInfo]) -> u8 {
    print::table(
        [
            "SESSION", "PID", "STATE", "TTY", "ATTACHED", "OUTPUT", "STARTED", "COMMAND",
        ],
        all.iter().map(|one| {
            let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
            [
                print::short(&one.id),
                one.pid
                    .map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
                state(one),
                yes(one.terminal),
                yes(one.attached),
                human(one.output_bytes),
                one.started.clone().unwrap_or_else(|| "-".to_owned()),
                one.command.join(" ").escape_default().to_string(),
            ]
        }),
    )
}

fn state(one: &SessionInfo) -> String {
    match (one.exit_code, one.signal) {
        (Some(code), _) => format!("ended {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) if one.timed_out => "timed out".to_owned(),
        (None, None) => one.state.to_owned(),
    }
}

pub async fn wait(engine: &Engine, args: &WaitArgs, json: bool) -> Result<u8> {
    let health = engine
        .wait_ready(&args.name, Duration::from_secs(args.timeout))
        .await?;
    Ok(if json {
        print::json(&health)
    } else {
        print::line(&args.name)
    })
}
