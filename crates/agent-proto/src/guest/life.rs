//! Lives of the machine, and how a port comes to a session in one.

use super::outgoing::{frame, refusal};
use super::session::Session;
use super::{Action, Agent, Freeze, PortState, RETIRED_EPOCHS, STEPS, StepResult, bounded_text};
use crate::frame::Fault;
use crate::message::{
    Failed, GuestMessage, Hail, Hello, HostMessage, Message, Phase, PhaseDetail, PhaseOutcome,
    PhaseReport, Ready, Reason, Setup,
};
use crate::{Epoch, Frame, Nonce, ProtocolError};

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Life {
    // `tried` is the epoch of a handshake that was not completed; it may be tried again until another
    // epoch takes its place.
    Unknown {
        tried: Option<Epoch>,
    },
    Changing {
        epoch: Epoch,
        port: u32,
        nonce: Nonce,
    },
    Current {
        epoch: Epoch,
        released: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub(super) enum Port {
    #[default]
    Unattached,
    Hailed {
        epoch: Epoch,
        nonce: Nonce,
    },
    Handshaking(Box<Handshake>),
    Attached(Box<Session>),
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Handshake {
    epoch: Epoch,
    nonce: Nonce,
    setup: Setup,
    due: Phase,
    reports: Vec<PhaseReport>,
}

impl Agent {
    /// Takes what a step of the handshake came to; ignored when the handshake is no longer under way.
    pub fn step_done(
        &mut self,
        port: u32,
        nonce: Nonce,
        phase: Phase,
        result: StepResult,
    ) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some(Port::Handshaking(handshake)) =
            self.ports.get_mut(&port).map(|state| &mut state.port)
        else {
            return actions;
        };
        if handshake.nonce != nonce || handshake.due != phase {
            return actions;
        }
        match result.outcome {
            Ok(outcome) => {
                handshake.reports.push(PhaseReport {
                    phase,
                    outcome,
                    detail: result.detail,
                    duration_ns: result.duration_ns,
                });
                self.next_step(port, &mut actions);
            }
            Err(error) => {
                let (epoch, nonce) = (handshake.epoch, handshake.nonce);
                self.life = Life::Unknown { tried: Some(epoch) };
                self.set_port(port, Port::Unattached);
                self.refuse(port, epoch, nonce, 1, phase, &error, &mut actions);
            }
        }
        actions
    }

    pub(super) fn set_port(&mut self, port: u32, to: Port) -> Port {
        let state: &mut PortState = self.ports.entry(port).or_default();
        std::mem::replace(&mut state.port, to)
    }

    /// Puts a frame before all that the port's session has to say.
    pub(super) fn notice(&mut self, port: u32, frame: Frame, actions: &mut Vec<Action>) {
        self.ports.entry(port).or_default().notices.push_back(frame);
        actions.push(Action::Flush { port });
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the header of a frame and what it says"
    )]
    fn refuse(
        &mut self,
        port: u32,
        epoch: Epoch,
        nonce: Nonce,
        seq: u64,
        phase: Phase,
        error: &str,
        actions: &mut Vec<Action>,
    ) {
        let error = bounded_text(error.to_owned());
        let failed = Failed { phase, error };
        self.notice(port, refusal(epoch, nonce, seq, failed), actions);
    }

    pub(super) fn on_garbage(
        &mut self,
        port: u32,
        bytes: usize,
        fault: Fault,
        actions: &mut Vec<Action>,
    ) {
        self.garbage_bytes = self.garbage_bytes.saturating_add(bytes as u64);
        match (self.ports.get(&port).map(|state| &state.port), fault) {
            (Some(Port::Attached(_)), _) => {
                let reason = fault;
                self.break_session(port, &ProtocolError::Garbage { bytes, reason }, actions);
            }
            (Some(Port::Unattached) | None, Fault::Version(_)) => {
                // Whoever speaks another version can at least read ours in the answer's header.
                let (epoch, nonce) = (Epoch([0; 16]), Nonce(0));
                let text = fault.to_string();
                self.refuse(port, epoch, nonce, 0, Phase::Epoch, &text, actions);
            }
            (Some(Port::Unattached | Port::Hailed { .. } | Port::Handshaking(_)) | None, _) => {}
        }
    }

    pub(super) fn on_handshake(&mut self, port: u32, frame: &Frame, actions: &mut Vec<Action>) {
        let (epoch, nonce) = (frame.epoch, frame.nonce);
        let is_own = self.is_own(port, epoch, nonce);
        let hailed = Port::Hailed { epoch, nonce };
        let is_hailed = self.ports.get(&port).map(|state| &state.port) == Some(&hailed);
        match HostMessage::from_frame(frame) {
            Ok(HostMessage::Hello(hello)) if frame.seq == 0 && !is_own => {
                self.on_hello(port, epoch, nonce, hello, actions);
            }
            Ok(HostMessage::Setup(setup)) if frame.seq == 1 && is_hailed => {
                self.begin_life(port, epoch, nonce, setup, actions);
            }
            // A repetition, or the setup of another session; nothing else is of the kind of this frame.
            Ok(_) => self.stale_frames += 1,
            Err(error) if !is_own || is_hailed => {
                let (seq, text) = (u64::from(is_hailed), error.to_string());
                self.refuse(port, epoch, nonce, seq, Phase::Epoch, &text, actions);
            }
            Err(_) => self.stale_frames += 1,
        }
    }

    fn on_hello(
        &mut self,
        port: u32,
        epoch: Epoch,
        nonce: Nonce,
        hello: Hello,
        actions: &mut Vec<Action>,
    ) {
        self.dismiss(port, "another hello came on the port", actions);
        match hello.reason {
            Reason::Reattach => self.reattach(port, epoch, nonce, actions),
            Reason::Boot | Reason::Restore | Reason::Fork | Reason::Wake => {
                if let Some(error) = self.find_passed(epoch) {
                    self.refuse(port, epoch, nonce, 0, Phase::Epoch, &error, actions);
                    return;
                }
                let agent_version = self.config.agent_version.clone();
                let hail = GuestMessage::Hail(Hail { agent_version });
                self.notice(port, frame(epoch, nonce, 0, &hail), actions);
                self.set_port(port, Port::Hailed { epoch, nonce });
            }
        }
    }

    fn find_passed(&self, epoch: Epoch) -> Option<String> {
        self.retired
            .contains(&epoch)
            .then(|| format!("epoch {epoch} has passed: another has replaced it"))
    }

    fn is_own(&self, port: u32, epoch: Epoch, nonce: Nonce) -> bool {
        match self.ports.get(&port).map(|state| &state.port) {
            Some(Port::Attached(session)) => (session.epoch, session.nonce) == (epoch, nonce),
            Some(Port::Handshaking(handshake)) => {
                (handshake.epoch, handshake.nonce) == (epoch, nonce)
            }
            Some(Port::Hailed {
                epoch: own,
                nonce: own_nonce,
            }) => (*own, *own_nonce) == (epoch, nonce),
            Some(Port::Unattached) | None => false,
        }
    }

    fn reattach(&mut self, port: u32, epoch: Epoch, nonce: Nonce, actions: &mut Vec<Action>) {
        let refused = match self.life {
            Life::Current { epoch: current, .. } if current == epoch => None,
            Life::Current { epoch: current, .. } => {
                Some(format!("the current epoch is {current}, not {epoch}"))
            }
            Life::Changing { .. } => Some("another handshake is under way".to_owned()),
            Life::Unknown { .. } => Some("no handshake has been completed yet".to_owned()),
        };
        if let Some(error) = refused {
            self.refuse(port, epoch, nonce, 0, Phase::Epoch, &error, actions);
            return;
        }
        let session = Session::new(epoch, nonce, 0);
        self.attach(port, session, vec![done(Phase::Epoch)], actions);
    }

    fn begin_life(
        &mut self,
        port: u32,
        epoch: Epoch,
        nonce: Nonce,
        setup: Setup,
        actions: &mut Vec<Action>,
    ) {
        // Another port may have begun another life since the hail.
        if let Some(error) = self.find_passed(epoch) {
            self.set_port(port, Port::Unattached);
            self.refuse(port, epoch, nonce, 1, Phase::Epoch, &error, actions);
            return;
        }
        let ports: Vec<u32> = self.ports.keys().copied().collect();
        for other in ports {
            self.dismiss(other, "another epoch began", actions);
        }
        if self.freeze == (Freeze::Frozen { owner: None }) {
            actions.extend(self.begin_thaw(None, Some("another epoch began")));
        }
        self.retire(epoch);
        self.life = Life::Changing { epoch, port, nonce };
        let handshake = Handshake {
            epoch,
            nonce,
            setup,
            due: Phase::Sessions,
            reports: vec![done(Phase::Epoch), done(Phase::Sessions)],
        };
        self.set_port(port, Port::Handshaking(Box::new(handshake)));
        self.next_step(port, actions);
    }

    /// Remembers the epoch that `next` replaces.
    fn retire(&mut self, next: Epoch) {
        let old = match self.life {
            Life::Current { epoch: old, .. } | Life::Changing { epoch: old, .. } => old,
            Life::Unknown { tried: Some(old) } => old,
            Life::Unknown { tried: None } => return,
        };
        if old == next {
            return;
        }
        if self.retired.len() == RETIRED_EPOCHS {
            self.retired.pop_front();
        }
        self.retired.push_back(old);
    }

    /// Whether this agent has lived the epoch, or lives it.
    pub(super) fn has_known(&self, epoch: Epoch) -> bool {
        self.epoch() == Some(epoch) || self.retired.contains(&epoch)
    }

    fn next_step(&mut self, port: u32, actions: &mut Vec<Action>) {
        let Some(Port::Handshaking(handshake)) =
            self.ports.get_mut(&port).map(|state| &mut state.port)
        else {
            return;
        };
        let next = match STEPS.iter().position(|&phase| phase == handshake.due) {
            Some(done) => STEPS.get(done + 1),
            None => STEPS.first(),
        };
        if let Some(&phase) = next {
            handshake.due = phase;
            actions.push(Action::Step {
                port,
                nonce: handshake.nonce,
                phase,
                setup: Box::new(handshake.setup.clone()),
            });
            return;
        }
        let (epoch, nonce) = (handshake.epoch, handshake.nonce);
        let reports = std::mem::take(&mut handshake.reports);
        let released = false;
        self.life = Life::Current { epoch, released };
        self.attach(port, Session::new(epoch, nonce, 1), reports, actions);
    }

    fn attach(
        &mut self,
        port: u32,
        mut session: Session,
        phases: Vec<PhaseReport>,
        actions: &mut Vec<Action>,
    ) {
        let epoch = session.epoch;
        assert!(
            self.epoch() == Some(epoch),
            "a port is attached only to the current epoch"
        );
        session.put(&GuestMessage::Ready(Ready {
            epoch,
            agent_version: self.config.agent_version.clone(),
            boot_id: self.config.boot_id.clone(),
            phases,
            workload: self.workload(),
            released: self.is_released(),
        }));
        self.set_port(port, Port::Attached(Box::new(session)));
        actions.push(Action::Flush { port });
    }

    pub(super) fn forget_handshake(&mut self, port: u32, handshake: &Handshake) {
        let (epoch, nonce) = (handshake.epoch, handshake.nonce);
        if self.life == (Life::Changing { epoch, port, nonce }) {
            self.life = Life::Unknown { tried: Some(epoch) };
        }
    }
}

fn done(phase: Phase) -> PhaseReport {
    PhaseReport {
        phase,
        outcome: PhaseOutcome::Done,
        detail: PhaseDetail::None,
        duration_ns: 0,
    }
}
