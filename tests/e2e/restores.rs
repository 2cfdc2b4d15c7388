//! One restore after the other from states that were captured at bad moments, each with ten commands at once as soon as it
//! is ready: none hangs, none is lost. `STEAD_SOAK` is how many restores there are (1: a thousand); without it a tenth.
//!
//! QEMU and the agent's ports are driven directly: what is repeated is the path from a device state to the first answers.
#![allow(
    clippy::disallowed_methods,
    reason = "tests write scratch files that nobody keeps"
)]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stead_agent_link::files::{CopyOptions, Guest, Upload};
use stead_agent_link::{
    AgentLink, Command, CommandEvent, Epoch, ExecRequest, ExitStatus, Greeting, Identity, Pty,
    Reason,
};
use stead_tests::{Worker, golden_store};
use stead_vmm::{
    Accelerator, Boot, CaptureRequest, Disk, Launch, Layer, LayerFormat, Machine, NewOverlay, Qemu,
    Ram, RamSharing, STATE_BYTES_MAX, StateFormat, Vm,
};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

const MEMORY_BYTES: u64 = 512 << 20;
/// For what must come to its end, however slow the machine is.
const LIMIT: Duration = Duration::from_secs(300);
/// How many restores there are without STEAD_SOAK, and with STEAD_SOAK=1.
const RESTORES: u16 = 100;
const MANY_RESTORES: u16 = 1000;
/// The slowest command after a restore, on a machine that does nothing else: looked at with STEAD_SOAK.
const SLOWEST: Duration = Duration::from_secs(1);
/// And always. The fault that this is about hangs for a minute.
const NO_HANG: Duration = Duration::from_secs(30);
/// Commands at once when a restore is ready.
const TOGETHER: usize = 10;
/// Streams that are open at a capture.
const STREAMS: usize = 50;

/// What every machine of the test is made of.
struct Rig {
    // Removed before the template's files go with their worker.
    folder: tempfile::TempDir,
    qemu: Qemu,
    base: Layer,
    boot: Boot,
    _worker: Worker,
}

/// A captured instant.
struct Moment {
    name: &'static str,
    ram: PathBuf,
    below: Vec<Layer>,
    state: Vec<u8>,
    format: StateFormat,
}

/// What one restore took.
#[derive(Clone, Copy)]
struct Took {
    ready: Duration,
    slowest: Duration,
}

impl Rig {
    /// The files of the template, as a sandbox was started with them.
    fn new() -> Self {
        let worker = Worker::on(golden_store());
        worker.boot("web");
        let line = fs::read(format!("/proc/{}/cmdline", worker.pid("web"))).expect("command line");
        let words: Vec<String> = line
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        let after = |option: &str| {
            let at = words.iter().position(|word| word == option);
            words[at.expect("the option") + 1].clone()
        };
        let boot = Boot {
            kernel: after("-kernel").into(),
            initrd: Some(after("-initrd").into()),
            command_line: after("-append"),
        };
        let layers = fs::read_dir(worker.data.join("layers")).expect("layers");
        let base = layers
            .map(|entry| entry.expect("entry").path())
            .find(|path| path.extension().is_some_and(|kind| kind == "raw"));
        stead_tests::kill(worker.pid("web"));
        Self {
            folder: tempfile::tempdir().expect("folder"),
            qemu: Qemu::detect(None).expect("QEMU"),
            base: Layer {
                path: base.expect("the template's disk"),
                format: LayerFormat::Raw,
            },
            boot,
            _worker: worker,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn overlay(&self, name: &str, below: &Layer) -> Layer {
        let path = self.path(&format!("{name}.qcow2"));
        let format = match below.format {
            LayerFormat::Raw => "raw",
            LayerFormat::Qcow2 => "qcow2",
        };
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
            .args([&below.path, &path])
            .status();
        assert!(made.is_ok_and(|made| made.success()), "qemu-img create");
        Layer {
            path,
            format: LayerFormat::Qcow2,
        }
    }

    fn launch(&self, name: &str, ram: &Path, sharing: RamSharing, below: &[Layer]) -> Launch {
        let mut chain = below.to_vec();
        chain.push(self.overlay(name, below.last().expect("a base")));
        let machine = Machine {
            qemu_version: self.qemu.version(),
            machine_type: self.qemu.default_machine_type().expect("q35").to_owned(),
            cpu_model: "Westmere-v1,+rdrand".to_owned(),
            cpus: 1,
            memory_bytes: MEMORY_BYTES,
            accelerator: Accelerator::Tcg,
            disks: vec!["vda".to_owned()],
            agent_ports: 8,
        };
        Launch {
            machine,
            name: name.to_owned(),
            dir: self.path(&format!("{name}.vm")),
            ram: Ram {
                path: ram.to_owned(),
                sharing,
            },
            disks: vec![Disk {
                id: "vda".to_owned(),
                chain,
            }],
            boot: Some(self.boot.clone()),
            run_as: None,
        }
    }

    fn source(&self) -> Vm {
        let ram = self.path("source.ram");
        File::create(&ram)
            .and_then(|file| file.set_len(MEMORY_BYTES))
            .expect("RAM");
        let below = [self.base.clone()];
        let launch = self.launch("source", &ram, RamSharing::Shared, &below);
        let mut vm = launch.boot(&self.qemu).expect("boot");
        vm.resume().expect("resume");
        vm
    }

    fn capture(&self, vm: &mut Vm, name: &'static str) -> Moment {
        let top = vm.disks().expect("disks")[0].top().path.clone();
        let below = Layer {
            path: top,
            format: LayerFormat::Qcow2,
        };
        let overlays = [NewOverlay {
            disk: "vda".to_owned(),
            path: self.overlay(&format!("after-{name}"), &below).path,
        }];
        let ram = self.path(&format!("{name}.ram"));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&ram);
        let captured = vm
            .capture(&CaptureRequest {
                overlays: &overlays,
                ram: Some(&file.expect("RAM")),
                state_bytes_max: STATE_BYTES_MAX,
                at: &|_| std::ops::ControlFlow::Continue(()),
            })
            .expect("capture");
        let layers = &captured.chains[0].layers;
        let below = layers[..layers.len() - 1].iter().map(|layer| Layer {
            path: layer.path.clone(),
            format: layer.format,
        });
        Moment {
            name,
            ram,
            below: below.collect(),
            state: captured.device_state.clone(),
            format: captured.state_format,
        }
    }
}

/// A failed test must not leave a machine behind.
struct Running(Vm);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
    }
}

fn sh(script: &str) -> ExecRequest {
    ExecRequest {
        argv: ["sh", "-c", script].map(Into::into).to_vec(),
        ..ExecRequest::default()
    }
}

fn socket(vm: &Vm, port: u8) -> PathBuf {
    vm.dir().join(stead_vmm::dir::agent_socket(port))
}

async fn begin(vm: &Vm, life: u16, reason: Reason) -> AgentLink {
    let mut epoch = [0; 16];
    epoch[..2].copy_from_slice(&life.to_le_bytes());
    let mut link = AgentLink::connect(&socket(vm, 0)).await.expect("connect");
    let greeting = Greeting {
        epoch: Epoch(epoch),
        reason,
        identity: Identity::Keep,
    };
    link.handshake(&greeting, LIMIT).await.expect("handshake");
    link.release().await.expect("release");
    link
}

async fn output_has_come(command: &mut Command) {
    let event = command.output.next().await.expect("output");
    assert!(
        matches!(event, CommandEvent::Output { .. }),
        "output is due: {event:?}"
    );
}

/// Captures at moments that are as bad as can be; what was going on is given up afterwards.
fn moments(rig: &Rig, runtime: &Runtime) -> Vec<Moment> {
    let mut source = Running(rig.source());
    let vm = &mut source.0;
    let link = runtime.block_on(begin(vm, u16::MAX, Reason::Boot));
    let mut moments = vec![rig.capture(vm, "idle")];
    moments.push(in_a_frame(rig, vm));
    moments.push(runtime.block_on(async {
        let mut open = Vec::new();
        for _ in 0..STREAMS {
            let mut request = sh("echo begun; exec cat");
            request.stdin = true;
            let mut command = link.start(request).await.expect("start");
            output_has_come(&mut command).await;
            open.push(command);
        }
        rig.capture(vm, "streams")
    }));
    moments.push(runtime.block_on(async {
        let mut request = sh("while :; do seq 100000; done");
        request.pty = Some(Pty {
            rows: 25,
            cols: 80,
            term: "xterm".to_owned(),
        });
        // Read no further: the port is full, and what the agent writes is cut anywhere.
        let mut flood = link.start(request).await.expect("start");
        output_has_come(&mut flood).await;
        let moment = rig.capture(vm, "terminal");
        flood.control.signal(9);
        moment
    }));
    moments.push(runtime.block_on(in_a_transfer(rig, vm, &link)));
    moments
}

/// Half of what says hello lies in a port: bytes that belong to no whole frame.
fn in_a_frame(rig: &Rig, vm: &mut Vm) -> Moment {
    let (ours, theirs) = UnixStream::pair().expect("pair");
    ours.set_nonblocking(true).expect("nonblocking");
    let hello = first_bytes(ours, theirs);
    let mut port = UnixStream::connect(socket(vm, 1)).expect("connect");
    port.write_all(&hello[..hello.len() / 2]).expect("write");
    // The guest has taken it, or it lies in the ring: either is half a frame.
    let moment = rig.capture(vm, "frame");
    drop(port);
    moment
}

/// The first frame that a host sends.
fn first_bytes(ours: UnixStream, mut theirs: UnixStream) -> Vec<u8> {
    let runtime = Runtime::new().expect("runtime");
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(ours).expect("stream");
        let mut link = AgentLink::from_stream(stream);
        let late = link
            .reattach(Epoch([1; 16]), Duration::from_millis(100))
            .await;
        late.expect_err("nobody answers");
    });
    let mut hello = vec![0; 4096];
    let length = std::io::Read::read(&mut theirs, &mut hello).expect("read");
    hello.truncate(length);
    assert!(hello.len() > 16, "{hello:?}");
    hello
}

async fn in_a_transfer(rig: &Rig, vm: &mut Vm, link: &AgentLink) -> Moment {
    let source = rig.path("large");
    fs::write(&source, vec![0x5a; 64 << 20]).expect("write");
    let mut stream = link.files().expect("files");
    let (under_way, reached) = std::sync::mpsc::channel();
    let copy = tokio::task::spawn_blocking(move || {
        let target = "/root/large".into();
        let mut upload = Upload::new(source, target, CopyOptions::default());
        upload.run(&mut Guest::new(&mut stream), &mut |progress| {
            // Nobody listens any more after the first.
            under_way.send(progress.done_bytes).unwrap_or_default();
            std::ops::ControlFlow::Continue(())
        })
    });
    while reached.recv_timeout(LIMIT).expect("progress") < 1 << 20 {}
    let moment = rig.capture(vm, "transfer");
    assert!(!copy.is_finished(), "the capture came too late");
    copy.await.expect("joined").expect("the copy goes on");
    moment
}

/// From the start of QEMU to the last of the commands' answers.
fn restore(rig: &Rig, runtime: &Runtime, moment: &Moment, number: u16) -> Took {
    let name = format!("fork{number}");
    let launch = rig.launch(&name, &moment.ram, RamSharing::Private, &moment.below);
    let begun = Instant::now();
    let vm = launch
        .restore(&rig.qemu, &moment.state, moment.format)
        .expect("restore");
    let mut running = Running(vm);
    let took = runtime.block_on(async {
        running.0.resume().expect("resume");
        let link = Arc::new(begin(&running.0, number, Reason::Fork).await);
        let ready = begun.elapsed();
        let slowest = together(&link).await;
        Took { ready, slowest }
    });
    drop(running);
    fs::remove_dir_all(&launch.dir).expect("remove");
    fs::remove_file(rig.path(&format!("{name}.qcow2"))).expect("remove");
    took
}

async fn together(link: &Arc<AgentLink>) -> Duration {
    let begun = Instant::now();
    let mut commands = JoinSet::new();
    for number in 0..TOGETHER {
        let link = Arc::clone(link);
        commands.spawn(async move {
            let run = link.exec_capture(sh(&format!("echo {number}")), b"");
            let output = tokio::time::timeout(LIMIT, run).await.expect("no hang");
            let output = output.expect("no command is lost");
            assert_eq!(output.status, ExitStatus::Code(0));
            assert_eq!(output.stdout, format!("{number}\n").as_bytes());
            begun.elapsed()
        });
    }
    let times = commands.join_all().await;
    times.into_iter().max().unwrap_or_default()
}

/// How much longer things may take because of what else runs here.
fn slack() -> f64 {
    let load = fs::read_to_string("/proc/loadavg").expect("load");
    let load: f64 = load
        .split(' ')
        .next()
        .expect("a word")
        .parse()
        .expect("a number");
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (load / cores as f64).max(1.0)
}

fn say(what: &str, mut times: Vec<Duration>) -> Duration {
    times.sort();
    let at = |part: usize| times[(times.len() * part / 100).min(times.len() - 1)];
    let worst = at(100);
    println!(
        "{what}: p50 {:?}, p95 {:?}, p99 {:?}, the slowest {worst:?}",
        at(50),
        at(95),
        at(99)
    );
    worst
}

#[test]
fn a_hundred_restores_from_bad_moments_are_ready_and_answer_ten_commands_at_once() {
    let rig = Rig::new();
    let runtime = Runtime::new().expect("runtime");
    let moments = moments(&rig, &runtime);
    let soak = std::env::var("STEAD_SOAK").ok();
    let count = match soak.as_deref().map(str::parse) {
        None => RESTORES,
        Some(Ok(count)) if count > 1 => count,
        Some(_) => MANY_RESTORES,
    };
    let mut all = Vec::new();
    for (number, moment) in (0..count).zip(moments.iter().cycle()) {
        let took = restore(&rig, &runtime, moment, number);
        println!(
            "{}: ready {:?}, ten {:?}",
            moment.name, took.ready, took.slowest
        );
        all.push((moment.name, took));
    }
    for moment in &moments {
        let of = |(name, took): &(&str, Took)| (*name == moment.name).then_some(took.slowest);
        say(moment.name, all.iter().filter_map(of).collect());
    }
    say(
        "QEMU's start to ready",
        all.iter().map(|(_, took)| took.ready).collect(),
    );
    let worst = say(
        "ten commands",
        all.iter().map(|(_, took)| took.slowest).collect(),
    );
    let limit = match soak {
        Some(_) => SLOWEST.mul_f64(slack()),
        None => NO_HANG,
    };
    assert!(worst < limit, "{worst:?} of at most {limit:?}");
}
