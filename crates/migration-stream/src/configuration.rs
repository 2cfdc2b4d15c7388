//! The configuration section: the machine type, and what the stream says of its own making.

use std::io::Read;

use crate::error::Result;
use crate::input::Input;

/// Marks a subsection inside a section.
pub(crate) const SUBSECTION: u8 = 0x05;
/// The longest machine type name, in bytes.
const MAX_MACHINE_TYPE_BYTES: u32 = 255;
/// The most capabilities that a stream may name.
const MAX_CAPABILITIES: u32 = 256;

/// The configuration section.
#[derive(Debug, Clone, Default)]
pub(crate) struct Configuration {
    pub machine_type: String,
    /// The migration capabilities that both sides must have.
    pub capabilities: Vec<String>,
    /// Where the capabilities are said, or would be.
    pub at: u64,
}

impl Configuration {
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|name| name == capability)
    }
}

/// Reads the section behind its mark, and the mark of what follows.
pub(crate) fn read<R: Read>(input: &mut Input<R>) -> Result<(Configuration, u8)> {
    input.enter("the configuration");
    let at = input.at();
    let length = input.u32()?;
    input.require((1..=MAX_MACHINE_TYPE_BYTES).contains(&length), at, || {
        format!("the machine type has {length} bytes, expected 1 to {MAX_MACHINE_TYPE_BYTES}")
    })?;
    let mut configuration = Configuration {
        machine_type: input.text(length as usize)?,
        capabilities: Vec::new(),
        at: input.at(),
    };
    loop {
        match input.u8()? {
            SUBSECTION => subsection(input, &mut configuration)?,
            mark => return Ok((configuration, mark)),
        }
    }
}

fn subsection<R: Read>(input: &mut Input<R>, configuration: &mut Configuration) -> Result<()> {
    let at = input.at() - 1;
    let name = input.name()?;
    let version = input.u32()?;
    input.require(version == 1, at, || {
        format!("subsection {name} has version {version}, expected 1")
    })?;
    match name.as_str() {
        "configuration/capabilities" => {
            configuration.capabilities = capabilities(input)?;
            Ok(())
        }
        "configuration/target-page-bits" => input.skip(4),
        "configuration/uuid" => input.skip(16),
        _ => Err(input.unsupported(at, format!("subsection {name}"))),
    }
}

fn capabilities<R: Read>(input: &mut Input<R>) -> Result<Vec<String>> {
    let at = input.at();
    let count = input.u32()?;
    input.require(count <= MAX_CAPABILITIES, at, || {
        format!("{count} capabilities, expected at most {MAX_CAPABILITIES}")
    })?;
    (0..count).map(|_| input.name()).collect()
}
