//! What Steadfast asks of the operating system, one idea a module.
//!
//! This crate is the only place that makes files durable ([`durable`]) and the only one that may
//! contain `unsafe` code ([`entropy`] and [`share`], for ioctls that no safe wrapper offers, [`signal`] and
//! [`bound_child`]).
//! Everything above forbids `unsafe` and leaves file creation, renaming and syncing to this crate,
//! so that "what has reached the disk when this returns?" has one place to look.

#![allow(
    clippy::disallowed_methods,
    reason = "this crate is where files are made durable; everything above calls it"
)]

pub mod bound_child;
pub mod copy;
pub mod direct;
pub mod durable;
pub mod entropy;
pub mod folder;
pub mod image_lock;
pub mod incoming;
pub mod lock;
pub mod part;
pub mod pieces;
pub mod process;
pub mod readable;
pub mod share;
pub mod signal;
pub mod space;
pub mod spread;
pub mod storage;
