//! Paths of the guest: bytes with `/` between.

use stead_agent_proto::message::Bytes;

/// The path of a name in a folder.
pub(super) fn join(folder: &Bytes, name: &[u8]) -> Bytes {
    let mut path = folder.0.clone();
    if path.last() != Some(&b'/') {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path.into()
}

/// The last component; nothing when there is none, or it is `.` or `..`.
pub(super) fn last(path: &Bytes) -> Option<&[u8]> {
    let name = path
        .0
        .split(|byte| *byte == b'/')
        .rfind(|name| !name.is_empty())?;
    (name != b"." && name != b"..").then_some(name)
}

/// Whether a path says that what it means is the folder's content: it ends with `/.` or is `.`.
pub(super) fn means_content(path: &[u8]) -> bool {
    path.ends_with(b"/.") || path == b"."
}

/// Whether a path says that it is a folder's.
pub(super) fn means_folder(path: &[u8]) -> bool {
    path.ends_with(b"/") || means_content(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart_and_put_together() {
        assert_eq!(join(&"/".into(), b"a"), "/a".into());
        assert_eq!(join(&"/a".into(), b"b"), "/a/b".into());
        assert_eq!(join(&"/a/".into(), b"b"), "/a/b".into());
        assert_eq!(last(&"/a/b//".into()), Some(b"b".as_slice()));
        for none in ["/", "/a/.", "/a/.."] {
            assert_eq!(last(&none.into()), None, "{none}");
        }
        assert!(means_content(b"a/.") && means_content(b".") && !means_content(b"a."));
        assert!(means_folder(b"a/") && means_folder(b"/") && !means_folder(b"/a"));
    }
}
