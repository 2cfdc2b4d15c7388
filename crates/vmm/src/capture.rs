//! Capture: one instant of a running VM, as frozen layers, device state and a RAM file.
//!
//! ```text
//!  prepare   RAM copied once or written back, overlays opened       guest runs
//!  ── stop ──────────────────────────────────────────────────────── guest stands still
//!  snapshot  one transaction puts every disk on its overlay
//!  state     device state into our memory (with the RAM, if it is private: split off into the file)
//!  ram       shared RAM: reflink or sparse copy of the RAM file
//!  ── cont ──────────────────────────────────────────────────────── guest runs
//!  freeze    layers below the overlays reopened read-only, and proven so
//!  verify    the stream walked to its end mark
//! ```
//!
//! After an error anywhere behind *stop*, the VM is let go on and the error says whether it does.
//! After *snapshot* the disks stay on the overlays whatever happens, and the error carries the chains.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::disks::{self, BlockGraph, DiskChain, OpenOverlay};
use crate::error::{CaptureError, CapturePhase, Error, GuestAfter, Result};
use crate::launch::RamSharing;
use crate::migration;
use crate::state_stream::{self, Receiver, StateFormat};
use crate::vm::{RunState, Vm};

/// The longest device state that is accepted unless the caller says otherwise, in bytes.
pub const STATE_BYTES_MAX: u64 = 256 << 20;
/// How long taking the state may take, RAM not counted.
const STATE_WITHIN: Duration = Duration::from_secs(60);
/// How many bytes of private RAM a second are expected at least.
const RAM_BYTES_PER_SECOND_MIN: u64 = 32 << 20;
/// How long cancelling a migration may take.
const CANCEL_WITHIN: Duration = Duration::from_secs(20);

/// For how long at most a guest with so much memory stands still while its state is taken: whoever talks to it must be
/// that patient.
#[must_use]
pub fn longest_pause(memory_bytes: u64) -> Duration {
    STATE_WITHIN + Duration::from_secs(memory_bytes / RAM_BYTES_PER_SECOND_MIN)
}

/// A fresh overlay for a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewOverlay {
    /// The disk.
    pub disk: String,
    /// An empty qcow2 file of the disk's size, which nothing else uses; absolute. Its backing file
    /// name is not followed.
    pub path: PathBuf,
}

/// A moment of a capture that others wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// All is prepared, and the vCPUs are told to stop next.
    Stopping,
    /// The vCPUs run again.
    Resumed,
}

/// What a capture needs.
pub struct CaptureRequest<'a> {
    /// One overlay for each disk of the VM.
    pub overlays: &'a [NewOverlay],
    /// Where the RAM goes: an empty file open for reading and writing. On the RAM file's own file
    /// system a reflink makes the pause short. Nothing is synced. `None`: it stays where it is, which is possible
    /// where it is shared and the VM is left standing still.
    pub ram: Option<&'a File>,
    /// The longest device state accepted, in bytes ([`STATE_BYTES_MAX`]).
    pub state_bytes_max: u64,
    /// Told of each moment when it has come; the capture waits for it. One that breaks off as the vCPUs are to be stopped, and
    /// says why, ends the capture before anything was changed. After an error the guest runs on, and it is not told.
    pub at: &'a dyn Fn(Moment) -> ControlFlow<String>,
}

impl std::fmt::Debug for CaptureRequest<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CaptureRequest")
            .field("overlays", &self.overlays)
            .field("ram", &self.ram)
            .field("state_bytes_max", &self.state_bytes_max)
            .finish_non_exhaustive()
    }
}

/// How the RAM was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RamMethod {
    /// The file system shares the blocks of the RAM file.
    Reflink,
    /// The data ranges of the RAM file were copied.
    Sparse,
    /// The VM's private pages came with the device state and were split off.
    Stream,
    /// It was not: the RAM file has it as long as the VM stands still.
    InPlace,
}

/// How long each step took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PhaseTimes {
    /// Before the pause.
    pub prepare: Duration,
    /// Stopping the vCPUs, draining and flushing the disks.
    pub stop: Duration,
    /// Switching the disks.
    pub snapshot: Duration,
    /// Device state; for private RAM, the RAM too.
    pub state: Duration,
    /// RAM file.
    pub ram: Duration,
    /// Letting the guest go on; zero while it is not asked to.
    pub resume: Duration,
    /// Freezing the layers; zero while they are not.
    pub freeze: Duration,
    /// How long the guest stood still, by one clock: from before it was told to stop until it was seen to
    /// run again, or, while it is not asked to go on, until its state was taken.
    pub paused: Duration,
}

/// One instant of a VM.
#[derive(Debug)]
pub struct Captured {
    /// The device state stream, to be loaded with `state_format`.
    pub device_state: Vec<u8>,
    /// How the stream is to be loaded.
    pub state_format: StateFormat,
    /// How the RAM was taken.
    pub ram_method: RamMethod,
    /// The RAM's size in bytes; the file given is that long.
    pub memory_bytes: u64,
    /// The chains now: below each overlay lies the frozen instant.
    pub chains: Vec<DiskChain>,
    /// How long each step took.
    pub times: PhaseTimes,
}

/// One instant of a VM's disks.
#[derive(Debug)]
pub struct CapturedDisks {
    /// The chains now: below each overlay lies the frozen instant, all layers there read-only.
    pub chains: Vec<DiskChain>,
    /// How long switching took; the guest's disk requests waited so long.
    pub switched_in: Duration,
}

/// What is ready when the pause begins.
struct Prepared {
    overlays: Vec<OpenOverlay>,
    source: RamSource,
    receiver: Receiver,
}

/// The RAM as QEMU has it.
struct RamSource {
    sharing: RamSharing,
    memory_bytes: u64,
    path: PathBuf,
}

/// What the pause gave.
struct Taken {
    device_state: Vec<u8>,
    ram_method: RamMethod,
}

impl Vm {
    /// Captures the running VM; it goes on as soon as its RAM has been taken.
    ///
    /// When this returns, the frozen layers are open read-only and the device state was walked to its
    /// end. Nothing is synced.
    ///
    /// # Errors
    /// [`Error::Capture`] says which step failed, what the guest does and where the disks write.
    ///
    /// # Panics
    /// When the request leaves the RAM where it is.
    pub fn capture(&mut self, request: &CaptureRequest<'_>) -> Result<Captured> {
        assert!(request.ram.is_some(), "a VM that goes on changes its RAM");
        let (mut captured, stopped) = self.take(request)?;
        self.go_on(&mut captured)?;
        captured.times.paused = stopped.elapsed();
        // It has happened: there is nothing to break off any more.
        drop((request.at)(Moment::Resumed));
        let started = Instant::now();
        captured.chains = self
            .freeze_layers()
            .map_err(|error| self.after_switch(CapturePhase::Freeze, error))?;
        captured.times.freeze = started.elapsed();
        state_stream::verify(&captured.device_state, captured.state_format)
            .map_err(|error| self.after_switch(CapturePhase::Verify, error))?;
        Ok(captured)
    }

    /// Captures the running VM and leaves it standing still.
    ///
    /// Then either [`Vm::quit`] (hibernate), or [`Vm::resume`] and [`Vm::freeze_layers`]. The device state
    /// was walked to its end.
    ///
    /// # Errors
    /// As [`Vm::capture`].
    pub fn capture_paused(&mut self, request: &CaptureRequest<'_>) -> Result<Captured> {
        let (mut captured, stopped) = self.take(request)?;
        captured.times.paused = stopped.elapsed();
        let verified = state_stream::verify(&captured.device_state, captured.state_format);
        match verified.and_then(|_| self.disks()) {
            Ok(chains) => Ok(Captured { chains, ..captured }),
            Err(error) => Err(self.give_up(CapturePhase::Verify, error, &[]).into()),
        }
    }

    /// Freezes the disks alone, at one instant; the guest runs on.
    ///
    /// What the guest has not flushed is not in the frozen layers: let it freeze its file systems first.
    ///
    /// # Errors
    /// As [`Vm::capture`].
    pub fn capture_disks(&mut self, overlays: &[NewOverlay]) -> Result<CapturedDisks> {
        let open = self
            .check_running("capture the disks")
            .and_then(|()| self.open_overlays(overlays))
            .map_err(|error| self.give_up(CapturePhase::Prepare, error, &[]))?;
        let started = Instant::now();
        if let Err(error) = disks::switch(self.qmp(), &open) {
            return Err(self.give_up(CapturePhase::Snapshot, error, &open).into());
        }
        let switched_in = started.elapsed();
        let chains = self
            .freeze_layers()
            .map_err(|error| self.after_switch(CapturePhase::Freeze, error))?;
        Ok(CapturedDisks {
            chains,
            switched_in,
        })
    }

    /// Everything up to the moment when the guest may go on, and when it was told to stop. The chains
    /// are left to the caller: asking for them would keep the guest waiting.
    fn take(&mut self, request: &CaptureRequest<'_>) -> Result<(Captured, Instant)> {
        let started = Instant::now();
        let mut times = PhaseTimes::default();
        let prepared = match self.prepare(request) {
            Ok(prepared) => prepared,
            Err(error) => return Err(self.give_up(CapturePhase::Prepare, error, &[]).into()),
        };
        times.prepare = started.elapsed();
        if let ControlFlow::Break(why) = (request.at)(Moment::Stopping) {
            prepared.receiver.abort();
            let unwanted = Error::BrokenOff { why };
            return Err(self
                .give_up(CapturePhase::Prepare, unwanted, &prepared.overlays)
                .into());
        }
        let mut phase = CapturePhase::Stop;
        let stopped = Instant::now();
        match self.take_stopped(request, &prepared, &mut phase, &mut times) {
            Ok(taken) => Ok((
                Captured {
                    device_state: taken.device_state,
                    state_format: prepared.source.state_format(),
                    ram_method: taken.ram_method,
                    memory_bytes: prepared.source.memory_bytes,
                    chains: Vec::new(),
                    times,
                },
                stopped,
            )),
            Err(error) => {
                prepared.receiver.abort();
                Err(self.give_up(phase, error, &prepared.overlays).into())
            }
        }
    }

    fn prepare(&mut self, request: &CaptureRequest<'_>) -> Result<Prepared> {
        self.check_running("capture")?;
        let source = self.ram_source()?;
        match (request.ram, source.sharing) {
            (Some(ram), sharing) => {
                check_empty(ram)?;
                if sharing == RamSharing::Shared {
                    source.warm_up(ram)?;
                }
            }
            (None, RamSharing::Shared) => {}
            (None, RamSharing::Private) => {
                return Err(Error::Description {
                    what: "RAM that is to stay where it is",
                    expected: "shared RAM".to_owned(),
                    found: "private RAM".to_owned(),
                });
            }
        }
        let overlays = self.open_overlays(request.overlays)?;
        let receiver = self.ready_stream(request, &source);
        match receiver {
            Ok(receiver) => Ok(Prepared {
                overlays,
                source,
                receiver,
            }),
            Err(error) => {
                self.close_overlays(&overlays);
                Err(error)
            }
        }
    }

    fn ready_stream(
        &mut self,
        request: &CaptureRequest<'_>,
        source: &RamSource,
    ) -> Result<Receiver> {
        migration::set_format(self.qmp(), source.state_format())?;
        let split_into = match source.sharing {
            RamSharing::Shared => None,
            RamSharing::Private => request.ram.map(|ram| (ram, source.memory_bytes)),
        };
        let (receiver, theirs) = Receiver::start(split_into, request.state_bytes_max)?;
        self.qmp()
            .give_descriptor(migration::DESCRIPTOR, theirs.as_fd())?;
        Ok(receiver)
    }

    /// The steps during which the guest stands still.
    fn take_stopped(
        &mut self,
        request: &CaptureRequest<'_>,
        prepared: &Prepared,
        phase: &mut CapturePhase,
        times: &mut PhaseTimes,
    ) -> Result<Taken> {
        timed(&mut times.stop, || self.stop())?;
        *phase = CapturePhase::Snapshot;
        timed(&mut times.snapshot, || {
            disks::switch(self.qmp(), &prepared.overlays)
        })?;
        *phase = CapturePhase::State;
        let device_state = timed(&mut times.state, || self.take_state(prepared))?;
        *phase = CapturePhase::Ram;
        let ram_method = match (prepared.source.sharing, request.ram) {
            (RamSharing::Private, _) => RamMethod::Stream,
            (RamSharing::Shared, None) => RamMethod::InPlace,
            (RamSharing::Shared, Some(ram)) => {
                timed(&mut times.ram, || prepared.source.copy_to(ram))?
            }
        };
        Ok(Taken {
            device_state,
            ram_method,
        })
    }

    fn take_state(&mut self, prepared: &Prepared) -> Result<Vec<u8>> {
        let within = prepared.source.state_within();
        migration::start_saving(self.qmp())?;
        let saved = migration::wait_completed(self.qmp(), "saving", within);
        match saved {
            Ok(()) => prepared.receiver.finish(STATE_WITHIN),
            // If the reader gave up first, that is why QEMU could not write.
            Err(error) => Err(prepared.receiver.failure().unwrap_or(error)),
        }
    }

    fn go_on(&mut self, captured: &mut Captured) -> Result<()> {
        let started = Instant::now();
        let resumed = self.ask::<Value>("cont", json!({}));
        captured.times.resume = started.elapsed();
        let resumed = resumed.and_then(|_| self.check_running("go on"));
        resumed.map_err(|error| self.give_up(CapturePhase::Resume, error, &[]).into())
    }

    fn check_running(&mut self, operation: &'static str) -> Result<()> {
        self.status()?
            .require(&[RunState::Running], operation, "running")
    }

    /// Opens one overlay for each disk: all of them, or none.
    fn open_overlays(&mut self, overlays: &[NewOverlay]) -> Result<Vec<OpenOverlay>> {
        let graph = BlockGraph::query(self.qmp())?;
        let chains = graph.chains()?;
        check_names(&chains, overlays)?;
        let mut open = Vec::new();
        for (chain, path) in chains.iter().zip(paths_in_order(&chains, overlays)) {
            match disks::open_overlay(self.qmp(), &graph, chain, &path.to_string_lossy()) {
                Ok(overlay) => open.push(overlay),
                Err(error) => {
                    self.close_overlays(&open);
                    return Err(error);
                }
            }
        }
        Ok(open)
    }

    fn close_overlays(&mut self, overlays: &[OpenOverlay]) {
        for overlay in overlays {
            disks::close_overlay(self.qmp(), &overlay.node);
        }
    }

    /// Where the RAM is, in QEMU's own words.
    fn ram_source(&mut self) -> Result<RamSource> {
        let ask = |name: &str| json!({ "path": "/objects/ram0", "property": name });
        let shared: bool = self.ask("qom-get", ask("share"))?;
        let memory_bytes = self.ask("qom-get", ask("size"))?;
        let path: PathBuf = self.ask("qom-get", ask("mem-path"))?;
        Ok(RamSource {
            sharing: if shared {
                RamSharing::Shared
            } else {
                RamSharing::Private
            },
            memory_bytes,
            path: self.dir().join(path),
        })
    }

    /// Makes the best of a failure: ends what is in flight, lets the guest go on, closes overlays that
    /// are not used, and says what stands.
    fn give_up(
        &mut self,
        phase: CapturePhase,
        error: Error,
        overlays: &[OpenOverlay],
    ) -> CaptureError {
        let source = self.explain(error);
        let guest = self.let_go_on();
        if guest == GuestAfter::Gone {
            return self.report(phase, source, guest);
        }
        self.drop_descriptor();
        let mut report = self.report(phase, source, guest);
        if let Some(chains) = &report.chains {
            let in_use =
                |overlay: &&OpenOverlay| chains.iter().any(|c| c.top().node == overlay.node);
            let (used, unused): (Vec<&OpenOverlay>, Vec<_>) = overlays.iter().partition(in_use);
            report.disks_switched |= !used.is_empty();
            for overlay in unused {
                disks::close_overlay(self.qmp(), &overlay.node);
            }
        }
        report
    }

    /// For a failure behind the pause.
    fn after_switch(&mut self, phase: CapturePhase, error: Error) -> CaptureError {
        let source = self.explain(error);
        let guest = match self.status() {
            Ok(RunState::Running) => GuestAfter::Running,
            Ok(other) => GuestAfter::Stopped(other.to_string()),
            Err(Error::Died { .. } | Error::Connection { .. }) => GuestAfter::Gone,
            Err(other) => GuestAfter::Stopped(other.to_string()),
        };
        self.report(phase, source, guest)
    }

    fn report(&mut self, phase: CapturePhase, source: Error, guest: GuestAfter) -> CaptureError {
        let chains = match guest {
            GuestAfter::Gone => None,
            GuestAfter::Running | GuestAfter::Stopped(_) => self.disks().ok(),
        };
        let switched = matches!(
            phase,
            CapturePhase::State
                | CapturePhase::Ram
                | CapturePhase::Resume
                | CapturePhase::Freeze
                | CapturePhase::Verify
        );
        CaptureError {
            phase,
            source,
            disks_switched: switched,
            chains,
            guest,
        }
    }

    fn let_go_on(&mut self) -> GuestAfter {
        match self
            .settle_and_resume()
            .map_err(|error| self.explain(error))
        {
            Ok(()) => GuestAfter::Running,
            Err(Error::Died { .. } | Error::NotRunning { .. }) => GuestAfter::Gone,
            Err(error) => GuestAfter::Stopped(error.to_string()),
        }
    }

    /// Ends a migration in flight and resumes the VM unless it runs.
    pub(crate) fn settle_and_resume(&mut self) -> Result<()> {
        migration::settle(self.qmp(), CANCEL_WITHIN)?;
        if self.status()? == RunState::Running {
            return Ok(());
        }
        self.resume()
    }

    /// A stream that was never begun would stay open in QEMU.
    fn drop_descriptor(&mut self) {
        let name = json!({ "fdname": migration::DESCRIPTOR });
        match self.qmp().execute::<Value>("closefd", name) {
            Ok(_) | Err(Error::Refused { .. }) => {}
            Err(error) => tracing::warn!(%error, "QEMU may still hold an unused stream"),
        }
    }
}

impl RamSource {
    fn state_format(&self) -> StateFormat {
        match self.sharing {
            RamSharing::Shared => StateFormat::IgnoreShared,
            RamSharing::Private => StateFormat::RamSplit,
        }
    }

    fn state_within(&self) -> Duration {
        match self.sharing {
            RamSharing::Shared => STATE_WITHIN,
            RamSharing::Private => longest_pause(self.memory_bytes),
        }
    }

    fn open(&self) -> Result<File> {
        File::open(&self.path).map_err(|source| file("open the RAM file", &self.path, source))
    }

    /// Does before the pause what makes the copy during the pause short.
    ///
    /// Where the file system shares blocks, the RAM is written back: sharing it would do that first.
    /// Elsewhere it is copied once while the guest runs, so that the pages and blocks of the copy exist
    /// and only their content is written again (150 MiB on ext4: 1.1 s without, 0.1 s with it).
    fn warm_up(&self, to: &File) -> Result<()> {
        let from = self.open()?;
        let fail = |source| file("prepare the copy of the RAM file", &self.path, source);
        if self.is_reflinked(&from, to).map_err(fail)? {
            from.sync_data().map_err(fail)?;
            return to.set_len(0).map_err(fail);
        }
        stead_sys::copy::sparse(&from, to).map_err(fail)
    }

    /// Tries whether `to` can share the blocks of `from`.
    fn is_reflinked(&self, from: &File, to: &File) -> std::io::Result<bool> {
        use std::os::unix::fs::MetadataExt;
        let same_device = from.metadata()?.dev() == to.metadata()?.dev();
        Ok(same_device && stead_sys::copy::reflink(from, to)?)
    }

    fn copy_to(&self, to: &File) -> Result<RamMethod> {
        let from = self.open()?;
        let fail = |source| file("copy the RAM file", &self.path, source);
        // What was data before the pause and is a hole now would keep its old content.
        if !holes_remain(&from, to).map_err(fail)? {
            to.set_len(0).map_err(fail)?;
        }
        let method = stead_sys::copy::clone_or_copy(&from, to).map_err(fail)?;
        let length = to.metadata().map_err(fail)?.len();
        if length != self.memory_bytes {
            return Err(Error::Description {
                what: "copy of the RAM file",
                expected: format!("{} bytes", self.memory_bytes),
                found: format!("{length} bytes"),
            });
        }
        Ok(match method {
            stead_sys::copy::Method::Reflink => RamMethod::Reflink,
            stead_sys::copy::Method::Sparse => RamMethod::Sparse,
        })
    }
}

/// Whether `to` is a hole wherever `from` is one.
fn holes_remain(from: &File, to: &File) -> std::io::Result<bool> {
    let data = stead_sys::copy::data_ranges(from)?;
    let mut data = data.iter().peekable();
    for copied in stead_sys::copy::data_ranges(to)? {
        while data.next_if(|range| range.end <= copied.start).is_some() {}
        let covered = data
            .peek()
            .is_some_and(|range| range.start <= copied.start && copied.end <= range.end);
        if !covered {
            return Ok(false);
        }
    }
    Ok(true)
}

fn check_empty(ram: &File) -> Result<()> {
    let data = ram.metadata().map_err(|source| Error::System {
        what: "look at the file for the RAM",
        source,
    })?;
    if data.len() == 0 {
        return Ok(());
    }
    Err(Error::Description {
        what: "file for the RAM",
        expected: "an empty file".to_owned(),
        found: format!("{} bytes", data.len()),
    })
}

fn check_names(chains: &[DiskChain], overlays: &[NewOverlay]) -> Result<()> {
    let mut have: Vec<&str> = chains.iter().map(|chain| chain.disk.as_str()).collect();
    let mut given: Vec<&str> = overlays
        .iter()
        .map(|overlay| overlay.disk.as_str())
        .collect();
    have.sort_unstable();
    given.sort_unstable();
    if have == given {
        return Ok(());
    }
    Err(Error::Disks {
        expected: format!("an overlay for each of [{}]", have.join(", ")),
        found: format!("overlays for [{}]", given.join(", ")),
    })
}

fn paths_in_order<'a>(
    chains: &'a [DiskChain],
    overlays: &'a [NewOverlay],
) -> impl Iterator<Item = &'a Path> {
    chains.iter().filter_map(|chain| {
        let overlay = overlays.iter().find(|overlay| overlay.disk == chain.disk)?;
        Some(overlay.path.as_path())
    })
}

fn timed<T>(spent: &mut Duration, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    let result = work();
    *spent = started.elapsed();
    result
}

fn file(what: &'static str, path: &Path, source: std::io::Error) -> Error {
    Error::File {
        what,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    /// A file with data from the first to before the second number, in units of 64 KiB.
    fn sparse_file(data: &[(u64, u64)]) -> File {
        const UNIT: u64 = 64 << 10;
        let file = tempfile::tempfile().expect("temp file");
        file.set_len(64 * UNIT).expect("set the length");
        for (start, end) in data {
            let bytes = vec![7; usize::try_from((end - start) * UNIT).expect("fits")];
            file.write_all_at(&bytes, start * UNIT).expect("write");
        }
        file
    }

    #[test]
    fn a_copy_with_data_where_the_source_has_a_hole_is_noticed() {
        let source = sparse_file(&[(2, 10), (20, 30)]);
        let remain = |data| holes_remain(&source, &sparse_file(data)).expect("ranges");
        let good: [&[_]; 4] = [&[], &[(2, 10), (20, 30)], &[(3, 4), (29, 30)], &[(20, 30)]];
        for data in good {
            assert!(remain(data), "{data:?}");
        }
        let bad: [&[_]; 4] = [&[(0, 1)], &[(2, 11)], &[(2, 10), (15, 16)], &[(40, 41)]];
        for data in bad {
            assert!(!remain(data), "{data:?}");
        }
    }
}
