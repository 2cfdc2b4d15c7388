//! Addresses of a network interface, set by the guest's own `ip`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

use super::{Interface, Outcome, Place, Step};
use crate::tool;

/// The longest name of an interface, in bytes (`IFNAMSIZ` of linux/if.h without the zero).
const MAX_NAME_BYTES: usize = 15;
/// How many addresses and gateways one interface may have.
const MAX_ADDRESSES: usize = 64;
const ONE_STEP_LIMIT: Duration = Duration::from_secs(10);

pub(super) fn set(place: &Place, interface: &Interface) -> Step {
    check(interface)?;
    if !place.kernel {
        return Ok(Outcome::Skipped(
            "this is not the machine itself".to_owned(),
        ));
    }
    if !exists(&interface.name).map_err(|error| format!("look for it: {error}"))? {
        return Ok(Outcome::Skipped("there is no such interface".to_owned()));
    }
    let program = tool::find("ip").ok_or("there is no program `ip` to set them with")?;
    let ip = Ip {
        program,
        name: interface.name.clone(),
    };
    if let Some(mac) = interface.mac {
        ip.set_mac(mac)?;
    }
    if !interface.addresses.is_empty() {
        ip.run(&["address", "flush", "dev", &ip.name])?;
    }
    for (address, prefix_bits) in &interface.addresses {
        ip.run(&[
            "address",
            "add",
            &format!("{address}/{prefix_bits}"),
            "dev",
            &ip.name,
        ])?;
    }
    for gateway in &interface.gateways {
        ip.set_gateway(*gateway)?;
    }
    Ok(Outcome::Done(String::new()))
}

fn exists(name: &str) -> rustix::io::Result<bool> {
    let any = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    match netdevice::name_to_index(&any, name) {
        Ok(_) => Ok(true),
        Err(Errno::NODEV) => Ok(false),
        Err(error) => Err(error),
    }
}

struct Ip {
    program: PathBuf,
    name: String,
}

impl Ip {
    fn run(&self, words: &[&str]) -> Result<(), String> {
        tool::run(Command::new(&self.program).args(words), ONE_STEP_LIMIT).map(drop)
    }

    /// Some drivers change the address only while the interface is down.
    fn set_mac(&self, mac: [u8; 6]) -> Result<(), String> {
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let set = || self.run(&["link", "set", "dev", &self.name, "address", &mac]);
        if set().is_ok() {
            return Ok(());
        }
        self.run(&["link", "set", "dev", &self.name, "down"])?;
        let result = set();
        self.run(&["link", "set", "dev", &self.name, "up"])?;
        result
    }

    fn set_gateway(&self, gateway: IpAddr) -> Result<(), String> {
        let family = if gateway.is_ipv4() { "-4" } else { "-6" };
        let gateway = gateway.to_string();
        self.run(&[
            family, "route", "replace", "default", "via", &gateway, "dev", &self.name,
        ])
    }
}

fn check(interface: &Interface) -> Result<(), String> {
    let name = &interface.name;
    let is_allowed = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    let is_name = !name.is_empty() && name.len() <= MAX_NAME_BYTES && name.bytes().all(is_allowed);
    if !is_name || name.starts_with(['-', '.']) {
        return Err(format!("{name:?} is no name of an interface"));
    }
    // The lowest bit of the first byte makes it an address of many.
    if interface
        .mac
        .is_some_and(|mac| mac[0] & 1 == 1 || mac == [0; 6])
    {
        return Err("the hardware address is not one of a single interface".to_owned());
    }
    for (address, prefix_bits) in &interface.addresses {
        let most = if address.is_ipv4() { 32 } else { 128 };
        if *prefix_bits > most {
            return Err(format!(
                "{address} has a prefix of {prefix_bits} bits, more than {most}"
            ));
        }
    }
    let count = interface.addresses.len() + interface.gateways.len();
    if count > MAX_ADDRESSES {
        return Err(format!(
            "{count} addresses and gateways, more than {MAX_ADDRESSES}"
        ));
    }
    Ok(())
}
