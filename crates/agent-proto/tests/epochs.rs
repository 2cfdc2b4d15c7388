//! Every order in which frames of several lives can be lost, repeated and delayed, up to a bound.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test may stop at the first surprise"
)]

use std::collections::BTreeSet;

use stead_agent_proto::frame::{Direction, Fault, Item};
use stead_agent_proto::guest::{
    Action, Agent, Config, FreezeFailure, FrozenMounts, STEPS, StepResult,
};
use stead_agent_proto::host;
use stead_agent_proto::message::*;
use stead_agent_proto::{Epoch, ExecKey, Frame, Nonce};

fn config() -> Config {
    Config {
        agent_version: "test".into(),
        boot_id: "boot".into(),
        max_commands: 100,
        may_shut_down: false,
    }
}

fn mounts() -> FrozenMounts {
    FrozenMounts {
        frozen: vec!["/".into()],
        unsupported: vec![],
    }
}

fn to_guest(life: u8, nonce: u64, seq: u64, message: &HostMessage) -> Item {
    Item::Frame(Frame {
        direction: Direction::ToGuest,
        kind: message.kind(),
        seq,
        epoch: Epoch([life; 16]),
        nonce: Nonce(nonce),
        payload: message.to_payload().unwrap(),
    })
}

fn hello(reason: Reason) -> Hello {
    Hello { reason }
}

fn setup() -> Setup {
    Setup {
        wall_clock_ns: 1,
        seed: Seed([7; 64]),
        identity: Identity::Keep,
    }
}

fn key(nonce: u64, id: u64) -> ExecKey {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&nonce.to_le_bytes());
    key[8..].copy_from_slice(&id.to_le_bytes());
    ExecKey(key)
}

fn release(id: u64) -> HostMessage {
    let request = Request::Release;
    HostMessage::Request { id, request }
}

fn exec(nonce: u64, id: u64) -> HostMessage {
    HostMessage::Exec {
        id,
        key: key(nonce, id),
        again: None,
        request: ExecRequest {
            argv: vec!["true".into()],
            stdin: true,
            ..ExecRequest::default()
        },
    }
}

fn done() -> StepResult {
    StepResult {
        outcome: Ok(PhaseOutcome::Done),
        detail: PhaseDetail::None,
        duration_ns: 1,
    }
}

/// What the search can do next.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Event {
    /// A hello of life `0` with nonce `1` on port `2`; a reattach when the last is set.
    Hello(u8, u64, u32, bool),
    /// The setup of the same.
    Setup(u8, u64, u32),
    /// Exec `id` in life, session, port, sequence number.
    Exec(u8, u64, u32, u64, u64),
    /// Go `id` in the same.
    Go(u8, u64, u32, u64, u64),
    /// The release in the same.
    Release(u8, u64, u32, u64, u64),
    /// The oldest outstanding step is done (true) or fails.
    Step(bool),
    /// The oldest command that waits is asked for.
    Launch,
    /// The host of the port disconnects.
    Gone(u32),
    /// Bytes that are no frame.
    Garbage(u32),
    /// Another agent takes the place of this one.
    Replace,
}

/// The agent, what it was told to do, and an independent record of what it may do.
#[derive(Clone)]
struct World {
    agent: Agent,
    steps: Vec<(u32, Nonce, Phase)>,
    starts: Vec<ExecKey>,
    // Every command ever released; a key names session and number.
    released: BTreeSet<ExecKey>,
    // Lives that were released.
    open: BTreeSet<u8>,
    // Lives that another hello has replaced.
    replaced: BTreeSet<u8>,
    last_life: Option<u8>,
}

impl World {
    fn new() -> Self {
        Self {
            agent: Agent::new(config()),
            steps: Vec::new(),
            starts: Vec::new(),
            released: BTreeSet::new(),
            open: BTreeSet::new(),
            replaced: BTreeSet::new(),
            last_life: None,
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Hello(life, nonce, port, again) => {
                let reason = if again {
                    Reason::Reattach
                } else {
                    Reason::Restore
                };
                let message = HostMessage::Hello(hello(reason));
                let before = self.agent.epoch();
                let actions = self.agent.on_item(port, to_guest(life, nonce, 0, &message));
                assert_eq!(self.agent.epoch(), before, "a hello alone changes no life");
                self.take(actions);
            }
            Event::Setup(life, nonce, port) => {
                let message = HostMessage::Setup(setup());
                let actions = self.agent.on_item(port, to_guest(life, nonce, 1, &message));
                if actions
                    .iter()
                    .any(|action| matches!(action, Action::Step { .. }))
                {
                    if let Some(last) = self.last_life.filter(|&last| last != life) {
                        self.replaced.insert(last);
                    }
                    self.last_life = Some(life);
                }
                self.take(actions);
            }
            Event::Exec(life, nonce, port, seq, id) => {
                let exec = exec(nonce, id);
                let actions = self.agent.on_item(port, to_guest(life, nonce, seq, &exec));
                self.take(actions);
            }
            Event::Go(life, nonce, port, seq, id) => {
                let go = HostMessage::Go { id };
                let actions = self.agent.on_item(port, to_guest(life, nonce, seq, &go));
                self.take(actions);
            }
            Event::Release(life, nonce, port, seq, id) => {
                let release = release(id);
                let before = self.agent.is_released();
                let actions = self
                    .agent
                    .on_item(port, to_guest(life, nonce, seq, &release));
                if self.agent.is_released() && !before {
                    self.open.insert(life);
                }
                self.take(actions);
            }
            Event::Step(success) => {
                if self.steps.is_empty() {
                    return;
                }
                let (port, nonce, phase) = self.steps.remove(0);
                let outcome = if success {
                    Ok(PhaseOutcome::Done)
                } else {
                    Err("no".into())
                };
                let actions =
                    self.agent
                        .step_done(port, nonce, phase, StepResult { outcome, ..done() });
                self.take(actions);
            }
            Event::Launch => {
                if self.starts.is_empty() {
                    return;
                }
                let key = self.starts.remove(0);
                if self.agent.may_start(key) {
                    self.check_released(key);
                    let actions = self.agent.started(key, 7, 1);
                    assert_eq!(actions.len(), 1, "the host of a released command is told");
                    self.take(actions);
                }
            }
            Event::Gone(port) => {
                let actions = self.agent.on_host_gone(port);
                self.take(actions);
                assert_eq!(self.agent.attached(port), None);
            }
            Event::Garbage(port) => {
                let item = Item::Garbage {
                    bytes: 10,
                    fault: Fault::Checksum,
                };
                let actions = self.agent.on_item(port, item);
                self.take(actions);
                assert_eq!(self.agent.attached(port), None, "garbage ends a session");
            }
            Event::Replace => self.replace(),
        }
        self.check();
    }

    fn replace(&mut self) {
        let running = self.agent.unfinished().collect();
        let Ok(left) = self.agent.bequeath(&running) else {
            return;
        };
        let next = Agent::new(config()).with_heritage(&left).unwrap();
        assert_eq!(next.epoch(), self.agent.epoch());
        assert_eq!(next.is_released(), self.agent.is_released());
        self.agent = next;
        self.steps.clear();
        self.starts.clear();
    }

    fn take(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Step {
                    port, nonce, phase, ..
                } => self.steps.push((port, nonce, phase)),
                Action::Start { key, .. } => self.starts.push(key),
                Action::Flush { port } => while self.agent.next_frame(port).is_some() {},
                Action::Resize { .. }
                | Action::FreezeWorkload { .. }
                | Action::ThawWorkload
                | Action::Pong { .. }
                | Action::FileBegin { .. }
                | Action::FileData { .. }
                | Action::FileEnd { .. }
                | Action::FileRoom { .. }
                | Action::FileGone { .. }
                | Action::Stdin { .. }
                | Action::StdinEnd { .. }
                | Action::Signal { .. }
                | Action::Wake { .. }
                | Action::Freeze { .. }
                | Action::Thaw
                | Action::Chore { .. }
                | Action::Shutdown { .. } => {}
            }
        }
    }

    /// A whole handshake, and its release.
    fn begin(&mut self, life: u8, nonce: u64, port: u32) {
        self.apply(Event::Hello(life, nonce, port, false));
        self.apply(Event::Setup(life, nonce, port));
        for _ in 0..STEPS.len() {
            self.apply(Event::Step(true));
        }
        assert_eq!(
            self.agent.attached(port),
            Some((Epoch([life; 16]), Nonce(nonce)))
        );
        self.apply(Event::Release(life, nonce, port, 2, 1));
        assert!(self.agent.is_released());
    }

    fn check_released(&mut self, key: ExecKey) {
        assert!(self.released.insert(key), "{key:?} was started twice");
        let asker = Nonce(u64::from_le_bytes(key.0[..8].try_into().unwrap()));
        let (epoch, _) = (0..3)
            .filter_map(|port| self.agent.attached(port))
            .find(|(_, nonce)| *nonce == asker)
            .expect("only for the session that asked, and while it is attached");
        assert!(self.open.contains(&epoch.0[0]), "only in a released life");
        assert_eq!(Some(epoch), self.agent.epoch(), "only in the current epoch");
        assert!(
            !self.replaced.contains(&epoch.0[0]),
            "never for a life that was replaced"
        );
        assert_eq!(Some(epoch.0[0]), self.last_life, "only for the newest life");
    }

    fn check(&self) {
        for port in 0..2 {
            if let Some((epoch, _)) = self.agent.attached(port) {
                assert_eq!(
                    Some(epoch),
                    self.agent.epoch(),
                    "attached only to the current epoch"
                );
            }
        }
        if let Some(epoch) = self.agent.epoch() {
            assert!(
                !self.replaced.contains(&epoch.0[0]),
                "a replaced epoch never comes back"
            );
        }
    }
}

fn search(world: &World, alphabet: &[Event], depth: usize, visited: &mut usize) {
    *visited += 1;
    if depth == 0 {
        return;
    }
    for &event in alphabet {
        let mut next = world.clone();
        next.apply(event);
        search(&next, alphabet, depth - 1, visited);
    }
}

/// Frames may come in any order, any number of times or never; steps may fail; hosts may come and go.
#[test]
fn no_order_of_frames_starts_a_command_of_a_life_that_has_passed() {
    let alphabet = [
        Event::Hello(1, 10, 0, false),
        Event::Hello(2, 20, 0, false),
        Event::Setup(2, 20, 0),
        Event::Exec(1, 10, 0, 3, 2),
        Event::Go(1, 10, 0, 4, 2),
        Event::Release(2, 20, 0, 2, 1),
        Event::Exec(2, 20, 0, 3, 2),
        Event::Go(2, 20, 0, 4, 2),
        Event::Step(true),
        Event::Launch,
    ];
    // A handshake is long, so begin where what matters is near: life 1 released, and life 2 one step from its acknowledgement.
    let mut begun = World::new();
    begun.begin(1, 10, 0);
    let mut visited = 0;
    search(&begun, &alphabet, 5, &mut visited);
    let mut waiting = begun.clone();
    waiting.apply(Event::Exec(1, 10, 0, 3, 2));
    waiting.apply(Event::Go(1, 10, 0, 4, 2));
    waiting.apply(Event::Hello(2, 20, 0, false));
    waiting.apply(Event::Setup(2, 20, 0));
    for _ in 0..4 {
        waiting.apply(Event::Step(true));
    }
    search(&waiting, &alphabet, 6, &mut visited);
    assert!(visited > 500_000, "{visited} states were looked at");
}

#[test]
fn failing_steps_leaving_hosts_and_garbage_keep_the_same_promises() {
    let alphabet = [
        Event::Hello(2, 20, 0, false),
        Event::Hello(3, 30, 1, false),
        Event::Setup(3, 30, 1),
        Event::Hello(2, 21, 1, true),
        Event::Exec(2, 20, 0, 3, 2),
        Event::Go(2, 20, 0, 4, 2),
        Event::Step(false),
        Event::Gone(0),
        Event::Garbage(1),
        Event::Replace,
        Event::Launch,
    ];
    let mut begun = World::new();
    begun.begin(2, 20, 0);
    let mut visited = 0;
    search(&begun, &alphabet, 5, &mut visited);
    begun.apply(Event::Hello(3, 30, 1, false));
    begun.apply(Event::Setup(3, 30, 1));
    search(&begun, &alphabet, 5, &mut visited);
    assert!(visited > 200_000, "{visited} states were looked at");
}

#[test]
fn an_epoch_whose_handshake_was_overtaken_does_not_come_back() {
    let mut world = World::new();
    world.apply(Event::Hello(2, 20, 0, false));
    world.apply(Event::Hello(2, 24, 1, false));
    world.apply(Event::Setup(2, 20, 0));
    world.apply(Event::Step(true));
    world.apply(Event::Hello(3, 30, 2, false));
    world.apply(Event::Setup(3, 30, 2));
    for _ in 0..6 {
        world.apply(Event::Step(true));
    }
    assert_eq!(world.agent.epoch(), Some(Epoch([3; 16])));
    world.apply(Event::Hello(2, 22, 0, false));
    world.apply(Event::Setup(2, 22, 0));
    // Hailed before life 3 began, and answered after it.
    world.apply(Event::Setup(2, 24, 1));
    assert!(world.steps.is_empty(), "epoch 2 is refused at once");
    assert_eq!(world.agent.epoch(), Some(Epoch([3; 16])));
}

/// The twin: an agent that asks no epoch would start the command.
#[test]
fn the_search_can_fail_when_a_start_is_not_asked_for() {
    let mut world = World::new();
    world.begin(1, 10, 0);
    world.apply(Event::Exec(1, 10, 0, 3, 2));
    world.apply(Event::Go(1, 10, 0, 4, 2));
    let stale = world.starts[0];
    world.apply(Event::Hello(2, 20, 0, false));
    let unguarded =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.check_released(stale)));
    assert!(
        unguarded.is_err(),
        "the record must object to a start without may_start"
    );
}

#[test]
fn a_gap_in_the_sequence_ends_the_session_and_a_repetition_is_ignored() {
    let mut world = World::new();
    world.begin(1, 10, 0);
    world.apply(Event::Exec(1, 10, 0, 3, 2));
    world.apply(Event::Go(1, 10, 0, 4, 2));
    world.apply(Event::Go(1, 10, 0, 4, 2));
    assert_eq!(world.starts.len(), 1, "the repetition starts nothing");
    world.apply(Event::Exec(1, 10, 0, 6, 3));
    assert_eq!(
        world.agent.attached(0),
        None,
        "a missing frame is not skipped"
    );
    world.apply(Event::Launch);
    assert!(world.released.is_empty());
}

#[test]
fn ready_is_never_sent_before_every_step_is_done() {
    for failing in 0..=STEPS.len() {
        let mut agent = Agent::new(config());
        agent.on_item(
            0,
            to_guest(1, 10, 0, &HostMessage::Hello(hello(Reason::Fork))),
        );
        assert!(matches!(said(&mut agent, 0)[..], [GuestMessage::Hail(_)]));
        let mut actions = agent.on_item(0, to_guest(1, 10, 1, &HostMessage::Setup(setup())));
        let mut steps = 0;
        while let Some(Action::Step {
            port, nonce, phase, ..
        }) = actions.pop()
        {
            assert_eq!(said(&mut agent, 0), [], "nothing is said before the end");
            let outcome = if steps == failing {
                Err("broken".into())
            } else {
                Ok(PhaseOutcome::Done)
            };
            steps += 1;
            actions = agent.step_done(port, nonce, phase, StepResult { outcome, ..done() });
        }
        match &said(&mut agent, 0)[..] {
            [GuestMessage::Ready(ready)] => {
                assert_eq!(failing, STEPS.len());
                let phases: Vec<Phase> = ready.phases.iter().map(|report| report.phase).collect();
                assert_eq!(
                    phases,
                    [&[Phase::Epoch, Phase::Sessions][..], &STEPS].concat()
                );
                assert_eq!((ready.epoch, ready.released), (Epoch([1; 16]), false));
            }
            [GuestMessage::Failed(failed)] => {
                assert_eq!(Some(&failed.phase), STEPS.get(failing));
                assert_eq!(failed.error, "broken");
                assert_eq!(
                    agent.epoch(),
                    None,
                    "neither the old nor the new life is current"
                );
            }
            other => panic!("{other:?}"),
        }
    }
}

/// All that the agent has to say to a port.
fn said(agent: &mut Agent, port: u32) -> Vec<GuestMessage> {
    std::iter::from_fn(|| agent.next_frame(port))
        .map(|(frame, _)| GuestMessage::from_frame(&frame).unwrap())
        .collect()
}

/// What the agent says to a port after it was told something.
fn told(agent: &mut Agent, port: u32, item: Item) -> Vec<GuestMessage> {
    agent.on_item(port, item);
    said(agent, port)
}

#[test]
fn a_reattach_needs_the_current_epoch() {
    let mut agent = Agent::new(config());
    let reattach =
        |life, nonce| to_guest(life, nonce, 0, &HostMessage::Hello(hello(Reason::Reattach)));
    let refused = |said: Vec<GuestMessage>| matches!(said[..], [.., GuestMessage::Failed(_)]);
    assert!(refused(told(&mut agent, 3, reattach(1, 5))));
    complete(&mut agent, 0, 1, 10);
    assert!(refused(told(&mut agent, 3, reattach(2, 6))));
    match &told(&mut agent, 3, reattach(1, 7))[..] {
        [GuestMessage::Ready(ready)] => assert!(ready.released),
        other => panic!("{other:?}"),
    }
}

/// A whole handshake, and its release with the sequence number 2 and the number 1.
fn complete(agent: &mut Agent, port: u32, life: u8, nonce: u64) {
    acknowledge(agent, port, life, nonce);
    agent.on_item(port, to_guest(life, nonce, 2, &release(1)));
    said(agent, port);
    assert!(agent.is_released());
}

fn acknowledge(agent: &mut Agent, port: u32, life: u8, nonce: u64) {
    let hello = HostMessage::Hello(hello(Reason::Restore));
    agent.on_item(port, to_guest(life, nonce, 0, &hello));
    let mut actions = agent.on_item(port, to_guest(life, nonce, 1, &HostMessage::Setup(setup())));
    while let Some(Action::Step {
        port, nonce, phase, ..
    }) = actions.pop()
    {
        actions = agent.step_done(port, nonce, phase, done());
    }
    said(agent, port);
    assert_eq!(agent.epoch(), Some(Epoch([life; 16])));
    assert!(!agent.is_released());
}

#[test]
fn a_host_of_another_version_is_told_so() {
    let mut agent = Agent::new(config());
    let other = Item::Garbage {
        bytes: 60,
        fault: Fault::Version(1),
    };
    match &told(&mut agent, 0, other)[..] {
        [GuestMessage::Failed(failed)] => {
            assert!(failed.error.contains("version 1"), "{failed:?}");
        }
        other => panic!("{other:?}"),
    }
}

fn request(id: u64, request: Request) -> HostMessage {
    HostMessage::Request { id, request }
}

fn refusal(said: &[GuestMessage]) -> Option<&Rejection> {
    match said {
        [GuestMessage::Rejected { reason, .. }] => Some(reason),
        _ => None,
    }
}

#[test]
fn a_freeze_is_undone_when_its_owner_leaves_and_the_next_thaw_says_so() {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let freeze = to_guest(1, 10, 3, &request(2, Request::Freeze { limit_ms: 5 }));
    assert_eq!(agent.on_item(0, freeze), [Action::Freeze { limit_ms: 5 }]);
    agent.freeze_done(Ok(mounts()));
    assert!(matches!(
        said(&mut agent, 0)[..],
        [GuestMessage::Done { .. }]
    ));
    let refused = told(&mut agent, 0, to_guest(1, 10, 4, &exec(10, 3)));
    assert_eq!(refusal(&refused), Some(&Rejection::Frozen));
    let gone = agent.on_host_gone(0);
    assert!(gone.contains(&Action::Thaw), "{gone:?}");
    assert!(agent.thaw_done(Ok(())).is_empty());
    let again = to_guest(1, 11, 0, &HostMessage::Hello(hello(Reason::Reattach)));
    told(&mut agent, 0, again);
    let thaw = to_guest(1, 11, 1, &request(1, Request::Thaw));
    match &told(&mut agent, 0, thaw)[..] {
        [
            GuestMessage::Done {
                outcome: Done::Failed(why),
                ..
            },
        ] => assert!(why.contains("disconnected"), "{why}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_freeze_whose_owner_left_before_it_was_complete_is_undone() {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let freeze = request(2, Request::Freeze { limit_ms: 5 });
    agent.on_item(0, to_guest(1, 10, 3, &freeze));
    assert!(
        !agent.on_host_gone(0).contains(&Action::Thaw),
        "there is nothing to thaw yet"
    );
    assert_eq!(agent.freeze_done(Ok(mounts())), vec![Action::Thaw]);
    assert!(agent.is_frozen());
    agent.thaw_done(Ok(()));
    assert!(!agent.is_frozen());
}

#[test]
fn what_could_not_be_thawed_accepts_no_command_and_is_thawed_again_until_it_is() {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let freeze = request(2, Request::Freeze { limit_ms: 5 });
    agent.on_item(0, to_guest(1, 10, 3, &freeze));
    agent.freeze_done(Err(FreezeFailure {
        error: "neither frozen nor thawed".into(),
        still_frozen: true,
    }));
    assert!(matches!(
        said(&mut agent, 0)[..],
        [GuestMessage::Done { .. }]
    ));
    assert!(agent.is_frozen(), "it says what it knows");
    let refused = told(&mut agent, 0, to_guest(1, 10, 4, &exec(10, 3)));
    assert_eq!(refusal(&refused), Some(&Rejection::Frozen));
    for failed_before in 0..3 {
        assert_eq!(agent.freeze_expired(), [Action::Thaw], "{failed_before}");
        agent.thaw_done(Err("refused".into()));
        assert!(agent.is_frozen());
    }
    // Another life thaws as well, and is not ready before.
    agent.on_item(
        1,
        to_guest(2, 20, 0, &HostMessage::Hello(hello(Reason::Restore))),
    );
    let begun = agent.on_item(1, to_guest(2, 20, 1, &HostMessage::Setup(setup())));
    assert!(begun.contains(&Action::Thaw), "{begun:?}");
    agent.thaw_done(Ok(()));
    assert!(!agent.is_frozen());
}

/// The source goes on by a thaw in its life; a clone, which finds itself frozen, by the release of its own.
#[test]
fn a_frozen_workload_outlives_its_host_and_goes_on_only_when_told_to_in_its_life_or_released_in_another()
 {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let freeze = request(2, Request::FreezeWorkload { limit_ms: 5 });
    let begun = agent.on_item(0, to_guest(1, 10, 3, &freeze));
    assert_eq!(begun, [Action::FreezeWorkload { limit_ms: 5 }]);
    let refused = told(&mut agent, 0, to_guest(1, 10, 4, &exec(10, 3)));
    assert_eq!(refusal(&refused), Some(&Rejection::WorkloadFrozen));
    agent.workload_frozen(Ok(()));
    agent.on_host_gone(0);
    assert_eq!(
        agent.workload(),
        WorkloadState::Frozen,
        "a host that died thaws nothing"
    );
    let mut clone = agent.clone();

    let reattach = HostMessage::Hello(hello(Reason::Reattach));
    match &told(&mut agent, 1, to_guest(1, 11, 0, &reattach))[..] {
        [GuestMessage::Ready(ready)] => {
            assert_eq!(
                (ready.workload, ready.released),
                (WorkloadState::Frozen, true)
            );
        }
        other => panic!("{other:?}"),
    }
    let thaw = to_guest(1, 11, 1, &request(1, Request::ThawWorkload));
    assert_eq!(agent.on_item(1, thaw), [Action::ThawWorkload]);
    agent.workload_thawed(Ok(1));
    assert_eq!(agent.workload(), WorkloadState::Running);

    acknowledge(&mut clone, 0, 2, 20);
    assert_eq!(clone.workload(), WorkloadState::Frozen);
    let thaw = request(1, Request::ThawWorkload);
    let early = clone.on_item(0, to_guest(2, 20, 2, &thaw));
    assert!(!early.contains(&Action::ThawWorkload), "{early:?}");
    let released = clone.on_item(0, to_guest(2, 20, 3, &release(2)));
    assert_eq!(released, [Action::ThawWorkload]);
    assert!(!clone.is_released(), "not before it is thawed");
    clone.workload_thawed(Err("no".into()));
    assert!(!clone.is_released(), "and not when it could not be");
    said(&mut clone, 0);
    clone.on_item(0, to_guest(2, 20, 4, &release(3)));
    clone.workload_thawed(Ok(9));
    assert!(clone.is_released());
    let answer = GuestMessage::Done {
        id: 3,
        outcome: Done::Released { duration_ns: 9 },
    };
    assert_eq!(said(&mut clone, 0), [answer]);
}

/// A capture can fall into the freezing or the thawing: the release of the clone waits for its end.
#[test]
fn a_release_waits_for_a_freeze_or_a_thaw_that_a_capture_fell_into() {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let freeze = request(2, Request::FreezeWorkload { limit_ms: 5 });
    agent.on_item(0, to_guest(1, 10, 3, &freeze));
    let mut freezing = agent.clone();
    acknowledge(&mut freezing, 1, 2, 20);
    assert_eq!(freezing.on_item(1, to_guest(2, 20, 2, &release(1))), []);
    assert_eq!(freezing.workload_frozen(Ok(())), [Action::ThawWorkload]);
    agent.workload_frozen(Ok(()));
    let thaw = request(3, Request::ThawWorkload);
    agent.on_item(0, to_guest(1, 10, 4, &thaw));
    let mut thawing = agent;
    acknowledge(&mut thawing, 1, 2, 20);
    assert_eq!(thawing.on_item(1, to_guest(2, 20, 2, &release(1))), []);
    for mut clone in [freezing, thawing] {
        assert!(!clone.is_released());
        clone.workload_thawed(Ok(4));
        assert!(clone.is_released());
        let answer = GuestMessage::Done {
            id: 1,
            outcome: Done::Released { duration_ns: 4 },
        };
        assert_eq!(said(&mut clone, 1), [answer]);
    }
}

#[test]
fn a_shutdown_thaws_the_workload_first_and_never_in_a_life_that_was_not_released() {
    let mut agent = Agent::new(Config {
        may_shut_down: true,
        ..config()
    });
    complete(&mut agent, 0, 1, 10);
    let kind = ShutdownKind::Poweroff;
    let shutdown = |by_init| Action::Shutdown {
        port: 0,
        kind,
        by_init,
    };
    let asked = |id| request(id, Request::Shutdown(kind));
    let running = agent.clone().on_item(0, to_guest(1, 10, 3, &asked(3)));
    assert!(running.contains(&shutdown(true)), "{running:?}");
    let freeze = request(3, Request::FreezeWorkload { limit_ms: 5 });
    agent.on_item(0, to_guest(1, 10, 3, &freeze));
    agent.workload_frozen(Ok(()));
    said(&mut agent, 0);
    let mut source = agent.clone();
    let first = source.on_item(0, to_guest(1, 10, 4, &asked(4)));
    assert_eq!(first, [Action::ThawWorkload]);
    assert_eq!(said(&mut source, 0), [], "not before the thaw");
    let mut stuck = source.clone();
    assert!(
        !stuck
            .workload_thawed(Err("no".into()))
            .contains(&shutdown(true))
    );
    assert!(matches!(
        said(&mut stuck, 0)[..],
        [GuestMessage::Done {
            id: 4,
            outcome: Done::Failed(_)
        }]
    ));
    assert!(source.workload_thawed(Ok(1)).contains(&shutdown(true)));
    assert!(matches!(
        said(&mut source, 0)[..],
        [GuestMessage::Done {
            id: 4,
            outcome: Done::Ok
        }]
    ));
    acknowledge(&mut agent, 0, 2, 20);
    let clone = agent.on_item(0, to_guest(2, 20, 2, &asked(1)));
    assert!(clone.contains(&shutdown(false)), "{clone:?}");
    assert!(!clone.contains(&Action::ThawWorkload));
    assert_eq!(agent.workload(), WorkloadState::Frozen);
}

/// A go that lies whole in a port when the guest is captured: in the clone it finds the workload frozen, or another life.
#[test]
fn a_go_that_a_capture_cut_off_from_its_host_runs_in_no_clone() {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    told(&mut agent, 0, to_guest(1, 10, 3, &exec(10, 2)));
    let freeze = request(3, Request::FreezeWorkload { limit_ms: 5 });
    agent.on_item(0, to_guest(1, 10, 4, &freeze));
    agent.workload_frozen(Ok(()));
    said(&mut agent, 0);
    let go = to_guest(1, 10, 5, &HostMessage::Go { id: 2 });
    let mut first = agent.clone();
    let refused = told(&mut first, 0, go.clone());
    assert_eq!(refusal(&refused), Some(&Rejection::WorkloadFrozen));
    let mut later = agent.clone();
    acknowledge(&mut later, 1, 2, 20);
    later.on_item(1, to_guest(2, 20, 2, &release(1)));
    later.workload_thawed(Ok(1));
    assert_eq!(later.on_item(0, go), [], "of a life that has passed");
    for clone in [&first, &later] {
        let state = clone.command_state(key(10, 2), Epoch([1; 16]));
        assert_eq!(state, CommandState::NotRun);
    }
}

/// What was released, listened to and kept is known to the agent that follows; what was only asked for has not run.
#[test]
fn what_an_agent_knew_of_commands_is_known_to_the_one_in_its_place_and_none_runs_again() {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let mut seq = 3;
    let mut say = |agent: &mut Agent, message: HostMessage| {
        let heard = told(agent, 0, to_guest(1, 10, seq, &message));
        seq += 1;
        heard
    };
    for id in [2, 3, 4] {
        say(&mut agent, exec(10, id));
        say(&mut agent, HostMessage::Go { id });
    }
    for id in [2, 3] {
        assert!(agent.may_start(key(10, id)));
        agent.started(key(10, id), 7, 1);
        agent.output(key(10, id), OutputStream::Stdout, b"before");
    }
    agent.exited(key(10, 3), ExitStatus::Code(5));
    let running: BTreeSet<ExecKey> = agent.unfinished().collect();
    assert_eq!(running, BTreeSet::from([key(10, 2)]));
    let error = agent.bequeath(&BTreeSet::new()).unwrap_err();
    assert!(error.contains("being started"), "{error}");
    let left = agent.bequeath(&running).unwrap();
    assert_eq!(
        blake3::hash(&left).to_hex()[..16],
        *"47594986ecdfc370",
        "another form needs another version"
    );
    let mut next = Agent::new(config()).with_heritage(&left).unwrap();
    let life = Epoch([1; 16]);
    let state = |id| next.command_state(key(10, id), life);
    assert_eq!(state(2), CommandState::Running);
    assert_eq!(state(3), CommandState::Ended(ExitStatus::Code(5)));
    assert_eq!(state(4), CommandState::NotRun);
    assert!(!next.may_start(key(10, 2)) && !next.may_start(key(10, 4)));
    next.on_item(
        1,
        to_guest(1, 11, 0, &HostMessage::Hello(hello(Reason::Reattach))),
    );
    said(&mut next, 1);
    let attach = |id, command| HostMessage::Attach {
        id,
        key: key(10, command),
        from: [0, 0],
    };
    next.output(key(10, 2), OutputStream::Stdout, b" and after");
    let mut heard = told(&mut next, 1, to_guest(1, 11, 1, &attach(1, 2)));
    heard.extend(told(&mut next, 1, to_guest(1, 11, 2, &attach(2, 3))));
    next.exited(key(10, 2), ExitStatus::Code(6));
    heard.extend(said(&mut next, 1));
    let output = |id: u64| {
        let data = heard.iter().filter_map(|message| match message {
            GuestMessage::Output { id: of, data, .. } if *of == id => Some(data.0.clone()),
            _ => None,
        });
        data.flatten().collect::<Vec<u8>>()
    };
    assert_eq!(output(1), b"before and after");
    assert_eq!(output(2), b"before");
    let ends: Vec<_> = heard
        .iter()
        .filter_map(|message| match message {
            GuestMessage::Exit { id, status } => Some((*id, *status)),
            _ => None,
        })
        .collect();
    assert_eq!(ends, [(2, ExitStatus::Code(5)), (1, ExitStatus::Code(6))]);
    // What is not whole, or another version's, is no heritage.
    for length in 0..left.len() {
        assert!(Agent::new(config()).with_heritage(&left[..length]).is_err());
    }
    for at in 0..left.len() {
        let mut changed = left.clone();
        changed[at] ^= 0xff;
        // Whatever comes of it, nothing is taken on trust.
        drop(Agent::new(config()).with_heritage(&changed));
    }
}

#[test]
fn no_agent_is_replaced_while_something_is_under_way_that_only_it_can_finish() {
    let none = BTreeSet::new();
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    agent.bequeath(&none).unwrap();
    let mut frozen = agent.clone();
    let freeze = request(3, Request::FreezeWorkload { limit_ms: 5 });
    frozen.on_item(0, to_guest(1, 10, 3, &freeze));
    assert!(frozen.bequeath(&none).unwrap_err().contains("stand still"));
    let mut freezing = agent.clone();
    let freeze = request(3, Request::Freeze { limit_ms: 5 });
    freezing.on_item(0, to_guest(1, 10, 3, &freeze));
    assert!(freezing.bequeath(&none).unwrap_err().contains("frozen"));
    agent.on_item(
        1,
        to_guest(2, 20, 0, &HostMessage::Hello(hello(Reason::Restore))),
    );
    agent.on_item(1, to_guest(2, 20, 1, &HostMessage::Setup(setup())));
    assert!(agent.bequeath(&none).unwrap_err().contains("handshake"));
}

/// A command that floods and one that says a line: the line goes out after one chunk of the flood, answers before both.
#[test]
fn each_stream_has_its_turn_and_answers_come_first() {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let mut seq = 3;
    let mut say = |agent: &mut Agent, message: HostMessage| {
        agent.on_item(0, to_guest(1, 10, seq, &message));
        seq += 1;
    };
    for id in [2, 3] {
        say(&mut agent, exec(10, id));
        say(&mut agent, HostMessage::Go { id });
        assert!(agent.may_start(key(10, id)));
        agent.started(key(10, id), 7, 1);
    }
    said(&mut agent, 0);
    let room = agent.output_room(key(10, 2), OutputStream::Stdout);
    agent.output(key(10, 2), OutputStream::Stdout, &vec![b'x'; room]);
    assert_eq!(agent.output_room(key(10, 2), OutputStream::Stdout), 0);
    agent.output(key(10, 3), OutputStream::Stderr, b"a line");
    say(&mut agent, request(4, Request::List));
    let order: Vec<u64> = said(&mut agent, 0)
        .iter()
        .map(|message| match message {
            GuestMessage::Done { .. } => 0,
            GuestMessage::Output { id, .. } => *id,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(order, [0, 2, 3, 2]);
}

#[test]
fn an_agent_that_remembers_no_more_says_that_it_has_forgotten_and_not_that_nothing_ran() {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let mut seq = 3;
    for id in 2..=stead_agent_proto::guest::REMEMBERED_COMMANDS as u64 + 2 {
        for message in [exec(10, id), HostMessage::Go { id }] {
            agent.on_item(0, to_guest(1, 10, seq, &message));
            seq += 1;
        }
        assert!(agent.may_start(key(10, id)), "{id}");
        agent.started(key(10, id), 7, 1);
        agent.exited(key(10, id), ExitStatus::Code(0));
        agent.command_gone(key(10, id));
        assert!(matches!(
            said(&mut agent, 0)[..],
            [.., GuestMessage::Exit { .. }]
        ));
    }
    let life = Epoch([1; 16]);
    let state = |agent: &Agent, id| agent.command_state(key(10, id), life);
    assert_eq!(state(&agent, 2), CommandState::Forgotten);
    assert_eq!(state(&agent, 3), CommandState::Ended(ExitStatus::Code(0)));
    let HostMessage::Exec { key, request, .. } = exec(10, 2) else {
        unreachable!("it is one");
    };
    let id = 5000;
    let again = Some(life);
    let message = HostMessage::Exec {
        id,
        key,
        again,
        request,
    };
    let known = GuestMessage::Known {
        id,
        state: CommandState::Forgotten,
    };
    assert_eq!(told(&mut agent, 0, to_guest(1, 10, seq, &message)), [known]);
}

/// The hello is heard, and then the end of an earlier connection: the new session is gone, and its host does not know.
#[test]
fn a_request_in_a_session_that_the_agent_has_lost_is_denied_and_not_left_unanswered() {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let mut session = host::Session::new(Epoch([1; 16]), Nonce(11));
    let reattach = hello(Reason::Reattach);
    session.hello(reattach).unwrap();
    agent.on_item(0, to_guest(1, 11, 0, &HostMessage::Hello(reattach)));
    session.on_item(to_host(11, 0, &ready())).unwrap();
    session
        .exec(key(11, 1), None, ExecRequest::default())
        .unwrap();
    agent.on_host_gone(0);
    agent.on_item(0, to_guest(1, 11, 1, &exec(11, 1)));
    let (denial, _) = agent.next_frame(0).unwrap();
    let found = session.on_item(Item::Frame(denial));
    assert!(
        matches!(found, Err(stead_agent_proto::ProtocolError::SessionLost(_))),
        "{found:?}"
    );
    // What was asked of a life that has passed is not answered; a life that this agent has never lived was lost with an
    // agent before it.
    complete(&mut agent, 1, 2, 20);
    for message in [exec(11, 1), request(2, Request::Ping)] {
        assert_eq!(told(&mut agent, 0, to_guest(1, 11, 1, &message)), []);
        let unknown = told(&mut agent, 0, to_guest(9, 11, 1, &message));
        assert!(
            matches!(unknown[..], [GuestMessage::SessionBroken { .. }]),
            "{unknown:?}"
        );
        let mut restarted = Agent::new(config());
        let denied = told(&mut restarted, 0, to_guest(1, 11, 1, &message));
        assert!(
            matches!(denied[..], [GuestMessage::SessionBroken { .. }]),
            "{denied:?}"
        );
    }
}

/// A session ends while its command is prepared, and another tells the same key to go: one preparation that is refused would
/// otherwise speak for the other, and its host would be told of a command that runs that it does not.
#[test]
fn a_command_that_is_told_to_go_again_while_it_is_prepared_is_started_once_for_who_said_it_last() {
    let again = |nonce| {
        let HostMessage::Exec { id, request, .. } = exec(nonce, 1) else {
            unreachable!("an exec is an exec");
        };
        HostMessage::Exec {
            id,
            key: key(7, 7),
            again: Some(Epoch([1; 16])),
            request,
        }
    };
    let is_start = |action: &Action| matches!(action, Action::Start { .. });
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let mut starts = 0;
    for nonce in [11, 12] {
        agent.on_item(
            1,
            to_guest(1, nonce, 0, &HostMessage::Hello(hello(Reason::Reattach))),
        );
        agent.on_item(1, to_guest(1, nonce, 1, &again(nonce)));
        let gone = agent.on_item(1, to_guest(1, nonce, 2, &HostMessage::Go { id: 1 }));
        starts += gone.iter().filter(|action| is_start(action)).count();
        said(&mut agent, 1);
    }
    assert_eq!(starts, 1, "one thread prepares it");
    assert!(agent.may_start(key(7, 7)));
    assert!(!agent.may_start(key(7, 7)));
    agent.started(key(7, 7), 5, 0);
    let told = said(&mut agent, 1);
    assert!(
        matches!(told[..], [GuestMessage::Started { id: 1, pid: 5, .. }]),
        "{told:?}"
    );
}

#[test]
fn who_asks_for_a_thaw_while_the_workload_is_frozen_or_thawed_is_answered_when_it_runs() {
    let mut agent = Agent::new(config());
    complete(&mut agent, 0, 1, 10);
    let freeze = Request::FreezeWorkload { limit_ms: 1 };
    agent.on_item(0, to_guest(1, 10, 3, &request(2, freeze)));
    agent.on_item(0, to_guest(1, 10, 4, &request(3, Request::ThawWorkload)));
    assert_eq!(
        agent.workload_frozen(Ok(())).last(),
        Some(&Action::ThawWorkload)
    );
    let overtaken = said(&mut agent, 0);
    assert!(
        matches!(
            &overtaken[..],
            [GuestMessage::Done {
                id: 2,
                outcome: Done::Failed(_)
            }]
        ),
        "nobody takes for standing what goes on: {overtaken:?}"
    );
    agent.on_item(0, to_guest(1, 10, 5, &request(4, Request::ThawWorkload)));
    agent.workload_thawed(Ok(1));
    let told = said(&mut agent, 0);
    assert!(
        matches!(
            &told[..],
            [
                GuestMessage::Done {
                    id: 3,
                    outcome: Done::Failed(_)
                },
                GuestMessage::Done {
                    id: 4,
                    outcome: Done::Ok
                }
            ]
        ),
        "{told:?}"
    );
}

#[test]
fn a_host_that_asks_and_never_reads_leaves_little_to_write_and_loses_its_session() {
    let mut agent = Agent::new(config());
    for nonce in 0..20_000 {
        let hello = HostMessage::Hello(hello(Reason::Boot));
        agent.on_item(0, to_guest(1, nonce, 0, &hello));
    }
    assert!(said(&mut agent, 0).len() < 10_000);
    complete(&mut agent, 0, 1, 30_000);
    for id in 2..200_000 {
        let list = request(id, Request::List);
        agent.on_item(0, to_guest(1, 30_000, id + 1, &list));
        if agent.attached(0).is_none() {
            break;
        }
    }
    assert_eq!(
        agent.attached(0),
        None,
        "a host that reads nothing is not served for ever"
    );
    assert!(
        matches!(
            said(&mut agent, 0)[..],
            [GuestMessage::SessionBroken { .. }]
        ),
        "it is told why"
    );
}

fn to_host(nonce: u64, seq: u64, message: &GuestMessage) -> Item {
    Item::Frame(Frame {
        direction: Direction::ToHost,
        kind: message.kind(),
        seq,
        epoch: Epoch([1; 16]),
        nonce: Nonce(nonce),
        payload: message.to_payload().unwrap(),
    })
}

fn ready() -> GuestMessage {
    GuestMessage::Ready(Ready {
        epoch: Epoch([1; 16]),
        agent_version: "t".into(),
        boot_id: "b".into(),
        phases: vec![],
        workload: WorkloadState::Running,
        released: false,
    })
}

#[test]
fn the_host_discards_any_number_of_stale_replies_before_its_own_ready() {
    let mut session = host::Session::new(Epoch([1; 16]), Nonce(9));
    session.hello(hello(Reason::Reattach)).unwrap();
    for seq in 0..200_000 {
        assert_eq!(
            session.on_item(to_host(8, seq % 7, &GuestMessage::Accepted { id: 1 })),
            Ok(None)
        );
    }
    let event = session.on_item(to_host(9, 0, &ready())).unwrap();
    assert!(matches!(event, Some(host::Event::Ready(_))), "{event:?}");
    assert_eq!(session.discarded().stale_frames, 200_000);
}

#[test]
fn a_host_sets_up_only_a_guest_that_has_hailed_and_is_ready_only_after_it() {
    let hail = || {
        GuestMessage::Hail(Hail {
            agent_version: "t".into(),
        })
    };
    let mut session = host::Session::new(Epoch([1; 16]), Nonce(9));
    assert!(session.setup(setup()).is_err(), "nothing before the hello");
    session.hello(hello(Reason::Wake)).unwrap();
    assert!(session.setup(setup()).is_err(), "nothing before the hail");
    assert!(matches!(
        session.on_item(to_host(9, 0, &hail())),
        Ok(Some(host::Event::Hail(_)))
    ));
    session.setup(setup()).unwrap();
    assert!(session.setup(setup()).is_err(), "once");
    assert!(matches!(
        session.on_item(to_host(9, 1, &ready())),
        Ok(Some(host::Event::Ready(_)))
    ));
    for (seq, early) in [(0, ready()), (1, hail())] {
        let mut session = host::Session::new(Epoch([1; 16]), Nonce(9));
        session.hello(hello(Reason::Wake)).unwrap();
        assert!(
            session.on_item(to_host(9, seq, &early)).is_err(),
            "{early:?}"
        );
    }
}

/// Every sequence of guest messages up to a bound: the host never takes an answer that it did not ask for.
#[test]
fn no_order_of_guest_messages_gives_an_exit_without_a_command_that_was_told_to_go() {
    let exit = |id| GuestMessage::Exit {
        id,
        status: ExitStatus::Code(0),
    };
    let output = |bytes: usize| GuestMessage::Output {
        id: 1,
        stream: OutputStream::Stdout,
        data: vec![1; bytes].into(),
    };
    let started = |stdin_window_bytes| GuestMessage::Started {
        id: 1,
        pid: 7,
        stdin_window_bytes,
    };
    let alphabet = [
        ready(),
        GuestMessage::Accepted { id: 1 },
        GuestMessage::Accepted { id: 2 },
        started(0),
        started(u32::MAX),
        GuestMessage::Rejected {
            id: 1,
            reason: Rejection::Frozen,
        },
        GuestMessage::Known {
            id: 1,
            state: CommandState::Running,
        },
        output(5),
        output(0),
        GuestMessage::StdinCredit { id: 1, bytes: 1 },
        GuestMessage::StdinClosed { id: 1 },
        exit(1),
        exit(2),
        GuestMessage::Done {
            id: 1,
            outcome: Done::Ok,
        },
    ];
    let mut ended_runs = 0;
    let mut indices = [0usize; 5];
    loop {
        let mut session = host::Session::new(Epoch([1; 16]), Nonce(9));
        session.hello(hello(Reason::Reattach)).unwrap();
        session.on_item(to_host(9, 0, &ready())).unwrap();
        let request = ExecRequest {
            argv: vec!["x".into()],
            ..ExecRequest::default()
        };
        session.exec(key(9, 1), None, request).unwrap();
        let mut trace = Vec::new();
        for (seq, &index) in (1..).zip(&indices) {
            match session.on_item(to_host(9, seq, &alphabet[index])) {
                Ok(Some(event)) => {
                    if event == (host::Event::Accepted { id: 1 }) {
                        session.go(1).unwrap();
                    }
                    trace.push(event);
                }
                // Credit for an input that has ended says nothing.
                Ok(None) => assert!(matches!(alphabet[index], GuestMessage::StdinCredit { .. })),
                Err(_) => break,
            }
        }
        let exit_at = trace
            .iter()
            .position(|event| matches!(event, host::Event::Exit { .. }));
        if let Some(at) = exit_at {
            ended_runs += 1;
            let begun = [
                host::Event::Accepted { id: 1 },
                host::Event::Started { id: 1, pid: 7 },
            ];
            assert_eq!(trace[..2], begun);
            assert_eq!(at, trace.len() - 1, "nothing follows an exit: {trace:?}");
        }
        assert!(
            !trace
                .iter()
                .any(|event| matches!(event, host::Event::Done { .. } | host::Event::Ready(_)))
        );
        let Some(place) = indices.iter().position(|&index| index + 1 < alphabet.len()) else {
            break;
        };
        indices[..place].fill(0);
        indices[place] += 1;
    }
    assert!(ended_runs > 0, "the search must meet a command that ends");
}
