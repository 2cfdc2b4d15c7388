//! Workers with bases of other bytes share one store, a folder or a bucket.
#![allow(clippy::disallowed_methods, reason = "tests look at files as they are")]

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;
use stead_sim::s3::{BUCKET, Server};
use stead_tests::guest::{self, Seen};
use stead_tests::{TEMPLATE, Worker, agent_program, copy_tree, golden_store};

/// Builds a template of another name: the same packages in a file system of other identifiers.
fn build_other_base(worker: &Worker) {
    let agent = agent_program();
    worker.ok(&[
        "template",
        "build",
        "other",
        "--agent",
        agent.to_str().expect("UTF-8"),
    ]);
    let contents: BTreeMap<String, String> = worker
        .json(&["template", "ls"])
        .as_array()
        .expect("templates")
        .iter()
        .map(|template| (text(template, "name"), text(template, "disk_content")))
        .collect();
    assert_eq!(
        contents.len(),
        1,
        "this worker has only its own base: {contents:?}"
    );
}

fn text(value: &Value, key: &str) -> String {
    value[key]
        .as_str()
        .unwrap_or_else(|| panic!("no {key} in {value}"))
        .to_owned()
}

fn number(value: &Value, key: &str) -> u64 {
    value[key]
        .as_u64()
        .unwrap_or_else(|| panic!("no {key} in {value}"))
}

/// The sizes of a worker's RAM images, without their holes.
fn ram_images(worker: &Worker) -> Vec<u64> {
    let entries = std::fs::read_dir(worker.data.join("ram")).expect("ram");
    let size = |entry: std::io::Result<std::fs::DirEntry>| {
        stead_sys::space::allocated_bytes(&entry.expect("entry").path()).expect("measure")
    };
    entries.map(size).collect()
}

fn equals(worker: &Worker, sandbox: &str, checkpoint: &Seen) {
    let now = guest::look(worker, sandbox);
    assert_eq!(
        (&now.files, &now.memory),
        (&checkpoint.files, &checkpoint.memory)
    );
    assert!(now.count >= checkpoint.count);
}

#[test]
fn forks_on_a_worker_with_another_base_are_equal_and_fetch_only_what_no_file_there_has() {
    let a = Worker::with_own_store();
    let b = Worker::on(Path::new(&a.store));
    build_other_base(&b);
    a.boot("source");
    let seen = guest::fill(&a, "source");
    let made = a.json(&["checkpoint", "create", "source", "--name", "base"]);
    let disk = text(&made["checkpoint"]["disks"][0], "content");
    let other = text(&b.json(&["template", "show", "other"]), "disk_content");
    let own = text(&a.json(&["template", "show", TEMPLATE]), "disk_content");
    assert!(other != own && other != disk, "the bases are the same");

    let forks = b.json(&["fork", "base", "-n", "2", "--name", "fork"]);
    let cost = &forks[0];
    let (fetched, reused) = (number(cost, "fetched_bytes"), number(cost, "reused_bytes"));
    eprintln!("fetched {fetched}, reused {reused} bytes");
    // The other base gives most of the disk; RAM, and what the guest wrote, comes from the store.
    assert!(reused > 200 << 20 && fetched < reused, "{cost}");
    equals(&b, "fork-1", &seen);
    equals(&b, "fork-2", &seen);
    b.ok(&["rm", "--force", "fork-1", "fork-2"]);

    // All of it lies there now; and of the next checkpoint, only what is new is fetched.
    let again = b.json(&["fork", "base", "--name", "fork"]);
    assert_eq!(number(&again[0], "fetched_bytes"), 0, "{again}");
    b.ok(&["rm", "--force", "fork"]);
    guest::add_file(&a, "source", "later", 1 << 20);
    let later = guest::look(&a, "source");
    let made = a.json(&["checkpoint", "create", "source", "--name", "later"]);
    let new = number(&made, "new_bytes");
    let next = b.json(&["fork", "later", "--name", "fork"]);
    // RAM is fetched whole, but for what disks here have too; of the disk, nothing that was there before. How much is
    // new depends on what the guest did meanwhile.
    let fetched_next = number(&next[0], "fetched_bytes");
    let ram = ram_images(&b).into_iter().max().expect("an image");
    eprintln!("{new} bytes were new, {fetched_next} were fetched, RAM is {ram}");
    assert!(
        fetched_next > 0 && fetched_next <= ram + new,
        "{next} {made}"
    );
    equals(&b, "fork", &later);
    // A worker without any base gets the same bytes, all from the store.
    let c = Worker::on(Path::new(&a.store));
    let cold = c.json(&["fork", "later", "--name", "fork"]);
    assert!(number(&cold[0], "fetched_bytes") > 2 * fetched, "{cold}");
    equals(&c, "fork", &later);
    let source = guest::look(&a, "source");
    assert_eq!(
        (&source.files, &source.memory),
        (&later.files, &later.memory)
    );
}

#[test]
fn workers_that_publish_and_collect_garbage_at_once_lose_no_committed_checkpoint() {
    let a = Worker::with_own_store();
    let b = Worker::on(Path::new(&a.store));
    a.boot("source");
    guest::fill(&a, "source");
    a.ok(&["checkpoint", "create", "source", "--name", "first"]);
    b.ok(&["fork", "first", "--name", "fork"]);
    let mut seen = None;
    for round in 0..4 {
        let (of_a, of_b) = (format!("a-{round}"), format!("b-{round}"));
        guest::add_file(&a, "source", &of_a, 400_000);
        guest::add_file(&b, "fork", &of_b, 400_000);
        seen = Some((guest::look(&a, "source"), guest::look(&b, "fork")));
        // Both are about to write their manifests when a third worker, which knows nothing of them but their leases,
        // collects; and they do while it collects once more.
        let [publish_a, publish_b] =
            [(&a, "source", &of_a), (&b, "fork", &of_b)].map(|(worker, sandbox, name)| {
                let create = ["checkpoint", "create", sandbox, "--name", name];
                worker.stopped_at(&create, "checkpoint:commit")
            });
        let c = Worker::on(Path::new(&a.store));
        if round > 0 {
            // Without garbage it would have nothing to wait for.
            let [of_a, of_b] = ["a", "b"].map(|name| format!("{name}-{}", round - 1));
            c.ok(&["checkpoint", "rm", &of_a, &of_b]);
            for _ in 0..2 {
                let collected = c.json(&["gc"]);
                let waiting_for = collected["waiting_for"].as_array().expect("a list");
                assert_eq!(waiting_for.len(), 2, "{collected}");
            }
        }
        publish_a.send("CONT");
        publish_b.send("CONT");
        // The garbage of the last round is for the last gc.
        if round < 3 {
            c.json(&["gc"]);
        }
        for publish in [publish_a, publish_b] {
            let published = publish.output();
            let said = String::from_utf8_lossy(&published.stderr);
            assert!(published.status.success(), "round {round}: {said}");
        }
    }
    let (of_a, of_b) = seen.expect("rounds");
    let freed = a.json(&["gc"]);
    assert!(number(&freed, "freed_bytes") > 0, "{freed}");
    a.ok(&["verify"]);
    for name in ["first", "a-3", "b-3"] {
        b.ok(&["checkpoint", "verify", name]);
    }
    // What was removed is gone, also where its parts still lie.
    for worker in [&a, &b] {
        worker.fails(&["fork", "a-1"], 3);
        worker.fails(&["fork", "b-2"], 3);
    }
    // Each is whole on the worker that did not make it.
    b.ok(&["rm", "--force", "fork"]);
    b.ok(&["fork", "a-3", "--name", "fork"]);
    equals(&b, "fork", &of_a);
    a.ok(&["rm", "--force", "source"]);
    a.ok(&["fork", "b-3", "--name", "fork"]);
    equals(&a, "fork", &of_b);
}

#[test]
fn two_workers_share_a_bucket_as_they_share_a_folder() {
    let folder = tempfile::tempdir_in(stead_tests::target_dir()).expect("folder");
    let server = Server::start(folder.path()).expect("server");
    copy_tree(golden_store(), &server.objects().join("vm-state"));
    let url = format!("s3://{BUCKET}/vm-state");
    let worker = |name: &str| {
        let mut worker = Worker::at(&folder.path().join(name), &url);
        worker.env = server.variables();
        worker
    };
    let (a, b) = (worker("a"), worker("b"));
    a.boot("source");
    let seen = guest::fill(&a, "source");
    a.ok(&["checkpoint", "create", "source", "--name", "base"]);
    assert_eq!(b.checkpoints().len(), 1);
    b.ok(&["fork", "base", "--name", "fork"]);
    equals(&b, "fork", &seen);
    b.ok(&["verify"]);
    // A hibernated sandbox is nothing but what is in the bucket and its record.
    b.ok(&["hibernate", "fork"]);
    assert!(b.qemus().is_empty());
    b.ok(&["wake", "fork"]);
    equals(&b, "fork", &seen);
    b.ok(&["rm", "--force", "fork"]);
    a.ok(&["checkpoint", "rm", "base"]);
    assert!(number(&b.json(&["gc"]), "freed_bytes") > 0);
    b.fails(&["fork", "base"], 3);

    // Whoever may not enter, or finds nobody there, is told so; the guests do not mind.
    let mut stranger = worker("stranger");
    stranger
        .env
        .push(("AWS_SECRET_ACCESS_KEY".to_owned(), "wrong".to_owned()));
    let error = stranger.fails(&["checkpoint", "ls"], 8);
    assert!(error.to_string().contains("AWS_"), "{error}");
    drop(server);
    let error = a.fails(&["checkpoint", "create", "source"], 8);
    assert!(error.to_string().contains("vm-state"), "{error}");
    assert_eq!(a.state("source"), "running");
    equals(&a, "source", &seen);
}
