//! Content-addressed storage of VM state: chunks, trees, packs and manifests.
//!
//! A store is a folder or an S3 bucket. It keeps *checkpoints*, *templates* and *backups*: each is a
//! [`Manifest`] that names the content of disks and RAM as trees of chunks ([`tree`]). Chunks and nodes
//! lie compressed in packs ([`pack`]); index objects say where ([`index`]). Equal content is stored
//! once. docs/store-format.md has every byte.
//!
//! ```text
//!  Source ─▶ Publish::add_tree ─▶ packs ─▶ index object ─▶ manifest ─▶ listed, whole, durable
//!  manifest ─▶ TreeRef ─▶ Store::fetch_tree (store + local files, every chunk hashed) ─▶ File
//! ```
//!
//! What it promises: a manifest is written only after everything it names is durable, so what is
//! listed is whole; every byte that comes back has been hashed; and garbage collection never deletes
//! what a committed or still running publish needs ([`gc`]).
#![forbid(unsafe_code)]

mod backend;
mod core;
mod error;
mod fetch;
pub mod gc;
mod hash;
mod hashing;
mod homes;
pub mod index;
mod lease;
pub mod manifest;
mod naming;
pub mod pack;
mod pool;
mod progress;
pub mod publish;
mod source;
mod store;
pub mod tree;
mod verify;

pub use crate::core::{Access, Tuning};
pub use error::{Error, Result};
pub use fetch::{FetchReport, LocalSource};
pub use gc::{GcReport, IndexReport, Usage};
pub use hash::{HASH_BYTES, Hash, ParseHashError};
pub use hashing::{LocalIndex, hash_source};
pub use lease::{Lease, LeaseOwner, ListedLease, STORE_VERSION};
pub use manifest::{Disk, Kind, Lineage, Manifest, ManifestId, Producer, Role, SandboxName};
pub use progress::{Progress, Step};
pub use publish::{Base, Publish, PublishReport};
pub use source::{FileSource, Source};
pub use store::{BLOB_BYTES_MAX, ListedManifest, Store, names_a_store};
pub use tree::{BlobRef, ChunkSize, TreeRef};
pub use verify::{DamagedManifest, DamagedObject, VerifyReport};
