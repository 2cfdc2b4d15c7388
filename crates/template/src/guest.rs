//! What a root file system becomes a sandbox with: the agent and its unit, the kernel's modules, and
//! settings for a guest that boots in a few seconds without hardware acceleration, needs no network
//! and does nothing on its own.

use std::path::Path;

use crate::apt::{Package, installed};
use crate::error::{OnPath, TemplateError};
use crate::kernel::Kernel;
use crate::program::run;
use crate::progress::Step;
use crate::tree::{GuestTree, inside};

/// Where the agent is in a guest.
pub const AGENT_PATH: &str = "/usr/local/sbin/stead-agent";

/// The unit that starts the agent.
const AGENT_UNIT: &str = include_str!("stead-agent.service");

/// The host name of a new sandbox.
const HOST_NAME: &str = "sandbox";

/// Generators that start in every boot, each a process of some 100 ms under emulation, and find nothing here.
/// `fstab` stays: it knows how to mount the root.
const GENERATORS_OFF: [&str; 11] = [
    "cryptsetup",
    "debug",
    "getty",
    "gpt-auto",
    "hibernate-resume",
    "integritysetup",
    "rc-local",
    "run",
    "system-update",
    "sysv",
    "veritysetup",
];

/// Units that cost boot time or disk writes and serve nobody in a sandbox, by reason.
const UNITS_OFF: [&str; 35] = [
    // nobody logs in: root is locked, the agent is the way in
    "getty@.service",
    "serial-getty@.service",
    "getty-static.service",
    "systemd-user-sessions.service",
    "systemd-logind.service",
    "systemd-ask-password-console.path",
    "systemd-ask-password-wall.path",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-initctl.socket",
    // kernel file systems and modules that are there on demand (modprobe) or for debugging only
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "sys-kernel-config.mount",
    "dev-hugepages.mount",
    "proc-sys-fs-binfmt_misc.automount",
    "systemd-pstore.service",
    "modprobe@efi_pstore.service",
    "modprobe@drm.service",
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@loop.service",
    // timers: after a wake weeks later they would all fire at once, and tmpfiles would empty /tmp
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "fstrim.timer",
    "e2scrub_all.timer",
    "systemd-tmpfiles-clean.timer",
    // a seed saved in a template would be every sandbox's; the agent feeds randomness in instead
    "systemd-random-seed.service",
    // the log is kept in memory
    "systemd-journal-flush.service",
    "systemd-journald-audit.socket",
    "systemd-journal-catalog-update.service",
    // the template is as built; nothing to bring up to date
    "systemd-hwdb-update.service",
    "ldconfig.service",
    // measures into a TPM that is not there
    "systemd-pcrphase.service",
    "systemd-pcrphase-sysinit.service",
];

/// Files with fixed content: path, permission bits, content.
const FILES: [(&str, u32, &str); 7] = [
    ("/etc/fstab", 0o644, "/dev/vda / ext4 rw,noatime 0 0\n"),
    (
        "/etc/hosts",
        0o644,
        "127.0.0.1 localhost sandbox\n::1 localhost ip6-localhost ip6-loopback\n",
    ),
    // What installing left here is the build host's.
    ("/etc/resolv.conf", 0o644, ""),
    // Empty: made at the first boot, so that no two sandboxes share one.
    ("/etc/machine-id", 0o444, ""),
    (
        "/etc/systemd/journald.conf.d/sandbox.conf",
        0o644,
        "[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\nAudit=no\n",
    ),
    // Newer than /usr: units with ConditionNeedsUpdate have nothing to do.
    ("/etc/.updated", 0o644, ""),
    ("/var/.updated", 0o644, ""),
];

/// The longest file of the guest that is read, in bytes.
const GUEST_FILE_BYTES_MAX: u64 = 64 << 20;

/// Makes a sandbox's root file system of `tree` and says what is installed in it.
pub(crate) fn prepare(
    tree: &GuestTree,
    agent: &[u8],
    kernel: &Kernel,
    step: &Step<'_>,
) -> Result<Vec<Package>, TemplateError> {
    check_root_is_locked(tree)?;
    tree.empty("/dev")?;
    tree.put(AGENT_PATH, 0o755, agent)?;
    put_units(tree)?;
    for (path, mode, content) in FILES {
        tree.put(path, mode, content.as_bytes())?;
    }
    tree.put("/etc/hostname", 0o644, format!("{HOST_NAME}\n").as_bytes())?;
    put_modules(tree, kernel, step)?;
    let status = tree.read("/var/lib/dpkg/status", GUEST_FILE_BYTES_MAX)?;
    Ok(installed(&status))
}

fn put_units(tree: &GuestTree) -> Result<(), TemplateError> {
    tree.put(
        "/etc/systemd/system/stead-agent.service",
        0o644,
        AGENT_UNIT.as_bytes(),
    )?;
    for target in wanted_by(AGENT_UNIT) {
        let link = format!("/etc/systemd/system/{target}.wants/stead-agent.service");
        tree.link(&link, "../stead-agent.service")?;
    }
    tree.link(
        "/etc/systemd/system/default.target",
        "/usr/lib/systemd/system/multi-user.target",
    )?;
    for generator in GENERATORS_OFF {
        let path = format!("/etc/systemd/system-generators/systemd-{generator}-generator");
        tree.link(&path, "/dev/null")?;
    }
    for unit in UNITS_OFF {
        tree.link(&format!("/etc/systemd/system/{unit}"), "/dev/null")?;
    }
    Ok(())
}

/// The targets that a unit's `[Install]` section asks to be wanted by.
fn wanted_by(unit: &str) -> impl Iterator<Item = &str> {
    unit.lines()
        .filter_map(|line| line.strip_prefix("WantedBy="))
        .flat_map(str::split_whitespace)
}

/// Puts the chosen modules where the guest's modprobe looks, and lets the guest's own depmod index them.
fn put_modules(tree: &GuestTree, kernel: &Kernel, step: &Step<'_>) -> Result<(), TemplateError> {
    let folder = format!("/usr/lib/modules/{}", kernel.release);
    let mut files: Vec<_> = kernel.guest_modules(step)?.into_iter().collect();
    files.extend(
        [
            "modules.order",
            "modules.builtin",
            "modules.builtin.modinfo",
        ]
        .map(Into::into),
    );
    for file in files {
        let from = kernel.modules.join(&file);
        let bytes = std::fs::read(&from).on("reading", &from)?;
        tree.put(&format!("{folder}/{}", file.display()), 0o644, &bytes)?;
    }
    let mut command = inside(tree.root(), "depmod");
    command.arg(&kernel.release);
    run(&mut command, "indexing the kernel's modules", step).map(drop)
}

/// Debian's installation leaves root without a password that could be typed; a template must not differ.
fn check_root_is_locked(tree: &GuestTree) -> Result<(), TemplateError> {
    let shadow = tree.read("/etc/shadow", GUEST_FILE_BYTES_MAX)?;
    if root_is_locked(&shadow) {
        return Ok(());
    }
    Err(TemplateError::Unsuitable {
        path: tree.root().join(Path::new("etc/shadow")),
        found: "a root account that is open or missing".to_owned(),
        expected: "one that is locked".to_owned(),
    })
}

fn root_is_locked(shadow: &str) -> bool {
    shadow
        .lines()
        .find_map(|line| line.strip_prefix("root:"))
        .is_some_and(|rest| rest.starts_with(['*', '!']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_unit_is_wanted_by_a_target() {
        let targets: Vec<&str> = wanted_by(AGENT_UNIT).collect();
        assert!(!targets.is_empty(), "nothing would start the agent");
        assert!(
            targets.iter().all(|target| target.ends_with(".target")),
            "{targets:?}"
        );
        assert!(
            AGENT_UNIT.contains(AGENT_PATH),
            "the unit starts another agent"
        );
    }

    #[test]
    fn only_a_locked_root_will_do() {
        assert!(root_is_locked("root:*:19675:0:99999:7:::\n"));
        assert!(root_is_locked("daemon:x:1\nroot:!:19675::::::\n"));
        assert!(!root_is_locked("root::19675:0:99999:7:::\n"));
        assert!(!root_is_locked("root:$y$abc:19675:0:99999:7:::\n"));
        assert!(!root_is_locked("daemon:*:1\n"));
    }

    #[test]
    fn fixed_files_do_not_collide_with_each_other() {
        let mut paths: Vec<&str> = FILES.iter().map(|file| file.0).collect();
        paths.sort_unstable();
        let all = paths.len();
        paths.dedup();
        assert_eq!(paths.len(), all);
    }
}
