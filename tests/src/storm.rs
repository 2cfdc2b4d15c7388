//! What must hold over every transport: commands, and a storm of connections while they run.

use std::time::{Duration, Instant};

use stead_agent_link::{
    AgentLink, CommandEvent, Epoch, ExecRequest, ExitStatus, Greeting, Identity, LinkError, Output,
    Place, Reason,
};

/// For what must come to its end, however slow the machine is.
const LIMIT: Duration = Duration::from_secs(60);
/// Connections that come and go.
const CONNECTIONS: u32 = 200;
/// Each of these many asks for a command before it goes.
const ASKS_EVERY: u32 = 10;
/// Lines that a command writes meanwhile.
const LINES: u32 = 20_000;

fn sh(script: &str) -> ExecRequest {
    ExecRequest {
        argv: ["sh", "-c", script].map(Into::into).to_vec(),
        ..ExecRequest::default()
    }
}

async fn run(link: &AgentLink, script: &str) -> Result<Output, LinkError> {
    link.exec_capture(sh(script), b"").await
}

async fn begin(place: &Place, life: u8) -> AgentLink {
    let mut link = AgentLink::connect_to(place.clone()).await.expect("connect");
    let greeting = Greeting {
        epoch: Epoch([life; 16]),
        reason: Reason::Boot,
        identity: Identity::Keep,
    };
    link.handshake(&greeting, LIMIT).await.expect("handshake");
    link.release().await.expect("release");
    link
}

async fn join(place: &Place, life: u8) -> AgentLink {
    let mut link = AgentLink::connect_to(place.clone()).await.expect("connect");
    link.reattach(Epoch([life; 16]), LIMIT)
        .await
        .expect("reattach");
    link
}

async fn answers(link: &AgentLink) {
    let output = run(link, "echo $((6 * 7))").await.expect("run");
    assert_eq!(output.status, ExitStatus::Code(0));
    assert_eq!(output.stdout, b"42\n");
}

/// Everything, against an agent that serves nobody else; gives how long the slowest of the commands took that were
/// asked for in the storm.
pub async fn weather(place: &Place) -> Duration {
    let first = begin(place, 1).await;
    answers(&first).await;
    let slowest = storm(place, &first).await;
    another_life_ends_the_old_sessions_with_a_reason(place, first).await;
    slowest
}

/// Many come and go, some with half a hello: nobody who stays loses a byte, and everybody who asks is answered.
async fn storm(place: &Place, first: &AgentLink) -> Duration {
    let script = format!("n=0; while [ $n -lt {LINES} ]; do n=$((n+1)); echo $n; done");
    let mut slowest = Duration::ZERO;
    let comers = async {
        for number in 0..CONNECTIONS {
            if number % ASKS_EVERY > 0 {
                drop(AgentLink::connect_to(place.clone()).await.expect("connect"));
                continue;
            }
            let link = join(place, 1).await;
            let begun = Instant::now();
            answers(&link).await;
            slowest = slowest.max(begun.elapsed());
        }
    };
    let (counted, ()) = tokio::join!(run(first, &script), comers);
    let counted = counted.expect("the command that ran through the storm");
    assert_eq!(counted.status, ExitStatus::Code(0));
    let expected: String = (1..=LINES).map(|n| format!("{n}\n")).collect();
    assert!(counted.stdout == expected.as_bytes(), "output was lost");
    answers(first).await;
    slowest
}

/// Who listens to a command of a life that has passed is told so, at once and by name.
async fn another_life_ends_the_old_sessions_with_a_reason(place: &Place, first: AgentLink) {
    let mut waiting = first.start(sh("exec sleep 600")).await.expect("start");
    let second = begin(place, 2).await;
    let begun = Instant::now();
    let event = tokio::time::timeout(LIMIT, waiting.output.next()).await;
    match event.expect("in time") {
        Err(error) | Ok(CommandEvent::Broken(error)) => println!("the old session: {error:?}"),
        other => panic!("the old session must end with a reason: {other:?}"),
    }
    println!("it was told after {:?}", begun.elapsed());
    answers(&second).await;
    let refused = run(&first, "true").await;
    assert!(refused.is_err(), "an old session runs nothing: {refused:?}");
}
