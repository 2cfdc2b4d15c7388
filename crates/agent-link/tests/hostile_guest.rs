//! What the host makes of a guest that is silent, noisy, wrong or hostile: an error in time, never a hang.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test may stop at the first surprise"
)]

mod guest;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use guest::*;

use stead_agent_link::{
    AgentLink, Epoch, ExecRequest, ExitStatus, LinkError, Place, Reason, Stage,
};
use stead_agent_proto::Nonce;
use stead_agent_proto::message::*;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

#[tokio::test]
async fn a_socket_nobody_listens_at_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let found = AgentLink::connect(&folder.path().join("none")).await;
    assert!(
        matches!(&found, Err(LinkError::Connect { place: Place::Unix(socket), .. }) if socket.ends_with("none")),
        "{found:?}"
    );
}

#[tokio::test]
async fn a_silent_guest_is_late_and_the_error_says_what_stands() {
    let (mut link, _guest) = Guest::pair();
    let begin = Instant::now();
    let found = in_time(link.handshake(&greeting(), SHORT))
        .await
        .expect_err("silent");
    assert!(begin.elapsed() >= SHORT);
    let text = found.to_string();
    assert!(
        text.contains("handshake") && text.contains("nothing came") && text.contains("no command"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_for_ever_is_an_error_in_time() {
    for zero_every in [0usize, 1, 7] {
        let (mut link, mut guest) = Guest::pair();
        let flood = tokio::spawn(async move {
            let mut noise = vec![0x55u8; 65536];
            if zero_every > 0 {
                noise
                    .iter_mut()
                    .step_by(zero_every + 1)
                    .for_each(|byte| *byte = 0);
            }
            while guest.stream.write_all(&noise).await.is_ok() {}
        });
        let found = in_time(link.handshake(&greeting(), SHORT)).await;
        assert!(
            matches!(
                found,
                Err(LinkError::Late {
                    stage: Stage::Handshake,
                    ..
                })
            ),
            "{found:?}"
        );
        drop(link);
        flood.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stale_replies_for_ever_are_an_error_in_time() {
    let (mut link, mut guest) = Guest::pair();
    let flood = tokio::spawn(async move {
        guest.nonce = Nonce(12345);
        let mut wire = Vec::new();
        for _ in 0..500 {
            wire.extend(guest.frame(&GuestMessage::Accepted { id: 1 }));
        }
        while guest.stream.write_all(&wire).await.is_ok() {}
    });
    let found = in_time(link.handshake(&greeting(), SHORT)).await;
    assert!(
        matches!(&found, Err(LinkError::Late { discarded, .. }) if discarded.stale_frames > 0),
        "{found:?}"
    );
    drop(link);
    flood.await.unwrap();
}

#[tokio::test]
async fn two_hundred_thousand_stale_replies_before_the_own_one_are_discarded() {
    let (mut link, mut guest) = Guest::pair();
    let old = tokio::spawn(async move {
        guest.nonce = Nonce(7);
        let mut wire = Vec::new();
        for _ in 0..2000 {
            wire.extend(guest.frame(&GuestMessage::Accepted { id: 1 }));
        }
        for _ in 0..100 {
            guest.stream.write_all(&wire).await.unwrap();
        }
        guest.greet().await;
        guest
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    // And the hails to hellos that had been given up meanwhile.
    assert!((200_000..200_050).contains(&link.discarded().stale_frames));
    old.await.unwrap();
}

#[tokio::test]
async fn a_hello_that_was_lost_is_said_again() {
    let (mut link, mut guest) = Guest::pair();
    let deaf = tokio::spawn(async move {
        let first = guest.next().await.unwrap().0;
        // An agent that restarts has lost it; the next one is answered.
        guest.greet().await;
        (first, guest)
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let (first, guest) = deaf.await.unwrap();
    assert_ne!(first, guest.nonce, "every hello has a nonce of its own");
}

#[tokio::test]
async fn the_clock_is_read_when_the_guest_has_hailed_and_not_before() {
    let (mut link, mut guest) = Guest::pair();
    let booting = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let hailed_at = SystemTime::now();
        let setup = loop {
            match guest.next().await {
                Some((nonce, HostMessage::Hello(_))) => guest.hail(nonce).await,
                Some((nonce, HostMessage::Setup(setup))) if nonce == guest.nonce => break setup,
                _of_an_earlier_hello => {}
            }
        };
        guest.send(&ready()).await;
        let hailed_ns = hailed_at.duration_since(UNIX_EPOCH).unwrap().as_nanos();
        (guest, hailed_ns, u128::from(setup.wall_clock_ns))
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let (_guest, hailed_ns, set_ns) = booting.await.unwrap();
    assert!(
        set_ns >= hailed_ns,
        "the time is {} ns older than the hail",
        hailed_ns - set_ns
    );
}

#[tokio::test]
async fn a_guest_that_falls_silent_in_a_command_is_pinged_and_given_up() {
    let (mut link, mut guest) = Guest::pair_within(SHORT);
    let silent = tokio::spawn(async move {
        guest.greet().await;
        guest.start().await;
        let mut pings = 0;
        while let Some((_, message)) = guest.next().await {
            pings += u32::from(matches!(
                message,
                HostMessage::Request {
                    request: Request::Ping,
                    ..
                }
            ));
        }
        pings
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let found = in_time(link.exec_capture(request(), b"")).await;
    assert!(
        matches!(
            found,
            Err(LinkError::Late {
                stage: Stage::Run,
                ..
            })
        ),
        "{found:?}"
    );
    let again = link.ping().await;
    assert!(
        matches!(again, Err(LinkError::Abandoned { .. })),
        "{again:?}"
    );
    drop(link);
    assert_eq!(silent.await.unwrap(), 1);
}

#[tokio::test]
async fn a_command_that_is_quiet_for_long_is_not_given_up_while_the_agent_answers() {
    let (mut link, mut guest) = Guest::pair();
    let quiet = tokio::spawn(async move {
        guest.greet().await;
        guest.start().await;
        for _ in 0..8 {
            guest.pong().await;
        }
        guest
            .send(&GuestMessage::Exit {
                id: 1,
                status: ExitStatus::Code(6),
            })
            .await;
        guest
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let limit = Duration::from_secs(1);
    link.set_silence_limit(limit);
    let begin = Instant::now();
    let output = in_time(link.exec_capture(request(), b"")).await.unwrap();
    assert_eq!(output.status, ExitStatus::Code(6));
    assert!(begin.elapsed() > limit * 2, "longer than the silence limit");
    quiet.await.unwrap();
}

#[tokio::test]
async fn a_guest_that_never_ends_a_limited_command_is_given_up_however_lively_it_is() {
    let (mut link, mut guest) = Guest::pair_within(SHORT);
    let lively = tokio::spawn(async move {
        guest.greet().await;
        guest.start().await;
        let data: Bytes = vec![b'x'; 100].into();
        loop {
            let output = GuestMessage::Output {
                id: 1,
                stream: OutputStream::Stdout,
                data: data.clone(),
            };
            if !guest.send(&output).await {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let limited = ExecRequest {
        timeout_ms: 200,
        ..request()
    };
    let found = in_time(link.exec_capture(limited, b"")).await;
    assert!(
        matches!(
            found,
            Err(LinkError::Late {
                stage: Stage::Run,
                ..
            })
        ),
        "{found:?}"
    );
    drop(link);
    lively.await.unwrap();
}

/// A host that was stopped (Ctrl-Z, a debugger, a machine that slept) finds the answer waiting for it.
#[tokio::test]
async fn a_host_that_stood_still_takes_what_has_come_before_it_looks_at_the_clock() {
    for early in [0, 1] {
        let (mut link, guest) = Guest::pair_within(SHORT);
        let answers = [
            GuestMessage::Output {
                id: 1,
                stream: OutputStream::Stdout,
                data: "x".into(),
            },
            GuestMessage::Exit {
                id: 1,
                status: ExitStatus::Code(6),
            },
        ];
        let guest = elsewhere(guest, move |mut guest| async move {
            guest.greet().await;
            guest.start().await;
            for answer in &answers[..early] {
                guest.send(answer).await;
            }
            tokio::time::sleep(SHORT / 2).await;
            for answer in &answers[early..] {
                guest.send(answer).await;
            }
            guest
        });
        in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
        let (output, ()) = tokio::join!(link.exec_capture(request(), b""), stand_still());
        assert_eq!(output.unwrap().status, ExitStatus::Code(6), "{early}");
        drop(guest.join().unwrap());
    }
}

#[tokio::test]
async fn a_guest_is_given_up_only_after_it_was_asked_and_had_its_time_to_answer() {
    let (mut link, guest) = Guest::pair_within(SHORT);
    let guest = elsewhere(guest, |mut guest| async move {
        guest.greet().await;
        guest.start().await;
        guest.pong().await;
        let status = ExitStatus::Code(6);
        guest.send(&GuestMessage::Exit { id: 1, status }).await;
        guest
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    // Nothing waits for the host when it goes on: the guest has not been asked yet.
    let (output, ()) = tokio::join!(link.exec_capture(request(), b""), stand_still());
    assert_eq!(output.unwrap().status, ExitStatus::Code(6));
    drop(guest.join().unwrap());
}

/// Runs a guest on a thread of its own, so that it goes on while the host stands still.
fn elsewhere<F: Future<Output = Guest>>(
    guest: Guest,
    act: impl FnOnce(Guest) -> F + Send + 'static,
) -> std::thread::JoinHandle<UnixStream> {
    let stream = guest.stream.into_std().unwrap();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let guest = Guest::on(UnixStream::from_std(stream).unwrap());
            act(guest).await.stream
        })
    })
}

/// Stops this thread, and so the host, for longer than any silence may be.
async fn stand_still() {
    tokio::time::sleep(SHORT / 6).await;
    std::thread::sleep(SHORT * 4);
}

#[tokio::test]
async fn a_guest_that_loses_the_setup_is_greeted_again_from_the_hello_on() {
    let (mut link, mut guest) = Guest::pair();
    let forgetful = tokio::spawn(async move {
        let (first, _hello) = guest.next().await.unwrap();
        guest.hail(first).await;
        loop {
            let (nonce, message) = guest.next().await.unwrap();
            match message {
                // An agent that was killed, or has seen the end of an earlier connection only now.
                HostMessage::Setup(_) if nonce == first => {}
                HostMessage::Hello(_) => guest.hail(nonce).await,
                HostMessage::Setup(_) => break,
                other => panic!("{other:?}"),
            }
        }
        guest.send(&ready()).await;
        (first, guest)
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let (first, guest) = forgetful.await.unwrap();
    assert_ne!(first, guest.nonce);
}

#[tokio::test]
async fn a_command_in_a_session_that_the_agent_has_lost_is_started_in_another_and_once_only() {
    for denials in [1, 2] {
        let (mut link, mut guest) = Guest::pair();
        let forgetful = tokio::spawn(async move {
            guest.greet().await;
            let mut denied = 0;
            while let Some((nonce, message)) = guest.next().await {
                match message {
                    HostMessage::Hello(hello) => {
                        assert_eq!(hello.reason, Reason::Reattach);
                        (guest.nonce, guest.seq) = (nonce, 0);
                        guest.send(&ready()).await;
                    }
                    HostMessage::Exec { .. } if denied < denials => {
                        denied += 1;
                        guest.seq = UNKNOWN_SESSION_SEQ;
                        let reason = "lost".into();
                        let wire = guest.frame_numbered(&GuestMessage::SessionBroken { reason });
                        guest.stream.write_all(&wire).await.unwrap();
                    }
                    HostMessage::Exec { id, .. } => {
                        let status = ExitStatus::Code(6);
                        guest.send(&GuestMessage::Accepted { id }).await;
                        let told = guest.next().await.unwrap().1;
                        assert_eq!(told, HostMessage::Go { id });
                        guest.send(&started(id)).await;
                        guest.send(&GuestMessage::Exit { id, status }).await;
                    }
                    other => panic!("{other:?}"),
                }
            }
            denied
        });
        in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
        let found = in_time(link.exec_capture(request(), b"")).await;
        if denials == 1 {
            assert_eq!(found.unwrap().status, ExitStatus::Code(6));
        } else {
            assert!(
                matches!(found, Err(LinkError::Protocol { .. })),
                "it is not asked for ever: {found:?}"
            );
        }
        drop(link);
        assert_eq!(forgetful.await.unwrap(), denials);
    }
}

/// The answer to the go is lost with its session: the command may run, and is not begun again to find out.
#[tokio::test]
async fn a_command_whose_start_was_lost_on_the_way_is_taken_up_and_not_begun_again() {
    let (mut link, mut guest) = Guest::pair();
    let forgetful = tokio::spawn(async move {
        guest.greet().await;
        let first = match guest.next().await.unwrap().1 {
            HostMessage::Exec {
                id,
                key,
                again: None,
                ..
            } => {
                guest.send(&GuestMessage::Accepted { id }).await;
                key
            }
            other => panic!("{other:?}"),
        };
        assert_eq!(guest.next().await.unwrap().1, HostMessage::Go { id: 1 });
        guest.seq = UNKNOWN_SESSION_SEQ;
        let reason = "lost".into();
        let wire = guest.frame_numbered(&GuestMessage::SessionBroken { reason });
        guest.stream.write_all(&wire).await.unwrap();
        loop {
            let (nonce, message) = guest.next().await.unwrap();
            match message {
                HostMessage::Hello(_) => {
                    (guest.nonce, guest.seq) = (nonce, 0);
                    guest.send(&ready()).await;
                }
                HostMessage::Exec { id, key, again, .. } => {
                    assert_eq!((key, again), (first, Some(Epoch([1; 16]))));
                    let state = CommandState::Running;
                    guest.send(&GuestMessage::Known { id, state }).await;
                }
                HostMessage::Attach { id, key, from } => {
                    assert_eq!((key, from), (first, [0, 0]));
                    let at = Attachment {
                        pid: Some(7),
                        first: from,
                        stdin: None,
                    };
                    guest.send(&GuestMessage::Attached { id, at }).await;
                    let status = ExitStatus::Code(6);
                    guest.send(&GuestMessage::Exit { id, status }).await;
                    return guest;
                }
                other => panic!("{other:?}"),
            }
        }
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let output = in_time(link.exec_capture(request(), b"")).await.unwrap();
    assert_eq!(output.status, ExitStatus::Code(6));
    forgetful.await.unwrap();
}

/// QEMU may drop what the guest has not read when the connection ends.
#[tokio::test]
async fn a_command_that_is_said_to_be_killed_was_killed() {
    for confirms in [true, false] {
        let (mut link, mut guest) = Guest::pair();
        let flood = tokio::spawn(async move {
            guest.greet().await;
            guest.start().await;
            let output = GuestMessage::Output {
                id: 1,
                stream: OutputStream::Stdout,
                data: vec![b'x'; 32 * 1024].into(),
            };
            let mut granted: usize = 256 * 1024;
            let id = loop {
                while granted >= 32 * 1024 {
                    guest.send(&output).await;
                    granted -= 32 * 1024;
                }
                match guest.next().await.unwrap().1 {
                    HostMessage::Credit { bytes, .. } => granted += bytes as usize,
                    // First as a terminal that goes away.
                    HostMessage::Signal { signal: 1, .. } => {
                        let id = guest.pinged().await;
                        if confirms {
                            guest.answer_ping(id).await;
                        }
                    }
                    HostMessage::Signal { signal: 9, .. } => break guest.pinged().await,
                    other => panic!("{other:?}"),
                }
            };
            if confirms {
                guest.answer_ping(id).await;
            }
            while guest.next().await.is_some() {}
        });
        in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
        match in_time(link.exec_capture(request(), b"")).await {
            Err(LinkError::TooMuchOutput { killed, .. }) => assert_eq!(killed, confirms),
            other => panic!("{other:?}"),
        }
        drop(link);
        flood.await.unwrap();
    }
}

#[tokio::test]
async fn what_the_protocol_forbids_is_an_error_at_once() {
    let output = |bytes: usize| GuestMessage::Output {
        id: 1,
        stream: OutputStream::Stdout,
        data: vec![b'x'; bytes].into(),
    };
    let credit = |bytes| GuestMessage::StdinCredit { id: 1, bytes };
    let exit = GuestMessage::Exit {
        id: 1,
        status: ExitStatus::Code(0),
    };
    let reply = GuestMessage::File {
        id: 1,
        reply: Bytes::default(),
        last: true,
    };
    // Whether the command runs when it is said.
    let cases: Vec<(&str, bool, Vec<GuestMessage>)> = vec![
        ("output before the command runs", false, vec![output(5)]),
        ("an exit before the command runs", false, vec![exit]),
        ("a start without a go", false, vec![started(1)]),
        (
            "another command's acceptance",
            false,
            vec![GuestMessage::Accepted { id: 2 }],
        ),
        ("a second start", true, vec![started(1)]),
        ("empty output", true, vec![output(0)]),
        ("a chunk over the limit", true, vec![output(40_000)]),
        ("credit never earned", true, vec![credit(u32::MAX)]),
        (
            "a flood of late credit",
            true,
            vec![credit(200_000), credit(200_000)],
        ),
        ("an answer about files", true, vec![reply]),
        (
            "a pong nobody asked for",
            false,
            vec![GuestMessage::Done {
                id: 9,
                outcome: Done::Ok,
            }],
        ),
        ("ready twice", false, vec![ready()]),
        (
            "the end of the session",
            false,
            vec![GuestMessage::SessionBroken {
                reason: "so there".into(),
            }],
        ),
    ];
    for (what, runs, messages) in cases {
        let (mut link, mut guest) = Guest::pair();
        let wrong = tokio::spawn(async move {
            guest.greet().await;
            if runs {
                guest.start().await;
            } else {
                guest.next().await.unwrap();
            }
            for message in &messages {
                guest.send(message).await;
            }
            while guest.next().await.is_some() {}
        });
        in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
        let found = in_time(link.exec_capture(request(), b"")).await;
        assert!(
            matches!(found, Err(LinkError::Protocol { .. })),
            "{what}: {found:?}"
        );
        drop(link);
        wrong.await.unwrap();
    }
}

#[tokio::test]
async fn more_output_than_was_granted_is_refused() {
    let (mut link, mut guest) = Guest::pair();
    let flood = tokio::spawn(async move {
        guest.greet().await;
        guest.start().await;
        let data: Bytes = vec![b'x'; 32 * 1024].into();
        let output = GuestMessage::Output {
            id: 1,
            stream: OutputStream::Stderr,
            data,
        };
        while guest.send(&output).await {}
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let (_reader, stuck) = tokio::io::duplex(1);
    let (_sender, signals) = tokio::sync::mpsc::channel(1);
    let io = stead_agent_link::ExecIo {
        stdin: tokio::io::empty(),
        stdout: tokio::io::sink(),
        stderr: stuck,
    };
    let found = in_time(link.exec(request(), io, signals)).await;
    assert!(
        matches!(found, Err(LinkError::Protocol { .. })),
        "{found:?}"
    );
    drop(link);
    flood.await.unwrap();
}

#[tokio::test]
async fn a_lost_or_damaged_frame_is_never_passed_over() {
    for lost in [true, false] {
        let (mut link, mut guest) = Guest::pair();
        let lossy = tokio::spawn(async move {
            guest.greet().await;
            guest.start().await;
            let text = |text: &str| GuestMessage::Output {
                id: 1,
                stream: OutputStream::Stdout,
                data: text.into(),
            };
            guest.send(&text("first ")).await;
            let mut middle = guest.frame(&text("second "));
            if lost {
                middle.clear();
            } else {
                middle[30] ^= 0x40;
            }
            let last = [
                middle,
                guest.frame(&text("third")),
                guest.frame(&GuestMessage::Exit {
                    id: 1,
                    status: ExitStatus::Code(0),
                }),
            ]
            .concat();
            guest.stream.write_all(&last).await.unwrap();
            while guest.next().await.is_some() {}
        });
        in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
        let found = in_time(link.exec_capture(request(), b"")).await;
        assert!(
            matches!(found, Err(LinkError::Protocol { .. })),
            "{found:?}"
        );
        drop(link);
        lossy.await.unwrap();
    }
}

#[tokio::test]
async fn a_connection_that_ends_is_said_to_have_ended() {
    let (mut link, mut guest) = Guest::pair();
    let short = tokio::spawn(async move {
        guest.greet().await;
        guest.start().await;
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let found = in_time(link.exec_capture(request(), b"")).await;
    assert!(
        matches!(
            found,
            Err(LinkError::Disconnected {
                stage: Stage::Run,
                ..
            })
        ),
        "{found:?}"
    );
    short.await.unwrap();
}

#[tokio::test]
async fn a_command_whose_start_is_dropped_is_not_told_to_go_and_the_link_goes_on() {
    let (mut link, mut guest) = Guest::pair();
    let (dropped, is_dropped) = tokio::sync::oneshot::channel();
    let slow = tokio::spawn(async move {
        guest.greet().await;
        guest.next().await.unwrap();
        is_dropped.await.unwrap();
        guest.send(&GuestMessage::Accepted { id: 1 }).await;
        // The ping and what the acceptance leads to may come in either order.
        for _ in 0..2 {
            match guest.next().await.unwrap().1 {
                HostMessage::Detach { id: 1 } => {
                    let reason = "asked".into();
                    guest.send(&GuestMessage::Detached { id: 1, reason }).await;
                }
                HostMessage::Request { id, .. } => guest.answer_ping(id).await,
                other => panic!("{other:?}"),
            }
        }
        guest
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let start = tokio::time::timeout(Duration::from_millis(20), link.start(request())).await;
    assert!(start.is_err());
    dropped.send(()).unwrap();
    in_time(link.ping()).await.unwrap();
    slow.await.unwrap();
}

/// Each of a hundred tasks gets the answers to its own questions.
#[tokio::test]
async fn many_tasks_use_one_link_at_once() {
    let (mut link, mut guest) = Guest::pair();
    let busy = tokio::spawn(async move {
        guest.greet().await;
        let mut asked = Vec::new();
        while let Some((_, message)) = guest.next().await {
            match message {
                HostMessage::Exec { id, request, .. } => {
                    asked.push((id, request.argv[0].clone()));
                    guest.send(&GuestMessage::Accepted { id }).await;
                }
                HostMessage::Go { id } => {
                    guest.send(&started(id)).await;
                    let at = asked.iter().position(|(own, _)| *own == id).unwrap();
                    let data = asked.swap_remove(at).1;
                    let stream = OutputStream::Stdout;
                    guest.send(&GuestMessage::Output { id, stream, data }).await;
                    let status = ExitStatus::Code(0);
                    guest.send(&GuestMessage::Exit { id, status }).await;
                }
                other => panic!("{other:?}"),
            }
        }
    });
    in_time(link.handshake(&greeting(), LIMIT)).await.unwrap();
    let link = std::sync::Arc::new(link);
    let tasks: Vec<_> = (0..100)
        .map(|number| {
            let link = std::sync::Arc::clone(&link);
            tokio::spawn(async move {
                let name = format!("command {number}");
                let request = ExecRequest {
                    argv: vec![name.as_str().into()],
                    ..ExecRequest::default()
                };
                let output = link.exec_capture(request, b"").await.unwrap();
                assert_eq!(String::from_utf8(output.stdout).unwrap(), name);
            })
        })
        .collect();
    for task in tasks {
        in_time(task).await.unwrap();
    }
    drop(link);
    busy.await.unwrap();
}

#[tokio::test]
async fn nothing_is_sent_before_a_handshake() {
    let (link, _guest) = Guest::pair();
    let found = link.exec_capture(request(), b"").await;
    assert!(
        matches!(found, Err(LinkError::Unsendable { .. })),
        "{found:?}"
    );
}
