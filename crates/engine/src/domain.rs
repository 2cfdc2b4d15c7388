//! A sandbox's machine as libvirt's domain XML, and back.
//!
//! The XML gives a QEMU started by libvirt the devices that ours has, at the same PCI addresses, so that it loads our
//! state. Read back, everything in it must be such a device or something that no state depends on; anything else is
//! refused by its name: a machine that differs from the state makes QEMU hang or the guest fail, not an error.
//!
//! ```text
//!   q35 root bus   0x2 virtio-rng   0x3 virtio-serial, the agent's ports 1…   0x4… virtio disks in order
//!   built in       serial port, PS/2 keyboard and mouse, SATA controller
//! ```

use std::path::PathBuf;

use roxmltree::{Document, Node};
use stead_qcow2::{LayerFile, LayerFormat};
use stead_vmm::{Accelerator, Machine, Version};

use crate::error::{EngineError, Kind, Result};

/// What libvirt calls the block of a guest's RAM.
pub(crate) const LIBVIRT_RAM: &str = "pc.ram";
/// The namespace of what we say of a machine besides.
const NAMESPACE: &str = "urn:steadfast:save:1";
/// The PCI slot of the random number generator, of the agent's ports, and of the first disk.
const RNG_SLOT: usize = 2;
const PORTS_SLOT: usize = 3;
const DISK_SLOT: usize = 4;
/// The most memory that is taken from an image, in bytes: there is a bit of ours for each of its pages.
const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// How the agent's ports are called, before their number.
const PORT_NAME: &str = "org.steadfast.agent.";

/// A machine with the files that it is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Domain {
    pub name: String,
    /// 16 bytes, as libvirt writes a UUID.
    pub uuid: String,
    pub machine: Machine,
    pub agent: bool,
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    pub cmdline: String,
    /// For each disk of the machine: its layers, top first.
    pub disks: Vec<Vec<LayerFile>>,
}

/// A UUID that is always the same for a sandbox.
pub(crate) fn uuid_of(sandbox: &str) -> String {
    let hash = blake3::hash(sandbox.as_bytes()).to_hex();
    let hex = hash.as_str();
    format!(
        "{}-{}-4{}-8{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..15],
        &hex[15..18],
        &hex[18..30]
    )
}

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

/// What is wrong with a domain, in words.
type Refusal = String;
type Read<T> = std::result::Result<T, Refusal>;

impl Domain {
    /// Reads the XML of a save image. `here` is the QEMU that will run it.
    ///
    /// # Errors
    /// [`Kind::Incompatible`] names the first thing that our machine does not have.
    pub(crate) fn of_xml(xml: &str, here: Version) -> Result<Self> {
        let read = || {
            let document = Document::parse(xml).map_err(|error| format!("its XML: {error}"))?;
            domain(document.root_element(), here)
        };
        read().map_err(|found| {
            EngineError::new(
                Kind::Incompatible,
                "make a sandbox of the image's domain",
                found,
            )
            .left("nothing was started or changed")
            .next("restore it with libvirt, or save a domain whose machine is like that of `stead save write`")
        })
    }
}

fn domain(root: Node<'_, '_>, here: Version) -> Read<Domain> {
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
        disks: found.disks.iter().map(|(name, _)| name.clone()).collect(),
        agent_ports: found.ports,
    };
    Ok(Domain {
        name: text(child(root, "name")?).to_owned(),
        uuid: text(child(root, "uuid")?).to_owned(),
        machine,
        agent: said("agent") == Some("yes"),
        kernel: PathBuf::from(text(child(os, "kernel")?)),
        initrd: PathBuf::from(text(child(os, "initrd")?)),
        cmdline: child(os, "cmdline").map_or("", text).to_owned(),
        disks: found.disks.into_iter().map(|(_, layers)| layers).collect(),
    })
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
    disks: Vec<(String, Vec<LayerFile>)>,
    ports: u8,
}

fn devices_of(devices: Node<'_, '_>) -> Read<Devices> {
    let mut found = Devices {
        disks: Vec::new(),
        ports: 0,
    };
    let (mut rng, mut serial, mut controller) = (false, false, false);
    for device in devices.children().filter(Node::is_element) {
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
                "it has a memory balloon".to_owned()
            })?,
            "video" => {
                let model = child(device, "model")?.attribute("type");
                require(model == Some("none"), || {
                    "it has a graphics card".to_owned()
                })?;
            }
            "watchdog" if device.attribute("model") == Some("itco") => {}
            other => return Err(format!("it has a device <{other}>")),
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

fn disk(node: Node<'_, '_>, slot: usize) -> Read<(String, Vec<LayerFile>)> {
    let target = child(node, "target")?;
    let name = attribute(target, "dev")?.to_owned();
    let is_plain = matches!(node.attribute("device"), None | Some("disk"))
        && node.attribute("type") == Some("file")
        && target.attribute("bus") == Some("virtio");
    require(is_plain, || {
        format!("disk {name} is not a virtio disk in a file")
    })?;
    at_slot(node, slot)?;
    let format = attribute(child(node, "driver")?, "type")?;
    let mut layers = vec![layer(node, format)?];
    let mut below = child(node, "backingStore").ok();
    while let Some(node) = below.filter(|node| node.children().any(|part| part.is_element())) {
        let format = attribute(child(node, "format")?, "type")?;
        layers.push(layer(node, format)?);
        below = child(node, "backingStore").ok();
        require(layers.len() <= crate::layers::DEPTH_MAX, || {
            format!("disk {name} has too many layers")
        })?;
    }
    Ok((name, layers))
}

fn layer(node: Node<'_, '_>, format: &str) -> Read<LayerFile> {
    Ok(LayerFile {
        path: PathBuf::from(attribute(child(node, "source")?, "file")?),
        format: match format {
            "raw" => LayerFormat::Raw,
            "qcow2" => LayerFormat::Qcow2,
            other => return Err(format!("a disk's layer is of format {other}")),
        },
    })
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

fn at_slot(node: Node<'_, '_>, slot: usize) -> Read<()> {
    let what = node.tag_name().name();
    let address = child(node, "address")?;
    let of = |name: &str| address.attribute(name).and_then(hex);
    let found = (of("bus"), of("slot"), of("function"));
    require(found == (Some(0), Some(slot), Some(0)), || {
        format!("its {what} is not at slot {slot:#x} of the root bus")
    })
}

fn hex(text: &str) -> Option<usize> {
    match text.strip_prefix("0x") {
        Some(digits) => usize::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
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

fn number<T: std::str::FromStr>(text: &str) -> Read<T> {
    text.parse()
        .map_err(|_not_a_number: T::Err| format!("{text:?} is no number that fits"))
}

fn known(node: Node<'_, '_>, names: &[&str], inside: &str) -> Read<()> {
    let name = node.tag_name().name();
    let ours = node.tag_name().namespace().is_none();
    require(ours && names.contains(&name), || {
        format!("its <{inside}> has <{name}>")
    })
}

fn require(holds: bool, refusal: impl FnOnce() -> Refusal) -> Read<()> {
    if holds { Ok(()) } else { Err(refusal()) }
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Read<Node<'a, 'input>> {
    let found = node.children().find(|part| part.tag_name().name() == name);
    found.ok_or_else(|| format!("its <{}> has no <{name}>", node.tag_name().name()))
}

fn attribute<'a>(node: Node<'a, '_>, name: &str) -> Read<&'a str> {
    let found = node.attribute(name);
    found.ok_or_else(|| format!("its <{}> has no {name}", node.tag_name().name()))
}

fn text<'a>(node: Node<'a, '_>) -> &'a str {
    node.text().unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: Version = Version {
        major: 10,
        minor: 0,
        micro: 2,
    };

    fn example() -> Domain {
        let layer = |path: &str, format| LayerFile {
            path: PathBuf::from(path),
            format,
        };
        Domain {
            name: "web".to_owned(),
            uuid: uuid_of("0123456789ab"),
            machine: Machine {
                qemu_version: Version {
                    major: 7,
                    minor: 2,
                    micro: 22,
                },
                machine_type: "pc-q35-7.2".to_owned(),
                cpu_model: "Westmere-v1,+rdrand,-avx".to_owned(),
                cpus: 3,
                memory_bytes: 256 << 20,
                accelerator: Accelerator::Tcg,
                disks: vec!["vda".to_owned(), "vdb".to_owned()],
                agent_ports: 8,
            },
            agent: true,
            kernel: PathBuf::from("/a/kernel"),
            initrd: PathBuf::from("/a/<&'\">"),
            cmdline: "root=/dev/vda x='<&>'".to_owned(),
            disks: vec![
                vec![
                    layer("/d/top & more.qcow2", LayerFormat::Qcow2),
                    layer("/d/middle.qcow2", LayerFormat::Qcow2),
                    layer("/d/base.raw", LayerFormat::Raw),
                ],
                vec![layer("/d/two.raw", LayerFormat::Raw)],
            ],
        }
    }

    fn refused(xml: &str) -> String {
        let error = Domain::of_xml(xml, HERE).expect_err("it must be refused");
        assert_eq!(error.kind(), Kind::Incompatible);
        error.found()
    }

    #[test]
    fn what_is_written_is_read_back_the_same() {
        let domain = example();
        assert_eq!(
            Domain::of_xml(&domain.to_xml(), HERE).expect("our own"),
            domain
        );
    }

    #[test]
    fn without_our_own_words_the_machine_is_read_from_libvirts() {
        let xml = example().to_xml();
        let start = xml.find("<metadata>").expect("there");
        let end = xml.find("</metadata>").expect("there") + "</metadata>".len();
        let plain = format!("{}{}", &xml[..start], &xml[end..]);
        let found = Domain::of_xml(&plain, HERE).expect("a machine like ours");
        assert_eq!(found.machine.qemu_version, HERE);
        assert_eq!(found.machine.cpu_model, "Westmere-v1,+rdrand,-avx");
        assert!(!found.agent);
    }

    #[test]
    fn what_our_machine_does_not_have_is_refused_by_its_name() {
        let xml = example().to_xml();
        let changes = [
            (
                "<memballoon model='none'/>",
                "<memballoon model='virtio'/>",
                "balloon",
            ),
            (
                "<video><model type='none'/></video>",
                "<graphics type='vnc'/>",
                "graphics",
            ),
            ("slot='0x05'", "slot='0x06'", "disk is not at slot 0x5"),
            (
                "bus='virtio'/><boot order='2'",
                "bus='sata'/><boot order='2'",
                "vdb",
            ),
            ("port='3'/>", "port='9'/>", "agent.2"),
            (
                "index='0' model='none'",
                "index='0' model='qemu-xhci'",
                "qemu-xhci",
            ),
            ("<acpi/>", "", "acpi"),
            ("</devices>", "<hostdev/></devices>", "hostdev"),
            ("<os>", "<os><loader>/x</loader>", "loader"),
            ("<features>", "<features><hyperv/>", "hyperv"),
            (
                "<clock offset='utc'/>",
                "<clock><timer name='hpet'/></clock>",
                "timer",
            ),
            (
                "</domain>",
                "<qemu:commandline xmlns:qemu='q'/></domain>",
                "commandline",
            ),
            ("type='qemu'>", "type='xen'>", "xen"),
            ("unit='b'>268435456", "unit='b'>99999999999999", "memory"),
            (
                "unit='b'>268435456",
                "unit='GiB'>99999999999999999",
                "memory",
            ),
            ("<vcpu placement='static'>3", "<vcpu>70000", "70000"),
            ("<rng ", "<sound ", "sound"),
        ];
        for (from, to, word) in changes {
            let changed = xml.replacen(from, to, 1);
            assert_ne!(changed, xml, "{from}");
            let said = refused(&changed);
            assert!(said.contains(word), "{from}: {said}");
        }
    }

    #[test]
    fn any_cut_of_the_xml_and_any_missing_element_is_an_error_and_no_panic() {
        let xml = example().to_xml();
        for end in 0..xml.trim_end().len() {
            refused(&xml[..end]);
        }
        refused("<domain/>");
        refused("<!DOCTYPE d [<!ENTITY a 'b'>]><domain>&a;</domain>");
    }
}
