//! The options behind `-o` when an image is made: which there are, what they take, and the image that
//! they describe.

use std::ffi::OsStr;
use std::path::Path;

use stead_qcow2::{
    Backing, ClusterSize, Compression, DataFile, NewFormat, Preallocation, Qcow2Options, Version,
};

use crate::data_file;
use crate::format::Format;
use crate::keyval;
use crate::reference;
use crate::size;

/// What an option takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Takes {
    Text,
    OnOff,
    Number,
    Size,
}

impl Takes {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "str",
            Self::OnOff => "bool (on/off)",
            Self::Number => "num",
            Self::Size => "size",
        }
    }
}

/// An option, with what help says of it.
#[derive(Debug)]
pub(crate) struct Definition {
    pub name: &'static str,
    takes: Takes,
    about: &'static str,
}

pub(crate) const fn define(name: &'static str, takes: Takes, about: &'static str) -> Definition {
    Definition { name, takes, about }
}

/// In the order in which they are printed.
const QCOW2: &[Definition] = &[
    define(
        "encryption",
        Takes::OnOff,
        "Recognised and refused: there is no encryption here",
    ),
    define(
        "encrypt.format",
        Takes::Text,
        "Recognised and refused: there is no encryption here",
    ),
    define("encrypt.key-secret", Takes::Text, "Recognised and refused"),
    define("encrypt.cipher-alg", Takes::Text, "Recognised and refused"),
    define("encrypt.cipher-mode", Takes::Text, "Recognised and refused"),
    define("encrypt.ivgen-alg", Takes::Text, "Recognised and refused"),
    define(
        "encrypt.ivgen-hash-alg",
        Takes::Text,
        "Recognised and refused",
    ),
    define("encrypt.hash-alg", Takes::Text, "Recognised and refused"),
    define("encrypt.iter-time", Takes::Number, "Recognised and refused"),
    define(
        "cluster_size",
        Takes::Size,
        "Bytes in a cluster, a power of two from 512 to 2M",
    ),
    define(
        "extended_l2",
        Takes::OnOff,
        "32 subclusters in each cluster",
    ),
    define(
        "preallocation",
        Takes::Text,
        "What is reserved: off, metadata, falloc or full",
    ),
    define(
        "compression_type",
        Takes::Text,
        "How compressed clusters are compressed: zlib or zstd",
    ),
    define("size", Takes::Size, "Bytes of the virtual disk"),
    define(
        "compat",
        Takes::Text,
        "Version of the format: v2 (0.10) or v3 (1.1)",
    ),
    define("backing_file", Takes::Text, "The image below"),
    define("backing_fmt", Takes::Text, "The format of the image below"),
    define(
        "data_file",
        Takes::Text,
        "A file of its own for the guest's data",
    ),
    define(
        "data_file_raw",
        Takes::OnOff,
        "The data file is at all times a raw image",
    ),
    define(
        "lazy_refcounts",
        Takes::OnOff,
        "QEMU may write refcounts late",
    ),
    define(
        "refcount_bits",
        Takes::Number,
        "Width of a refcount: 1, 2, 4, 8, 16, 32 or 64",
    ),
];
const RAW: &[Definition] = &[define("size", Takes::Size, "Bytes of the virtual disk")];
/// What a raw image takes on top of [`RAW`] where the file is known.
const RAW_FILE: &[Definition] = &[
    define("nocow", Takes::OnOff, "Accepted; has no effect"),
    define(
        "preallocation",
        Takes::Text,
        "What is reserved: off, falloc or full",
    ),
    define("extent_size_hint", Takes::Size, "Accepted; has no effect"),
];
/// The same for a qcow2 image.
const QCOW2_FILE: &[Definition] = &[
    define("nocow", Takes::OnOff, "Accepted; has no effect"),
    define("extent_size_hint", Takes::Size, "Accepted; has no effect"),
];
/// What a qcow2 image is made with, and printed with, when nothing else is said.
const QCOW2_DEFAULTS: [(&str, &str); 5] = [
    ("cluster_size", "65536"),
    ("extended_l2", "off"),
    ("compression_type", "zlib"),
    ("lazy_refcounts", "off"),
    ("refcount_bits", "16"),
];

fn definitions(format: Format) -> impl Iterator<Item = &'static Definition> {
    let (own, of_file) = match format {
        Format::Raw => (RAW, RAW_FILE),
        Format::Qcow2 => (QCOW2, QCOW2_FILE),
    };
    own.iter().chain(of_file)
}

/// The options of a format, as `-o help` lists them. Without a file name only the format's own.
pub(crate) fn help(format: Format, file_known: bool) -> String {
    let own = match format {
        Format::Raw => RAW,
        Format::Qcow2 => QCOW2,
    };
    let mut shown: Vec<&Definition> = if file_known {
        definitions(format).collect()
    } else {
        own.iter().collect()
    };
    shown.sort_by_key(|definition| definition.name);
    let mut text = match file_known {
        true => "Supported options:\n".to_owned(),
        false => format!("Supported {format} options:\n"),
    };
    text.push_str(&listed(shown));
    if !file_known {
        text.push_str(
            "\nThe protocol level may support further options.\n\
             Specify the target filename to include those options.\n",
        );
    }
    text
}

/// One line for each option, as `-o help` has them.
pub(crate) fn listed<'a>(options: impl IntoIterator<Item = &'a Definition>) -> String {
    let mut text = String::new();
    for Definition { name, takes, about } in options {
        let head = format!("{name}=<{}>", takes.name());
        text.push_str(&format!("  {head:<22} - {about}\n"));
    }
    text
}

/// Whether a qcow2 image can be made with an option of that name, wherever it lies.
pub(crate) fn is_of_qcow2(name: &str) -> bool {
    QCOW2.iter().any(|definition| definition.name == name)
}

/// Options that were given, each known and of the right kind.
#[derive(Debug, Clone)]
pub(crate) struct Given {
    format: Format,
    values: Vec<(&'static str, String)>,
}

impl Given {
    /// Reads the lists behind `-o`; the last value of an option counts.
    ///
    /// # Errors
    /// The text for a list that is none, an unknown option, or a value of the wrong kind.
    pub fn parse(format: Format, lists: &[String]) -> Result<Self, String> {
        let mut given = Self {
            format,
            values: Vec::new(),
        };
        for list in lists {
            for (name, value) in keyval::parse(list) {
                given.set(&name, &value)?;
            }
        }
        Ok(given)
    }

    /// Sets an option as if it had been given last.
    ///
    /// # Errors
    /// As [`Given::parse`].
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let mut known = definitions(self.format);
        let found = known.find(|definition| definition.name == name);
        let definition = found.ok_or_else(|| format!("Invalid parameter '{name}'"))?;
        let value = definition.normal(value)?;
        self.values.retain(|(given, _)| *given != definition.name);
        self.values.push((definition.name, value));
        Ok(())
    }

    /// Whether the format has an option of that name.
    pub fn knows(&self, name: &str) -> bool {
        definitions(self.format).any(|definition| definition.name == name)
    }

    /// The value given.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.values.iter().find(|(given, _)| *given == name)?;
        Some(&found.1)
    }

    /// The disk's length in bytes, where it was given.
    pub fn size(&self) -> Option<u64> {
        self.get("size").and_then(|text| text.parse().ok())
    }

    /// The line that `create` prints.
    pub fn formatting(&self, name: &str) -> String {
        let mut line = format!("Formatting '{name}', fmt={}", self.format);
        let default = |name| {
            let found = QCOW2_DEFAULTS.iter().find(|(option, _)| *option == name);
            found.map(|(_, value)| *value)
        };
        for Definition { name, .. } in definitions(self.format) {
            let default = match self.format {
                Format::Raw => None,
                Format::Qcow2 => default(*name),
            };
            if let Some(value) = self.get(name).or(default) {
                line.push_str(&format!(" {name}={}", keyval::quoted(value)));
            }
        }
        line
    }

    /// The image at `image` that the options describe.
    ///
    /// # Errors
    /// The text of what cannot be.
    pub fn new_format(&self, image: &Path) -> Result<NewFormat, String> {
        match self.format {
            Format::Raw => Ok(NewFormat::Raw {
                preallocation: self.raw_preallocation()?,
            }),
            Format::Qcow2 => Ok(NewFormat::Qcow2(self.qcow2(image)?)),
        }
    }

    fn raw_preallocation(&self) -> Result<Preallocation, String> {
        match self.get("preallocation") {
            None => Ok(Preallocation::Off),
            Some("metadata") => Err("Unsupported preallocation mode: metadata".into()),
            Some(other) => {
                preallocation(other).ok_or_else(|| format!("invalid parameter value: {other}"))
            }
        }
    }

    fn is_on(&self, name: &str) -> bool {
        self.get(name).is_some_and(is_on)
    }

    fn qcow2(&self, image: &Path) -> Result<Qcow2Options, String> {
        self.refuse_encryption()?;
        let options = Qcow2Options {
            version: self.version()?,
            compression: self.compression()?,
            preallocation: self.preallocation()?,
            backing: self.backing()?,
            cluster_size: self.cluster_size()?,
            refcount_bits: self.refcount_bits(),
            lazy_refcounts: self.is_on("lazy_refcounts"),
            extended_l2: self.is_on("extended_l2"),
            data_file: self.data_file(image)?,
            backing_content: None,
        };
        check_qcow2(&options)?;
        Ok(options)
    }

    fn refuse_encryption(&self) -> Result<(), String> {
        let wanted = self.is_on("encryption")
            || self
                .values
                .iter()
                .any(|(name, _)| name.starts_with("encrypt."));
        match wanted {
            true => Err("Encryption is not supported".into()),
            false => Ok(()),
        }
    }

    fn version(&self) -> Result<Version, String> {
        match self.get("compat") {
            None | Some("1.1" | "v3") => Ok(Version::V3),
            Some("0.10" | "v2") => Ok(Version::V2),
            Some(other) => Err(not_accepted("version", other)),
        }
    }

    fn compression(&self) -> Result<Compression, String> {
        match self.get("compression_type") {
            None | Some("zlib") => Ok(Compression::Zlib),
            Some("zstd") => Ok(Compression::Zstd),
            Some(other) => Err(not_accepted("compression-type", other)),
        }
    }

    fn preallocation(&self) -> Result<Preallocation, String> {
        match self.get("preallocation") {
            None => Ok(Preallocation::Off),
            Some(mode) => preallocation(mode).ok_or_else(|| not_accepted("preallocation", mode)),
        }
    }

    fn cluster_size(&self) -> Result<ClusterSize, String> {
        let Some(text) = self.get("cluster_size") else {
            return Ok(ClusterSize::DEFAULT);
        };
        let found = text.parse().ok().and_then(ClusterSize::from_bytes);
        found.ok_or_else(|| "Cluster size must be a power of two between 512 and 2048k".into())
    }

    /// 0, which no image can have, where the number is out of all reason.
    fn refcount_bits(&self) -> u32 {
        self.get("refcount_bits")
            .map_or(16, |text| text.parse().unwrap_or(0))
    }

    fn backing(&self) -> Result<Option<Backing>, String> {
        let name = self.get("backing_file").filter(|name| !name.is_empty());
        let format = self.get("backing_fmt");
        match (name, format) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err("Backing format cannot be used without backing file".into()),
            (Some(_), None) => Err("Backing file specified without backing format".into()),
            (Some(name), Some(format)) => {
                let known = Format::by_name(format);
                let known = known.ok_or_else(|| not_accepted("backing-fmt", format))?;
                Ok(Some(Backing {
                    name: name.to_owned(),
                    format: known.into(),
                }))
            }
        }
    }

    fn data_file(&self, image: &Path) -> Result<Option<DataFile>, String> {
        let raw = self.is_on("data_file_raw");
        match self.get("data_file") {
            None if raw => Err("data-file-raw requires data-file".into()),
            None => Ok(None),
            Some(name) => Ok(Some(DataFile {
                name: data_file::name_for(image, name)?,
                path: reference::plain_path(OsStr::new(name))?,
                raw,
            })),
        }
    }
}

fn not_accepted(parameter: &str, value: &str) -> String {
    format!("Parameter '{parameter}' does not accept value '{value}'")
}

/// The preallocation of that name.
pub(crate) fn preallocation(name: &str) -> Option<Preallocation> {
    match name {
        "off" => Some(Preallocation::Off),
        "metadata" => Some(Preallocation::Metadata),
        "falloc" => Some(Preallocation::Falloc),
        "full" => Some(Preallocation::Full),
        _ => None,
    }
}

/// What a value of [`Takes::OnOff`] says.
pub(crate) fn is_on(value: &str) -> bool {
    matches!(value, "on" | "yes" | "true" | "y")
}

impl Definition {
    /// A value in the form in which it is printed.
    ///
    /// # Errors
    /// The text for a value of the wrong kind.
    pub fn normal(&self, value: &str) -> Result<String, String> {
        let name = self.name;
        match self.takes {
            Takes::Text => Ok(value.to_owned()),
            Takes::OnOff => match value {
                "on" | "off" | "yes" | "no" | "true" | "false" | "y" | "n" => Ok(value.to_owned()),
                _ => Err(format!("Parameter '{name}' expects 'on' or 'off'")),
            },
            Takes::Number => {
                number(value).ok_or_else(|| format!("Parameter '{name}' expects a number"))
            }
            Takes::Size => match size::parse(value) {
                Ok(bytes) => Ok(bytes.to_string()),
                Err(_not_a_size) => Err(size_words(name)),
            },
        }
    }
}

/// What is said of a value that is no size.
pub(crate) fn size_words(name: &str) -> String {
    format!(
        "Parameter '{name}' expects a non-negative number below 2^64\n\
         Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
         and exabytes, respectively."
    )
}

fn number(value: &str) -> Option<String> {
    let hex = value
        .strip_prefix("0x")
        .or_else(|| value.strip_prefix("0X"));
    let number: i64 = match hex {
        Some(digits) => i64::from_str_radix(digits, 16).ok()?,
        None => value.parse().ok()?,
    };
    Some(number.to_string())
}

/// What the format cannot express, in qemu-img's words and order.
fn check_qcow2(options: &Qcow2Options) -> Result<(), String> {
    const NEWER: &str = "(use version=v3 or greater)";
    let old = options.version == Version::V2;
    let bits = options.refcount_bits;
    let data_file = options.data_file.as_ref();
    let reserved = options.preallocation != Preallocation::Off;
    let below = options.backing.is_some();
    let refusals = [
        (
            options.extended_l2 && old,
            format!(
                "Extended L2 entries are only supported with compatibility level 1.1 and above {NEWER}"
            ),
        ),
        (
            options.extended_l2 && options.cluster_size.bits() < 14,
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
                .into(),
        ),
        (
            reserved && below && !options.extended_l2,
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
                .into(),
        ),
        (
            options.lazy_refcounts && old,
            format!("Lazy refcounts only supported with compatibility level 1.1 and above {NEWER}"),
        ),
        (
            !bits.is_power_of_two() || bits > 64,
            "Refcount width must be a power of two and may not exceed 64 bits".into(),
        ),
        (
            bits != 16 && old,
            format!(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above {NEWER}"
            ),
        ),
        (
            below && data_file.is_some_and(|data| data.raw),
            "Backing file and data-file-raw cannot be used at the same time".into(),
        ),
        (
            data_file.is_some() && old,
            format!(
                "External data files are only supported with compatibility level 1.1 and above {NEWER}"
            ),
        ),
        (
            options.compression == Compression::Zstd && old,
            format!(
                "Non-zlib compression type is only supported with compatibility level 1.1 and above {NEWER}"
            ),
        ),
    ];
    match refusals.into_iter().find(|(refused, _)| *refused) {
        Some((_, why)) => Err(why),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(list: &str) -> Given {
        Given::parse(Format::Qcow2, &[list.to_owned()]).expect("good options")
    }

    #[test]
    fn the_last_value_counts_and_is_printed_as_a_number_of_bytes() {
        let given =
            given("cluster_size=64k,cluster_size=4k,size=1.5M,lazy_refcounts=yes,compat=1,,1");
        assert_eq!(
            given.formatting("x"),
            "Formatting 'x', fmt=qcow2 cluster_size=4096 extended_l2=off compression_type=zlib \
             size=1572864 compat=1,,1 lazy_refcounts=yes refcount_bits=16"
        );
        assert_eq!(given.size(), Some(1_572_864));
    }

    #[test]
    fn every_way_to_ask_for_encryption_is_refused() {
        for list in [
            "encryption=on",
            "encrypt.format=luks",
            "encrypt.iter-time=10",
        ] {
            let error = given(list)
                .new_format(Path::new("image"))
                .expect_err("refused");
            assert!(error.contains("Encryption"), "{error}");
        }
        let given = given("encryption=off");
        given.new_format(Path::new("image")).expect("not encrypted");
    }

    #[test]
    fn help_lists_options_in_alphabetical_order() {
        let text = help(Format::Raw, true);
        let names: Vec<&str> = text
            .lines()
            .skip(1)
            .filter_map(|l| l.trim().split('=').next())
            .collect();
        assert_eq!(
            names,
            ["extent_size_hint", "nocow", "preallocation", "size"]
        );
        assert!(help(Format::Qcow2, false).contains("Specify the target filename"));
    }
}
