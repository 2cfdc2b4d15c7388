//! The virtual machine as a guest sees it: what must be the same wherever its state is loaded.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::qemu::{Qemu, Version};

/// The most vCPUs a machine may have.
pub const CPUS_MAX: u16 = 255;
/// The most disks a machine may have: PCI slots 4 to 30 of the root bus.
pub const DISKS_MAX: usize = 27;
/// The most agent ports a machine may have (a virtio-serial device has 31; port 0 is the console's).
pub const AGENT_PORTS_MAX: u8 = 30;
/// One mebibyte; the RAM size is a multiple of it.
pub const MIB: u64 = 1 << 20;

/// What executes guest code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor itself, through `/dev/kvm`.
    Kvm,
    /// QEMU's translator. Slower; works everywhere.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// A machine, recorded with the state of its guest.
///
/// Two machines that are equal here, under a QEMU that is not older, can load each other's state.
/// Files (disks, kernel, RAM) are not part of it: they are where the worker has them ([`crate::Launch`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The QEMU that runs or ran it.
    pub qemu_version: Version,
    /// A versioned machine type, for instance `pc-q35-7.2`.
    pub machine_type: String,
    /// An explicit CPU model with features, for instance `Westmere-v1,+rdrand`.
    pub cpu_model: String,
    /// vCPUs.
    pub cpus: u16,
    /// RAM in bytes, a multiple of 1 MiB.
    pub memory_bytes: u64,
    /// What executes guest code.
    pub accelerator: Accelerator,
    /// The disks' names in the order of their PCI slots, for instance `vda`.
    pub disks: Vec<String>,
    /// How many agent ports it has.
    pub agent_ports: u8,
}

/// One way in which a recorded machine does not fit this worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What differs.
    pub what: &'static str,
    /// What the state was made with.
    pub recorded: String,
    /// What this worker has.
    pub here: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: recorded {}, here {}",
            self.what, self.recorded, self.here
        )
    }
}

impl Machine {
    /// Whether every value can be put on a command line and means one thing there.
    ///
    /// A machine comes out of a manifest, that is from elsewhere: a value such as
    /// `pc-q35-7.2,firmware=/etc/passwd` must not become an option.
    ///
    /// # Errors
    /// [`Error::Description`] names the first value that is not acceptable.
    pub fn validate(&self) -> Result<()> {
        check(
            is_machine_type(&self.machine_type),
            "machine type",
            "a versioned name of letters, digits, '.' and '-' such as pc-q35-7.2",
            &self.machine_type,
        )?;
        check(
            is_cpu_model(&self.cpu_model),
            "CPU model",
            "an explicit model, then +feature or -feature, separated by commas; not max, host or base",
            &self.cpu_model,
        )?;
        check(
            (1..=CPUS_MAX).contains(&self.cpus),
            "vCPUs",
            "1 to 255",
            &self.cpus.to_string(),
        )?;
        check(
            self.memory_bytes >= MIB && self.memory_bytes.is_multiple_of(MIB),
            "RAM",
            "a multiple of 1 MiB, at least one",
            &format!("{} bytes", self.memory_bytes),
        )?;
        check(
            self.agent_ports <= AGENT_PORTS_MAX,
            "agent ports",
            "at most 30",
            &self.agent_ports.to_string(),
        )?;
        self.validate_disks()
    }

    fn validate_disks(&self) -> Result<()> {
        check(
            self.disks.len() <= DISKS_MAX,
            "disks",
            "at most 27",
            &self.disks.len().to_string(),
        )?;
        for (index, id) in self.disks.iter().enumerate() {
            check(
                is_disk_id(id) && !self.disks[..index].contains(id),
                "disk name",
                "a lower-case letter and up to eleven letters or digits, each name once",
                id,
            )?;
        }
        Ok(())
    }

    /// Everything that keeps this worker from loading state of the machine `self`; empty if it can.
    ///
    /// QEMU itself accepts another CPU model or an extra device and then hangs, so this decides. The
    /// CPU model is tried in a throw-away process, because what a processor lacks cannot be read
    /// from a name.
    ///
    /// # Errors
    /// When the machine is not acceptable at all, or QEMU cannot be run.
    pub fn differences(&self, ours: &Qemu, accelerator: Accelerator) -> Result<Vec<Difference>> {
        self.validate()?;
        let mut found = Vec::new();
        let mut note = |what, recorded: &dyn fmt::Display, here: &dyn fmt::Display| {
            found.push(Difference {
                what,
                recorded: recorded.to_string(),
                here: here.to_string(),
            });
        };
        if self.qemu_version > ours.version() {
            note(
                "QEMU version (must not be older here)",
                &self.qemu_version,
                &ours.version(),
            );
        }
        if self.accelerator != accelerator {
            note("accelerator", &self.accelerator, &accelerator);
        }
        match ours.machine_type(&self.machine_type) {
            None => note("machine type", &self.machine_type, &"not known"),
            Some(known) if self.cpus > known.cpus_max => {
                note("vCPUs", &self.cpus, &format!("at most {}", known.cpus_max));
            }
            Some(_) => {
                if let Err(why) = ours.try_cpu_model(&self.cpu_model, accelerator)? {
                    note("CPU model", &self.cpu_model, &why);
                }
            }
        }
        Ok(found)
    }
}

fn check(holds: bool, what: &'static str, expected: &str, found: &str) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Description {
        what,
        expected: expected.to_owned(),
        found: format!("{:?}", found.chars().take(80).collect::<String>()),
    })
}

fn is_machine_type(name: &str) -> bool {
    let versioned = name.rsplit_once('-').is_some_and(|(_, version)| {
        version.contains('.') && version.starts_with(|c: char| c.is_ascii_digit())
    });
    versioned
        && name.len() <= 64
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'))
}

pub(crate) fn is_cpu_model(text: &str) -> bool {
    let mut parts = text.split(',');
    let is_word = |word: &str| {
        word.starts_with(|c: char| c.is_ascii_alphanumeric())
            && word
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
    };
    let model = parts.next().unwrap_or_default();
    text.len() <= 1024
        && is_word(model)
        && !matches!(model, "max" | "host" | "base")
        && parts.all(|part| part.strip_prefix(['+', '-']).is_some_and(is_word))
}

fn is_disk_id(id: &str) -> bool {
    id.len() <= 12
        && id.starts_with(|c: char| c.is_ascii_lowercase())
        && id
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            qemu_version: Version {
                major: 7,
                minor: 2,
                micro: 22,
            },
            machine_type: "pc-q35-7.2".to_owned(),
            cpu_model: "Westmere-v1,+rdrand".to_owned(),
            cpus: 1,
            memory_bytes: 256 * MIB,
            accelerator: Accelerator::Tcg,
            disks: vec!["vda".to_owned(), "vdb".to_owned()],
            agent_ports: 8,
        }
    }

    #[test]
    fn a_machine_survives_being_recorded() {
        let text = serde_json::to_string(&machine()).expect("serialize");
        assert_eq!(
            serde_json::from_str::<Machine>(&text).expect("parse"),
            machine()
        );
        assert!(text.contains(r#""accelerator":"tcg""#), "{text}");
        machine().validate().expect("fine");
    }

    #[test]
    fn a_recorded_value_cannot_become_an_option() {
        type Change = fn(&mut Machine);
        let hostile: [Change; 13] = [
            |m| m.machine_type = "pc-q35-7.2,firmware=x".to_owned(),
            |m| m.machine_type = "q35".to_owned(),
            |m| m.machine_type = "microvm".to_owned(),
            |m| m.machine_type = String::new(),
            |m| m.cpu_model = "max".to_owned(),
            |m| m.cpu_model = "host,+rdrand".to_owned(),
            |m| m.cpu_model = "Nehalem-v1,enforce=off".to_owned(),
            |m| m.cpu_model = "-S".to_owned(),
            |m| m.cpus = 0,
            |m| m.memory_bytes = MIB + 1,
            |m| m.disks = vec!["vda".to_owned(), "vda".to_owned()],
            |m| m.disks = vec!["vda,drive=x".to_owned()],
            |m| m.agent_ports = 31,
        ];
        for (number, change) in hostile.iter().enumerate() {
            let mut machine = machine();
            change(&mut machine);
            assert!(
                matches!(machine.validate(), Err(Error::Description { .. })),
                "change {number} was accepted: {machine:?}"
            );
        }
    }
}
