//! Another agent in the place of this one, in a guest that runs.
//!
//! ```text
//!   new file ──size, digest──▶ copied beside the old one, synced ──it says its version──▶ renamed over it    install
//!                 └── anything wrong: the copy is removed, the old agent runs on and starts again as ever
//!   running agent ──hands its children over──▶ exec of the new file, same process number                     restart
//!                 └── the exec fails: the old agent goes on
//! ```
//! The process stays, so a service manager notices nothing, and as process 1 the machine stays up. Sessions end; commands
//! go on, and hosts attach to them again ([`crate::succession`]).

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;
use stead_sys::durable::{self, Existing};

use crate::error::{AgentError, Attempt};
use crate::handover::{Handover, Heir};
use crate::reaper;
use crate::succession::Inherited;
use crate::tool;

/// The largest agent that is taken, in bytes.
const MAX_AGENT_BYTES: u64 = 64 << 20;
/// How long a new agent may take to say its version.
const VERSION_LIMIT: Duration = Duration::from_secs(20);
/// What each agent begins to say then.
const VERSION_PREFIX: &str = "stead-agent ";
/// The mode of a restarted agent, before the options that it had.
pub(crate) const RESUME: &str = "resume";

/// A new agent that is in place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Installed {
    /// What it says its version is.
    pub(crate) version: String,
    /// Its size in bytes.
    pub(crate) bytes: usize,
}

/// Puts the agent in the file `new`, whose BLAKE3 digest is `digest`, in the place of the one at `target`.
///
/// # Durability
/// When this returns `Ok`, the new agent has reached the disk. Else the old one is as it was.
///
/// # Errors
/// When the file is not what was announced, or does not run, or cannot be written.
pub(crate) fn install(
    new: &Path,
    digest: &[u8; 32],
    target: &Path,
) -> Result<Installed, AgentError> {
    let agent = read(new)?;
    let found = blake3::hash(&agent);
    if found != *digest {
        return Err(AgentError::Content {
            path: new.to_owned(),
            found: format!(
                "has the BLAKE3 digest {found}, not {}; the agent is unchanged",
                blake3::Hash::from_bytes(*digest)
            ),
        });
    }
    let mut name = target.as_os_str().to_owned();
    name.push(".new");
    let beside = PathBuf::from(name);
    durable::publish(&beside, 0o755, &agent, Existing::Replace)
        .attempt(|| format!("write {}; the agent is unchanged", beside.display()))?;
    let installed = ask_version(&beside).and_then(|version| {
        durable::move_to(&beside, target, Existing::Replace)
            .attempt(|| format!("put the new agent in place of {}", target.display()))?;
        Ok(Installed {
            version,
            bytes: agent.len(),
        })
    });
    if installed.is_err() {
        durable::remove_file(&beside).attempt(|| format!("remove {}", beside.display()))?;
    }
    installed
}

fn read(path: &Path) -> Result<Vec<u8>, AgentError> {
    let mut bytes = Vec::new();
    let file = File::open(path).attempt(|| format!("open {}", path.display()))?;
    let found = file
        .metadata()
        .attempt(|| format!("look at {}", path.display()))?;
    if !found.is_file() || found.len() > MAX_AGENT_BYTES {
        return Err(AgentError::Content {
            path: path.to_owned(),
            found: format!("is no file of at most {MAX_AGENT_BYTES} bytes; the agent is unchanged"),
        });
    }
    file.take(MAX_AGENT_BYTES)
        .read_to_end(&mut bytes)
        .attempt(|| format!("read {}", path.display()))?;
    Ok(bytes)
}

fn ask_version(agent: &Path) -> Result<String, AgentError> {
    let wrong = |found: String| AgentError::Content {
        path: agent.to_owned(),
        found: format!("{found}; the agent is unchanged"),
    };
    let said = tool::run(Command::new(agent).arg("--version"), VERSION_LIMIT).map_err(wrong)?;
    match said.trim().strip_prefix(VERSION_PREFIX) {
        Some(version) => Ok(version.to_owned()),
        None => Err(wrong(format!("is no agent: it says {said:?}"))),
    }
}

/// Where this agent's own file is; also after another has taken its place there.
///
/// # Errors
/// When the kernel does not say.
pub(crate) fn own_file() -> Result<PathBuf, AgentError> {
    let link = "/proc/self/exe";
    let path = fs::read_link(link).attempt(|| format!("read {link}"))?;
    let text = path.to_string_lossy();
    Ok(text
        .strip_suffix(" (deleted)")
        .map_or_else(|| path.clone(), PathBuf::from))
}

/// Becomes the agent in the file `program`, with the options that this one was started with, and hands `handover` to it with
/// all other children of this process. Gives back only an error; the old agent then goes on.
pub(crate) fn restart(program: &Path, options: &[OsString], mut handover: Handover) -> AgentError {
    add_other_children(&mut handover);
    let begin = || {
        let socket = handover.send()?;
        rustix::stdio::dup2_stdin(&socket).attempt(|| "give the socket on".to_owned())?;
        let error = Command::new(program).arg(RESUME).args(options).exec();
        close_stdin()?;
        Err::<(), _>(error).attempt(|| format!("become {}", program.display()))
    };
    match begin() {
        Ok(()) => unreachable!("an exec that succeeds does not come back"),
        Err(error) => error,
    }
}

/// Takes over from the agent before, in the same process, which had the same options. Gives what it has left.
///
/// # Errors
/// When standard input is not what [`restart`] makes it. The children of the agent before are then lost sight of.
pub(crate) fn resume(options: &[OsString]) -> Result<Inherited, AgentError> {
    let socket = options
        .iter()
        .skip_while(|option| *option != "--socket")
        .nth(1);
    if let Some(path) = socket {
        // Its listener is gone with the program.
        durable::remove_file(Path::new(path)).attempt(|| format!("remove {}", path.display()))?;
    }
    let taken = Handover::receive(rustix::stdio::stdin())?;
    close_stdin()?;
    Inherited::take(taken)
}

fn close_stdin() -> Result<(), AgentError> {
    let nothing = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    nothing
        .and_then(rustix::stdio::dup2_stdin)
        .attempt(|| "close standard input".to_owned())
}

/// Children that nobody handed over (launchers, programs that hang) are to be reaped as well; process 1 reaps everybody.
fn add_other_children(handover: &mut Handover) {
    let own = Pid::as_raw(Some(rustix::process::getpid()));
    if own == 1 {
        return;
    }
    let known: Vec<i32> = handover.children.iter().map(|heir| heir.pid).collect();
    for pid in reaper::children_of(own) {
        if !known.contains(&pid) {
            handover.children.push(Heir {
                pid,
                key: None,
                stdin: None,
                outputs: Vec::new(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program that says what an agent says.
    fn program(folder: &Path, name: &str, script: &str) -> (PathBuf, [u8; 32]) {
        let path = folder.join(name);
        let text = format!("#!/bin/sh\n{script}\n");
        durable::publish(&path, 0o755, text.as_bytes(), Existing::Replace).expect("written");
        (path, *blake3::hash(text.as_bytes()).as_bytes())
    }

    #[test]
    fn only_an_agent_with_the_announced_digest_takes_the_place_of_another() {
        let folder = tempfile::tempdir().expect("folder");
        let target = folder.path().join("stead-agent");
        program(folder.path(), "stead-agent", "echo stead-agent 1");
        let old = fs::read(&target).expect("read");
        let (good, digest) = program(folder.path(), "good", "echo stead-agent 2");
        let (other, other_digest) = program(folder.path(), "other", "echo something else");
        let (broken, broken_digest) = program(folder.path(), "broken", "echo no >&2; exit 1");
        let mut flipped = digest;
        flipped[31] ^= 1;
        for (file, digest, why) in [
            (&good, flipped, "digest"),
            (&other, other_digest, "is no agent"),
            (&broken, broken_digest, "no (exit status: 1)"),
            (&folder.path().to_owned(), digest, "is no file"),
        ] {
            let error = install(file, &digest, &target).expect_err(why).to_string();
            assert!(
                error.contains(why) && error.contains("unchanged"),
                "{error}"
            );
            assert_eq!(fs::read(&target).expect("read"), old, "{why}");
            assert!(!folder.path().join("stead-agent.new").exists(), "{why}");
        }
        let installed = install(&good, &digest, &target).expect("installed");
        assert_eq!(installed.version, "2");
        assert_eq!(
            fs::read(&target).expect("read"),
            fs::read(&good).expect("read")
        );
    }
}
