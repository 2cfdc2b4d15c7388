//! What the store promises, attacked from outside: on folders and on S3, with lost calls, damaged
//! objects, and garbage collection in every order beside a publish.
#![allow(clippy::unwrap_used, reason = "in tests a panic is the report")]

mod conformance;
mod creation;
mod damage;
mod fixture;
mod golden;
mod homes;
mod interleavings;
mod killed;
mod locks;
mod opening;
mod properties;
mod ratio;
mod read_back;
mod s3;
