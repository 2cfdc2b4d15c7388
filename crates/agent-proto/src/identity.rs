//! Who a frame belongs to: a life of the machine and a session within it; and the name of a command.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One life of a virtual machine: 128 random bits, drawn at each boot, restore, fork and wake.
///
/// Epochs are compared for identity only; no epoch is later than another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Epoch(pub [u8; 16]);

/// One session: 64 random bits, drawn by the host for every hello it sends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Nonce(pub u64);

/// One command: 128 random bits, drawn by the host. Whatever is asked again with the same key is the same command.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExecKey(pub [u8; 16]);

impl fmt::Display for ExecKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ExecKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExecKey({self})")
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Epoch({self})")
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nonce({:016x})", self.0)
    }
}

/// The text is not 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not 32 hexadecimal digits: {0:?}")]
pub struct ParseIdError(String);

impl FromStr for Epoch {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map(Self)
    }
}

impl FromStr for ExecKey {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map(Self)
    }
}

fn parse(text: &str) -> Result<[u8; 16], ParseIdError> {
    let wrong = || ParseIdError(text.chars().take(64).collect());
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    u128::from_str_radix(text, 16)
        .ok()
        .map(u128::to_be_bytes)
        .ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_read_back_from_its_text() {
        let epoch = Epoch(*b"0123456789abcdef");
        assert_eq!(epoch.to_string().parse(), Ok(epoch));
        assert!("+".repeat(32).parse::<Epoch>().is_err());
        assert!("0".repeat(31).parse::<Epoch>().is_err());
    }
}
