//! The options behind `amend -o`: what of a qcow2 image can be changed afterwards.

use stead_qcow2::Header;
use stead_qcow2::ops::amend::{Amendments, FormatVersion};

use crate::create_options::{self, Definition, Takes, define, is_on};
use crate::keyval;

/// In the order in which help lists them. Those of the backing file are there because qemu-img has them; both
/// refuse to change it this way.
const DEFINITIONS: &[Definition] = &[
    define("backing_file", Takes::Text, "Refused: use rebase"),
    define("backing_fmt", Takes::Text, "Refused: use rebase"),
    define(
        "compat",
        Takes::Text,
        "Version of the format: v2 (0.10) or v3 (1.1)",
    ),
    define(
        "data_file",
        Takes::Text,
        "Name of the external data file, where the image has one",
    ),
    define(
        "data_file_raw",
        Takes::OnOff,
        "Whether the data file alone is the disk; can only be taken back",
    ),
    define(
        "lazy_refcounts",
        Takes::OnOff,
        "Whether refcounts may be written late",
    ),
    define(
        "refcount_bits",
        Takes::Number,
        "Width of a refcount: 1, 2, 4, 8, 16, 32 or 64 bits",
    ),
    define("size", Takes::Size, "Bytes of the virtual disk"),
];
/// Options that qemu-img has for encrypted images, which cannot be changed here.
const ENCRYPTION: &str = "encrypt.";
/// What texts say of version 3.
const NEWER: &str = "(use compat=1.1 or greater)";

/// The options, as `-o help` lists them.
pub(crate) fn help() -> String {
    let listed = create_options::listed(DEFINITIONS);
    format!("Amend options for 'qcow2':\n{listed}")
}

/// What is to be changed.
#[derive(Debug, Default)]
pub(crate) struct Wanted {
    version: Option<FormatVersion>,
    size: Option<u64>,
    lazy_refcounts: Option<bool>,
    refcount_bits: Option<u64>,
    data_file: Option<String>,
    data_file_raw: Option<bool>,
    backing_file: Option<String>,
    backing_format: Option<String>,
}

impl Wanted {
    /// Reads the lists behind `-o`; the last value of an option counts.
    ///
    /// # Errors
    /// The text for an unknown option, or a value that is none.
    pub fn parse(lists: &[String]) -> Result<Self, String> {
        let mut wanted = Self::default();
        for list in lists {
            for (name, value) in keyval::parse(list) {
                wanted.set(&name, &value)?;
            }
        }
        Ok(wanted)
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let found = DEFINITIONS.iter().find(|known| known.name == name);
        let value = found.ok_or_else(|| unknown(name))?.normal(value)?;
        match name {
            "compat" => self.version = Some(version(&value)?),
            "size" => self.size = value.parse().ok(),
            "lazy_refcounts" => self.lazy_refcounts = Some(is_on(&value)),
            "refcount_bits" => self.refcount_bits = Some(refcount_bits(&value)?),
            "data_file" => self.data_file = Some(value),
            "data_file_raw" => self.data_file_raw = Some(is_on(&value)),
            "backing_file" => self.backing_file = Some(value),
            "backing_fmt" => self.backing_format = Some(value),
            _ => unreachable!("every option that is defined has a place"),
        }
        Ok(())
    }

    /// What the image cannot be made, in qemu-img's words and order.
    ///
    /// # Errors
    /// The text; lines below the first are ours.
    pub fn check(&self, header: &Header) -> Result<(), String> {
        let old = self.is_old(header);
        let bits = self.refcount_bits;
        let own_bits = 1_u64 << header.refcount_order;
        let data = header.external_data.as_ref();
        let refusals = [
            (
                self.data_file.is_some() && data.is_none(),
                "data-file can only be set for images that use an external data file".into(),
            ),
            (
                self.data_file_raw == Some(true) && !data.is_some_and(|data| data.raw),
                "data-file-raw cannot be set on existing images".into(),
            ),
            (
                bits.is_some_and(|bits| bits != 16) && old,
                format!(
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above {NEWER}"
                ),
            ),
            (
                self.changes_backing(header),
                "Cannot amend the backing file\nYou can use 'rebase' instead.".into(),
            ),
            (
                self.lazy_refcounts == Some(true) && old,
                format!(
                    "Lazy refcounts only supported with compatibility level 1.1 and above {NEWER}"
                ),
            ),
            (
                self.size.is_some_and(|size| !size.is_multiple_of(512)),
                "The new size must be a multiple of 512".into(),
            ),
            (
                old && bits.unwrap_or(own_bits) != 16,
                "compat=0.10 requires refcount_bits=16".into(),
            ),
            (
                old && data.is_some(),
                "Cannot downgrade an image with a data file".into(),
            ),
            (
                old && header.extended_l2,
                "Cannot downgrade an image with incompatible features 0x10 set".into(),
            ),
        ];
        match refusals.into_iter().find(|(refused, _)| *refused) {
            Some((_, why)) => Err(why),
            None => Ok(()),
        }
    }

    /// Whether the image will be of version 2.
    fn is_old(&self, header: &Header) -> bool {
        match self.version {
            Some(version) => version == FormatVersion::V2,
            None => header.version == 2,
        }
    }

    fn changes_backing(&self, header: &Header) -> bool {
        if self.backing_file.is_none() && self.backing_format.is_none() {
            return false;
        }
        let backing = header.backing.as_ref();
        let name = backing.map(|backing| backing.name.as_slice());
        let format = backing.and_then(|backing| backing.format.as_deref());
        self.backing_file.as_deref().map(str::as_bytes) != name
            || self.backing_format.as_deref().map(str::as_bytes) != format
    }

    /// The new name of the external data file.
    pub fn data_file(&self) -> Option<&str> {
        self.data_file.as_deref().filter(|name| !name.is_empty())
    }

    /// The changes; `data_file` is the name that the image is to say.
    pub fn amendments<'a>(&self, data_file: Option<&'a [u8]>) -> Amendments<'a> {
        Amendments {
            version: self.version,
            lazy_refcounts: self.lazy_refcounts,
            refcount_bits: self.refcount_bits,
            size: self.size,
            backing: None,
            data_file,
            data_file_raw: self.data_file_raw,
        }
    }

    /// The new length of the disk.
    pub fn size(&self) -> Option<u64> {
        self.size
    }
}

fn unknown(name: &str) -> String {
    let mut text = format!("Invalid parameter '{name}'");
    if create_options::is_of_qcow2(name) {
        text.push_str("\nThis option is only supported for image creation");
    } else if name.starts_with(ENCRYPTION) {
        text.push_str("\nEncrypted images cannot be changed");
    }
    text
}

fn version(name: &str) -> Result<FormatVersion, String> {
    match name {
        "v2" | "0.10" => Ok(FormatVersion::V2),
        "v3" | "1.1" => Ok(FormatVersion::V3),
        _ => Err(format!("Unknown compatibility level {name}")),
    }
}

fn refcount_bits(text: &str) -> Result<u64, String> {
    let bits = text.parse::<u64>().ok();
    bits.filter(|bits| bits.is_power_of_two() && *bits <= 64)
        .ok_or_else(|| "Refcount width must be a power of two and may not exceed 64 bits".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_that_help_lists_can_be_given() {
        for option in DEFINITIONS {
            let value = match option.name {
                "compat" => "v3",
                "lazy_refcounts" | "data_file_raw" => "off",
                "refcount_bits" => "8",
                "size" => "1M",
                _ => "name",
            };
            let list = format!("{}={value}", option.name);
            Wanted::parse(&[list]).expect(option.name);
        }
        assert!(help().contains("  refcount_bits=<num>"));
    }

    #[test]
    fn what_is_decided_when_an_image_is_made_cannot_be_amended() {
        for name in ["cluster_size=4k", "encryption=on", "extended_l2=on"] {
            let error = Wanted::parse(&[name.to_owned()]).expect_err(name);
            assert!(
                error.ends_with("only supported for image creation"),
                "{error}"
            );
        }
        let error = Wanted::parse(&["nocow=on".to_owned()]).expect_err("of no format");
        assert_eq!(error, "Invalid parameter 'nocow'");
    }
}
