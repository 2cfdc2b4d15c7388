//! The commands of an agent, handed to another that takes its place in the same process.
//!
//! ```text
//!   asked ──▶ each command's thread gives its descriptors and waits ──▶ all there: written down under the lock ──exec──▶ revived
//!               └── not within HANDOVER_LIMIT, or the exec fails: the threads go on, and nothing has changed
//! ```
//! Nothing is lost between the two: what a thread had read was kept before it waits, and what came for it meanwhile is taken
//! along. The lock is held from the last look until the exec, so nothing can come after.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stead_agent_proto::ExecKey;
use stead_agent_proto::guest::Agent;
use stead_agent_proto::message::ExitStatus;

use crate::adopt;
use crate::error::{AgentError, chain};
use crate::handover::{Handover, Heir};
use crate::inbox::Letters;
use crate::reaper::{self, Owned};

/// How long commands that are being started may take before another agent is refused.
pub(crate) const HANDOVER_LIMIT: Duration = Duration::from_secs(5);
/// How often it is looked whether all have given what they have; a thread that gives says so at once.
pub(crate) const HANDOVER_PAUSE: Duration = Duration::from_millis(20);

/// What is known of a command that its thread still leads, besides its descriptors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Unfinished {
    /// Whether each output is open.
    pub(crate) outputs: [bool; 2],
    /// Whether it runs at a terminal.
    pub(crate) terminal: bool,
    /// What of each output is still to be read, once the command has ended.
    pub(crate) left_bytes: [Option<u64>; 2],
    /// Input that came and was not passed on.
    pub(crate) pending: Vec<u8>,
    /// No input follows.
    pub(crate) stdin_end: bool,
    /// The size that its terminal is to have.
    pub(crate) size: Option<(u16, u16)>,
    /// Signals that it is still to get.
    pub(crate) signals: Vec<i32>,
    /// The time that it still has, in milliseconds.
    pub(crate) left_ms: Option<u64>,
    /// Its time was over.
    pub(crate) timed_out: bool,
    /// How it has ended.
    pub(crate) status: Option<ExitStatus>,
}

impl Unfinished {
    fn add(&mut self, letters: Letters) {
        letters
            .stdin
            .iter()
            .for_each(|data| self.pending.extend_from_slice(data));
        self.stdin_end |= letters.stdin_end;
        self.size = letters.size.or(self.size);
        self.signals.extend(letters.signals);
    }
}

/// What is handed over of a command.
#[derive(Debug, Serialize, Deserialize)]
enum Kept {
    /// It is still led by a thread.
    Led(Box<Unfinished>),
    /// It has ended, and others hold its output open.
    Drained,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    agent: Vec<u8>,
    commands: BTreeMap<ExecKey, Kept>,
}

/// What the threads of commands have given.
pub(crate) type Given = BTreeMap<ExecKey, (Heir, Unfinished)>;

/// Puts everything together. `letters` looks at what is waiting for a command and leaves it there.
///
/// # Errors
/// While something is under way that only this agent can finish.
pub(crate) fn collect(
    agent: &Agent,
    given: &mut Given,
    drained: Vec<Heir>,
    letters: impl Fn(ExecKey) -> Letters,
) -> Result<Handover, AgentError> {
    let drained_keys = drained.iter().filter_map(|heir| heir.key.map(ExecKey));
    let handed: BTreeSet<ExecKey> = given.keys().copied().chain(drained_keys).collect();
    let agent = agent.bequeath(&handed).map_err(refusal)?;
    let mut handover = Handover::default();
    let mut commands = BTreeMap::new();
    for (key, (heir, mut left)) in std::mem::take(given) {
        left.add(letters(key));
        commands.insert(key, Kept::Led(Box::new(left)));
        handover.children.push(heir);
    }
    for heir in drained {
        commands.extend(heir.key.map(|key| (ExecKey(key), Kept::Drained)));
        handover.children.push(heir);
    }
    handover.state = postcard::to_stdvec(&Record { agent, commands })
        .map_err(|error| refusal(error.to_string()))?;
    Ok(handover)
}

fn refusal(why: String) -> AgentError {
    AgentError::Usage(format!(
        "no other agent can take the place of this one now: {why}"
    ))
}

/// A command that goes on under this agent.
#[derive(Debug)]
pub(crate) struct Led {
    pub(crate) key: ExecKey,
    pub(crate) heir: Heir,
    pub(crate) left: Unfinished,
    /// Held until it has been reaped.
    pub(crate) owned: Owned,
}

/// What the agent before this one in the process has left.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    agent: Vec<u8>,
    led: Vec<Led>,
    drained: Vec<Heir>,
}

impl Inherited {
    /// Looks through what was handed over; children that are no commands are looked after at once.
    ///
    /// # Errors
    /// When no thread can be started for them.
    pub(crate) fn take(handover: Handover) -> Result<Self, AgentError> {
        let mut record: Record = match postcard::from_bytes(&handover.state) {
            Ok(record) => record,
            Err(error) => {
                eprintln!("stead-agent: what the agent before has left is not understood: {error}");
                adopt::adopt(handover.children)?;
                return Ok(Self::default());
            }
        };
        let mut taken = Self {
            agent: record.agent,
            ..Self::default()
        };
        let mut strangers = Vec::new();
        for heir in handover.children {
            let key = heir.key.map(ExecKey);
            match key.and_then(|key| Some((key, record.commands.remove(&key)?))) {
                Some((key, Kept::Led(left))) => taken.led.push(Led {
                    key,
                    owned: reaper::adopt(heir.pid),
                    heir,
                    left: *left,
                }),
                Some((_, Kept::Drained)) => taken.drained.push(heir),
                None => strangers.push(heir),
            }
        }
        adopt::adopt(strangers)?;
        Ok(taken)
    }

    /// The agent with what it inherits, the commands that it leads, and those whose output it empties. When what was left is
    /// another version's it begins without, and the commands go on unheard.
    ///
    /// # Errors
    /// When no thread can be started for them.
    pub(crate) fn enter(self, agent: Agent) -> Result<(Agent, Vec<Led>, Vec<Heir>), AgentError> {
        if self.agent.is_empty() {
            return Ok((agent, self.led, self.drained));
        }
        match agent.clone().with_heritage(&self.agent) {
            Ok(agent) => Ok((agent, self.led, self.drained)),
            Err(error) => {
                eprintln!("stead-agent: what the agent before knew is lost: {error}");
                let heirs = self.led.into_iter().map(|led| led.heir);
                adopt::adopt(heirs.chain(self.drained).collect())?;
                Ok((agent, Vec::new(), Vec::new()))
            }
        }
    }
}

/// Says that a command could not be given to the next agent.
pub(crate) fn complain(key: ExecKey, error: &AgentError) {
    eprintln!("stead-agent: hand command {key} over: {}", chain(error));
}
