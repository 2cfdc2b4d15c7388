//! The machines of host and guest as they are, over ports that lose, repeat, delay and cut what lies in them, with hosts
//! that die, agents that are restarted and captures at any moment: every order of it within bounds.
#![allow(
    clippy::wildcard_enum_match_arm,
    clippy::print_stdout,
    reason = "a test may leave out what it does not ask for, and says how much it has looked at"
)]

mod guest;
mod hosts;
mod ledger;
mod mutant;
mod policy;
mod port;
mod properties;
mod schedules;
mod search;
mod world;

use std::time::Instant;

use stateright::{Checker, Expectation, HasDiscoveries, Model};

use mutant::Mutant;
use world::{Bounds, Kind};

/// Bounds of a search: whoever begins, and no fault.
const PLAIN: Bounds = Bounds {
    faults: 0,
    kinds: &Kind::ALL,
    captures: 0,
    abrupt_captures: 0,
    client: false,
    again: 1,
    room: 1,
    single_steps: false,
    mutant: Mutant::None,
};

fn with_faults(faults: u8, bounds: Bounds) -> Bounds {
    Bounds {
        faults,
        again: faults + bounds.abrupt_captures + 1,
        ..bounds
    }
}

/// Looks at everything within the bounds. The first promise that is found broken is shown with the way to it.
fn search(name: &str, bounds: Bounds, seen: &[&'static str]) {
    let begin = Instant::now();
    let checker = bounds.checker().threads(2).spawn_dfs().join();
    println!(
        "{name}: {} states, {} ways between them, {} deep, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        begin.elapsed().as_secs_f64()
    );
    for (broken, path) in checker.discoveries() {
        let last = path.last_state().clone();
        let is_broken = matches!(bounds.property(broken).expectation, Expectation::Always);
        assert!(!is_broken, "{broken}: {:?}\n{last:#?}", path.into_actions());
    }
    for property in seen {
        assert!(
            checker.discovery(property).is_some(),
            "never seen: {property}"
        );
    }
}

fn is_soak() -> bool {
    std::env::var_os("STEAD_SOAK").is_some()
}

#[test]
fn a_machine_that_boots_is_ready_whatever_happens_to_its_greeting() {
    let bounds = Bounds {
        single_steps: true,
        ..PLAIN
    };
    search("boot", bounds, &[]);
    search("boot, 2 faults", with_faults(2, bounds), &[]);
    if is_soak() {
        search("boot, 3 faults", with_faults(3, bounds), &[]);
        let wide = Bounds { room: 3, ..bounds };
        search("boot, 2 faults, more on the way", with_faults(2, wide), &[]);
    }
}

#[test]
fn a_command_runs_once_or_is_reported_as_not_run_whatever_happens_to_it() {
    let bounds = Bounds {
        client: true,
        ..PLAIN
    };
    search("exec", bounds, &[]);
    search("exec, 2 faults", with_faults(2, bounds), &[]);
    if is_soak() {
        search("exec, 3 faults", with_faults(3, bounds), &[]);
    }
}

#[test]
fn a_capture_at_any_moment_gives_a_source_that_goes_on_and_copies_that_wait_for_their_release() {
    let bounds = Bounds {
        captures: 1,
        client: true,
        ..PLAIN
    };
    search("capture", bounds, &properties::SEEN);
    search(
        "capture, 1 fault",
        with_faults(1, bounds),
        &properties::SEEN,
    );
    if is_soak() {
        let twice = Bounds {
            captures: 2,
            ..bounds
        };
        search(
            "2 captures, 1 fault",
            with_faults(1, twice),
            &properties::SEEN,
        );
        search(
            "capture, 2 faults",
            with_faults(2, bounds),
            &properties::SEEN,
        );
    }
}

#[test]
fn a_capture_that_nobody_has_prepared_gives_copies_that_are_ready_and_run_nothing_twice() {
    let bounds = Bounds {
        abrupt_captures: 1,
        client: true,
        ..PLAIN
    };
    search("abrupt capture", with_faults(0, bounds), &[]);
    search("abrupt capture, 1 fault", with_faults(1, bounds), &[]);
    if is_soak() {
        let twice = Bounds {
            abrupt_captures: 2,
            ..bounds
        };
        search("2 abrupt captures, 1 fault", with_faults(1, twice), &[]);
    }
}

/// The search with a fault put back in must find that the promise is broken.
fn finds(mutant: Mutant, bounds: Bounds, promise: &'static str) {
    let bounds = Bounds { mutant, ..bounds };
    let found = HasDiscoveries::AllOf([promise].into());
    let checker = bounds
        .checker()
        .threads(2)
        .finish_when(found)
        .spawn_bfs()
        .join();
    let path = checker.discovery(promise);
    let Some(path) = path else {
        panic!(
            "{mutant:?} breaks nothing in {} states",
            checker.unique_state_count()
        );
    };
    println!("{mutant:?}: {promise}: {:?}", path.into_actions());
}

const CAPTURE: Bounds = Bounds {
    captures: 1,
    client: true,
    ..PLAIN
};

#[test]
fn the_checker_finds_the_report_s_own_fault_a_second_registration_and_the_edge_that_it_loses() {
    let bounds = Bounds {
        client: true,
        ..PLAIN
    };
    finds(Mutant::SecondRebind, PLAIN, properties::REGISTERED);
    finds(Mutant::LostEdge, bounds, properties::IN_TIME);
}

#[test]
fn the_checker_finds_an_answer_of_an_older_epoch_that_is_taken_for_ready() {
    finds(
        Mutant::OldAnswers,
        with_faults(2, PLAIN),
        properties::ACKNOWLEDGED,
    );
}

#[test]
fn the_checker_finds_a_release_that_is_not_waited_for() {
    finds(Mutant::ReleaseNotAwaited, PLAIN, properties::RELEASED);
    finds(Mutant::ThawAtReady, CAPTURE, properties::STANDS);
    finds(Mutant::ThawWhenAlone, CAPTURE, properties::STANDS);
}

#[test]
fn the_checker_finds_that_keys_are_forgotten_and_that_starts_are_not_asked_for() {
    let bounds = Bounds {
        client: true,
        ..PLAIN
    };
    finds(
        Mutant::KeysForgotten,
        with_faults(1, bounds),
        properties::ONCE,
    );
    finds(Mutant::StartUnasked, CAPTURE, properties::NOT_EARLY);
    finds(Mutant::StartUnasked, CAPTURE, properties::ASKED);
}

#[test]
fn the_checker_finds_a_source_that_is_taken_for_a_copy() {
    finds(Mutant::SourceGreeted, CAPTURE, properties::SOURCE);
}
