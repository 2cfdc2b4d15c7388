//! Random lives of a disk: writes, layers, internal snapshots, merges and backups. Every backup restores to the disk of
//! its time.

#![allow(
    clippy::disallowed_methods,
    reason = "files of tests need not be durable"
)]

mod common;

use std::path::PathBuf;

use common::{World, sh};
use stead_backup::{BackupKind, Wanted};
use stead_merge::{MergeRequest, StalePolicy};
use stead_qcow2::edit::{EditOptions, Editor, SnapshotName};
use stead_qcow2::ops::snapshot;

/// Numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

struct Life {
    world: World,
    dice: Dice,
    /// The layers, the active one last.
    layers: Vec<PathBuf>,
    backups: Vec<(String, Vec<u8>)>,
    increments: usize,
    snapshots: u64,
    story: String,
}

impl Life {
    fn new(seed: u64) -> Self {
        let world = World::new();
        Self {
            layers: vec![world.disk.clone()],
            world,
            dice: Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            backups: Vec::new(),
            increments: 0,
            snapshots: 0,
            story: format!("seed {seed}:"),
        }
    }

    fn step(&mut self) {
        let step = self.dice.below(12);
        self.story.push_str(&format!(" {step}"));
        match step {
            0..=4 => self.write(),
            5..=7 => self.backup(),
            8 => self.add_layer(),
            9 => self.merge(),
            10 => self.snapshot(),
            _ => self.commit(),
        }
    }

    fn write(&mut self) {
        let commands: Vec<String> = (0..1 + self.dice.below(3))
            .map(|_| {
                let at = self.dice.below(16_000) * 512;
                let length = (1 + self.dice.below(400)) * 512;
                let length = length.min((8 << 20) - at);
                match self.dice.below(5) {
                    0 => format!("write -z {at} {length}"),
                    1 => format!("discard {at} {length}"),
                    _ => format!("write -P {} {at} {length}", 1 + self.dice.below(250)),
                }
            })
            .collect();
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        self.world.io(&commands);
    }

    fn backup(&mut self) {
        let wanted = match self.dice.below(8) {
            0 => Wanted::Full,
            _ => Wanted::Incremental,
        };
        let report = self.world.backup(wanted);
        let report = report.unwrap_or_else(|error| panic!("{}: {error}", self.story));
        let id = report.record.id;
        self.world.require(&id, &self.world.content(), &self.story);
        self.increments += usize::from(report.record.kind == BackupKind::Incremental);
        self.backups.push((id, self.world.content()));
    }

    fn add_layer(&mut self) {
        let name = format!("layer-{}.qcow2", self.dice.below(1 << 40));
        let path = self.world.dir.path().join(name);
        let (below, new) = (self.world.disk.display(), path.display());
        sh(&format!(
            "qemu-img create -q -f qcow2 -b {below} -F qcow2 {new}"
        ));
        if self.dice.below(2) == 0 {
            for bitmap in self.world.bitmaps() {
                sh(&format!("qemu-img bitmap --add {new} {bitmap}"));
            }
        }
        self.world.disk = path.clone();
        self.layers.push(path);
        self.snapshots = 0;
    }

    /// Two layers somewhere become one.
    fn merge(&mut self) {
        if self.layers.len() < 2 {
            return;
        }
        let top = 1 + self.dice.below(self.layers.len() as u64 - 1) as usize;
        let stale = match self.dice.below(2) {
            0 => StalePolicy::Prune,
            _ => StalePolicy::Keep,
        };
        let request = MergeRequest {
            chain: self.world.disk.clone(),
            top: Some(self.layers[top].clone()),
            base: Some(self.layers[top - 1].clone()),
            stale,
            drop_bitmaps: true,
            records: self.world.dir.path().join("records"),
            ..MergeRequest::default()
        };
        let silent = stead_merge::Watch {
            tell: &|_| {},
            cancel: None,
        };
        // Internal snapshots in a layer that would go are a reason to refuse.
        if stead_merge::run(&request, silent).is_ok() {
            self.layers.remove(top);
            self.snapshots = 0;
            self.world.disk = self.layers.last().expect("one stays").clone();
        }
    }

    /// An internal snapshot is made or gone back to, by our own engine: QEMU refuses where there are bitmaps.
    fn snapshot(&mut self) {
        let editor = Editor::open(&self.world.disk, EditOptions::default());
        let mut editor = editor.unwrap_or_else(|error| panic!("{}: {error}", self.story));
        if self.snapshots > 0 && self.dice.below(2) == 0 {
            let name = format!("s{}", self.dice.below(self.snapshots));
            snapshot::apply(&mut editor, name.as_bytes()).expect("applied");
        } else {
            let name = SnapshotName {
                name: format!("s{}", self.snapshots).into_bytes(),
                date_seconds: 0,
                date_nanoseconds: 0,
            };
            snapshot::create(&mut editor, &name).expect("created");
            self.snapshots += 1;
        }
    }

    /// The active layer is committed by qemu-img and stays, empty.
    fn commit(&mut self) {
        if self.layers.len() > 1 {
            sh(&format!(
                "qemu-img commit -q -f qcow2 {}",
                self.world.disk.display()
            ));
        }
    }
}

#[test]
fn every_backup_in_the_life_of_a_disk_restores_to_the_disk_of_its_time() {
    let mut increments = 0;
    for seed in 1..=6 {
        let mut life = Life::new(seed);
        for _ in 0..18 {
            life.step();
        }
        life.backup();
        for (id, disk) in &life.backups {
            life.world.require(id, disk, &life.story);
        }
        life.world.require_all_whole(&life.story);
        increments += life.increments;
    }
    assert!(increments >= 12, "bitmaps were of use: {increments}");
}
