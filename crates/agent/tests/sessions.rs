//! Lives, sessions and hosts that come and go, through the real agent.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test may stop at the first surprise"
)]

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use common::{Agent, LIMIT, RawHost, greeting, has_ended, read_number, sh, until};
use stead_agent_link::{
    AgentLink, CommandEvent, Epoch, ExecIo, ExecKey, ExitStatus, LinkError, Phase, PhaseOutcome,
    Reason,
};
use stead_agent_proto::message::*;
use tokio::sync::mpsc;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_reports_every_step_and_says_what_it_skipped() {
    let agent = Agent::start();
    let mut link = agent.link().await;
    let ready = link.handshake(&greeting(1), LIMIT).await.unwrap();
    let found: Vec<(Phase, bool)> = ready
        .phases
        .iter()
        .map(|report| (report.phase, report.outcome == PhaseOutcome::Done))
        .collect();
    let expected = [
        (Phase::Epoch, true),
        (Phase::Sessions, true),
        (Phase::FileSystems, false),
        (Phase::Clock, false),
        (Phase::Entropy, false),
        (Phase::Identity, false),
        (Phase::Ports, true),
    ];
    assert_eq!(found, expected);
    assert_eq!(ready.clock_behind_ns(), None);
    assert_eq!(ready.epoch, Epoch([1; 16]));
    assert_eq!(
        (ready.workload, ready.released),
        (WorkloadState::Running, false)
    );
    let early = link.exec_capture(sh("true"), b"").await;
    let held = LinkError::Rejected {
        reason: Rejection::NotReleased,
    };
    assert_eq!(early.unwrap_err().to_string(), held.to_string());
    link.release().await.unwrap();
    link.exec_capture(sh("true"), b"").await.unwrap();
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(ready.boot_id, boot_id.trim());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_fails_makes_no_session_and_names_itself() {
    let agent = Agent::start();
    let mut link = agent.link().await;
    let mut hostile = greeting(1);
    hostile.identity = Identity::Fork(Box::new(ForkIdentity {
        hostname: Some("no/such name".into()),
        ..ForkIdentity::default()
    }));
    let found = link.handshake(&hostile, LIMIT).await;
    match found {
        Err(LinkError::StepFailed {
            phase: Phase::Identity,
            error,
        }) => assert!(error.contains("no/such name"), "{error}"),
        other => panic!("{other:?}"),
    }
    let refused = link.exec_capture(sh("true"), b"").await;
    assert!(
        matches!(refused, Err(LinkError::Unsendable { .. })),
        "{refused:?}"
    );
    let attach = agent.link().await.reattach(Epoch([1; 16]), LIMIT).await;
    assert!(
        matches!(
            attach,
            Err(LinkError::StepFailed {
                phase: Phase::Epoch,
                ..
            })
        ),
        "{attach:?}"
    );
    agent
        .ready(1)
        .await
        .exec_capture(sh("true"), b"")
        .await
        .unwrap();
}

/// A request of a life that has passed, and its twin in the life that is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_of_an_older_epoch_is_not_run() {
    let agent = Agent::start();
    for (life_of_the_request, must_run) in [(1, false), (2, true)] {
        let note = agent
            .folder
            .path()
            .join(format!("ran-{life_of_the_request}"));
        let mut host = RawHost::connect(&agent, 1, 10);
        // Refused the second time: life 1 has passed then.
        if !must_run {
            host.ready(Reason::Restore);
        }
        // Another host begins life 2 on another port; the first knows nothing of it.
        let other = if must_run {
            agent.attached(2).await
        } else {
            agent.ready(2).await
        };
        if must_run {
            host.epoch = Epoch([2; 16]);
            host.nonce = stead_agent_proto::Nonce(11);
            host.ready(Reason::Reattach);
        }
        host.exec(2, sh(&format!("echo ran > {}", note.display())));
        if must_run {
            until("the command of the current life runs", || note.exists());
        } else {
            let end = Instant::now() + LIMIT;
            while other.ping().await.unwrap().stale_frames == 0 {
                assert!(
                    Instant::now() < end,
                    "the request was taken and is not counted as stale"
                );
            }
            assert!(!note.exists(), "a command of life 1 ran in life 2");
        }
    }
}

/// The fault that was seen: half a request from before a capture, then a new host with a request of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_a_request_and_a_new_one_are_never_one_command() {
    let agent = Agent::start();
    let note = agent.folder.path().join("half");
    let old = sh(&format!("echo old >> {}", note.display()));
    let new = sh(&format!("echo new >> {}", note.display()));
    let mut sample = RawHost::connect(&agent, 1, 10);
    sample.seq = 1;
    let length = sample
        .frame(&common::exec_message(2, 10, old.clone()))
        .len();
    let mut runs = 0;
    for cut in (0..length).step_by(3) {
        let mut host = RawHost::connect(&agent, (cut % 250) as u8 + 1, 10);
        host.epoch.0[1] = (cut / 250) as u8;
        host.ready(Reason::Restore);
        let request = host.frame(&common::exec_message(2, 10, old.clone()));
        host.stream.write_all(&request[..cut]).unwrap();
        // The same stream goes on with another life, as after a restore.
        host.epoch.0[2] = 1;
        host.nonce.0 += 1 + cut as u64;
        host.ready(Reason::Restore);
        host.exec(2, new.clone());
        while !matches!(
            host.next(),
            Some(GuestMessage::Exit {
                status: ExitStatus::Code(0),
                ..
            })
        ) {}
        runs += 1;
    }
    let found = std::fs::read_to_string(&note).unwrap();
    assert_eq!(
        found,
        "new\n".repeat(runs),
        "the old command never ran and the new one always once"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_goes_on_when_the_host_disconnects_and_the_end_of_its_output_is_kept() {
    let agent = Agent::start();
    let note = agent.folder.path().join("done");
    let link = agent.ready(1).await;
    // Far more output than pipe and credit hold: it would block for ever if nobody read it.
    let script = format!(
        "head -c 5000000 /dev/zero; head -c 5000000 /dev/zero >&2; echo done > {}",
        note.display()
    );
    let running = link.start(sh(&script)).await.unwrap();
    let key = running.key;
    drop((link, running));
    until("the command comes to its end", || note.exists());
    let next = agent.attached(1).await;
    let output = next.exec_capture(sh("echo clean"), b"").await.unwrap();
    assert_eq!(output.stdout, b"clean\n");
    let again = next.attach(key, [0, 0]).await.unwrap();
    let first = again.attachment.unwrap().first;
    assert_eq!(first, [5_000_000 - 65536; 2], "what was dropped is counted");
    let mut kept = Vec::new();
    let (_sender, signals) = mpsc::channel(1);
    let io = ExecIo {
        stdin: tokio::io::empty(),
        stdout: &mut kept,
        stderr: tokio::io::sink(),
    };
    assert_eq!(again.run(io, signals).await.unwrap(), ExitStatus::Code(0));
    assert_eq!(kept.len(), 65536);
    until("it is forgotten", || {
        !std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid()))
            .unwrap_or_default()
            .contains(' ')
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_an_input_is_never_taken_for_a_whole_one_when_the_host_disconnects() {
    let agent = Agent::start();
    let folder = agent.folder.path().to_owned();
    let link = agent.ready(1).await;
    let script = format!(
        "echo $$ > {0}/pid; cat > {0}/part; mv {0}/part {0}/whole",
        folder.display()
    );
    let request = ExecRequest {
        stdin: true,
        ..sh(&script)
    };
    let running = link.start(request).await.unwrap();
    let (mut typed, stdin) = tokio::io::duplex(100);
    let (_sender, signals) = mpsc::channel(1);
    let io = ExecIo {
        stdin,
        stdout: tokio::io::sink(),
        stderr: tokio::io::sink(),
    };
    let part = folder.join("part");
    tokio::select! {
        found = running.run(io, signals) => panic!("{found:?}"),
        () = async {
            tokio::io::AsyncWriteExt::write_all(&mut typed, b"half").await.unwrap();
            while std::fs::read(&part).unwrap_or_default() != b"half" {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        } => {}
    }
    drop(link);
    let next = agent.attached(1).await;
    let end = Instant::now() + LIMIT;
    while next.ping().await.unwrap().detached_commands != 1 {
        assert!(Instant::now() < end, "the command is still heard");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // What it was told when its host left has had time to reach it.
    next.exec_capture(sh("sleep 0.3"), b"").await.unwrap();
    assert!(
        !folder.join("whole").exists(),
        "the command was told that half was all"
    );
    let pid = read_number(&folder.join("pid")).unwrap();
    next.exec_capture(sh(&format!("kill -9 -{pid}")), b"")
        .await
        .unwrap();
    until("it can be ended", || has_ended(pid));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_life_in_the_middle_of_a_command_silences_it() {
    let agent = Agent::start();
    let note = agent.folder.path().join("end");
    let mut host = RawHost::connect(&agent, 1, 10);
    host.ready(Reason::Boot);
    host.exec(
        2,
        sh(&format!(
            "i=0; while [ $i -lt 3000 ]; do echo old line; i=$((i+1)); done; echo end > {}",
            note.display()
        )),
    );
    assert_eq!(host.next(), Some(GuestMessage::Accepted { id: 2 }));
    assert!(matches!(
        host.next(),
        Some(GuestMessage::Started { id: 2, .. })
    ));
    host.epoch = Epoch([2; 16]);
    host.nonce = stead_agent_proto::Nonce(20);
    host.ready(Reason::Fork);
    until("the command goes on to its end", || note.exists());
    host.exec(2, sh("echo new"));
    assert_eq!(host.next(), Some(GuestMessage::Accepted { id: 2 }));
    assert!(matches!(
        host.next(),
        Some(GuestMessage::Started { id: 2, .. })
    ));
    let (mut stdout, mut last) = (Vec::new(), host.next());
    while let Some(GuestMessage::Output { data, .. }) = last {
        stdout.extend(data.0);
        last = host.next();
    }
    assert_eq!(
        last,
        Some(GuestMessage::Exit {
            id: 2,
            status: ExitStatus::Code(0)
        })
    );
    assert_eq!(stdout, b"new\n", "not a line of the old command");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_life_ends_the_sessions_of_all_ports() {
    let agent = Agent::start();
    let first = agent.ready(1).await;
    let second = agent.attached(1).await;
    let _third = agent.ready(2).await;
    for link in [&first, &second] {
        let found = link.exec_capture(sh("true"), b"").await;
        // It is told why, unless it asks before it has been told.
        let told = match &found {
            Err(LinkError::Protocol { source, .. }) => {
                source.to_string().contains("another epoch began")
            }
            Err(LinkError::Abandoned { .. }) => true,
            _ => false,
        };
        assert!(told, "{found:?}");
    }
    let found = agent.link().await.reattach(Epoch([1; 16]), LIMIT).await;
    assert!(
        matches!(&found, Err(LinkError::StepFailed { error, .. }) if error.contains("current epoch")),
        "{found:?}"
    );
    let found = agent.link().await.handshake(&greeting(1), LIMIT).await;
    assert!(
        matches!(&found, Err(LinkError::StepFailed { error, .. }) if error.contains("has passed")),
        "{found:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_commands_run_at_once_over_one_link_and_none_waits_for_another() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let fifo = agent.folder.path().join("fifo");
    let make = sh(&format!("mkfifo {}", fifo.display()));
    link.exec_capture(make, b"").await.unwrap();
    // Nobody reads what these write: they stand at the end of their credit.
    let flood = sh("exec cat /dev/zero");
    let mut floods = Vec::new();
    for _ in 0..20 {
        floods.push(link.start(flood.clone()).await.unwrap());
    }
    let waiting = sh(&format!("cat {}", fifo.display()));
    let waiting = link.exec_capture(waiting, b"");
    let others = async {
        let twenty = (0..20).map(|number| {
            let link = &link;
            async move {
                let script = format!("head -c 300000 /dev/zero; echo {number}");
                let output = link.exec_capture(sh(&script), b"").await.unwrap();
                let end = format!("{number}\n");
                assert!(output.stdout.ends_with(end.as_bytes()));
                assert_eq!(output.stdout.len(), 300_000 + end.len());
            }
        });
        let mut all: Vec<_> = twenty.map(Box::pin).collect();
        std::future::poll_fn(|context| {
            all.retain_mut(|one| one.as_mut().poll(context).is_pending());
            if all.is_empty() {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
        let answer = sh(&format!("echo at last > {}", fifo.display()));
        link.exec_capture(answer, b"").await.unwrap();
    };
    let (output, ()) = tokio::join!(waiting, others);
    assert_eq!(output.unwrap().stdout, b"at last\n");
    assert_eq!(link.ping().await.unwrap().attached_commands, 20);
    for flood in &floods {
        flood.control.signal(9);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_is_run_once_however_often_it_is_asked_for() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let note = agent.folder.path().join("runs");
    let request = sh(&format!("echo run >> {}; exit 3", note.display()));
    let (key, life) = (ExecKey([9; 16]), Epoch([1; 16]));
    assert_eq!(link.query(key, life).await.unwrap(), CommandState::NotRun);
    let first = link.start_as(key, None, request.clone()).await.unwrap();
    let (_sender, signals) = mpsc::channel(1);
    let io = ExecIo {
        stdin: tokio::io::empty(),
        stdout: tokio::io::sink(),
        stderr: tokio::io::sink(),
    };
    assert_eq!(first.run(io, signals).await.unwrap(), ExitStatus::Code(3));
    // By the same host, by another, and in another life of which the first is the past.
    let ended = CommandState::Ended(ExitStatus::Code(3));
    let second = agent.attached(1).await;
    for asker in [&link, &second] {
        let again = asker.start_as(key, Some(life), request.clone()).await;
        assert!(
            matches!(again, Err(LinkError::Known { state }) if state == ended),
            "{again:?}"
        );
    }
    let next = agent.ready(2).await;
    let again = next.start_as(key, None, request.clone()).await;
    assert!(
        matches!(again, Err(LinkError::Known { state }) if state == ended),
        "{again:?}"
    );
    assert_eq!(std::fs::read_to_string(&note).unwrap(), "run\n");
    let listed = next.list().await.unwrap().entries;
    assert_eq!((listed[0].key, listed[0].state), (key, ended));
    // Of a life that this agent never lived it knows nothing, and says so.
    let unknown = next.query(ExecKey([8; 16]), Epoch([7; 16])).await.unwrap();
    assert_eq!(unknown, CommandState::Forgotten);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_is_attached_to_goes_on_where_it_was_left_and_its_host_is_told() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let request = ExecRequest {
        stdin: true,
        ..sh("while read -r line; do echo \"<$line>\"; done; echo end")
    };
    let mut first = link.start(request).await.unwrap();
    assert!(first.input.write(b"one\n").await.unwrap());
    assert_eq!(text(&mut first).await, "<one>\n");
    let other = agent.attached(1).await;
    let mut second = other.attach(first.key, [1, 0]).await.unwrap();
    let at = second.attachment.unwrap();
    assert_eq!((at.first, at.stdin.unwrap().received), ([1, 0], 4));
    assert!(matches!(
        first.output.next().await,
        Ok(CommandEvent::Detached { .. })
    ));
    assert!(!first.input.write(b"lost\n").await.unwrap());
    assert_eq!(text(&mut second).await, "one>\n");
    assert!(second.input.write(b"two\n").await.unwrap());
    assert_eq!(text(&mut second).await, "<two>\n");
    second.input.end().await.unwrap();
    assert_eq!(text(&mut second).await, "end\n");
    assert!(matches!(
        second.output.next().await,
        Ok(CommandEvent::Exit(ExitStatus::Code(0)))
    ));
}

/// The next that a command says on its standard output.
async fn text(command: &mut stead_agent_link::Command) -> String {
    match command.output.next().await {
        Ok(CommandEvent::Output { stream, data }) => {
            command.output.consumed(stream, data.len());
            String::from_utf8(data).unwrap()
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_was_not_told_to_go_is_not_run_when_its_host_leaves() {
    let agent = Agent::start();
    let note = agent.folder.path().join("ran");
    let mut host = RawHost::connect(&agent, 1, 10);
    host.ready(Reason::Boot);
    let request = sh(&format!("echo ran > {}", note.display()));
    let message = common::exec_message(2, 10, request);
    let HostMessage::Exec { key, .. } = message else {
        panic!("{message:?}");
    };
    host.send(&message);
    assert_eq!(host.next(), Some(GuestMessage::Accepted { id: 2 }));
    drop(host);
    let next = agent.attached(1).await;
    let state = next.query(key, Epoch([1; 16])).await.unwrap();
    assert_eq!(state, CommandState::NotRun);
    next.exec_capture(sh("sleep 0.1"), b"").await.unwrap();
    assert!(!note.exists());
}

#[test]
fn a_host_that_breaks_the_protocol_loses_its_session_and_nothing_else() {
    let mut agent = Agent::start();
    let stdin = |id, bytes: usize| HostMessage::Stdin {
        id,
        data: vec![1; bytes].into(),
    };
    let hostile: Vec<(&str, Vec<HostMessage>)> = vec![
        ("input for nobody", vec![stdin(9, 5)]),
        (
            "a signal out of range",
            vec![HostMessage::Signal { id: 1, signal: 99 }],
        ),
        (
            "a request number twice",
            vec![
                HostMessage::Request {
                    id: 5,
                    request: Request::Ping,
                },
                HostMessage::Request {
                    id: 5,
                    request: Request::Ping,
                },
            ],
        ),
    ];
    for (nonce, (what, messages)) in (10..).zip(hostile) {
        let mut host = RawHost::connect(&agent, 1, nonce);
        host.ready(Reason::Boot);
        for message in &messages {
            host.send(message);
        }
        while !matches!(
            host.next().unwrap_or_else(|| panic!("{what}: no answer")),
            GuestMessage::SessionBroken { .. }
        ) {}
        host.nonce.0 += 1000;
        host.ready(Reason::Reattach);
    }
    let pid = agent.folder.path().join("pid");
    let mut host = RawHost::connect(&agent, 1, 77);
    host.ready(Reason::Reattach);
    host.exec(
        2,
        ExecRequest {
            stdin: true,
            ..sh(&format!("echo $$ > {}; exec sleep 100", pid.display()))
        },
    );
    assert!(matches!(host.next(), Some(GuestMessage::Accepted { .. })));
    assert!(matches!(host.next(), Some(GuestMessage::Started { .. })));
    // The pipe takes 64 KiB, which are granted once more; the rest is over the grant.
    for _ in 0..12 {
        host.send(&stdin(2, 32 * 1024));
    }
    let mut broken = host.next();
    while let Some(GuestMessage::StdinCredit { .. }) = broken {
        broken = host.next();
    }
    assert!(
        matches!(&broken, Some(GuestMessage::SessionBroken { reason }) if reason.contains("granted")),
        "{broken:?}"
    );
    assert!(agent.is_alive());
    // The command goes on unheard; it is not left behind.
    until("the command runs", || read_number(&pid).is_some());
    let pid = read_number(&pid).unwrap();
    host.nonce.0 += 1000;
    host.ready(Reason::Reattach);
    host.exec(2, sh(&format!("kill -9 {pid}")));
    until("it is ended", || has_ended(pid));
}

#[test]
fn a_host_that_never_reads_costs_the_agent_no_memory() {
    let mut agent = Agent::start();
    let mut host = RawHost::connect(&agent, 1, 10);
    host.ready(Reason::Boot);
    host.stream.set_write_timeout(Some(LIMIT)).unwrap();
    let before = agent.resident_kib();
    for _ in 0..100 {
        let mut flood = Vec::new();
        for _ in 0..3000 {
            let id = host.seq;
            flood.extend(host.frame(&HostMessage::Request {
                id,
                request: Request::Ping,
            }));
        }
        host.stream
            .write_all(&flood)
            .expect("the agent reads on, whatever its writer waits for");
    }
    let grown = agent.resident_kib().saturating_sub(before);
    assert!(grown < 3 * 1024, "the agent grew by {grown} KiB");
    assert!(agent.is_alive());
    let mut last = host.next();
    while !matches!(last, Some(GuestMessage::SessionBroken { .. })) {
        assert!(last.is_some(), "the session was not ended");
        last = host.next();
    }
    let mut other = RawHost::connect(&agent, 2, 5);
    other.ready(Reason::Restore);
}

#[test]
fn garbage_in_any_amount_is_survived() {
    let mut agent = Agent::start();
    let mut host = RawHost::connect(&agent, 1, 10);
    let before = agent.resident_kib();
    let mut state = 7u64;
    let mut noise = vec![0; 1 << 20];
    for round in 0..24 {
        for byte in &mut noise {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            // Every third round without a zero: a run longer than any frame.
            *byte = ((state >> 56) as u8).max(u8::from(round % 3 == 0));
        }
        host.stream.write_all(&noise).unwrap();
    }
    host.stream.write_all(&[0]).unwrap();
    host.ready(Reason::Boot);
    assert!(agent.resident_kib().saturating_sub(before) < 2 * 1024);
    assert!(agent.is_alive());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_given_as_standard_input_is_served_until_it_ends() {
    let (own, other) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_stead-agent"))
        .args([
            "serve",
            "--stdin-socket",
            "--no-clock",
            "--no-entropy",
            "--no-hostname",
        ])
        .stdin(std::process::Stdio::from(std::os::fd::OwnedFd::from(other)))
        .spawn()
        .unwrap();
    own.set_nonblocking(true).unwrap();
    let mut link =
        stead_agent_link::AgentLink::from_stream(tokio::net::UnixStream::from_std(own).unwrap());
    link.handshake(&greeting(1), LIMIT).await.unwrap();
    link.release().await.unwrap();
    assert_eq!(
        link.exec_capture(sh("echo here"), b"")
            .await
            .unwrap()
            .stdout,
        b"here\n"
    );
    drop(link);
    let end = Instant::now() + LIMIT;
    while child.try_wait().unwrap().is_none() {
        assert!(
            Instant::now() < end,
            "the agent does not end with its connection"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A freezer that keeps a diary, and fails where it is told to.
fn freezer(agent_folder: &std::path::Path) -> (String, String) {
    let script = format!(
        r#"#!/bin/sh
echo "$1 $2" >> {0}/diary
told() {{ [ -e {0}/$3 ] && grep -qxF -e "$1 $2" {0}/$3; }}
if told "$1" "$2" hang; then exec sleep 1000; fi
if told "$1" "$2" einval; then echo "$2: unfreeze failed: Invalid argument" >&2; exit 1; fi
if told "$1" "$2" fail; then echo refused >&2; exit 1; fi
"#,
        agent_folder.display()
    );
    let program = agent_folder.join("freezer");
    let mounts = agent_folder.join("mounts");
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&program)
        .unwrap();
    file.write_all(script.as_bytes()).unwrap();
    drop(file);
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(&mounts)
        .unwrap();
    file.write_all(b"1 0 254:1 / / rw - ext4 /dev/vda rw\n2 1 254:2 / /data rw - xfs /dev/vdb rw\n3 1 254:3 / /boot rw - vfat /dev/vdc rw\n4 1 254:4 / /deep rw - ext4 /dev/vdd rw\n").unwrap();
    (program.display().to_string(), mounts.display().to_string())
}

struct Frosty {
    agent: Agent,
    folder: tempfile::TempDir,
}

impl Frosty {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (program, mounts) = freezer(folder.path());
        let agent = Agent::start_with(&[
            "--no-clock",
            "--no-entropy",
            "--no-hostname",
            "--freeze-program",
            &program,
            "--mounts",
            &mounts,
        ]);
        Self { agent, folder }
    }

    fn diary(&self) -> Vec<String> {
        let mut text = String::new();
        if let Ok(mut file) = std::fs::File::open(self.folder.path().join("diary")) {
            file.read_to_string(&mut text).unwrap();
        }
        text.lines().map(str::to_owned).collect()
    }

    /// From now on these steps fail, one a line, and no others.
    fn fail_at(&self, steps: &str) {
        self.note("fail", steps);
    }

    /// From now on these steps find that nothing is frozen.
    fn nothing_frozen_at(&self, steps: &str) {
        self.note("einval", steps);
    }

    /// From now on these steps hang.
    fn hang_at(&self, steps: &str) {
        self.note("hang", steps);
    }

    fn note(&self, name: &str, steps: &str) {
        let mut file = tempfile::NamedTempFile::new_in(self.folder.path()).unwrap();
        writeln!(file, "{steps}").unwrap();
        file.persist(self.folder.path().join(name)).unwrap();
    }

    async fn until_thawed(&self, link: &AgentLink) {
        let end = Instant::now() + LIMIT;
        while link.ping().await.unwrap().frozen {
            assert!(Instant::now() < end, "it stays frozen: {:?}", self.diary());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

const FREEZE: [&str; 3] = ["--freeze /deep", "--freeze /data", "--freeze /"];
const THAW: [&str; 3] = ["--unfreeze /", "--unfreeze /data", "--unfreeze /deep"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_freeze_covers_every_file_system_and_a_thaw_undoes_it() {
    let frosty = Frosty::start();
    let link = frosty.agent.ready(1).await;
    let frozen = link.freeze(Duration::from_secs(20)).await.unwrap();
    assert_eq!(
        frozen.mounts,
        [b"/deep".to_vec(), b"/data".to_vec(), b"/".to_vec()]
    );
    assert_eq!(frozen.unsupported, [b"/boot".to_vec()]);
    assert!(link.ping().await.unwrap().frozen);
    let refused = link.exec_capture(sh("true"), b"").await;
    assert!(
        matches!(
            refused,
            Err(LinkError::Rejected {
                reason: Rejection::Frozen
            })
        ),
        "{refused:?}"
    );
    link.thaw().await.unwrap();
    assert_eq!(frosty.diary(), [FREEZE, THAW].concat());
    link.exec_capture(sh("true"), b"").await.unwrap();
    let again = link.thaw().await;
    assert!(
        matches!(again, Err(LinkError::RequestFailed { .. })),
        "{again:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_freeze_that_fails_half_way_leaves_nothing_frozen() {
    for at in 0..FREEZE.len() {
        let frosty = Frosty::start();
        let link = frosty.agent.ready(1).await;
        frosty.fail_at(FREEZE[at]);
        let found = link.freeze(Duration::from_secs(20)).await;
        assert!(
            matches!(&found, Err(LinkError::RequestFailed { error, .. }) if error.contains("refused") && error.contains("thawed again")),
            "{found:?}"
        );
        let mut expected = FREEZE[..=at].to_vec();
        expected.extend(&THAW[THAW.len() - at..]);
        assert_eq!(
            frosty.diary(),
            expected,
            "all that was frozen is thawed, and only that"
        );
        assert!(!link.ping().await.unwrap().frozen);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_freeze_ends_by_itself_when_time_is_over_the_host_leaves_or_another_life_begins() {
    for cause in ["time", "host", "life"] {
        let frosty = Frosty::start();
        let link = frosty.agent.ready(1).await;
        let limit = if cause == "time" {
            Duration::from_millis(200)
        } else {
            Duration::from_secs(60)
        };
        link.freeze(limit).await.unwrap();
        let next = match cause {
            "time" => link,
            "host" => {
                drop(link);
                frosty.agent.attached(1).await
            }
            _ => {
                let mut next = frosty.agent.link().await;
                let ready = next.handshake(&greeting(2), LIMIT).await.unwrap();
                let thaw = ready
                    .phases
                    .iter()
                    .find(|report| report.phase == Phase::FileSystems)
                    .unwrap();
                assert_eq!(thaw.outcome, PhaseOutcome::Done, "ready means thawed");
                assert_eq!(frosty.diary(), [FREEZE, THAW].concat());
                next.release().await.unwrap();
                next
            }
        };
        until("thawed", || frosty.diary().len() == 6);
        assert_eq!(frosty.diary(), [FREEZE, THAW].concat(), "{cause}");
        while next.ping().await.unwrap().frozen {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let found = next.thaw().await;
        assert!(
            matches!(&found, Err(LinkError::RequestFailed { error, .. }) if error.contains("not frozen")),
            "{cause}: {found:?}"
        );
        next.exec_capture(sh("true"), b"").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thaw_that_fails_is_said_and_tried_again() {
    let frosty = Frosty::start();
    let link = frosty.agent.ready(1).await;
    link.freeze(Duration::from_secs(60)).await.unwrap();
    frosty.fail_at("--unfreeze /data");
    let found = link.thaw().await;
    assert!(
        matches!(&found, Err(LinkError::RequestFailed { error, .. }) if error.contains("/data")),
        "{found:?}"
    );
    assert!(link.ping().await.unwrap().frozen);
    let diary_of_failure = frosty.diary().len();
    let refused = frosty
        .agent
        .link()
        .await
        .handshake(&greeting(2), LIMIT)
        .await;
    assert!(
        matches!(
            &refused,
            Err(LinkError::StepFailed {
                phase: Phase::FileSystems,
                ..
            })
        ),
        "never ready while frozen: {refused:?}"
    );
    // Nobody asks any more, and it is thawed as soon as it can be.
    frosty.fail_at("nothing");
    until("it is tried again", || {
        frosty.diary().len() > diary_of_failure
            && frosty.diary().last().map(String::as_str) == Some("--unfreeze /data")
    });
    let next = frosty.agent.ready(2).await;
    frosty.until_thawed(&next).await;
    next.exec_capture(sh("true"), b"").await.unwrap();
}

/// As after the kernel's emergency thaw, or when a thaw that was killed came to its end after all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_system_that_is_not_frozen_any_more_counts_as_thawed() {
    let frosty = Frosty::start();
    let link = frosty.agent.ready(1).await;
    link.freeze(Duration::from_secs(60)).await.unwrap();
    frosty.nothing_frozen_at("--unfreeze /data");
    link.thaw().await.unwrap();
    assert!(!link.ping().await.unwrap().frozen);
    link.exec_capture(sh("true"), b"").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_freeze_that_fails_and_cannot_be_undone_is_said_to_be_frozen_and_undone_later() {
    let frosty = Frosty::start();
    let link = frosty.agent.ready(1).await;
    frosty.fail_at("--freeze /\n--unfreeze /deep");
    let found = link.freeze(Duration::from_secs(60)).await;
    assert!(
        matches!(&found, Err(LinkError::RequestFailed { error, .. }) if error.contains("could not be thawed") && error.contains("/deep")),
        "{found:?}"
    );
    assert!(link.ping().await.unwrap().frozen, "/deep is frozen");
    let refused = link.exec_capture(sh("true"), b"").await;
    assert!(
        matches!(
            refused,
            Err(LinkError::Rejected {
                reason: Rejection::Frozen
            })
        ),
        "a command could hang in its first write: {refused:?}"
    );
    frosty.fail_at("nothing");
    frosty.until_thawed(&link).await;
    link.exec_capture(sh("true"), b"").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_freeze_that_hangs_is_killed_and_its_file_system_is_thawed_like_the_others() {
    let frosty = Frosty::start();
    let link = frosty.agent.ready(1).await;
    frosty.hang_at("--freeze /data");
    let found = link.freeze(Duration::from_secs(60)).await;
    assert!(
        matches!(&found, Err(LinkError::RequestFailed { error, .. }) if error.contains("/data") && error.contains("not done within")),
        "{found:?}"
    );
    assert_eq!(
        frosty.diary(),
        [&FREEZE[..2], &THAW[1..]].concat(),
        "the kernel may have come to the end of what was killed"
    );
    assert!(!link.ping().await.unwrap().frozen);
    let left = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", frosty.agent.pid()));
    assert_eq!(left.unwrap(), "", "it was reaped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_on_a_socket_neither_freezes_nor_shuts_down_the_machine() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let found = link.freeze(Duration::from_secs(1)).await;
    assert!(
        matches!(found, Err(LinkError::RequestFailed { .. })),
        "{found:?}"
    );
    let found = link.shutdown(ShutdownKind::Poweroff).await;
    assert!(
        matches!(found, Err(LinkError::RequestFailed { .. })),
        "{found:?}"
    );
}
