//! What many commands share: how an image is named on the command line, `--output`, `--object`, cache modes.

use std::ffi::OsStr;

use stead_qcow2::{Follow, OpenPolicy};

use crate::failure::{Failure, Outcome};
use crate::format::Format;
use crate::getopt::{Opt, Parsed};
use crate::keyval;
use crate::reference::{self, Reference};
use crate::size::{self, BadSize, MAX_SIZE};

pub(crate) const FORMAT: Opt = Opt::value("format", "f", &["format"]);
pub(crate) const OBJECT: Opt = Opt::value("object", "", &["object"]);
pub(crate) const IMAGE_OPTS: Opt = Opt::flag("image-opts", "", &["image-opts"]);
pub(crate) const OUTPUT: Opt = Opt::value("output", "", &["output"]);
pub(crate) const FORCE_SHARE: Opt = Opt::flag("force-share", "U", &["force-share"]);
pub(crate) const PROGRESS: Opt = Opt::flag("progress", "p", &["progress"]);
/// As [`PROGRESS`], where `-p` of qemu-img would be an error.
pub(crate) const LONG_PROGRESS: Opt = Opt::flag("progress", "", &["progress"]);
pub(crate) const NO_FOLLOW: Opt = Opt::flag("no-follow", "", &["no-follow"]);
pub(crate) const CACHE_SIZE: Opt = Opt::value("cache-size", "", &["cache-size"]);
pub(crate) const QUIET: Opt = Opt::flag("quiet", "q", &["quiet"]);
/// What lies below is read, and what it shows recorded in the image.
pub(crate) const RECORD_BACKING: Opt = Opt::flag("record-backing", "", &["record-backing"]);

/// How a result is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// For people.
    Human,
    /// For programs.
    Json,
}

/// What `--output` says.
pub(crate) fn output(parsed: &Parsed) -> Outcome<Output> {
    match parsed.last("output").map(OsStr::to_string_lossy).as_deref() {
        None | Some("human") => Ok(Output::Human),
        Some("json") => Ok(Output::Json),
        Some(_) => Err(Failure::new(
            "--output must be used with human or json as argument.",
        )),
    }
}

/// The text of an option's last value.
pub(crate) fn text(parsed: &Parsed, id: &str) -> Option<String> {
    let value = parsed.last(id)?;
    Some(value.to_string_lossy().into_owned())
}

/// The only operand, the image.
pub(crate) fn one_operand<'a>(parsed: &'a Parsed, program: &str) -> Outcome<&'a OsStr> {
    match parsed.operands.as_slice() {
        [one] => Ok(one),
        _ => Err(Failure::usage(program, "Expecting one image file name")),
    }
}

/// The image that `name` means, by the options `--image-opts` and that of `format_id`.
pub(crate) fn image(parsed: &Parsed, name: &OsStr, format_id: &str) -> Outcome<Reference> {
    objects(parsed)?;
    let as_options = parsed.has("image-opts");
    if as_options && parsed.has(format_id) {
        return Err(Failure::new(
            "--image-opts and --format are mutually exclusive",
        ));
    }
    let cannot = |why: String| {
        let name = name.to_string_lossy();
        Failure::new(format!("Could not open '{name}': {why}"))
    };
    let found = if as_options {
        reference::from_options(name)
    } else {
        reference::from_name(name)
    };
    let mut found = found.map_err(cannot)?;
    if let Some(format) = text(parsed, format_id) {
        let unknown = || cannot(format!("Unknown driver '{format}'"));
        found.format = Some(Format::by_name(&format).ok_or_else(unknown)?);
    }
    Ok(found)
}

/// Which names in images are followed: all, as by qemu-img, or none with `--no-follow`.
pub(crate) fn policy(parsed: &Parsed) -> OpenPolicy {
    if parsed.has(NO_FOLLOW.id) {
        return OpenPolicy::NOTHING;
    }
    follow_all()
}

/// All names in images are followed, and a format that is not stated is looked for.
pub(crate) fn follow_all() -> OpenPolicy {
    OpenPolicy {
        follow: Follow::Names,
        probe: true,
    }
}

/// The lists of `key=value` behind an option that may be given again and again.
pub(crate) fn lists(parsed: &Parsed, id: &str) -> Outcome<Vec<String>> {
    let mut lists = Vec::new();
    for (_, list) in parsed.given().filter(|(given, _)| *given == id) {
        let list = list.to_string_lossy().into_owned();
        if !keyval::is_list(&list) {
            return Err(Failure::new(format!("Invalid option list: {list}")));
        }
        lists.push(list);
    }
    Ok(lists)
}

/// Objects other than secrets are refused by name; secrets have no use here, as nothing is encrypted.
pub(crate) fn objects(parsed: &Parsed) -> Outcome<()> {
    for (id, value) in parsed.given() {
        if id != OBJECT.id {
            continue;
        }
        let value = value.to_string_lossy();
        let kind = value.split(',').next().unwrap_or_default();
        let kind = kind.strip_prefix("qom-type=").unwrap_or(kind);
        if kind != "secret" {
            let text = format!("Parameter 'qom-type' does not accept value '{kind}'");
            return Err(Failure::new(text));
        }
    }
    Ok(())
}

/// Whether a cache mode has a known name. All of them are served by one way of writing: everything is on
/// the disk when a command ends.
pub(crate) fn cache_mode(parsed: &Parsed, id: &str, what: &str) -> Outcome<()> {
    let Some(mode) = text(parsed, id) else {
        return Ok(());
    };
    match mode.as_str() {
        "none" | "off" | "directsync" | "writeback" | "writethrough" | "unsafe" => Ok(()),
        _ => Err(Failure::new(format!("Invalid {what} option: {mode}"))),
    }
}

/// A size on the command line; `what` names it in the error, for instance `image size`.
pub(crate) fn size(text: &str, what: &str) -> Outcome<u64> {
    match size::parse(text) {
        Ok(bytes) if bytes <= MAX_SIZE => Ok(bytes),
        Ok(_) | Err(BadSize::Range) => Err(Failure::new(format!(
            "Invalid {what} specified. Must be between 0 and {MAX_SIZE}."
        ))),
        Err(BadSize::Syntax) => Err(size_syntax(what)),
    }
}

/// The error for what is not written as a size.
pub(crate) fn size_syntax(what: &str) -> Failure {
    Failure::new(format!(
        "Invalid {what} specified. You may use k, M, G, T, P or E suffixes for\n\
         kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
    ))
}
