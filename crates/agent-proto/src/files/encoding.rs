//! Messages about files as bytes. What is decoded has been checked.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::check::Malformed;
use super::{FileInput, FileReply, FileRequest};

fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    match postcard::to_stdvec(message) {
        Ok(bytes) => bytes,
        Err(error) => unreachable!("numbers, bytes and text are encoded in memory: {error}"),
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Malformed> {
    let (message, rest) = postcard::take_from_bytes(bytes).map_err(Malformed::Encoding)?;
    match rest.len() {
        0 => Ok(message),
        bytes => Err(Malformed::Excess { bytes }),
    }
}

impl FileRequest {
    /// The request as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// The request that bytes hold, and nothing else; it has been checked.
    ///
    /// # Errors
    /// [`Malformed`] when they hold none, or one that the protocol does not allow.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let request: Self = decode(bytes)?;
        request.check().map(|()| request)
    }
}

impl FileInput {
    /// The input as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// The input that bytes hold, and nothing else; it has been checked.
    ///
    /// # Errors
    /// [`Malformed`] when they hold none, or one that the protocol does not allow.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let input: Self = decode(bytes)?;
        input.check().map(|()| input)
    }
}

impl FileReply {
    /// The reply as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// The reply that bytes hold, and nothing else; it has been checked.
    ///
    /// # Errors
    /// [`Malformed`] when they hold none, or one that the protocol does not allow.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let reply: Self = decode(bytes)?;
        reply.check().map(|()| reply)
    }
}
