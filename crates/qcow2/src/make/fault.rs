//! Faults at call n of a new file's writes, for tests.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What happens at the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The call fails with this error number.
    Errno(i32),
}

/// Counts calls; the one with the number planned fails, and all behind it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Fault {
    planned: Option<(u64, Kind)>,
    calls: Arc<AtomicU64>,
}

thread_local! {
    static PLANNED: Cell<Option<(u64, Kind)>> = const { Cell::new(None) };
}

impl Fault {
    /// Every output that this thread starts from now on fails at call `at`.
    pub fn plan(at: u64, kind: Kind) {
        PLANNED.set(Some((at, kind)));
    }

    pub fn clear() {
        PLANNED.set(None);
    }

    pub fn planned() -> Self {
        Self {
            planned: PLANNED.get(),
            calls: Arc::default(),
        }
    }

    pub fn before(&self) -> io::Result<()> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        match self.planned {
            Some((at, Kind::Errno(number))) if call >= at => {
                Err(io::Error::from_raw_os_error(number))
            }
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use stead_sys::durable::{self, Existing};

    use super::*;
    use crate::chain::{Chain, LayerFile, LayerFormat};
    use crate::control::Control;
    use crate::header::Compression;
    use crate::make::{
        ConvertOptions, NewFormat, Preallocation, Qcow2Options, Target, convert, create,
    };

    const NO_SPACE: i32 = 28;
    const IO_ERROR: i32 = 5;

    fn new_file(path: &Path) -> Target {
        Target::New {
            path: path.to_owned(),
            mode: 0o600,
            existing: Existing::Replace,
        }
    }

    /// Makes a file with every call failing, from the first on, until none fails; says how many failed.
    ///
    /// The name has an earlier file, or none.
    fn fail_everywhere(path: &Path, make: impl Fn() -> crate::Result<()>) -> u64 {
        let folder = path.parent().expect("a folder");
        let others = std::fs::read_dir(folder).expect("list").count();
        for call in 0.. {
            let earlier = call % 2 == 0;
            let number = if call % 3 == 0 { IO_ERROR } else { NO_SPACE };
            if earlier {
                durable::publish(path, 0o600, b"earlier", Existing::Replace).expect("write");
            }
            Fault::plan(call, Kind::Errno(number));
            let made = make();
            Fault::clear();
            let Err(error) = made else {
                durable::remove_file(path).expect("remove");
                return call;
            };
            assert!(matches!(error, crate::Error::Io { .. }), "{error}");
            let left = std::fs::read_dir(folder).expect("list").count();
            if earlier {
                assert_eq!(
                    std::fs::read(path).expect("read"),
                    b"earlier",
                    "call {call}"
                );
                durable::remove_file(path).expect("remove");
            } else {
                assert!(!path.exists(), "call {call}");
            }
            assert_eq!(left, others + usize::from(earlier), "call {call}");
        }
        unreachable!("the loop ends when no call fails")
    }

    fn source(folder: &Path) -> Chain {
        let path = folder.join("source");
        let bytes: Vec<u8> = (0..6_u32 << 20)
            .map(|n| {
                if n % 100_000 < 50_000 {
                    (n % 251) as u8
                } else {
                    0
                }
            })
            .collect();
        durable::publish(&path, 0o600, &bytes, Existing::Keep).expect("write");
        Chain::open(&[LayerFile {
            path,
            format: LayerFormat::Raw,
        }])
        .expect("open")
    }

    #[test]
    fn no_failing_call_of_a_copy_leaves_a_file_or_harms_an_earlier_one() {
        let dir = tempfile::tempdir().expect("temp dir");
        let chain = source(dir.path());
        let path = dir.path().join("copy");
        let zstd = Qcow2Options {
            compression: Compression::Zstd,
            ..Qcow2Options::default()
        };
        let raw = NewFormat::Raw {
            preallocation: Preallocation::Off,
        };
        for (format, compressed) in [
            (NewFormat::Qcow2(Qcow2Options::default()), false),
            (NewFormat::Qcow2(zstd), true),
            (raw, false),
        ] {
            let options = ConvertOptions {
                format,
                compressed,
                ..ConvertOptions::default()
            };
            let failed = fail_everywhere(&path, || {
                convert(&chain, &new_file(&path), &options, &Control::default()).map(drop)
            });
            assert!(failed > 3, "{failed}");
        }
    }

    #[test]
    fn no_failing_call_of_an_empty_image_leaves_a_file_or_harms_an_earlier_one() {
        let dir = tempfile::tempdir().expect("temp dir");
        let path = dir.path().join("empty");
        for preallocation in [
            Preallocation::Off,
            Preallocation::Metadata,
            Preallocation::Full,
        ] {
            let format = NewFormat::Qcow2(Qcow2Options {
                preallocation,
                ..Qcow2Options::default()
            });
            let failed = fail_everywhere(&path, || {
                create(&new_file(&path), &format, 3 << 20, &Control::default()).map(drop)
            });
            assert!(failed > 3, "{failed}");
        }
    }
}
