//! Files through the real agent: streams of a session beside commands.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

mod common;
#[path = "files/tree.rs"]
mod tree;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Instant;

use common::{Agent, sh};
use stead_agent_link::files::{
    Copied, CopyError, CopyOptions, Download, FileChannel, FileStream, Guest, HashKind, Progress,
    Upload,
};
use stead_agent_link::{Bytes, ExitStatus};

fn bytes(path: &Path) -> Bytes {
    path.as_os_str().as_bytes().into()
}

fn quiet(_: &Progress<'_>) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Copies on a thread of its own.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

fn up(
    mut stream: FileStream,
    from: &Path,
    to: &Path,
    options: CopyOptions,
) -> impl FnOnce() -> Result<Copied, CopyError> + Send + 'static {
    let mut upload = Upload::new(from.to_owned(), bytes(to), options);
    move || upload.run(&mut Guest::new(&mut stream), &mut quiet)
}

fn down(
    mut stream: FileStream,
    from: &Path,
    to: &Path,
    options: CopyOptions,
) -> impl FnOnce() -> Result<Copied, CopyError> + Send + 'static {
    let mut download = Download::new(bytes(from), to.to_owned(), options);
    move || download.run(&mut Guest::new(&mut stream), &mut quiet)
}

#[tokio::test]
async fn trees_go_through_the_agent_and_back_while_commands_run() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("source")).unwrap();
    tree::make(&at("source"));
    tree::file(&at("source/large"), &tree::noise(5 << 20, 1));
    let options = CopyOptions::default();
    let copy = tokio::spawn(aside(up(
        link.files().unwrap(),
        &at("source"),
        &at("there"),
        options,
    )));
    for _ in 0..5 {
        let output = link.exec_capture(sh("echo beside"), b"").await.unwrap();
        assert_eq!(output.status, ExitStatus::Code(0));
    }
    let sent = copy.await.unwrap().unwrap();
    assert_eq!(tree::see(&at("there")), tree::see(&at("source")));
    let two = [at("one"), at("two")];
    let copies = two.clone().map(|target| {
        let stream = link.files().unwrap();
        tokio::spawn(aside(down(stream, &at("there"), &target, options)))
    });
    for (copy, target) in copies.into_iter().zip(two) {
        assert_eq!(copy.await.unwrap().unwrap(), sent);
        assert_eq!(tree::see(&target), tree::see(&at("source")));
    }
}

#[tokio::test]
async fn an_operation_that_is_given_up_leaves_the_connection_to_the_next() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let folder = tempfile::tempdir().unwrap();
    let (large, small) = (folder.path().join("large"), folder.path().join("small"));
    tree::file(&large, &tree::noise(4 << 20, 2));
    tree::file(&small, b"small");
    let mut stream = link.files().unwrap();
    aside(move || {
        let mut guest = Guest::new(&mut stream);
        for _ in 0..20 {
            // More is on its way than is taken.
            let limit = || CopyError::Interrupted;
            let error = guest
                .read(&bytes(&large), &mut |_| Err(limit()))
                .unwrap_err();
            assert!(matches!(error, CopyError::Interrupted), "{error}");
        }
        let mut found = Vec::new();
        guest
            .read(&bytes(&small), &mut |content| {
                found.push(content.clone());
                Ok(())
            })
            .unwrap();
        assert_eq!(found.len(), 1);
        let gone = stream.poll();
        assert!(gone.is_err(), "nothing is left of it: {gone:?}");
    })
    .await;
}

#[tokio::test]
async fn a_copy_whose_session_was_replaced_goes_on_in_the_next_one() {
    let agent = Agent::start();
    let folder = tempfile::tempdir().unwrap();
    let (source, target) = (folder.path().join("f"), folder.path().join("g"));
    tree::file(&source, &tree::noise(24 << 20, 3));
    let options = CopyOptions::default();
    let mut upload = Upload::new(source.clone(), bytes(&target), options);
    let link = agent.ready(1).await;
    let mut stream = link.files().unwrap();
    let (reached, half) = tokio::sync::oneshot::channel();
    let (go_on, gone) = std::sync::mpsc::channel::<()>();
    let copy = tokio::spawn(aside(move || {
        let mut reached = Some(reached);
        let mut pause = |progress: &Progress<'_>| {
            if progress.done_bytes > 8 << 20
                && let Some(reached) = reached.take()
            {
                reached.send(()).unwrap();
                gone.recv().unwrap();
            }
            ControlFlow::Continue(())
        };
        let error = upload
            .run(&mut Guest::new(&mut stream), &mut pause)
            .unwrap_err();
        (upload, error)
    }));
    half.await.unwrap();
    drop(link);
    // Another life of the machine begins: every session of the earlier one ends.
    let link = agent.ready(2).await;
    go_on.send(()).unwrap();
    let (mut upload, error) = copy.await.unwrap();
    assert!(error.is_broken_channel(), "{error}");
    assert!(!target.exists());
    let mut stream = link.files().unwrap();
    let done = aside(move || upload.run(&mut Guest::new(&mut stream), &mut quiet)).await;
    let copied = done.unwrap();
    assert!(copied.resumed_bytes >= 6 << 20, "{copied:?}");
    assert_eq!(fs::read(&target).unwrap(), fs::read(&source).unwrap());
}

/// How fast files go through the agent over a socket: printed, since it is the machine's.
#[tokio::test]
async fn files_move_through_the_agent_in_both_directions() {
    let agent = Agent::start();
    let link = agent.ready(1).await;
    let folder = tempfile::tempdir().unwrap();
    let megabytes = match std::env::var_os("STEAD_SOAK") {
        Some(_) => 512,
        None => 16,
    };
    let at = |name: &str| folder.path().join(name);
    tree::file(&at("f"), &tree::noise(megabytes << 20, 4));
    for hash in [HashKind::Blake3, HashKind::Crc32c] {
        let options = CopyOptions {
            hash,
            ..CopyOptions::default()
        };
        let begin = Instant::now();
        let copied = aside(up(link.files().unwrap(), &at("f"), &at("g"), options)).await;
        let sent = megabytes as f64 / begin.elapsed().as_secs_f64();
        assert_eq!(copied.unwrap().data_bytes, (megabytes as u64) << 20);
        let begin = Instant::now();
        let copied = aside(down(link.files().unwrap(), &at("g"), &at("h"), options)).await;
        let fetched = megabytes as f64 / begin.elapsed().as_secs_f64();
        assert_eq!(copied.unwrap().data_bytes, (megabytes as u64) << 20);
        println!("{hash:?}: up {sent:.0} MiB/s, down {fetched:.0} MiB/s");
    }
    assert_eq!(fs::read(at("h")).unwrap(), fs::read(at("f")).unwrap());
}
