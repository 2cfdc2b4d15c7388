//! What a user calls an image: a file name (`disk.img`, `file:disk.img`), an option string
//! (`--image-opts driver=raw,file.filename=disk.img`) or JSON (`json:{"driver":"raw",…}`).
//!
//! Only files are known: a protocol, driver or option that is not is refused by name, so that nothing
//! is opened that the user did not mean.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::format::Format;
use crate::keyval;
use crate::part::Window;
use crate::size;

/// The deepest nesting of nodes that is read.
const MAX_NODES: usize = 8;
/// Options that every node may have and that mean nothing for a command that ends when it is done.
const HARMLESS: [&str; 7] = [
    "node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "detect-zeroes",
    "cache",
    "force-share",
];
/// Options of the driver `file` that mean nothing here.
const HARMLESS_FILE: [&str; 6] = [
    "aio",
    "locking",
    "drop-cache",
    "x-check-cache-dropped",
    "pr-manager",
    "aio-max-batch",
];

/// An image as the user names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference {
    /// What the user wrote, for texts.
    pub given: String,
    /// What `info` calls the image.
    pub shown: String,
    /// The file.
    pub path: PathBuf,
    /// The format, where it is stated.
    pub format: Option<Format>,
    /// The part of the file, where it is not all of it.
    pub window: Option<Window>,
    /// What `map` calls the file of a qcow2 image that is a part of a file.
    pub part_name: Option<String>,
    /// The driver is `file`: the file's bytes under no format at all.
    pub bare_file: bool,
}

/// Reads a file name, or `json:`.
pub(crate) fn from_name(name: &OsStr) -> Result<Reference, String> {
    let given = name.to_string_lossy().into_owned();
    if let Some(json) = given.strip_prefix("json:") {
        return from_json(&given, json);
    }
    let path = plain_path(name)?;
    Ok(Reference {
        shown: path.to_string_lossy().into_owned(),
        given,
        path,
        format: None,
        window: None,
        part_name: None,
        bare_file: false,
    })
}

/// The path in a file name, without `file:` before it.
pub(crate) fn plain_path(name: &OsStr) -> Result<PathBuf, String> {
    let bytes = name.as_bytes();
    if bytes.is_empty() {
        return Err("The 'file' block driver requires a file name".into());
    }
    match protocol(bytes) {
        None => Ok(PathBuf::from(name)),
        Some(b"file") => Ok(Path::new(OsStr::from_bytes(&bytes[5..])).to_owned()),
        Some(other) => Err(format!(
            "Unknown protocol '{}'",
            String::from_utf8_lossy(other)
        )),
    }
}

/// What stands before a colon, where no slash comes first.
pub(crate) fn protocol(name: &[u8]) -> Option<&[u8]> {
    let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    (name[end] == b':').then(|| &name[..end])
}

/// Reads an option string.
pub(crate) fn from_options(list: &OsStr) -> Result<Reference, String> {
    let given = list.to_string_lossy().into_owned();
    if !given.is_empty() && !given.contains('=') {
        return Err(format!(
            "Cannot find device='{given}' nor node-name='{given}'"
        ));
    }
    let pairs = keyval::parse(&given);
    let options = pairs
        .into_iter()
        .map(|(key, text)| (key, Value::String(text)));
    build(&given, options.collect())
}

fn from_json(given: &str, json: &str) -> Result<Reference, String> {
    let value: Value = serde_json::from_str(json)
        .map_err(|error| format!("Could not parse the JSON options: JSON parse error, {error}"))?;
    let Value::Object(object) = value else {
        return Err("Invalid JSON object given".into());
    };
    let mut options = Options::new();
    flatten("", object, &mut options)?;
    build(given, options)
}

/// Options with dots for nesting: `file.filename`.
type Options = BTreeMap<String, Value>;

fn flatten(
    prefix: &str,
    object: serde_json::Map<String, Value>,
    options: &mut Options,
) -> Result<(), String> {
    for (key, value) in object {
        let key = format!("{prefix}{key}");
        match value {
            Value::Object(inner) => flatten(&format!("{key}."), inner, options)?,
            Value::Array(_) | Value::Null => {
                return Err(format!("Invalid parameter type for '{key}'"));
            }
            scalar @ (Value::Bool(_) | Value::Number(_) | Value::String(_)) => {
                options.insert(key, scalar);
            }
        }
    }
    Ok(())
}

/// The options whose key starts with `name.`, without it.
fn take_inner(options: &mut Options, name: &str) -> Options {
    let prefix = format!("{name}.");
    let inner = options.extract_if(.., |key, _| key.starts_with(&prefix));
    inner
        .map(|(key, value)| (key[prefix.len()..].to_owned(), value))
        .collect()
}

fn text_of(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other @ (Value::Null
        | Value::Bool(_)
        | Value::Number(_)
        | Value::Array(_)
        | Value::Object(_)) => other.to_string(),
    }
}

/// The nodes from the outermost to the file.
fn build(given: &str, options: Options) -> Result<Reference, String> {
    let mut reference = Reference {
        given: given.to_owned(),
        shown: String::new(),
        path: PathBuf::new(),
        format: None,
        window: None,
        part_name: None,
        bare_file: false,
    };
    let mut node = options;
    for depth in 0..MAX_NODES {
        let driver = node.remove("driver").map(|value| text_of(&value));
        let mut file = take_inner(&mut node, "file");
        if driver.is_none() && depth > 0 && file.is_empty() {
            node.insert("driver".into(), "file".into());
            return read_file_node(node, depth, reference);
        }
        match driver.as_deref() {
            Some("file" | "host_device") => {
                node.insert("driver".into(), "file".into());
                return read_file_node(node, depth, reference);
            }
            None if file.is_empty() => return Err("Must specify either driver or file".into()),
            None => {}
            Some(name) => format_node(name, &mut node, &mut reference, depth)?,
        }
        refuse_rest(
            &node,
            driver.as_deref().unwrap_or("raw"),
            "Block format",
            &[],
        )?;
        std::mem::swap(&mut node, &mut file);
    }
    Err("the nodes are nested too deep".into())
}

fn format_node(
    name: &str,
    node: &mut Options,
    reference: &mut Reference,
    depth: usize,
) -> Result<(), String> {
    let format = Format::by_name(name).ok_or_else(|| format!("Unknown driver '{name}'"))?;
    if let Some(other) = node.get("file") {
        let name = text_of(other);
        return Err(format!(
            "Cannot find device='{name}' nor node-name='{name}'"
        ));
    }
    let bounds = [node.remove("offset"), node.remove("size")];
    match (format, depth) {
        (Format::Qcow2, 0) => {}
        (Format::Raw, 0 | 1) => {
            if bounds.iter().any(Option::is_some) {
                if reference.window.is_some() {
                    return Err("a part of a part of a file is not supported".into());
                }
                if depth == 1 && reference.format.is_none() {
                    return Err("the driver of an image in a part of a file must be given".into());
                }
                reference.shown = window_name(&bounds);
                reference.window = Some(window(&bounds)?);
            }
        }
        (Format::Raw | Format::Qcow2, _) => {
            return Err(format!(
                "the driver '{name}' is not supported at this place"
            ));
        }
    }
    if depth == 0 {
        reference.format = Some(format);
    }
    if format == Format::Qcow2 && bounds.iter().any(Option::is_some) {
        return Err("Block format 'qcow2' does not support the option 'offset' or 'size'".into());
    }
    Ok(())
}

fn window([offset, size]: &[Option<Value>; 2]) -> Result<Window, String> {
    let number = |name: &str, value: &Value| {
        size::parse(&text_of(value)).map_err(|_not_a_size| {
            format!("Parameter '{name}' expects a non-negative number below 2^64")
        })
    };
    let offset = offset.as_ref().map(|value| number("offset", value));
    let size = size.as_ref().map(|value| number("size", value));
    Ok(Window {
        offset: offset.transpose()?.unwrap_or(0),
        size: size.transpose()?,
    })
}

/// The beginning of the JSON by which a part of a file is called; the file's name is added later.
fn window_name([offset, size]: &[Option<Value>; 2]) -> String {
    let part = |name: &str, value: &Option<Value>| match value {
        Some(value) => format!("\"{name}\": {value}, "),
        None => String::new(),
    };
    let (offset, size) = (part("offset", offset), part("size", size));
    format!("{offset}\"driver\": \"raw\", {size}")
}

fn read_file_node(
    mut node: Options,
    depth: usize,
    mut reference: Reference,
) -> Result<Reference, String> {
    node.remove("driver");
    let name = node.remove("filename").map(|value| text_of(&value));
    let name = name.ok_or("The 'file' block driver requires a file name")?;
    refuse_rest(&node, "file", "Block protocol", &HARMLESS_FILE)?;
    reference.path = PathBuf::from(&name);
    reference.bare_file = depth == 0;
    reference.shown = if reference.window.is_some() {
        let file = Value::String(name);
        let head = reference.shown;
        let node = format!("{{{head}\"file\": {{\"driver\": \"file\", \"filename\": {file}}}}}");
        match reference.format {
            Some(Format::Qcow2) => {
                reference.part_name = Some(format!("json:{node}"));
                format!("json:{{\"driver\": \"qcow2\", \"file\": {node}}}")
            }
            Some(Format::Raw) | None => format!("json:{node}"),
        }
    } else {
        name
    };
    Ok(reference)
}

fn refuse_rest(node: &Options, driver: &str, kind: &str, more: &[&str]) -> Result<(), String> {
    let harmless = |key: &str| {
        let head = key.split('.').next().unwrap_or(key);
        HARMLESS.contains(&head) || more.contains(&head)
    };
    match node.keys().find(|key| !harmless(key)) {
        None => Ok(()),
        Some(key) => Err(format!(
            "{kind} '{driver}' does not support the option '{key}'"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> Result<Reference, String> {
        from_name(OsStr::new(&format!("json:{text}")))
    }

    fn options(text: &str) -> Result<Reference, String> {
        from_options(OsStr::new(text))
    }

    #[test]
    fn one_image_can_be_named_in_many_ways() {
        for named in [
            json(r#"{"driver":"qcow2","file":{"driver":"file","filename":"a"}}"#),
            json(r#"{"driver":"qcow2","file.filename":"a"}"#),
            json(
                r#"{"driver":"qcow2","file":{"driver":"raw","file":{"driver":"file","filename":"a"}}}"#,
            ),
            options("driver=qcow2,file.driver=file,file.filename=a"),
            options("driver=qcow2,file.filename=a,cache.direct=on,file.locking=off"),
        ] {
            let named = named.expect("a good name");
            assert_eq!(named.path, Path::new("a"));
            assert_eq!(named.format, Some(Format::Qcow2));
            assert_eq!(named.shown, "a");
        }
        let file = from_name(OsStr::new("file:b:c")).expect("a good name");
        assert_eq!((file.path.as_path(), file.format), (Path::new("b:c"), None));
    }

    #[test]
    fn a_part_of_a_file_is_named_as_qemu_names_it() {
        let named = options("driver=raw,offset=1k,size=1M,file.filename=r").expect("a good name");
        let expected = Window {
            offset: 1024,
            size: Some(1 << 20),
        };
        assert_eq!(named.window, Some(expected));
        assert_eq!(
            named.shown,
            r#"json:{"offset": "1k", "driver": "raw", "size": "1M", "file": {"driver": "file", "filename": "r"}}"#
        );
    }

    #[test]
    fn protocols_drivers_and_options_that_are_not_here_are_refused_by_name() {
        for (named, word) in [
            (from_name(OsStr::new("nbd://host/x")), "'nbd'"),
            (from_name(OsStr::new("fat:rw:dir")), "'fat'"),
            (json(r#"{"driver":"nbd","host":"x"}"#), "'nbd'"),
            (
                json(r#"{"driver":"raw","bogus":1,"file.filename":"r"}"#),
                "'bogus'",
            ),
            (
                json(r#"{"driver":"raw","file":{"driver":"http","url":"x"}}"#),
                "'http'",
            ),
            (
                json(r#"{"driver":"qcow2","backing.file.filename":"b","file.filename":"r"}"#),
                "'backing.file.filename'",
            ),
            (
                json(r#"{"driver":"raw","file":{"driver":"file","filename":"r","bogus":1}}"#),
                "'bogus'",
            ),
            (json(r#"{"filename":"r"}"#), "driver or file"),
            (json("[1]"), "JSON object"),
            (json("{bad"), "JSON"),
            (json(r#"{"driver":"raw","file":[1]}"#), "'file'"),
            (options("a"), "device='a'"),
            (options(""), "driver or file"),
            (from_name(OsStr::new("")), "file name"),
        ] {
            let error = named.expect_err(word);
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn nesting_without_end_is_refused() {
        let mut text = r#"{"driver":"file","filename":"a"}"#.to_owned();
        for _ in 0..40 {
            text = format!(r#"{{"driver":"raw","file":{text}}}"#);
        }
        assert!(json(&text).is_err());
    }
}
