//! QEMU's migration stream, read without QEMU: [`walk`] goes through it section by section to its end
//! mark and proves its structure; [`split_ram`] takes the pages of one RAM block out of it, and [`Join`] puts them in.
//!
//! # The stream
//! All numbers are big-endian. A *name* is one byte of length and that many bytes.
//! ```text
//! be32 "QEVM"  be32 3                                   magic, version
//! 07  be32 length, machine type  subsections            configuration
//! 08  be16 command  be16 length  data                   command
//! 01  be32 id  name  be32 instance  be32 version  data  section start   } RAM: one start,
//! 02  be32 id  data                                     section part    } parts, one end
//! 03  be32 id  data                                     section end     }
//! 04  be32 id  name  be32 instance  be32 version  data  full section      a device
//! 7e  be32 id                                           footer, behind each section
//! 00                                                    end mark
//! 06  be32 length  JSON                                 description of the device sections
//! ```
//! With the capability `mapped-ram` the list of RAM blocks has a bitmap and the pages of each ([`walk_mapped`]); else
//! RAM data is records of `be64 address | flags`; the other sections have no length of their own, and
//! only the description at the end of the file says how many bytes each field has.
//!
//! # What a walk proves, and what it cannot
//! It proves that the stream has its beginning, all its sections, its end mark and nothing behind it;
//! that every section starts and ends where the description says; that every device described is
//! there once, in its version; and that RAM records lie in their blocks. A stream cut off at any byte
//! is found, and so is a flipped bit in a mark, a length, a name, an id or a page address out of bounds.
//!
//! The format has no checksums: a flipped bit in a register, in a page or in a page address that stays
//! in its block is *not* found. Only a content hash over the whole file finds that. Nor does a walk
//! prove that a QEMU with another command line will take the stream.
//!
//! # Source
//! QEMU's `docs/devel/migration`, `migration/savevm.c` and `migration/ram.c`, versions 7.2 to 10.0.

#![forbid(unsafe_code)]

mod configuration;
mod description;
mod error;
mod input;
mod join;
mod mapped;
mod ram;
mod split;
mod walk;

pub use error::{Error, Result};
pub use join::Join;
pub use ram::{PAGE_BYTES, Page, RamBlock, RamCount};
pub use split::{MAX_DEVICE_STATE_BYTES, Split, split_ram};
pub use walk::{Options, Section, StreamReport, walk, walk_bytes, walk_mapped};
