//! What must hold whatever happens, and what must happen somewhere so that the search has looked at it.

use stateright::Property;

use crate::hosts::{Doing, Outcome, Stage};
use crate::ledger::Broken;
use crate::search::{is_given_up, is_left_standing};
use crate::world::{Bounds, World};

/// Names and conditions.
pub fn all() -> Vec<Property<Bounds>> {
    vec![
        Property::always(ACKNOWLEDGED, |_, world| kept(world, Broken::Unacknowledged)),
        Property::always(RELEASED, |_, world| kept(world, Broken::Unreleased)),
        Property::always(REGISTERED, |_, world| kept(world, Broken::RegisteredTwice)),
        Property::always(ONCE, |_, world| kept(world, Broken::RanTwice)),
        Property::always(ASKED, |_, world| kept(world, Broken::RanUnasked)),
        Property::always(NOT_EARLY, |_, world| kept(world, Broken::RanEarly)),
        Property::always(STANDS, |_, world| kept(world, Broken::WorkloadRanEarly)),
        Property::always(SOURCE, |_, world| kept(world, Broken::TakenForClone)),
        Property::always(REPORTS, |_, world| kept(world, Broken::Misreported)),
        Property::always(OUTCOME, |bounds, world| {
            !is_quiet(bounds, world) || has_outcome(bounds, world)
        }),
        Property::always(IN_TIME, |bounds, world| {
            let faults = bounds.faults_so_far(world);
            world.timeouts.iter().all(|&count| count <= faults)
        }),
        Property::always(READY, |bounds, world| {
            !is_quiet(bounds, world) || has_succeeded(bounds, world)
        }),
        Property::sometimes(SOURCE_RUNS, |bounds: &Bounds, world: &World| {
            let captured = bounds.captures > 0 && world.keeper.captures_left == 0;
            let over = world.client.stage == Stage::Over(Outcome::Exited);
            captured && !world.is_copy() && over && is_quiet(bounds, world)
        }),
        Property::sometimes(COPY_RUNS, |bounds, world: &World| {
            let over = world.client.stage == Stage::Over(Outcome::Exited);
            world.is_copy() && over && is_quiet(bounds, world)
        }),
        Property::sometimes(TOLD, |_, world: &World| {
            let over = world.client.stage == Stage::Over(Outcome::Known);
            world.is_copy() && over
        }),
    ]
}

/// What must be seen by a search that captures.
pub const SEEN: [&str; 3] = [SOURCE_RUNS, COPY_RUNS, TOLD];
const SOURCE_RUNS: &str = "a machine goes on after its capture, and its command ends";
const COPY_RUNS: &str = "a copy is ready, and a command ends in it";
const TOLD: &str = "a host asks a copy for the command of the life before, and is told of it";

pub const ACKNOWLEDGED: &str =
    "ready needs the acknowledgement of this epoch, after every step, in this life";
pub const RELEASED: &str = "ready needs the release: nothing stands any more";
pub const REGISTERED: &str = "what hosts connect to is registered once for an epoch";
pub const ONCE: &str = "a command runs at most once in a line of life";
pub const ASKED: &str = "a command runs only in a life whose host has told it to go";
pub const NOT_EARLY: &str = "no command runs before the release, or while the workload stands";
pub const STANDS: &str = "no workload goes on in a copy before its release";
pub const SOURCE: &str = "a machine that goes on is never set up as a copy";
pub const REPORTS: &str = "what a host is told of its command is true";
pub const OUTCOME: &str = "nobody waits for ever";
pub const IN_TIME: &str = "nobody waits in vain more often than there were faults";
pub const READY: &str =
    "after the faults the sandbox is ready, its workload runs, and its command has run";

fn kept(world: &World, promise: Broken) -> bool {
    world.ledger.broken != Some(promise)
}

/// Nothing moves any more unless there is another fault.
fn is_quiet(bounds: &Bounds, world: &World) -> bool {
    let client_waits = world.client.is_waiting() && !is_left_standing(world);
    let waits = world.keeper.is_waiting() || client_waits;
    let still = || !waits && bounds.moves(world).is_empty();
    world.ledger.broken.is_none() && (is_given_up(world) || still())
}

/// Every host knows where it stands, or nobody is left who could tell it.
fn has_outcome(bounds: &Bounds, world: &World) -> bool {
    let keeper = matches!(world.keeper.doing, Doing::Ready | Doing::Failed(_));
    let client = match world.client.stage {
        Stage::Over(_) => true,
        Stage::Off => !bounds.client || world.record.is_none(),
        Stage::Running(_) => world.guest.stands,
        Stage::Refused(_) | Stage::Postponed => world.keeper.mends_left == 0,
        Stage::Attaching | Stage::Asked(_) | Stage::Going(_) => false,
    };
    keeper && client
}

fn has_succeeded(bounds: &Bounds, world: &World) -> bool {
    let faults = bounds.faults_so_far(world);
    if is_given_up(world) {
        return faults > 0;
    }
    let ready = world.keeper.doing == Doing::Ready && !world.guest.stands;
    let ran = match world.client.stage {
        Stage::Over(Outcome::Exited | Outcome::Known) => true,
        Stage::Over(Outcome::Forgotten | Outcome::Unknown(_) | Outcome::NotRun) => faults > 0,
        Stage::Attaching
        | Stage::Asked(_)
        | Stage::Going(_)
        | Stage::Running(_)
        | Stage::Refused(_)
        | Stage::Postponed => false,
        Stage::Off => true,
    };
    ready && (ran || !bounds.client)
}
