//! Who this machine is: what a fork is given so that it is not taken for the machine that it was made of.
//!
//! ```text
//!   host name ▸ machine id ▸ SSH host keys ▸ network addresses ▸ what is to be cleared
//! ```
//! Each is done, skipped with a reason, or failed; one that fails does not keep the others from being done. A file is
//! replaced as a whole ([`stead_sys::durable`]): whoever reads it finds the old one or the new one. What is secret is made
//! after the random number generator was seeded anew, or is not there.
//!
//! Paths are resolved below the root as the guest sees it. What is cleared is never reached through a symbolic link.
//!
//! # Source
//! hostname(5), hosts(5), machine-id(5), sshd(8), ip-link(8).

mod clear;
mod network;
mod ssh;

use std::fmt;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use stead_sys::durable::{self, Existing};

/// The longest host name, in bytes.
const MAX_HOSTNAME_BYTES: usize = 64;
/// The longest `/etc/hosts` that is changed, in bytes.
const MAX_HOSTS_BYTES: u64 = 1 << 20;

/// What tells this machine from others; nothing is what stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Persona {
    /// The new host name.
    pub(crate) hostname: Option<String>,
    /// The new machine id: random bits.
    pub(crate) machine_id: Option<[u8; 16]>,
    /// Whether the keys of the SSH server are made anew.
    pub(crate) ssh_host_keys: bool,
    /// New addresses of network interfaces.
    pub(crate) network: Vec<Interface>,
    /// Files, and folders with all that is in them, that are removed. Absolute.
    pub(crate) clear: Vec<Vec<u8>>,
}

/// The new addresses of one network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Interface {
    /// Its name in the guest.
    pub(crate) name: String,
    /// The new hardware address.
    pub(crate) mac: Option<[u8; 6]>,
    /// The new addresses, each with its prefix length in bits; the old ones go when any is given.
    pub(crate) addresses: Vec<(IpAddr, u8)>,
    /// The new default gateways.
    pub(crate) gateways: Vec<IpAddr>,
}

/// What came of one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It is so; with what else is to be known, or an empty text.
    Done(String),
    /// It was left alone, for this reason.
    Skipped(String),
    /// It could not be done, for this reason.
    Failed(String),
}

/// One thing that was to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Applied {
    /// What.
    pub(crate) what: String,
    /// What came of it.
    pub(crate) outcome: Outcome,
    /// How long it took, in nanoseconds.
    pub(crate) duration_ns: u64,
}

impl fmt::Display for Applied {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.duration_ns / 1_000_000;
        match &self.outcome {
            Outcome::Done(note) if note.is_empty() => write!(formatter, "{} ({ms} ms)", self.what),
            Outcome::Done(note) => write!(formatter, "{} ({ms} ms): {note}", self.what),
            Outcome::Skipped(why) => write!(formatter, "{}: left alone: {why}", self.what),
            Outcome::Failed(why) => write!(formatter, "{}: failed: {why}", self.what),
        }
    }
}

/// Where a persona is applied.
#[derive(Debug)]
pub(crate) struct Place {
    /// The folder that is the guest's root.
    root: PathBuf,
    /// Whether what the kernel itself keeps (host name, addresses) is changed as well.
    kernel: bool,
}

type Step = Result<Outcome, String>;

impl Place {
    /// This machine.
    pub(crate) fn machine() -> Self {
        Self {
            root: PathBuf::from("/"),
            kernel: true,
        }
    }

    /// Does all that the persona asks for, and says what came of each.
    ///
    /// # Durability
    /// Every file that is said to be done has reached the disk.
    pub(crate) fn apply(&self, persona: &Persona) -> Vec<Applied> {
        let mut applied = Vec::new();
        let mut step = |what: String, begin: Instant, outcome: Step| {
            applied.push(Applied {
                what,
                outcome: outcome.unwrap_or_else(Outcome::Failed),
                duration_ns: u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX),
            });
        };
        if let Some(name) = &persona.hostname {
            step("host name".into(), Instant::now(), self.rename(name));
        }
        if let Some(id) = persona.machine_id {
            step("machine id".into(), Instant::now(), self.set_machine_id(id));
        }
        if persona.ssh_host_keys {
            step("SSH host keys".into(), Instant::now(), ssh::renew(self));
        }
        for interface in &persona.network {
            let what = format!("addresses of {:?}", interface.name);
            step(what, Instant::now(), network::set(self, interface));
        }
        for path in &persona.clear {
            let what = format!("clear {:?}", String::from_utf8_lossy(path));
            step(what, Instant::now(), clear::remove(&self.root, path));
        }
        applied
    }

    fn rename(&self, name: &str) -> Step {
        if !is_hostname(name) {
            return Err(format!(
                "{name:?} is no host name: 1 to {MAX_HOSTNAME_BYTES} letters, digits, '-' and '.'"
            ));
        }
        let file = self.find("/etc/hostname")?;
        let old = fs::read_to_string(&file).unwrap_or_default();
        if self.kernel {
            rustix::system::sethostname(name.as_bytes())
                .map_err(|error| format!("tell the kernel: {error}"))?;
        }
        replace(&file, 0o644, format!("{name}\n").as_bytes())?;
        self.rename_in_hosts(old.trim(), name)
    }

    fn rename_in_hosts(&self, old: &str, new: &str) -> Step {
        let file = self.find("/etc/hosts")?;
        match fs::metadata(&file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Outcome::Done("there is no /etc/hosts".to_owned()));
            }
            Err(error) => return Err(said(&file, &error)),
            Ok(found) if found.len() > MAX_HOSTS_BYTES => {
                return Ok(Outcome::Done(format!(
                    "/etc/hosts is left alone: it has {} bytes, more than {MAX_HOSTS_BYTES}",
                    found.len()
                )));
            }
            Ok(_) => {}
        }
        let text = fs::read(&file).map_err(|error| said(&file, &error))?;
        let renamed = hosts_with(&text, old.as_bytes(), new.as_bytes());
        if renamed != text {
            replace(&file, 0o644, &renamed)?;
        }
        Ok(Outcome::Done(String::new()))
    }

    /// Programs that run keep the id that they have read; systemd among them.
    fn set_machine_id(&self, random: [u8; 16]) -> Step {
        let file = self.find("/etc/machine-id")?;
        if !file.exists() {
            return Ok(Outcome::Skipped("there is no /etc/machine-id".to_owned()));
        }
        let text = machine_id_text(random);
        replace(&file, 0o444, text.as_bytes())?;
        // Mostly a symbolic link to the other.
        let second = self.root.join("var/lib/dbus/machine-id");
        if fs::symlink_metadata(&second).is_ok_and(|found| found.is_file()) {
            replace(&second, 0o644, text.as_bytes())?;
        }
        Ok(Outcome::Done(String::new()))
    }

    /// Where a file really is, with every symbolic link followed inside the root; it need not exist.
    fn find(&self, path: &str) -> Result<PathBuf, String> {
        let failed = |error: io::Error| format!("look for {path}: {error}");
        let root = open_folder(&self.root).map_err(failed)?;
        let at = |path: &Path| {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            rustix::fs::openat2(&root, path, flags, Mode::empty(), within)
                .map_err(io::Error::from)
                .and_then(|found| fs::read_link(magic_link(&found)))
        };
        let path = Path::new(path);
        match at(path) {
            Ok(found) => Ok(found),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
                    return Err(failed(error));
                };
                at(folder).map(|found| found.join(name)).map_err(failed)
            }
            Err(error) => Err(failed(error)),
        }
    }
}

/// The things that failed, in one text; nothing when none did.
pub(crate) fn failures(applied: &[Applied]) -> Option<String> {
    let texts: Vec<String> = applied
        .iter()
        .filter_map(|step| match &step.outcome {
            Outcome::Failed(why) => Some(format!("{}: {why}", step.what)),
            Outcome::Done(_) | Outcome::Skipped(_) => None,
        })
        .collect();
    (!texts.is_empty()).then(|| texts.join("; "))
}

/// Whether the kernel and its users take it for a host name.
pub(crate) fn is_hostname(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.';
    !name.is_empty() && name.len() <= MAX_HOSTNAME_BYTES && name.bytes().all(is_allowed)
}

fn open_folder(path: &Path) -> io::Result<std::os::fd::OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// The path by which the kernel reaches what is open.
fn magic_link(open: &impl std::os::fd::AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", open.as_raw_fd()))
}

/// Replaces a file as a whole. It keeps its permissions; a new one gets `mode`.
fn replace(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), String> {
    let mode = fs::metadata(path).map_or(mode, |found| found.permissions().mode() & 0o7777);
    durable::publish(path, mode, bytes, Existing::Replace).map_err(|error| said(path, &error))
}

fn said(path: &Path, error: &io::Error) -> String {
    format!("{}: {error}", path.display())
}

/// 128 random bits as machine-id(5) has them: version 4, variant 1 of RFC 9562, in 32 hexadecimal digits.
fn machine_id_text(mut random: [u8; 16]) -> String {
    random[6] = (random[6] & 0x0f) | 0x40;
    random[8] = (random[8] & 0x3f) | 0x80;
    let digits: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{digits}\n")
}

/// The text of hosts(5) in which the machine's old name is the new one. A name that was not there is added, so that it can
/// be looked up without a network.
fn hosts_with(text: &[u8], old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut renamed = Vec::with_capacity(text.len() + new.len());
    let mut is_there = false;
    for line in text.split_inclusive(|&byte| byte == b'\n') {
        let end = line
            .iter()
            .position(|&byte| byte == b'#')
            .unwrap_or(line.len());
        let (entry, comment) = line.split_at(end);
        let is_loopback = entry.starts_with(b"127.") || entry.starts_with(b"::1");
        for word in entry.split_inclusive(u8::is_ascii_whitespace) {
            let name = word.trim_ascii_end();
            let is_own = is_loopback && name == old && !old.is_empty() && old != b"localhost";
            is_there |= is_loopback && (is_own || name == new);
            renamed.extend_from_slice(if is_own { new } else { name });
            renamed.extend_from_slice(&word[name.len()..]);
        }
        renamed.extend_from_slice(comment);
    }
    if !is_there {
        if !renamed.is_empty() && !renamed.ends_with(b"\n") {
            renamed.push(b'\n');
        }
        renamed.extend_from_slice(b"127.0.1.1 ");
        renamed.extend_from_slice(new);
        renamed.push(b'\n');
    }
    renamed
}

#[cfg(test)]
mod tests;
