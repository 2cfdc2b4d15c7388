//! One command of ours against one of `qemu-img`, in turns.

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::Images;
use super::measured::{self, Used};
use crate::error::{Doing, Result};
use crate::report::{Report, Row, Value, median};
use crate::{facts, program};

/// What is in the page cache when the clock starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// The files were read just before.
    Warm,
    /// Nothing.
    Cold,
}

impl Cache {
    /// As it is said in a figure.
    pub fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }

    /// Brings the files in `read` about.
    fn set(self, images: &Images, read: &[PathBuf]) -> Result<()> {
        rustix::fs::sync();
        if self == Self::Cold {
            drop_caches()?;
        }
        touch_memory(images)?;
        match self {
            Self::Warm => read.iter().try_for_each(read_through),
            Self::Cold => Ok(()),
        }
    }
}

/// Takes as much memory as a disk that is made has bytes, writes to it and gives it back. On a virtual machine, free
/// memory may have gone back to its host, and whoever fills the page cache first pays for getting it again: that is
/// neither program's work.
fn touch_memory(images: &Images) -> Result<()> {
    let bytes = (images.disk_bytes / 4 * 5).min(facts::available_memory()? / 3);
    let length = usize::try_from(bytes).unwrap_or_default();
    std::hint::black_box(vec![1_u8; length]);
    Ok(())
}

fn read_through(path: &PathBuf) -> Result<()> {
    let mut file = std::fs::File::open(path).doing("read an image")?;
    let mut buffer = vec![0; 1 << 20];
    while file.read(&mut buffer).doing("read an image")? > 0 {}
    Ok(())
}

fn drop_caches() -> Result<()> {
    use std::io::Write;
    let opened = std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/sys/vm/drop_caches");
    opened
        .and_then(|mut file| file.write_all(b"3"))
        .doing("empty the page cache")
}

/// Two commands that do the same.
#[derive(Debug)]
pub struct Contest<'a> {
    /// What is measured.
    pub figure: &'a str,
    /// The peer in words.
    pub beside: &'a str,
    /// The most that our time may be, as a multiple of the peer's.
    pub target: Option<f64>,
    /// Files that are copied before each run: from and to.
    pub fresh: &'a [(&'a str, &'a str)],
    /// Files that are read before a warm run.
    pub read: &'a [&'a str],
    /// Files that are removed after each run.
    pub made: &'a [&'a str],
    /// What `stead` is told.
    pub ours: &'a [&'a str],
    /// What `qemu-img` is told, command after command.
    pub peer: &'a [&'a [&'a str]],
}

/// The times of both.
#[derive(Debug, Default)]
pub struct Times {
    ours: Vec<Duration>,
    peer: Vec<Duration>,
    /// The lengths of what was made last: ours, and the peer's.
    pub lengths: [u64; 2],
}

impl Contest<'_> {
    /// Takes turns and adds a row.
    ///
    /// # Errors
    /// When a command fails.
    pub async fn run(&self, images: &Images, cache: Cache, report: &mut Report) -> Result<Times> {
        let mut times = Times::default();
        let rounds = match cache {
            Cache::Warm => images.runs,
            Cache::Cold => images.runs.div_ceil(2),
        };
        for round in 0..rounds {
            for turn in 0..2 {
                let ours = (round + turn) % 2 == 0;
                let took = self.once(images, cache, ours, &mut times).await?;
                match ours {
                    true => times.ours.push(took),
                    false => times.peer.push(took),
                }
            }
        }
        report.rows.push(Row {
            figure: format!("{}, {}", self.figure, cache.name()),
            ours: Value::Time(median(&times.ours)),
            peer: Value::Time(median(&times.peer)),
            beside: self.beside.to_owned(),
            target: self.target,
        });
        Ok(times)
    }

    async fn once(
        &self,
        images: &Images,
        cache: Cache,
        ours: bool,
        times: &mut Times,
    ) -> Result<Duration> {
        self.make_fresh(images).await?;
        let read: Vec<PathBuf> = self.read.iter().map(|n| images.folder.join(n)).collect();
        cache.set(images, &read)?;
        let begun = Instant::now();
        self.command(images, ours).await?;
        let took = begun.elapsed();
        if let Some(made) = self.made.first() {
            let index = usize::from(!ours);
            times.lengths[index] = program::length(&images.folder.join(made))?;
        }
        self.remove_fresh(images)?;
        Ok(took)
    }

    async fn make_fresh(&self, images: &Images) -> Result<()> {
        for (from, to) in self.fresh {
            program::run("cp", &[images.path(from), images.path(to)]).await?;
        }
        Ok(())
    }

    fn remove_fresh(&self, images: &Images) -> Result<()> {
        let fresh = self.fresh.iter().map(|(_, to)| to);
        self.made
            .iter()
            .chain(fresh)
            .try_for_each(|name| images.remove(name))
    }

    /// What one command of ours uses.
    ///
    /// # Errors
    /// When it fails.
    pub async fn used_by_ours(&self, images: &Images) -> Result<Used> {
        self.make_fresh(images).await?;
        rustix::fs::sync();
        let words = images.arguments(self.ours);
        let used = measured::command(images.stead.as_os_str(), &words).await?;
        self.remove_fresh(images)?;
        Ok(used)
    }

    async fn command(&self, images: &Images, ours: bool) -> Result<()> {
        if ours {
            return program::run(&images.stead, &images.arguments(self.ours))
                .await
                .map(drop);
        }
        for words in self.peer {
            program::run("qemu-img", &images.arguments(words)).await?;
        }
        Ok(())
    }
}

impl Images {
    /// Arguments in which a word that begins with `@` is a file's name.
    pub fn arguments(&self, words: &[&str]) -> Vec<String> {
        let word = |word: &&str| match word.strip_prefix('@') {
            Some(name) => self.path(name),
            None => (*word).to_owned(),
        };
        words.iter().map(word).collect()
    }
}
