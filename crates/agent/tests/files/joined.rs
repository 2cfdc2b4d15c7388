//! A host's channel that is joined to the guest's logic in memory, with every message encoded and decoded, and with faults.

use stead_agent::files::{Files, Operation, Pulled};
use stead_agent_link::files::{
    ChannelError, Content, FileChannel, FileInput, FileReply, FileRequest,
};
use stead_agent_proto::flow::MAX_CHUNK_BYTES;

/// A connection to the guest's logic.
#[derive(Debug, Default)]
pub struct Joined {
    files: Files,
    operation: Option<Operation>,
    /// How many calls succeed before the connection is broken.
    calls_left: Option<usize>,
    /// How many chunks pass, in either direction, before one has a bit flipped.
    flip_after: Option<usize>,
    /// Bytes of data that passed.
    pub data_bytes: u64,
    chunks: usize,
}

impl Joined {
    pub fn broken_after(calls: usize) -> Self {
        Self {
            calls_left: Some(calls),
            ..Self::default()
        }
    }

    pub fn flipping_after(chunks: usize) -> Self {
        Self {
            flip_after: Some(chunks),
            ..Self::default()
        }
    }

    fn call(&mut self) -> Result<(), ChannelError> {
        match &mut self.calls_left {
            Some(0) => {
                // The guest's side ends with the connection.
                self.operation = None;
                Err(ChannelError::new("broken on purpose"))
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn pass(&mut self, content: &mut Content) {
        self.chunks += 1;
        let Content::Data(data) = content else {
            return;
        };
        self.data_bytes += data.0.len() as u64;
        if self
            .flip_after
            .is_some_and(|after| self.chunks == after + 1)
        {
            data.0[0] ^= 1;
        }
    }

    fn pull(&mut self) -> Pulled {
        let operation = self.operation.as_mut().expect("an operation was begun");
        operation.pull(MAX_CHUNK_BYTES)
    }

    fn carry(&mut self, reply: FileReply) -> FileReply {
        let encoded = reply.encode();
        assert!(encoded.len() <= MAX_CHUNK_BYTES, "a stream takes it");
        let mut reply = FileReply::decode(&encoded).expect("decodes");
        if let FileReply::Chunk(chunk) = &mut reply {
            self.pass(&mut chunk.content);
        }
        reply
    }
}

impl FileChannel for Joined {
    fn request(&mut self, request: FileRequest) -> Result<(), ChannelError> {
        self.call()?;
        let encoded = request.encode();
        assert!(encoded.len() <= MAX_CHUNK_BYTES, "it fits into a frame");
        let request = FileRequest::decode(&encoded).expect("decodes");
        self.operation = Some(self.files.open(request));
        Ok(())
    }

    fn send(&mut self, input: FileInput) -> Result<(), ChannelError> {
        self.call()?;
        let encoded = input.encode();
        assert!(encoded.len() <= MAX_CHUNK_BYTES, "a stream takes it");
        let mut input = FileInput::decode(&encoded).expect("decodes");
        if let FileInput::Chunk(chunk) = &mut input {
            self.pass(&mut chunk.content);
        }
        let operation = self.operation.as_mut().expect("an operation was begun");
        operation.push(input);
        Ok(())
    }

    fn receive(&mut self) -> Result<FileReply, ChannelError> {
        self.call()?;
        match self.pull() {
            Pulled::Reply(reply) => Ok(self.carry(reply)),
            other @ (Pulled::NoRoom | Pulled::WantsInput | Pulled::Ended) => {
                panic!("the host waits for what does not come: {other:?}")
            }
        }
    }

    fn poll(&mut self) -> Result<Option<FileReply>, ChannelError> {
        match self.pull() {
            Pulled::Reply(reply) => Ok(Some(self.carry(reply))),
            Pulled::WantsInput => Ok(None),
            other @ (Pulled::NoRoom | Pulled::Ended) => {
                panic!("a write that takes chunks is not {other:?}")
            }
        }
    }
}

/// A guest that says what it is told to, whatever it is asked.
#[derive(Debug, Default)]
pub struct Liar {
    pub replies: std::collections::VecDeque<FileReply>,
}

impl FileChannel for Liar {
    fn request(&mut self, _request: FileRequest) -> Result<(), ChannelError> {
        Ok(())
    }

    fn send(&mut self, _input: FileInput) -> Result<(), ChannelError> {
        Ok(())
    }

    fn receive(&mut self) -> Result<FileReply, ChannelError> {
        let reply = self.replies.pop_front();
        reply.ok_or_else(|| ChannelError::new("it says no more"))
    }

    fn poll(&mut self) -> Result<Option<FileReply>, ChannelError> {
        Ok(None)
    }
}
