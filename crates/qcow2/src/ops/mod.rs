//! Operations on an image, each one change of an [`crate::edit::Editor`].

pub mod amend;
pub mod bitmap;
pub mod commit;
pub mod rebase;
pub mod repair;
pub mod resize;
pub mod restore;
pub mod snapshot;
