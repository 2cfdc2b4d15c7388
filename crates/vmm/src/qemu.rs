//! The QEMU program of this worker: where, which version, what it can emulate.

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::machine::{Accelerator, is_cpu_model};
use crate::process::{output_tail, read_some};
use crate::qmp::Qmp;

/// The program looked for when none is named.
pub const BINARY: &str = "qemu-system-x86_64";
/// How long a throw-away QEMU may take to answer.
const DETECT_WITHIN: Duration = Duration::from_secs(20);
/// The family whose newest versioned member is the default machine.
const FAMILY: &str = "q35";
/// How many missing features a reason names.
const LACKING_NAMED_MAX: usize = 4;
/// CPU models tried under TCG, best first: what TCG emulates in full, in every supported version.
const CPU_MODELS_TCG: [&str; 4] = [
    "Westmere-v1,+rdrand",
    "Nehalem-v1,+rdrand",
    "Nehalem-v1",
    "qemu64-v1",
];
/// CPU models tried under KVM, best first. A model that many hosts share lets state move further.
const CPU_MODELS_KVM: [&str; 8] = [
    "EPYC-Rome-v2",
    "EPYC-v3",
    "Cascadelake-Server-v4",
    "Skylake-Server-v4",
    "Haswell-v4",
    "SandyBridge-v1",
    "Nehalem-v1",
    "qemu64-v1",
];

/// A QEMU version; ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// First number.
    pub major: u16,
    /// Second number.
    pub minor: u16,
    /// Third number.
    pub micro: u16,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A machine type QEMU knows.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MachineType {
    /// Its name, for instance `pc-q35-7.2`.
    pub name: String,
    /// The unversioned name that means this one now.
    pub alias: Option<String>,
    /// The most vCPUs it takes.
    #[serde(rename = "cpu-max")]
    pub cpus_max: u16,
    /// Whether it will disappear.
    #[serde(default)]
    pub deprecated: bool,
}

/// A CPU model QEMU knows, seen under one accelerator.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct CpuModel {
    /// Its name, for instance `Nehalem-v1`.
    pub name: String,
    /// The versioned model that an unversioned name stands for.
    #[serde(rename = "alias-of")]
    pub alias_of: Option<String>,
    /// Features of the model that this host or accelerator lacks; `None` if QEMU does not know.
    #[serde(rename = "unavailable-features")]
    pub unavailable_features: Option<Vec<String>>,
    /// Whether the model means the same on every host.
    #[serde(rename = "migration-safe")]
    pub migration_safe: Option<bool>,
    /// Whether it will disappear.
    #[serde(default)]
    pub deprecated: bool,
}

/// A QEMU program that was asked and has answered.
#[derive(Debug, Clone)]
pub struct Qemu {
    binary: PathBuf,
    version: Version,
    machine_types: Vec<MachineType>,
}

impl Qemu {
    /// Asks the program `binary`, or `qemu-system-x86_64` found in `PATH`, what it is.
    ///
    /// # Errors
    /// [`Error::Unusable`] with what it said when it is not a QEMU that speaks QMP.
    pub fn detect(binary: Option<&Path>) -> Result<Self> {
        let binary = binary.unwrap_or(Path::new(BINARY)).to_owned();
        let mut asked = ThrowAway::start(&binary, &["-machine", "none", "-accel", "tcg"])?;
        let version = asked.qmp.version();
        let machine_types: Vec<MachineType> = asked.qmp.execute("query-machines", json!({}))?;
        Ok(Self {
            binary,
            version,
            machine_types,
        })
    }

    /// The program.
    #[must_use]
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Every machine type it knows.
    #[must_use]
    pub fn machine_types(&self) -> &[MachineType] {
        &self.machine_types
    }

    /// The machine type of this name.
    #[must_use]
    pub fn machine_type(&self, name: &str) -> Option<&MachineType> {
        self.machine_types.iter().find(|known| known.name == name)
    }

    /// The newest versioned q35 machine type: the one that `q35` stands for.
    ///
    /// # Errors
    /// [`Error::Unusable`] when there is none.
    pub fn default_machine_type(&self) -> Result<&str> {
        self.machine_types
            .iter()
            .find(|known| known.alias.as_deref() == Some(FAMILY))
            .map(|known| known.name.as_str())
            .ok_or_else(|| self.unusable("it has no machine type that q35 stands for".to_owned()))
    }

    /// The CPU model to give new machines: the first of a fixed list that `accelerator` offers in full.
    ///
    /// # Errors
    /// [`Error::Unusable`] with each model's reason when none can be used.
    pub fn default_cpu_model(&self, accelerator: Accelerator) -> Result<String> {
        let candidates: &[&str] = match accelerator {
            Accelerator::Kvm => &CPU_MODELS_KVM,
            Accelerator::Tcg => &CPU_MODELS_TCG,
        };
        let mut reasons = Vec::new();
        for model in candidates {
            match self.try_cpu_model(model, accelerator)? {
                Ok(()) => return Ok((*model).to_owned()),
                Err(why) => reasons.push(format!("{model}: {why}")),
            }
        }
        Err(self.unusable(format!(
            "no CPU model can be used under {accelerator}: {}",
            reasons.join("; ")
        )))
    }

    /// Every CPU model it knows, with the features that `accelerator` lacks here.
    ///
    /// # Errors
    /// When the accelerator cannot be opened or QEMU does not answer.
    pub fn cpu_models(&self, accelerator: Accelerator) -> Result<Vec<CpuModel>> {
        let accel = accelerator.to_string();
        let arguments = ["-machine", "none", "-accel", accel.as_str()];
        let mut asked = ThrowAway::start(&self.binary, &arguments)?;
        asked.qmp.execute("query-cpu-definitions", json!({}))
    }

    /// Whether a vCPU of `model` can be made with every feature; if not, why.
    ///
    /// # Errors
    /// When the model is not acceptable ([`Error::Description`]) or QEMU cannot be run.
    pub fn try_cpu_model(
        &self,
        model: &str,
        accelerator: Accelerator,
    ) -> Result<std::result::Result<(), String>> {
        if !is_cpu_model(model) {
            return Err(Error::Description {
                what: "CPU model",
                expected: "an explicit model with +feature or -feature".to_owned(),
                found: format!("{model:?}"),
            });
        }
        let machine = format!("{},accel={accelerator}", self.default_machine_type()?);
        let cpu = format!("{model},enforce=on");
        match ThrowAway::start(
            &self.binary,
            &["-machine", &machine, "-m", "32", "-cpu", &cpu],
        ) {
            Ok(_made) => Ok(Ok(())),
            Err(Error::Unusable { found, .. }) => Ok(Err(lacking(found))),
            Err(error) => Err(error),
        }
    }

    fn unusable(&self, found: String) -> Error {
        Error::Unusable {
            binary: self.binary.clone(),
            found,
        }
    }
}

/// The features that QEMU's warnings name, if they do; else what it said.
fn lacking(said: String) -> String {
    let marks = said.split("requested feature: ").skip(1);
    let features: Vec<&str> = marks
        .filter_map(|rest| rest.split([' ', '|']).next())
        .map(feature_name)
        .collect();
    match features.len() {
        0 => said,
        1..=LACKING_NAMED_MAX => format!("lacks {}", features.join(", ")),
        count => {
            let named = features[..LACKING_NAMED_MAX].join(", ");
            format!("lacks {named} and {} more", count - LACKING_NAMED_MAX)
        }
    }
}

/// `CPUID.01H:ECX.sse4.1` and `MSR(10AH).ibrs-all` are called `sse4.1` and `ibrs-all`.
fn feature_name(place: &str) -> &str {
    let register = place
        .split_once(':')
        .map_or(place, |(_, register)| register);
    register
        .split_once('.')
        .map_or(place, |(_, feature)| feature)
}

/// A stopped QEMU that answers questions and ends with this value, or with this process.
///
/// It works in no folder, so nobody would find one that outlives us. It waits for a migration on a socket whose other
/// end is here: when this process is killed, QEMU reads the end of a stream that never began, and gives up. Unlike a
/// signal at the death of the parent this depends on no thread. A pipe will not do: QEMU 7.2 does not see its end.
struct ThrowAway {
    child: Child,
    qmp: Qmp,
    /// The migration that never comes.
    _life: UnixStream,
}

impl ThrowAway {
    fn start(binary: &Path, arguments: &[&str]) -> Result<Self> {
        let system = |what| move |source| Error::System { what, source };
        let unusable = |found: String| Error::Unusable {
            binary: binary.to_owned(),
            found,
        };
        let pair = || {
            let pair = UnixStream::pair();
            pair.map_err(system("make a socket pair for a throw-away QEMU"))
        };
        let (qmp, output) = pair()?;
        let (life, input) = pair()?;
        let mut child = Command::new(binary)
            .args(arguments)
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-vga",
                "none",
            ])
            .args(["-S", "-incoming", "fd:0"])
            .args(["-chardev", "socket,id=qmp,fd=1"])
            .args(["-mon", "chardev=qmp,mode=control"])
            .stdin(Stdio::from(OwnedFd::from(input)))
            .stdout(Stdio::from(OwnedFd::from(output)))
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|source| unusable(source.to_string()))?;
        match Qmp::negotiate(qmp, DETECT_WITHIN) {
            Ok(qmp) => Ok(Self {
                child,
                qmp,
                _life: life,
            }),
            Err(error) => {
                end(&mut child);
                Err(unusable(last_words(&mut child, &error)))
            }
        }
    }
}

impl Drop for ThrowAway {
    fn drop(&mut self) {
        // Asked to quit rather than killed, so that nothing it opened needs cleaning up.
        let asked = self
            .qmp
            .execute_within::<Value>("quit", json!({}), Duration::from_secs(1));
        if asked.is_ok() && exits_within(&mut self.child, Duration::from_secs(2)) {
            return;
        }
        end(&mut self.child);
    }
}

fn exits_within(child: &mut Child, within: Duration) -> bool {
    let until = Instant::now() + within;
    while Instant::now() < until {
        if matches!(child.try_wait(), Ok(Some(_))) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

fn end(child: &mut Child) {
    if let Err(error) = child.kill().and_then(|()| child.wait().map(drop)) {
        tracing::warn!(%error, "a throw-away QEMU could not be ended");
    }
}

/// What an ended child wrote to its standard error, or `error` if nothing.
fn last_words(child: &mut Child, error: &Error) -> String {
    let said = child.stderr.take().map(read_some).unwrap_or_default();
    let tail = output_tail(&said);
    if tail.is_empty() {
        error.to_string()
    } else {
        tail
    }
}

#[cfg(test)]
mod tests {
    use stead_sys::process::ProcessId;

    use super::*;

    /// Names the child process below; its value is the file that it writes QEMU's process number to.
    const PROBING: &str = "STEAD_TEST_PROBING";

    /// Run by the test below, in a process that is killed.
    #[test]
    fn a_process_that_asks_a_qemu_and_waits_to_be_killed() {
        let Some(answer) = std::env::var_os(PROBING) else {
            return;
        };
        let machine = ["-machine", "none", "-accel", "tcg"];
        let asked = ThrowAway::start(Path::new(BINARY), &machine).expect("QEMU is installed");
        let written = stead_sys::durable::create_scratch(Path::new(&answer), 0o600);
        let number = asked.child.id().to_le_bytes();
        std::os::unix::fs::FileExt::write_all_at(&written.expect("create"), &number, 0)
            .expect("write");
        std::thread::sleep(Duration::from_secs(60));
        drop(asked);
    }

    fn within<T>(mut found: impl FnMut() -> Option<T>) -> Option<T> {
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            if let Some(found) = found() {
                return Some(found);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }

    #[test]
    fn a_qemu_that_is_asked_what_it_can_do_ends_when_who_asks_is_killed() {
        let dir = tempfile::tempdir().expect("temp dir");
        let answer = dir.path().join("answer");
        let mut asking = Command::new(std::env::current_exe().expect("this program"))
            .args([
                "--exact",
                "qemu::tests::a_process_that_asks_a_qemu_and_waits_to_be_killed",
            ])
            .env(PROBING, &answer)
            .stdout(Stdio::null())
            .spawn()
            .expect("spawn");
        let number = within(|| {
            let bytes = std::fs::read(&answer).ok()?;
            Some(u32::from_le_bytes(bytes.try_into().ok()?))
        });
        let number = number.and_then(|number| i32::try_from(number).ok());
        let qemu = ProcessId::of(number.expect("QEMU has answered")).expect("QEMU runs");
        asking.kill().expect("kill");
        asking.wait().expect("wait");
        let ended = || (!qemu.is_alive().expect("ask")).then_some(());
        within(ended).expect("QEMU ends by itself");
    }

    #[test]
    fn versions_are_ordered_by_number_and_not_by_text() {
        let v = |major, minor, micro| Version {
            major,
            minor,
            micro,
        };
        assert!(v(10, 0, 2) > v(7, 2, 22));
        assert!(v(7, 2, 9) < v(7, 2, 22));
    }

    #[test]
    fn a_reason_names_features_and_stays_short() {
        let warning = "qemu-system-x86_64: warning: TCG doesn't support requested feature: ";
        let one = format!(
            "{warning}CPUID.01H:ECX.x2apic [bit 21] | TCG doesn't support requested features"
        );
        assert_eq!(lacking(one), "lacks x2apic");
        let many = format!("{warning}CPUID.0DH:EAX [bit 9] | ").repeat(9);
        assert_eq!(
            lacking(many),
            "lacks CPUID.0DH:EAX, CPUID.0DH:EAX, CPUID.0DH:EAX, CPUID.0DH:EAX and 5 more"
        );
        assert_eq!(lacking("no such CPU".to_owned()), "no such CPU");
        assert_eq!(feature_name("CPUID.01H:ECX.sse4.1"), "sse4.1");
        assert_eq!(feature_name("MSR(10AH).ibrs-all"), "ibrs-all");
    }

    #[test]
    fn answers_of_a_newer_version_are_understood() {
        let machine: MachineType = serde_json::from_value(json!({
            "hotpluggable-cpus": true, "name": "pc-q35-10.0", "numa-mem-supported": true,
            "default-cpu-type": "qemu64-x86_64-cpu", "acpi": true, "cpu-max": 4096,
            "deprecated": false, "default-ram-id": "pc.ram", "alias": "q35",
            "compat-props": [{"qom-type": "x", "property": "y", "value": "z"}]
        }))
        .expect("parse");
        assert_eq!(machine.cpus_max, 4096);
        assert_eq!(machine.alias.as_deref(), Some("q35"));
        let model: CpuModel = serde_json::from_value(json!({
            "name": "Nehalem-v2", "typename": "Nehalem-v2-x86_64-cpu",
            "unavailable-features": ["spec-ctrl"], "alias-of": null, "static": false,
            "migration-safe": true, "deprecated": false, "deprecated-props": ["x"]
        }))
        .expect("parse");
        assert_eq!(
            model.unavailable_features,
            Some(vec!["spec-ctrl".to_owned()])
        );
        let unknown: CpuModel =
            serde_json::from_value(json!({"name": "host", "typename": "t", "static": false}))
                .expect("parse");
        assert_eq!(unknown.unavailable_features, None);
    }
}
