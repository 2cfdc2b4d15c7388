//! Crediting and reseeding the kernel's random number generator.
//!
//! # Source
//! random(4): `RNDADDENTROPY` mixes bytes in and credits them, `RNDRESEEDCRNG` makes the generator
//! draw a new key from its pool at once.
#![allow(
    unsafe_code,
    reason = "no safe wrapper offers these two ioctls; each call argues its safety"
)]

use std::ffi::c_int;
use std::fs::File;
use std::io;

use rustix::ioctl::{self, NoArg, Opcode, Setter};

const RNDADDENTROPY: Opcode = ioctl::opcode::write::<[c_int; 2]>(b'R', 0x03);
const RNDRESEEDCRNG: Opcode = ioctl::opcode::none(b'R', 0x07);

/// How many bytes one call credits.
pub const SEED_BYTES: usize = 64;

/// `struct rand_pool_info` of linux/random.h with a buffer of [`SEED_BYTES`].
#[repr(C)]
struct PoolInfo {
    entropy_bits: c_int,
    buffer_bytes: c_int,
    buffer: [u8; SEED_BYTES],
}

const _: () = assert!(size_of::<PoolInfo>() == 8 + SEED_BYTES);

/// Mixes `seed` into the generator behind `random` (an open `/dev/urandom`) and credits all its bits.
///
/// # Errors
/// When the kernel refuses: the caller lacks `CAP_SYS_ADMIN`, or `random` is another device.
pub fn credit(random: &File, seed: &[u8; SEED_BYTES]) -> io::Result<()> {
    let info = PoolInfo {
        entropy_bits: (SEED_BYTES * 8) as c_int,
        buffer_bytes: SEED_BYTES as c_int,
        buffer: *seed,
    };
    // SAFETY: the opcode takes a pointer to `rand_pool_info`; `PoolInfo` has its layout (asserted
    // above), `buffer_bytes` is the length of the buffer that follows, and the kernel only reads.
    unsafe { ioctl::ioctl(random, Setter::<RNDADDENTROPY, PoolInfo>::new(info)) }?;
    Ok(())
}

/// Has the generator behind `random` draw a new key from its pool before this returns.
///
/// # Errors
/// As [`credit`].
pub fn rekey(random: &File) -> io::Result<()> {
    // SAFETY: the opcode takes no argument and touches no memory of ours.
    unsafe { ioctl::ioctl(random, NoArg::<RNDRESEEDCRNG>::new()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_device_is_refused() {
        let null = File::open("/dev/null").expect("open");
        for refused in [credit(&null, &[1; SEED_BYTES]), rekey(&null)] {
            let error = refused.expect_err("not a random device");
            assert_eq!(error.raw_os_error(), Some(25), "ENOTTY");
        }
    }
}
