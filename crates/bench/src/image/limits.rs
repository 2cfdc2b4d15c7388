//! What the machine could do at best: the same bytes, moved by nothing but the system.

use std::time::Instant;

use super::Images;
use crate::error::Result;
use crate::program;
use crate::report::{Report, Row, Value, median};

/// A plain copy of the base to `copied`.
#[derive(Debug)]
pub struct Limit {
    program: &'static str,
    beside: &'static str,
    arguments: fn(&Images) -> Vec<String>,
}

/// Where blocks are copied.
pub const COPIED: Limit = Limit {
    program: "dd",
    beside: "the limit: dd of the same bytes, direct and synced",
    arguments: |images| {
        let words = [
            &format!("if={}", images.path("base.raw")),
            &format!("of={}", images.path("copied")),
            &format!("count={}", images.data_bytes()),
            "iflag=count_bytes",
            "oflag=direct",
            "bs=4M",
            "conv=fsync",
            "status=none",
        ];
        words.map(ToOwned::to_owned).to_vec()
    },
};

/// Where blocks are shared.
pub const SHARED: Limit = Limit {
    program: "sh",
    beside: "the limit: cp --reflink of the base, synced",
    arguments: |images| {
        let (from, to) = (images.path("base.raw"), images.path("copied"));
        let script = format!("cp --reflink=always '{from}' '{to}' && sync '{to}'");
        vec!["-c".to_owned(), script]
    },
};

impl Limit {
    /// Adds a row that holds the figure of the last one against a plain copy, warm.
    ///
    /// # Errors
    /// When the copy fails.
    pub async fn beside_last(&self, images: &Images, report: &mut Report) -> Result<()> {
        let Some(last) = report.rows.last() else {
            return Ok(());
        };
        let (figure, ours) = (last.figure.clone(), last.ours);
        let mut times = Vec::new();
        for _ in 0..images.runs {
            rustix::fs::sync();
            let begun = Instant::now();
            program::run(self.program, &(self.arguments)(images)).await?;
            times.push(begun.elapsed());
            images.remove("copied")?;
        }
        report.rows.push(Row {
            figure,
            ours,
            peer: Value::Time(median(&times)),
            beside: self.beside.to_owned(),
            target: None,
        });
        Ok(())
    }
}
