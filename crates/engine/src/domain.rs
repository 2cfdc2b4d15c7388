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

mod disks;
mod node;
mod read;
mod write;

use std::path::PathBuf;

use roxmltree::Document;
use stead_qcow2::LayerFile;
use stead_vmm::{Machine, Version};

use crate::error::{EngineError, Kind, Result};
use disks::NamedDisk;

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
    /// Reads the XML of a save image, and of its disks' files the names of the layers that it leaves out. `here` is the
    /// QEMU that will run it.
    ///
    /// # Errors
    /// [`Kind::Incompatible`] names the first thing that our machine does not have, [`Kind::Damaged`] a disk whose layers
    /// cannot be found.
    pub(crate) fn of_xml(xml: &str, here: Version) -> Result<Self> {
        let read = || {
            let document = Document::parse(xml).map_err(|error| format!("its XML: {error}"))?;
            read::domain(document.root_element(), here)
        };
        let (mut domain, disks) = read().map_err(|found: node::Refusal| {
            EngineError::new(
                Kind::Incompatible,
                "make a sandbox of the image's domain",
                found,
            )
            .left("nothing was started or changed")
            .next("restore it with libvirt, or save a domain whose machine is like that of `stead save write`")
        })?;
        let chains = disks.into_iter().map(NamedDisk::whole_chain);
        domain.disks = chains.collect::<Result<_>>()?;
        Ok(domain)
    }
}

#[cfg(test)]
mod tests {
    use stead_qcow2::LayerFormat;
    use stead_vmm::Accelerator;

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
            (
                "</devices>",
                "<interface type='user'/></devices>",
                "virsh detach-interface",
            ),
            ("discard='unmap'", "queues='4'", "vda's driver has queues"),
            ("discard='unmap'", "cache='writethrough'", "writethrough"),
            ("<boot order='1'/>", "<readonly/>", "readonly"),
            (
                "<backingStore type='file'>",
                "<backingStore type='network'>",
                "not a file",
            ),
        ];
        for (from, to, word) in changes {
            let changed = xml.replacen(from, to, 1);
            assert_ne!(changed, xml, "{from}");
            let said = refused(&changed);
            assert!(said.contains(word), "{from}: {said}");
        }
    }

    #[test]
    fn layers_that_the_xml_leaves_out_are_those_that_the_images_name() {
        let folder = tempfile::tempdir().expect("folder");
        let path = |name: &str| folder.path().join(name);
        let clusters = stead_qcow2::ClusterSize::DEFAULT;
        let overlay = |name: &str, below: &str, format| {
            stead_qcow2::create_overlay(
                &path(name),
                0o600,
                1 << 20,
                Some((below, format)),
                clusters,
            )
            .map(drop)
        };
        overlay("middle.qcow2", "base.raw", LayerFormat::Raw).expect("create");
        overlay("top.qcow2", "middle.qcow2", LayerFormat::Qcow2).expect("create");
        let mut domain = example();
        domain.disks[0][0].path = path("top.qcow2");
        domain.disks[0].truncate(1);
        let with_end = domain.to_xml();
        let ended = Domain::of_xml(&with_end, HERE).expect("it says that nothing lies below");
        assert_eq!(ended.disks[0].len(), 1);
        let open = with_end.replacen("<backingStore/>", "", 1);
        let missing = Domain::of_xml(&open, HERE).expect_err("the base is not there");
        assert_eq!(missing.kind(), Kind::Damaged);
        stead_sys::durable::publish(
            &path("base.raw"),
            0o600,
            &[0; 1 << 20],
            stead_sys::durable::Existing::Keep,
        )
        .expect("write");
        let found = Domain::of_xml(&open, HERE).expect("all there");
        let names: Vec<_> = (found.disks[0].iter())
            .map(|layer| (layer.path.clone(), layer.format))
            .collect();
        assert_eq!(
            names,
            [
                (path("top.qcow2"), LayerFormat::Qcow2),
                (path("middle.qcow2"), LayerFormat::Qcow2),
                (path("base.raw"), LayerFormat::Raw),
            ]
        );
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
