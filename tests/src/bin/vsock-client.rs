//! Talks to an agent at a vsock port of this machine, and fails when anything is not as it must be. For a guest, in which
//! the end-to-end tests run it.
#![forbid(unsafe_code)]

use stead_agent_link::Place;
use stead_tests::storm;

/// This machine.
const LOCAL: u32 = 1;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let port = std::env::args().nth(1).expect("usage: vsock-client PORT");
    let port = port.parse().expect("a port");
    let slowest = storm::weather(&Place::Vsock { cid: LOCAL, port }).await;
    println!("slowest {} ms", slowest.as_millis());
}
