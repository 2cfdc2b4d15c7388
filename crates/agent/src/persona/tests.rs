//! A root of the test's own; what belongs to the kernel is tried in namespaces of their own.
#![allow(
    clippy::disallowed_methods,
    reason = "a test's files need not be durable"
)]

use std::os::unix::fs::symlink;
use std::process::Command;

use super::*;
use crate::tool;

struct Root {
    folder: tempfile::TempDir,
}

impl Root {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("folder");
        for name in ["etc/ssh", "var/lib/dbus", "tmp"] {
            fs::create_dir_all(folder.path().join(name)).expect("folder");
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn put(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).expect("written");
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect("read")
    }

    fn apply(&self, persona: &Persona) -> Vec<Applied> {
        let place = Place {
            root: self.folder.path().to_owned(),
            kernel: false,
        };
        place.apply(persona)
    }

    fn outcome(&self, persona: &Persona) -> Outcome {
        let mut applied = self.apply(persona);
        assert_eq!(applied.len(), 1, "{applied:?}");
        applied.remove(0).outcome
    }
}

fn done() -> Outcome {
    Outcome::Done(String::new())
}

fn named(name: &str) -> Persona {
    Persona {
        hostname: Some(name.to_owned()),
        ..Persona::default()
    }
}

fn clear(path: &[u8]) -> Persona {
    Persona {
        clear: vec![path.to_vec()],
        ..Persona::default()
    }
}

#[test]
fn a_new_host_name_is_in_its_file_and_in_the_table_of_hosts() {
    let root = Root::new();
    root.put("etc/hostname", "sandbox\n");
    root.put(
        "etc/hosts",
        "127.0.0.1\tlocalhost sandbox # not sandbox\n10.0.0.1 sandbox.net sandbox\n::1 localhost",
    );
    assert_eq!(root.outcome(&named("fork-1")), done());
    assert_eq!(root.text("etc/hostname"), "fork-1\n");
    assert_eq!(
        root.text("etc/hosts"),
        "127.0.0.1\tlocalhost fork-1 # not sandbox\n10.0.0.1 sandbox.net sandbox\n::1 localhost"
    );
    // A name of which nothing is said yet is added, once.
    root.put("etc/hosts", "127.0.0.1 localhost");
    assert_eq!(root.outcome(&named("fork-2")), done());
    assert_eq!(root.outcome(&named("fork-2")), done());
    assert_eq!(
        root.text("etc/hosts"),
        "127.0.0.1 localhost\n127.0.1.1 fork-2\n"
    );
}

#[test]
fn what_is_no_host_name_changes_nothing() {
    let root = Root::new();
    root.put("etc/hostname", "sandbox\n");
    for name in ["", "a b", "a\n", "a/b", &"a".repeat(65)] {
        let outcome = root.outcome(&named(name));
        assert!(
            matches!(outcome, Outcome::Failed(_)),
            "{name:?}: {outcome:?}"
        );
    }
    assert_eq!(root.text("etc/hostname"), "sandbox\n");
}

#[test]
fn a_new_machine_id_is_a_valid_one_in_both_places_and_keeps_the_permissions() {
    let root = Root::new();
    let persona = Persona {
        machine_id: Some([0xff; 16]),
        ..Persona::default()
    };
    assert!(matches!(root.outcome(&persona), Outcome::Skipped(_)));
    root.put("etc/machine-id", "0123456789abcdef0123456789abcdef\n");
    let read_only = std::os::unix::fs::PermissionsExt::from_mode(0o444);
    fs::set_permissions(root.path("etc/machine-id"), read_only).expect("set");
    root.put(
        "var/lib/dbus/machine-id",
        "0123456789abcdef0123456789abcdef\n",
    );
    assert_eq!(root.outcome(&persona), done());
    let text = root.text("etc/machine-id");
    assert_eq!(text, "ffffffffffff4fffbfffffffffffffff\n");
    assert_eq!(text, root.text("var/lib/dbus/machine-id"));
    let mode = fs::metadata(root.path("etc/machine-id"))
        .expect("there")
        .permissions();
    assert_eq!(mode.mode() & 0o7777, 0o444);

    fs::remove_file(root.path("var/lib/dbus/machine-id")).expect("removed");
    symlink("/etc/machine-id", root.path("var/lib/dbus/machine-id")).expect("linked");
    assert_eq!(root.outcome(&persona), done());
    let second = fs::symlink_metadata(root.path("var/lib/dbus/machine-id")).expect("there");
    assert!(second.is_symlink(), "a link was replaced");
}

#[test]
fn a_link_in_the_guest_leads_to_the_guests_own_file() {
    let root = Root::new();
    let outside = tempfile::tempdir().expect("folder");
    fs::create_dir(root.path("data")).expect("folder");
    root.put("data/name", "old\n");
    symlink("/data/name", root.path("etc/hostname")).expect("linked");
    let target = format!("../../../../../../..{}/hosts", outside.path().display());
    symlink(target, root.path("etc/hosts")).expect("linked");
    let outcome = root.outcome(&named("fork"));
    assert_eq!(root.text("data/name"), "fork\n", "{outcome:?}");
    assert_eq!(fs::read_dir(outside.path()).expect("list").count(), 0);
}

#[test]
fn host_keys_are_new_ones_of_the_same_types_or_gone() {
    let root = Root::new();
    let persona = Persona {
        ssh_host_keys: true,
        ..Persona::default()
    };
    assert!(matches!(root.outcome(&persona), Outcome::Skipped(_)));
    let old = ["ed25519", "ecdsa", "unheard-of"];
    for kind in old {
        for suffix in ["", ".pub"] {
            root.put(&format!("etc/ssh/ssh_host_{kind}_key{suffix}"), "old\n");
        }
    }
    root.put("etc/ssh/sshd_config", "kept\n");
    let outcome = root.outcome(&persona);
    assert!(
        matches!(outcome, Outcome::Done(ref note) if !note.is_empty()),
        "{outcome:?}"
    );
    let mut names: Vec<_> = fs::read_dir(root.path("etc/ssh"))
        .expect("list")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .into_string()
                .expect("a name")
        })
        .collect();
    names.sort();
    if tool::find("ssh-keygen").is_none() {
        assert_eq!(names, ["sshd_config"]);
        return;
    }
    let (ecdsa, ed25519) = ("ssh_host_ecdsa_key", "ssh_host_ed25519_key");
    let public = [format!("{ecdsa}.pub"), format!("{ed25519}.pub")];
    assert_eq!(
        names,
        [ecdsa, &public[0], ed25519, &public[1], "sshd_config"]
    );
    // An independent reader: the public half that belongs to the private key.
    let key = root.path(&format!("etc/ssh/{ed25519}"));
    let output = Command::new("ssh-keygen")
        .arg("-yf")
        .arg(&key)
        .output()
        .expect("run");
    let of_private = String::from_utf8(output.stdout).expect("text");
    let written = root.text(&format!("etc/ssh/{ed25519}.pub"));
    let half = |text: &str| text.split(' ').nth(1).map(|word| word.trim().to_owned());
    assert_eq!(half(&of_private), half(&written), "{written}");
    assert_eq!(
        fs::metadata(&key).expect("there").permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn a_server_that_runs_is_told_of_its_new_keys_and_no_other_process_is() {
    let root = Root::new();
    fs::create_dir_all(root.path("run")).expect("folder");
    root.put("etc/ssh/ssh_host_unheard-of_key", "old\n");
    let persona = Persona {
        ssh_host_keys: true,
        ..Persona::default()
    };
    for (name, is_told) in [("sshd", true), ("other", false)] {
        root.put("etc/ssh/ssh_host_unheard-of_key", "old\n");
        let program = root.path(name);
        symlink("/bin/sleep", &program).expect("linked");
        let mut server = Command::new(&program).arg("1000").spawn().expect("runs");
        root.put("run/sshd.pid", &format!("{}\n", server.id()));
        let outcome = root.outcome(&persona);
        let Outcome::Done(note) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(note.contains("reads its keys again"), is_told, "{note}");
        if !is_told {
            assert_eq!(server.try_wait().expect("looked at"), None, "it runs");
            server.kill().expect("it runs");
        }
        let status = server.wait().expect("ended");
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(signal, Some(if is_told { 1 } else { 9 }));
    }
    for text in ["", "x", "-1", "0", "99999999"] {
        root.put("etc/ssh/ssh_host_unheard-of_key", "old\n");
        root.put("run/sshd.pid", text);
        assert!(matches!(root.outcome(&persona), Outcome::Done(_)), "{text}");
    }
}

#[test]
fn what_is_cleared_is_gone_and_nothing_behind_a_link_is_touched() {
    let root = Root::new();
    let outside = tempfile::tempdir().expect("folder");
    fs::write(outside.path().join("kept"), "kept").expect("written");
    fs::create_dir_all(root.path("tmp/a/b")).expect("folder");
    root.put("tmp/a/b/file", "x");
    symlink(outside.path(), root.path("tmp/a/link")).expect("linked");
    symlink(outside.path(), root.path("tmp/out")).expect("linked");
    symlink("a", root.path("tmp/in")).expect("linked");

    let outcome = root.outcome(&clear(b"/tmp/out/kept"));
    assert!(
        matches!(outcome, Outcome::Failed(ref why) if why.contains("symbolic link")),
        "{outcome:?}"
    );
    assert!(matches!(
        root.outcome(&clear(b"/tmp/in/b")),
        Outcome::Failed(_)
    ));
    assert!(root.path("tmp/a/b/file").exists());

    assert_eq!(root.outcome(&clear(b"/tmp/a")), done());
    assert_eq!(root.outcome(&clear(b"/tmp/out")), done());
    assert!(!root.path("tmp/a").exists() && fs::symlink_metadata(root.path("tmp/out")).is_err());
    assert!(outside.path().join("kept").exists(), "a link was followed");
    for path in [&b"/tmp/a"[..], b"/no/such"] {
        assert!(matches!(root.outcome(&clear(path)), Outcome::Skipped(_)));
    }
    let long = [b"/".to_vec(), vec![b'a'; 5000]].concat();
    for path in [&b"tmp"[..], b"/", b"", b"/tmp/../etc", b"/tmp\0", &long] {
        assert!(matches!(root.outcome(&clear(path)), Outcome::Failed(_)));
    }
    assert!(root.path("etc").exists());
}

#[test]
fn one_thing_that_fails_keeps_no_other_from_being_done_and_is_named() {
    let root = Root::new();
    root.put("etc/machine-id", "0123456789abcdef0123456789abcdef\n");
    let applied = root.apply(&Persona {
        hostname: Some("not a name".to_owned()),
        machine_id: Some([1; 16]),
        clear: vec![b"relative".to_vec(), b"/etc/ssh".to_vec()],
        ..Persona::default()
    });
    let text = failures(&applied).expect("two failed");
    assert!(
        text.contains("host name: ") && text.contains("clear \"relative\": "),
        "{text}"
    );
    assert_eq!(
        (&applied[1].outcome, &applied[3].outcome),
        (&done(), &done())
    );
    assert_eq!(failures(&applied[1..2]), None);
}

#[test]
fn a_fork_gets_its_own_addresses_and_name_from_the_kernel() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may make namespaces");
        return;
    }
    let this = std::env::current_exe().expect("the test");
    let output = Command::new("unshare")
        .args(["--net", "--uts"])
        .arg(this)
        .args([
            "--exact",
            "persona::tests::inside_namespaces_of_its_own",
            "--ignored",
        ])
        .output()
        .expect("run");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

#[test]
#[ignore = "run by the test above, in namespaces"]
fn inside_namespaces_of_its_own() {
    let ip = |words: &str| {
        let output = Command::new("ip")
            .args(words.split(' '))
            .output()
            .expect("run");
        assert!(output.status.success(), "ip {words}: {output:?}");
        String::from_utf8(output.stdout).expect("text")
    };
    ip("tuntap add dev t0 mode tap");
    ip("link set dev t0 up");
    ip("address add 10.1.0.9/24 dev t0");
    let root = Root::new();
    let place = Place {
        root: root.folder.path().to_owned(),
        kernel: true,
    };
    let interface = Interface {
        name: "t0".to_owned(),
        mac: Some([2, 0, 0, 1, 2, 3]),
        addresses: vec![("10.2.0.5".parse().expect("address"), 24)],
        gateways: vec!["10.2.0.1".parse().expect("address")],
    };
    let bad = Interface {
        mac: Some([1, 0, 0, 0, 0, 0]),
        ..interface.clone()
    };
    let absent = Interface {
        name: "t1".to_owned(),
        ..interface.clone()
    };
    let applied = place.apply(&Persona {
        hostname: Some("fork-7".to_owned()),
        network: vec![interface, bad, absent],
        ..Persona::default()
    });
    assert_eq!(applied[1].outcome, done(), "{applied:?}");
    assert!(
        matches!(applied[2].outcome, Outcome::Failed(_)),
        "{applied:?}"
    );
    assert!(
        matches!(applied[3].outcome, Outcome::Skipped(_)),
        "{applied:?}"
    );
    assert_eq!(rustix::system::uname().nodename(), c"fork-7");
    let shown = ip("address show dev t0");
    assert!(
        shown.contains("02:00:00:01:02:03") && shown.contains("10.2.0.5/24"),
        "{shown}"
    );
    assert!(!shown.contains("10.1.0.9"), "{shown}");
    assert!(ip("route").contains("default via 10.2.0.1"));
}
