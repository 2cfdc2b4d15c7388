//! The control connection of a peer's QEMU, with the times that QEMU itself gives its events.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{sleep, timeout};

use crate::error::{BenchError, Doing, Result};

/// How long QEMU may take to greet, loading a state included, and to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(120);
/// How often a socket that is not there yet is tried.
const RETRY: Duration = Duration::from_millis(1);

/// A connection in command mode.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines<BufReader<OwnedReadHalf>>,
    out: OwnedWriteHalf,
    events: Vec<(String, Duration)>,
}

impl Qmp {
    /// Waits for QEMU to listen and to greet.
    ///
    /// # Errors
    /// When it does not within two minutes.
    pub async fn connect(folder: &Path) -> Result<Self> {
        let doing = "connect to a peer's QEMU";
        let negotiated = timeout(ANSWER_WITHIN, async {
            let stream = loop {
                match stead_vmm::dir::connect(folder, stead_vmm::dir::QMP_SOCKET) {
                    Ok(stream) => break stream,
                    Err(_not_yet) => sleep(RETRY).await,
                }
            };
            stream.set_nonblocking(true).doing(doing)?;
            let (read, out) = UnixStream::from_std(stream).doing(doing)?.into_split();
            let mut qmp = Self {
                lines: BufReader::new(read).lines(),
                out,
                events: Vec::new(),
            };
            qmp.message(doing).await?;
            qmp.execute("qmp_capabilities", json!({})).await?;
            Ok(qmp)
        });
        negotiated.await.doing(doing)?
    }

    /// Executes a command.
    ///
    /// # Errors
    /// When QEMU refuses it or does not answer.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        self.out
            .write_all(format!("{line}\n").as_bytes())
            .await
            .doing(command)?;
        loop {
            let message = self.message(command).await?;
            if let Some(value) = message.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = message.get("error") {
                return Err(BenchError::new(command, error.to_string()));
            }
        }
    }

    /// Executes a command of the human monitor, which has to say nothing.
    ///
    /// # Errors
    /// When it says something.
    pub async fn monitor(&mut self, line: &str) -> Result<()> {
        let arguments = json!({ "command-line": line });
        let said = self.execute("human-monitor-command", arguments).await?;
        match said.as_str() {
            Some("") => Ok(()),
            _ => Err(BenchError::new(line, said.to_string())),
        }
    }

    /// Forgets the events that have come so far.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Waits until an event has come; gives when QEMU said it happened, since 1970.
    ///
    /// # Errors
    /// When it does not come.
    pub async fn event(&mut self, name: &str) -> Result<Duration> {
        loop {
            if let Some(at) = self.events.iter().position(|(known, _)| known == name) {
                return Ok(self.events.remove(at).1);
            }
            self.message(name).await?;
        }
    }

    async fn message(&mut self, doing: &str) -> Result<Value> {
        let line = timeout(ANSWER_WITHIN, self.lines.next_line()).await;
        let line = line.doing(doing)?.doing(doing)?;
        let line = line.ok_or_else(|| BenchError::new(doing, "QEMU has ended"))?;
        let message: Value = serde_json::from_str(&line).doing(doing)?;
        if let Some(name) = message["event"].as_str() {
            let part = |unit: &str| message["timestamp"][unit].as_u64().unwrap_or(0);
            let at =
                Duration::from_secs(part("seconds")) + Duration::from_micros(part("microseconds"));
            self.events.push((name.to_owned(), at));
        }
        Ok(message)
    }
}
