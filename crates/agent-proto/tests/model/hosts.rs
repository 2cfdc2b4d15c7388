//! What the two hosts of a machine are in the middle of. They follow the same rules as `stead`: the keeper holds the
//! sandbox's lock, uses port 0 and makes lives; the client runs one command over port 1. Their sessions are the real ones.

use stead_agent_proto::frame::Decoder;
use stead_agent_proto::host::Session;
use stead_agent_proto::message::{ExecRequest, Identity, Phase, Reason, Seed, Setup};
use stead_agent_proto::{Epoch, ExecKey, Nonce};

/// Who talks to the machine; their numbers are those of the ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Who {
    Keeper = 0,
    Client = 1,
}

impl Who {
    pub const ALL: [Self; 2] = [Self::Keeper, Self::Client];

    pub fn port(self) -> usize {
        self as usize
    }
}

/// The host's end of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Line {
    pub session: Session,
    pub nonce: Nonce,
    pub decoder: Decoder,
}

/// Why a host has given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The guest could not do a step.
    Step(Phase),
    /// The guest could not do what it was asked.
    Refused,
    /// The session broke.
    Broken,
    /// No answer came.
    Late,
    /// The host's process ended.
    Died,
}

/// What the keeper waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Doing {
    Nothing,
    Greeting(Reason),
    /// Another session of the record's epoch, to mend what an earlier host has left.
    Attaching,
    Asking(Ask),
    /// Another session in the same connection, because the agent has lost the one in which this was asked.
    AskingAgain(Ask),
    Ready,
    /// The machine stands still, and its state is taken.
    Paused,
    Failed(Cause),
}

/// A request of the keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ask {
    Release,
    /// Freeze the workload, for a capture.
    Freeze,
    /// Thaw it, after one.
    Thaw,
    /// Thaw what an earlier host has left frozen.
    Mend,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Keeper {
    pub line: Option<Line>,
    pub doing: Doing,
    /// The epoch of the greeting or session under way.
    pub epoch: Option<Epoch>,
    /// How often a hello may be said again.
    pub hellos_left: u8,
    pub captures_left: u8,
    /// How often another host may mend what this one has left.
    pub mends_left: u8,
}

impl Keeper {
    pub fn is_waiting(&self) -> bool {
        match self.doing {
            Doing::Greeting(_) | Doing::Attaching | Doing::Asking(_) | Doing::AskingAgain(_) => {
                true
            }
            Doing::Nothing | Doing::Ready | Doing::Paused | Doing::Failed(_) => false,
        }
    }

    pub fn fail(&mut self, cause: Cause) {
        self.doing = Doing::Failed(cause);
        self.line = None;
    }
}

/// What the client waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stage {
    Off,
    Attaching,
    Asked(u64),
    Going(u64),
    Running(u64),
    /// The guest lives another life than this: it waits for the record of it.
    Refused(Epoch),
    /// It was rejected for now, and is asked again when the keeper is done.
    Postponed,
    Over(Outcome),
}

/// What became of the command, as its host knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    Exited,
    /// The guest says that its key was used before: it runs, or it has ended.
    Known,
    /// The guest says that it does not know.
    Forgotten,
    NotRun,
    /// The session broke before the host knew.
    Unknown(Cause),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Client {
    pub line: Option<Line>,
    pub stage: Stage,
    pub key: ExecKey,
    /// The epoch in which the key was first asked for.
    pub first: Option<Epoch>,
    /// The epoch of the session.
    pub epoch: Option<Epoch>,
    pub pinged: bool,
    pub hellos_left: u8,
    /// How often it may be asked again when it is not known whether it has run.
    pub again_left: u8,
}

impl Client {
    pub fn is_waiting(&self) -> bool {
        match self.stage {
            Stage::Attaching | Stage::Asked(_) | Stage::Going(_) | Stage::Running(_) => true,
            Stage::Off | Stage::Refused(_) | Stage::Postponed | Stage::Over(_) => false,
        }
    }

    pub fn end(&mut self, outcome: Outcome) {
        self.stage = Stage::Over(outcome);
        self.line = None;
    }
}

pub fn setup() -> Setup {
    Setup {
        wall_clock_ns: 1,
        seed: Seed([7; 64]),
        identity: Identity::Keep,
    }
}

pub fn command() -> ExecRequest {
    ExecRequest {
        argv: vec!["c".into()],
        ..ExecRequest::default()
    }
}
