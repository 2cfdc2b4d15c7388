//! JSON as qemu-img lays it out: in lines, four blanks a level.

use serde::Serialize;
use serde_json::ser::{PrettyFormatter, Serializer};

use crate::failure::{Failure, Outcome};

/// `value` as JSON, without an end of line at its end.
pub(crate) fn pretty(value: &impl Serialize) -> Outcome<String> {
    let mut bytes = Vec::new();
    let formatter = PrettyFormatter::with_indent(b"    ");
    let mut serializer = Serializer::with_formatter(&mut bytes, formatter);
    let written = value.serialize(&mut serializer);
    written.map_err(|error| Failure::new(format!("the result is not to be printed: {error}")))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
