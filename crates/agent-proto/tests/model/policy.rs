//! How the hosts follow what comes: the rules of `stead`, without its clock.

use stead_agent_proto::host::Event;
use stead_agent_proto::message::{
    CommandState, Done, Failed, Ready, Reason, Rejection, Request, WorkloadState,
};
use stead_agent_proto::{Epoch, ProtocolError};

use crate::guest::FREEZE;
use crate::hosts::{Ask, Cause, Doing, Outcome, Stage, Who, command, setup};
use crate::ledger::Broken;
use crate::mutant::Mutant;
use crate::port::{Way, items};
use crate::world::{Bounds, World};

impl World {
    /// A host reads a piece.
    pub fn hear(&mut self, who: Who, bounds: &Bounds) {
        let piece = self.ports[who.port()].take(Way::ToHost);
        let Some(line) = self.line(who) else {
            unreachable!("only a host that is connected reads");
        };
        let found = items(&mut line.decoder, &piece);
        for item in found {
            let Some(line) = self.line(who) else {
                break;
            };
            let item = bounds.mutant.to_host(item, line);
            let heard = line.session.on_item(item);
            match (who, heard) {
                (_, Ok(None)) => {}
                (Who::Keeper, Ok(Some(event))) => self.keeper_hears(event, bounds),
                (Who::Keeper, Err(error)) => self.keeper_breaks(&error),
                (Who::Client, Ok(Some(event))) => self.client_hears(event),
                (Who::Client, Err(error)) => self.client_breaks(&error),
            }
        }
        self.write(bounds);
    }

    // The keeper.

    /// Begins a life with a new epoch.
    pub fn greet(&mut self, reason: Reason) {
        self.connect(Who::Keeper);
        let epoch = self.draw_epoch();
        self.keeper.doing = Doing::Greeting(reason);
        self.hello(Who::Keeper, epoch, reason);
    }

    /// Another host takes over: it attaches to the epoch of the record, or begins a life where there is none.
    pub fn mend(&mut self) {
        self.keeper.mends_left -= 1;
        match self.record {
            None => self.greet(Reason::Boot),
            Some(epoch) => {
                self.connect(Who::Keeper);
                self.keeper.doing = Doing::Attaching;
                self.hello(Who::Keeper, epoch, Reason::Reattach);
            }
        }
    }

    fn keeper_hears(&mut self, event: Event, bounds: &Bounds) {
        match (self.keeper.doing, event) {
            (Doing::Greeting(_), Event::Hail(_)) => {
                let line = self.keeper.line.as_mut().expect("it hears");
                let wire = line.session.setup(setup());
                self.put(Who::Keeper, wire);
            }
            (Doing::Greeting(_), Event::Ready(ready)) => self.acknowledged(&ready, bounds),
            (Doing::Attaching, Event::Ready(ready)) => self.reattached(&ready),
            (Doing::AskingAgain(ask), Event::Ready(ready)) => {
                self.ledger.on_reattached(ready.epoch);
                self.ask(ask);
            }
            (Doing::Attaching, Event::Failed(_)) => self.greet(Reason::Boot),
            (Doing::Greeting(_) | Doing::AskingAgain(_), Event::Failed(Failed { phase, .. })) => {
                self.keeper.fail(Cause::Step(phase));
            }
            (Doing::Asking(ask), Event::Done { outcome, .. }) => self.answered(ask, &outcome),
            (doing, event) => unreachable!("{event:?} while {doing:?}"),
        }
    }

    fn acknowledged(&mut self, ready: &Ready, bounds: &Bounds) {
        let nonce = self.keeper.line.as_ref().expect("it hears").nonce;
        self.ledger.on_ready(ready.epoch, nonce);
        self.ask(Ask::Release);
        if bounds.mutant == Mutant::ReleaseNotAwaited {
            self.established();
        }
    }

    fn reattached(&mut self, ready: &Ready) {
        self.ledger.on_reattached(ready.epoch);
        match (ready.released, ready.workload) {
            (true, WorkloadState::Running) => self.established(),
            (true, WorkloadState::Frozen) => self.ask(Ask::Mend),
            (false, _) => self.ask(Ask::Release),
        }
    }

    pub fn ask(&mut self, ask: Ask) {
        let request = match ask {
            Ask::Release => Request::Release,
            Ask::Freeze => FREEZE,
            Ask::Thaw | Ask::Mend => Request::ThawWorkload,
        };
        if ask == Ask::Release {
            self.ledger.on_release_said();
        }
        self.keeper.doing = Doing::Asking(ask);
        let line = self
            .keeper
            .line
            .as_mut()
            .expect("a keeper that asks has a line");
        let wire = line.session.request(request).map(|(_, wire)| wire);
        self.put(Who::Keeper, wire);
    }

    fn answered(&mut self, ask: Ask, outcome: &Done) {
        match (ask, outcome) {
            (Ask::Release, Done::Released { .. }) | (Ask::Mend | Ask::Thaw, Done::Ok) => {
                self.established();
            }
            (Ask::Freeze, Done::Ok) => self.keeper.doing = Doing::Paused,
            // The capture is given up here. Whether anything stands is not known, and a thaw of what runs does nothing.
            (Ask::Freeze, Done::Failed(_)) => self.ask(Ask::Thaw),
            (_, Done::Failed(_)) => self.keeper.fail(Cause::Refused),
            (ask, outcome) => unreachable!("{outcome:?} to {ask:?}"),
        }
    }

    /// The sandbox is ready.
    fn established(&mut self) {
        let epoch = self.keeper.epoch.expect("it has a session");
        let is_known = self.guest.agent.epoch() == Some(epoch);
        self.ledger.on_established(epoch, is_known);
        self.record = Some(epoch);
        self.keeper.doing = Doing::Ready;
    }

    fn keeper_breaks(&mut self, error: &ProtocolError) {
        match (self.keeper.doing, error) {
            (Doing::Asking(ask), ProtocolError::SessionLost(_)) => {
                let epoch = self.keeper.epoch.expect("it has a session");
                self.keeper.doing = Doing::AskingAgain(ask);
                self.hello(Who::Keeper, epoch, Reason::Reattach);
            }
            _ => self.keeper.fail(Cause::Broken),
        }
    }

    pub fn keeper_is_late(&mut self) {
        let epoch = self.keeper.epoch.expect("it waits in a session");
        let reason = match self.keeper.doing {
            Doing::Greeting(reason) => reason,
            Doing::Attaching | Doing::AskingAgain(_) => Reason::Reattach,
            _ => return self.keeper.fail(Cause::Late),
        };
        if self.keeper.hellos_left == 0 {
            return self.keeper.fail(Cause::Late);
        }
        self.keeper.hellos_left -= 1;
        self.connect(Who::Keeper);
        self.hello(Who::Keeper, epoch, reason);
    }

    // The client.

    /// Whether a client would begin, or begin again, now.
    pub fn client_may_begin(&self) -> bool {
        let may = match self.client.stage {
            Stage::Off => true,
            Stage::Postponed => self.keeper.doing == Doing::Ready,
            Stage::Refused(epoch) => self.record != Some(epoch),
            Stage::Over(Outcome::Unknown(_)) => self.client.again_left > 0,
            Stage::Over(
                Outcome::Exited | Outcome::Known | Outcome::Forgotten | Outcome::NotRun,
            )
            | Stage::Attaching
            | Stage::Asked(_)
            | Stage::Going(_)
            | Stage::Running(_) => false,
        };
        may && self.record.is_some()
    }

    pub fn client_begins(&mut self) {
        if matches!(self.client.stage, Stage::Over(_)) {
            self.client.again_left -= 1;
        }
        let epoch = self.record.expect("it may begin");
        self.client.stage = Stage::Attaching;
        self.client.pinged = false;
        self.connect(Who::Client);
        self.hello(Who::Client, epoch, Reason::Reattach);
    }

    fn client_hears(&mut self, event: Event) {
        match (self.client.stage, event) {
            (Stage::Attaching, Event::Ready(ready)) => {
                self.ledger.on_reattached(ready.epoch);
                self.exec(ready.epoch);
            }
            (Stage::Attaching, Event::Failed(_)) => {
                let refused = self.client.epoch.expect("it has a session");
                self.client.stage = Stage::Refused(refused);
                self.client.line = None;
            }
            (Stage::Asked(id), Event::Accepted { .. }) => {
                let line = self.client.line.as_mut().expect("it hears");
                let wire = line.session.go(id);
                self.ledger.on_go_said(self.client.key.0[0]);
                self.put(Who::Client, wire);
                self.client.stage = Stage::Going(id);
            }
            (Stage::Going(id), Event::Started { .. }) => self.client.stage = Stage::Running(id),
            (Stage::Running(_), Event::Exit { .. }) => self.over(Outcome::Exited),
            (Stage::Asked(_) | Stage::Going(_), Event::Rejected { reason, .. }) => {
                self.rejected(&reason);
            }
            (Stage::Asked(_) | Stage::Going(_), Event::Known { state, .. }) => match state {
                CommandState::Running | CommandState::Ended(_) => self.over(Outcome::Known),
                CommandState::NotRun => unreachable!("what has not run is not known"),
                CommandState::Forgotten => self.over(Outcome::Forgotten),
            },
            (_, Event::Pong { .. }) => {}
            (stage, event) => unreachable!("{event:?} while {stage:?}"),
        }
    }

    fn exec(&mut self, epoch: Epoch) {
        let (key, again) = (self.client.key, self.client.first);
        self.client.first = Some(again.unwrap_or(epoch));
        let line = self.client.line.as_mut().expect("it hears");
        let asked = line.session.exec(key, again, command());
        let (id, wire) = asked.expect("a host here keeps to the protocol");
        self.client.stage = Stage::Asked(id);
        self.ports[Who::Client.port()].put(wire);
    }

    fn rejected(&mut self, reason: &Rejection) {
        match reason {
            Rejection::WorkloadFrozen | Rejection::NotReleased => {
                self.report(false);
                self.client.stage = Stage::Postponed;
                self.client.line = None;
            }
            Rejection::Frozen
            | Rejection::TooManyCommands { .. }
            | Rejection::TooManyStreams { .. }
            | Rejection::Start { .. }
            | Rejection::Unknown(_)
            | Rejection::Invalid(_) => self.over(Outcome::NotRun),
        }
    }

    fn over(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Exited | Outcome::Known => self.report(true),
            Outcome::NotRun => self.report(false),
            Outcome::Forgotten | Outcome::Unknown(_) => {}
        }
        self.client.end(outcome);
    }

    fn report(&mut self, has_run: bool) {
        self.ledger.on_report(self.client.key.0[0], has_run);
    }

    fn client_breaks(&mut self, error: &ProtocolError) {
        let lost = matches!(error, ProtocolError::SessionLost(_));
        match self.client.stage {
            Stage::Asked(_) | Stage::Going(_) if lost => {
                let epoch = self.client.epoch.expect("it has a session");
                self.client.stage = Stage::Attaching;
                self.hello(Who::Client, epoch, Reason::Reattach);
            }
            _ => self.client.end(Outcome::Unknown(Cause::Broken)),
        }
    }

    pub fn client_is_late(&mut self) {
        let epoch = self.client.epoch.expect("it waits in a session");
        match self.client.stage {
            Stage::Attaching if self.client.hellos_left > 0 => {
                self.client.hellos_left -= 1;
                self.connect(Who::Client);
                self.hello(Who::Client, epoch, Reason::Reattach);
            }
            Stage::Asked(_) | Stage::Going(_) | Stage::Running(_) if !self.client.pinged => {
                self.client.pinged = true;
                let line = self.client.line.as_mut().expect("it waits");
                let wire = line.session.request(Request::Ping).map(|(_, wire)| wire);
                self.put(Who::Client, wire);
            }
            _ => self.client.end(Outcome::Unknown(Cause::Late)),
        }
    }

    /// What a process that ends leaves: its connection ends, and nobody knows what it knew.
    pub fn die(&mut self, who: Who) {
        match who {
            Who::Keeper => self.keeper.fail(Cause::Died),
            Who::Client => self.client.end(Outcome::Unknown(Cause::Died)),
        }
        self.ports[who.port()].connect();
    }

    /// A command that was reported as not run must not run any more, unless it is asked for again.
    pub fn check_reports(&mut self) {
        let over = self.client.stage == Stage::Over(Outcome::NotRun);
        if over && self.ledger.runs(self.client.key.0[0]) > 0 {
            self.ledger.breaks(Broken::Misreported);
        }
    }
}
