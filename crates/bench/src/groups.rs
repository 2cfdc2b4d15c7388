//! What can be measured, one group of figures after the other.

use std::future::Future;
use std::pin::Pin;

use crate::error::Result;
use crate::{Bench, Run, channel, fork, growth, image, pause, rate, ready, save};

/// Every group, in the order in which they are measured. A further one is one line here and a module of its own.
pub const GROUPS: &[Group] = &[
    Group::alone("image", |run| Box::pin(image::measure(run))),
    Group::alone("merge", |run| Box::pin(image::merge::measure(run))),
    Group::of_guests("fork", |bench| Box::pin(fork::measure(bench))),
    Group::of_guests("ready", |bench| Box::pin(ready::measure(bench))),
    Group::of_guests("channel", |bench| Box::pin(channel::measure(bench))),
    Group::of_guests("growth", |bench| Box::pin(growth::measure(bench))),
    Group::of_guests("pause", |bench| Box::pin(pause::measure(bench))),
    Group::of_guests("save", |bench| Box::pin(save::measure(bench))),
    Group::of_guests("rate", |bench| Box::pin(rate::measure(bench))),
];

type Measured<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// How a group is measured.
#[derive(Debug, Clone, Copy)]
pub enum How {
    /// With files and programs only.
    Alone(for<'a> fn(&'a mut Run) -> Measured<'a>),
    /// With a template, a worker and guests.
    OfGuests(for<'a> fn(&'a mut Bench) -> Measured<'a>),
}

/// Figures that are measured together.
#[derive(Debug, Clone, Copy)]
pub struct Group {
    /// As `--only` has it.
    pub name: &'static str,
    /// What measures it.
    pub how: How,
}

impl Group {
    const fn alone(name: &'static str, how: for<'a> fn(&'a mut Run) -> Measured<'a>) -> Self {
        let how = How::Alone(how);
        Self { name, how }
    }

    const fn of_guests(name: &'static str, how: for<'a> fn(&'a mut Bench) -> Measured<'a>) -> Self {
        let how = How::OfGuests(how);
        Self { name, how }
    }
}
