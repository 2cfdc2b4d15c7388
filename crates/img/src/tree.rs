//! What a command reports, as a tree: printed as JSON, or as indented lines for people.

use std::fmt::Write;

use serde_json::Value;

/// A value with its parts in the order in which they are printed.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Tree {
    /// A number.
    Number(u64),
    /// Yes or no.
    Flag(bool),
    /// A text.
    Text(String),
    /// Parts with names.
    Map(Vec<(&'static str, Tree)>),
    /// Parts in a row.
    List(Vec<Tree>),
}

impl From<u64> for Tree {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<bool> for Tree {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<&str> for Tree {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Tree {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl Tree {
    /// JSON in lines, four blanks a level, without an end of line at its end.
    pub fn json(&self) -> String {
        let mut text = String::new();
        self.write_json(0, &mut text);
        text
    }

    fn write_json(&self, level: usize, text: &mut String) {
        match self {
            Self::Number(number) => push(text, format_args!("{number}")),
            Self::Flag(flag) => push(text, format_args!("{flag}")),
            Self::Text(value) => push(text, format_args!("{}", Value::from(value.as_str()))),
            Self::Map(parts) => {
                text.push('{');
                for (index, (name, part)) in parts.iter().enumerate() {
                    next_line(index, level + 1, text);
                    push(text, format_args!("{}: ", Value::from(*name)));
                    part.write_json(level + 1, text);
                }
                end_of_parts(parts.len(), level, text);
                text.push('}');
            }
            Self::List(parts) => {
                text.push('[');
                for (index, part) in parts.iter().enumerate() {
                    next_line(index, level + 1, text);
                    part.write_json(level + 1, text);
                }
                end_of_parts(parts.len(), level, text);
                text.push(']');
            }
        }
    }

    /// Lines `name: value` for people, `level` times four blanks before them.
    pub fn human(&self, level: usize) -> String {
        let mut text = String::new();
        self.write_human(level, &mut text);
        text
    }

    fn write_human(&self, level: usize, text: &mut String) {
        match self {
            Self::Number(_) | Self::Flag(_) | Self::Text(_) => {
                push(text, format_args!("{}\n", self.scalar()));
            }
            Self::Map(parts) => {
                for (name, part) in parts {
                    part.write_named(&name.replace('-', " "), level, text);
                }
            }
            Self::List(parts) => {
                for (index, part) in parts.iter().enumerate() {
                    part.write_named(&format!("[{index}]"), level, text);
                }
            }
        }
    }

    fn write_named(&self, name: &str, level: usize, text: &mut String) {
        indent(level, text);
        match self {
            Self::Map(_) | Self::List(_) => {
                push(text, format_args!("{name}:\n"));
                self.write_human(level + 1, text);
            }
            Self::Number(_) | Self::Flag(_) | Self::Text(_) => {
                push(text, format_args!("{name}: {}\n", self.scalar()));
            }
        }
    }

    fn scalar(&self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Flag(flag) => flag.to_string(),
            Self::Text(text) => text.clone(),
            Self::Map(_) | Self::List(_) => unreachable!("only leaves are asked for their text"),
        }
    }
}

fn push(text: &mut String, what: std::fmt::Arguments<'_>) {
    match text.write_fmt(what) {
        Ok(()) => {}
        Err(_never) => unreachable!("a string takes every text"),
    }
}

fn indent(level: usize, text: &mut String) {
    for _ in 0..level {
        text.push_str("    ");
    }
}

fn next_line(index: usize, level: usize, text: &mut String) {
    text.push_str(if index == 0 { "\n" } else { ",\n" });
    indent(level, text);
}

fn end_of_parts(count: usize, level: usize, text: &mut String) {
    text.push('\n');
    if count > 0 || level > 0 {
        indent(level, text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Tree {
        let bitmap = Tree::Map(vec![
            ("flags", Tree::List(vec!["auto".into()])),
            ("name", "a \"b\"".into()),
            ("granularity", 65_536.into()),
        ]);
        Tree::Map(vec![
            ("compat", "1.1".into()),
            ("lazy-refcounts", false.into()),
            ("bitmaps", Tree::List(vec![bitmap])),
        ])
    }

    #[test]
    fn people_get_indented_lines_with_blanks_for_dashes() {
        let expected = "    compat: 1.1\n    lazy refcounts: false\n    bitmaps:\n        [0]:\n            \
                        flags:\n                [0]: auto\n            name: a \"b\"\n            \
                        granularity: 65536\n";
        assert_eq!(sample().human(1), expected);
    }

    #[test]
    fn programs_get_json_that_says_the_same() {
        let parsed: Value = serde_json::from_str(&sample().json()).expect("JSON");
        assert_eq!(parsed["bitmaps"][0]["name"], "a \"b\"");
        assert_eq!(parsed["bitmaps"][0]["flags"][0], "auto");
        assert_eq!(parsed["lazy-refcounts"], false);
        let empty: Value = serde_json::from_str(&Tree::List(vec![]).json()).expect("JSON");
        assert_eq!(empty, Value::Array(vec![]));
    }
}
