//! Every order in which the store calls of two actors can take effect.
//!
//! Each actor gets a [`GatedStore`]. A call waits at the gate until the [`Explorer`] lets it pass; it
//! then takes effect alone. After a run the explorer backs up to the last choice and takes the other
//! one, running everything again from the start, until all orders are done. Orders that differ only
//! in calls which cannot influence each other are the same, and only one of them is run (sleep sets,
//! Godefroid 1996).
//!
//! An actor must make one call at a time and always the same calls if it gets the same answers.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use async_trait::async_trait;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::sync::oneshot;

/// What a call does, as far as other calls are concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// Reads one object.
    Read(String),
    /// Creates, replaces or deletes one object.
    Write(String),
    /// Lists the objects below a prefix.
    List(String),
}

impl Access {
    /// Whether the order of the two makes no difference.
    #[must_use]
    pub fn is_independent_of(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Write(a), Self::Write(b) | Self::Read(b)) | (Self::Read(a), Self::Write(b)) => {
                a != b
            }
            (Self::Write(path), Self::List(prefix)) | (Self::List(prefix), Self::Write(path)) => {
                !path.starts_with(prefix.as_str())
            }
            (Self::Read(_) | Self::List(_), Self::Read(_) | Self::List(_)) => true,
        }
    }
}

/// The number of actors.
const ACTORS: usize = 2;

#[derive(Debug, Default)]
struct Gate {
    waiting: [Option<(Access, oneshot::Sender<oneshot::Sender<()>>)>; ACTORS],
    finished: [bool; ACTORS],
}

#[derive(Debug, Default)]
struct Shared {
    gate: Mutex<Gate>,
    changed: Condvar,
}

impl Shared {
    fn update(&self, change: impl FnOnce(&mut Gate)) {
        change(&mut self.gate.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits until each actor has finished or waits at the gate; what they wait for.
    fn settled(&self) -> [Option<Access>; ACTORS] {
        let gate = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let unsettled = |gate: &mut Gate| {
            (0..ACTORS).any(|actor| !gate.finished[actor] && gate.waiting[actor].is_none())
        };
        let gate = self
            .changed
            .wait_while(gate, unsettled)
            .unwrap_or_else(PoisonError::into_inner);
        let access = |slot: &Option<(Access, _)>| slot.as_ref().map(|(access, _)| access.clone());
        [access(&gate.waiting[0]), access(&gate.waiting[1])]
    }

    /// Lets the actor's call pass and waits until it has taken effect.
    fn pass(&self, actor: usize) {
        let mut taken = None;
        self.update(|gate| taken = gate.waiting[actor].take());
        let Some((_, permit)) = taken else {
            unreachable!("only a waiting actor is chosen")
        };
        let (done, effect) = oneshot::channel();
        if permit.send(done).is_ok() {
            // An error means the call was dropped, which ends it too.
            drop(effect.blocking_recv());
        }
    }
}

/// One actor's way to the store; clones are the same actor.
#[derive(Clone)]
pub struct GatedStore {
    inner: Arc<dyn ObjectStore>,
    shared: Arc<Shared>,
    actor: usize,
    closed: Arc<AtomicBool>,
}

impl fmt::Debug for GatedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for GatedStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} for actor {}", self.inner, self.actor)
    }
}

impl GatedStore {
    /// Makes all calls from now on wait at the gate; before, they pass.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Waits for permission; the call has taken effect when what this returns is dropped.
    async fn permit(&self, access: Access) -> oneshot::Sender<()> {
        let (permit, granted) = oneshot::channel();
        if !self.closed.load(Ordering::SeqCst) {
            return oneshot::channel().0;
        }
        self.shared.update(|gate| {
            assert!(
                gate.waiting[self.actor].is_none(),
                "an actor makes one call at a time"
            );
            gate.waiting[self.actor] = Some((access, permit));
        });
        match granted.await {
            Ok(done) => done,
            Err(_) => unreachable!("the explorer answers every call"),
        }
    }
}

#[async_trait]
impl ObjectStore for GatedStore {
    async fn put_opts(
        &self,
        to: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let _done = self.permit(Access::Write(to.to_string())).await;
        self.inner.put_opts(to, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let _done = self.permit(Access::Write(to.to_string())).await;
        self.inner.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> Result<GetResult> {
        let _done = self.permit(Access::Read(from.to_string())).await;
        self.inner.get_opts(from, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        paths
            .then(move |path| {
                let this = this.clone();
                async move {
                    let path = path?;
                    let _done = this.permit(Access::Write(path.to_string())).await;
                    let one = stream::iter([Ok(path.clone())]).boxed();
                    this.inner
                        .delete_stream(one)
                        .try_collect::<Vec<_>>()
                        .await?;
                    Ok(path)
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let this = self.clone();
        let prefix = prefix.cloned();
        let all = async move {
            let named = prefix.as_ref().map(ToString::to_string).unwrap_or_default();
            let _done = this.permit(Access::List(named)).await;
            this.inner
                .list(prefix.as_ref())
                .try_collect::<Vec<_>>()
                .await
        };
        stream::once(all)
            .map_ok(|found| stream::iter(found.into_iter().map(Ok)))
            .try_flatten()
            .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let named = prefix.map(ToString::to_string).unwrap_or_default();
        let _done = self.permit(Access::List(named)).await;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let _done = self.permit(Access::Write(to.to_string())).await;
        self.inner.copy_opts(from, to, options).await
    }
}

/// One choice on the way through a run.
#[derive(Debug, Clone)]
struct Choice {
    /// The actor that was let through.
    taken: usize,
    /// Actors whose next call need not be tried here: that order was run before.
    asleep: BTreeSet<usize>,
    /// What each actor waited for.
    waiting: [Option<Access>; ACTORS],
}

/// The two actors' stores for one run, and the end of each.
#[derive(Debug)]
pub struct Run {
    shared: Arc<Shared>,
}

/// Tells the explorer that an actor makes no more calls, when dropped.
#[derive(Debug)]
pub struct Finish {
    shared: Arc<Shared>,
    actor: usize,
}

impl Drop for Finish {
    fn drop(&mut self) {
        self.shared.update(|gate| gate.finished[self.actor] = true);
    }
}

impl Run {
    /// The way of actor 0 or 1 to `inner`; the second part is dropped when the actor is done.
    ///
    /// # Panics
    /// If there is no such actor.
    #[must_use]
    pub fn actor(&self, actor: usize, inner: &Arc<dyn ObjectStore>) -> (Arc<GatedStore>, Finish) {
        assert!(actor < ACTORS, "there are two actors");
        let store = GatedStore {
            inner: Arc::clone(inner),
            shared: Arc::clone(&self.shared),
            actor,
            closed: Arc::default(),
        };
        let finish = Finish {
            shared: Arc::clone(&self.shared),
            actor,
        };
        (Arc::new(store), finish)
    }
}

/// Goes through all orders.
#[derive(Debug, Default)]
pub struct Explorer {
    path: Vec<Choice>,
    runs: u64,
    started: bool,
}

impl Explorer {
    /// Nothing run yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How many different complete orders were run.
    #[must_use]
    pub fn runs(&self) -> u64 {
        self.runs
    }

    /// Begins the next run: start both actors, each with its [`Run::actor`], then [`Explorer::drive`].
    /// `None` when all orders have been run.
    pub fn next_run(&mut self) -> Option<Run> {
        if self.started && !self.back_up() {
            return None;
        }
        self.started = true;
        Some(Run {
            shared: Arc::default(),
        })
    }

    /// Moves to the last choice that has another way left.
    fn back_up(&mut self) -> bool {
        while let Some(mut last) = self.path.pop() {
            last.asleep.insert(last.taken);
            let other = (0..ACTORS)
                .find(|actor| last.waiting[*actor].is_some() && !last.asleep.contains(actor));
            if let Some(other) = other {
                last.taken = other;
                self.path.push(last);
                return true;
            }
        }
        false
    }

    /// Lets the calls of a run pass, in the order that is due, until both actors are done. Blocks:
    /// call it outside the actors' threads. Gives the order, for a report.
    ///
    /// # Panics
    /// If the actors do not repeat what they did before.
    pub fn drive(&mut self, run: &Run) -> Vec<(usize, Access)> {
        let mut order = Vec::new();
        let mut depth = 0;
        let mut redundant = false;
        let mut asleep = BTreeSet::new();
        loop {
            let waiting = run.shared.settled();
            if waiting.iter().all(Option::is_none) {
                break;
            }
            if let Some(known) = self.path.get(depth) {
                assert_eq!(known.waiting, waiting, "an actor did not repeat itself");
            } else if !redundant {
                match choose(&waiting, &asleep) {
                    Some(taken) => self.path.push(Choice {
                        taken,
                        asleep: asleep.clone(),
                        waiting: waiting.clone(),
                    }),
                    // Every way on was run before: finish in any order, without choices.
                    None => redundant = true,
                }
            }
            let taken = match self.path.get(depth) {
                Some(choice) if !redundant => {
                    asleep = awake(choice);
                    choice.taken
                }
                _ => usize::from(waiting[0].is_none()),
            };
            order.extend(waiting[taken].clone().map(|access| (taken, access)));
            run.shared.pass(taken);
            depth += 1;
        }
        self.runs += u64::from(!redundant);
        order
    }
}

fn choose(waiting: &[Option<Access>; ACTORS], asleep: &BTreeSet<usize>) -> Option<usize> {
    (0..ACTORS).find(|actor| waiting[*actor].is_some() && !asleep.contains(actor))
}

/// Who still sleeps after the choice: those whose call does not depend on the one that passed.
fn awake(choice: &Choice) -> BTreeSet<usize> {
    let passed = choice.waiting[choice.taken].as_ref();
    let sleeps = |actor: &usize| match (&choice.waiting[*actor], passed) {
        (Some(own), Some(passed)) => own.is_independent_of(passed),
        (None, _) | (_, None) => false,
    };
    choice
        .asleep
        .iter()
        .copied()
        .filter(|actor| *actor != choice.taken && sleeps(actor))
        .collect()
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    use super::*;

    async fn put(store: Arc<GatedStore>, finish: Finish, paths: &'static [&'static str]) {
        store.close();
        for path in paths {
            store
                .put(&Path::from(*path), path.to_string().into())
                .await
                .expect("memory");
        }
        drop(finish);
    }

    /// Runs every order of the puts of two actors.
    fn orders(a: &'static [&'static str], b: &'static [&'static str]) -> Vec<Vec<(usize, Access)>> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .build()
            .expect("runtime");
        let mut explorer = Explorer::new();
        let mut orders = Vec::new();
        while let Some(run) = explorer.next_run() {
            let memory: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            for (actor, paths) in [a, b].into_iter().enumerate() {
                let (store, finish) = run.actor(actor, &memory);
                runtime.spawn(put(store, finish, paths));
            }
            let before = explorer.runs();
            let order = explorer.drive(&run);
            // A run that turned out to be a repetition does not count.
            if explorer.runs() > before {
                orders.push(order);
            }
        }
        orders
    }

    #[test]
    fn calls_on_one_object_are_run_in_every_order() {
        let orders = orders(&["x", "x"], &["x", "x", "x"]);
        assert_eq!(orders.len(), 10, "5 over 2");
        let actors: BTreeSet<Vec<usize>> = orders
            .iter()
            .map(|order| order.iter().map(|(actor, _)| *actor).collect())
            .collect();
        assert_eq!(actors.len(), 10, "all different");
    }

    #[test]
    fn calls_that_cannot_influence_each_other_are_run_in_one_order() {
        assert_eq!(orders(&["a", "a", "a"], &["b", "b"]).len(), 1);
        assert_eq!(orders(&["a", "x"], &["b", "x"]).len(), 2);
    }
}
