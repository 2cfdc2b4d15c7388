//! The table of figures, and BENCHMARKS.md.

use std::fmt::Write;
use std::time::Duration;

/// One line of the table.
#[derive(Debug)]
pub struct Row {
    /// What was measured.
    pub figure: String,
    /// Our value.
    pub ours: Value,
    /// What it is compared with.
    pub peer: Value,
    /// The peer, in words.
    pub beside: String,
    /// The most that ours may be, as a multiple of the peer's; `None` where nothing was promised.
    pub target: Option<f64>,
}

/// A measured value.
#[derive(Debug, Clone, Copy)]
pub enum Value {
    /// A time.
    Time(Duration),
    /// A size in bytes.
    Bytes(u64),
    /// Bytes a second; more is better.
    Rate(f64),
}

impl Value {
    /// What is compared: less is better.
    fn cost(self) -> f64 {
        match self {
            Self::Time(time) => time.as_secs_f64(),
            Self::Bytes(bytes) => bytes as f64,
            Self::Rate(rate) => 1.0 / rate,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Time(time) => milliseconds(time),
            Self::Bytes(bytes) => megabytes(bytes),
            Self::Rate(rate) => format!("{:.0} MB/s", rate / 1e6),
        }
    }
}

impl Row {
    fn ratio(&self) -> f64 {
        self.ours.cost() / self.peer.cost()
    }

    /// Whether the target holds; `None` where there is none.
    pub fn held(&self) -> Option<bool> {
        Some(self.ratio() <= self.target?)
    }

    /// The row in Markdown.
    pub fn markdown(&self) -> String {
        let (target, held) = match (self.target, self.held()) {
            (Some(target), Some(held)) => {
                (format!("≤ {target}"), if held { "yes" } else { "**no**" })
            }
            _ => ("–".to_owned(), "–"),
        };
        format!(
            "| {} | {} | {} ({}) | {:.2} | {target} | {held} |\n",
            self.figure,
            self.ours.text(),
            self.peer.text(),
            self.beside,
            self.ratio()
        )
    }
}

/// Everything that a run has to say.
#[derive(Debug, Default)]
pub struct Report {
    /// Machine facts: name and value.
    pub facts: Vec<(&'static str, String)>,
    /// The figures.
    pub rows: Vec<Row>,
    /// Where our times go: heading, and parts.
    pub parts: Vec<(String, Vec<(String, String)>)>,
    /// Sentences below the table.
    pub notes: Vec<String>,
}

const HEAD: &str = "# Benchmarks\n\n\
    Written by `make bench`: everything below was measured in one run, ours beside the peer's on the same \
    machine, on the same guest. Medians; the ratio is ours divided by the peer's, less is better.\n\n";

const METHOD: &str = include_str!("method.md");

impl Report {
    /// The table alone.
    pub fn table(&self) -> String {
        let mut text = String::from(
            "| figure | ours | peer | ratio | target | held |\n|---|---|---|---|---|---|\n",
        );
        for row in &self.rows {
            text.push_str(&row.markdown());
        }
        text
    }

    /// The whole file.
    pub fn markdown(&self) -> String {
        let mut text = String::from(HEAD);
        for (name, value) in &self.facts {
            line(&mut text, format_args!("- {name}: {value}"));
        }
        text.push_str("\n## Figures\n\n");
        text.push_str(&self.table());
        text.push('\n');
        for note in &self.notes {
            line(&mut text, format_args!("- {note}"));
        }
        text.push_str("\n## Where our time goes\n\n");
        for (heading, parts) in &self.parts {
            let list: Vec<String> = parts
                .iter()
                .map(|(name, value)| format!("{name} {value}"))
                .collect();
            line(&mut text, format_args!("- {heading}: {}", list.join(", ")));
        }
        text.push('\n');
        text.push_str(METHOD);
        text
    }
}

fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    writeln!(text, "{content}").unwrap_or_default();
}

/// A time for people.
pub fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}

/// A size for people.
pub fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// The middle value; the upper one of two.
///
/// # Panics
/// When there is none.
pub fn median<T: Ord + Copy>(values: &[T]) -> T {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    assert!(!sorted.is_empty(), "something was measured");
    sorted[sorted.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: Value, peer: Value, target: Option<f64>) -> Row {
        Row {
            figure: "f".to_owned(),
            ours,
            peer,
            beside: "p".to_owned(),
            target,
        }
    }

    #[test]
    fn a_target_is_held_up_to_its_value_and_not_beyond() {
        let time = |ms| Value::Time(Duration::from_millis(ms));
        assert_eq!(row(time(50), time(100), Some(0.5)).held(), Some(true));
        assert_eq!(row(time(51), time(100), Some(0.5)).held(), Some(false));
        assert_eq!(row(time(51), time(100), None).held(), None);
        assert!(
            row(time(51), time(100), Some(0.5))
                .markdown()
                .contains("**no**")
        );
    }

    #[test]
    fn a_higher_rate_is_better() {
        assert_eq!(
            row(Value::Rate(2e6), Value::Rate(1e6), Some(0.5)).held(),
            Some(true)
        );
        assert_eq!(
            row(Value::Rate(1e6), Value::Rate(2e6), Some(0.5)).held(),
            Some(false)
        );
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[9, 1, 5]), 5);
        assert_eq!(median(&[2]), 2);
        assert_eq!(median(&[4, 1, 3, 2]), 3);
    }
}
