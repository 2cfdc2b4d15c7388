//! A domain out of libvirt's XML: every device of ours, and nothing else.

use std::path::PathBuf;

use roxmltree::Node;
use stead_vmm::{Accelerator, Machine, Version};

use super::disks::{NamedDisk, disk};
use super::node::{Read, at_slot, attribute, child, known, number, require, text};
use super::{DISK_SLOT, Domain, MEMORY_BYTES_MAX, NAMESPACE, PORT_NAME, PORTS_SLOT, RNG_SLOT};

/// Reads a domain; its disks stand apart, since the XML need not name all of their files.
pub(super) fn domain(root: Node<'_, '_>, here: Version) -> Read<(Domain, Vec<NamedDisk>)> {
    let os = child(root, "os")?;
    let kind = child(os, "type")?;
    let devices = child(root, "devices")?;
    let about = root.descendants().find(|node| {
        node.tag_name().name() == "machine" && node.tag_name().namespace() == Some(NAMESPACE)
    });
    let said = |name: &str| about.and_then(|node| node.attribute(name));
    for outside in root.children().filter(Node::is_element) {
        outside_is_known(outside)?;
    }
    for part in os.children().filter(Node::is_element) {
        known(part, &["type", "kernel", "initrd", "cmdline", "boot"], "os")?;
    }
    let found = devices_of(devices)?;
    let machine = Machine {
        qemu_version: said("qemu").and_then(version).unwrap_or(here),
        machine_type: attribute(kind, "machine")?.to_owned(),
        cpu_model: match said("cpu") {
            Some(model) => model.to_owned(),
            None => cpu_of(child(root, "cpu")?)?,
        },
        cpus: number(text(child(root, "vcpu")?))?,
        memory_bytes: memory(child(root, "memory")?)?,
        accelerator: match root.attribute("type") {
            Some("kvm") => Accelerator::Kvm,
            Some("qemu") => Accelerator::Tcg,
            other => return Err(format!("it is of type {other:?}, not qemu or kvm")),
        },
        disks: found.disks.iter().map(|disk| disk.name.clone()).collect(),
        agent_ports: found.ports,
    };
    let domain = Domain {
        name: text(child(root, "name")?).to_owned(),
        uuid: text(child(root, "uuid")?).to_owned(),
        machine,
        agent: said("agent") == Some("yes"),
        kernel: PathBuf::from(text(child(os, "kernel")?)),
        initrd: PathBuf::from(text(child(os, "initrd")?)),
        cmdline: child(os, "cmdline").map_or("", text).to_owned(),
        disks: Vec::new(),
    };
    Ok((domain, found.disks))
}

/// What stands beside the devices and changes what a guest sees is refused.
fn outside_is_known(node: Node<'_, '_>) -> Read<()> {
    const HARMLESS: [&str; 21] = [
        "name",
        "uuid",
        "title",
        "description",
        "metadata",
        "memory",
        "currentMemory",
        "vcpu",
        "os",
        "cpu",
        "devices",
        "on_poweroff",
        "on_reboot",
        "on_crash",
        "on_lockfailure",
        "pm",
        "clock",
        "features",
        "resource",
        "seclabel",
        "cputune",
    ];
    known(node, &HARMLESS, "domain")?;
    match node.tag_name().name() {
        "features" => {
            for part in node.children().filter(Node::is_element) {
                known(part, &["acpi", "apic", "pae"], "features")?;
            }
            child(node, "acpi").map(drop)
        }
        "clock" => match node.children().find(Node::is_element) {
            Some(timer) => Err(format!("its clock has <{}>", timer.tag_name().name())),
            None => Ok(()),
        },
        _ => Ok(()),
    }
}

struct Devices {
    disks: Vec<NamedDisk>,
    ports: u8,
}

fn devices_of(devices: Node<'_, '_>) -> Read<Devices> {
    let mut found = Devices {
        disks: Vec::new(),
        ports: 0,
    };
    let (mut rng, mut serial, mut controller) = (false, false, false);
    let is_controller = |node: &Node<'_, '_>| node.tag_name().name() == "controller";
    let all = || devices.children().filter(Node::is_element);
    // A device that is not ours is named, and not the port that libvirt has added for it.
    let others = all().filter(|node| !is_controller(node));
    for device in others.chain(all().filter(is_controller)) {
        match device.tag_name().name() {
            "disk" => {
                let slot = DISK_SLOT + found.disks.len();
                found.disks.push(disk(device, slot)?);
            }
            "channel" => {
                found.ports += 1;
                channel(device, found.ports)?;
            }
            "controller" => controller |= is_port_controller(device)?,
            "rng" => {
                rng = true;
                at_slot(device, RNG_SLOT)?;
            }
            "serial" => {
                serial = true;
                let right = device.children().all(|part| {
                    part.tag_name().name() != "target"
                        || matches!(part.attribute("type"), None | Some("isa-serial"))
                            && part.attribute("port") == Some("0")
                });
                require(right, || {
                    "its serial port is not the first ISA one".to_owned()
                })?;
            }
            "emulator" | "console" => {}
            "input" => require(device.attribute("bus") == Some("ps2"), || {
                "it has an input device that is not PS/2".to_owned()
            })?,
            "audio" => require(device.attribute("type") == Some("none"), || {
                "it has audio".to_owned()
            })?,
            "memballoon" => require(device.attribute("model") == Some("none"), || {
                "it has a memory balloon, which <memballoon model='none'/> leaves out".to_owned()
            })?,
            "video" => {
                let model = child(device, "model")?.attribute("type");
                require(model == Some("none"), || {
                    "it has a graphics card, which <video><model type='none'/></video> leaves out"
                        .to_owned()
                })?;
            }
            "watchdog" if device.attribute("model") == Some("itco") => {}
            other => return Err(foreign_device(other)),
        }
    }
    require(rng, || {
        "it has no virtio random number generator".to_owned()
    })?;
    require(serial, || "it has no serial port".to_owned())?;
    require(controller, || {
        "it has no virtio-serial controller".to_owned()
    })?;
    Ok(found)
}

/// What is said of a device that no machine of ours has.
fn foreign_device(name: &str) -> String {
    match name {
        "interface" => "it has a network card (<interface>), whatever network it is on: \
             `virsh detach-interface` takes it out of a running domain, before it is saved"
            .to_owned(),
        "hostdev" | "tpm" | "graphics" | "sound" | "shmem" | "vsock" | "filesystem" => {
            format!(
                "it has a device <{name}>, which can only be left out when the domain is started"
            )
        }
        other => format!("it has a device <{other}>"),
    }
}

fn channel(node: Node<'_, '_>, port: u8) -> Read<()> {
    let name = attribute(child(node, "target")?, "name")?;
    let expected = format!("{PORT_NAME}{}", port - 1);
    let place = child(node, "address")?.attribute("port");
    let right = name == expected && place == Some(port.to_string().as_str());
    require(right && port <= stead_vmm::AGENT_PORTS_MAX, || {
        format!("it has a channel {name} where {expected} would be at port {port}")
    })
}

/// Whether it is the controller of the agent's ports; others must be built in.
fn is_port_controller(node: Node<'_, '_>) -> Read<bool> {
    let kind = (node.attribute("type"), node.attribute("model"));
    match (kind, node.attribute("index")) {
        ((Some("virtio-serial"), None), Some("0")) => at_slot(node, PORTS_SLOT).map(|()| true),
        ((Some("usb"), Some("none")), _)
        | ((Some("pci"), Some("pcie-root")), _)
        | ((Some("sata"), None), Some("0")) => Ok(false),
        ((kind, model), _) => Err(format!(
            "it has a controller {} {}",
            kind.unwrap_or("of no type"),
            model.unwrap_or_default()
        )),
    }
}

fn cpu_of(node: Node<'_, '_>) -> Read<String> {
    let model = text(child(node, "model")?);
    let mut parts = vec![format!("{model}-v1")];
    for feature in node
        .children()
        .filter(|part| part.tag_name().name() == "feature")
    {
        let name = attribute(feature, "name")?;
        parts.push(match feature.attribute("policy") {
            Some("require" | "force") | None => format!("+{name}"),
            Some("disable") => format!("-{name}"),
            Some(other) => return Err(format!("its CPU feature {name} has policy {other}")),
        });
    }
    Ok(parts.join(","))
}

fn memory(node: Node<'_, '_>) -> Read<u64> {
    let unit: u64 = match node.attribute("unit") {
        Some("b" | "bytes") => 1,
        None | Some("KiB" | "k") => 1 << 10,
        Some("MiB" | "M") => 1 << 20,
        Some("GiB" | "G") => 1 << 30,
        Some(other) => return Err(format!("its memory is counted in {other}")),
    };
    let count: u64 = number(text(node))?;
    let bytes = count.checked_mul(unit);
    bytes
        .filter(|bytes| *bytes <= MEMORY_BYTES_MAX)
        .ok_or_else(|| format!("its memory is {count} times {unit} bytes"))
}

fn version(text: &str) -> Option<Version> {
    let mut parts = text.split('.').map(|part| part.parse::<u16>().ok());
    let mut next = || parts.next().flatten();
    Some(Version {
        major: next()?,
        minor: next()?,
        micro: next()?,
    })
}
