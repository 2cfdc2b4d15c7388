//! What an agent leaves to another that takes its place in the same process: the life it is in, and its commands with what
//! is kept of their output. Sessions end with it; their hosts attach again.
//!
//! Invariants:
//! - Nothing is left in a state that a thread of the old agent would have to finish: a handshake, a freeze, the start of a command.
//! - A command that was released is in what is left, so that its key never runs again.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::commands::{Commands, Progress};
use super::life::Life;
use super::workload::Workload;
use super::{Agent, RETIRED_EPOCHS};
use crate::{Epoch, ExecKey};

/// Changes with everything that is written down here.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
struct Heritage {
    version: u32,
    life: LifeLeft,
    retired: Vec<Epoch>,
    commands: Commands,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum LifeLeft {
    Unknown { tried: Option<Epoch> },
    Current { epoch: Epoch, released: bool },
}

impl Agent {
    /// The commands that were released and have not ended: whoever leads them must hand them over.
    pub fn unfinished(&self) -> impl Iterator<Item = ExecKey> {
        let is_unfinished = |progress: &Progress| match progress {
            Progress::Released | Progress::Running { .. } => true,
            Progress::Starting | Progress::Withdrawn | Progress::Ended { .. } => false,
        };
        self.commands
            .table
            .iter()
            .filter(move |(_, command)| is_unfinished(&command.progress))
            .map(|(&key, _)| key)
    }

    /// What is to be known by the agent that takes this one's place, which goes on with `handed`: the commands that run, and
    /// those whose output is held open.
    ///
    /// # Errors
    /// While something is under way that only this agent can finish; says what. Nothing has changed.
    pub fn bequeath(&self, handed: &BTreeSet<ExecKey>) -> Result<Vec<u8>, String> {
        let life = match self.life {
            Life::Unknown { tried } => LifeLeft::Unknown { tried },
            Life::Current { epoch, released } => LifeLeft::Current { epoch, released },
            Life::Changing { .. } => return Err("a handshake is under way".to_owned()),
        };
        if self.is_frozen() {
            return Err("file systems are frozen".to_owned());
        }
        if self.workload != Workload::Running {
            return Err("the processes of the guest stand still".to_owned());
        }
        let mut heir = self.clone();
        let ports: Vec<u32> = heir.ports.keys().copied().collect();
        for port in ports {
            // What would follow is done by the end of this agent.
            drop(heir.on_host_gone(port));
        }
        // Whoever prepares them ends with this agent.
        let commands = &mut heir.commands.table;
        commands.retain(|_, command| command.progress != Progress::Withdrawn);
        if let Some(key) = heir.unfinished().find(|key| !handed.contains(key)) {
            return Err(format!("command {key} is being started"));
        }
        heir.commands.live.clone_from(handed);
        let heritage = Heritage {
            version: VERSION,
            life,
            retired: heir.retired.into(),
            commands: heir.commands,
        };
        postcard::to_stdvec(&heritage)
            .map_err(|error| format!("it cannot be written down: {error}"))
    }

    /// The same agent, which knows what the one before it in this process knew.
    ///
    /// # Errors
    /// When it is not what [`Agent::bequeath`] gave, or another version's: the agent is to begin without it.
    pub fn with_heritage(mut self, heritage: &[u8]) -> Result<Self, String> {
        let (version, _) = postcard::take_from_bytes::<u32>(heritage)
            .map_err(|error| format!("no version: {error}"))?;
        if version != VERSION {
            return Err(format!("version {version}, known is {VERSION}"));
        }
        let left: Heritage =
            postcard::from_bytes(heritage).map_err(|error| format!("not understood: {error}"))?;
        if left.retired.len() > RETIRED_EPOCHS || !left.commands.is_sound() {
            return Err("it contradicts itself".to_owned());
        }
        self.life = match left.life {
            LifeLeft::Unknown { tried } => Life::Unknown { tried },
            LifeLeft::Current { epoch, released } => Life::Current { epoch, released },
        };
        self.retired = left.retired.into();
        self.commands = left.commands;
        Ok(self)
    }
}
