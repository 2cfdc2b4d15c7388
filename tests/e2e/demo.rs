//! `stead demo` as a user runs it, with fewer forks.

use std::path::Path;

use stead_tests::{Worker, golden_store, target_dir};

/// What the demo must have proved, whatever else it tells.
const CLAIMS: [&str; 8] = [
    "the second worker has its own, byte-different base image",
    "the source goes on and changes",
    "on the same worker equals the checkpoint, caches cold",
    "on the second worker equals the checkpoint, caches cold",
    "draw different random numbers",
    "the source kept its own changes, caches cold",
    "the woken VM is as it was, caches cold",
    "a flipped byte in the store is refused before a vCPU runs",
];

#[test]
fn the_demo_proves_every_claim_and_leaves_no_vm() {
    // The templates of an earlier run are used again, as a user's second demo does.
    let built_for = golden_store().parent().expect("a folder per agent");
    let mut worker = Worker::at(&built_for.join("demo"), &target_dir().display().to_string());
    worker.keep = true;
    let report = worker.json(&["demo", "--forks", "2"]);
    assert_eq!(report["all_held"], true, "{report}");
    let rows = report["rows"].as_array().expect("rows");
    for claim in CLAIMS {
        let proved = rows.iter().any(|row| {
            row["held"] == true
                && row["what"]
                    .as_str()
                    .is_some_and(|what| what.contains(claim))
        });
        assert!(proved, "{claim}: {report}");
    }
    for data in ["worker-a", "worker-b", "worker-c"] {
        let of_demo = Worker::at(&worker.data.join("demo").join(data), "unused");
        assert!(of_demo.qemus().is_empty(), "{data} has a VM left");
        std::mem::forget(of_demo);
    }
    assert!(!Path::new(&worker.data.join("demo/store-damaged")).exists());
}
