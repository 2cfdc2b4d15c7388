//! The whole of Steadfast against real QEMU guests, in one program: a test that waits for a guest leaves its core to others.
#![forbid(unsafe_code)]

mod backup;
mod backup_store;
mod cli;
mod clones;
mod commit;
mod compact;
mod crash;
mod damage;
mod demo;
mod exec;
mod files;
mod interrupted;
mod life;
mod restores;
mod save;
mod save_images;
mod save_shapes;
mod sessions;
mod space;
mod state;
mod transports;
mod two_workers;
