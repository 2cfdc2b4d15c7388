//! A command of which a test waits for a certain step.

use std::io::{BufRead, BufReader};
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::Value;

use crate::{Stead, Worker};

/// How long a step may be away.
const STEP_TIMEOUT: Duration = Duration::from_secs(300);

/// A command that runs, with the events that it tells.
#[derive(Debug)]
pub struct Stepping {
    child: Stead,
    events: Receiver<Value>,
}

impl Stepping {
    /// Starts a command of a worker with `--json`.
    pub fn start(worker: &Worker, args: &[&str]) -> Self {
        let child = worker
            .command(&[])
            .arg("--json")
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start stead");
        let mut child = Stead::from(child);
        let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let (tell, events) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if let Ok(event) = serde_json::from_str(&line)
                    && tell.send(event).is_err()
                {
                    break;
                }
            }
        });
        Self { child, events }
    }

    /// Waits until this step begins.
    pub fn reach(&self, step: &str) {
        loop {
            let event = self.events.recv_timeout(STEP_TIMEOUT);
            let event = event.unwrap_or_else(|_| panic!("{step} was not reached"));
            assert_ne!(event["event"], "error", "{event}");
            if event["step"] == step {
                return;
            }
        }
    }

    /// Waits for the end; its status and, if it failed, its error.
    pub fn end(mut self) -> (ExitStatus, Option<Value>) {
        let status = self.child.wait().expect("wait");
        let error = self.events.iter().find(|event| event["event"] == "error");
        (status, error)
    }

    /// Does something while the command stands still.
    pub fn meanwhile<T>(&self, work: impl FnOnce() -> T) -> T {
        self.child.send("STOP");
        let done = work();
        self.child.send("CONT");
        done
    }
}
