//! A guest's unpacked root file system, changed from outside without ever following a link out of it.

use std::fs::{self, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use stead_sys::durable;

use crate::error::{OnPath, TemplateError};

/// A folder that holds a root file system, owned by the build.
///
/// Guest files are full of absolute links (`/etc/resolv.conf` → `/run/…`). Every path given here is
/// walked one component at a time; a link on the way is refused, and one at its end is replaced.
#[derive(Debug)]
pub(crate) struct GuestTree {
    root: PathBuf,
}

/// The search path inside a guest, whatever the host's is.
const GUEST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A command that runs `program` of the guest with the folder `root` as its root.
pub(crate) fn inside(root: &Path, program: &str) -> Command {
    let mut command = Command::new("chroot");
    command.arg(root).arg(program).env("PATH", GUEST_PATH);
    command
}

impl GuestTree {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Puts a file at `path` with the permission bits `mode`, in place of what was there.
    pub(crate) fn put(&self, path: &str, mode: u32, bytes: &[u8]) -> Result<(), TemplateError> {
        let target = self.vacate(path)?;
        let write = || {
            let mut file = durable::create_scratch(&target, mode)?;
            file.write_all(bytes)?;
            // The mode of a new file is cut by the umask.
            file.set_permissions(Permissions::from_mode(mode))
        };
        write().on("writing", &target)
    }

    /// Puts a symbolic link to `to` at `path`, in place of what was there.
    pub(crate) fn link(&self, path: &str, to: &str) -> Result<(), TemplateError> {
        let target = self.vacate(path)?;
        symlink(to, &target).on("linking", &target)
    }

    /// Makes the folder at `path`, and those on the way, with the permission bits `mode`.
    pub(crate) fn make_folder(&self, path: &str, mode: u32) -> Result<(), TemplateError> {
        let folder = self.folder(Path::new(path))?;
        fs::set_permissions(&folder, Permissions::from_mode(mode)).on("changing", &folder)
    }

    /// Removes all entries of the folder at `path`.
    pub(crate) fn empty(&self, path: &str) -> Result<(), TemplateError> {
        let folder = self.folder(Path::new(path))?;
        for entry in fs::read_dir(&folder).on("listing", &folder)? {
            let path = entry.on("listing", &folder)?.path();
            if is_dir(&path).on("reading", &path)? {
                durable::remove_tree(&path).on("removing", &path)?;
            } else {
                durable::remove_file(&path).on("removing", &path)?;
            }
        }
        Ok(())
    }

    /// Reads the file at `path`, at most `bytes_max` of it.
    pub(crate) fn read(&self, path: &str, bytes_max: u64) -> Result<String, TemplateError> {
        let path = self.parent_and_name(path)?;
        let length = fs::symlink_metadata(&path).on("reading", &path)?;
        if !length.is_file() || length.len() > bytes_max {
            return Err(TemplateError::Unsuitable {
                path,
                found: format!("no file, or one of {} bytes", length.len()),
                expected: format!("a file of at most {bytes_max} bytes"),
            });
        }
        fs::read_to_string(&path).on("reading", &path)
    }

    /// The host's path of `path`, whose folder exists and which itself does not.
    fn vacate(&self, path: &str) -> Result<PathBuf, TemplateError> {
        let target = self.parent_and_name(path)?;
        if is_dir(&target).on("reading", &target)? {
            return Err(TemplateError::Unsuitable {
                path: target,
                found: "a folder".to_owned(),
                expected: "a file, a link, or nothing".to_owned(),
            });
        }
        durable::remove_file(&target).on("removing", &target)?;
        Ok(target)
    }

    fn parent_and_name(&self, path: &str) -> Result<PathBuf, TemplateError> {
        let path = Path::new(path);
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            unreachable!(
                "the paths of the build are its own and name a file: {}",
                path.display()
            );
        };
        Ok(self.folder(parent)?.join(name))
    }

    /// Walks to the folder `path`, making what is missing of it.
    fn folder(&self, path: &Path) -> Result<PathBuf, TemplateError> {
        let mut at = self.root.clone();
        for component in path.components() {
            match component {
                Component::RootDir => continue,
                Component::Normal(name) => at.push(name),
                Component::Prefix(_) | Component::CurDir | Component::ParentDir => {
                    unreachable!(
                        "the paths of the build are its own and plain: {}",
                        path.display()
                    )
                }
            }
            match fs::symlink_metadata(&at) {
                Ok(metadata) if metadata.is_dir() => {}
                Ok(_) => {
                    return Err(TemplateError::Unsuitable {
                        path: at,
                        found: "a link or a file".to_owned(),
                        expected: "a folder of the guest".to_owned(),
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let make = || {
                        fs::create_dir(&at)?;
                        fs::set_permissions(&at, Permissions::from_mode(0o755))
                    };
                    make().on("creating", &at)?;
                }
                Err(error) => return Err(error).on("reading", &at),
            }
        }
        Ok(at)
    }
}

/// Whether `path` is a folder itself, not a link to one; nothing there is no folder.
fn is_dir(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(metadata.is_dir()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::disallowed_methods,
        reason = "scratch files of a test need not last"
    )]

    use super::*;

    fn tree() -> (tempfile::TempDir, GuestTree) {
        let folder = tempfile::tempdir().expect("temp dir");
        let tree = GuestTree::new(folder.path().to_owned());
        (folder, tree)
    }

    #[test]
    fn a_link_at_the_end_is_replaced_not_followed() {
        let (folder, tree) = tree();
        let outside = tempfile::tempdir().expect("temp dir");
        let victim = outside.path().join("victim");
        fs::write(&victim, "mine").expect("victim");
        fs::create_dir(folder.path().join("etc")).expect("etc");
        symlink(&victim, folder.path().join("etc/hostname")).expect("link");
        tree.put("/etc/hostname", 0o644, b"guest\n").expect("put");
        assert_eq!(fs::read_to_string(&victim).expect("victim"), "mine");
        assert_eq!(tree.read("/etc/hostname", 100).expect("read"), "guest\n");
    }

    #[test]
    fn a_link_on_the_way_is_refused() {
        let (folder, tree) = tree();
        let outside = tempfile::tempdir().expect("temp dir");
        symlink(outside.path(), folder.path().join("etc")).expect("link");
        let error = tree
            .put("/etc/hostname", 0o644, b"guest\n")
            .expect_err("a link on the way");
        assert!(matches!(error, TemplateError::Unsuitable { .. }), "{error}");
        assert_eq!(fs::read_dir(outside.path()).expect("list").count(), 0);
        assert!(tree.empty("/etc").is_err());
    }

    #[test]
    fn files_get_their_mode_whatever_the_umask() {
        let (folder, tree) = tree();
        tree.put("/usr/local/sbin/agent", 0o4755, b"x")
            .expect("put");
        let mode = fs::metadata(folder.path().join("usr/local/sbin/agent"))
            .expect("file")
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o4755);
    }

    #[test]
    fn emptying_removes_links_and_not_what_they_point_to() {
        let (folder, tree) = tree();
        let outside = tempfile::tempdir().expect("temp dir");
        fs::write(outside.path().join("keep"), "k").expect("file");
        fs::create_dir_all(folder.path().join("a/b/c")).expect("folders");
        symlink(outside.path(), folder.path().join("a/link")).expect("link");
        tree.empty("/a").expect("empty");
        assert_eq!(
            fs::read_dir(folder.path().join("a")).expect("list").count(),
            0
        );
        assert!(outside.path().join("keep").exists());
    }
}
