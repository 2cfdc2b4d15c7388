//! The names of block nodes: which disk a node is of, and which of its layers it stands for.

/// The numbers that a node stands for; mostly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Numbers {
    pub(crate) last: u32,
    pub(crate) first: u32,
}

impl Numbers {
    pub(crate) fn one(number: u32) -> Self {
        Self {
            last: number,
            first: number,
        }
    }

    /// Whether `other` stands for all of these and for more.
    pub(crate) fn are_in(self, other: Self) -> bool {
        self != other && other.first <= self.first && self.last <= other.last
    }

    /// The name of the node of `disk` that stands for them.
    pub(crate) fn node_name(self, disk: &str) -> String {
        if self.first == self.last {
            return node_name(disk, self.last);
        }
        format!("{disk}.{}-{}", self.last, self.first)
    }
}

/// The disk and numbers in a node's name; `None` for file nodes and nodes that are not ours.
pub(crate) fn parse_node(name: &str) -> Option<(&str, Numbers)> {
    let (disk, numbers) = name.split_once('.')?;
    let numbers = match numbers.split_once('-') {
        Some((last, first)) => Numbers {
            last: last.parse().ok()?,
            first: first.parse().ok()?,
        },
        None => Numbers::one(numbers.parse().ok()?),
    };
    (numbers.first <= numbers.last).then_some((disk, numbers))
}

pub(crate) fn node_name(disk: &str, number: u32) -> String {
    format!("{disk}.{number}")
}

pub(crate) fn file_node_name(node: &str) -> String {
    format!("{node}.f")
}
