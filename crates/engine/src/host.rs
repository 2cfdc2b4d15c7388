//! What this host runs machines with: its QEMU, and the accelerator that really works.

use std::path::Path;

use stead_sys::durable::{self, Existing};
use stead_vmm::{Accelerator, KvmProbe, Machine, Qemu, RunAs};

use crate::Engine;
use crate::blocking;
use crate::error::{AtFile, EngineError, Kind, Result};
use crate::machine::AGENT_PORTS;

/// Which accelerator is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AcceleratorChoice {
    /// KVM if a guest really boots under it, else TCG.
    Auto,
    /// KVM.
    Kvm,
    /// TCG.
    Tcg,
}

/// What new machines get here.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub qemu: Qemu,
    pub accelerator: Accelerator,
    pub machine_type: String,
    pub cpu_model: String,
    /// Why KVM is not used, if it is not.
    pub kvm: std::result::Result<(), String>,
}

impl Host {
    pub(crate) fn qemu_version(&self) -> String {
        self.qemu.version().to_string()
    }

    /// A machine of this host's usual type.
    pub(crate) fn machine(&self, cpus: u16, memory_bytes: u64, disks: Vec<String>) -> Machine {
        Machine {
            qemu_version: self.qemu.version(),
            machine_type: self.machine_type.clone(),
            cpu_model: self.cpu_model.clone(),
            cpus,
            memory_bytes,
            accelerator: self.accelerator,
            disks,
            agent_ports: AGENT_PORTS,
        }
    }
}

impl Engine {
    /// The QEMU of this host, asked once.
    pub(crate) async fn qemu(&self) -> Result<&Qemu> {
        self.qemu
            .get_or_try_init(|| async {
                blocking(|| {
                    Qemu::detect(None).map_err(|source| {
                        EngineError::new(Kind::Vm, "find QEMU on this host", "")
                            .because(source)
                            .next(
                                "install qemu-system-x86; `stead doctor` says what else is missing",
                            )
                    })
                })
                .await
            })
            .await
    }

    /// The accelerator to use for `choice`.
    pub(crate) async fn accelerator(&self, choice: AcceleratorChoice) -> Result<Accelerator> {
        match choice {
            AcceleratorChoice::Tcg => Ok(Accelerator::Tcg),
            AcceleratorChoice::Auto => Ok(match self.kvm_works().await? {
                Ok(()) => Accelerator::Kvm,
                Err(_) => Accelerator::Tcg,
            }),
            AcceleratorChoice::Kvm => match self.kvm_works().await? {
                Ok(()) => Ok(Accelerator::Kvm),
                Err(why) => Err(EngineError::new(Kind::Incompatible, "use KVM", why)
                    .left("nothing was changed")
                    .next("use --accelerator tcg, or auto")),
            },
        }
    }

    pub(crate) async fn host(&self, choice: AcceleratorChoice) -> Result<Host> {
        let qemu = self.qemu().await?.clone();
        let accelerator = self.accelerator(choice).await?;
        let kvm = match accelerator {
            Accelerator::Kvm => Ok(()),
            Accelerator::Tcg => self.kvm_works().await?,
        };
        blocking(move || {
            let failed = |source| {
                EngineError::new(Kind::Vm, "choose a machine for this host", "").because(source)
            };
            Ok(Host {
                machine_type: qemu.default_machine_type().map_err(failed)?.to_owned(),
                cpu_model: qemu.default_cpu_model(accelerator).map_err(failed)?,
                qemu,
                accelerator,
                kvm,
            })
        })
        .await
    }

    /// Whether a guest really boots under KVM here. The answer is kept until the host is booted again
    /// or QEMU changes.
    async fn kvm_works(&self) -> Result<std::result::Result<(), String>> {
        let qemu = self.qemu().await?.clone();
        let file = self.dir.cache().join("kvm");
        let user = crate::launch::owner(crate::launch::new_vm_user()?);
        let watch = self.watch.clone();
        blocking(move || {
            let key = probe_key(&qemu);
            if let Some(known) = remembered(&file, &key) {
                return Ok(known);
            }
            watch.step("accelerator", "try whether a guest boots under KVM");
            let probe = KvmProbe::run(&qemu, user.map(|uid| RunAs { uid, gid: uid })).map_err(
                |source| {
                    EngineError::new(Kind::Vm, "try whether a guest boots under KVM", "")
                        .because(source)
                },
            )?;
            let answer = if probe.works {
                Ok(())
            } else {
                Err(in_short(&probe.detail))
            };
            let text = match &answer {
                Ok(()) => format!("{key}\nworks"),
                Err(why) => format!("{key}\n{why}"),
            };
            durable::publish(&file, 0o600, text.as_bytes(), Existing::Replace)
                .at("write", &file)?;
            Ok(answer)
        })
        .await
    }
}

/// The beginning of a reason: QEMU names every feature that every CPU model misses.
fn in_short(reason: &str) -> String {
    const CHARS: usize = 160;
    let line = reason.lines().next().unwrap_or_default();
    if line.chars().count() <= CHARS {
        return line.to_owned();
    }
    let mut short: String = line.chars().take(CHARS).collect();
    short.push_str(" …");
    short
}

fn probe_key(qemu: &Qemu) -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    format!(
        "{} {} {} {}",
        qemu.binary().display(),
        qemu.version(),
        boot.trim(),
        Path::new("/dev/kvm").exists()
    )
}

fn remembered(file: &Path, key: &str) -> Option<std::result::Result<(), String>> {
    let text = std::fs::read_to_string(file).ok()?;
    let (known, answer) = text.split_once('\n')?;
    (known == key).then(|| match answer {
        "works" => Ok(()),
        why => Err(why.to_owned()),
    })
}
