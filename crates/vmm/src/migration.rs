//! QEMU's migration commands, used to take device state out of a VM and to put it in.

use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::qmp::Qmp;
use crate::state_stream::StateFormat;

/// The name under which QEMU gets our end of the stream.
pub(crate) const DESCRIPTOR: &str = "steadfast-state";
/// Bytes a second; QEMU's own default of 128 MiB/s would stretch the pause.
const BANDWIDTH: u64 = 1 << 40;
/// How often the state of a migration is asked for.
const POLL: Duration = Duration::from_micros(500);

#[derive(Debug, Deserialize)]
struct Info {
    status: Option<String>,
    #[serde(rename = "error-desc")]
    reason: Option<String>,
}

/// Where a migration stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Progress {
    /// None was begun.
    None,
    /// It goes on; QEMU's word for the step.
    Active(String),
    /// It is whole.
    Completed,
    /// It ended otherwise: QEMU's status, and its reason.
    Ended(String, String),
}

impl From<Info> for Progress {
    fn from(info: Info) -> Self {
        let reason = info
            .reason
            .unwrap_or_else(|| "QEMU gave no reason".to_owned());
        match info.status.as_deref() {
            None | Some("none") => Self::None,
            Some("completed") => Self::Completed,
            Some(ended @ ("failed" | "cancelled" | "colo")) => {
                Self::Ended(ended.to_owned(), reason)
            }
            Some(active) => Self::Active(active.to_owned()),
        }
    }
}

/// Asks where the migration stands.
pub(crate) fn progress(qmp: &mut Qmp) -> Result<Progress> {
    qmp.execute::<Info>("query-migrate", json!({}))
        .map(Progress::from)
}

/// Sets what both directions need for a stream of `format`.
pub(crate) fn set_format(qmp: &mut Qmp, format: StateFormat) -> Result<()> {
    let capabilities = json!([
        { "capability": "x-ignore-shared", "state": format == StateFormat::IgnoreShared },
    ]);
    qmp.execute::<Value>(
        "migrate-set-capabilities",
        json!({ "capabilities": capabilities }),
    )?;
    qmp.execute::<Value>(
        "migrate-set-parameters",
        json!({ "max-bandwidth": BANDWIDTH }),
    )?;
    Ok(())
}

/// Starts saving into the descriptor that QEMU was given.
pub(crate) fn start_saving(qmp: &mut Qmp) -> Result<()> {
    qmp.execute::<Value>("migrate", json!({ "uri": format!("fd:{DESCRIPTOR}") }))?;
    Ok(())
}

/// Starts loading from the descriptor that QEMU was given.
pub(crate) fn start_loading(qmp: &mut Qmp) -> Result<()> {
    qmp.execute::<Value>(
        "migrate-incoming",
        json!({ "uri": format!("fd:{DESCRIPTOR}") }),
    )?;
    Ok(())
}

/// Waits until the migration is whole.
pub(crate) fn wait_completed(
    qmp: &mut Qmp,
    direction: &'static str,
    within: Duration,
) -> Result<()> {
    match wait_ended(qmp, within)? {
        Progress::Completed => Ok(()),
        Progress::Ended(status, reason) => Err(Error::Migration {
            direction,
            status,
            reason,
        }),
        Progress::None | Progress::Active(_) => Err(Error::Unanswered {
            command: format!("{direction} the device state"),
            within,
        }),
    }
}

/// Ends a migration that may be in flight, whatever its state, and gives what it came to.
pub(crate) fn settle(qmp: &mut Qmp, within: Duration) -> Result<Progress> {
    let found = progress(qmp)?;
    if !matches!(found, Progress::Active(_)) {
        return Ok(found);
    }
    qmp.execute::<Value>("migrate_cancel", json!({}))?;
    wait_ended(qmp, within)
}

/// Waits until no migration is in flight; gives the last state seen when `within` is over.
fn wait_ended(qmp: &mut Qmp, within: Duration) -> Result<Progress> {
    let until = Instant::now() + within;
    loop {
        let found = progress(qmp)?;
        let over = matches!(found, Progress::Completed | Progress::Ended(..));
        if over || Instant::now() >= until {
            return Ok(found);
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(value: Value) -> Progress {
        serde_json::from_value::<Info>(value).expect("parse").into()
    }

    #[test]
    fn states_of_every_version_are_understood() {
        assert_eq!(parse(json!({})), Progress::None);
        assert_eq!(
            parse(json!({"status": "none", "blocked-reasons": []})),
            Progress::None
        );
        assert_eq!(
            parse(json!({"status": "completed", "ram": {"total": 1}, "vfio": {}})),
            Progress::Completed
        );
        // QEMU 9 and later add steps such as this one; an unknown step is a step.
        assert_eq!(
            parse(json!({"status": "postcopy-recover-setup"})),
            Progress::Active("postcopy-recover-setup".to_owned())
        );
        assert_eq!(
            parse(json!({"status": "failed", "error-desc": "Unable to write: Broken pipe"})),
            Progress::Ended(
                "failed".to_owned(),
                "Unable to write: Broken pipe".to_owned()
            )
        );
    }
}
