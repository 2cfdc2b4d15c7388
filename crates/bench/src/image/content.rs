//! What the images hold.

use std::io::{BufWriter, Write};
use std::path::Path;

use stead_sys::durable;

use super::Images;
use crate::error::{Doing, Result};
use crate::program;

/// Writes `data` bytes that nothing can compress, in a file of `length` bytes.
///
/// # Errors
/// When that cannot be written.
pub fn write_random(to: &Path, data: u64, length: u64) -> Result<()> {
    let doing = "write random bytes";
    let file = durable::create_scratch(to, 0o600).doing(doing)?;
    let mut stream = blake3::Hasher::new().finalize_xof();
    let mut out = BufWriter::with_capacity(0, &file);
    let mut bytes = vec![0; 1 << 20];
    let mut left = data;
    while left > 0 {
        let step = usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()));
        stream.fill(&mut bytes[..step]);
        out.write_all(&bytes[..step]).doing(doing)?;
        left -= step as u64;
    }
    drop(out);
    file.set_len(length).doing(doing)?;
    file.sync_all().doing(doing)
}

/// Makes `name`, a qcow2 disk with an ext4 file system half full of files of this machine's `/usr`.
///
/// # Errors
/// When a program fails.
pub async fn write_tree(images: &Images, name: &str) -> Result<()> {
    let (tree, raw) = (images.folder.join("tree"), images.path("tree.raw"));
    durable::create_dir(&tree, 0o700).doing("create a folder")?;
    let tree_bytes = images.disk_bytes / 2;
    // The same files on every run of one machine: in order, as many as fit.
    let script = format!(
        "cd /usr && find bin sbin lib share include -xdev -type f -printf '%s %p\\n' | LC_ALL=C sort -k2 \
         | awk '{{ sum += $1; if (sum > {tree_bytes}) exit; print substr($0, index($0, \" \") + 1) }}' \
         | tar --create --files-from=- | tar --extract --directory='{}'",
        tree.display()
    );
    program::run("sh", &["-c", &script]).await?;
    let arguments = [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-d",
        &tree.display().to_string(),
        &raw,
        &format!("{}k", images.disk_bytes >> 10),
    ];
    program::run("mke2fs", &arguments).await?;
    durable::remove_tree(&tree).doing("remove a folder")?;
    let arguments = ["convert", "-O", "qcow2", &raw, &images.path(name)];
    program::run("qemu-img", &arguments).await?;
    images.remove("tree.raw")
}
