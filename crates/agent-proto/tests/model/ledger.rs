//! What has really happened to one line of life, noted beside the machines, and what of it breaks a promise.

use stead_agent_proto::guest::STEPS;
use stead_agent_proto::message::Phase;
use stead_agent_proto::{Epoch, Nonce};

/// Which command: the first byte of its key.
pub type Command = u8;

/// A promise that was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Broken {
    /// A host took a guest for ready that has not done every step for this very epoch in this very life.
    Unacknowledged,
    /// A host took a guest for ready whose epoch was not released or whose workload stands.
    Unreleased,
    /// What hosts connect to was registered twice for one setup, or again after its epoch was acknowledged.
    RegisteredTwice,
    /// A command ran twice in one line of life.
    RanTwice,
    /// A command ran in a life whose hosts have not told it to go.
    RanUnasked,
    /// A command ran before the release of the life's epoch, or while the workload had to stand.
    RanEarly,
    /// The workload went on in a restored machine before its release.
    WorkloadRanEarly,
    /// A machine that went on after a capture was set up as if it had been restored.
    TakenForClone,
    /// A host was told that its command had not run, and it had, or it was told that it had, and it had not.
    Misreported,
}

/// The record of one line of life: a machine's own past, and that of the machine it was captured from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Ledger {
    pub broken: Option<Broken>,
    /// How often each command has run, over the whole line.
    runs: Vec<(Command, u8)>,
    // The rest is of this life only.
    gone_for: Vec<Command>,
    done: Option<(Nonce, Vec<Phase>)>,
    registered: Vec<Nonce>,
    acknowledged: Vec<Epoch>,
    released: Vec<Epoch>,
    release_said: bool,
    /// The epoch that is the machine's, once it is ready; nothing when its agent has forgotten it.
    established: Option<Epoch>,
    restored: bool,
    // Captured in the middle of anything: what was under way goes on in the copy until it is greeted.
    abrupt: bool,
}

impl Ledger {
    pub fn breaks(&mut self, broken: Broken) {
        self.broken.get_or_insert(broken);
    }

    fn must(&mut self, holds: bool, broken: Broken) {
        if !holds {
            self.breaks(broken);
        }
    }

    /// A copy of the machine is restored: a life of its own begins.
    pub fn begin_life(&mut self, is_abrupt: bool, stands: bool) {
        self.must(is_abrupt || stands, Broken::WorkloadRanEarly);
        *self = Self {
            broken: self.broken,
            runs: std::mem::take(&mut self.runs),
            restored: true,
            abrupt: is_abrupt,
            ..Self::default()
        };
    }

    pub fn agent_restarted(&mut self) {
        self.established = None;
    }

    pub fn runs(&self, command: Command) -> u8 {
        let mut found = self.runs.iter().filter(|(known, _)| *known == command);
        found.next().map_or(0, |(_, count)| *count)
    }

    pub fn on_step(&mut self, epoch: Option<Epoch>, nonce: Nonce, phase: Phase) {
        match &mut self.done {
            Some((known, phases)) if *known == nonce => phases.push(phase),
            Some(_) | None => self.done = Some((nonce, vec![phase])),
        }
        let other = |known: Epoch| Some(known) != epoch;
        let taken = epoch.is_some() && self.established.is_some_and(other);
        self.must(!taken, Broken::TakenForClone);
        if phase == Phase::Ports {
            let late = epoch.is_some_and(|epoch| self.acknowledged.contains(&epoch));
            let again = self.registered.contains(&nonce);
            self.must(!late && !again, Broken::RegisteredTwice);
            self.registered.push(nonce);
        }
    }

    /// A host has taken the answer to its setup.
    pub fn on_ready(&mut self, epoch: Epoch, nonce: Nonce) {
        let done = self.done.as_ref();
        let whole = done.is_some_and(|(own, phases)| *own == nonce && phases[..] == STEPS);
        self.must(whole, Broken::Unacknowledged);
        self.acknowledged.push(epoch);
    }

    /// A host has taken the answer to a reattach.
    pub fn on_reattached(&mut self, epoch: Epoch) {
        let known = self.acknowledged.contains(&epoch);
        self.must(known, Broken::Unacknowledged);
    }

    pub fn on_release_said(&mut self) {
        self.release_said = true;
    }

    /// The epoch is released and nothing stands.
    pub fn on_released(&mut self, epoch: Epoch) {
        if !self.released.contains(&epoch) {
            self.released.push(epoch);
        }
    }

    /// A host takes the machine for ready; its agent still knows the epoch, or has been restarted since it answered.
    pub fn on_established(&mut self, epoch: Epoch, is_known: bool) {
        let acknowledged = self.acknowledged.contains(&epoch);
        self.must(acknowledged, Broken::Unacknowledged);
        let released = self.released.contains(&epoch);
        self.must(released, Broken::Unreleased);
        self.established = is_known.then_some(epoch);
    }

    pub fn on_go_said(&mut self, command: Command) {
        if !self.gone_for.contains(&command) {
            self.gone_for.push(command);
        }
    }

    pub fn on_run(&mut self, command: Command, stands: bool) {
        match self.runs.iter_mut().find(|(known, _)| *known == command) {
            Some((_, count)) => *count += 1,
            None => self.runs.push((command, 1)),
        }
        let once = self.runs(command) == 1;
        self.must(once, Broken::RanTwice);
        let excused = self.abrupt && self.established.is_none();
        let asked = excused || self.gone_for.contains(&command);
        self.must(asked, Broken::RanUnasked);
        let due = excused || (self.release_said && !stands);
        self.must(due, Broken::RanEarly);
    }

    pub fn on_workload_thawed(&mut self) {
        let due = !self.restored || self.abrupt || self.release_said;
        self.must(due, Broken::WorkloadRanEarly);
    }

    /// A host reports its command: that it has run, or that it has not.
    pub fn on_report(&mut self, command: Command, has_run: bool) {
        let true_report = (self.runs(command) > 0) == has_run;
        self.must(true_report, Broken::Misreported);
    }
}
