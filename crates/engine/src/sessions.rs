//! Commands that a guest's agent knows: those that run, and those that have ended and are remembered.

use serde::Serialize;
use stead_agent_link::{CommandEntry, CommandState, ExecKey, ExitStatus};

use crate::Engine;
use crate::error::{EngineError, Kind, Result};
use crate::exec::{ExecCommand, agent_error};
use crate::sandbox::wrong_state;

/// What a key of a caller's own is hashed with.
const KEY_CONTEXT: &str = "steadfast 2026 key of a command";

/// A command in a guest.
#[derive(Debug, Clone, Serialize)]
pub struct SessionInfo {
    /// What names it, 32 hex digits.
    pub id: String,
    /// Its words; the guest cuts them to 256 bytes.
    pub command: Vec<String>,
    /// The number of its process in the guest, when it has one.
    pub pid: Option<u32>,
    /// `running`, `ended`, or `unknown` when the agent does not remember.
    pub state: &'static str,
    /// Its exit status, when it ended itself.
    pub exit_code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether it was killed when its time was over.
    pub timed_out: bool,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Whether somebody listens to it.
    pub attached: bool,
    /// Bytes that it has written.
    pub output_bytes: u64,
    /// How many of them are kept for who attaches.
    pub kept_bytes: u64,
    /// When it was started by the guest's clock, RFC 3339; absent before that.
    pub started: Option<String>,
}

impl SessionInfo {
    fn of(entry: &CommandEntry) -> Self {
        let (state, status) = match entry.state {
            CommandState::Running => ("running", None),
            CommandState::Ended(status) => ("ended", Some(status)),
            CommandState::NotRun | CommandState::Forgotten => ("unknown", None),
        };
        let (exit_code, signal) = match status {
            Some(ExitStatus::Code(code)) => (Some(code), None),
            Some(ExitStatus::Signal(signal)) => (None, Some(signal)),
            Some(ExitStatus::TimedOut) | None => (None, None),
        };
        let written = entry.output.iter().map(|kept| kept.end);
        let kept = entry
            .output
            .iter()
            .map(|kept| kept.end.saturating_sub(kept.first));
        Self {
            id: entry.key.to_string(),
            command: entry
                .argv
                .iter()
                .map(|word| String::from_utf8_lossy(&word.0).into_owned())
                .collect(),
            pid: entry.pid,
            state,
            exit_code,
            signal,
            timed_out: status == Some(ExitStatus::TimedOut),
            terminal: entry.pty,
            attached: entry.attached,
            output_bytes: written.fold(0, u64::saturating_add),
            kept_bytes: kept.fold(0, u64::saturating_add),
            started: (entry.started_ns > 0)
                .then(|| jiff::Timestamp::from_nanosecond(entry.started_ns.into()).ok())
                .flatten()
                .map(|time| time.to_string()),
        }
    }

    /// What names it, for [`Engine::attach`].
    ///
    /// # Errors
    /// Never, for one that [`Engine::sessions`] gave.
    pub fn key(&self) -> Result<ExecKey> {
        self.id.parse().map_err(|source| {
            EngineError::internal("read the key of a command", "").because(source)
        })
    }
}

/// The key that a caller names a command by: 32 hex digits are the key itself, any other text is hashed.
#[must_use]
pub fn command_key(name: &str) -> ExecKey {
    if let Ok(key) = name.parse() {
        return key;
    }
    let hash = blake3::derive_key(KEY_CONTEXT, name.as_bytes());
    let mut key = [0; 16];
    key.copy_from_slice(&hash[..16]);
    ExecKey(key)
}

impl Engine {
    /// The commands that the sandbox's agent knows, newest first.
    ///
    /// # Errors
    /// When the sandbox does not run, or its agent does not answer.
    pub async fn sessions(&self, name: &str) -> Result<Vec<SessionInfo>> {
        let (sandbox, mut session) = self.command_session(name).await?;
        let list = session
            .link()
            .list()
            .await
            .map_err(|source| agent_error("list the commands in", &sandbox, source))?;
        if list.left_out > 0 {
            self.watch
                .notice(format!("{} older commands are left out", list.left_out));
        }
        Ok(list.entries.iter().map(SessionInfo::of).collect())
    }

    /// One command, by its key, the beginning of it, or the text that it was named by.
    ///
    /// # Errors
    /// [`Kind::NotFound`]; [`Kind::Usage`] when several keys begin like this; and as [`Engine::sessions`].
    pub async fn session(&self, name: &str, session: &str) -> Result<SessionInfo> {
        let all = self.sessions(name).await?;
        let named = command_key(session).to_string();
        if let Some(exact) = all.iter().find(|one| one.id == named) {
            return Ok(exact.clone());
        }
        let mut like = all
            .iter()
            .filter(|one| !session.is_empty() && one.id.starts_with(session));
        match (like.next(), like.next()) {
            (Some(one), None) => Ok(one.clone()),
            (Some(_), Some(_)) => Err(EngineError::usage(
                format!("find session {session} in sandbox {name}"),
                "several begin like this",
            )
            .next("give more digits")),
            (None, _) => Err(EngineError::new(
                Kind::NotFound,
                format!("find session {session} in sandbox {name}"),
                "its agent knows no such command",
            )
            .next(format!("`stead sessions ls {name}` lists what it knows"))),
        }
    }

    /// Sends a signal, 1 to 31, to a command's process group. Whoever listens to the command goes on listening.
    ///
    /// # Errors
    /// [`Kind::Conflict`] when it does not run any more; and as [`Engine::session`] and [`Engine::exec`].
    pub async fn signal_session(
        &self,
        name: &str,
        session: &str,
        signal: i32,
    ) -> Result<SessionInfo> {
        let found = self.session(name, session).await?;
        let sandbox = self.running(name, "signal a command in").await?;
        let attempt = format!("send signal {signal} to session {} in", found.id);
        let (Some(pid), "running") = (found.pid, found.state) else {
            return Err(wrong_state(
                &attempt,
                &sandbox,
                "the command does not run any more",
            ));
        };
        // The agent gives signals only to who listens, and one may listen at a time.
        let script = format!("kill -{signal} -{pid}");
        let command = ExecCommand {
            argv: vec!["/bin/sh".to_owned(), "-c".to_owned(), script],
            ..ExecCommand::default()
        };
        let output = self.exec_capture(name, command, &[]).await?;
        if output.success() {
            return Ok(found);
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(EngineError::new(
            Kind::Conflict,
            format!("{attempt} sandbox {}", sandbox.name),
            format!("the guest says: {said}"),
        )
        .left("nothing was changed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_taken_as_it_is_and_any_other_text_always_gives_the_same_one() {
        let digits = "000102030405060708090a0b0c0d0e0f";
        assert_eq!(command_key(digits).to_string(), digits);
        assert_eq!(command_key("deploy-42"), command_key("deploy-42"));
        assert_ne!(command_key("deploy-42"), command_key("deploy-43"));
    }
}
