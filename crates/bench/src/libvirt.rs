//! The peer of save images: a libvirt daemon of the run's own, without systemd, in a mount and process namespace.
//!
//! Its folders are bound over libvirt's usual ones inside the namespace only. The namespace's first process reads from a
//! pipe that this one holds, so however this one ends, everything in there ends too.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use stead_sys::durable::{self, Existing};
use tokio::process::{Child, Command};

use crate::error::{BenchError, Doing, Result};
use crate::program;

/// How long the daemon may take until it answers: at first it asks QEMU what it can do.
const START_WITHIN: Duration = Duration::from_secs(120);

/// Everything as root and without what needs a whole system around it.
const QEMU_CONF: &str = "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\n\
    security_driver = \"none\"\nnamespaces = [ ]\ncgroup_controllers = [ ]\nstdio_handler = \"file\"\n";

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
    ///
    /// # Errors
    /// When libvirt is not installed or does not answer.
    pub async fn start(folder: &Path, format: &str) -> Result<Self> {
        for part in ["etc", "socket"] {
            durable::create_dir(&folder.join(part), 0o755).doing("create libvirt's folder")?;
        }
        let users = std::fs::read_to_string("/etc/passwd").doing("read the users")?;
        let groups = std::fs::read_to_string("/etc/group").doing("read the groups")?;
        let socket = folder.join("socket").display().to_string();
        let files = [
            (
                "etc/qemu.conf",
                format!("{QEMU_CONF}save_image_format = \"{format}\"\n"),
            ),
            (
                "libvirtd.conf",
                format!(
                    "unix_sock_dir = \"{socket}\"\nauth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\n"
                ),
            ),
            (
                "passwd",
                format!(
                    "{}\nlibvirt-qemu:x:64055:64055::/:/bin/false\n",
                    users.trim_end()
                ),
            ),
            (
                "group",
                format!(
                    "{}\nlibvirt-qemu:x:64055:\nkvm:x:64056:\n",
                    groups.trim_end()
                ),
            ),
        ];
        for (name, text) in files {
            durable::publish(
                &folder.join(name),
                0o644,
                text.as_bytes(),
                Existing::Replace,
            )
            .doing("write libvirt's settings")?;
        }
        let init = Command::new("unshare")
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "sh",
                "-c",
                INIT,
                "sh",
            ])
            .arg(folder)
            .stdin(Stdio::piped())
            .spawn()
            .doing("start libvirt")?;
        let libvirt = Self {
            init,
            folder: folder.to_owned(),
        };
        libvirt.answers().await?;
        Ok(libvirt)
    }

    async fn answers(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            match self.run(&["version"]).await {
                Ok(()) => return Ok(()),
                Err(error) if begun.elapsed() > START_WITHIN => return Err(error),
                Err(_not_yet) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Runs `virsh`; it must succeed.
    ///
    /// # Errors
    /// When it does not, with what it said.
    pub async fn run(&self, arguments: &[&str]) -> Result<()> {
        let socket = self.folder.join("socket/libvirt-sock");
        let uri = format!("qemu:///system?socket={}", socket.display());
        let line = [&["--quiet", "-c", &uri], arguments].concat();
        program::run("virsh", &line).await.map(drop)
    }

    /// Ends it with everything that it started.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub async fn end(mut self) -> Result<()> {
        drop(self.init.stdin.take());
        let ended = self.init.wait().await.doing("wait for libvirt's end")?;
        if ended.code().is_some() {
            return Ok(());
        }
        Err(BenchError::new("end libvirt", ended.to_string()))
    }
}
