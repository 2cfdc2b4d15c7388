//! How often each cluster of a file is referenced, and by what, in little memory.
//!
//! Clusters are kept in pages. Most pages of an image are alike throughout (data, referenced once), and
//! take no memory of their own; others have a few kinds of clusters, with 4 bits each; the rest have what
//! there is in full. When there is no room for more, the highest clusters are given up: [`Counts::end`] then
//! says where the counts end, and the caller counts again from there.

use std::collections::BTreeMap;

use crate::header::to_usize;

/// Clusters on a page.
pub(crate) const PAGE_CLUSTERS: u64 = 1024;
const PAGE_LEN: usize = PAGE_CLUSTERS as usize;
/// Kinds of clusters on a page of 4 bits each.
const FEW: usize = 16;
/// The most memory for pages, in bytes.
pub(crate) const MAX_COUNT_BYTES: usize = 64 << 20;
/// What a page takes in the index, about.
const PAGE_OVERHEAD: usize = 48;

/// How often a cluster is referenced, and by what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct State {
    pub references: u32,
    pub marks: u16,
}

impl State {
    fn with(self, references: u32, marks: u16) -> Self {
        Self {
            references: self.references.saturating_add(references),
            marks: self.marks | marks,
        }
    }
}

/// A page with few kinds of clusters: the kinds, and which one each cluster is.
pub(crate) struct Few {
    kinds: [State; FEW],
    known: usize,
    codes: [u8; PAGE_LEN / 2],
}

pub(crate) enum Page {
    Alike(State),
    Few(Box<Few>),
    Many(Box<[State; PAGE_LEN]>),
}

impl Few {
    fn new(all: State) -> Box<Self> {
        Box::new(Self {
            kinds: [all; FEW],
            known: 1,
            codes: [0; PAGE_LEN / 2],
        })
    }

    fn code(&self, index: usize) -> usize {
        usize::from(self.codes[index / 2] >> (index % 2 * 4) & 0xf)
    }

    fn set_code(&mut self, index: usize, code: u8) {
        let shift = index % 2 * 4;
        let byte = &mut self.codes[index / 2];
        *byte = *byte & !(0xf << shift) | code << shift;
    }

    /// The code of a kind, which is new perhaps; `None` when there are too many.
    fn code_of(&mut self, state: State) -> Option<u8> {
        let known = self.kinds[..self.known]
            .iter()
            .position(|kind| *kind == state);
        let code = match known {
            Some(code) => code,
            None if self.known < FEW => {
                self.kinds[self.known] = state;
                self.known += 1;
                self.known - 1
            }
            None => return None,
        };
        u8::try_from(code).ok()
    }

    /// Adds to some clusters; `false`, with nothing changed, when there are too many kinds.
    fn add(&mut self, range: std::ops::Range<usize>, references: u32, marks: u16) -> bool {
        let mut to = [None; FEW];
        for index in range.clone() {
            let code = self.code(index);
            if to[code].is_none() {
                let Some(new) = self.code_of(self.kinds[code].with(references, marks)) else {
                    return false;
                };
                to[code] = Some(new);
            }
        }
        for index in range {
            if let Some(new) = to[self.code(index)] {
                self.set_code(index, new);
            }
        }
        true
    }

    /// The one kind of all clusters, if there is only one.
    fn alike(&self) -> Option<State> {
        let first = self.codes[0];
        let same = first >> 4 == first & 0xf && self.codes.iter().all(|code| *code == first);
        same.then(|| self.kinds[usize::from(first & 0xf)])
    }
}

impl Page {
    pub fn get(&self, index: usize) -> State {
        match self {
            Self::Alike(state) => *state,
            Self::Few(few) => few.kinds[few.code(index)],
            Self::Many(states) => states[index],
        }
    }

    fn bytes(&self) -> usize {
        PAGE_OVERHEAD
            + match self {
                Self::Alike(_) => 0,
                Self::Few(_) => size_of::<Few>(),
                Self::Many(_) => size_of::<[State; PAGE_LEN]>(),
            }
    }

    fn add(&mut self, range: std::ops::Range<usize>, references: u32, marks: u16) {
        let whole = range.len() == PAGE_LEN;
        let full = range.end == PAGE_LEN || range.start == 0;
        match self {
            Self::Alike(state) if whole => *state = state.with(references, marks),
            Self::Alike(state) => {
                let mut few = Few::new(*state);
                let fits = few.add(range, references, marks);
                assert!(fits, "two kinds are few");
                *self = Self::Few(few);
            }
            Self::Few(few) => {
                if !few.add(range.clone(), references, marks) {
                    self.widen();
                    self.add(range, references, marks);
                } else if full && let Some(alike) = few.alike() {
                    *self = Self::Alike(alike);
                }
            }
            Self::Many(states) => {
                for state in &mut states[range] {
                    *state = state.with(references, marks);
                }
            }
        }
    }

    fn widen(&mut self) {
        let mut states = Box::new([State::default(); PAGE_LEN]);
        for (index, state) in states.iter_mut().enumerate() {
            *state = self.get(index);
        }
        *self = Self::Many(states);
    }
}

/// References per cluster, in a window.
pub(crate) struct Counts {
    pub start: u64,
    /// The first cluster that is not counted any more; the start of a page, or `u64::MAX`.
    pub end: u64,
    pages: BTreeMap<u64, Page>,
    bytes: usize,
    max_bytes: usize,
}

impl Counts {
    /// From cluster `start` on, the start of a page.
    pub fn new(start: u64) -> Self {
        Self::with_room(start, MAX_COUNT_BYTES)
    }

    fn with_room(start: u64, max_bytes: usize) -> Self {
        assert!(
            start.is_multiple_of(PAGE_CLUSTERS),
            "a window starts with a page"
        );
        Self {
            start,
            end: u64::MAX,
            pages: BTreeMap::new(),
            bytes: 0,
            max_bytes,
        }
    }

    /// Adds to `count` clusters from `first` on; those outside of the window are left out.
    pub fn add(&mut self, first: u64, count: u64, references: u32, marks: u16) {
        let end = first.saturating_add(count);
        let mut at = first.max(self.start);
        while at < end.min(self.end) {
            let index = at / PAGE_CLUSTERS;
            let page_start = index * PAGE_CLUSTERS;
            let stop = end.min(page_start.saturating_add(PAGE_CLUSTERS));
            self.add_in_page(
                index,
                to_usize(at - page_start)..to_usize(stop - page_start),
                references,
                marks,
            );
            at = stop;
        }
    }

    fn add_in_page(
        &mut self,
        index: u64,
        range: std::ops::Range<usize>,
        references: u32,
        marks: u16,
    ) {
        let mut before = 0;
        let page = self
            .pages
            .entry(index)
            .and_modify(|page| before = page.bytes())
            .or_insert(Page::Alike(State::default()));
        page.add(range, references, marks);
        self.bytes = self.bytes + page.bytes() - before;
        // One page always stays, so each window has something.
        while self.bytes > self.max_bytes && self.pages.len() > 1 {
            if let Some((last, page)) = self.pages.pop_last() {
                self.bytes -= page.bytes();
                self.end = last * PAGE_CLUSTERS;
            }
        }
    }

    /// The page that starts with cluster `first`.
    pub fn page(&self, first: u64) -> Option<&Page> {
        self.pages.get(&(first / PAGE_CLUSTERS))
    }

    /// The first cluster at or after `from` that is on a page.
    pub fn next_page(&self, from: u64) -> Option<u64> {
        let (index, _) = self.pages.range(from / PAGE_CLUSTERS..).next()?;
        Some((index * PAGE_CLUSTERS).max(from))
    }

    /// The number of clusters on all pages that are referenced.
    #[cfg(test)]
    fn used(&self) -> u64 {
        let used = |page: &Page| {
            (0..PAGE_LEN)
                .filter(|n| page.get(*n).references > 0)
                .count()
        };
        self.pages.values().map(|page| used(page) as u64).sum()
    }
}

const _: () = assert!(size_of::<Few>() <= 664);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::header::to_u64;
    use proptest::prelude::*;

    const CLUSTERS: u64 = PAGE_CLUSTERS * 3;

    proptest! {
        #[test]
        fn counts_are_those_of_a_plain_table(
            adds in proptest::collection::vec(
                (0..CLUSTERS, 1..1500_u64, 1..5_u32, 0..6_u16), 1..60),
        ) {
            let mut counts = Counts::new(0);
            let mut plain = vec![State::default(); to_usize(CLUSTERS) + 1500];
            for (first, count, references, mark) in adds {
                counts.add(first, count, references, 1 << mark);
                for state in &mut plain[to_usize(first)..to_usize(first + count)] {
                    *state = state.with(references, 1 << mark);
                }
            }
            for (cluster, state) in plain.iter().enumerate() {
                let cluster = to_u64(cluster);
                let page = counts.page(cluster);
                let found = page.map_or(State::default(), |page| {
                    page.get(to_usize(cluster % PAGE_CLUSTERS))
                });
                prop_assert_eq!(found, *state, "cluster {}", cluster);
            }
            let bytes: usize = counts.pages.values().map(Page::bytes).sum();
            prop_assert_eq!(counts.bytes, bytes);
        }
    }

    #[test]
    fn pages_that_are_alike_take_no_memory_even_when_they_are_filled_in_parts() {
        let mut counts = Counts::new(0);
        counts.add(5, PAGE_CLUSTERS * 1000, 1, 1);
        counts.add(0, 5, 1, 1);
        let few = counts
            .pages
            .values()
            .filter(|page| !matches!(page, Page::Alike(_)));
        assert_eq!(few.count(), 1, "the last page is not full");
        assert_eq!(counts.used(), PAGE_CLUSTERS * 1000 + 5);
    }

    #[test]
    fn the_highest_clusters_are_given_up_when_room_ends_and_that_is_said() {
        let mut counts = Counts::with_room(0, 100_000);
        for page in (0..1000).rev() {
            counts.add(page * PAGE_CLUSTERS, 1, 1, 0);
        }
        assert!(counts.bytes <= 100_000 && counts.pages.len() > 100);
        assert_eq!(counts.end, to_u64(counts.pages.len()) * PAGE_CLUSTERS);
        assert_eq!(counts.used(), to_u64(counts.pages.len()));
        let end = counts.end;
        counts.add(end, 1, 1, 0);
        assert!(counts.page(end).is_none());
    }
}
