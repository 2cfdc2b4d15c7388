//! Random names.

use crate::error::{EngineError, Result};

/// A fresh random name of 12 hex digits (48 bits), as docker users know them.
pub(crate) fn short() -> Result<String> {
    random_hex::<6>()
}

/// A fresh random name of 32 hex digits (128 bits): layers, jobs, launches.
pub(crate) fn long() -> Result<String> {
    random_hex::<16>()
}

fn random_hex<const N: usize>() -> Result<String> {
    Ok(random::<N>()?
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// Fresh bytes from the kernel's random generator.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|source| EngineError::internal("draw random bytes", "").because(source))?;
    Ok(bytes)
}

/// Whether `name` may name an object: letters, digits, `.`, `_`, `-`; it starts with a letter or digit; 1–64 bytes.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let right = (1..=64).contains(&name.len())
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if right {
        return Ok(());
    }
    Err(EngineError::usage(
        format!("name a {what} {name:?}"),
        "a name has 1 to 64 letters, digits, '.', '_' or '-' and starts with a letter or digit",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_leave_a_folder_or_look_like_an_option_are_refused() {
        for wrong in ["", "-n", "../x", "a/b", "a b", ".hidden", "ü"] {
            assert!(check_name("sandbox", wrong).is_err(), "{wrong:?}");
        }
        for right in ["web-1", "A.b_c", "7"] {
            assert!(check_name("sandbox", right).is_ok(), "{right:?}");
        }
    }
}
