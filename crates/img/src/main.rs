//! The command `stead img` by itself; under the name `qemu-img` it says so in its texts.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let called = args.next().unwrap_or_default();
    let args: Vec<OsString> = args.collect();
    stead_img::run(&args, stead_img::program_name(&called)).into()
}
