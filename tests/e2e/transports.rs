//! The protocol over other transports than a virtio-serial port: the same agent, the same storm.
#![allow(
    clippy::disallowed_methods,
    reason = "tests write scratch files that nobody keeps"
)]

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use stead_agent_link::Place;
use stead_tests::{Worker, agent_program, golden_store, storm, until};

/// For what must come to its end, however slow the machine is.
const LONG: Duration = Duration::from_secs(120);
/// The commands that are asked for in a storm of connections: none waits for long. Slack for a machine that is busy.
const NO_HANG: Duration = Duration::from_secs(10);
/// Where an agent of the tests leaves alone what it runs on.
const TOUCH_NOTHING: [&str; 3] = ["--no-clock", "--no-entropy", "--no-hostname"];

/// A process that ends with the test.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn over_a_unix_socket_connections_come_and_go_and_no_command_is_lost() {
    let folder = tempfile::tempdir().expect("folder");
    let socket = folder.path().join("agent");
    let agent = Command::new(agent_program())
        .args(["serve", "--socket"])
        .arg(&socket)
        .args(TOUCH_NOTHING)
        .stdin(Stdio::null())
        .spawn();
    let _agent = Ending(agent.expect("start the agent"));
    until(LONG, || socket.exists());
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let slowest = runtime.block_on(storm::weather(&Place::Unix(socket)));
    println!("the slowest command in the storm: {slowest:?}");
    assert!(slowest < NO_HANG, "{slowest:?}");
}

#[test]
fn over_vsock_in_a_guest_connections_come_and_go_and_no_command_is_lost() {
    let worker = Worker::on(golden_store());
    worker.boot("web");
    let client = env!("CARGO_BIN_EXE_vsock-client");
    worker.ok(&["cp", client, "web:/run/vsock-client"]);
    let serve = format!(
        "modprobe vsock_loopback
         setsid /usr/local/sbin/stead-agent serve --vsock-local 5252 {} > /run/agent.log 2>&1 < /dev/null &",
        TOUCH_NOTHING.join(" ")
    );
    worker.shell("web", &serve);
    let said = worker.shell("web", "chmod +x /run/vsock-client; /run/vsock-client 5252 2>&1 || { cat /run/agent.log; exit 1; }");
    println!("{said}");
    let slowest = said.rsplit_once("slowest ").expect("a figure").1;
    let slowest: u64 = slowest.trim_end_matches(" ms").parse().expect("a number");
    assert!(Duration::from_millis(slowest) < NO_HANG, "{slowest} ms");
    only_the_host_comes_in(&worker);
}

/// An agent for the host shuts out the machine's own processes: the door opens, and nobody is there.
fn only_the_host_comes_in(worker: &Worker) {
    let script = "setsid /usr/local/sbin/stead-agent serve --vsock 5253 --no-clock --no-entropy --no-hostname \
         > /run/host-agent.log 2>&1 < /dev/null & agent=$!; sleep 0.5
         python3 -c 'import socket; s = socket.socket(socket.AF_VSOCK); s.settimeout(30); s.connect((1, 5253)); print(s.recv(9))'
         kill $agent";
    assert_eq!(worker.shell("web", script), "b''");
}
