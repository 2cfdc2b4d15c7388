//! Which layers of a disk can be merged: those that nothing names, over which only one other stands.

use crate::layers::{self, DEPTH_MAX};
use crate::records::{LayerRow, LayerUses, Sandbox};

/// Layers of which one is to be made.
#[derive(Debug, Clone)]
pub(super) struct Group {
    /// A fresh id: the new file's name until it takes the top's.
    pub made: String,
    /// Those of the disk that stay above it, topmost first.
    pub above: Vec<LayerRow>,
    /// The top first; at least two.
    pub merged: Vec<LayerRow>,
    /// All that lies below them, topmost first.
    pub below: Vec<LayerRow>,
}

impl Group {
    pub fn top(&self) -> &LayerRow {
        &self.merged[0]
    }

    pub fn ids(&self) -> Vec<&str> {
        let all = self.merged.iter().chain(&self.below);
        all.map(|layer| layer.id.as_str()).collect()
    }
}

/// The files of a [`Group`], each part the topmost first.
pub(super) struct GroupFiles {
    pub above: Vec<stead_qcow2::LayerFile>,
    pub merged: Vec<stead_qcow2::LayerFile>,
    pub below: Vec<stead_qcow2::LayerFile>,
}

impl GroupFiles {
    pub fn as_layers(&self) -> stead_merge::FuseLayers<'_> {
        stead_merge::FuseLayers {
            above: &self.above,
            merged: &self.merged,
            below: &self.below,
        }
    }
}

/// What can be merged below `top`: the layers of each group, topmost first, and what lies below them.
pub(super) fn groups_in(
    uses: &LayerUses,
    sandbox: &Sandbox,
    top: &str,
) -> Vec<(Vec<LayerRow>, Vec<LayerRow>)> {
    let running = sandbox.process.is_some();
    let chain = uses.chain(top);
    let foreign = uses.of_others(&sandbox.id);
    let is_fixed = |index: usize, layer: &LayerRow| {
        layer.format == layers::RAW || foreign.contains(&layer.id) || (index == 0 && running)
    };
    let mut groups = Vec::new();
    let mut start = 0;
    while start < chain.len() {
        let goes_in = |(index, layer): (usize, &LayerRow)| {
            !is_fixed(index, layer) && !uses.is_named(&layer.id) && uses.children(&layer.id) == 1
        };
        let rest = chain.iter().enumerate().skip(start + 1);
        let more = match is_fixed(start, &chain[start]) {
            true => 0,
            false => rest.take_while(|layer| goes_in(*layer)).count(),
        };
        let end = start + 1 + more;
        if more > 0 {
            groups.push((chain[start..end].to_vec(), chain[end..].to_vec()));
        }
        start = end;
    }
    assert!(chain.len() <= DEPTH_MAX, "a chain without end");
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::SandboxState;

    fn layer(id: &str, parent: Option<&str>) -> LayerRow {
        LayerRow {
            id: id.to_owned(),
            format: if parent.is_none() { "raw" } else { "qcow2" }.to_owned(),
            parent: parent.map(str::to_owned),
            virtual_bytes: 1 << 30,
            frozen: true,
            content: None,
            stamp: None,
        }
    }

    /// base ◀ a ◀ b ◀ c ◀ d ◀ e ◀ active, of the sandbox `own`.
    fn uses(named: &[&str], more: &[(&str, &str)]) -> LayerUses {
        let chain = ["base", "a", "b", "c", "d", "e", "active"];
        let mut layers = vec![layer("base", None)];
        layers.extend(chain.windows(2).map(|pair| layer(pair[1], Some(pair[0]))));
        let mut disks = vec![("own".to_owned(), "active".to_owned())];
        for (name, parent) in more {
            layers.push(layer(name, Some(parent)));
            disks.push(("other".to_owned(), (*name).to_owned()));
        }
        LayerUses {
            layers,
            disks,
            named: named.iter().map(|id| (*id).to_owned()).collect(),
            jobs: Vec::new(),
        }
    }

    fn groups(uses: &LayerUses, running: bool) -> Vec<Vec<String>> {
        let process =
            running.then(|| stead_sys::process::ProcessId::own().expect("an own entry in /proc"));
        let sandbox = Sandbox {
            id: "own".to_owned(),
            name: "own".to_owned(),
            state: SandboxState::Running,
            template: String::new(),
            machine: String::new(),
            vm_user: 0,
            epoch: None,
            launch: None,
            process,
            ram_sharing: None,
            checkpoint: None,
            hibernated_as: None,
            created: String::new(),
        };
        let found = groups_in(uses, &sandbox, "active");
        let ids = |layers: Vec<LayerRow>| layers.into_iter().map(|layer| layer.id).collect();
        found.into_iter().map(|(merged, _)| ids(merged)).collect()
    }

    #[test]
    fn what_is_named_shared_raw_or_written_to_is_not_merged_into_another() {
        let none = uses(&[], &[]);
        assert_eq!(groups(&none, true), [["e", "d", "c", "b", "a"]]);
        assert_eq!(groups(&none, false), [["active", "e", "d", "c", "b", "a"]]);
        let named = uses(&["d", "a"], &[]);
        assert_eq!(groups(&named, true), [["d", "c", "b"]]);
        assert_eq!(
            groups(&named, false),
            [vec!["active", "e"], vec!["d", "c", "b"]]
        );
        let all = uses(&["a", "b", "c", "d", "e"], &[]);
        assert!(groups(&all, false).is_empty());
        // Another sandbox stands on c: from there on down nothing is touched.
        let shared = uses(&[], &[("others", "c")]);
        assert_eq!(groups(&shared, true), [["e", "d"]]);
        // A layer that only a checkpoint of the past stands on stays the one that it stands on.
        let mut branch = uses(&["side"], &[]);
        branch.layers.push(layer("side", Some("b")));
        assert_eq!(groups(&branch, true), [vec!["e", "d", "c"], vec!["b", "a"]]);
    }
}
