//! Checks an image and says what was found: `cargo run --example check -- IMAGE`.

use stead_qcow2::{Layer, check};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("name an image")?;
    let report = check(&Layer::inspect(path.as_ref())?)?;
    for finding in &report.findings {
        println!("{finding}");
    }
    println!(
        "{} corruptions, {} leaks, {} of {} clusters used",
        report.corruptions, report.leaks, report.used_clusters, report.file_clusters
    );
    Ok(())
}
