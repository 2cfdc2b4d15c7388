//! A chain opened by the names that its images hold, as far as the caller allows.
//!
//! A name in an image is untrusted: it could be any file of this machine, whose content would then be
//! seen as a disk. So nothing is followed unless the [`OpenPolicy`] says so, and then only to regular files
//! and block devices: a name of a protocol (`nbd:`, `http:`, …) is refused by name, and so is a `json:` node
//! that is more than a file in a known format. Chains are finite: a file that comes up twice is an error, and so are
//! more than [`MAX_LAYERS`] files.
//!
//! The format of a file below is what the image states. Where it states none, the content can be asked
//! ([`OpenPolicy::probe`]), but a guest can write a qcow2 header into a raw disk, so that is off by default.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use stead_sys::readable;
use stead_sys::storage::Storage;

use crate::chain::{Chain, LayerFile, LayerFormat, MAX_LAYERS, Member};
use crate::error::{Error, Result};
use crate::file::ImageFile;
use crate::header::{to_u64, to_usize};
use crate::layer::Layer;
use crate::raw::RawDisk;
use crate::units::HostOffset;

/// The most L1 tables in memory of a chain that is followed, in bytes.
const MAX_CHAIN_L1_BYTES: u64 = 512 << 20;
/// As many bytes as show the format of a file.
const PROBE_BYTES: u64 = 512;

/// Which names in an image are followed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Follow {
    /// None. An image that needs another file is an error.
    #[default]
    Nothing,
    /// Those of these files, whatever they are called in the image.
    Listed(Vec<PathBuf>),
    /// All; a name that is not absolute starts in the image's folder.
    Names,
}

/// What opening one image may open besides it. The default is nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenPolicy {
    /// Which names are followed.
    pub follow: Follow,
    /// Ask the content of a file for its format where the image above does not state it. A guest can
    /// have written that content.
    pub probe: bool,
}

impl OpenPolicy {
    /// Nothing is followed.
    pub const NOTHING: Self = Self {
        follow: Follow::Nothing,
        probe: false,
    };

    /// All names are followed, as QEMU does; formats must be stated.
    pub const NAMES: Self = Self {
        follow: Follow::Names,
        probe: false,
    };
}

/// A file that an image names.
struct Named<'a> {
    image: &'a Path,
    what: &'static str,
    name: &'a [u8],
}

impl Named<'_> {
    fn refuse<T>(&self, reason: impl Into<String>) -> Result<T> {
        Err(Error::NotFollowed {
            path: self.image.to_owned(),
            what: self.what,
            name: String::from_utf8_lossy(self.name).into_owned(),
            reason: reason.into(),
        })
    }

    /// The file's path, if it may be opened, and its format where the name states it.
    fn resolve(&self, follow: &Follow) -> Result<(PathBuf, Option<LayerFormat>)> {
        let (path, format) = self.place()?;
        match follow {
            Follow::Names => Ok((path, format)),
            Follow::Nothing => self
                .refuse("following names is not allowed; allow it, or name the files of the chain"),
            Follow::Listed(files) => {
                let real =
                    fs::canonicalize(&path).map_err(|source| Error::io("find", &path, source))?;
                // What is opened is the caller's own path.
                let same = |file: &&PathBuf| fs::canonicalize(file).is_ok_and(|file| file == real);
                match files.iter().find(same) {
                    Some(file) => Ok((file.clone(), format)),
                    None => self.refuse("it is not among the files that are allowed"),
                }
            }
        }
    }

    fn place(&self) -> Result<(PathBuf, Option<LayerFormat>)> {
        let Ok(name) = std::str::from_utf8(self.name) else {
            return self.refuse("the name is not text");
        };
        if let Some(node) = name.strip_prefix("json:") {
            return self.json_node(node);
        }
        Ok((self.file_name(name)?, None))
    }

    /// A name of the form `protocol:…` is no file, unless the protocol is `file`.
    fn file_name(&self, name: &str) -> Result<PathBuf> {
        let protocol = name
            .split_once(':')
            .filter(|(before, _)| !before.contains('/'));
        let path = match protocol {
            Some(("file", path)) => path.strip_prefix("//").unwrap_or(path),
            Some((protocol, _)) => {
                return self.refuse(format!(
                    "the protocol {protocol} is not supported (files are)"
                ));
            }
            None => name,
        };
        if path.is_empty() || path.contains('\0') {
            return self.refuse("it is no file name");
        }
        let folder = self.image.parent().unwrap_or(Path::new(""));
        Ok(folder.join(path))
    }

    /// `{"driver": "qcow2", "file": {"driver": "file", "filename": …}}` and shorter ways to say it.
    fn json_node(&self, text: &str) -> Result<(PathBuf, Option<LayerFormat>)> {
        let Ok(Value::Object(node)) = serde_json::from_str(text) else {
            return self.refuse("it is not valid JSON");
        };
        let node = flat(node);
        let mut format = None;
        let mut name = None;
        for (key, value) in &node {
            let text = value.as_str().unwrap_or_default();
            match (key.as_str(), text) {
                ("driver", "file") | ("file.driver", "file") => {}
                ("driver", stated) => format = Some(self.format(stated)?),
                ("filename" | "file.filename", file) => name = Some(file),
                _ => {
                    return self.refuse(format!(
                        "the node has {key} {value}, which is not supported"
                    ));
                }
            }
        }
        match name {
            Some(name) => Ok((self.file_name(name)?, format)),
            None => self.refuse("the node names no file"),
        }
    }

    fn format(&self, stated: &str) -> Result<LayerFormat> {
        match stated {
            "qcow2" => Ok(LayerFormat::Qcow2),
            "raw" | "host_device" => Ok(LayerFormat::Raw),
            other => self.refuse(format!(
                "the format {other} is not supported (raw and qcow2 are)"
            )),
        }
    }
}

/// The members of `file` beside it, as `file.filename`; one level, which is all that a file needs.
fn flat(mut node: Map<String, Value>) -> Map<String, Value> {
    if let Some(Value::Object(file)) = node.remove("file") {
        node.extend(
            file.into_iter()
                .map(|(key, value)| (format!("file.{key}"), value)),
        );
    }
    node
}

/// The format that a file's content shows: qcow2, or else raw.
///
/// This is a guess: whoever can write a raw disk can make it look like a qcow2 image. Use it where a person
/// names a file without its format, not for what an image names.
///
/// # Errors
/// When the file cannot be read, or shows a format that is not supported ([`Error::UnknownFormat`]).
pub fn probe_format(path: &Path) -> Result<LayerFormat> {
    probe(&ImageFile::open(path)?)
}

/// What other formats start with, and where.
const OTHER_FORMATS: [(&str, usize, &[u8]); 9] = [
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("luks", 0, b"LUKS\xba\xbe"),
];

fn probe(file: &ImageFile) -> Result<LayerFormat> {
    let mut first = vec![0; to_usize(file.length().min(PROBE_BYTES))];
    file.read("the first bytes", HostOffset(0), &mut first)?;
    if first.starts_with(b"QFI\xfb") {
        return Ok(LayerFormat::Qcow2);
    }
    let shown = |(_, at, magic): &&(&str, usize, &[u8])| {
        first
            .get(*at..)
            .is_some_and(|bytes| bytes.starts_with(magic))
    };
    match OTHER_FORMATS.iter().find(shown) {
        None => Ok(LayerFormat::Raw),
        Some((format, ..)) => Err(Error::UnknownFormat {
            path: file.path().to_owned(),
            format: (*format).to_owned(),
        }),
    }
}

impl Chain {
    /// Opens the image `top` and what it names, one below the other, as far as `policy` allows.
    ///
    /// # Errors
    /// When a name is not followed ([`Error::NotFollowed`] says which and why), a file comes up twice,
    /// there are more than [`MAX_LAYERS`] files or 512 MiB of L1 tables, or as [`Chain::open`].
    pub fn open_following(top: &LayerFile, policy: &OpenPolicy) -> Result<Self> {
        Opened::default().all(Some(top.clone()), policy)
    }

    /// As [`Chain::open_following`], with a qcow2 image on a storage as the top; names in it start in the folder of
    /// `path`.
    ///
    /// # Errors
    /// As [`Chain::open_following`].
    pub fn follow_storage(top: Arc<dyn Storage>, path: &Path, policy: &OpenPolicy) -> Result<Self> {
        let mut opened = Opened::default();
        let below = opened.add_layer(ImageFile::on(top, path)?, policy)?;
        opened.all(below, policy)
    }
}

/// The files opened so far, top first.
#[derive(Default)]
struct Opened {
    members: Vec<Member>,
    seen: Seen,
    l1_bytes: u64,
}

/// Which files a chain has so far, so that it has an end.
#[derive(Default)]
pub(crate) struct Seen {
    identities: Vec<(u64, u64)>,
}

impl Seen {
    /// Takes a file that was not there yet.
    pub fn accept(&mut self, image: &ImageFile) -> Result<()> {
        let path = image.path();
        let Some(file) = image.file() else {
            unreachable!("what is named is opened as a file");
        };
        let identity =
            readable::identity(file).map_err(|source| Error::io("identify", path, source))?;
        let invalid = |reason: String| Err(Error::InvalidChain { reason });
        if self.identities.contains(&identity) {
            return invalid(format!("{} comes up twice in it", path.display()));
        }
        if self.identities.len() >= MAX_LAYERS {
            let path = path.display();
            return invalid(format!("at {path} it has more than {MAX_LAYERS} files"));
        }
        self.identities.push(identity);
        Ok(())
    }
}

impl Opened {
    /// Opens `next` and what lies below it.
    fn all(mut self, mut next: Option<LayerFile>, policy: &OpenPolicy) -> Result<Chain> {
        while let Some(file) = next {
            next = self.add(&file, policy)?;
        }
        Ok(Chain::from_members(self.members))
    }

    /// Opens `file` and gives the file below it.
    fn add(&mut self, file: &LayerFile, policy: &OpenPolicy) -> Result<Option<LayerFile>> {
        let image = ImageFile::open(&file.path)?;
        self.seen.accept(&image)?;
        match file.format {
            LayerFormat::Raw => {
                self.members.push(Member::Raw(RawDisk::whole(image)));
                Ok(None)
            }
            LayerFormat::Qcow2 => self.add_layer(image, policy),
        }
    }

    fn add_layer(&mut self, image: ImageFile, policy: &OpenPolicy) -> Result<Option<LayerFile>> {
        let layer = Layer::inspect_image(image)?;
        let layer = self.with_data(layer, policy)?;
        self.count_l1(&layer)?;
        let below = below(&layer, policy)?;
        self.members.push(Member::from_layer(layer)?);
        Ok(below)
    }

    fn count_l1(&mut self, layer: &Layer) -> Result<()> {
        self.l1_bytes += to_u64(layer.l1().len()) * 8;
        if self.l1_bytes <= MAX_CHAIN_L1_BYTES {
            return Ok(());
        }
        let path = layer.path().display();
        Err(Error::InvalidChain {
            reason: format!("at {path} it has more than 512 MiB of L1 tables"),
        })
    }

    fn with_data(&mut self, layer: Layer, policy: &OpenPolicy) -> Result<Layer> {
        let Some(path) = data_file_of(&layer, policy)? else {
            return Ok(layer);
        };
        let data = ImageFile::open(&path)?;
        self.seen.accept(&data)?;
        layer.with_data(data)
    }
}

/// The path of the external data file that an image names, if it names one and `policy` follows the name.
///
/// # Errors
/// [`Error::NotFollowed`].
pub fn data_file_of(layer: &Layer, policy: &OpenPolicy) -> Result<Option<PathBuf>> {
    let name = layer.header().external_data.as_ref();
    let Some(name) = name.and_then(|data| data.name.as_deref()) else {
        return Ok(None);
    };
    let named = Named {
        image: layer.path(),
        what: "external data file",
        name,
    };
    let (path, format) = named.resolve(&policy.follow)?;
    if format == Some(LayerFormat::Qcow2) {
        return named.refuse("a data file is raw");
    }
    Ok(Some(path))
}

pub(crate) fn below(layer: &Layer, policy: &OpenPolicy) -> Result<Option<LayerFile>> {
    let Some(backing) = &layer.header().backing else {
        return Ok(None);
    };
    if backing.name.is_empty() {
        return Ok(None);
    }
    let named = Named {
        image: layer.path(),
        what: "backing file",
        name: &backing.name,
    };
    let (path, in_name) = named.resolve(&policy.follow)?;
    let format = match (in_name, backing.format.as_deref()) {
        (Some(format), _) => format,
        (None, Some(stated)) => named.format(&String::from_utf8_lossy(stated))?,
        (None, None) if policy.probe => probe_format(&path)?,
        (None, None) => {
            return named.refuse(
                "its format is not stated; name the files of the chain, or allow to probe",
            );
        }
    };
    Ok(Some(LayerFile { path, format }))
}
