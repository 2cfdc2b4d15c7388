//! Sizes: read as qemu-img reads them (`1.5G`, `64k`, `0x1000`), and written as it writes them.

/// The largest size that a disk can have, in bytes.
pub(crate) const MAX_SIZE: u64 = i64::MAX as u64;

/// Why a text is no size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadSize {
    /// It is not written as one.
    Syntax,
    /// It is more than 64 bits hold.
    Range,
}

/// Reads a size in bytes. Blanks and a plus sign may stand before it; the suffixes `b k M G T P E` are
/// powers of 1024; a fraction needs a suffix; hexadecimal is for whole numbers.
pub(crate) fn parse(text: &str) -> Result<u64, BadSize> {
    parse_with_unit(text, 1)
}

/// As [`parse`]; a number without a suffix counts `unit` bytes.
pub(crate) fn parse_with_unit(text: &str, unit: u64) -> Result<u64, BadSize> {
    let text = text.trim_ascii_start();
    let text = text.strip_prefix('+').unwrap_or(text);
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    if let Some(digits) = hex {
        return hexadecimal(digits);
    }
    let whole_end = digits_end(text);
    let (whole, rest) = text.split_at(whole_end);
    if whole.is_empty() {
        return Err(BadSize::Syntax);
    }
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits_end(rest)),
        None => ("", rest),
    };
    let scale = match suffix {
        "" => unit,
        suffix => 1_u64.checked_shl(shift(suffix)?).ok_or(BadSize::Range)?,
    };
    let part = scaled_fraction(fraction, scale);
    if scale == 1 && fraction.bytes().any(|digit| digit != b'0') {
        return Err(BadSize::Syntax);
    }
    let whole: u64 = whole.parse().map_err(|_all_digits| BadSize::Range)?;
    let bytes = whole.checked_mul(scale).ok_or(BadSize::Range)?;
    bytes.checked_add(part).ok_or(BadSize::Range)
}

fn digits_end(text: &str) -> usize {
    let other = text.find(|c: char| !c.is_ascii_digit());
    other.unwrap_or(text.len())
}

/// The bytes that `0.fraction` of `scale` are, rounded down.
fn scaled_fraction(fraction: &str, scale: u64) -> u64 {
    // More digits than these say nothing about a number below 2^60.
    let digits = &fraction[..fraction.len().min(18)];
    let number: u128 = digits.parse().unwrap_or(0);
    let of = 10_u128.pow(u32::try_from(digits.len()).unwrap_or(0));
    u64::try_from(number * u128::from(scale) / of).unwrap_or(0)
}

/// A suffix may follow here too (with a warning in qemu-img); only `b`, a digit, may not.
fn hexadecimal(text: &str) -> Result<u64, BadSize> {
    let end = text.find(|c: char| !c.is_ascii_hexdigit());
    let (digits, suffix) = text.split_at(end.unwrap_or(text.len()));
    if digits.is_empty() {
        return Err(BadSize::Syntax);
    }
    let number = u64::from_str_radix(digits, 16).map_err(|_all_digits| BadSize::Range)?;
    let shift = if suffix.is_empty() { 0 } else { shift(suffix)? };
    number.checked_mul(1 << shift).ok_or(BadSize::Range)
}

fn shift(suffix: &str) -> Result<u32, BadSize> {
    match suffix {
        "b" | "B" => Ok(0),
        "k" | "K" => Ok(10),
        "m" | "M" => Ok(20),
        "g" | "G" => Ok(30),
        "t" | "T" => Ok(40),
        "p" | "P" => Ok(50),
        "e" | "E" => Ok(60),
        _ => Err(BadSize::Syntax),
    }
}

/// Bytes for people, three significant digits: `1.5 MiB`, `64 MiB`.
pub(crate) fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    // The next unit from 1000 of this one on, so that three digits do.
    let reached = |unit: &u32| u128::from(bytes) * 1024 >= 1000 << (10 * unit);
    let unit = (1..7).take_while(reached).last().unwrap_or(0);
    let value = bytes as f64 / 1024_f64.powi(unit.cast_signed());
    format!("{} {}", three_digits(value), UNITS[unit as usize])
}

/// A number with at most three significant digits, without zeros at its end.
fn three_digits(value: f64) -> String {
    let decimals = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else if value >= 1.0 {
        2
    } else {
        3
    };
    let text = format!("{value:.decimals$}");
    if text == "1000" {
        return "1e+03".into();
    }
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, bytes) in [
            ("1000", 1000),
            ("1.5k", 1536),
            ("0x100000", 1 << 20),
            ("0x10k", 16384),
            (" 1M", 1 << 20),
            ("+5", 5),
            ("010", 10),
            ("1.M", 1 << 20),
            ("0.3k", 307),
            ("0.1G", 107_374_182),
            ("1b", 1),
            ("1E", 1 << 60),
            ("9223372036854775807", MAX_SIZE),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text:?}");
        }
    }

    #[test]
    fn what_qemu_img_does_not_take_is_no_size() {
        for text in [
            "", "M", "-1", "1.5", "1.5b", ".5M", "1MiB", "1M ", "1e3", "1e3k", "1Q", "infk", "0x",
            "x",
        ] {
            assert_eq!(parse(text), Err(BadSize::Syntax), "{text:?}");
        }
        for text in ["18446744073709551616", "99999999999T", "16E"] {
            assert_eq!(parse(text), Err(BadSize::Range), "{text:?}");
        }
    }

    #[test]
    fn a_unit_counts_only_where_no_suffix_is_given() {
        assert_eq!(parse_with_unit("2", 512), Ok(1024));
        assert_eq!(parse_with_unit("2b", 512), Ok(2));
    }

    #[test]
    fn sizes_are_written_with_three_digits_and_the_largest_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1_022_976, "999 KiB"),
            (1_023_488, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_072_693_248, "0.999 GiB"),
            (196 << 10, "196 KiB"),
            (1_576_960, "1.5 MiB"),
            (1_638_400, "1.56 MiB"),
            (67_108_864, "64 MiB"),
            (70_368_744_177_664, "64 TiB"),
        ] {
            assert_eq!(human(bytes), text, "{bytes}");
        }
    }
}
