//! What a machine is made of, as recorded with a sandbox and in a checkpoint's manifest.

use serde::{Deserialize, Serialize};
use stead_vmm::Machine;

use crate::Engine;
use crate::error::Result;
use crate::records::{Sandbox, from_json};

/// How many virtio-serial ports a sandbox has for its agent: the first for the handshake, the others for commands.
pub(crate) const AGENT_PORTS: u8 = 8;

/// Everything of a machine that its memory image depends on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineRecord {
    /// What QEMU is told.
    pub qemu: Machine,
    /// BLAKE3 of the kernel, which names its file.
    pub kernel: String,
    /// BLAKE3 of the initramfs, which names its file.
    pub initrd: String,
    /// The kernel's command line.
    pub cmdline: String,
    /// Whether the guest runs the agent.
    pub agent: bool,
}

impl Engine {
    pub(crate) fn machine_of(&self, sandbox: &Sandbox) -> Result<MachineRecord> {
        from_json("machine", &sandbox.machine)
    }
}

/// The names of `count` disks: vda, vdb, …
pub(crate) fn disk_names(count: usize) -> Vec<String> {
    (b'a'..=b'z')
        .take(count)
        .map(|letter| format!("vd{}", char::from(letter)))
        .collect()
}
