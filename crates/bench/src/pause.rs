//! How long a guest stands still while it is captured, beside `savevm`.

use std::time::Duration;

use stead_engine::PauseReport;

use crate::error::{Doing, Result};
use crate::report::{Row, Value, median, milliseconds};
use crate::worker::Worker;
use crate::{Bench, first, workload};

/// The sandboxes on both file systems.
const SANDBOX: &str = "paused";

/// Captures three equal guests in turns: ours on each file system, and the peer's.
///
/// # Errors
/// When a capture fails.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    first::end(bench).await?;
    let mounted = bench.scratch.mount_xfs("xfs").await?;
    let (data, cache) = (mounted.join("worker"), mounted.join("cache"));
    let xfs = &Worker::open(&data, &bench.worker.store, &cache).await?;
    let folder = bench.scratch.path("pause");
    stead_sys::durable::create_dir(&folder, 0o711).doing("create a folder")?;
    let image = folder.join("peer.qcow2");
    bench.spec.create_image(&image).await?;
    bench.worker.boot(crate::TEMPLATE, SANDBOX).await?;
    xfs.boot(crate::TEMPLATE, SANDBOX).await?;
    let mut peer = bench.spec.boot(&folder.join("peer"), &image).await?;
    for worker in [&bench.worker, xfs] {
        worker.shell(SANDBOX, workload::FILL).await?;
    }
    peer.shell(workload::FILL).await?;
    let (mut plain, mut shared, mut saved) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=bench.runs {
        bench.say(&format!("pause, round {round}"));
        let script = workload::touch(u32::try_from(round).unwrap_or(u32::MAX));
        peer.shell(&script).await?;
        let stood = peer.savevm(&format!("s{round}")).await?;
        bench.worker.shell(SANDBOX, &script).await?;
        let ours = bench.worker.checkpoint(SANDBOX).await?.pause;
        xfs.shell(SANDBOX, &script).await?;
        let ours_shared = xfs.checkpoint(SANDBOX).await?.pause;
        // The first round only warms all three up.
        if round > 0 {
            saved.push(stood);
            plain.push(ours);
            shared.push(ours_shared);
        }
    }
    peer.quit().await?;
    for worker in [&bench.worker, xfs] {
        worker
            .engine
            .remove(SANDBOX, true)
            .await
            .doing("remove a sandbox")?;
    }
    let saved = median(&saved);
    for (name, pauses, target) in [("ext4", &plain, 0.5), ("XFS", &shared, 0.15)] {
        let paused = of(pauses, |pause| pause.paused_us);
        bench.report.rows.push(Row {
            figure: format!("guest stopped by a checkpoint, data on {name}"),
            ours: Value::Time(paused),
            peer: Value::Time(saved),
            beside: "savevm on ext4".to_owned(),
            target: Some(target),
        });
        bench
            .report
            .parts
            .push((format!("pause on {name}"), parts(pauses)));
    }
    Ok(())
}

fn of(pauses: &[PauseReport], part: impl Fn(&PauseReport) -> u64) -> Duration {
    Duration::from_micros(median(&pauses.iter().map(part).collect::<Vec<_>>()))
}

fn parts(pauses: &[PauseReport]) -> Vec<(String, String)> {
    let part = |name: &str, time: Duration| (name.to_owned(), milliseconds(time));
    vec![
        part("stop and flush", of(pauses, |pause| pause.stop_us)),
        part("switch the disks", of(pauses, |pause| pause.snapshot_us)),
        part("device state", of(pauses, |pause| pause.state_us)),
        part("RAM", of(pauses, |pause| pause.ram_us)),
        part("go on", of(pauses, |pause| pause.resume_us)),
    ]
}
