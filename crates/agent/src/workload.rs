//! The workload: every process but the agent, frozen and thawed as a whole.
//!
//! ```text
//!                 /                                   the agent's path: / → stead-agent.service → agent
//!     ┌───────────┼───────────────┬──────────┐
//!  init.scope  system.slice  user.slice   stead-agent.service
//!   frozen      frozen        frozen       ┌────┴─────┐
//!                                        agent     commands        as process 1 the two are right below the root
//!                                        goes on    frozen
//!
//!   running ──freeze──▶ noted ▸ told ▸ proven ──▶ frozen ──thaw──▶ told ▸ proven ▸ note removed ──▶ running
//!                         └── not within the limit: what this freeze had frozen is thawed again ────┘
//! ```
//! Frozen is every group beside the agent's path, at each level of it, so it does not matter where the agent was put. A
//! process that is *on* the path, where it cannot be frozen without the agent, is moved to `commands` first; the kernel's own
//! threads are no workload. All is listed again until a whole listing shows nothing that is not frozen:
//! a group that appears meanwhile is found.
//!
//! Nothing is kept in memory. What is frozen, and by whom, stands in the kernel ([`crate::cgroup`]), so an agent that
//! starts again goes on where the one before it was. Nothing is thawed by time or because a host went away: a clone
//! must not run before its new life is acknowledged.
//!
//! The file systems must not be frozen before the workload is: a process that waits for a frozen file system sleeps in the
//! kernel and cannot be frozen.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use stead_agent_proto::guest::WorkloadFailure;

use crate::cgroup::{Events, Group};
use crate::error::{AgentError, Attempt, chain};
use crate::mounts;
use crate::standstill::Standstill;

const OWN_GROUP: &str = "agent";
const COMMANDS: &str = "commands";
/// Where process 1 mounts the hierarchy when nobody else has.
const MOUNT_POINT: &str = "/sys/fs/cgroup";
/// How long a thaw may take; the kernel wakes everything at once.
const THAW_LIMIT: Duration = Duration::from_secs(10);
/// How many of those that did not freeze an error names.
const MAX_NAMED: usize = 8;

/// Where commands of this machine are born, once it is known.
static BIRTHPLACE: OnceLock<Group> = OnceLock::new();

/// The workload of this machine.
#[derive(Debug)]
pub(crate) struct Workload {
    root: PathBuf,
    agent: PathBuf,
    commands: Group,
}

/// What a freeze or a thaw did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Report {
    /// Groups that were frozen, or thawed, by this call.
    pub(crate) changed: Vec<String>,
    /// Groups that somebody else had frozen; they stay so after the thaw.
    pub(crate) others: Vec<String>,
    /// Processes that were moved to where they can be frozen.
    pub(crate) moved: usize,
    /// How long it took, in nanoseconds.
    pub(crate) duration_ns: u64,
}

/// What the kernel says about the workload now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum WorkloadState {
    /// The agent holds nothing frozen.
    Running,
    /// Everything is frozen.
    Frozen,
    /// The agent holds a part frozen, and these are not.
    Partly(Vec<String>),
}

/// Why the workload is not as it was told to be, and what stands.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WorkloadError {
    /// Something did not freeze in time.
    #[error(
        "freeze the workload: not frozen within {limit_ms} ms: {}; {stands}",
        .unfrozen.join(", ")
    )]
    NotFrozen {
        /// How long was waited, in milliseconds.
        limit_ms: u64,
        /// The groups, each with processes that run in it.
        unfrozen: Vec<String>,
        /// What stands now.
        stands: String,
    },
    /// A step failed.
    #[error("freeze the workload: {}; {stands}", chain(.source))]
    Step {
        /// Which, and why.
        source: AgentError,
        /// What stands now.
        stands: String,
    },
    /// The thaw is not complete; saying it again goes on with it.
    #[error("thaw the workload: {}; these are still frozen, thaw again: {}", chain(.source), .frozen.join(", "))]
    NotThawed {
        /// Why.
        source: AgentError,
        /// Groups that are.
        frozen: Vec<String>,
    },
}

/// Why a freeze ended early.
enum Stop {
    Late(Vec<String>),
    Step(AgentError),
}

impl From<AgentError> for Stop {
    fn from(error: AgentError) -> Self {
        Self::Step(error)
    }
}

impl Workload {
    /// Finds the agent's place among the control groups, and goes to a group of its own there.
    ///
    /// # Errors
    /// When there is no unified hierarchy, or the agent may not make groups in its own.
    pub(crate) fn discover() -> Result<Self, AgentError> {
        let root = find_hierarchy()?;
        let own = fs::read_to_string("/proc/self/cgroup")
            .attempt(|| "read the own control group".to_owned())?;
        let path = own_path(&own).ok_or_else(|| AgentError::Content {
            path: PathBuf::from("/proc/self/cgroup"),
            found: "no group of the unified hierarchy".to_owned(),
        })?;
        let pid = i32::try_from(std::process::id()).unwrap_or(i32::MAX);
        let workload = Self::settle(&root, &root.join(path.trim_start_matches('/')), pid)?;
        BIRTHPLACE.get_or_init(|| workload.commands.clone());
        Ok(workload)
    }

    /// Gives the process `pid`, the agent, a group of its own below `place`, where it is now. Whatever else is there was
    /// started by an agent.
    fn settle(root: &Path, place: &Path, pid: i32) -> Result<Self, AgentError> {
        let base = match place.parent() {
            Some(parent)
                if place.file_name() == Some(OsStr::new(OWN_GROUP))
                    && place.starts_with(root)
                    && parent.join(COMMANDS).is_dir() =>
            {
                parent
            }
            Some(_) | None => place,
        };
        let agent = Group::make(&base.join(OWN_GROUP))?;
        let commands = Group::make(&base.join(COMMANDS))?;
        agent.admit(pid)?;
        let workload = Self {
            root: root.to_owned(),
            agent: agent.path().to_owned(),
            commands,
        };
        workload.move_strays()?;
        Ok(workload)
    }

    /// Freezes everything and proves it, within `limit`. What is frozen already stays so.
    ///
    /// # Errors
    /// When something does not freeze in time or a step fails; what this call froze is then thawed again.
    pub(crate) fn freeze(&self, limit: Duration) -> Result<Report, WorkloadError> {
        let begin = Instant::now();
        let mut own = Vec::new();
        let stop = match self.freeze_until(begin + limit, &mut own) {
            Ok(mut report) => {
                report.changed = own.iter().map(|group| self.name(group)).collect();
                report.duration_ns = nanoseconds(begin);
                return Ok(report);
            }
            Err(stop) => stop,
        };
        let stands = match self.thaw_groups(own) {
            Ok(_) => "what it had frozen is thawed again".to_owned(),
            Err(error) => error.to_string(),
        };
        Err(match stop {
            Stop::Late(unfrozen) => WorkloadError::NotFrozen {
                limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
                unfrozen,
                stands,
            },
            Stop::Step(source) => WorkloadError::Step { source, stands },
        })
    }

    fn freeze_until(&self, end: Instant, own: &mut Vec<Group>) -> Result<Report, Stop> {
        let mut moved = 0;
        loop {
            let strays = self.move_strays()?;
            moved += strays;
            let mut others = Vec::new();
            let mut waiting = Vec::new();
            for group in self.groups()? {
                self.begin_freeze(&group, own, &mut others)?;
                if let Some(events) = group.events()?
                    && !events.is_frozen()?
                {
                    waiting.push(events);
                }
            }
            if waiting.is_empty() && strays == 0 {
                return Ok(Report {
                    others,
                    moved,
                    ..Report::default()
                });
            }
            await_all(&mut waiting, end, Events::is_frozen)?;
            if !waiting.is_empty() || Instant::now() >= end {
                return Err(Stop::Late(self.describe(&waiting)));
            }
        }
    }

    /// Notes it, then tells it; leaves alone what is told already.
    fn begin_freeze(
        &self,
        group: &Group,
        own: &mut Vec<Group>,
        others: &mut Vec<String>,
    ) -> Result<(), AgentError> {
        let marked = group.is_marked()?;
        if group.is_told_to_freeze()? {
            if !marked {
                others.push(self.name(group));
            }
            return Ok(());
        }
        group.mark()?;
        own.push(group.clone());
        group.tell(true)
    }

    /// Thaws everything that the agent has frozen, in whatever life of it, and proves it.
    ///
    /// # Errors
    /// When a step fails; a second call goes on with what is left.
    pub(crate) fn thaw(&self) -> Result<Report, WorkloadError> {
        let begin = Instant::now();
        let failed = |source| WorkloadError::NotThawed {
            source,
            frozen: Vec::new(),
        };
        let mut marked = Vec::new();
        for group in self.groups().map_err(failed)? {
            if group.is_marked().map_err(failed)? {
                marked.push(group);
            }
        }
        let changed = self.thaw_groups(marked)?;
        Ok(Report {
            changed,
            duration_ns: nanoseconds(begin),
            ..Report::default()
        })
    }

    fn thaw_groups(&self, groups: Vec<Group>) -> Result<Vec<String>, WorkloadError> {
        let mut left = groups.clone();
        match thaw_all(&mut left) {
            Ok(()) => Ok(groups.iter().map(|group| self.name(group)).collect()),
            Err(source) => Err(WorkloadError::NotThawed {
                source,
                frozen: left.iter().map(|group| self.name(group)).collect(),
            }),
        }
    }

    /// What the kernel says now.
    ///
    /// # Errors
    /// When the groups cannot be read.
    pub(crate) fn state(&self) -> Result<WorkloadState, AgentError> {
        let mut held = false;
        let mut unfrozen = Vec::new();
        for group in self.groups()? {
            held |= group.is_marked()? && group.is_told_to_freeze()?;
            if let Some(events) = group.events()?
                && !events.is_frozen()?
            {
                unfrozen.push(self.name(&group));
            }
        }
        for pid in self.strays()? {
            unfrozen.push(format!("process {pid}"));
        }
        Ok(match (held, unfrozen.is_empty()) {
            (false, _) => WorkloadState::Running,
            (true, true) => WorkloadState::Frozen,
            (true, false) => WorkloadState::Partly(unfrozen),
        })
    }

    /// The groups beside the agent's path, from its own level up to the root's.
    fn groups(&self) -> Result<Vec<Group>, AgentError> {
        let mut found = Vec::new();
        for (parent, child) in self.path() {
            let siblings = Group::at(parent).children()?;
            found.extend(siblings.into_iter().filter(|group| group.path() != child));
        }
        Ok(found)
    }

    /// Each group above the agent's own, with the next one on the path to it.
    fn path(&self) -> impl Iterator<Item = (&Path, &Path)> {
        let above = self.agent.ancestors().skip(1);
        above
            .zip(self.agent.ancestors())
            .take_while(|(parent, _)| parent.starts_with(&self.root))
    }

    /// Processes on the agent's path.
    fn strays(&self) -> Result<Vec<i32>, AgentError> {
        let mut found = Vec::new();
        for (parent, _) in self.path() {
            found.extend(Group::at(parent).processes()?);
        }
        found.retain(|&pid| is_program(pid));
        Ok(found)
    }

    fn move_strays(&self) -> Result<usize, AgentError> {
        let mut moved = 0;
        for pid in self.strays()? {
            moved += usize::from(self.commands.admit(pid)?);
        }
        Ok(moved)
    }

    /// The groups that are not frozen, each with some of its processes.
    fn describe(&self, waiting: &[Events]) -> Vec<String> {
        let name = |events: &Events| {
            let group = events.group();
            let processes: Vec<String> = busy(group).iter().map(|&pid| describe(pid)).collect();
            format!("{} ({})", self.name(group), processes.join(", "))
        };
        waiting.iter().take(MAX_NAMED).map(name).collect()
    }

    fn name(&self, group: &Group) -> String {
        let path = group.path();
        path.strip_prefix(&self.root)
            .unwrap_or(path)
            .display()
            .to_string()
    }
}

impl Standstill for Workload {
    fn freeze(&mut self, limit: Duration) -> Result<(), WorkloadFailure> {
        match Self::freeze(self, limit) {
            Ok(_) => Ok(()),
            Err(error) => Err(WorkloadFailure {
                error: error.to_string(),
                still_frozen: self.is_frozen(),
            }),
        }
    }

    fn thaw(&mut self) -> Result<(), String> {
        Self::thaw(self)
            .map(drop)
            .map_err(|error| error.to_string())
    }

    /// What cannot be read counts as frozen: a thaw then says why.
    fn is_frozen(&self) -> bool {
        !matches!(self.state(), Ok(WorkloadState::Running))
    }
}

/// Puts a process among the commands, before it becomes one, where the agent serves a machine. While the workload is frozen
/// it stops at once.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn admit_command(pid: i32) -> Result<(), AgentError> {
    match BIRTHPLACE.get() {
        Some(commands) => commands.admit(pid).map(drop),
        None => Ok(()),
    }
}

fn thaw_all(left: &mut Vec<Group>) -> Result<(), AgentError> {
    for group in &*left {
        group.tell(false)?;
    }
    let mut waiting = Vec::new();
    for group in &*left {
        waiting.extend(group.events()?);
    }
    await_all(&mut waiting, Instant::now() + THAW_LIMIT, Events::is_thawed)?;
    if let Some(events) = waiting.first() {
        return Err(AgentError::Late {
            awaited: format!("the thaw of {}", events.group().path().display()),
            limit_ms: u64::try_from(THAW_LIMIT.as_millis()).unwrap_or(u64::MAX),
        });
    }
    while let Some(group) = left.last() {
        group.unmark()?;
        left.pop();
    }
    Ok(())
}

/// Waits until each is as wanted, or until the end; leaves those that are not.
fn await_all(
    waiting: &mut Vec<Events>,
    end: Instant,
    is_so: fn(&Events) -> Result<bool, AgentError>,
) -> Result<(), AgentError> {
    loop {
        let mut left = Vec::new();
        for events in waiting.drain(..) {
            if !is_so(&events)? {
                left.push(events);
            }
        }
        *waiting = left;
        let time = end.saturating_duration_since(Instant::now());
        if waiting.is_empty() || time.is_zero() {
            return Ok(());
        }
        let mut fds: Vec<PollFd<'_>> = waiting
            .iter()
            .map(|events| PollFd::new(events, PollFlags::PRI))
            .collect();
        let limit = Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(time.subsec_nanos()),
        };
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).attempt(|| "wait for control groups".to_owned()),
        }
    }
}

/// Whether the process runs a program. The kernel's own threads do not, nor does what has ended.
fn is_program(pid: i32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

/// Some processes of a group and the groups below it.
fn busy(group: &Group) -> Vec<i32> {
    let mut found = Vec::new();
    let mut groups = vec![group.clone()];
    while let Some(next) = groups.pop()
        && found.len() < MAX_NAMED
    {
        // For an error's text only: what cannot be read is left out.
        found.extend(next.processes().unwrap_or_default());
        groups.extend(next.children().unwrap_or_default());
    }
    // Those that sleep in the kernel first: they are what holds up a freeze.
    found.sort_by_key(|&pid| state_of(pid) != Some('D'));
    found.truncate(MAX_NAMED);
    found
}

fn describe(pid: i32) -> String {
    let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = String::from_utf8_lossy(name.trim_ascii_end()).into_owned();
    let state = state_of(pid).unwrap_or('?');
    format!("{pid} {name} in state {state}")
}

/// proc(5), `/proc/pid/stat`: the state follows the name in parentheses, which may hold anything.
fn state_of(pid: i32) -> Option<char> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The path of the unified hierarchy in the text of `/proc/self/cgroup`.
fn own_path(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Where the unified hierarchy is mounted. Process 1 mounts it.
fn find_hierarchy() -> Result<PathBuf, AgentError> {
    let list = "/proc/self/mountinfo";
    let mounted = fs::read(list).attempt(|| format!("read {list}"))?;
    if let Some(point) = mounts::cgroup2(&mounted) {
        return Ok(PathBuf::from(OsStr::from_bytes(&point)));
    }
    if std::process::id() != 1 {
        return Err(AgentError::Content {
            path: PathBuf::from(list),
            found:
                "no unified control groups (cgroup2) are mounted, so the workload cannot be frozen"
                    .to_owned(),
        });
    }
    mount("cgroup2", MOUNT_POINT, "cgroup2", MountFlags::empty(), None)
        .attempt(|| format!("mount control groups at {MOUNT_POINT}"))?;
    Ok(PathBuf::from(MOUNT_POINT))
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
