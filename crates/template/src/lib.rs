//! Templates: what sandboxes start from. A disk, a kernel and an initial RAM disk with the agent.
//!
//! ```text
//!  apt's Debian sources ──resolve──▶ package versions ──mmdebstrap──▶ rootfs.tar ┐ cached
//!                                └──▶ kernel package ────────────────▶ .deb       ┘
//!  rootfs.tar + agent + modules + settings ──mke2fs -d──▶ disk.raw ──e2fsck -n──▶ published
//!  agent as /init + boot modules ──cpio──▶ initrd
//! ```
//! [`build()`] makes a template from packages, [`import()`] takes one that somebody else made. Nothing is
//! installed on the host, and no other sources are used than those its apt is set to.
//!
//! Two builds of one recipe have the same files; with different [`DiskIdentity`]s their disks differ in
//! nearly every metadata block. With the same identity they are nearly the same: change times of inodes
//! come from the build. Nothing here relies on equal bytes; content names a template.
//!
//! The code is synchronous. [`Watch`] reports stages and stops a build.

#![forbid(unsafe_code)]

mod apt;
mod build;
mod cache;
mod disk;
mod error;
mod guest;
mod import;
mod initramfs;
mod kernel;
mod minimal;
mod modinfo;
mod program;
mod progress;
mod rootfs;
mod tree;

pub use apt::Package;
pub use build::{
    Base, BuildSpec, BuiltTemplate, CMDLINE, DISK_BYTES_DEFAULT, PACKAGES_DEFAULT, PACKAGES_NEEDED,
    Recipe, build,
};
pub use disk::{DISK_BYTES_MAX, DISK_BYTES_MIN, DiskIdentity};
pub use error::TemplateError;
pub use guest::AGENT_PATH;
pub use import::{ImportSpec, import};
pub use progress::{Progress, Stage, Watch};
