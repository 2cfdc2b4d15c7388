//! Commands at a terminal, and with limits, through the real agent.
#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test may stop at the first surprise"
)]

mod common;

use common::{Agent, LIMIT, sh};
use stead_agent_link::{CommandEvent, ExecRequest, ExitStatus};
use stead_agent_proto::message::{Pty, Resource, ResourceLimit};

fn at_a_terminal(script: &str) -> ExecRequest {
    ExecRequest {
        pty: Some(Pty {
            rows: 24,
            cols: 80,
            term: "vt100".to_owned(),
        }),
        stdin: true,
        ..sh(script)
    }
}

/// Reads until all of it has been shown, and gives what was.
async fn shown(command: &mut stead_agent_link::Command, awaited: &str, seen: &mut String) {
    while !seen.contains(awaited) {
        let event = tokio::time::timeout(LIMIT, command.output.next()).await;
        match event.expect("in time").unwrap() {
            CommandEvent::Output { stream, data } => {
                command.output.consumed(stream, data.len());
                seen.push_str(&String::from_utf8_lossy(&data));
            }
            other => panic!("{awaited:?} before {other:?}; shown: {seen:?}"),
        }
    }
}

async fn ended(mut command: stead_agent_link::Command, seen: &mut String) -> ExitStatus {
    loop {
        let event = tokio::time::timeout(LIMIT, command.output.next()).await;
        match event.expect("in time").unwrap() {
            CommandEvent::Output { stream, data } => {
                command.output.consumed(stream, data.len());
                seen.push_str(&String::from_utf8_lossy(&data));
            }
            CommandEvent::Exit(status) => return status,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_command_at_a_terminal_has_its_size_its_kind_and_its_keys() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let script = "test -t 0 && test -t 1 && test -t 2 && echo \"$TERM\" && stty size && echo here >/dev/tty; \
        trap 'echo; stty size' WINCH; echo ready; while read line; do echo \"<$line>\"; done; echo end; exit 7";
    let mut command = link.start(at_a_terminal(script)).await.unwrap();
    let mut seen = String::new();
    shown(&mut command, "ready\r\n", &mut seen).await;
    assert_eq!(seen, "vt100\r\n24 80\r\nhere\r\nready\r\n");
    command.control.resize(50, 132);
    command.input.write(b"one\n").await.unwrap();
    shown(&mut command, "<one>", &mut seen).await;
    shown(&mut command, "50 132", &mut seen).await;
    command.input.write(b"two\n").await.unwrap();
    shown(&mut command, "<two>", &mut seen).await;
    // The end of input is typed where it stands at the beginning of a line.
    command.input.end().await.unwrap();
    shown(&mut command, "end\r\n", &mut seen).await;
    assert_eq!(ended(command, &mut seen).await, ExitStatus::Code(7));
}

#[tokio::test]
async fn the_interrupt_key_reaches_the_foreground_and_a_flood_is_whole_to_its_last_byte() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let mut command = link
        .start(at_a_terminal("echo ready; exec sleep 1000"))
        .await
        .unwrap();
    let mut seen = String::new();
    shown(&mut command, "ready", &mut seen).await;
    command.input.write(b"\x03").await.unwrap();
    assert_eq!(ended(command, &mut seen).await, ExitStatus::Signal(2));

    // Every byte of what a command wrote before it ended, however the kernel passes it on.
    for round in 0..5 {
        let request = at_a_terminal("stty -opost; seq 1 60000; printf last");
        let output = link.exec_capture(request, b"").await.unwrap();
        let expected: String = (1..=60000).map(|line| format!("{line}\n")).collect();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text == expected.clone() + "last",
            "round {round}: {} bytes",
            text.len()
        );
        assert_eq!(
            (output.status, output.stderr.len()),
            (ExitStatus::Code(0), 0)
        );
    }
}

#[tokio::test]
async fn a_daemon_that_keeps_the_terminal_does_not_keep_the_command() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let script = "trap '' HUP; setsid sleep 300 & echo $!; exit 3";
    let output = link.exec_capture(at_a_terminal(script), b"").await.unwrap();
    assert_eq!(output.status, ExitStatus::Code(3));
    let text = String::from_utf8(output.stdout).unwrap();
    let daemon: i32 = text.trim().parse().unwrap();
    let daemon = rustix::process::Pid::from_raw(daemon).unwrap();
    rustix::process::kill_process(daemon, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn limits_hold_for_the_command_and_no_other_and_a_wrong_one_is_named() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let limit = |resource, soft, hard| ResourceLimit {
        resource,
        soft,
        hard,
    };
    let mut request = sh("ulimit -n; ulimit -Hn; ulimit -t; ulimit -c");
    request.limits = vec![
        limit(Resource::OpenFiles, Some(50), Some(60)),
        limit(Resource::Cpu, Some(9), None),
        limit(Resource::Core, Some(0), Some(0)),
    ];
    let output = link.exec_capture(request, b"").await.unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "50\n60\n9\n0\n");
    // The agent's own many descriptors are not the command's.
    let output = link.exec_capture(sh("ulimit -n"), b"").await.unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "1024\n");

    let mut request = sh("true");
    request.limits = vec![limit(Resource::Stack, Some(2), Some(1))];
    let error = link.exec_capture(request, b"").await.unwrap_err();
    assert!(
        format!("{error:?}").contains("limit the stack to 2 (at most 1)"),
        "{error:?}"
    );
}
