//! Operations on an image, each one change of an [`crate::edit::Editor`].

pub mod bitmap;
pub mod commit;
pub mod rebase;
pub mod resize;
pub mod snapshot;
