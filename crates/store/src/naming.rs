//! Naming content of which a part is known already: what [`crate::Publish::add_tree`] would call it, with nothing stored.

use std::sync::Arc;

use crate::core::Core;
use crate::error::Result;
use crate::hashing::{Batches, check_length, for_each_batch};
use crate::progress::Progress;
use crate::publish::{Base, Plan, Reused};
use crate::source::Source;
use crate::store::{CancelOnDrop, Store};
use crate::tree::{TreeBuilder, TreeRef};

impl Store {
    /// The tree that names the content of `source`, of which only what differs from `base` is read. Of the store, the
    /// nodes of the base's tree are.
    ///
    /// # Errors
    /// When the nodes or the source cannot be read, or `progress` cancels.
    pub async fn name_changed(
        &self,
        source: Arc<dyn Source>,
        base: Base,
        progress: &Progress,
    ) -> Result<TreeRef> {
        let progress = progress.clone();
        let dropped = CancelOnDrop::new(&progress);
        let operation = move |core: &Core| name_changed(core, source.as_ref(), base, &progress);
        let tree = self.run("name content", operation).await;
        dropped.disarm();
        tree
    }
}

fn name_changed(
    core: &Core,
    source: &dyn Source,
    base: Base,
    progress: &Progress,
) -> Result<TreeRef> {
    check_length(source)?;
    progress.start(source.len());
    let (length, size) = (source.len(), base.tree.chunk_size);
    let plan = Plan::new(core, |_| true, length, size, Some(base))?;
    let mut reused = Reused::new(core, &plan, length, size);
    let mut builder = TreeBuilder::new(length, size);
    let batches = Batches::within(source, size, plan.read.clone());
    let threads = core.tuning().threads;
    for_each_batch(source, size, batches, threads, |batch| {
        let first = batch.range.start / size.bytes();
        while let Some((index, hash)) = reused.before(first)? {
            builder.push(index, hash);
        }
        for (index, hash, _) in batch.chunks(size) {
            builder.push(index, hash);
        }
        drop(builder.take_finished());
        progress.reach(batch.range.end)
    })?;
    while let Some((index, hash)) = reused.before(u64::MAX)? {
        builder.push(index, hash);
        drop(builder.take_finished());
    }
    progress.reach(length)?;
    Ok(builder.finish().0)
}
