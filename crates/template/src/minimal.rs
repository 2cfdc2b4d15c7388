//! The smallest guest: busybox, and the agent as process 1.
//!
//! ```text
//!   kernel ──▶ /init (the agent of the initial RAM disk) ──▶ the root's agent: process 1, answers the host, reaps
//!                                                              └── commands: busybox, and what is copied in
//! ```
//! Nothing else runs, so it boots to its agent in a fraction of the time that systemd takes. What a package would bring
//! is not there: no shared libraries, no modules besides those that boot it, no users but root.

use std::path::Path;
use std::process::Command;

use stead_sys::durable::{Existing, Partial};

use crate::apt::{Apt, Package};
use crate::error::{OnPath, TemplateError};
use crate::guest::AGENT_PATH;
use crate::program::run;
use crate::progress::Step;
use crate::rootfs;
use crate::tree::{GuestTree, inside};

/// The one package in it.
pub(crate) const PACKAGE: &str = "busybox-static";

/// Where that package has its program, in whichever suite.
const PROGRAMS: [&str; 2] = ["/bin/busybox", "/usr/bin/busybox"];

/// Folders that are mounted on or written to: path, permission bits.
const FOLDERS: [(&str, u32); 8] = [
    ("/dev", 0o755),
    ("/proc", 0o755),
    ("/sys", 0o755),
    ("/run", 0o755),
    ("/root", 0o700),
    ("/srv", 0o755),
    ("/tmp", 0o1777),
    ("/var/tmp", 0o1777),
];

/// Files with fixed content: path, permission bits, content.
const FILES: [(&str, u32, &str); 7] = [
    ("/etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n"),
    ("/etc/group", 0o644, "root:x:0:\ntty:x:5:\n"),
    ("/etc/shadow", 0o640, "root:*:19675:0:99999:7:::\n"),
    ("/etc/hostname", 0o644, "sandbox\n"),
    (
        "/etc/hosts",
        0o644,
        "127.0.0.1 localhost sandbox\n::1 localhost\n",
    ),
    ("/etc/resolv.conf", 0o644, ""),
    // Each fork gets one of its own.
    ("/etc/machine-id", 0o444, ""),
];

/// The kernel's command line. As for a Debian guest, but what comes after the root's initial program goes to that.
pub(crate) fn cmdline() -> String {
    format!(
        "console=ttyS0 root=/dev/vda rw rootfstype=ext4 quiet panic=-1 no_timer_check nowatchdog mitigations=off \
         net.ifnames=0 init={AGENT_PATH} -- serve"
    )
}

/// Makes the root file system of the package and publishes it as `target`. `scratch` must be empty.
pub(crate) fn install(
    apt: &Apt,
    packages: &[Package],
    target: &Path,
    scratch: &Path,
    step: &Step<'_>,
) -> Result<(), TemplateError> {
    let tree = scratch.join("tree");
    for package in packages {
        let download = scratch.join("download");
        stead_sys::durable::create_dir(&download, 0o755).on("creating", &download)?;
        let deb = apt.download(package, &download, step)?;
        let mut command = Command::new("dpkg-deb");
        command.arg("--extract").arg(&deb).arg(&tree);
        run(&mut command, "unpacking busybox", step)?;
    }
    let guest = GuestTree::new(tree.clone());
    for (path, mode) in FOLDERS {
        guest.make_folder(path, mode)?;
    }
    link_applets(&guest, step)?;
    for (path, mode, content) in FILES {
        guest.put(path, mode, content.as_bytes())?;
    }
    let partial = Partial::create(target, 0o644).on("creating", target)?;
    rootfs::pack(&tree, partial.temp_path(), step)?;
    partial
        .publish(Existing::Replace)
        .on("publishing", target)
        .map(drop)
}

/// Has busybox say what it can be called, and makes a link for each.
fn link_applets(guest: &GuestTree, step: &Step<'_>) -> Result<(), TemplateError> {
    let program = PROGRAMS
        .into_iter()
        .find(|path| guest.root().join(&path[1..]).is_file())
        .ok_or_else(|| TemplateError::Unsuitable {
            path: guest.root().to_owned(),
            found: "no busybox".to_owned(),
            expected: format!("the package {PACKAGE}"),
        })?;
    let mut command = inside(guest.root(), program);
    command.arg("--list");
    let listed = run(&mut command, "asking busybox what it can do", step)?;
    for name in String::from_utf8_lossy(&listed).lines().filter(is_applet) {
        guest.link(&format!("/bin/{name}"), program)?;
    }
    Ok(())
}

/// A plain name, and not that of the program itself.
fn is_applet(name: &&str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.[+".contains(&byte);
    !name.is_empty() && *name != "busybox" && !name.starts_with('.') && name.bytes().all(is_allowed)
}

/// Makes a sandbox's root file system of `tree` and says what is installed in it.
pub(crate) fn prepare(
    tree: &GuestTree,
    agent: &[u8],
    packages: Vec<Package>,
) -> Result<Vec<Package>, TemplateError> {
    tree.put(AGENT_PATH, 0o755, agent)?;
    Ok(packages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_busybox_calls_itself_becomes_a_link_only_when_it_is_a_plain_name() {
        for name in ["sh", "[", "[[", "fsck.minix", "i2cget", "uptime"] {
            assert!(is_applet(&name), "{name}");
        }
        for name in ["", "busybox", "..", ".x", "a/b", "a b"] {
            assert!(!is_applet(&name), "{name}");
        }
    }

    #[test]
    fn the_root_is_the_agents_and_what_follows_two_dashes_is_its_order() {
        let line = cmdline();
        let (kernel, agent) = line.split_once(" -- ").expect("two dashes");
        assert!(kernel.ends_with(&format!("init={AGENT_PATH}")));
        assert_eq!(agent, "serve");
        // A word that the kernel does not know would become an argument of process 1.
        let known = ["rw", "quiet", "no_timer_check", "nowatchdog"];
        let bare = kernel.split(' ').filter(|word| !word.contains('='));
        assert!(bare.clone().all(|word| known.contains(&word)));
        assert_eq!(bare.count(), known.len());
    }
}
