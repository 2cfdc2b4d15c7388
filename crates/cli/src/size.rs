//! Sizes as people write them: `512M`, `1.5G`, `4096`. K, M, G, T are powers of 1024, as in qemu-img.

/// Parses a size into bytes.
///
/// # Errors
/// A sentence for the person who wrote it.
pub fn parse(text: &str) -> Result<u64, String> {
    let wrong =
        || format!("{text:?} is not a size; write for instance 512M, 2G or a number of bytes");
    let (number, shift) = match text.char_indices().next_back() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => {
            let shift = match unit.to_ascii_uppercase() {
                'B' => 0,
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                _ => return Err(wrong()),
            };
            (&text[..at], shift)
        }
        _ => (text, 0),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(wrong);
    }
    let fraction: f64 = number.parse().map_err(|_error| wrong())?;
    let bytes = fraction * f64::from(1_u32 << 10).powi(shift / 10);
    if !(0.0..=9.0e18).contains(&bytes) {
        return Err(wrong());
    }
    Ok(bytes as u64)
}

/// Bytes for people: `1.5 GiB`.
#[must_use]
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        return format!("{bytes} B");
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("2g"), Ok(2 << 30));
        assert_eq!(parse("1.5K"), Ok(1536));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for wrong in [
            "",
            "M",
            "-1",
            "-1.5G",
            "1Q",
            "nan",
            "inf",
            "99999999999T",
            "1 G x",
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
