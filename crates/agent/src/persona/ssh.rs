//! Host keys of the SSH server.
//!
//! For each key of the old machine there is either a new one of the same type or none: a key that another machine has too is
//! worse than none. A new key is made beside the old one and takes its place when it has reached the disk. A server that runs is
//! told to read them again: it stands still until this life is released, and takes the signal before anything else.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use stead_sys::durable::{self, Existing};

use super::{Outcome, Place, Step, said};
use crate::tool;

const FOLDER: &str = "/etc/ssh";
/// Where the server says its process number, which its configuration may change.
const SERVER_PID: &str = "/run/sshd.pid";
/// What the kernel calls the server.
const SERVER_NAME: &str = "sshd";
/// Types that `ssh-keygen` makes; a key of another type is only removed.
const TYPES: [&str; 3] = ["ed25519", "ecdsa", "rsa"];
/// Making one key: a long one takes seconds on a slow processor.
const ONE_KEY_LIMIT: Duration = Duration::from_secs(60);
/// Where new keys are made, inside of [`FOLDER`].
const WORKSHOP: &str = ".stead-new-keys";

pub(super) fn renew(place: &Place) -> Step {
    let folder = place.find(FOLDER)?;
    let types = key_types(&folder)?;
    if types.is_empty() {
        return Ok(Outcome::Skipped(format!(
            "there are no host keys in {FOLDER}"
        )));
    }
    let Some(program) = tool::find("ssh-keygen") else {
        types.iter().try_for_each(|kind| remove(&folder, kind))?;
        let removed = "they are removed: there is no ssh-keygen to make new ones".to_owned();
        return Ok(Outcome::Done(with_server(removed, tell_server(place)?)));
    };
    let workshop = folder.join(WORKSHOP);
    let mut errors = Vec::new();
    let mut removed = Vec::new();
    for kind in &types {
        let made = if TYPES.contains(&kind.as_str()) {
            make(&program, kind, &workshop, &folder).map_err(|error| errors.push(error))
        } else {
            removed.push(kind.as_str());
            Err(())
        };
        if made.is_err() {
            remove(&folder, kind)?;
        }
    }
    durable::remove_tree(&workshop).map_err(|error| said(&workshop, &error))?;
    if !errors.is_empty() {
        return Err(format!(
            "{}; the old keys of that type are removed",
            errors.join("; ")
        ));
    }
    let note = match removed.is_empty() {
        true => String::new(),
        false => format!(
            "removed, for want of a way to make new ones: {}",
            removed.join(", ")
        ),
    };
    Ok(Outcome::Done(with_server(note, tell_server(place)?)))
}

fn with_server(note: String, told: Option<i32>) -> String {
    let server = told.map(|pid| format!("the server, process {pid}, reads its keys again"));
    let notes = [Some(note).filter(|note| !note.is_empty()), server];
    notes.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

/// Has the server that runs, if one does, begin anew with the keys that are there now; gives its process number. The file may
/// be one of an earlier boot, so the process must have the server's name.
///
/// # Source
/// sshd(8): rereads its configuration file when it receives a hangup signal, by executing itself.
fn tell_server(place: &Place) -> Result<Option<i32>, String> {
    let said = place
        .find(SERVER_PID)
        .ok()
        .and_then(|file| fs::read_to_string(file).ok());
    let number = said.and_then(|text| text.trim().parse::<i32>().ok());
    let Some(number) = number.filter(|&number| number > 1) else {
        return Ok(None);
    };
    let Some(pid) = Pid::from_raw(number) else {
        return Ok(None);
    };
    let name = fs::read_to_string(format!("/proc/{number}/comm")).unwrap_or_default();
    if name.trim_end() != SERVER_NAME {
        return Ok(None);
    }
    match kill_process(pid, Signal::HUP) {
        Ok(()) => Ok(Some(number)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(format!(
            "the server, process {number}, still has the old keys and cannot be told: {error}"
        )),
    }
}

/// The types of the keys that are there, from names like `ssh_host_rsa_key`.
fn key_types(folder: &Path) -> Result<Vec<String>, String> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(said(folder, &error)),
    };
    let mut types = Vec::new();
    for entry in entries {
        let name = entry.map_err(|error| said(folder, &error))?.file_name();
        let kind = name.to_str().and_then(|name| {
            let name = name.strip_suffix(".pub").unwrap_or(name);
            name.strip_prefix("ssh_host_")?.strip_suffix("_key")
        });
        types.extend(kind.map(str::to_owned));
    }
    types.sort();
    types.dedup();
    Ok(types)
}

fn make(program: &Path, kind: &str, workshop: &Path, folder: &Path) -> Result<(), String> {
    // What an earlier life was in the middle of.
    durable::remove_tree(workshop).map_err(|error| said(workshop, &error))?;
    durable::create_dir(workshop, 0o700).map_err(|error| said(workshop, &error))?;
    let name = format!("ssh_host_{kind}_key");
    let mut command = Command::new(program);
    command
        .args(["-q", "-N", "", "-t", kind, "-f"])
        .arg(workshop.join(&name));
    tool::run(&mut command, ONE_KEY_LIMIT)?;
    // The public one first: a crash in between leaves a pair that does not fit, which a server refuses, and never an old key.
    for file in [format!("{name}.pub"), name] {
        let (from, to) = (workshop.join(&file), folder.join(&file));
        fs::File::open(&from)
            .and_then(|made| made.sync_all())
            .and_then(|()| durable::move_to(&from, &to, Existing::Replace))
            .map_err(|error| said(&to, &error))?;
    }
    Ok(())
}

fn remove(folder: &Path, kind: &str) -> Result<(), String> {
    for suffix in ["", ".pub"] {
        let file = folder.join(format!("ssh_host_{kind}_key{suffix}"));
        durable::remove_file(&file).map_err(|error| said(&file, &error))?;
    }
    Ok(())
}
