//! Long random schedules, where looking at everything would never end: many faults, captures of copies of copies.

use proptest::prelude::*;
use stateright::{Expectation, Model};

use crate::mutant::Mutant;
use crate::search::Act;
use crate::world::{Bounds, Kind, World};

const WIDE: Bounds = Bounds {
    faults: 12,
    kinds: &Kind::ALL,
    captures: 4,
    abrupt_captures: 3,
    client: true,
    again: 40,
    room: 3,
    single_steps: true,
    mutant: Mutant::None,
};
/// Of so many acts, one is a fault.
const FAULT_EVERY: u16 = 8;
/// How many acts it takes at most until nothing moves any more, when there are no more faults.
const REST: usize = 2000;

fn check(world: &World, acts: &[Act]) -> Result<(), TestCaseError> {
    for property in WIDE.properties() {
        let is_promise = matches!(property.expectation, Expectation::Always);
        let holds = !is_promise || (property.condition)(&WIDE, world);
        prop_assert!(holds, "{}: {acts:?}\n{world:#?}", property.name);
    }
    Ok(())
}

/// The act that the choice names among those that can happen; nothing when none can.
fn choose(world: &World, choice: u16) -> Option<Act> {
    let mut acts = Vec::new();
    WIDE.actions(world, &mut acts);
    let (faults, moves): (Vec<_>, Vec<_>) = acts.into_iter().partition(|act| act.is_fault());
    let wants_fault = choice.is_multiple_of(FAULT_EVERY) && !faults.is_empty();
    let from = if wants_fault || moves.is_empty() {
        faults
    } else {
        moves
    };
    let place = usize::from(choice / FAULT_EVERY);
    (!from.is_empty()).then(|| from[place % from.len()])
}

fn run(choices: &[u16]) -> Result<World, TestCaseError> {
    let (mut world, mut acts) = (World::new(&WIDE), Vec::new());
    let rest = choices.iter().cycle().take(REST);
    for (number, &choice) in choices.iter().chain(rest).enumerate() {
        if number == choices.len() {
            (world.faults_left, world.abrupt_left) = (0, 0);
        }
        let Some(act) = choose(&world, choice) else {
            return Ok(world);
        };
        acts.push(act);
        world = WIDE
            .next_state(&world, act)
            .expect("every act leads somewhere");
        check(&world, &acts)?;
    }
    prop_assert!(false, "something moves for ever: {acts:?}\n{world:#?}");
    Ok(world)
}

fn cases() -> u32 {
    if crate::is_soak() { 50_000 } else { 500 }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn no_long_schedule_of_faults_and_captures_breaks_a_promise_or_goes_on_for_ever(
        choices in prop::collection::vec(any::<u16>(), 20..400)
    ) {
        run(&choices)?;
    }
}
