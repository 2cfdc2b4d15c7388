//! Limits of resources and signals, as people write them.

use stead_engine::{Resource, ResourceLimit};

/// The names of setrlimit(2), as ulimits of containers have them.
const RESOURCES: [(&str, Resource); 9] = [
    ("as", Resource::AddressSpace),
    ("core", Resource::Core),
    ("cpu", Resource::Cpu),
    ("data", Resource::Data),
    ("fsize", Resource::FileSize),
    ("memlock", Resource::LockedMemory),
    ("nofile", Resource::OpenFiles),
    ("nproc", Resource::Processes),
    ("stack", Resource::Stack),
];

/// The signals that people send, as x86-64 and ARM number them.
const SIGNALS: [(&str, i32); 12] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ABRT", 6),
    ("KILL", 9),
    ("USR1", 10),
    ("USR2", 12),
    ("ALRM", 14),
    ("TERM", 15),
    ("CONT", 18),
    ("STOP", 19),
    ("WINCH", 28),
];

/// `nofile=1024`, `nofile=1024:4096`, `core=unlimited`.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str) -> Result<ResourceLimit, String> {
    let (name, values) = text
        .split_once('=')
        .ok_or_else(|| format!("{text:?} is not of the form NAME=SOFT[:HARD]"))?;
    let (_, resource) = RESOURCES
        .iter()
        .find(|(known, _)| *known == name)
        .ok_or_else(|| {
            let known: Vec<&str> = RESOURCES.iter().map(|(known, _)| *known).collect();
            format!("no resource {name:?}; there are {}", known.join(", "))
        })?;
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let (soft, hard) = (value(soft)?, value(hard)?);
    if soft.unwrap_or(u64::MAX) > hard.unwrap_or(u64::MAX) {
        return Err(format!("{text:?}: the soft limit is above the hard one"));
    }
    Ok(ResourceLimit {
        resource: *resource,
        soft,
        hard,
    })
}

fn value(text: &str) -> Result<Option<u64>, String> {
    match text {
        "unlimited" | "-1" => Ok(None),
        _ => text
            .parse()
            .map(Some)
            .map_err(|error| format!("{text:?}: {error}")),
    }
}

/// `TERM`, `SIGTERM` or `15`.
///
/// # Errors
/// What is wrong with it.
pub fn signal(text: &str) -> Result<i32, String> {
    let name = text.strip_prefix("SIG").unwrap_or(text);
    if let Some((_, number)) = SIGNALS.iter().find(|(known, _)| *known == name) {
        return Ok(*number);
    }
    match text.parse() {
        Ok(number @ 1..=31) => Ok(number),
        Ok(_) | Err(_) => Err(format!(
            "{text:?} is no signal: give a name, or a number from 1 to 31"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_signals_are_read_as_people_write_them_and_others_are_refused() {
        let both = parse("nofile=1024:4096").expect("right");
        assert_eq!(
            (both.resource, both.soft, both.hard),
            (Resource::OpenFiles, Some(1024), Some(4096))
        );
        let none = parse("core=unlimited").expect("right");
        assert_eq!((none.soft, none.hard), (None, None));
        for wrong in [
            "nofile",
            "nofile=",
            "nofile=x",
            "files=1",
            "nofile=2:1",
            "nofile=unlimited:1",
            "nofile=1:2:3",
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(
            (signal("TERM"), signal("SIGTERM"), signal("15")),
            (Ok(15), Ok(15), Ok(15))
        );
        for wrong in ["", "0", "32", "-9", "FOO"] {
            assert!(signal(wrong).is_err(), "{wrong:?}");
        }
    }
}
