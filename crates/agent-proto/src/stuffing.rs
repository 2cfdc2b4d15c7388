//! Consistent overhead byte stuffing: a sequence of bytes without the byte zero.
//!
//! Each block is a code byte `n` (1 to 255) and `n - 1` bytes that are not zero; a zero follows
//! unless `n` is 255 or the block is the last. At most one byte in 254 is added.
//!
//! # Source
//! S. Cheshire, M. Baker: Consistent Overhead Byte Stuffing, IEEE/ACM Transactions on Networking 7(2), 1999.

/// How long `len` bytes can become.
pub(crate) const fn stuffed_limit(len: usize) -> usize {
    len + len / 254 + 1
}

/// Appends the stuffed form of `plain` to `out`.
pub(crate) fn stuff(plain: &[u8], out: &mut Vec<u8>) {
    let mut rest = plain;
    loop {
        let reach = rest.len().min(254);
        let run = rest[..reach].iter().position(|&byte| byte == 0);
        let length = run.unwrap_or(reach);
        // `length` is at most 254.
        out.push(length as u8 + 1);
        out.extend_from_slice(&rest[..length]);
        match run {
            // The zero after the run is implied by the next block, which may be empty.
            Some(_) => rest = &rest[length + 1..],
            None if length == rest.len() => return,
            None => rest = &rest[length..],
        }
    }
}

/// Undoes [`stuff`] in place; gives the plain length, or nothing when a block runs past the end.
pub(crate) fn unstuff(bytes: &mut [u8]) -> Option<usize> {
    let (mut read, mut write) = (0, 0);
    while read < bytes.len() {
        let code = usize::from(bytes[read]);
        let end = read + code;
        if code == 0 || end > bytes.len() {
            return None;
        }
        bytes.copy_within(read + 1..end, write);
        write += code - 1;
        read = end;
        if code != 255 && read < bytes.len() {
            bytes[write] = 0;
            write += 1;
        }
    }
    Some(write)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip(plain: &[u8]) {
        let mut stuffed = Vec::new();
        stuff(plain, &mut stuffed);
        assert!(
            !stuffed.contains(&0),
            "zero is kept for the space between frames"
        );
        assert!(stuffed.len() <= stuffed_limit(plain.len()));
        let length = unstuff(&mut stuffed).expect("what was stuffed can be undone");
        assert_eq!(&stuffed[..length], plain);
    }

    #[test]
    fn runs_around_the_block_size_come_back() {
        for length in [0, 1, 253, 254, 255, 256, 508, 509, 510] {
            round_trip(&vec![7; length]);
            round_trip(&vec![0; length]);
            let mut tail_zero = vec![7; length];
            tail_zero.push(0);
            round_trip(&tail_zero);
            tail_zero.insert(0, 0);
            round_trip(&tail_zero);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_come_back(plain in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..1200)) {
            round_trip(&plain);
        }

        #[test]
        fn any_bytes_are_undone_without_a_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..1200)) {
            let length = bytes.len();
            if let Some(plain) = unstuff(&mut bytes) {
                assert!(plain <= length);
            }
        }
    }
}
