//! The packages of a guest, installed into a root file system and packed as one tar file.
//!
//! This is the slow step (about a minute), and its result depends on nothing but suite and package
//! versions, so it is what the cache keeps. Agent, kernel and identity come in when a disk is made.

use std::path::Path;
use std::process::Command;

use stead_sys::durable::{self, Existing, Partial};

use crate::apt::{Apt, Sources};
use crate::error::{OnPath, TemplateError};
use crate::program::{is_installed, run};
use crate::progress::Step;
use crate::tree::inside;

/// No file in a root file system claims to be younger than this (2024-01-01), so that the same
/// packages give the same archive on any day. Seconds since 1970.
pub(crate) const EPOCH_S: &str = "1704067200";

/// What packages bring that a sandbox does without; licences stay.
const LEFT_OUT: [&str; 5] = [
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
];

/// Installs `packages` and publishes the root file system as `target`.
///
/// mmdebstrap is used where it is installed, else debootstrap: slower, and what the mirror of
/// security fixes offers is then installed on top. `scratch` must be empty.
pub(crate) fn install(
    sources: &Sources,
    apt: &Apt,
    packages: &[String],
    target: &Path,
    scratch: &Path,
    step: &Step<'_>,
) -> Result<(), TemplateError> {
    let partial = Partial::create(target, 0o644).on("creating", target)?;
    if is_installed("mmdebstrap") {
        mmdebstrap(sources, apt, packages, partial.temp_path(), scratch, step)?;
    } else if is_installed("debootstrap") {
        debootstrap(sources, packages, partial.temp_path(), scratch, step)?;
    } else {
        return Err(TemplateError::ProgramMissing {
            doing: "installing packages".to_owned(),
            program: "mmdebstrap".to_owned(),
        });
    }
    partial
        .publish(Existing::Replace)
        .on("publishing", target)?;
    Ok(())
}

fn mmdebstrap(
    sources: &Sources,
    apt: &Apt,
    packages: &[String],
    tar: &Path,
    scratch: &Path,
    step: &Step<'_>,
) -> Result<(), TemplateError> {
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--mode=root", "--format=tar", "--variant=apt"])
        .arg(format!("--include={}", packages.join(",")))
        // The tar file is synced as a whole; syncing each file on the way only costs time.
        .arg("--dpkgopt=force-unsafe-io")
        .args(LEFT_OUT.iter().map(|option| format!("--dpkgopt={option}")))
        .arg(&sources.suite)
        .arg(tar)
        .arg(apt.sources_list())
        .env("SOURCE_DATE_EPOCH", EPOCH_S)
        .env("TMPDIR", scratch);
    run(&mut command, "installing packages", step).map(drop)
}

fn debootstrap(
    sources: &Sources,
    packages: &[String],
    tar: &Path,
    scratch: &Path,
    step: &Step<'_>,
) -> Result<(), TemplateError> {
    let tree = scratch.join("tree");
    let mirror = sources
        .main_mirror()
        .ok_or_else(|| TemplateError::NoSource {
            wanted: format!("{} without its updates", sources.suite),
            found: "updates only".to_owned(),
        })?;
    // debootstrap mounts /proc and /sys in the tree: in a namespace of its own they go when it goes.
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--", "debootstrap", "--variant=minbase"])
        .arg(format!("--include={}", packages.join(",")))
        .arg(&sources.suite)
        .arg(&tree)
        .arg(mirror);
    run(&mut command, "installing packages", step)?;
    add_updates(sources, &tree, step)?;
    pack(&tree, tar, step)
}

/// Installs the updates and security fixes that debootstrap, which knows one mirror, leaves out.
fn add_updates(sources: &Sources, tree: &Path, step: &Step<'_>) -> Result<(), TemplateError> {
    for (path, text) in [
        ("etc/apt/sources.list", sources.lines()),
        (
            "etc/dpkg/dpkg.cfg.d/sandbox",
            LEFT_OUT.map(|option| format!("{option}\n")).concat(),
        ),
    ] {
        let path = tree.join(path);
        durable::publish(&path, 0o644, text.as_bytes(), Existing::Replace).on("writing", &path)?;
    }
    for arguments in [
        &["-q", "update"][..],
        &["-qy", "-o", "APT::Install-Recommends=false", "dist-upgrade"],
        &["-q", "clean"],
    ] {
        let mut command = inside(tree, "apt-get");
        command.args(arguments);
        run(&mut command, "installing updates", step)?;
    }
    for folder in ["man", "info", "locale"] {
        let folder = tree.join("usr/share").join(folder);
        durable::remove_tree(&folder).on("removing", &folder)?;
    }
    let lists = tree.join("var/lib/apt/lists");
    durable::remove_tree(&lists).on("removing", &lists)
}

pub(crate) fn pack(tree: &Path, tar: &Path, step: &Step<'_>) -> Result<(), TemplateError> {
    let mut command = Command::new("tar");
    command
        .args([
            "--create",
            "--format=pax",
            "--numeric-owner",
            "--one-file-system",
            "--sort=name",
        ])
        .args(["--xattrs", "--xattrs-include=*", "--clamp-mtime"])
        .args(["--pax-option=delete=atime,delete=ctime"])
        .arg(format!("--mtime=@{EPOCH_S}"))
        .arg("--file")
        .arg(tar)
        .arg("--directory")
        .arg(tree)
        .arg(".");
    run(&mut command, "packing the root file system", step).map(drop)
}

/// Unpacks the archive `tar` into the empty folder `tree`, with owners, modes and extended attributes.
pub(crate) fn unpack(tar: &Path, tree: &Path, step: &Step<'_>) -> Result<(), TemplateError> {
    let mut command = Command::new("tar");
    command
        .args([
            "--extract",
            "--preserve-permissions",
            "--same-owner",
            "--numeric-owner",
        ])
        .args(["--xattrs", "--xattrs-include=*", "--exclude=./dev/*"])
        .arg("--file")
        .arg(tar)
        .arg("--directory")
        .arg(tree);
    run(&mut command, "unpacking the root file system", step).map(drop)
}
