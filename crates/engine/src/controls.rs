//! What a caller tells a command that runs in a guest.

use tokio::sync::mpsc;

/// What a command is told while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Its process group gets this signal, 1 to 31.
    Signal(i32),
    /// Its terminal has another size.
    Resize {
        /// Its height in lines.
        rows: u16,
        /// Its width in characters.
        cols: u16,
    },
    /// It is left, and goes on.
    Detach,
}

/// What is told, in its order; for ever nothing when nobody tells anything any more.
pub(crate) struct Controls {
    told: mpsc::Receiver<Told>,
    // The last size that came while nobody could be told.
    size: Option<(u16, u16)>,
}

impl Controls {
    pub(crate) fn new(told: mpsc::Receiver<Told>) -> Self {
        Self { told, size: None }
    }

    /// What is told next. Nothing is lost when this is dropped.
    pub(crate) async fn next(&mut self) -> Told {
        match self.told.recv().await {
            Some(told) => told,
            None => std::future::pending().await,
        }
    }

    /// What is told next that a command must not run without; a size is kept until it runs.
    pub(crate) async fn next_urgent(&mut self) -> Told {
        loop {
            match self.next().await {
                Told::Resize { rows, cols } => self.size = Some((rows, cols)),
                urgent @ (Told::Signal(_) | Told::Detach) => return urgent,
            }
        }
    }

    /// The size that was told before the command ran.
    pub(crate) fn take_size(&mut self) -> Option<(u16, u16)> {
        self.size.take()
    }
}
