//! Having the guest's other processes stand still, on a thread of its own.

use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use stead_agent_proto::guest::WorkloadFailure;

use crate::core::Core;

/// What can have every process but the agent stand still.
pub(crate) trait Standstill: Send {
    /// Returns when all stand still.
    ///
    /// # Errors
    /// When they do not within `limit`; they run on then, unless it says otherwise.
    fn freeze(&mut self, limit: Duration) -> Result<(), WorkloadFailure>;

    /// Returns when all may go on.
    ///
    /// # Errors
    /// When they still stand.
    fn thaw(&mut self) -> Result<(), String>;

    /// Whether an agent before this one has left them standing.
    fn is_frozen(&self) -> bool;
}

/// For an agent that serves less than a machine: there is nothing that it may hold up.
#[derive(Debug)]
pub(crate) struct Unable;

impl Standstill for Unable {
    fn freeze(&mut self, _: Duration) -> Result<(), WorkloadFailure> {
        Err(WorkloadFailure {
            error: "this agent may not freeze processes".to_owned(),
            still_frozen: false,
        })
    }

    fn thaw(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn is_frozen(&self) -> bool {
        false
    }
}

/// What the thread is told.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Order {
    /// Freeze, or give up after so many milliseconds.
    Freeze { limit_ms: u64 },
    /// Thaw.
    Thaw,
}

/// Follows orders for ever.
pub(crate) fn run(core: &Arc<Core>, mut standstill: Box<dyn Standstill>, orders: &Receiver<Order>) {
    while let Ok(order) = orders.recv() {
        match order {
            Order::Freeze { limit_ms } => {
                let result = standstill.freeze(Duration::from_millis(limit_ms));
                core.tell(|agent| agent.workload_frozen(result));
            }
            Order::Thaw => {
                let begin = Instant::now();
                let thawed = standstill.thaw();
                let took_ns = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
                core.tell(|agent| agent.workload_thawed(thawed.map(|()| took_ns)));
            }
        }
    }
}
