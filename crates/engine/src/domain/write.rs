//! A domain as XML for libvirt.

use stead_qcow2::{LayerFile, LayerFormat};
use stead_vmm::{Accelerator, Machine};

use super::{DISK_SLOT, Domain, NAMESPACE, PORT_NAME, PORTS_SLOT, RNG_SLOT};

impl Domain {
    /// The XML.
    pub(crate) fn to_xml(&self) -> String {
        let machine = &self.machine;
        let kind = match machine.accelerator {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "qemu",
        };
        let disks: String = self.disks_xml();
        format!(
            r#"<domain type='{kind}'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <metadata>
    <steadfast:machine xmlns:steadfast='{NAMESPACE}' cpu='{cpu}' qemu='{qemu}' agent='{agent}'/>
  </metadata>
  <memory unit='b'>{memory}</memory>
  <vcpu placement='static'>{cpus}</vcpu>
  <os>
    <type arch='x86_64' machine='{machine_type}'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initrd}</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/><apic/></features>
{cpu_xml}  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <pm><suspend-to-mem enabled='no'/><suspend-to-disk enabled='no'/></pm>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
{disks}    <controller type='usb' index='0' model='none'/>
    <controller type='pci' index='0' model='pcie-root'/>
    <controller type='sata' index='0'>{sata}</controller>
    <controller type='virtio-serial' index='0'>{ports}</controller>
{channels}    <serial type='pty'><target type='isa-serial' port='0'><model name='isa-serial'/></target></serial>
    <console type='pty'><target type='serial' port='0'/></console>
    <audio id='1' type='none'/>
    <video><model type='none'/></video>
    <memballoon model='none'/>
    <rng model='virtio'><backend model='builtin'/>{rng}</rng>
  </devices>
</domain>
"#,
            name = escaped(&self.name),
            uuid = self.uuid,
            cpu = machine.cpu_model,
            qemu = machine.qemu_version,
            agent = if self.agent { "yes" } else { "no" },
            memory = machine.memory_bytes,
            cpus = machine.cpus,
            machine_type = machine.machine_type,
            kernel = escaped(&self.kernel.to_string_lossy()),
            initrd = escaped(&self.initrd.to_string_lossy()),
            cmdline = escaped(&self.cmdline),
            cpu_xml = cpu_xml(machine),
            sata = "<address type='pci' domain='0x0000' bus='0x00' slot='0x1f' function='0x2'/>",
            ports = address(PORTS_SLOT),
            channels = channels(machine.agent_ports),
            rng = address(RNG_SLOT),
        )
    }

    fn disks_xml(&self) -> String {
        let disks = self.machine.disks.iter().zip(&self.disks).enumerate();
        disks
            .map(|(number, (name, layers))| {
                let format = layers.first().map_or("raw", |top| format_name(top.format));
                let source = layers.first().map(source).unwrap_or_default();
                let below = layers.get(1..).unwrap_or_default();
                format!(
                    "    <disk type='file' device='disk'><driver name='qemu' type='{format}' discard='unmap'/>{source}{}<target dev='{name}' bus='virtio'/><boot order='{}'/>{}</disk>\n",
                    backing(below),
                    number + 1,
                    address(DISK_SLOT + number),
                )
            })
            .collect()
    }
}

fn cpu_xml(machine: &Machine) -> String {
    let mut parts = machine.cpu_model.split(',');
    let model = parts.next().unwrap_or_default();
    // To libvirt the first version of a model is the model.
    let model = model.strip_suffix("-v1").unwrap_or(model);
    let features: String = parts
        .map(|part| {
            let policy = if part.starts_with('-') {
                "disable"
            } else {
                "require"
            };
            let name = part.trim_start_matches(['+', '-']);
            format!("<feature policy='{policy}' name='{name}'/>")
        })
        .collect();
    format!(
        "  <cpu mode='custom' match='exact' check='none'><model fallback='forbid'>{model}</model><topology sockets='1' dies='1' cores='{}' threads='1'/>{features}</cpu>\n",
        machine.cpus
    )
}

fn channels(count: u8) -> String {
    (0..count)
        .map(|port| {
            format!(
                "    <channel type='unix'><target type='virtio' name='{PORT_NAME}{port}'/><address type='virtio-serial' controller='0' bus='0' port='{}'/></channel>\n",
                port + 1
            )
        })
        .collect()
}

fn address(slot: usize) -> String {
    format!("<address type='pci' domain='0x0000' bus='0x00' slot='{slot:#04x}' function='0x0'/>")
}

fn source(layer: &LayerFile) -> String {
    format!(
        "<source file='{}'/>",
        escaped(&layer.path.to_string_lossy())
    )
}

fn backing(layers: &[LayerFile]) -> String {
    match layers.split_first() {
        None => "<backingStore/>".to_owned(),
        Some((top, below)) => format!(
            "<backingStore type='file'><format type='{}'/>{}{}</backingStore>",
            format_name(top.format),
            source(top),
            backing(below)
        ),
    }
}

fn format_name(format: LayerFormat) -> &'static str {
    match format {
        LayerFormat::Qcow2 => "qcow2",
        LayerFormat::Raw => "raw",
    }
}

fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '\'' => safe.push_str("&apos;"),
            '"' => safe.push_str("&quot;"),
            other => safe.push(other),
        }
    }
    safe
}
