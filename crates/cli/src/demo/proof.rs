//! What was proved, and how long things took.

use std::time::Duration;

use serde::Serialize;

use crate::print;

#[derive(Debug, Serialize)]
struct Row {
    what: String,
    held: Option<bool>,
    seconds: Option<f64>,
    detail: String,
}

/// The table that the demo ends with.
pub struct Proofs {
    rows: Vec<Row>,
    json: bool,
}

impl Proofs {
    pub fn new(json: bool) -> Self {
        Self {
            rows: Vec::new(),
            json,
        }
    }

    /// A claim and whether it held.
    pub fn held(&mut self, what: &str, held: bool, detail: String) {
        self.add(Row {
            what: what.to_owned(),
            held: Some(held),
            seconds: None,
            detail,
        });
    }

    /// A step and how long it took.
    pub fn step(&mut self, what: &str, took: Duration, detail: String) {
        self.add(Row {
            what: what.to_owned(),
            held: None,
            seconds: Some(took.as_secs_f64()),
            detail,
        });
    }

    fn add(&mut self, row: Row) {
        if !self.json {
            print::line(&shown(&row).join("  "));
        }
        self.rows.push(row);
    }

    /// Prints the table; 0 only if every claim held and there was one.
    pub fn print(&self, took: Duration) -> u8 {
        let claims = self.rows.iter().filter(|row| row.held.is_some()).count();
        let held = self
            .rows
            .iter()
            .filter(|row| row.held == Some(true))
            .count();
        let all = claims > 0 && claims == held;
        if self.json {
            print::json(&serde_json::json!({
                "all_held": all, "claims": claims, "held": held,
                "seconds": took.as_secs_f64(), "rows": self.rows,
            }));
        } else {
            print::line("");
            print::table(
                ["", "TIME", "WHAT", "DETAIL"],
                self.rows.iter().map(|row| {
                    let [mark, time, what, detail] = shown(row);
                    [mark, time, what, detail]
                }),
            );
            print::line(&format!(
                "\n{held} of {claims} claims held, {:.1} s in all",
                took.as_secs_f64()
            ));
        }
        u8::from(!all)
    }
}

fn shown(row: &Row) -> [String; 4] {
    [
        match row.held {
            Some(true) => "proved",
            Some(false) => "FAILED",
            None => "",
        }
        .to_owned(),
        row.seconds.map(|s| format!("{s:.2} s")).unwrap_or_default(),
        row.what.clone(),
        row.detail.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn success_is_only_where_every_claim_held_and_there_was_one() {
        let status = |claims: &[bool]| {
            let mut proofs = Proofs::new(true);
            proofs.step("a step", Duration::from_secs(1), String::new());
            for held in claims {
                proofs.held("a claim", *held, String::new());
            }
            proofs.print(Duration::from_secs(1))
        };
        assert_eq!(status(&[true, true]), 0);
        assert_eq!(status(&[true, false]), 1);
        assert_eq!(status(&[]), 1);
    }
}
