//! Commands through the real agent: streams, ends, signals, time, users.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;

use std::time::{Duration, Instant};

use common::{Agent, LIMIT, has_ended, read_number, sh, until};
use stead_agent_link::{ExecIo, ExecRequest, ExitStatus, LinkError, Rejection};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn output_input_and_exit_codes_come_through() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    for code in [0, 1, 42, 255] {
        let script = format!("cat; echo out; echo err >&2; exit {code}");
        let output = link.exec_capture(sh(&script), b"in ").await.unwrap();
        assert_eq!(output.status, ExitStatus::Code(code));
        assert_eq!(output.stdout, b"in out\n");
        assert_eq!(output.stderr, b"err\n");
    }
    let killed = link.exec_capture(sh("kill -9 $$"), b"").await.unwrap();
    assert_eq!(killed.status, ExitStatus::Signal(9));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn megabytes_go_in_and_come_back_unchanged() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let mut state = 1u64;
    let input: Vec<u8> = std::iter::repeat_with(|| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
    .take(9_000_001)
    .collect();
    let output = link.exec_capture(sh("cat"), &input).await.unwrap();
    assert_eq!(output.status, ExitStatus::Code(0));
    assert!(
        output.stdout == input,
        "{} bytes came back",
        output.stdout.len()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_ignores_its_input_ends_all_the_same() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let input = vec![b'x'; 4_000_000];
    let output = link
        .exec_capture(
            sh("head -c 5; exec 0<&-; echo; sleep 0.1; echo done"),
            &input,
        )
        .await
        .unwrap();
    assert_eq!(output.stdout, b"xxxxx\ndone\n");
    let next = link.exec_capture(sh("echo next"), b"").await.unwrap();
    assert_eq!(
        next.stdout, b"next\n",
        "nothing of the earlier input is left over"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn environment_folder_and_arguments_are_those_of_the_request() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let odd: &[u8] = b"\xff\xfe not text";
    let request = ExecRequest {
        argv: vec![
            "sh".into(),
            "-c".into(),
            "pwd; printf '%s|' \"$A\" \"$PATH\" \"$HOME\" \"$1\"; env | wc -l".into(),
            "sh".into(),
            odd.into(),
        ],
        env: vec![
            ("A".into(), "one = two".into()),
            ("PATH".into(), "/usr/bin:/bin".into()),
        ],
        cwd: Some("/usr".into()),
        ..ExecRequest::default()
    };
    let output = link.exec_capture(request, b"").await.unwrap();
    let expected = [&b"/usr\none = two|/usr/bin:/bin|/root|"[..], odd, b"|"].concat();
    assert!(
        output.stdout.starts_with(&expected),
        "{:?}",
        String::from_utf8_lossy(&output.stdout)
    );
    let rest = String::from_utf8_lossy(&output.stdout[expected.len()..])
        .trim()
        .parse::<u32>()
        .unwrap();
    assert!(
        rest <= 9,
        "nothing of the agent's own environment is inherited: {rest} variables"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_runs_as_the_user_it_is_given_with_that_user_s_groups() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let as_user = |user: &str| ExecRequest {
        user: Some(user.into()),
        ..sh(
            "id -u; id -g; id -G; cat /proc/self/oom_score_adj; ps -o sid= -p $$ | tr -d ' '; echo $$",
        )
    };
    let output = link.exec_capture(as_user("nobody"), b"").await.unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..4], ["65534", "65534", "65534", "0"], "{text}");
    assert_eq!(lines[4], lines[5], "it leads a session of its own");
    let output = link
        .exec_capture(as_user("1234:daemon"), b"")
        .await
        .unwrap();
    assert!(output.stdout.starts_with(b"1234\n1\n1\n"), "{output:?}");
    let refused = link.exec_capture(as_user("no-such-user"), b"").await;
    assert!(
        matches!(&refused, Err(LinkError::Rejected { reason: Rejection::Invalid(why) }) if why.contains("no-such-user")),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_started_is_rejected_with_the_reason_and_the_link_goes_on() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let request = |argv: &str| ExecRequest {
        argv: vec![argv.into()],
        ..ExecRequest::default()
    };
    for (program, errno) in [("/no/such/program", 2), ("/etc/passwd", 13), ("/tmp", 13)] {
        let found = link.exec_capture(request(program), b"").await;
        match found {
            Err(LinkError::Rejected {
                reason: Rejection::Start { errno: found, step },
            }) => {
                assert_eq!(found, errno, "{step}");
                assert!(step.contains(program), "{step}");
            }
            other => panic!("{program}: {other:?}"),
        }
    }
    let no_folder = ExecRequest {
        cwd: Some("/no/such/folder".into()),
        ..sh("true")
    };
    let found = link.exec_capture(no_folder, b"").await;
    assert!(
        matches!(
            &found,
            Err(LinkError::Rejected {
                reason: Rejection::Start { errno: 2, .. }
            })
        ),
        "{found:?}"
    );
    for hostile in [
        ExecRequest::default(),
        request(""),
        request("a\0b"),
        ExecRequest {
            env: vec![("".into(), "".into())],
            ..sh("true")
        },
    ] {
        let found = link.exec_capture(hostile, b"").await;
        assert!(
            matches!(
                &found,
                Err(LinkError::Rejected {
                    reason: Rejection::Invalid(_)
                })
            ),
            "{found:?}"
        );
    }
    let too_large = ExecRequest {
        env: vec![("A".into(), vec![b'x'; 70_000].into())],
        ..sh("true")
    };
    let found = link.exec_capture(too_large, b"").await;
    assert!(
        matches!(&found, Err(LinkError::Unsendable { .. })),
        "{found:?}"
    );
    assert_eq!(
        link.exec_capture(sh("echo on"), b"").await.unwrap().stdout,
        b"on\n"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signals_reach_the_whole_group() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let (sender, signals) = mpsc::channel(4);
    let (mut reader, stdout) = tokio::io::duplex(1024);
    let script = "trap 'echo main' USR1; (trap 'echo child; exit' USR1; echo up; while :; do sleep 0.02; done) & wait; wait; exit 7";
    let io = ExecIo {
        stdin: tokio::io::empty(),
        stdout,
        stderr: tokio::io::sink(),
    };
    let running = link.start(sh(script)).await.unwrap();
    let watcher = async {
        let mut text = Vec::new();
        reader.read_exact(&mut [0; 3]).await.unwrap();
        sender.send(10).await.unwrap();
        reader.read_to_end(&mut text).await.unwrap();
        text
    };
    let (status, text) = tokio::join!(running.run(io, signals), watcher);
    assert_eq!(status.unwrap(), ExitStatus::Code(7));
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("main") && text.contains("child"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_over_its_time_is_killed_with_its_group() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let note = agent.folder.path().join("child");
    let script = format!(
        "trap '' TERM INT HUP; sleep 1000 & echo $! > {}; echo begun; wait",
        note.display()
    );
    let begin = Instant::now();
    let request = ExecRequest {
        timeout_ms: 3000,
        ..sh(&script)
    };
    let output = link.exec_capture(request, b"").await.unwrap();
    assert_eq!(output.status, ExitStatus::TimedOut);
    assert_eq!(
        output.stdout, b"begun\n",
        "what was written before is delivered"
    );
    assert!(begin.elapsed() >= Duration::from_secs(3));
    let child = read_number(&note).unwrap();
    until("the child ends", || has_ended(child));
    assert_eq!(
        link.exec_capture(sh("echo on"), b"").await.unwrap().stdout,
        b"on\n"
    );
}

/// Thousands of folders to look for the program in take longer than the command has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_that_is_over_before_the_program_was_found_is_time_that_is_over() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let request = ExecRequest {
        argv: vec!["no-such-program".into()],
        env: vec![("PATH".into(), "/n:".repeat(20_000).as_bytes().into())],
        timeout_ms: 1,
        ..ExecRequest::default()
    };
    let output = link.exec_capture(request, b"").await.unwrap();
    assert_eq!(output.status, ExitStatus::TimedOut);
    until("nothing of it is left", || {
        std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid()))
            .unwrap_or_default()
            .is_empty()
    });
    let next = link.exec_capture(sh("echo on"), b"").await.unwrap();
    assert_eq!(next.stdout, b"on\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_gets_everything_and_costs_the_agent_no_memory() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let total: usize = 48 << 20;
    let (mut reader, stdout) = tokio::io::duplex(64 * 1024);
    let io = ExecIo {
        stdin: tokio::io::empty(),
        stdout,
        stderr: tokio::io::sink(),
    };
    let (_sender, signals) = mpsc::channel(1);
    let before = agent.resident_kib();
    let running = link
        .start(sh(&format!("head -c {total} /dev/zero")))
        .await
        .unwrap();
    let slow = async {
        let (mut buffer, mut found, mut most) = (vec![0; 64 * 1024], 0, 0);
        for round in 0.. {
            let count = reader.read(&mut buffer).await.unwrap();
            if count == 0 {
                break;
            }
            found += count;
            if round < 40 {
                tokio::time::sleep(Duration::from_millis(10)).await;
                most = most.max(agent.resident_kib());
            }
        }
        (found, most)
    };
    let (status, (found, most)) = tokio::join!(running.run(io, signals), slow);
    assert_eq!(status.unwrap(), ExitStatus::Code(0));
    assert_eq!(found, total);
    let grown = most.saturating_sub(before);
    assert!(grown < 4 * 1024, "the agent grew by {grown} KiB");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exit_does_not_wait_for_a_background_process_that_keeps_the_output_open() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let note = agent.folder.path().join("alive");
    let go = agent.folder.path().join("go");
    let script = format!(
        "(while [ ! -e {go} ]; do sleep 0.02; done; i=0; while [ $i -lt 300 ]; do echo noise; i=$((i+1)); done; echo survived > {note}) & echo main; exit 3",
        go = go.display(),
        note = note.display()
    );
    let output = link.exec_capture(sh(&script), b"").await.unwrap();
    assert_eq!(
        (output.status, &output.stdout[..]),
        (ExitStatus::Code(3), &b"main\n"[..])
    );
    // It waited for this, and its end was not waited for.
    drop(
        tempfile::NamedTempFile::new()
            .unwrap()
            .persist(&go)
            .unwrap(),
    );
    until(
        "the background process is neither blocked nor killed",
        || note.exists(),
    );
    let status = link.ping().await.unwrap();
    assert_eq!(status.attached_commands, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_written_before_the_exit_is_delivered_before_the_exit() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    for round in 0..60 {
        let size = 1 + round * 1931;
        let script = format!("head -c {size} /dev/zero; head -c {size} /dev/zero >&2");
        let output = link.exec_capture(sh(&script), b"").await.unwrap();
        assert_eq!((output.stdout.len(), output.stderr.len()), (size, size));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_ports_run_commands_at_once() {
    let agent = Agent::start();
    let _first = agent.ready(1).await;
    let mut tasks = tokio::task::JoinSet::new();
    for port in 0..8u8 {
        let link = agent.attached(1).await;
        tasks.spawn(async move {
            for round in 0..5usize {
                let input = vec![port; 200_000 + round];
                let output = link.exec_capture(sh("cat; exit 5"), &input).await.unwrap();
                assert_eq!(output.status, ExitStatus::Code(5));
                assert!(output.stdout == input);
            }
        });
    }
    let end = tokio::time::timeout(LIMIT, async {
        while let Some(result) = tasks.join_next().await {
            result.unwrap()
        }
    });
    end.await.expect("eight at once come to their end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_commands_leave_nothing_behind() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    link.exec_capture(sh("true"), b"").await.unwrap();
    let descriptors = agent.descriptors();
    for _ in 0..100 {
        link.exec_capture(sh("true"), b"input").await.unwrap();
    }
    until("all descriptors are closed", || {
        agent.descriptors() <= descriptors
    });
    let threads = || {
        std::fs::read_dir(format!("/proc/{}/task", agent.pid()))
            .unwrap()
            .count()
    };
    until("all threads have ended", || threads() <= 8);
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid()))
        .unwrap_or_default();
    assert_eq!(children, "", "all children are reaped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_much_output_is_refused_and_the_command_killed() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let note = agent.folder.path().join("pid");
    let script = format!(
        "echo $$ > {}; trap '' HUP; exec cat /dev/zero",
        note.display()
    );
    let found = link.exec_capture(sh(&script), b"").await;
    assert!(
        matches!(found, Err(LinkError::TooMuchOutput { .. })),
        "{found:?}"
    );
    let pid = read_number(&note).unwrap();
    until("the command is killed", || has_ended(pid));
    let next = link.exec_capture(sh("echo on"), b"").await.unwrap();
    assert_eq!(next.stdout, b"on\n", "the link goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_fails_on_the_host_hangs_the_command_up() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let note = agent.folder.path().join("pid");
    let (reader, stdout) = tokio::io::duplex(10);
    drop(reader);
    let (_sender, signals) = mpsc::channel(1);
    let io = ExecIo {
        stdin: tokio::io::empty(),
        stdout,
        stderr: tokio::io::sink(),
    };
    let script = format!(
        "echo $$ > {}; while echo more; do sleep 0.01; done",
        note.display()
    );
    let found = link.exec(sh(&script), io, signals).await;
    assert!(matches!(found, Err(LinkError::Local { .. })), "{found:?}");
    let pid = read_number(&note).unwrap();
    until("the command is hung up", || has_ended(pid));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn input_that_trickles_arrives_as_it_comes() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let (mut typed, stdin) = tokio::io::duplex(100);
    let (mut shown, stdout) = tokio::io::duplex(100);
    let (_sender, signals) = mpsc::channel(1);
    let request = ExecRequest {
        stdin: true,
        ..sh("while read -r line; do echo \"<$line>\"; done")
    };
    let running = link.start(request).await.unwrap();
    let talk = async {
        for word in ["a", "b", "c"] {
            typed
                .write_all(format!("{word}\n").as_bytes())
                .await
                .unwrap();
            let mut answer = [0; 4];
            shown.read_exact(&mut answer).await.unwrap();
            assert_eq!(answer, *format!("<{word}>\n").as_bytes());
        }
        drop(typed);
    };
    let io = ExecIo {
        stdin,
        stdout,
        stderr: tokio::io::sink(),
    };
    let (status, ()) = tokio::join!(running.run(io, signals), talk);
    assert_eq!(status.unwrap(), ExitStatus::Code(0));
}
