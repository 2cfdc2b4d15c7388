//! A merge keeps the disk and every bitmap, removes what is not needed, and refuses before it changes anything.

#![allow(
    clippy::disallowed_methods,
    reason = "copies of images in tests need not be durable"
)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::{LAYERS, World, bitmap, content, qemu_flags, sh, silent};
use stead_merge::{Becomes, BitmapState, Kind, MergeRequest, Role, StalePolicy, plan, run};

#[test]
fn layers_in_the_middle_of_a_chain_are_merged_and_a_backup_goes_on_as_if_nothing_had_been() {
    let world = World::new("");
    let report = run(&world.request(), silent()).expect("merged");
    assert_eq!(report.removed, [world.path("top"), world.path("mid")]);
    assert!(report.kept.is_empty() && !world.path("top").exists() && !world.path("mid").exists());
    assert!(!world.record().exists());
    world.require_whole("merged");
    let base = world.path("base");
    for name in ["shared", "late"] {
        assert_eq!(
            qemu_flags(&base, name),
            Some(vec!["auto".to_owned()]),
            "{name}"
        );
    }
    for name in ["stale-1", "stale-2"] {
        assert_eq!(qemu_flags(&base, name), None, "{name}");
    }
    // QEMU finds the way through the chain, too, and sees the same disk.
    let raw = world.dir.path().join("raw");
    let active = world.path("active");
    sh(&format!(
        "qemu-img convert -f qcow2 -O raw {} {}",
        active.display(),
        raw.display()
    ));
    assert!(fs::read(&raw).expect("there") == world.disk);
}

#[test]
fn the_plan_says_each_bitmap_in_each_layer_and_what_becomes_of_it_and_the_run_does_that() {
    let world = World::new("");
    let mut plan = plan(&world.request()).expect("planned");
    assert!(plan.refused.is_empty(), "{:?}", plan.refused);
    let roles: Vec<Role> = plan.layers.iter().map(|layer| layer.role).collect();
    assert_eq!(
        roles,
        [
            Role::Above,
            Role::Child,
            Role::Top,
            Role::Between,
            Role::Base
        ]
    );
    let base = &plan.layers[4].bitmaps;
    let states: Vec<_> = base
        .iter()
        .map(|one| (one.name.as_str(), one.state))
        .collect();
    let stale = BitmapState::Stale;
    assert_eq!(
        states,
        [
            ("shared", BitmapState::Valid),
            ("stale-1", stale),
            ("stale-2", stale)
        ]
    );
    assert_eq!(base[0].dirty_bytes, Some(2 << 20));
    let become_: Vec<_> = plan
        .bitmaps
        .iter()
        .map(|one| (one.name.as_str(), one.becomes))
        .collect();
    assert_eq!(
        become_,
        [
            ("shared", Becomes::Merged),
            ("stale-1", Becomes::Pruned),
            ("stale-2", Becomes::Pruned),
            ("late", Becomes::Carried)
        ]
    );
    assert_eq!(plan.searched.images, 0);
    let mut report = run(&world.request(), silent()).expect("merged");
    // What others leave free changes all the time.
    for space in plan.space.iter_mut().chain(&mut report.plan.space) {
        space.available_bytes = 0;
    }
    assert_eq!(report.plan, plan);
    let length = fs::metadata(world.path("base")).expect("there").len();
    assert_eq!(length, plan.space[0].end_bytes);
}

#[test]
fn stale_bitmaps_that_are_kept_have_all_that_the_merge_changed() {
    let world = World::new("");
    let request = MergeRequest {
        stale: StalePolicy::Keep,
        ..world.request()
    };
    run(&request, silent()).expect("merged");
    world.require_whole("merged");
    // It began with `shared`, so it must bring the same backup up to what the base shows.
    let base = world.path("base");
    let restored = common::restored(&world.fulls[0].1, &base, "stale-1").expect("valid");
    assert!(restored == content(&base));
}

#[test]
fn a_top_that_is_the_active_layer_leaves_the_base_as_the_disk() {
    let world = World::new("");
    let request = MergeRequest {
        chain: world.path("active"),
        top: None,
        base: Some(PathBuf::from("4")),
        ..world.request()
    };
    let report = run(&request, silent()).expect("merged");
    let base = world.path("base");
    assert_eq!(report.active, base);
    assert!(content(&base) == world.disk);
    for (name, full) in &world.fulls {
        assert!(
            common::restored(full, &base, name).expect("valid") == world.disk,
            "{name}"
        );
    }
    assert_eq!(
        LAYERS
            .iter()
            .filter(|name| world.path(name).exists())
            .count(),
        1
    );
}

#[test]
fn layers_that_are_to_be_kept_are_there_and_still_show_what_they_did() {
    let world = World::new("");
    let top = content(&world.path("top"));
    let request = MergeRequest {
        keep_layers: true,
        ..world.request()
    };
    let report = run(&request, silent()).expect("merged");
    assert_eq!(report.kept, [world.path("top"), world.path("mid")]);
    assert!(content(&world.path("top")) == top);
    world.require_whole("merged");
}

/// What stands against a merge, and nothing changes.
fn refused(world: &World, request: &MergeRequest) -> (Kind, String) {
    let before = world.keep();
    let error = run(request, silent()).expect_err("refused");
    assert!(
        error.what_is_left().contains("nothing was changed"),
        "{error}"
    );
    assert!(!error.next_step().is_empty());
    for (path, bytes) in before {
        assert!(
            fs::read(&path).expect("there") == bytes,
            "{} was changed",
            path.display()
        );
    }
    assert!(!world.record().exists());
    (error.kind(), error.found().to_owned())
}

#[test]
fn what_would_hurt_somebody_is_refused_by_name_and_nothing_is_changed() {
    let world = World::new("");
    let at = world.dir.path().display();
    let request = world.request();
    // Another child of a layer that would go, found in the folder; and one elsewhere, named.
    sh(&format!(
        "cd {at} && qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 other.qcow2"
    ));
    let (kind, found) = refused(&world, &request);
    assert!(
        kind == Kind::Conflict && found.contains("other.qcow2 stands on"),
        "{found}"
    );
    fs::remove_file(world.dir.path().join("other.qcow2")).expect("removed");
    let elsewhere = tempfile::tempdir().expect("temp dir");
    let sibling = elsewhere.path().join("s.qcow2");
    let above = elsewhere.path().join("t.qcow2");
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {at}/base.qcow2 -F qcow2 {}",
        sibling.display()
    ));
    sh(&format!(
        "qemu-img create -q -f qcow2 -b {} -F qcow2 {}",
        sibling.display(),
        above.display()
    ));
    for request in [
        MergeRequest {
            siblings: vec![above],
            ..request.clone()
        },
        MergeRequest {
            look_in: vec![elsewhere.path().to_owned()],
            ..request.clone()
        },
    ] {
        let (kind, found) = refused(&world, &request);
        assert!(
            kind == Kind::Conflict && found.contains(".qcow2 stands on"),
            "{found}"
        );
    }
    // Stale bitmaps, where that is asked.
    let strict = MergeRequest {
        stale: StalePolicy::Refuse,
        ..request.clone()
    };
    assert!(refused(&world, &strict).1.contains("stale-1, stale-2"));
    // Layers that do not make a merge.
    for (top, base) in [("base", "top"), ("top", "top"), ("nowhere", "base")] {
        let wrong = MergeRequest {
            top: Some(world.path(top)),
            base: Some(world.path(base)),
            ..request.clone()
        };
        assert_eq!(refused(&world, &wrong).0, Kind::Usage);
    }
    // An internal snapshot would go with its layer.
    sh(&format!("cd {at} && qemu-img snapshot -c kept mid.qcow2"));
    assert!(refused(&world, &request).1.contains("1 internal snapshots"));
    sh(&format!("cd {at} && qemu-img snapshot -d kept mid.qcow2"));
    run(&request, silent()).expect("nothing stands against it any more");
    world.require_whole("merged");
}

#[test]
fn an_image_that_somebody_has_open_is_refused_with_who_it_is() {
    let world = World::new("");
    for name in ["child", "top", "base"] {
        let mut qemu = std::process::Command::new("qemu-io")
            .args(["-f", "qcow2"])
            .arg(world.path(name))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("qemu-io");
        // It is open when it answers.
        let mut stdin = qemu.stdin.take().expect("piped");
        std::io::Write::write_all(&mut stdin, b"length\n").expect("asked");
        let mut line = String::new();
        let mut out = std::io::BufReader::new(qemu.stdout.take().expect("piped"));
        std::io::BufRead::read_line(&mut out, &mut line).expect("answered");
        let error = run(&world.request(), silent()).expect_err("in use");
        let pid = qemu.id().to_string();
        assert!(
            error.kind() == Kind::Conflict && error.found().contains(&pid),
            "{error}"
        );
        drop(stdin);
        qemu.wait().expect("ended");
        assert!(!world.record().exists());
    }
    world.require_whole("refused");
}

#[test]
fn a_base_that_is_longer_is_refused_or_cut_and_one_that_is_shorter_grows() {
    let world = World::new("");
    sh(&format!(
        "qemu-img resize -q -f qcow2 {} 9M",
        world.path("base").display()
    ));
    assert!(
        refused(&world, &world.request())
            .1
            .contains("9437184 bytes")
    );
    let cut = MergeRequest {
        cut_base: true,
        ..world.request()
    };
    run(&cut, silent()).expect("merged");
    world.require_whole("cut");

    let world = World::new("");
    let active = world.path("active");
    for name in ["active", "child", "top"] {
        sh(&format!(
            "qemu-img resize -q -f qcow2 {} 10M",
            world.path(name).display()
        ));
    }
    let disk = content(&active);
    run(&world.request(), silent()).expect("merged");
    assert!(content(&active) == disk && disk.len() == 10 << 20);
    for (name, full) in &world.fulls {
        assert!(
            common::restored(full, &active, name).expect("valid") == disk,
            "{name}"
        );
    }
}

#[test]
fn a_raw_base_is_merged_into_where_losing_the_bitmaps_was_asked_for_and_none_looks_whole() {
    let world = World::new("");
    let at = world.dir.path().display();
    sh(&format!(
        "cd {at} && qemu-img convert -f qcow2 -O raw base.qcow2 base.raw && qemu-img rebase -u -f qcow2 -b base.raw -F raw mid.qcow2"
    ));
    let request = MergeRequest {
        base: Some(world.dir.path().join("base.raw")),
        ..world.request()
    };
    let (_, found) = refused(&world, &request);
    assert!(
        found.contains("bitmaps would be lost") && found.contains("shared"),
        "{found}"
    );
    let request = MergeRequest {
        drop_bitmaps: true,
        ..request
    };
    let report = run(&request, silent()).expect("merged");
    assert!(
        report
            .plan
            .bitmaps
            .iter()
            .all(|one| one.becomes == Becomes::Dropped)
    );
    let active = world.path("active");
    assert!(content(&active) == world.disk);
    // What went on above would say too little now: it is gone there too, as a backup program sees it.
    for (name, full) in &world.fulls {
        match common::restored(full, &active, name) {
            None => {}
            Some(restored) => panic!(
                "{name} looks whole, and {} brings it up to date",
                restored == world.disk
            ),
        }
    }
    assert!(
        report
            .plan
            .bitmaps
            .iter()
            .all(|one| one.void_above && one.lost)
    );
}

#[test]
fn a_bitmap_that_was_not_saved_in_the_base_stays_so_and_is_never_taken_for_whole() {
    let world = World::new("");
    let base = world.path("base");
    mark_in_use(&base, "shared");
    let plan_before = plan(&world.request()).expect("planned");
    assert_eq!(plan_before.layers[4].bitmaps[0].state, BitmapState::InUse);
    run(&world.request(), silent()).expect("merged");
    assert!(content(&world.path("active")) == world.disk);
    assert!(
        bitmap(&world.path("active"), "shared").is_none(),
        "it looks whole"
    );
    let flags = qemu_flags(&base, "shared").expect("there");
    assert!(flags.contains(&"in-use".to_owned()), "{flags:?}");
    let late = common::restored(&world.fulls[1].1, &world.path("active"), "late");
    assert!(late.expect("valid") == world.disk);
}

#[test]
fn a_disabled_bitmap_that_merged_layers_go_on_with_has_all_that_the_merge_changed() {
    let world = World::new("");
    let (base, active) = (world.path("base"), world.path("active"));
    sh(&format!(
        "qemu-img bitmap --disable {} shared",
        base.display()
    ));
    let report = run(&world.request(), silent()).expect("merged");
    assert_eq!(report.plan.bitmaps[0].becomes, Becomes::Marked);
    assert_eq!(qemu_flags(&base, "shared"), Some(Vec::new()));
    // Who takes all bits together, whether they record or not, misses nothing.
    let chain = common::open(&active);
    let mut restored = world.fulls[0].1.clone();
    for layer in (0..chain.depth()).filter_map(|index| chain.layer(index)) {
        let stored = layer.stored_bitmaps().expect("whole");
        let shared = stored
            .iter()
            .find(|one| one.name == b"shared")
            .expect("there");
        for range in layer.read_bitmap(shared).expect("usable").dirty_ranges() {
            let [from, to] = [range.start, range.end].map(|at| usize::try_from(at).expect("small"));
            restored[from..to].copy_from_slice(&world.disk[from..to]);
        }
    }
    assert!(restored == world.disk);
}

#[test]
fn the_check_can_fail_when_the_bitmap_that_was_not_saved_is_removed_from_the_base() {
    let world = World::new("");
    let base = world.path("base");
    mark_in_use(&base, "shared");
    // What protects is taken away: the mark that says that it is broken.
    sh(&format!(
        "qemu-img bitmap --remove {} shared",
        base.display()
    ));
    run(&world.request(), silent()).expect("merged");
    let lies = common::restored(&world.fulls[0].1, &world.path("active"), "shared");
    assert!(lies.expect("it looks whole") != world.disk);
}

#[test]
fn a_bitmap_that_was_not_saved_in_a_merged_layer_is_made_good_by_marking_the_whole_merge() {
    for layer in ["top", "mid"] {
        let world = World::new("");
        mark_in_use(&world.path(layer), "shared");
        run(&world.request(), silent()).expect("merged");
        world.require_whole(layer);
    }
}

#[test]
fn a_bitmap_with_a_hole_is_made_good_or_goes_and_never_says_too_little() {
    for (layer, name) in [("top", "shared"), ("mid", "shared"), ("top", "late")] {
        let world = World::new("");
        let image = world.path(layer);
        sh(&format!(
            "qemu-img bitmap --remove {} {name}",
            image.display()
        ));
        run(&world.request(), silent()).expect("merged");
        assert!(content(&world.path("active")) == world.disk);
        for (name, full) in &world.fulls {
            // `late` then begins in the child, when the disk was as the top shows it.
            let own = (*name == "late" && layer == "top").then(|| content(&world.path("base")));
            let full = own
                .as_ref()
                .filter(|_| world_lacks(&world, name))
                .unwrap_or(full);
            let restored = common::restored(full, &world.path("active"), name).expect("valid");
            assert!(restored == world.disk, "{name} without {layer}");
        }
    }
}

fn world_lacks(world: &World, name: &str) -> bool {
    qemu_flags(&world.path("base"), name).is_none()
}

/// Sets the in-use flag of a bitmap in the directory of an image, as a crash of QEMU leaves it.
fn mark_in_use(image: &PathBuf, name: &str) {
    let mut bytes = fs::read(image).expect("there");
    let entry = bytes
        .windows(name.len())
        .rposition(|part| part == name.as_bytes());
    // The name follows the 24 bytes of the entry; flags are at 12.
    let flags = entry.expect("a bitmap of that name") - 24 + 12;
    let word = u32::from_be_bytes(bytes[flags..flags + 4].try_into().expect("4 bytes"));
    assert_eq!(word, 2, "enabled and saved");
    bytes[flags..flags + 4].copy_from_slice(&3_u32.to_be_bytes());
    fs::write(image, bytes).expect("written");
    assert!(
        qemu_flags(image, name)
            .expect("there")
            .contains(&"in-use".to_owned())
    );
}
