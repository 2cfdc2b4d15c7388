//! What is done with any bytes from the other side, by the fuzzers and by the tests that replay their inputs.

mod guest;
mod host;
mod input;

pub use guest::guest;
pub use host::host;
