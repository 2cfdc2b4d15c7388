//! Operations on files over a session.

use tokio::sync::{mpsc, oneshot};

use stead_agent_proto::files::{FileInput, FileReply, FileRequest};

use super::channel::{ChannelError, FileChannel};
use crate::driver::{FileEvent, Order};
use crate::error::{LinkError, Stage};
use crate::link::AgentLink;

/// A connection for operations on files. Its calls block: they are for a thread without an executor.
#[derive(Debug)]
pub struct FileStream {
    orders: mpsc::UnboundedSender<Order>,
    open: Option<Open>,
}

/// The operation that runs.
#[derive(Debug)]
struct Open {
    id: u64,
    events: mpsc::UnboundedReceiver<FileEvent>,
}

impl AgentLink {
    /// A connection for operations on files; several may be used at once, and beside commands.
    ///
    /// # Errors
    /// When there has been no handshake.
    pub fn files(&self) -> Result<FileStream, LinkError> {
        let orders = self.orders(Stage::Request("operation on files"))?.clone();
        Ok(FileStream { orders, open: None })
    }
}

impl FileStream {
    fn give(&self, order: Order) -> Result<(), ChannelError> {
        self.orders.send(order).map_err(ChannelError::new)
    }

    /// Ends the operation that runs, if one does.
    fn cancel(&mut self) -> Result<(), ChannelError> {
        match self.open.take() {
            Some(open) => self.give(Order::FileCancel { id: open.id }),
            None => Ok(()),
        }
    }

    fn open(&mut self) -> Result<&mut Open, ChannelError> {
        self.open
            .as_mut()
            .ok_or_else(|| ChannelError::new("no operation has begun, or it was given up"))
    }

    fn read(&mut self, event: FileEvent) -> Result<FileReply, ChannelError> {
        let bytes = match event {
            FileEvent::Reply { reply } => reply,
            FileEvent::Data(data) => {
                let (id, bytes) = (self.open()?.id, data.len());
                self.give(Order::FileConsumed { id, bytes })?;
                data
            }
            FileEvent::Broken(error) => {
                self.open = None;
                return Err(ChannelError::new(error));
            }
        };
        let reply = FileReply::decode(&bytes).map_err(ChannelError::new)?;
        if reply.is_last() {
            self.open = None;
        }
        Ok(reply)
    }
}

fn wait<T>(answered: oneshot::Receiver<Result<T, LinkError>>) -> Result<T, ChannelError> {
    match answered.blocking_recv() {
        Ok(answer) => answer.map_err(ChannelError::new),
        Err(ended) => Err(ChannelError::new(ended)),
    }
}

impl FileChannel for FileStream {
    fn request(&mut self, request: FileRequest) -> Result<(), ChannelError> {
        self.cancel()?;
        let (events, heard) = mpsc::unbounded_channel();
        let (answer, answered) = oneshot::channel();
        let op = request.encode();
        self.give(Order::File { op, events, answer })?;
        let id = wait(answered)?;
        self.open = Some(Open { id, events: heard });
        Ok(())
    }

    fn send(&mut self, input: FileInput) -> Result<(), ChannelError> {
        let id = self.open()?.id;
        let (answer, answered) = oneshot::channel();
        let data = input.encode();
        self.give(Order::FileData { id, data, answer })?;
        // When it was not taken, the reason is among the replies.
        wait(answered).map(|_taken| ())
    }

    fn receive(&mut self) -> Result<FileReply, ChannelError> {
        let event = self.open()?.events.blocking_recv();
        let event = event.ok_or_else(|| ChannelError::new("the operation has ended"))?;
        self.read(event)
    }

    fn poll(&mut self) -> Result<Option<FileReply>, ChannelError> {
        match self.open()?.events.try_recv() {
            Ok(event) => self.read(event).map(Some),
            Err(mpsc::error::TryRecvError::Empty) => Ok(None),
            Err(mpsc::error::TryRecvError::Disconnected) => {
                Err(ChannelError::new("the operation has ended"))
            }
        }
    }
}

impl Drop for FileStream {
    fn drop(&mut self) {
        // Without a session there is nobody left to tell.
        drop(self.cancel());
    }
}
