//! One task for each session: it writes what many others ask for, and hands out what comes.
//!
//! ```text
//!   AgentLink, Command ──orders──▶ driver ──frames──▶ port
//!        ▲  answers (once), events (bounded by credit)  │
//!        └──────────────────────────────────────────────┘
//! ```
//! Orders are followed in the order in which they were given. Input of commands waits here, a chunk for each command, and
//! goes out in turn, so that one command's input does not hold up another's. When the session breaks, everybody who
//! waits is told why, and the driver ends.
//!
//! An order whose asker has gone is not carried out: a command is told to go only while somebody waits for its start.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use stead_agent_proto::host::{Discarded, Event, Session};
use stead_agent_proto::message::{
    Attachment, Done, ExecRequest, ExitStatus, Identity, OutputStream, Reason, Request, Status,
};
use stead_agent_proto::{Epoch, ExecKey, ProtocolError};

use crate::error::{Broken, LinkError, Stage};
use crate::line::{Greet, Line};
use crate::silence::{Quiet, Silence};

/// While more than this is unsent, no input is encoded: what is said of other commands must not wait for long.
const OUTGOING_FULL_BYTES: usize = 128 * 1024;

/// An operation on files has fewer replies that take no credit.
const MAX_FILE_REPLIES: usize = 4;

/// Gets the answer to an order.
pub(crate) type Answer<T> = oneshot::Sender<Result<T, LinkError>>;
/// Gets what a command does.
pub(crate) type Events = mpsc::UnboundedSender<CommandEvent>;

/// What a command does.
#[derive(Debug)]
pub enum CommandEvent {
    /// It wrote something; [`crate::CommandOutput::consumed`] is due when it was passed on.
    Output {
        /// Where.
        stream: OutputStream,
        /// What.
        data: Vec<u8>,
    },
    /// It has ended, and all its output came before.
    Exit(ExitStatus),
    /// This link listens to it no more, and it goes on.
    Detached {
        /// Why.
        reason: String,
    },
    /// The session has ended.
    Broken(LinkError),
}

/// What the driver is asked to do.
#[derive(Debug)]
pub(crate) enum Order {
    Start(Box<Start>),
    Attach {
        key: ExecKey,
        from: [u64; 2],
        events: Events,
        answer: Answer<(u64, Attachment)>,
    },
    /// No data is the end. The answer comes when all of it is on its way: whether the command still took it.
    Input {
        id: u64,
        data: Vec<u8>,
        answer: Answer<bool>,
    },
    Signal {
        id: u64,
        signal: i32,
    },
    Resize {
        id: u64,
        rows: u16,
        cols: u16,
    },
    Consumed {
        id: u64,
        stream: OutputStream,
        bytes: usize,
    },
    Detach {
        id: u64,
    },
    /// Begins an operation on files; the answer is its stream.
    File {
        op: Vec<u8>,
        events: FileEvents,
        answer: Answer<u64>,
    },
    /// One message for it, sent whole. The answer comes when it is on its way: whether the operation still took it.
    FileData {
        id: u64,
        data: Vec<u8>,
        answer: Answer<bool>,
    },
    FileConsumed {
        id: u64,
        bytes: usize,
    },
    FileCancel {
        id: u64,
    },
    Request {
        request: Request,
        name: &'static str,
        answer: Answer<Reply>,
    },
    SilenceLimit(Duration),
    /// The line is given back.
    Stop,
}

/// Gets what comes of an operation on files.
pub(crate) type FileEvents = mpsc::UnboundedSender<FileEvent>;

/// What comes of an operation on files.
#[derive(Debug)]
pub(crate) enum FileEvent {
    /// A reply; with the last, the stream is closed.
    Reply { reply: Vec<u8> },
    /// A reply that is data: [`Order::FileConsumed`] is due.
    Data(Vec<u8>),
    /// The operation has ended otherwise.
    Broken(LinkError),
}

/// A command to start.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) key: ExecKey,
    pub(crate) again: Option<Epoch>,
    pub(crate) request: ExecRequest,
    pub(crate) events: Events,
    pub(crate) answer: Answer<(u64, u32)>,
    // Before that, nothing of it can have run.
    pub(crate) is_told_to_go: bool,
}

/// The answer to a request.
#[derive(Debug)]
pub(crate) enum Reply {
    Done(Done),
    Status(Box<Status>),
}

#[derive(Debug)]
enum Stream {
    Starting(Box<Start>),
    Attaching {
        events: Events,
        answer: Answer<(u64, Attachment)>,
    },
    Running {
        events: Events,
        input: VecDeque<Input>,
    },
    File {
        events: FileEvents,
        input: VecDeque<Input>,
        // Replies that took no credit.
        replies: usize,
    },
}

#[derive(Debug)]
struct Input {
    data: Vec<u8>,
    sent: usize,
    answer: Answer<bool>,
}

#[derive(Debug)]
struct Asked {
    request: Request,
    name: &'static str,
    // Nobody waits for the driver's own ping.
    answer: Option<Answer<Reply>>,
}

/// What others may look at.
pub(crate) type Shared = Arc<Mutex<Discarded>>;

#[derive(Debug)]
pub(crate) struct Driver {
    line: Line,
    orders: mpsc::UnboundedReceiver<Order>,
    streams: BTreeMap<u64, Stream>,
    asked: BTreeMap<u64, Asked>,
    silence: Silence,
    // The stream whose input was sent last.
    turn: u64,
    // This session replaces another, and nothing has come of it yet.
    is_replacement: bool,
    shared: Shared,
}

/// What one wait came to.
enum Happened {
    Filled(std::io::Result<bool>),
    Sent(std::io::Result<()>),
    Ordered(Option<Order>),
    Time,
}

impl Driver {
    pub(crate) fn new(
        line: Line,
        orders: mpsc::UnboundedReceiver<Order>,
        silence_limit: Duration,
        shared: Shared,
    ) -> Self {
        Self {
            line,
            orders,
            streams: BTreeMap::new(),
            asked: BTreeMap::new(),
            silence: Silence::new(silence_limit),
            turn: 0,
            is_replacement: false,
            shared,
        }
    }

    /// Serves until the session breaks, nobody gives orders any more, or it is told to stop; gives the line back.
    pub(crate) async fn run(mut self) -> Line {
        loop {
            match self.serve().await {
                Ok(()) => return self.line,
                Err(broken) => {
                    let broken = match self.replace_session(broken).await {
                        Ok(()) => continue,
                        Err(broken) => broken,
                    };
                    self.fail_all(&broken);
                    return self.line;
                }
            }
        }
    }

    async fn serve(&mut self) -> Result<(), Broken> {
        loop {
            self.take_all().await?;
            self.look_at_silence()?;
            self.send_inputs();
            let busy = !(self.streams.is_empty() && self.asked.is_empty());
            let wake_at = self.silence.wake_at();
            let wire = &mut self.line.wire;
            let happened = tokio::select! {
                biased;
                open = wire.incoming.fill(&mut wire.reader) => Happened::Filled(open),
                order = self.orders.recv() => Happened::Ordered(order),
                written = wire.outgoing.write(&mut wire.writer), if !wire.outgoing.is_empty() => Happened::Sent(written),
                () = sleep_until(wake_at), if busy => Happened::Time,
            };
            match happened {
                Happened::Filled(Ok(true)) | Happened::Sent(Ok(())) | Happened::Time => {}
                Happened::Filled(Ok(false)) => return Err(Broken::Disconnected(None)),
                Happened::Filled(Err(error)) | Happened::Sent(Err(error)) => {
                    return Err(Broken::disconnected(&error));
                }
                Happened::Ordered(None | Some(Order::Stop)) => return Ok(()),
                Happened::Ordered(Some(order)) => {
                    if !busy {
                        self.silence.end();
                    }
                    self.follow(order);
                }
            }
        }
    }

    /// Takes what has come, before anybody looks at the clock: this process may have been the one that stood still.
    async fn take_all(&mut self) -> Result<(), Broken> {
        while let Some(item) = self.line.wire.incoming.take() {
            let Some(session) = &mut self.line.session else {
                return Ok(());
            };
            let taken = session.on_item(item);
            *self.shared.lock().unwrap_or_else(PoisonError::into_inner) = self.line.discarded();
            match taken.map_err(Broken::Protocol)? {
                Some(event) => {
                    self.silence.end();
                    self.hand_out(event);
                }
                None => tokio::task::consume_budget().await,
            }
        }
        Ok(())
    }

    fn look_at_silence(&mut self) -> Result<(), Broken> {
        if self.streams.is_empty() && self.asked.is_empty() {
            return Ok(());
        }
        match self.silence.at(Instant::now()) {
            Quiet::Short => Ok(()),
            Quiet::Long => {
                self.ask(Request::Ping, "ping", None);
                Ok(())
            }
            Quiet::TooLong => Err(Broken::Late {
                limit: self.silence.limit(),
                discarded: self.line.discarded(),
            }),
        }
    }

    fn session(&mut self) -> &mut Session {
        self.line
            .session
            .as_mut()
            .expect("a line that is driven has a session")
    }

    fn put(&mut self, frame: Vec<u8>) {
        self.line.wire.outgoing.put(frame);
    }

    fn follow(&mut self, order: Order) {
        match order {
            Order::Start(start) => self.start(start),
            Order::Attach {
                key,
                from,
                events,
                answer,
            } => match self.session().attach(key, from) {
                Ok((id, frame)) => {
                    self.put(frame);
                    self.streams
                        .insert(id, Stream::Attaching { events, answer });
                }
                Err(source) => refuse(answer, Stage::Attach, source),
            },
            Order::Input { id, data, answer } => match self.streams.get_mut(&id) {
                Some(Stream::Running { input, .. }) => input.push_back(Input {
                    data,
                    sent: 0,
                    answer,
                }),
                Some(Stream::Starting(_) | Stream::Attaching { .. } | Stream::File { .. })
                | None => {
                    tell(answer, Ok(false));
                }
            },
            Order::Signal { id, signal } => self.put_if_open(id, |open| open.signal(id, signal)),
            Order::Resize { id, rows, cols } => {
                self.put_if_open(id, |open| open.resize(id, rows, cols));
            }
            Order::Consumed { id, stream, bytes } => self.put_if_open(id, |open| {
                open.output_consumed(id, stream, bytes)
                    .map(Option::unwrap_or_default)
            }),
            Order::Detach { id } => self.put_if_open(id, |open| open.detach(id)),
            Order::File { op, events, answer } => self.begin_file(op, events, answer),
            Order::FileData { id, data, answer } => match self.streams.get_mut(&id) {
                Some(Stream::File { input, .. }) => input.push_back(Input {
                    data,
                    sent: 0,
                    answer,
                }),
                Some(Stream::Starting(_) | Stream::Attaching { .. } | Stream::Running { .. })
                | None => tell(answer, Ok(false)),
            },
            Order::FileConsumed { id, bytes } => self.put_if_open(id, |open| {
                open.file_consumed(id, bytes).map(Option::unwrap_or_default)
            }),
            Order::FileCancel { id } => self.put_if_open(id, |open| open.detach(id)),
            Order::Request {
                request,
                name,
                answer,
            } => self.ask(request, name, Some(answer)),
            Order::SilenceLimit(limit) => self.silence.set_limit(limit),
            Order::Stop => {}
        }
    }

    /// What comes for a stream that has been closed meanwhile is of no interest to anybody.
    fn put_if_open(
        &mut self,
        id: u64,
        make: impl FnOnce(&mut Session) -> Result<Vec<u8>, ProtocolError>,
    ) {
        if let Ok(frame) = make(self.session())
            && !frame.is_empty()
            && self.streams.contains_key(&id)
        {
            self.put(frame);
        }
    }

    fn start(&mut self, start: Box<Start>) {
        let request = start.request.clone();
        match self.session().exec(start.key, start.again, request) {
            Ok((id, frame)) => {
                self.put(frame);
                self.streams.insert(id, Stream::Starting(start));
            }
            Err(source) => refuse(start.answer, Stage::Start, source),
        }
    }

    fn begin_file(&mut self, op: Vec<u8>, events: FileEvents, answer: Answer<u64>) {
        match self.session().file(op) {
            Ok((id, frame)) => {
                self.put(frame);
                let stream = Stream::File {
                    events,
                    input: VecDeque::new(),
                    replies: 0,
                };
                self.streams.insert(id, stream);
                tell(answer, Ok(id));
            }
            Err(source) => refuse(answer, Stage::Request("operation on files"), source),
        }
    }

    fn on_file_reply(&mut self, id: u64, reply: Vec<u8>, last: bool) {
        let Some(Stream::File {
            events, replies, ..
        }) = self.streams.get_mut(&id)
        else {
            return;
        };
        *replies += 1;
        if *replies <= MAX_FILE_REPLIES {
            drop(events.send(FileEvent::Reply { reply }));
        }
        if last {
            self.close_file(id);
        }
    }

    /// What the operation was still to be sent is of no use.
    fn close_file(&mut self, id: u64) {
        if let Some(Stream::File { input, .. }) = self.streams.remove(&id) {
            input
                .into_iter()
                .for_each(|left| tell(left.answer, Ok(false)));
        }
    }

    fn ask(&mut self, request: Request, name: &'static str, answer: Option<Answer<Reply>>) {
        match (self.session().request(request.clone()), answer) {
            (Ok((id, frame)), answer) => {
                self.put(frame);
                let asked = Asked {
                    request,
                    name,
                    answer,
                };
                self.asked.insert(id, asked);
            }
            (Err(source), Some(answer)) => refuse(answer, Stage::Request(name), source),
            // As many questions are open as may be: the answer to any of them says as much as one to a ping.
            (Err(_full), None) => {}
        }
    }

    fn hand_out(&mut self, event: Event) {
        self.is_replacement = false;
        match event {
            Event::Accepted { id } => self.on_accepted(id),
            Event::Started { id, pid } => self.on_started(id, pid),
            Event::Attached { id, at } => self.on_attached(id, at),
            Event::Rejected { id, reason } => self.close(id, LinkError::Rejected { reason }),
            Event::Known { id, state } => self.close(id, LinkError::Known { state }),
            Event::Detached { id, reason } => match self.streams.remove(&id) {
                Some(Stream::Running { events, input }) => {
                    inform(&events, CommandEvent::Detached { reason });
                    input
                        .into_iter()
                        .for_each(|left| tell(left.answer, Ok(false)));
                }
                // Nobody waits for it: that is why it was detached.
                Some(Stream::File { input, .. }) => input
                    .into_iter()
                    .for_each(|left| tell(left.answer, Ok(false))),
                Some(Stream::Starting(_) | Stream::Attaching { .. }) | None => {}
            },
            Event::Output { id, stream, data } => {
                if let Some(Stream::Running { events, .. }) = self.streams.get(&id) {
                    inform(events, CommandEvent::Output { stream, data });
                }
            }
            Event::StdinClosed { id } => {
                if let Some(Stream::Running { input, .. }) = self.streams.get_mut(&id) {
                    input
                        .drain(..)
                        .for_each(|left| tell(left.answer, Ok(false)));
                }
            }
            Event::Exit { id, status } => {
                if let Some(Stream::Running { events, input }) = self.streams.remove(&id) {
                    inform(&events, CommandEvent::Exit(status));
                    input
                        .into_iter()
                        .for_each(|left| tell(left.answer, Ok(false)));
                }
            }
            Event::Done { id, outcome } => self.on_answer(id, Reply::Done(outcome)),
            Event::Pong { id, status } => self.on_answer(id, Reply::Status(status)),
            Event::StdinCredit { .. }
            | Event::Hail(_)
            | Event::Ready(_)
            | Event::Failed(_)
            | Event::FileCredit { .. } => {}
            Event::File { id, reply, last } => self.on_file_reply(id, reply, last),
            Event::FileData { id, data } => {
                if let Some(Stream::File { events, .. }) = self.streams.get(&id) {
                    drop(events.send(FileEvent::Data(data)));
                }
            }
        }
    }

    fn on_answer(&mut self, id: u64, reply: Reply) {
        if let Some(answer) = self.asked.remove(&id).and_then(|asked| asked.answer) {
            tell(answer, Ok(reply));
        }
    }

    fn on_accepted(&mut self, id: u64) {
        let wanted = match self.streams.get_mut(&id) {
            Some(Stream::Starting(start)) => {
                start.is_told_to_go = !start.answer.is_closed();
                start.is_told_to_go
            }
            Some(Stream::Attaching { .. } | Stream::Running { .. } | Stream::File { .. })
            | None => false,
        };
        self.put_if_open(
            id,
            |open| if wanted { open.go(id) } else { open.detach(id) },
        );
    }

    fn on_started(&mut self, id: u64, pid: u32) {
        let Some(Stream::Starting(start)) = self.streams.remove(&id) else {
            return;
        };
        let Start { events, answer, .. } = *start;
        let input = VecDeque::new();
        self.streams.insert(id, Stream::Running { events, input });
        if answer.send(Ok((id, pid))).is_err() {
            self.put_if_open(id, |open| open.detach(id));
        }
    }

    fn on_attached(&mut self, id: u64, at: Attachment) {
        let Some(Stream::Attaching { events, answer }) = self.streams.remove(&id) else {
            return;
        };
        let input = VecDeque::new();
        self.streams.insert(id, Stream::Running { events, input });
        if answer.send(Ok((id, at))).is_err() {
            self.put_if_open(id, |open| open.detach(id));
        }
    }

    fn close(&mut self, id: u64, error: LinkError) {
        match self.streams.remove(&id) {
            Some(Stream::Starting(start)) => tell(start.answer, Err(error)),
            Some(Stream::Attaching { answer, .. }) => tell(answer, Err(error)),
            Some(Stream::Running { events, .. }) => inform(&events, CommandEvent::Broken(error)),
            Some(Stream::File { events, input, .. }) => {
                drop(events.send(FileEvent::Broken(error)));
                input
                    .into_iter()
                    .for_each(|left| tell(left.answer, Ok(false)));
            }
            None => {}
        }
    }

    /// Sends waiting input, a chunk of each command in turn, while there is credit and little else is unsent.
    fn send_inputs(&mut self) {
        while self.line.wire.outgoing.waiting_bytes() < OUTGOING_FULL_BYTES {
            let turn = self.turn;
            let after = self.streams.range(turn.saturating_add(1)..);
            let waiting = after.chain(self.streams.range(..=turn));
            let ready = |id: u64, stream: &Stream| match stream {
                Stream::Running { input, .. } => input.front().is_some_and(|front| {
                    let room = self.line.session.as_ref().map(|open| open.stdin_room(id));
                    front.data.is_empty() || room != Some(Some(0))
                }),
                // A message for an operation is not cut.
                Stream::File { input, .. } => input.front().is_some_and(|front| {
                    let room = self.line.session.as_ref().map(|open| open.file_room(id));
                    room.flatten().is_none_or(|room| room >= front.data.len())
                }),
                Stream::Starting(_) | Stream::Attaching { .. } => false,
            };
            let next = waiting
                .filter(|(id, stream)| ready(**id, stream))
                .map(|(&id, _)| id)
                .next();
            let Some(id) = next else {
                return;
            };
            self.turn = id;
            match self.streams.get(&id) {
                Some(Stream::File { .. }) => self.send_file_data(id),
                Some(Stream::Starting(_) | Stream::Attaching { .. } | Stream::Running { .. })
                | None => self.send_input(id),
            }
        }
    }

    fn send_file_data(&mut self, id: u64) {
        let Some(Stream::File { input, .. }) = self.streams.get_mut(&id) else {
            return;
        };
        let (Some(front), Some(session)) = (input.pop_front(), self.line.session.as_mut()) else {
            return;
        };
        let taken = match session.file_data(id, &front.data) {
            Ok(frame) => {
                self.line.wire.outgoing.put(frame);
                true
            }
            // It takes none.
            Err(_) => false,
        };
        tell(front.answer, Ok(taken));
    }

    fn send_input(&mut self, id: u64) {
        let Some(Stream::Running { input, .. }) = self.streams.get_mut(&id) else {
            return;
        };
        let (Some(front), Some(session)) = (input.front_mut(), self.line.session.as_mut()) else {
            return;
        };
        let sent = match session.stdin_room(id) {
            None => None,
            Some(_) if front.data.is_empty() => session.stdin_end(id).ok(),
            Some(room) => {
                let end = front.data.len().min(front.sent + room);
                let chunk = session.stdin(id, &front.data[front.sent..end]).ok();
                front.sent = end;
                chunk
            }
        };
        let taken = sent.is_some();
        if let Some(frame) = sent {
            self.line.wire.outgoing.put(frame);
        }
        if (!taken || front.sent == front.data.len())
            && let Some(done) = input.pop_front()
        {
            tell(done.answer, Ok(taken));
        }
    }

    /// Makes another session of the same life when the agent has lost this one and said so to what was asked, of which it
    /// has done nothing then. Commands are asked for again by their keys. One request may be: with another unanswered, that
    /// may be the one that was denied, and the first have been carried out before. Gives the cause back when it is not so.
    async fn replace_session(&mut self, broken: Broken) -> Result<(), Broken> {
        let lost = matches!(broken, Broken::Protocol(ProtocolError::SessionLost(_)));
        let starting = |stream: &Stream| matches!(stream, Stream::Starting(_));
        let certainly = lost
            && !self.is_replacement
            && self.asked.len() <= 1
            && self.streams.values().all(starting);
        let Some(epoch) = self
            .line
            .session
            .as_ref()
            .map(Session::epoch)
            .filter(|_| certainly)
        else {
            return Err(broken);
        };
        let greet = Greet {
            epoch,
            reason: Reason::Reattach,
            identity: &Identity::Keep,
            limit: self.silence.limit(),
        };
        if let Err(error) = self.line.greet(&greet).await {
            self.tell_unstarted(&error);
            return Err(broken);
        }
        self.silence.end();
        self.is_replacement = true;
        for stream in std::mem::take(&mut self.streams).into_values() {
            if let Stream::Starting(mut start) = stream {
                start.again = Some(start.again.unwrap_or(epoch));
                self.start(start);
            }
        }
        for asked in std::mem::take(&mut self.asked).into_values() {
            self.ask(asked.request, asked.name, asked.answer);
        }
        Ok(())
    }

    /// Tells those of whose commands nothing can have run that the guest lives another life, if that is why.
    fn tell_unstarted(&mut self, error: &LinkError) {
        let LinkError::StepFailed { phase, error } = error else {
            return;
        };
        for (id, stream) in std::mem::take(&mut self.streams) {
            match stream {
                Stream::Starting(start) if !start.is_told_to_go => {
                    let (phase, error) = (*phase, error.clone());
                    tell(start.answer, Err(LinkError::StepFailed { phase, error }));
                }
                other @ (Stream::Starting(_)
                | Stream::Attaching { .. }
                | Stream::Running { .. }
                | Stream::File { .. }) => {
                    self.streams.insert(id, other);
                }
            }
        }
    }

    fn fail_all(&mut self, broken: &Broken) {
        for stream in std::mem::take(&mut self.streams).into_values() {
            match stream {
                Stream::Starting(start) => tell(start.answer, Err(broken.at(Stage::Start))),
                Stream::Attaching { answer, .. } => tell(answer, Err(broken.at(Stage::Attach))),
                Stream::Running { events, input } => {
                    inform(&events, CommandEvent::Broken(broken.at(Stage::Run)));
                    for left in input {
                        tell(left.answer, Err(broken.at(Stage::Run)));
                    }
                }
                Stream::File { events, input, .. } => {
                    let stage = Stage::Request("operation on files");
                    drop(events.send(FileEvent::Broken(broken.at(stage))));
                    for left in input {
                        tell(left.answer, Err(broken.at(stage)));
                    }
                }
            }
        }
        for asked in std::mem::take(&mut self.asked).into_values() {
            if let Some(answer) = asked.answer {
                tell(answer, Err(broken.at(Stage::Request(asked.name))));
            }
        }
    }
}

fn refuse<T>(answer: Answer<T>, stage: Stage, source: ProtocolError) {
    tell(answer, Err(LinkError::Unsendable { stage, source }));
}

/// Whoever has asked may have gone.
fn tell<T>(answer: Answer<T>, what: Result<T, LinkError>) {
    drop(answer.send(what));
}

/// Whoever has listened may have gone; a detach is on its way then.
fn inform(events: &Events, what: CommandEvent) {
    drop(events.send(what));
}
