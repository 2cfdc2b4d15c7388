//! The fuzzers' inputs, tried by the ordinary tests: the seeds, what once broke something, and changes of the seeds.
//!
//! `scripts/fuzz MINUTES agent session frames` looks for more. An input is a script (`untrusted/input.rs`): what hosts or a
//! guest send, whole frames with any contents and bytes that are none, and what goes on around the machine meanwhile.

mod untrusted;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;

/// The longest that one input may take.
const PATIENCE: Duration = Duration::from_secs(20);

fn inputs(kind: &str, target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let Ok(entries) = std::fs::read_dir(root.join(kind).join(target)) else {
        return Vec::new();
    };
    let paths = entries.map(|entry| entry.expect("list").path());
    paths
        .map(|path| (path.clone(), std::fs::read(path).expect("read")))
        .collect()
}

/// Without this a seed could end at its first message, and nobody would notice.
#[test]
fn every_seed_of_the_fuzzers_of_both_machines_reaches_a_command_that_ends() {
    let (agent, session) = (inputs("seeds", "agent"), inputs("seeds", "session"));
    assert!(agent.len() >= 4 && session.len() >= 3);
    for (path, bytes) in agent {
        let driven = untrusted::guest(&bytes);
        let reached = driven.acknowledged > 0 && driven.exited > 0;
        assert!(reached, "{}", path.display());
    }
    for (path, bytes) in session {
        let driven = untrusted::host(&bytes);
        let reached = driven.acknowledged && driven.released && driven.exited > 0;
        assert!(reached, "{}", path.display());
    }
}

#[test]
fn no_script_that_once_broke_a_machine_does_so_again() {
    for (path, bytes) in inputs("regressions", "agent") {
        println!("{}", path.display());
        untrusted::guest(&bytes);
    }
    for (path, bytes) in inputs("regressions", "session") {
        println!("{}", path.display());
        untrusted::host(&bytes);
    }
}

/// Scripts made of the seeds: pieces of them in any order, with bytes changed.
fn changed(target: &'static str) -> impl Strategy<Value = Vec<u8>> {
    let seeds: Vec<Vec<u8>> = inputs("seeds", target)
        .into_iter()
        .map(|(_, bytes)| bytes)
        .collect();
    let piece = (prop::sample::select(seeds), 0usize..200, 0usize..200);
    let change = (any::<prop::sample::Index>(), any::<u8>());
    (
        prop::collection::vec(piece, 1..5),
        prop::collection::vec(change, 0..6),
    )
        .prop_map(|(pieces, changes)| {
            let mut script = Vec::new();
            for (seed, from, to) in pieces {
                let end = seed.len() - to.min(seed.len()) / 4;
                script.extend_from_slice(&seed[(from / 8).min(end)..end]);
            }
            for (at, byte) in changes {
                if !script.is_empty() {
                    let place = at.index(script.len());
                    script[place] = byte;
                }
            }
            script
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn no_script_of_hosts_makes_the_agent_s_machine_panic_keep_too_much_or_start_twice(script in changed("agent")) {
        let begun = Instant::now();
        untrusted::guest(&script);
        prop_assert!(begun.elapsed() < PATIENCE);
    }

    #[test]
    fn no_script_of_a_guest_makes_a_session_panic_or_acknowledge_what_it_should_not(script in changed("session")) {
        let begun = Instant::now();
        untrusted::host(&script);
        prop_assert!(begun.elapsed() < PATIENCE);
    }

    #[test]
    fn no_bytes_at_all_break_a_machine(script in prop::collection::vec(any::<u8>(), 0..2000)) {
        untrusted::guest(&script);
        untrusted::host(&script);
    }
}
