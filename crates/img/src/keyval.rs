//! Lists of `key=value`, separated by commas; a comma in a value is written twice.

/// Takes a list apart. A key without a value is `on`, or `off` under its name without a leading `no`.
pub(crate) fn parse(list: &str) -> Vec<(String, String)> {
    let mut pairs = Vec::new();
    let mut rest = list;
    while !rest.is_empty() {
        let key_end = rest.find(['=', ',']).unwrap_or(rest.len());
        let key = rest[..key_end].to_owned();
        rest = &rest[key_end..];
        if let Some(value) = rest.strip_prefix('=') {
            let (value, behind) = take_value(value);
            pairs.push((key, value));
            rest = behind;
        } else {
            pairs.push(match key.strip_prefix("no") {
                Some(name) => (name.to_owned(), "off".to_owned()),
                None => (key, "on".to_owned()),
            });
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
    }
    pairs
}

/// The value up to the next comma that stands alone, and what follows that comma.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let Some(comma) = rest.find(',') else {
            value.push_str(rest);
            return (value, "");
        };
        value.push_str(&rest[..comma]);
        rest = &rest[comma + 1..];
        match rest.strip_prefix(',') {
            Some(behind) => {
                value.push(',');
                rest = behind;
            }
            None => return (value, rest),
        }
    }
}

/// A value as it must be written in a list.
pub(crate) fn quoted(value: &str) -> String {
    value.replace(',', ",,")
}

/// Whether a list can be joined to another: it is not empty and neither starts nor ends with a comma
/// that stands alone.
pub(crate) fn is_list(list: &str) -> bool {
    let at_start = list.bytes().take_while(|byte| *byte == b',').count();
    let at_end = list.bytes().rev().take_while(|byte| *byte == b',').count();
    !list.is_empty() && at_start == 0 && at_end.is_multiple_of(2)
}

/// Whether one of the list's entries asks for help: `help` or `?`.
pub(crate) fn asks_for_help(list: &str) -> bool {
    let whole = |entry: &str| entry == "help" || entry == "?";
    list.replace(",,", "\0").split(',').any(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(list: &str) -> Vec<(String, String)> {
        parse(list)
    }

    #[test]
    fn two_commas_are_one_comma_in_a_value() {
        let expected = [("a", "1,2"), ("b", ","), ("c", "")];
        let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(pairs("a=1,,2,b=,,,c="), expected);
        assert_eq!(quoted("1,2"), "1,,2");
    }

    #[test]
    fn a_key_alone_is_on_and_with_no_before_it_off() {
        let expected = [("lazy", "on"), ("lazy", "off")];
        let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(pairs("lazy,nolazy"), expected);
    }

    #[test]
    fn lists_that_cannot_be_joined_are_told_from_those_that_can() {
        for good in ["a", "a=1,b=2", "a=1,,", "?"] {
            assert!(is_list(good), "{good:?}");
        }
        for bad in ["", ",", "a,", ",a", "a=1,,,", ",,a"] {
            assert!(!is_list(bad), "{bad:?}");
        }
    }

    #[test]
    fn help_is_asked_for_by_a_whole_entry_only() {
        assert!(asks_for_help("help") && asks_for_help("a=1,?") && asks_for_help("help,a=1"));
        assert!(
            !asks_for_help("a=help") && !asks_for_help("a=1,,help") && !asks_for_help("helpful")
        );
    }
}
