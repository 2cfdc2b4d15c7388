//! Errors of opening an image in the words that scripts for qemu-img look for, ours below them.

use std::path::Path;

use stead_qcow2::Error;

use crate::failure::system_words;

/// The text on the first line, and what we can add to it (which may be nothing).
pub(crate) fn words(error: &Error) -> (String, String) {
    let Some(known) = known(error) else {
        return (error.to_string(), String::new());
    };
    let (first, rest) = known.split_once('\n').unwrap_or((&known, ""));
    let first = first.to_owned();
    if !rest.is_empty() {
        return (first, format!("{rest}\n{error}"));
    }
    let more = if matches!(error, Error::Io { .. } | Error::NotQcow2 { .. }) {
        String::new()
    } else {
        error.to_string()
    };
    (first, more)
}

/// The image that the error is about, where opening it is what failed.
pub(crate) fn image(error: &Error) -> Option<&Path> {
    if let Error::Io { path, .. }
    | Error::NotQcow2 { path, .. }
    | Error::UnknownVersion { path, .. }
    | Error::UnknownFeature { path, .. }
    | Error::UnknownFormat { path, .. }
    | Error::MarkedCorrupt { path, .. }
    | Error::InvalidField { path, .. }
    | Error::OutOfFile { path, .. }
    | Error::Encrypted { path, .. } = error
    {
        return Some(path);
    }
    None
}

fn known(error: &Error) -> Option<String> {
    if let Error::Io { path, source, .. } = error {
        let why = system_words(source);
        return Some(format!("Could not open '{}': {why}", path.display()));
    }
    if let Error::NotQcow2 { .. } = error {
        return Some("Image is not in qcow2 format".into());
    }
    if let Error::UnknownVersion { found, .. } = error {
        return Some(format!("Unsupported qcow2 version {found}"));
    }
    if let Error::UnknownFeature { bit, name, .. } = error {
        let name = match name.as_str() {
            "unnamed" => format!("Unknown incompatible feature: {:x}", 1_u64 << bit),
            named => named.to_owned(),
        };
        return Some(format!("Unsupported qcow2 feature(s): {name}"));
    }
    if let Error::InUse { path, .. } = error {
        let path = path.display();
        return Some(format!(
            "Failed to get \"write\" lock\nIs another process using the image [{path}]?"
        ));
    }
    if let Error::InvalidField { field, found, .. } = error {
        return field_words(field, *found);
    }
    if let Error::OutOfFile { what, .. } = error {
        return (*what == "the header").then(|| "qcow2 header too short".into());
    }
    None
}

fn field_words(field: &str, found: u64) -> Option<String> {
    match field {
        "cluster_bits" => Some(format!("Unsupported cluster size: 2^{found}")),
        "l1_table_offset" => Some("Active L1 table offset invalid".into()),
        "refcount_table_offset" => Some("Reference count table offset invalid".into()),
        _ => None,
    }
}
