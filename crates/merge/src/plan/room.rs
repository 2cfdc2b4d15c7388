//! The room that a merge needs: in the base, in the top where that stands for a raw base, and in the child.

use stead_qcow2::edit::{Edit, Plan};
use stead_qcow2::ops::commit::CommitReport;

use super::Thinking;
use crate::bitmaps::Becomes;
use crate::error::{Kind, MergeError, Result};
use crate::space::{Space, share_file_system};

/// The longest name of a backing file, in bytes.
const MAX_BACKING_NAME_BYTES: usize = 1023;

impl Thinking<'_> {
    /// The room for the child's new backing name.
    pub(super) fn child(&mut self) -> Option<Plan> {
        let path = &self.layers.child()?.path;
        let (name, format) = self.layers.new_backing()?;
        if name.len() > MAX_BACKING_NAME_BYTES {
            let reason = format!(
                "the base's name has {} bytes, and a backing file's can have 1023",
                name.len()
            );
            self.refuse(Kind::Usage, reason, "move the chain to a shorter path");
            return None;
        }
        let change = |edit: &mut Edit| {
            edit.set_backing(Some((&name, Some(&format))));
            Ok(())
        };
        let opened = stead_qcow2::edit::Editor::open(path, self.options.edit);
        match opened.and_then(|editor| editor.plan(change)) {
            Ok(plan) => Some(plan),
            Err(error) => {
                self.refuse_error(&error);
                None
            }
        }
    }

    fn make_room(&self) -> String {
        let stale = self.plan.bitmaps.iter();
        let stale = stale.filter(|verdict| verdict.becomes == Becomes::Pruned);
        match stale.count() {
            0 => "make room, or extend the device (--extend-cmd)".into(),
            count => format!(
                "make room, or extend the device (--extend-cmd); or remove the {count} stale bitmaps first (stead img bitmap \
                 --remove): what they take can be used only when they are gone"
            ),
        }
    }

    pub(super) fn space(&mut self, report: &CommitReport, child: Option<Plan>) -> Result<u64> {
        let base = &self.layers.base_file().path;
        let top = &self.layers.files[self.layers.top].path;
        let mut wanted = vec![(base, report.base)];
        wanted.extend(report.top.map(|plan| (top, plan)));
        wanted.extend(self.layers.child().map(|file| &file.path).zip(child));
        let mut left = 0;
        for (path, plan) in wanted {
            let io = |source| MergeError::io("find the room for", path, source);
            let space = Space::of(path, &plan).map_err(io)?;
            if path != base && share_file_system(base, path).map_err(io)? {
                left += space.needed_bytes;
            }
            if !space.is_there() {
                self.refuse(Kind::NoSpace, space.words(), self.make_room());
            }
            self.plan.space.push(space);
        }
        let all = self.plan.space[0].needed_bytes + left;
        let there = self.plan.space[0].available_bytes;
        if left > 0 && all > there && self.plan.space.iter().all(Space::is_there) {
            let reason = format!(
                "base and child need {all} free bytes in one file system, {there} are free"
            );
            self.refuse(Kind::NoSpace, reason, "make room");
        }
        // The commit itself looks whether a raw base and its top fit together.
        let child = self.layers.child().map(|file| &file.path);
        let own = self
            .plan
            .space
            .iter()
            .filter(|space| Some(&space.file) == child);
        Ok(if left > 0 {
            own.map(|space| space.needed_bytes).sum()
        } else {
            0
        })
    }
}
