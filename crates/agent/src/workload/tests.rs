//! Real control groups below one of the test's own. Only root may make them; for others there is nothing to test.

use std::process::{Child, Command, Stdio};

use super::*;

/// Waits for what the kernel does.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is_so() {
        assert!(Instant::now() < end, "not within {LIMIT:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A hierarchy of the test's own: its root stands for the machine's.
struct Machine {
    root: PathBuf,
    processes: Vec<Child>,
}

impl Machine {
    fn new(name: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: only root may make control groups");
            return None;
        }
        let mounted = fs::read("/proc/self/mountinfo").expect("mounts");
        let Some(point) = mounts::cgroup2(&mounted) else {
            eprintln!("skipped: there are no unified control groups");
            return None;
        };
        let root = Path::new(OsStr::from_bytes(&point))
            .join(format!("stead-test-{}-{name}", std::process::id()));
        fs::create_dir(&root).expect("a group");
        Some(Self {
            root,
            processes: Vec::new(),
        })
    }

    fn group(&self, name: &str) -> Group {
        let path = self.root.join(name);
        fs::create_dir_all(&path).expect("a group");
        Group::at(path)
    }

    /// A process that counts as fast as it can; gives its number.
    fn run(&mut self, group: &Group) -> i32 {
        let child = Command::new("sh")
            .args(["-c", "while :; do :; done"])
            .stdin(Stdio::null())
            .spawn()
            .expect("start");
        let pid = i32::try_from(child.id()).expect("a number");
        self.processes.push(child);
        assert!(group.admit(pid).expect("moved"));
        pid
    }

    fn agent(&mut self, place: &str) -> Workload {
        let place = self.group(place);
        let pid = self.run(&place);
        Workload::settle(&self.root, place.path(), pid).expect("settled")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let kill = self.root.join("cgroup.kill");
        drop(
            fs::OpenOptions::new()
                .write(true)
                .open(&kill)
                .and_then(|mut file| std::io::Write::write_all(&mut file, b"1")),
        );
        for child in &mut self.processes {
            drop(child.kill());
            drop(child.wait());
        }
        remove(&Group::at(&self.root));
    }
}

fn remove(group: &Group) {
    group.children().unwrap_or_default().iter().for_each(remove);
    until("the group is empty", || {
        fs::remove_dir(group.path()).is_ok() || !group.path().exists()
    });
}

/// Processor time that a process has used, in the kernel's ticks.
fn ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it is there");
    let (_, rest) = stat.rsplit_once(") ").expect("a name");
    let fields: Vec<&str> = rest.split(' ').collect();
    fields[11].parse::<u64>().expect("user") + fields[12].parse::<u64>().expect("system")
}

/// Waits until it has run on.
fn assert_runs(pid: i32) {
    let before = ticks(pid);
    until("it runs", || ticks(pid) > before);
}

fn stands_still(pid: i32) -> bool {
    let before = ticks(pid);
    std::thread::sleep(Duration::from_millis(80));
    ticks(pid) == before
}

const LIMIT: Duration = Duration::from_secs(20);

#[test]
fn everything_but_the_agent_stands_still_until_the_thaw() {
    let Some(mut machine) = Machine::new("all") else {
        return;
    };
    let (service, nested) = (
        machine.group("system.slice"),
        machine.group("user.slice/a/b"),
    );
    let workload = machine.agent("stead-agent.service");
    let others = [machine.run(&service), machine.run(&nested)];
    let command = machine.run(&workload.commands);
    // Where no group can hold it without the agent.
    let stray = machine.run(&Group::at(machine.root.join("stead-agent.service")));
    let agent = Group::at(&workload.agent).processes().expect("read")[0];
    assert_eq!(workload.state().expect("read"), WorkloadState::Running);

    let report = workload.freeze(LIMIT).expect("frozen");
    assert_eq!(
        report.changed,
        ["stead-agent.service/commands", "system.slice", "user.slice"]
    );
    assert_eq!((report.moved, report.others.len()), (1, 0));
    assert_eq!(workload.state().expect("read"), WorkloadState::Frozen);
    let before = [others[0], others[1], command, stray].map(ticks);
    assert_runs(agent);
    assert_eq!(before, [others[0], others[1], command, stray].map(ticks));

    let again = workload.freeze(LIMIT).expect("frozen already");
    assert!(again.changed.is_empty(), "{again:?}");
    assert_eq!(workload.thaw().expect("thawed").changed.len(), 3);
    assert_eq!(workload.state().expect("read"), WorkloadState::Running);
    assert_runs(stray);
    assert_runs(others[1]);
    assert!(workload.thaw().expect("nothing to do").changed.is_empty());
}

#[test]
fn what_another_had_frozen_stays_frozen_and_what_is_new_is_found() {
    let Some(mut machine) = Machine::new("others") else {
        return;
    };
    let (paused, inner) = (machine.group("paused"), machine.group("app/inner"));
    let workload = machine.agent("agent.service");
    let (at_rest, nested) = (machine.run(&paused), machine.run(&inner));
    paused.tell(true).expect("told");
    inner.tell(true).expect("told");
    let report = workload.freeze(LIMIT).expect("frozen");
    assert_eq!(report.others, ["paused"]);

    let late = machine.group("late");
    let newcomer = machine.run(&late);
    assert_eq!(
        workload.state().expect("read"),
        WorkloadState::Partly(vec!["late".to_owned()])
    );
    let report = workload.freeze(LIMIT).expect("frozen");
    assert_eq!(report.changed, ["late"]);
    assert!(stands_still(newcomer));

    workload.thaw().expect("thawed");
    assert_runs(newcomer);
    assert!(
        stands_still(at_rest) && stands_still(nested),
        "another's freeze was undone"
    );
}

#[test]
fn an_agent_that_starts_again_finds_the_workload_frozen_and_thaws_it() {
    let Some(mut machine) = Machine::new("again") else {
        return;
    };
    let (web, theirs) = (machine.group("web"), machine.group("theirs"));
    theirs.tell(true).expect("told");
    let workload = machine.agent("agent.service");
    let pid = machine.run(&web);
    workload.freeze(LIMIT).expect("frozen");
    drop(workload);
    // By its service manager into the unit's own group, or in place into the group that it has.
    for place in ["agent.service", "agent.service/agent"] {
        let workload = machine.agent(place);
        assert!(workload.agent.ends_with("agent.service/agent"));
        assert_eq!(workload.state().expect("read"), WorkloadState::Frozen);
        assert!(stands_still(pid));
    }
    let workload = machine.agent("agent.service");
    assert_eq!(workload.thaw().expect("thawed").changed.len(), 2);
    assert_runs(pid);
    assert!(theirs.is_told_to_freeze().expect("read"));
}

#[test]
fn a_command_that_is_admitted_to_a_frozen_workload_does_not_run_before_the_thaw() {
    let Some(mut machine) = Machine::new("born") else {
        return;
    };
    let workload = machine.agent("agent.service");
    workload.freeze(LIMIT).expect("frozen");
    let pid = machine.run(&workload.commands);
    until("it stops", || stands_still(pid));
    workload.thaw().expect("thawed");
    assert_runs(pid);
}

/// The kernel's files played by plain ones: a group that never says it is frozen.
#[test]
fn a_freeze_that_is_not_reached_names_who_runs_and_thaws_what_it_froze() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may write the notes");
        return;
    }
    let folder = tempfile::tempdir().expect("folder");
    let own = std::process::id();
    let files = [
        ("agent/cgroup.procs", String::new()),
        ("commands/cgroup.procs", String::new()),
        ("commands/cgroup.freeze", "0".to_owned()),
        (
            "commands/cgroup.events",
            "populated 0\nfrozen 0\n".to_owned(),
        ),
        ("stuck/cgroup.procs", format!("{own}\n")),
        ("stuck/cgroup.freeze", "0".to_owned()),
        ("stuck/cgroup.events", "populated 1\nfrozen 0\n".to_owned()),
    ];
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("folder");
        stead_sys::durable::publish(
            &path,
            0o644,
            text.as_bytes(),
            stead_sys::durable::Existing::Keep,
        )
        .expect("written");
    }
    let workload = Workload {
        root: folder.path().to_owned(),
        agent: folder.path().join("agent"),
        commands: Group::at(folder.path().join("commands")),
    };
    let begin = Instant::now();
    let error = workload
        .freeze(Duration::from_millis(50))
        .expect_err("never");
    assert!(begin.elapsed() >= Duration::from_millis(50));
    let text = error.to_string();
    let WorkloadError::NotFrozen {
        limit_ms, unfrozen, ..
    } = error
    else {
        panic!("{text}");
    };
    assert_eq!(limit_ms, 50);
    let who = format!("stuck ({own} ");
    assert!(unfrozen.iter().any(|name| name.starts_with(&who)), "{text}");
    for name in ["stuck", "commands"] {
        let group = Group::at(folder.path().join(name));
        assert!(!group.is_told_to_freeze().expect("read"), "{name}");
    }
}

#[test]
fn the_own_group_is_that_of_the_unified_hierarchy() {
    assert_eq!(own_path("0::/init.scope\n"), Some("/init.scope"));
    assert_eq!(own_path("2:cpu:/x\n1:name=systemd:/\n0::/\n"), Some("/"));
    assert_eq!(own_path("2:cpu:/x\n"), None);
}
