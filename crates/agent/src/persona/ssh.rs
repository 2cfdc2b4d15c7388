//! Host keys of the SSH server.
//!
//! For each key of the old machine there is either a new one of the same type or none: a key that another machine has too is
//! worse than none. A new key is made beside the old one and takes its place when it has reached the disk.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use stead_sys::durable::{self, Existing};

use super::{Outcome, Place, Step, said};
use crate::tool;

const FOLDER: &str = "/etc/ssh";
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
        return Ok(Outcome::Done(
            "they are removed: there is no ssh-keygen to make new ones".to_owned(),
        ));
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
    Ok(Outcome::Done(if removed.is_empty() {
        String::new()
    } else {
        format!(
            "removed, for want of a way to make new ones: {}",
            removed.join(", ")
        )
    }))
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
