//! All that can happen next, and what must hold whatever happens.

use stateright::{Model, Property};

use crate::hosts::{Ask, Doing, Stage, Who};
use crate::mutant::Mutant;
use crate::port::{Half, Way};
use crate::properties;
use crate::world::{Bounds, Copy, Kind, World};
use stead_agent_proto::message::Reason;

/// What happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Act {
    // The guest.
    Read(Who),
    SeeGone(Who),
    Step,
    Launch,
    Started,
    Exit,
    Workload,
    Rebind,
    // The hosts.
    Hear(Who),
    Greet,
    Mend,
    Capture,
    GoOn,
    Copy(Copy),
    Begin,
    /// Nothing moves, and somebody waits.
    Late(Who),
    // Faults.
    CopyAbruptly(Copy),
    Lose(Who, Way),
    Cut(Who, Way, Half),
    Repeat(Who, Way),
    Die(Who),
    Restart,
    FailStep,
    FailWorkload,
    FailLaunch,
    /// Somebody does not wait any longer though the answer is on its way.
    Early(Who),
    /// The guest sees the end of an earlier connection only after the beginning of the next.
    SeeGoneLate(Who),
}

impl Bounds {
    /// What moves by itself; nothing of it is a fault.
    pub fn moves(&self, world: &World) -> Vec<Act> {
        let mut acts = Vec::new();
        for who in Who::ALL {
            let port = &world.ports[who.port()];
            if port.has(Way::ToGuest) && !port.asleep {
                acts.push(Act::Read(who));
            }
            if port.has(Way::ToHost) && world.has_line(who) {
                acts.push(Act::Hear(who));
            }
            if port.gone && !port.heard {
                acts.push(Act::SeeGone(who));
            }
        }
        let guest = &world.guest;
        let due = [
            (!guest.steps.is_empty(), Act::Step),
            (!guest.launches.is_empty(), Act::Launch),
            (!guest.released.is_empty(), Act::Started),
            (!guest.running.is_empty() && !guest.stands, Act::Exit),
            (guest.order.is_some(), Act::Workload),
            (world.rebind, Act::Rebind),
        ];
        acts.extend(due.into_iter().filter(|(due, _)| *due).map(|(_, act)| act));
        self.host_moves(world, &mut acts);
        acts
    }

    fn host_moves(&self, world: &World, acts: &mut Vec<Act>) {
        let keeper = &world.keeper;
        match keeper.doing {
            Doing::Nothing => acts.push(Act::Greet),
            Doing::Ready if keeper.captures_left > 0 => acts.push(Act::Capture),
            Doing::Paused => {
                acts.extend([Act::GoOn, Act::Copy(Copy::Fork), Act::Copy(Copy::Wake)]);
            }
            // A copy that was never ready is thrown away.
            Doing::Failed(_) if keeper.mends_left > 0 && !is_given_up(world) => {
                acts.push(Act::Mend);
            }
            Doing::Ready
            | Doing::Greeting(_)
            | Doing::Attaching
            | Doing::Asking(_)
            | Doing::AskingAgain(_)
            | Doing::Failed(_) => {}
        }
        if world.is_suspected() && keeper.mends_left > 0 {
            acts.push(Act::Mend);
        }
        if self.client && world.client_may_begin() {
            acts.push(Act::Begin);
        }
    }

    fn faults(&self, world: &World, acts: &mut Vec<Act>) {
        if world.abrupt_left > 0 && !is_given_up(world) {
            acts.extend([Act::CopyAbruptly(Copy::Fork), Act::CopyAbruptly(Copy::Wake)]);
        }
        if world.faults_left == 0 {
            return;
        }
        for &kind in self.kinds {
            match kind {
                Kind::Restart => acts.push(Act::Restart),
                Kind::Step if !world.guest.steps.is_empty() => acts.push(Act::FailStep),
                Kind::Workload if world.guest.order.is_some() => acts.push(Act::FailWorkload),
                Kind::Launch if !world.guest.launches.is_empty() => acts.push(Act::FailLaunch),
                Kind::Step | Kind::Workload | Kind::Launch => {}
                Kind::Lose | Kind::Cut | Kind::Repeat => in_ports(kind, world, acts),
                Kind::Die | Kind::Early | Kind::LateGone => at_hosts(kind, world, acts),
            }
        }
    }

    fn apply(&self, world: &mut World, act: Act) {
        match act {
            Act::Read(who) => world.deliver(who, self),
            Act::SeeGone(who) | Act::SeeGoneLate(who) => world.lose_host(who, self),
            Act::Step => world.step(true, self),
            Act::FailStep => world.step(false, self),
            Act::Launch => world.launch(self),
            Act::Started => world.guest.started(),
            Act::Exit => world.guest.exited(),
            Act::Workload => world.follow(true, self),
            Act::FailWorkload => world.follow(false, self),
            Act::FailLaunch => world.fail_launch(self),
            Act::Rebind => world.rebind(self),
            Act::Restart => world.restart_agent(),
            Act::Lose(who, way) => world.ports[who.port()].lose(way),
            Act::Cut(who, way, half) => world.ports[who.port()].cut(way, half),
            Act::Repeat(who, way) => world.ports[who.port()].repeat(way),
            Act::Hear(_)
            | Act::Greet
            | Act::Mend
            | Act::Capture
            | Act::GoOn
            | Act::Copy(_)
            | Act::CopyAbruptly(_)
            | Act::Begin
            | Act::Late(_)
            | Act::Die(_)
            | Act::Early(_) => self.apply_to_hosts(world, act),
        }
        world.write(self);
        world.check_reports();
    }

    fn apply_to_hosts(&self, world: &mut World, act: Act) {
        match act {
            Act::Hear(who) => world.hear(who, self),
            Act::Greet if world.is_copy() => world.greet(Reason::Restore),
            Act::Greet => world.greet(Reason::Boot),
            Act::Mend => world.mend(),
            Act::Capture => {
                world.keeper.captures_left -= 1;
                world.ask(Ask::Freeze);
            }
            Act::GoOn if self.mutant == Mutant::SourceGreeted => world.greet(Reason::Restore),
            Act::GoOn => world.ask(Ask::Thaw),
            Act::Copy(how) => world.copy(how, false, self),
            Act::CopyAbruptly(how) => world.copy(how, true, self),
            Act::Begin => world.client_begins(),
            Act::Late(who) | Act::Early(who) => {
                world.timeouts[who.port()] += u8::from(act == Act::Late(who));
                match who {
                    Who::Keeper => world.keeper_is_late(),
                    Who::Client => world.client_is_late(),
                }
            }
            Act::Die(who) => world.die(who),
            _ => unreachable!("{act:?} is the guest's"),
        }
    }

    /// How many faults there were, abrupt captures among them.
    pub fn faults_so_far(&self, world: &World) -> u8 {
        self.faults - world.faults_left + self.abrupt_captures - world.abrupt_left
    }
}

impl Act {
    /// Whether it counts against the bound of faults, or of abrupt captures.
    pub fn is_fault(self) -> bool {
        match self {
            Self::Lose(..)
            | Self::Cut(..)
            | Self::Repeat(..)
            | Self::Die(_)
            | Self::Restart
            | Self::FailStep
            | Self::FailWorkload
            | Self::FailLaunch
            | Self::Early(_)
            | Self::SeeGoneLate(_)
            | Self::CopyAbruptly(_) => true,
            Self::Read(_)
            | Self::SeeGone(_)
            | Self::Step
            | Self::Launch
            | Self::Started
            | Self::Exit
            | Self::Workload
            | Self::Rebind
            | Self::Hear(_)
            | Self::Greet
            | Self::Mend
            | Self::Capture
            | Self::GoOn
            | Self::Copy(_)
            | Self::Begin
            | Self::Late(_) => false,
        }
    }
}

fn in_ports(kind: Kind, world: &World, acts: &mut Vec<Act>) {
    for who in Who::ALL {
        for way in [Way::ToGuest, Way::ToHost] {
            if !world.ports[who.port()].has(way) {
                continue;
            }
            match kind {
                Kind::Lose => acts.push(Act::Lose(who, way)),
                Kind::Repeat => acts.push(Act::Repeat(who, way)),
                _ => acts.extend([Half::First, Half::Second].map(|half| Act::Cut(who, way, half))),
            }
        }
    }
}

fn at_hosts(kind: Kind, world: &World, acts: &mut Vec<Act>) {
    for who in Who::ALL {
        let port = &world.ports[who.port()];
        let waits = match who {
            Who::Keeper => world.keeper.is_waiting(),
            Who::Client => world.client.is_waiting(),
        };
        match kind {
            Kind::Die if world.has_line(who) => acts.push(Act::Die(who)),
            Kind::Early if waits => acts.push(Act::Early(who)),
            Kind::LateGone if port.gone && port.heard => acts.push(Act::SeeGoneLate(who)),
            _ => {}
        }
    }
}

/// A copy whose first greeting has failed: its machine is ended, and nothing else knows of it.
pub fn is_given_up(world: &World) -> bool {
    let failed = matches!(world.keeper.doing, Doing::Failed(_));
    failed && world.is_copy() && world.record.is_none()
}

impl Model for Bounds {
    type State = World;
    type Action = Act;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, acts: &mut Vec<Act>) {
        if world.ledger.broken.is_some() || is_given_up(world) {
            return;
        }
        *acts = self.moves(world);
        if acts.is_empty() {
            if world.keeper.is_waiting() {
                acts.push(Act::Late(Who::Keeper));
            }
            if world.client.is_waiting() && !is_left_standing(world) {
                acts.push(Act::Late(Who::Client));
            }
        }
        self.faults(world, acts);
    }

    fn next_state(&self, world: &World, act: Act) -> Option<World> {
        let mut next = world.clone();
        let is_abrupt = matches!(act, Act::CopyAbruptly(_));
        next.abrupt_left -= u8::from(is_abrupt);
        next.faults_left -= u8::from(act.is_fault() && !is_abrupt);
        self.apply(&mut next, act);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}

/// A command that was started and stands with the rest: its host has asked how the agent is, and waits on.
pub fn is_left_standing(world: &World) -> bool {
    let runs = matches!(world.client.stage, Stage::Running(_));
    runs && world.client.pinged && world.guest.stands
}
