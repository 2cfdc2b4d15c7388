//! Frames over a stream: what has come and is not taken yet, what must go and is not written yet.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use stead_agent_proto::frame::{Decoder, Item};

use crate::transport::Transport;

const READ_BYTES: usize = 64 * 1024;

/// The two ways of a stream.
pub(crate) type Reader = ReadHalf<Box<dyn Transport>>;
pub(crate) type Writer = WriteHalf<Box<dyn Transport>>;

/// A stream with its unfinished business.
#[derive(Debug)]
pub(crate) struct Wire {
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
    pub(crate) incoming: Incoming,
    pub(crate) outgoing: Outgoing,
}

/// What has come.
#[derive(Debug)]
pub(crate) struct Incoming {
    decoder: Decoder,
    buffer: Vec<u8>,
    taken: usize,
    filled: usize,
}

/// What must go.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    bytes: Vec<u8>,
    written: usize,
}

impl Wire {
    pub(crate) fn new(stream: Box<dyn Transport>) -> Self {
        let (reader, writer) = tokio::io::split(stream);
        Self {
            reader,
            writer,
            incoming: Incoming {
                decoder: Decoder::new(),
                buffer: vec![0; READ_BYTES],
                taken: 0,
                filled: 0,
            },
            outgoing: Outgoing::default(),
        }
    }

    /// Writes what must go and reads until the next item, both at once, so that neither side waits for the other.
    /// Nothing when the connection has ended. Nothing is lost when the future is dropped.
    pub(crate) async fn next_item(&mut self) -> io::Result<Option<Item>> {
        loop {
            if let Some(item) = self.incoming.take() {
                return Ok(Some(item));
            }
            tokio::select! {
                biased;
                open = self.incoming.fill(&mut self.reader) => {
                    if !open? {
                        return Ok(None);
                    }
                }
                written = self.outgoing.write(&mut self.writer), if !self.outgoing.is_empty() => written?,
            }
        }
    }
}

impl Incoming {
    /// The next item in what has come.
    pub(crate) fn take(&mut self) -> Option<Item> {
        let mut input = &self.buffer[self.taken..self.filled];
        let item = self.decoder.next_item(&mut input);
        self.taken = self.filled - input.len();
        item
    }

    /// Reads once, after all that came before was taken; says whether the connection is still open.
    pub(crate) async fn fill(&mut self, reader: &mut Reader) -> io::Result<bool> {
        debug_assert!(self.taken == self.filled, "what came before is taken first");
        let count = reader.read(&mut self.buffer).await?;
        (self.taken, self.filled) = (0, count);
        Ok(count > 0)
    }
}

impl Outgoing {
    pub(crate) fn put(&mut self, frame: Vec<u8>) {
        if self.is_empty() {
            self.bytes = frame;
            self.written = 0;
        } else {
            self.bytes.extend_from_slice(&frame);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    /// How many bytes wait.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Writes once.
    pub(crate) async fn write(&mut self, writer: &mut Writer) -> io::Result<()> {
        let count = writer.write(&self.bytes[self.written..]).await?;
        if count == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.written += count;
        Ok(())
    }
}
