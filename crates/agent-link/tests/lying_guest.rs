//! What the host makes of a guest that lies: each lie is an error with a name, within its time, and nothing is taken for
//! done because of it.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test may stop at the first surprise"
)]

mod guest;

use std::time::{Duration, Instant};

use guest::*;
use stead_agent_link::{AgentLink, Epoch, ExecRequest, LinkError};
use stead_agent_proto::ProtocolError;
use stead_agent_proto::frame::{DELIMITER, MAX_PAYLOAD_BYTES};
use stead_agent_proto::message::*;
use tokio::io::AsyncWriteExt;

/// The last answer of a handshake, whatever it is.
async fn answer_with(guest: &mut Guest, answer: &GuestMessage) {
    loop {
        let (nonce, message) = guest.next().await.expect("the host goes on");
        match message {
            HostMessage::Hello(_) => guest.hail(nonce).await,
            HostMessage::Setup(_) if nonce == guest.nonce => break,
            _of_an_earlier_hello => {}
        }
    }
    guest.send(answer).await;
}

/// Listens to the host until it has had enough.
async fn until_left(mut guest: Guest) {
    while guest.next().await.is_some() {}
}

async fn handshake_with(answer: GuestMessage) -> LinkError {
    let (mut link, mut guest) = Guest::pair();
    let lying = tokio::spawn(async move {
        answer_with(&mut guest, &answer).await;
        until_left(guest).await;
    });
    let found = in_time(link.handshake(&greeting(), LIMIT)).await;
    drop(link);
    lying.await.unwrap();
    found.expect_err("a lie")
}

#[tokio::test]
async fn ready_for_another_epoch_is_not_ready() {
    let GuestMessage::Ready(mut ready) = ready() else {
        panic!("it is ready");
    };
    ready.epoch = Epoch([2; 16]);
    let found = handshake_with(GuestMessage::Ready(ready)).await;
    assert!(matches!(found, LinkError::Protocol { .. }), "{found:?}");
}

#[tokio::test]
async fn an_answer_to_something_else_is_not_ready() {
    for answer in [
        GuestMessage::Accepted { id: 1 },
        GuestMessage::Done {
            id: 1,
            outcome: Done::Ok,
        },
        GuestMessage::SessionBroken {
            reason: "no".into(),
        },
    ] {
        let found = handshake_with(answer).await;
        assert!(matches!(found, LinkError::Protocol { .. }), "{found:?}");
    }
}

/// Whether a guest that says this behind its Ready, in one piece, has the VM released.
async fn release_after(message: GuestMessage) -> LinkError {
    let (mut link, mut guest) = Guest::pair();
    let lying = tokio::spawn(async move {
        loop {
            let (nonce, said) = guest.next().await.expect("the host goes on");
            match said {
                HostMessage::Hello(_) => guest.hail(nonce).await,
                HostMessage::Setup(_) if nonce == guest.nonce => break,
                _of_an_earlier_hello => {}
            }
        }
        let mut wire = guest.frame(&ready());
        wire.extend(guest.frame(&message));
        guest.stream.write_all(&wire).await.unwrap();
        until_left(guest).await;
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let found = in_time(link.release()).await.expect_err("not released");
    drop(link);
    lying.await.unwrap();
    found
}

#[tokio::test]
async fn released_before_it_was_told_to_release_is_no_release() {
    for id in 1..=2 {
        let outcome = Done::Released { duration_ns: 1 };
        let found = release_after(GuestMessage::Done { id, outcome }).await;
        assert!(
            matches!(
                found,
                LinkError::Protocol { .. } | LinkError::Abandoned { .. }
            ),
            "{found:?}"
        );
    }
}

#[tokio::test]
async fn a_release_that_is_answered_with_something_else_is_no_release() {
    let answers = [
        (Done::Ok, "another request"),
        (
            Done::Failed("a group does not thaw".into()),
            "does not thaw",
        ),
    ];
    for (outcome, named) in answers {
        let (mut link, mut guest) = Guest::pair();
        let lying = tokio::spawn(async move {
            guest.greet().await;
            let asked = guest.next().await.unwrap().1;
            let HostMessage::Request { id, .. } = asked else {
                panic!("a release is due: {asked:?}");
            };
            guest.send(&GuestMessage::Done { id, outcome }).await;
            until_left(guest).await;
        });
        in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
        let found = in_time(link.release()).await.expect_err("not released");
        assert!(
            matches!(&found, LinkError::RequestFailed { error, .. } if error.contains(named))
                || matches!(found, LinkError::Protocol { .. }),
            "{found:?}"
        );
        drop(link);
        lying.await.unwrap();
    }
}

/// A session in which a command is asked for, and these bytes come instead of an answer.
async fn session_with(make: impl FnOnce(&mut Guest) -> Vec<u8> + Send + 'static) -> LinkError {
    let (mut link, mut guest) = Guest::pair();
    let lying = tokio::spawn(async move {
        guest.greet().await;
        guest.next().await.unwrap();
        let wire = make(&mut guest);
        // The host may have left in the middle of it.
        drop(guest.stream.write_all(&wire).await);
        until_left(guest).await;
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let found = in_time(link.exec_capture(request(), b"")).await;
    drop(link);
    lying.await.unwrap();
    found.expect_err("a lie")
}

fn is_garbage(error: &LinkError) -> bool {
    matches!(
        error,
        LinkError::Protocol {
            source: ProtocolError::Garbage { .. },
            ..
        }
    )
}

#[tokio::test]
async fn a_frame_longer_than_any_may_be_is_refused() {
    let found = session_with(|_| {
        let mut wire = vec![b'x'; 8 * MAX_PAYLOAD_BYTES];
        wire.push(DELIMITER);
        wire
    })
    .await;
    assert!(is_garbage(&found), "{found:?}");
}

#[tokio::test]
async fn a_frame_without_end_is_not_held_and_costs_the_limit_of_silence_and_no_more() {
    let (mut link, mut guest) = Guest::pair_within(SHORT);
    let endless = tokio::spawn(async move {
        guest.greet().await;
        let noise = vec![b'x'; MAX_PAYLOAD_BYTES];
        while guest.stream.write_all(&noise).await.is_ok() {}
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let found = in_time(link.exec_capture(request(), b"")).await;
    let found = found.expect_err("no answer");
    assert!(
        matches!(found, LinkError::Late { .. }) || is_garbage(&found),
        "{found:?}"
    );
    drop(link);
    endless.await.unwrap();
}

#[tokio::test]
async fn a_frame_that_announces_more_than_it_has_is_refused() {
    let found = session_with(|guest| {
        let mut wire = guest.frame(&GuestMessage::Accepted { id: 1 });
        // The end is kept, a byte before it is not.
        wire.remove(wire.len() - 3);
        wire
    })
    .await;
    assert!(is_garbage(&found), "{found:?}");
}

/// What a command with much input and a limit of its time comes to, where the guest takes so many bytes and no more.
async fn starved(stdin_window_bytes: u32) -> LinkError {
    let (mut link, mut guest) = Guest::pair_within(SHORT);
    let starving = tokio::spawn(async move {
        guest.greet().await;
        // Lively otherwise.
        while let Some((_, message)) = guest.next().await {
            let answer = match message {
                HostMessage::Exec { id, .. } => GuestMessage::Accepted { id },
                HostMessage::Go { id } => GuestMessage::Started {
                    id,
                    pid: 7,
                    stdin_window_bytes,
                },
                HostMessage::Request { id, .. } => {
                    guest.answer_ping(id).await;
                    continue;
                }
                _input => continue,
            };
            guest.send(&answer).await;
        }
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let limited = ExecRequest {
        timeout_ms: 200,
        ..request()
    };
    let found = in_time(link.exec_capture(limited, &[1; 100_000])).await;
    drop(link);
    starving.await.unwrap();
    found.expect_err("the input is never taken")
}

#[tokio::test]
async fn a_guest_that_grants_no_credit_costs_the_limit_of_the_command_and_no_more() {
    let begun = Instant::now();
    let found = starved(4096).await;
    assert!(matches!(found, LinkError::Late { .. }), "{found:?}");
    assert!(begun.elapsed() >= Duration::from_millis(200));
    let found = starved(0).await;
    assert!(
        matches!(found, LinkError::Late { .. } | LinkError::Protocol { .. }),
        "{found:?}"
    );
}

#[tokio::test]
async fn an_agent_that_is_killed_in_the_middle_of_the_handshake_is_named() {
    let (mut link, mut guest) = Guest::pair();
    let killed = tokio::spawn(async move {
        let nonce = guest.next().await.unwrap().0;
        guest.hail(nonce).await;
        guest.next().await.unwrap();
    });
    let found = in_time(link.handshake(&greeting(), LIMIT)).await;
    assert!(
        matches!(found, Err(LinkError::Disconnected { .. })),
        "{found:?}"
    );
    killed.await.unwrap();
    stays_usable(&mut link).await;
}

/// The link says what it cannot do any more, and does not hang.
async fn stays_usable(link: &mut AgentLink) {
    let found = in_time(link.handshake(&greeting(), SHORT)).await;
    assert!(found.is_err(), "nobody is there: {found:?}");
}
