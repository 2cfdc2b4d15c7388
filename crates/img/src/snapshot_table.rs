//! The table of internal snapshots, as `snapshot -l` and `info` print it.

use jiff::Timestamp;
use jiff::tz::TimeZone;
use stead_qcow2::SnapshotInfo;

use crate::size;

/// The table with its heading, or nothing where there is no internal snapshot.
pub(crate) fn table(snapshots: &[SnapshotInfo]) -> String {
    if snapshots.is_empty() {
        return String::new();
    }
    let heading = row(["ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"]);
    let zone = TimeZone::system();
    let rows = snapshots.iter().map(|snapshot| {
        row([
            &snapshot.id,
            &snapshot.name,
            &size::human(snapshot.vm_state_size),
            &date(snapshot.date_sec, &zone),
            &clock(snapshot.vm_clock_sec, snapshot.vm_clock_nsec),
            &snapshot
                .icount
                .map_or_else(String::new, |count| count.to_string()),
        ])
    });
    format!("Snapshot list:\n{heading}{}", rows.collect::<String>())
}

fn row([id, tag, vm_size, date, clock, icount]: [&str; 6]) -> String {
    format!("{id:<9} {tag:<16} {vm_size:>8}{date:>20}{clock:>13}{icount:>11}\n")
}

/// Local time.
fn date(seconds: u32, zone: &TimeZone) -> String {
    match Timestamp::from_second(i64::from(seconds)) {
        Ok(time) => {
            let time = time.to_zoned(zone.clone());
            time.strftime("%Y-%m-%d %H:%M:%S").to_string()
        }
        Err(_out_of_range) => unreachable!("32 bits of seconds end in the year 2106"),
    }
}

fn clock(seconds: u64, nanoseconds: u64) -> String {
    format!(
        "{:02}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        nanoseconds / 1_000_000
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_hours_minutes_seconds_and_milliseconds() {
        assert_eq!(clock(0, 0), "00:00:00.000");
        assert_eq!(clock(3723, 4_999_999), "01:02:03.004");
        assert_eq!(clock(360_000, 0), "100:00:00.000");
    }

    #[test]
    fn columns_stay_apart_when_a_name_is_long() {
        let long = row(["1", "a name that is far too long", "0 B", "D", "C", "0"]);
        assert!(
            long.starts_with("1         a name that is far too long      0 B"),
            "{long}"
        );
        assert_eq!(date(0, &TimeZone::UTC), "1970-01-01 00:00:00");
    }
}
