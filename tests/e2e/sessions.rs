//! Sessions of commands: at terminals, left and taken up again, named by keys, listed, signalled.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::Value;
use stead_tests::{Worker, finish, golden_store, until};

/// For what must come to its end, however slow the machine is.
const LONG: Duration = Duration::from_secs(120);
const LEAVE: &[u8] = b"\x10\x11";

/// A `stead` at a terminal of its own.
struct Screen {
    keys: File,
    shown: mpsc::Receiver<Vec<u8>>,
    seen: String,
    child: Child,
}

impl Screen {
    fn open(worker: &Worker, args: &[&str], rows: u16, cols: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
        grantpt(&master).expect("grant");
        unlockpt(&master).expect("unlock");
        let keys = File::from(master);
        resize(&keys, rows, cols);
        let name = ptsname(&keys, Vec::new()).expect("name");
        let name = name.to_str().expect("UTF-8").to_owned();
        let terminal = || {
            Stdio::from(
                File::options()
                    .read(true)
                    .write(true)
                    .open(&name)
                    .expect("open"),
            )
        };
        let stead = worker.command(args);
        // It executes the program in a session that the terminal controls.
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg(stead.get_program())
            .args(stead.get_args())
            .envs(
                stead
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stdin(terminal())
            .stdout(terminal())
            .stderr(terminal())
            .spawn()
            .expect("start");
        let (show, shown) = mpsc::channel();
        let mut from = keys.try_clone().expect("clone");
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // It fails when nobody has the terminal open any more.
            while let Ok(count) = from.read(&mut buffer) {
                if count == 0 || show.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            keys,
            shown,
            seen: String::new(),
            child,
        }
    }

    fn press(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).expect("type");
    }

    /// Waits until the text has been shown, and forgets all up to it.
    fn shows(&mut self, text: &str) {
        let end = Instant::now() + LONG;
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            let more = self.shown.recv_timeout(left);
            let more =
                more.unwrap_or_else(|error| panic!("{error}: no {text:?} in {:?}", self.seen));
            self.seen.push_str(&String::from_utf8_lossy(&more));
        }
    }

    fn ends_with(mut self, status: i32) {
        let mut ended = None;
        until(LONG, || {
            ended = self.child.try_wait().expect("wait");
            ended.is_some()
        });
        assert_eq!(
            ended.and_then(|status| status.code()),
            Some(status),
            "{:?}",
            self.seen
        );
    }
}

fn resize(terminal: &File, rows: u16, cols: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).expect("resize");
}

fn session(worker: &Worker, id: &str) -> Value {
    let all = worker.json(&["sessions", "ls", "web"]);
    let all = all.as_array().expect("a list");
    all.iter()
        .find(|one| {
            one["id"]
                .as_str()
                .is_some_and(|known| known.starts_with(id))
        })
        .unwrap_or_else(|| panic!("no {id} in {all:?}"))
        .clone()
}

fn output(worker: &Worker, args: &[&str], status: i32) -> String {
    let output = worker.run(args);
    assert_eq!(output.status.code(), Some(status), "{args:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_session_is_left_killed_and_taken_up_again_and_a_key_runs_once() {
    let worker = Worker::on(golden_store());
    worker.boot("web");
    assert_eq!(worker.ok(&["wait", "--ready", "web"]), "web");
    let shown = worker.json(&["inspect", "--health", "web"]);
    assert_eq!(shown["health"]["state"], "ready", "{shown}");
    a_terminal_is_resized_interrupted_left_and_taken_up_again(&worker);
    a_login_shell_is_opened(&worker);
    a_command_that_was_left_is_attached_to_while_it_runs_and_after_its_end(&worker);
    a_command_outlives_the_stead_that_started_it(&worker);
    a_key_runs_once_however_often_and_by_how_many_it_is_asked_for(&worker);
    a_session_is_signalled_and_limited(&worker);
}

fn a_terminal_is_resized_interrupted_left_and_taken_up_again(worker: &Worker) {
    let command = ["exec", "-it", "web", "env", "PS1=ask:", "sh", "-i"];
    let mut screen = Screen::open(worker, &command, 30, 90);
    screen.shows("ask:");
    screen.press(b"stty size\n");
    screen.shows("30 90");
    resize(&screen.keys, 40, 100);
    // The news of the size goes its own way: it is asked for until it is there.
    screen.press(
        b"until [ \"$(stty size)\" = '40 100' ]; do sleep 0.1; done; echo size-$((1 + 1))\n",
    );
    screen.shows("size-2");
    screen.press(b"sleep 1000\n");
    screen.shows("sleep 1000");
    thread::sleep(Duration::from_millis(300));
    screen.press(b"\x03");
    screen.press(b"echo code-$?\n");
    screen.shows("code-130");
    screen.press(LEAVE);
    screen.shows("it goes on");
    screen.ends_with(0);

    let all = worker.json(&["sessions", "ls", "web"]);
    let id = all[0]["id"].as_str().expect("an id").to_owned();
    let left = session(worker, &id);
    assert_eq!(left["state"], "running", "{left}");
    assert_eq!(
        (&left["terminal"], &left["attached"]),
        (&true.into(), &false.into()),
        "{left}"
    );

    let mut screen = Screen::open(worker, &["attach", "web", &id[..8]], 24, 80);
    screen.shows("code-130");
    screen.press(b"echo again-$((40 + 2))\n");
    screen.shows("again-42");
    screen.child.kill().expect("kill");
    screen.child.wait().expect("wait");
    until(LONG, || session(worker, &id)["attached"] == false);

    let mut screen = Screen::open(worker, &["attach", "web", &id], 24, 80);
    screen.shows("again-42");
    screen.press(b"exit 7\n");
    screen.ends_with(7);
    assert_eq!(session(worker, &id)["exit_code"], 7);
}

fn a_login_shell_is_opened(worker: &Worker) {
    let mut screen = Screen::open(worker, &["shell", "web"], 24, 80);
    screen.press(b"shopt -q login_shell && echo login-$((1 + 1)) at $(tty)\n");
    screen.shows("login-2 at /dev/pts/");
    screen.press(b"exit 3\n");
    screen.ends_with(3);
}

fn a_command_that_was_left_is_attached_to_while_it_runs_and_after_its_end(worker: &Worker) {
    let script = "echo begin; while ! [ -e /run/go ]; do sleep 0.1; done; echo end; exit 5";
    let id = worker.ok(&["exec", "-d", "web", "sh", "-c", script]);
    let listener = worker.spawn(&["attach", "web", &id]);
    until(LONG, || session(worker, &id)["attached"] == true);
    worker.shell("web", "touch /run/go");
    let heard = finish(listener, b"");
    assert_eq!(heard.status.code(), Some(5), "{heard:?}");
    assert_eq!(heard.stdout, b"begin\nend\n");
    assert_eq!(
        output(worker, &["attach", "web", &id[..10]], 5),
        "begin\nend\n"
    );
    let ended = session(worker, &id);
    assert_eq!(
        (&ended["state"], &ended["exit_code"]),
        (&"ended".into(), &5.into()),
        "{ended}"
    );
    let error = worker.fails(&["attach", "web", "no-such-session"], 125);
    assert!(
        error["next"].to_string().contains("stead sessions ls web"),
        "{error}"
    );
}

fn a_command_outlives_the_stead_that_started_it(worker: &Worker) {
    let script = "echo before; while ! [ -e /run/killed ]; do sleep 0.1; done; echo after";
    let key = "outlives";
    let mut killed = worker.spawn(&["exec", "-n", "--key", key, "web", "sh", "-c", script]);
    let mut first = [0; 7];
    let stdout = killed.stdout.as_mut().expect("piped");
    stdout.read_exact(&mut first).expect("read");
    assert_eq!(&first, b"before\n");
    killed.kill().expect("kill");
    drop(killed.wait());
    worker.shell("web", "touch /run/killed");
    assert_eq!(
        output(worker, &["attach", "web", key], 0),
        "before\nafter\n"
    );
}

fn a_key_runs_once_however_often_and_by_how_many_it_is_asked_for(worker: &Worker) {
    let script = "echo ran >> /root/ran; sleep 1; wc -l < /root/ran; exit 3";
    let command = ["exec", "-n", "--key", "once", "web", "sh", "-c", script];
    let together: Vec<_> = (0..4).map(|_| worker.spawn(&command)).collect();
    let ended: Vec<_> = together.into_iter().map(|one| finish(one, b"")).collect();
    // One listens at a time: who is not the last to ask is told that another took over, or hears all.
    assert!(
        ended.iter().any(|one| one.status.code() == Some(3)),
        "{ended:?}"
    );
    for one in &ended {
        assert!(matches!(one.status.code(), Some(3 | 125)), "{one:?}");
    }
    assert_eq!(output(worker, &command, 3), "1\n");
    assert_eq!(output(worker, &command, 3), "1\n");
    assert_eq!(worker.shell("web", "wc -l < /root/ran"), "1");
}

fn a_session_is_signalled_and_limited(worker: &Worker) {
    let id = worker.ok(&["exec", "-d", "web", "sleep", "1000"]);
    worker.ok(&["sessions", "kill", "--signal", "TERM", "web", &id[..8]]);
    output(worker, &["attach", "web", &id], 143);
    assert_eq!(session(worker, &id)["signal"], 15);
    worker.fails(&["sessions", "kill", "web", &id], 4);
    let limited = [
        "exec",
        "-n",
        "--limit",
        "nofile=123:456",
        "web",
        "sh",
        "-c",
        "ulimit -Sn; ulimit -Hn",
    ];
    assert_eq!(output(worker, &limited, 0), "123\n456\n");
}
