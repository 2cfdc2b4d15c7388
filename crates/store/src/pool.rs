//! Worker threads whose results come back in the order of their jobs.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Scope};

/// The most threads one stage of an operation uses.
const THREADS_MAX: usize = 16;

/// How many threads a stage uses by default: one a processor, at least two.
pub(crate) fn default_threads() -> usize {
    thread::available_parallelism()
        .map_or(2, usize::from)
        .clamp(2, THREADS_MAX)
}

/// Jobs in, results out in the same order. Dropping it ends the threads after their current jobs.
pub(crate) struct Ordered<J, R> {
    jobs: Sender<(u64, J)>,
    results: Receiver<(u64, thread::Result<R>)>,
    submitted: u64,
    taken: u64,
    early: BTreeMap<u64, R>,
}

impl<J: Send, R: Send> Ordered<J, R> {
    /// Starts `threads` threads in `scope`, each doing `work`.
    pub(crate) fn new<'scope, 'env, W>(
        scope: &'scope Scope<'scope, 'env>,
        threads: usize,
        work: W,
    ) -> Self
    where
        J: 'scope,
        R: 'scope,
        W: Fn(J) -> R + Send + Clone + 'scope,
    {
        let (jobs, queue) = channel::<(u64, J)>();
        let (done, results) = channel();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..threads.clamp(1, THREADS_MAX) {
            let (queue, done, work) = (Arc::clone(&queue), done.clone(), work.clone());
            scope.spawn(move || {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((number, job)) = next else { return };
                    let result = catch_unwind(AssertUnwindSafe(|| work(job)));
                    if done.send((number, result)).is_err() {
                        return;
                    }
                }
            });
        }
        Self {
            jobs,
            results,
            submitted: 0,
            taken: 0,
            early: BTreeMap::new(),
        }
    }

    /// How many jobs have been submitted and not been taken.
    pub(crate) fn in_flight(&self) -> usize {
        (self.submitted - self.taken) as usize
    }

    /// Hands out a job; never waits, so the caller keeps [`Ordered::in_flight`] small.
    pub(crate) fn submit(&mut self, job: J) {
        let sent = self.jobs.send((self.submitted, job));
        assert!(
            sent.is_ok(),
            "the threads wait for jobs while this is alive"
        );
        self.submitted += 1;
    }

    /// Waits for the result of the oldest job.
    ///
    /// # Panics
    /// With the panic of the job, or if no job is in flight.
    pub(crate) fn take(&mut self) -> R {
        assert!(self.in_flight() > 0, "a job is in flight");
        loop {
            if let Some(result) = self.early.remove(&self.taken) {
                self.taken += 1;
                return result;
            }
            match self.results.recv() {
                Ok((number, Ok(result))) => drop(self.early.insert(number, result)),
                Ok((_, Err(panic))) => resume_unwind(panic),
                Err(_) => unreachable!("the threads live while jobs are in flight"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_jobs() {
        thread::scope(|scope| {
            let mut pool = Ordered::new(scope, 4, |n: u64| {
                thread::sleep(std::time::Duration::from_micros((97 * n) % 53));
                n * 2
            });
            (0..200).for_each(|n| pool.submit(n));
            for n in 0..200 {
                assert_eq!(pool.take(), n * 2);
            }
            assert_eq!(pool.in_flight(), 0);
        });
    }

    #[test]
    fn a_panic_of_a_job_reaches_the_caller() {
        let result = catch_unwind(|| {
            thread::scope(|scope| {
                let mut pool = Ordered::new(scope, 2, |n: u64| {
                    assert!(n != 3, "job three");
                    n
                });
                (0..10).for_each(|n| pool.submit(n));
                assert_eq!((0..10).map(|_| pool.take()).count(), 10);
            });
        });
        assert!(result.is_err());
    }
}
