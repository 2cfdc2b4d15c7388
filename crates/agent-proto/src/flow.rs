//! Credit: how many bytes of a stream may be on the way.
//!
//! The receiver of a stream grants bytes, the sender spends them. Both begin with the same window,
//! [`STREAM_WINDOW_BYTES`] unless the receiver has said another. What is granted, kept by the receiver and not yet
//! granted again is always one window in sum, so a slow reader costs one window of memory and no more.

use crate::ProtocolError;

/// The credit that a stream begins with unless the receiver says less, and the most that it ever has.
pub const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// What one frame of a stream carries at most.
pub const MAX_CHUNK_BYTES: usize = 32 * 1024;
/// The least window that a receiver may begin with.
pub const MIN_WINDOW_BYTES: u32 = 4096;

/// The sender's side: what it may still send.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SendWindow {
    available_bytes: u32,
    window_bytes: u32,
}

impl Default for SendWindow {
    fn default() -> Self {
        Self::new(STREAM_WINDOW_BYTES)
    }
}

impl SendWindow {
    /// A stream whose receiver begins with `window_bytes`.
    #[must_use]
    pub fn new(window_bytes: u32) -> Self {
        Self {
            available_bytes: window_bytes,
            window_bytes,
        }
    }

    /// How many bytes the next frame may carry.
    #[must_use]
    pub fn next_chunk_bytes(&self) -> usize {
        usize::try_from(self.available_bytes)
            .map_or(MAX_CHUNK_BYTES, |bytes| bytes.min(MAX_CHUNK_BYTES))
    }

    /// Notes that `bytes` were sent.
    ///
    /// # Panics
    /// When more is sent than [`SendWindow::next_chunk_bytes`] allowed: a fault of the caller.
    pub fn spend(&mut self, bytes: usize) {
        assert!(
            bytes <= self.next_chunk_bytes(),
            "more was sent than was granted"
        );
        // At most MAX_CHUNK_BYTES.
        self.available_bytes -= bytes as u32;
    }

    /// Notes that the receiver granted `bytes` more.
    ///
    /// # Errors
    /// [`ProtocolError::OverGrant`] when that is nothing, or more than a window in sum.
    pub fn grant(&mut self, bytes: u32) -> Result<(), ProtocolError> {
        match self.available_bytes.checked_add(bytes) {
            Some(sum) if bytes > 0 && sum <= self.window_bytes => {
                self.available_bytes = sum;
                Ok(())
            }
            Some(_) | None => Err(ProtocolError::OverGrant {
                granted_bytes: self.window_bytes - self.available_bytes,
                found_bytes: bytes,
            }),
        }
    }
}

/// The receiver's side: what may still come, and what is due to be granted again.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ReceiveWindow {
    granted_bytes: u32,
    consumed_bytes: u32,
    window_bytes: u32,
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self::new(STREAM_WINDOW_BYTES)
    }
}

impl ReceiveWindow {
    /// A stream that keeps at most `window_bytes`.
    #[must_use]
    pub fn new(window_bytes: u32) -> Self {
        Self {
            granted_bytes: window_bytes,
            consumed_bytes: 0,
            window_bytes,
        }
    }

    /// The most that it keeps.
    #[must_use]
    pub fn window_bytes(&self) -> u32 {
        self.window_bytes
    }

    /// What has come and was not passed on.
    #[must_use]
    pub fn kept_bytes(&self) -> u32 {
        self.window_bytes - self.granted_bytes - self.consumed_bytes
    }

    /// Notes that a frame with `bytes` came.
    ///
    /// # Errors
    /// [`ProtocolError::OverGrant`] when the frame is empty, too large or more than was granted.
    pub fn receive(&mut self, bytes: usize) -> Result<(), ProtocolError> {
        let found_bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        if bytes == 0 || bytes > MAX_CHUNK_BYTES || found_bytes > self.granted_bytes {
            return Err(ProtocolError::OverGrant {
                granted_bytes: self.granted_bytes,
                found_bytes,
            });
        }
        self.granted_bytes -= found_bytes;
        Ok(())
    }

    /// Notes that `bytes` of what came have been passed on; gives what to grant now, if it is time to.
    ///
    /// # Panics
    /// When more is passed on than came: a fault of the caller.
    pub fn consume(&mut self, bytes: usize) -> Option<u32> {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        assert!(bytes <= self.kept_bytes(), "more was passed on than came");
        self.consumed_bytes += bytes;
        // Steps of a quarter keep grants few; the sender has more than half a window left then.
        if self.consumed_bytes < self.window_bytes / 4 {
            return None;
        }
        let grant = std::mem::take(&mut self.consumed_bytes);
        self.granted_bytes += grant;
        Some(grant)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_empty_frame_and_one_over_the_grant_are_refused() {
        let mut window = ReceiveWindow::default();
        assert!(window.receive(0).is_err());
        assert!(window.receive(MAX_CHUNK_BYTES + 1).is_err());
        for _ in 0..8 {
            window.receive(MAX_CHUNK_BYTES).expect("granted");
        }
        assert!(window.receive(1).is_err());
        assert!(SendWindow::default().grant(1).is_err());
        assert!(SendWindow::default().grant(0).is_err());
    }

    proptest! {
        #[test]
        fn a_sender_that_waits_for_credit_always_goes_on(steps in prop::collection::vec((1usize..50_000, 0usize..400_000), 1..200)) {
            let (mut sender, mut receiver, mut kept) = (SendWindow::default(), ReceiveWindow::default(), 0usize);
            for (send, take) in steps {
                let bytes = send.min(sender.next_chunk_bytes());
                if bytes > 0 {
                    sender.spend(bytes);
                    receiver.receive(bytes).expect("the sender keeps to its credit");
                    kept += bytes;
                }
                assert!(kept <= STREAM_WINDOW_BYTES as usize);
                let take = take.min(kept);
                kept -= take;
                if let Some(grant) = receiver.consume(take) {
                    sender.grant(grant).expect("the receiver grants what it has passed on");
                }
                assert!(kept > 0 || sender.next_chunk_bytes() > 0, "all is passed on and nothing may be sent");
            }
        }
    }
}
