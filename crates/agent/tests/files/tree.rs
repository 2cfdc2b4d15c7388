//! Trees to copy, and what is the same in two of them.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// What a tree has under one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    mode: u32,
    modified: Option<(i64, i64)>,
    content: Vec<u8>,
    is_sparse: bool,
}

pub fn file(path: &Path, content: &[u8]) {
    stead_sys::durable::publish(path, 0o644, content, stead_sys::durable::Existing::Replace)
        .expect("write");
}

/// Bytes that no two places of a file share.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A tree with one of everything that is copied.
pub fn make(root: &Path) {
    fs::create_dir_all(root.join("deep/er/est")).expect("folders");
    fs::create_dir(root.join("empty")).expect("folder");
    file(&root.join("nothing"), b"");
    file(&root.join("text"), b"hello\n");
    file(&root.join("deep/noise"), &noise(100_000, 1));
    file(&root.join("deep/er/est/\u{e9} \n'\"name"), b"odd name");
    let sparse = File::options();
    let sparse = sparse
        .clone()
        .write(true)
        .create_new(true)
        .open(root.join("sparse"));
    let sparse = sparse.expect("sparse file");
    sparse.set_len(8 << 20).expect("grow");
    sparse
        .write_all_at(&noise(70_000, 2), 3 << 20)
        .expect("write");
    symlink("../nowhere/../text", root.join("deep/link")).expect("link");
    symlink("/etc", root.join("outward")).expect("link");
    let mode = |name: &str, mode| {
        fs::set_permissions(root.join(name), Permissions::from_mode(mode)).expect("mode");
    };
    mode("text", 0o741);
    mode("nothing", 0o400);
    mode("deep/er", 0o710);
    let old = SystemTime::UNIX_EPOCH + Duration::new(1_000_000_007, 123_456_789);
    for name in ["text", "sparse", "deep/er", "empty"] {
        let file = File::open(root.join(name)).expect("open");
        file.set_modified(old).expect("time");
    }
}

/// All names below a folder with what is the same in a copy.
pub fn see(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut seen = BTreeMap::new();
    let mut left = vec![PathBuf::new()];
    while let Some(at) = left.pop() {
        for entry in fs::read_dir(root.join(&at)).expect("list") {
            let name = at.join(entry.expect("entry").file_name());
            let metadata = fs::symlink_metadata(root.join(&name)).expect("stat");
            if metadata.is_dir() {
                left.push(name.clone());
            }
            seen.insert(name.clone(), one(&root.join(&name), &metadata));
        }
    }
    seen
}

fn one(path: &Path, metadata: &fs::Metadata) -> Seen {
    let is_link = metadata.file_type().is_symlink();
    let content = if is_link {
        fs::read_link(path)
            .expect("link")
            .into_os_string()
            .into_encoded_bytes()
    } else if metadata.is_dir() {
        b"folder".to_vec()
    } else {
        fs::read(path).expect("read")
    };
    Seen {
        mode: metadata.mode(),
        modified: (!is_link).then(|| (metadata.mtime(), metadata.mtime_nsec())),
        content,
        is_sparse: metadata.is_file() && metadata.blocks() * 512 + 65_536 < metadata.len(),
    }
}
