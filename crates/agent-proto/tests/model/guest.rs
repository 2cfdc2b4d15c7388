//! The guest: the agent as it is, and around it what its threads and its kernel are in the middle of.

use stead_agent_proto::guest::{Action, Agent, Config, StepResult, WorkloadFailure};
use stead_agent_proto::message::{
    ExitStatus, Phase, PhaseDetail, PhaseOutcome, Rejection, Request,
};
use stead_agent_proto::{ExecKey, Nonce};

use crate::port::Port;

/// An agent, and what it has been told to do and has not reported yet.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Guest {
    pub agent: Agent,
    /// Steps of handshakes, in the order in which they were asked for.
    pub steps: Vec<(u32, Nonce, Phase)>,
    /// Commands that are prepared and not released.
    pub launches: Vec<ExecKey>,
    /// Commands that were released and not reported to run.
    pub released: Vec<ExecKey>,
    /// Commands that run.
    pub running: Vec<ExecKey>,
    /// What the workload's thread is to do.
    pub order: Option<Order>,
    /// Whether the kernel holds the workload: it outlives the agent.
    pub stands: bool,
}

/// What the workload is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    Freeze,
    Thaw,
}

fn config() -> Config {
    Config {
        agent_version: "1".into(),
        boot_id: "b".into(),
        max_commands: 8,
        may_shut_down: false,
    }
}

impl Guest {
    pub fn new() -> Self {
        Self {
            agent: Agent::new(config()),
            steps: Vec::new(),
            launches: Vec::new(),
            released: Vec::new(),
            running: Vec::new(),
            order: None,
            stands: false,
        }
    }

    /// The agent ends and another begins: what its threads were in the middle of is gone.
    pub fn restart(&mut self) {
        let stands = self.stands;
        *self = Self::new();
        self.stands = stands;
        if stands {
            self.agent = Agent::new(config()).with_frozen_workload();
        }
    }

    pub fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Step {
                    port, nonce, phase, ..
                } => self.steps.push((port, nonce, phase)),
                Action::Start { key, .. } => self.launches.push(key),
                Action::FreezeWorkload { .. } => self.order = Some(Order::Freeze),
                Action::ThawWorkload => self.order = Some(Order::Thaw),
                Action::Pong { key } => {
                    let answers = self.agent.pong(key, 0);
                    self.take(answers);
                }
                Action::Flush { .. } | Action::Wake { .. } => {}
                Action::Stdin { .. }
                | Action::StdinEnd { .. }
                | Action::Signal { .. }
                | Action::Resize { .. }
                | Action::Freeze { .. }
                | Action::Thaw
                | Action::Chore { .. }
                | Action::Shutdown { .. }
                | Action::FileBegin { .. }
                | Action::FileData { .. }
                | Action::FileEnd { .. }
                | Action::FileRoom { .. }
                | Action::FileGone { .. } => unreachable!("no host here asks for {action:?}"),
            }
        }
    }

    /// Writes what is to be said while the port has room, as its writer does.
    pub fn write(&mut self, number: u32, port: &mut Port, room: usize) {
        while port.to_host.len() < room {
            let Some((frame, actions)) = self.agent.next_frame(number) else {
                return;
            };
            self.take(actions);
            port.to_host
                .push_back(frame.encode().expect("the agent's frames fit"));
        }
    }

    /// Reports the oldest step; gives which it was.
    pub fn step(&mut self, succeeds: bool) -> (Nonce, Phase) {
        let (port, nonce, phase) = self.steps.remove(0);
        let outcome = if succeeds {
            Ok(PhaseOutcome::Done)
        } else {
            Err("broken".to_owned())
        };
        let result = StepResult {
            outcome,
            detail: PhaseDetail::None,
            duration_ns: 0,
        };
        let actions = self.agent.step_done(port, nonce, phase, result);
        self.take(actions);
        (nonce, phase)
    }

    /// The oldest command is released if it may be; gives its key if it was.
    pub fn launch(
        &mut self,
        may_start: impl FnOnce(&mut Agent, ExecKey) -> bool,
    ) -> Option<ExecKey> {
        let key = self.launches[0];
        if may_start(&mut self.agent, key) {
            self.launches.remove(0);
            self.released.push(key);
            return Some(key);
        }
        self.refuse();
        None
    }

    /// The oldest command does not run.
    pub fn refuse(&mut self) {
        let key = self.launches.remove(0);
        let reason = Rejection::Invalid("no".into());
        let actions = self.agent.rejected(key, reason);
        self.agent.command_gone(key);
        self.take(actions);
    }

    pub fn started(&mut self) {
        let key = self.released.remove(0);
        let actions = self.agent.started(key, 7, 0);
        self.running.push(key);
        self.take(actions);
    }

    pub fn exited(&mut self) {
        let key = self.running.remove(0);
        let actions = self.agent.exited(key, ExitStatus::Code(0));
        self.agent.command_gone(key);
        self.take(actions);
    }

    /// The workload's thread does what it was told; gives what that was.
    pub fn follow(&mut self, succeeds: bool) -> Order {
        let order = self.order.take().expect("only an order is followed");
        let actions = match (order, succeeds) {
            (Order::Freeze, true) => {
                self.stands = true;
                self.agent.workload_frozen(Ok(()))
            }
            (Order::Freeze, false) => self.agent.workload_frozen(Err(WorkloadFailure {
                error: "no".into(),
                still_frozen: false,
            })),
            (Order::Thaw, true) => {
                self.stands = false;
                self.agent.workload_thawed(Ok(0))
            }
            (Order::Thaw, false) => self.agent.workload_thawed(Err("no".into())),
        };
        self.take(actions);
        order
    }
}

/// How long the model lets a workload take until it stands.
pub const FREEZE: Request = Request::FreezeWorkload { limit_ms: 1 };
