//! A real libvirt of a test's own: without systemd, in a mount and process namespace, ended with everything it started.
//!
//! Its folders are bound over libvirt's usual ones inside the namespace only, and its socket lies in the test's folder,
//! where `virsh` reaches it from outside. The first process of the namespace reads from a pipe that the test holds:
//! when the test ends, however it ends, that process ends, and with it the kernel ends every other one in there.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::until;

/// How long the daemon may take until it answers: at first it asks QEMU what it can do.
const START_TIMEOUT: Duration = Duration::from_secs(120);

const QEMU_CONF: &str = r#"
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = [ ]
cgroup_controllers = [ ]
stdio_handler = "file"
"#;

/// `$1` is the folder.
const INIT: &str = r#"
set -eu
mount --make-rprivate /
for pair in run/libvirt:run var/lib/libvirt:lib etc/libvirt:etc var/log/libvirt:log var/cache/libvirt:cache; do
    mkdir -p "/${pair%%:*}" "$1/${pair##*:}"
    mount --bind "$1/${pair##*:}" "/${pair%%:*}"
done
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/group" /etc/group
mount -t proc proc /proc
/usr/sbin/libvirtd -f "$1/libvirtd.conf" -p "$1/pid" < /dev/null > "$1/daemon.log" 2>&1 &
cat > /dev/null
"#;

/// A daemon that answers.
#[derive(Debug)]
pub struct Libvirt {
    init: Child,
    folder: PathBuf,
}

impl Libvirt {
    /// Starts one that saves in `format`. A folder may be used again when its daemon has ended.
    pub fn start(folder: &Path, format: &str) -> Self {
        fs::create_dir_all(folder.join("etc")).expect("folder");
        fs::create_dir_all(folder.join("socket")).expect("folder");
        let conf = format!("{QEMU_CONF}save_image_format = \"{format}\"\n");
        fs::write(folder.join("etc/qemu.conf"), conf).expect("write");
        let socket = folder.join("socket");
        let daemon = format!(
            "unix_sock_dir = \"{}\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n",
            socket.display()
        );
        fs::write(folder.join("libvirtd.conf"), daemon).expect("write");
        // The package that makes this user also installs services; inside the namespace it is enough to be named.
        add_line(
            "/etc/passwd",
            &folder.join("passwd"),
            "libvirt-qemu:x:64055:64055::/:/bin/false",
        );
        add_line(
            "/etc/group",
            &folder.join("group"),
            "libvirt-qemu:x:64055:\nkvm:x:64056:",
        );
        let init = Command::new("unshare")
            .args(["--mount", "--pid", "--fork", "--kill-child"])
            .args(["sh", "-c", INIT, "sh"])
            .arg(folder)
            .stdin(Stdio::piped())
            .spawn()
            .expect("unshare is installed");
        let libvirt = Self {
            init,
            folder: folder.to_owned(),
        };
        let answers = || libvirt.run(&["version"]).status.success();
        until(START_TIMEOUT, answers);
        assert!(answers(), "libvirtd: {}", libvirt.log());
        libvirt
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.join("daemon.log")).unwrap_or_default()
    }

    /// Runs `virsh`.
    pub fn run(&self, args: &[&str]) -> Output {
        let socket = self.folder.join("socket/libvirt-sock");
        let output = Command::new("virsh")
            .args(["--quiet", "-c"])
            .arg(format!("qemu:///system?socket={}", socket.display()))
            .args(args)
            .stdin(Stdio::null())
            .output();
        output.expect("virsh is installed")
    }

    /// Runs `virsh` and gives what it printed; it must succeed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "virsh {args:?}: {said}\n{}",
            self.log()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs `virsh` and gives its complaint; it must fail.
    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(!output.status.success(), "virsh {args:?} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// The next whole line with `word` that a domain writes to its console.
    pub fn console_line(&self, domain: &str, word: &str) -> String {
        let console = self.ok(&["ttyconsole", domain]);
        let file = fs::File::open(console.trim()).expect("console");
        // The first line may have begun before.
        let mut lines = BufReader::new(file).lines().skip(1);
        lines
            .find_map(|line| line.ok().filter(|line| line.contains(word)))
            .expect("the console goes on")
    }

    /// Whether a domain writes nothing to its console for so long.
    pub fn silence(&self, domain: &str, length: Duration) -> bool {
        let console = self.ok(&["ttyconsole", domain]);
        let mut file = fs::File::open(console.trim()).expect("console");
        let (sender, heard) = std::sync::mpsc::channel();
        // It ends with the domain.
        std::thread::spawn(move || {
            let read = std::io::Read::read(&mut file, &mut [0; 1]);
            sender.send(read.is_ok_and(|bytes| bytes > 0)).is_ok()
        });
        !matches!(heard.recv_timeout(length), Ok(true))
    }
}

fn add_line(from: &str, to: &Path, line: &str) {
    let text = fs::read_to_string(from).expect("read");
    fs::write(to, format!("{}\n{line}\n", text.trim_end())).expect("write");
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        drop(self.init.stdin.take());
        self.init.wait().expect("the namespace ends");
    }
}
