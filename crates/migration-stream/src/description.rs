//! The description at the end of a stream: JSON that gives each field of each device its size.

use std::io::{Read, Seek, SeekFrom};

use serde::Deserialize;

use crate::configuration::SUBSECTION;
use crate::error::{Error, Result};
use crate::input::Input;

/// The longest description, in bytes. One virtual CPU needs about 20 KB.
const MAX_BYTES: u64 = 16 << 20;
/// The most fields that are looked at, so that an array of empty fields costs no time.
const MAX_STEPS: u64 = 16 << 20;
/// Marks the description, behind the end mark.
pub(crate) const VMDESCRIPTION: u8 = 0x06;
const SECTION: &str = "the description of the devices";

/// The whole description.
#[derive(Debug, Deserialize)]
pub(crate) struct Description {
    pub page_size: u64,
    pub devices: Vec<Device>,
    /// Where its mark stands in the stream.
    #[serde(skip)]
    pub at: u64,
    /// The JSON's length in bytes.
    #[serde(skip)]
    pub length: u64,
}

/// A device section.
#[derive(Debug, Deserialize)]
pub(crate) struct Device {
    pub name: String,
    pub instance_id: u32,
    /// Old devices that describe themselves with one field have none.
    version: Option<u32>,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

/// Some fields write a state of their own (types `tmp`, `qtailq`), and their description then stands
/// here too, for a list even once an element. Only the size of the whole is looked at.
#[derive(Debug, Deserialize)]
struct Field {
    name: String,
    size: u64,
    array_len: Option<u64>,
    #[serde(rename = "struct")]
    inner: Option<Struct>,
}

#[derive(Debug, Deserialize)]
struct Struct {
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

#[derive(Debug, Deserialize)]
struct Subsection {
    vmsd_name: String,
    version: u32,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

impl Description {
    /// Finds and decodes the description at the end of `reader`, which is left at its start.
    ///
    /// JSON has no zero bytes and the mark, the end mark before it and the upper byte of the length
    /// lie just behind or at the last ones, so there are at most four places to try.
    pub fn find<R: Read + Seek>(reader: &mut R) -> Result<Self> {
        let io = |source| Error::Io { at: 0, source };
        let length = reader.seek(SeekFrom::End(0)).map_err(io)?;
        let tail_at = length - length.min(MAX_BYTES + 6);
        reader.seek(SeekFrom::Start(tail_at)).map_err(io)?;
        let mut tail = Vec::new();
        let limit = length - tail_at;
        reader.take(limit).read_to_end(&mut tail).map_err(io)?;
        reader.seek(SeekFrom::Start(0)).map_err(io)?;
        let damaged = |at, reason: String| Error::Damaged {
            at,
            section: SECTION.into(),
            reason,
        };
        let Some(start) = json_start(&tail) else {
            let reason = "no end mark with a description behind it; the stream is cut off, \
                          has something behind its end, or was saved with suppress-vmdesc=on";
            return Err(damaged(length, reason.into()));
        };
        let at = tail_at + start as u64;
        let mut description: Self = serde_json::from_slice(&tail[start..])
            .map_err(|error| damaged(at, format!("the JSON is not valid: {error}")))?;
        description.at = at - 5;
        description.length = length - at;
        Ok(description)
    }

    /// The index of a device.
    pub fn position(&self, name: &str, instance: u32) -> Option<usize> {
        self.devices
            .iter()
            .position(|device| device.name == name && device.instance_id == instance)
    }
}

/// Where the JSON starts in `tail`: its length says that it ends where `tail` does.
fn json_start(tail: &[u8]) -> Option<usize> {
    let last_zero = tail.iter().rposition(|byte| *byte == 0)?;
    (last_zero + 1..=last_zero + 4).find(|start| {
        let Some(head) = start.checked_sub(6).and_then(|at| tail.get(at..*start)) else {
            return false;
        };
        let said = u32::from_be_bytes([head[2], head[3], head[4], head[5]]);
        head[..2] == [0, VMDESCRIPTION] && u64::from(said) == (tail.len() - start) as u64
    })
}

/// Walks device sections by their description.
#[derive(Debug)]
pub(crate) struct Fields {
    steps_left: u64,
}

impl Fields {
    pub fn new() -> Self {
        Self {
            steps_left: MAX_STEPS,
        }
    }

    /// Reads the data of a device's section.
    pub fn device<R: Read>(
        &mut self,
        input: &mut Input<R>,
        device: &Device,
        version: u32,
    ) -> Result<()> {
        let at = input.at();
        input.require(
            device.version.is_none_or(|said| said == version),
            at,
            || {
                let said = device.version;
                format!("the section has version {version}, its description says {said:?}")
            },
        )?;
        self.fields(input, &device.fields)?;
        self.subsections(input, &device.subsections)
    }

    fn fields<R: Read>(&mut self, input: &mut Input<R>, fields: &[Field]) -> Result<()> {
        for field in fields {
            match &field.inner {
                None => self.plain(input, field)?,
                Some(inner) => {
                    for _ in 0..field.array_len.unwrap_or(1) {
                        self.structure(input, field, inner)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn plain<R: Read>(&mut self, input: &mut Input<R>, field: &Field) -> Result<()> {
        self.step(input)?;
        let length = field.size.checked_mul(field.array_len.unwrap_or(1));
        let length = length.ok_or_else(|| {
            input.damaged(input.at(), format!("field {} is too large", field.name))
        })?;
        input.skip(length)
    }

    fn structure<R: Read>(
        &mut self,
        input: &mut Input<R>,
        field: &Field,
        inner: &Struct,
    ) -> Result<()> {
        self.step(input)?;
        let start = input.at();
        self.fields(input, &inner.fields)?;
        self.subsections(input, &inner.subsections)?;
        let length = input.at() - start;
        input.require(length == field.size, start, || {
            let Field { name, size, .. } = field;
            format!("field {name} has {length} bytes, its description says {size}")
        })
    }

    fn subsections<R: Read>(&mut self, input: &mut Input<R>, all: &[Subsection]) -> Result<()> {
        for subsection in all {
            self.step(input)?;
            let Subsection {
                vmsd_name, version, ..
            } = subsection;
            let at = input.at();
            let mark = input.u8()?;
            input.require(mark == SUBSECTION, at, || {
                format!("{mark:#x} instead of the mark of subsection {vmsd_name}")
            })?;
            let name = input.name()?;
            let found = input.u32()?;
            input.require(name == *vmsd_name && found == *version, at, || {
                format!("subsection {name} version {found}, expected {vmsd_name} version {version}")
            })?;
            self.fields(input, &subsection.fields)?;
            self.subsections(input, &subsection.subsections)?;
        }
        Ok(())
    }

    fn step<R: Read>(&mut self, input: &Input<R>) -> Result<()> {
        let left = self.steps_left.checked_sub(1);
        self.steps_left = left.ok_or_else(|| {
            input.damaged(
                input.at(),
                format!("the devices have more than {MAX_STEPS} fields"),
            )
        })?;
        Ok(())
    }
}
