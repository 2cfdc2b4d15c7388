//! The 32-byte names of content.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// How many bytes a name has.
pub const HASH_BYTES: usize = 32;

/// What the names of tree nodes are derived under, so that no chunk can pass for a node.
const NODE_CONTEXT: &str = "steadfast store, tree node, version 1";

/// A BLAKE3 name, or all zeros for content that is all zeros and never stored.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash([u8; HASH_BYTES]);

impl Hash {
    /// The name of a zero chunk and of a tree without any data.
    pub const ZERO: Self = Self([0; HASH_BYTES]);

    /// The BLAKE3 name of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The name of a chunk: [`Hash::ZERO`] if all its bytes are zero, else their BLAKE3.
    #[must_use]
    pub fn of_chunk(bytes: &[u8]) -> Self {
        if stead_sys::copy::is_zero(bytes) {
            Self::ZERO
        } else {
            Self::of(bytes)
        }
    }

    /// The name of an encoded tree node, in a domain of its own.
    #[must_use]
    pub fn of_node(encoded: &[u8]) -> Self {
        Self(blake3::derive_key(NODE_CONTEXT, encoded))
    }

    /// The name with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; HASH_BYTES]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; HASH_BYTES] {
        &self.0
    }

    /// Whether this names zeros.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a name of 64 lower-case hexadecimal digits: {0:?}")]
pub struct ParseHashError(String);

impl FromStr for Hash {
    type Err = ParseHashError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; HASH_BYTES];
        let digits = text.as_bytes();
        if digits.len() != 2 * HASH_BYTES {
            return Err(ParseHashError(text.chars().take(80).collect()));
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
            match (hex_digit(pair[0]), hex_digit(pair[1])) {
                (Some(high), Some(low)) => *byte = high << 4 | low,
                _ => return Err(ParseHashError(text.chars().take(80).collect())),
            }
        }
        Ok(Self(bytes))
    }
}

fn hex_digit(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

impl Serialize for Hash {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_survives_text_and_no_other_text_is_one() {
        let hash = Hash::of(b"content");
        assert_eq!(hash.to_string().parse(), Ok(hash));
        for wrong in ["", "00", &"A".repeat(64), &"g".repeat(64), &"0".repeat(65)] {
            assert!(wrong.parse::<Hash>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_chunk_and_a_node_of_the_same_bytes_have_different_names() {
        assert_ne!(Hash::of(b"bytes"), Hash::of_node(b"bytes"));
        assert_eq!(Hash::of_chunk(&[0; 4096]), Hash::ZERO);
    }
}
