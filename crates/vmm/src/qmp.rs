//! The QEMU Machine Protocol: one JSON message a line, over a Unix socket.
//!
//! Own client rather than a generated one, for three reasons that were met in practice: a newer QEMU
//! sends events and values that a generated enum does not know, and one unknown event must not end the
//! connection; a reply that comes after its time bound must be skipped, not be taken for the next one;
//! and a file descriptor must be sent along with a command.
//!
//! # Source
//! QEMU docs/interop/qmp-spec.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::qemu::Version;

/// How long a command may take unless its caller says otherwise.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(30);
/// The longest message that is read, in bytes.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// How many events are kept until somebody asks for them; then the oldest is dropped.
const EVENTS_MAX: usize = 256;
/// How much of a wrong message an error repeats, in characters.
const QUOTE_CHARS: usize = 200;

/// Something QEMU says without being asked.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Event {
    /// Its name, for instance `STOP` or `BLOCK_JOB_COMPLETED`.
    #[serde(rename = "event")]
    pub name: String,
    /// What comes with it; `null` if nothing.
    #[serde(default)]
    pub data: Value,
}

/// A QMP connection. QEMU serves one at a time on a socket.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    /// Bytes read and not yet taken; `scanned` of them are known to hold no line feed.
    unread: Vec<u8>,
    scanned: usize,
    events: VecDeque<Event>,
    next_id: u64,
    version: Version,
}

impl Qmp {
    /// Reads the greeting and enters command mode.
    ///
    /// # Errors
    /// [`Error::Unanswered`] when no greeting comes within `within`, which is also what happens while
    /// another program holds the connection; otherwise when the other side does not speak QMP.
    pub fn negotiate(stream: UnixStream, within: Duration) -> Result<Self> {
        let mut qmp = Self {
            stream,
            unread: Vec::new(),
            scanned: 0,
            events: VecDeque::new(),
            next_id: 1,
            version: Version {
                major: 0,
                minor: 0,
                micro: 0,
            },
        };
        let doing = "waiting for the greeting (another program may hold the connection)";
        let until = Instant::now() + within;
        let message = loop {
            let Some(message) = qmp.next_message(doing, until)? else {
                return Err(unanswered(doing, within));
            };
            // What a client before us was killed too early to read comes first.
            if !qmp.keep_event(&message) && message.get("return").is_none() {
                break message;
            }
        };
        qmp.version = greeting_version(&message).ok_or_else(|| protocol(doing, &message))?;
        qmp.execute::<Value>("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// The version of the QEMU at the other end.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Executes `command` and gives its return value.
    ///
    /// # Errors
    /// As [`Qmp::execute_within`], with a bound of 30 s.
    pub fn execute<T: DeserializeOwned>(&mut self, command: &str, arguments: Value) -> Result<T> {
        self.execute_within(command, arguments, ANSWER_WITHIN)
    }

    /// Executes `command` and gives its return value if that comes within `within`.
    ///
    /// # Errors
    /// [`Error::Refused`] with QEMU's words; [`Error::Unanswered`]: the command may still be carried
    /// out, the connection stays usable; [`Error::Connection`] and [`Error::Protocol`]: it does not.
    pub fn execute_within<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
        within: Duration,
    ) -> Result<T> {
        let (id, line) = self.request(command, arguments);
        self.send(command, &line, within)?;
        self.answer(command, id, within)
    }

    /// Gives QEMU the open file `descriptor` under `name`, for a later command.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn give_descriptor(&mut self, name: &str, descriptor: BorrowedFd<'_>) -> Result<()> {
        let arguments = json!({ "fdname": name });
        self.execute_with::<Value>("getfd", arguments, descriptor)
            .map(drop)
    }

    /// Gives QEMU the open file `descriptor` for as long as something uses it; the path that it is opened by.
    /// [`Qmp::take_back_descriptors`] knows it by `owner`.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn lend_descriptor(&mut self, owner: &str, descriptor: BorrowedFd<'_>) -> Result<String> {
        #[derive(Deserialize)]
        struct Lent {
            #[serde(rename = "fdset-id")]
            set: u64,
        }
        let arguments = json!({ "opaque": owner });
        let lent: Lent = self.execute_with("add-fd", arguments, descriptor)?;
        Ok(format!("/dev/fdset/{}", lent.set))
    }

    /// Takes back what was lent to `owner`; what is open stays so until it is closed.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn take_back_descriptors(&mut self, owner: &str) -> Result<()> {
        #[derive(Deserialize)]
        struct Lent {
            opaque: Option<String>,
        }
        #[derive(Deserialize)]
        struct Set {
            #[serde(rename = "fdset-id")]
            set: u64,
            fds: Vec<Lent>,
        }
        let sets: Vec<Set> = self.execute("query-fdsets", json!({}))?;
        let is_owners = |lent: &Lent| lent.opaque.as_deref() == Some(owner);
        for set in sets.iter().filter(|set| set.fds.iter().any(is_owners)) {
            self.execute::<Value>("remove-fd", json!({ "fdset-id": set.set }))?;
        }
        Ok(())
    }

    fn execute_with<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
        descriptor: BorrowedFd<'_>,
    ) -> Result<T> {
        let (id, line) = self.request(command, arguments);
        self.set_write_bound(command, ANSWER_WITHIN)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = [descriptor];
        let fits = control.push(SendAncillaryMessage::ScmRights(&descriptors));
        assert!(fits, "the buffer was made for one descriptor");
        let sent = rustix::net::sendmsg(
            self.stream.as_fd(),
            &[IoSlice::new(&line)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .map_err(|error| connection(command, error.into()))?;
        self.send(command, &line[sent..], ANSWER_WITHIN)?;
        self.answer(command, id, ANSWER_WITHIN)
    }

    /// The events that came since the last call, oldest first; at most 256 are kept.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.drain(..).collect()
    }

    /// The next event, waiting up to `within` for one; `None` when none comes.
    ///
    /// # Errors
    /// When the connection breaks.
    pub fn wait_event(&mut self, within: Duration) -> Result<Option<Event>> {
        let until = Instant::now() + within;
        let doing = "waiting for an event";
        while self.events.is_empty() {
            let Some(message) = self.next_message(doing, until)? else {
                return Ok(None);
            };
            if !self.keep_event(&message) {
                tracing::warn!(%message, "a late QMP reply was skipped");
            }
        }
        Ok(self.events.pop_front())
    }

    fn request(&mut self, command: &str, arguments: Value) -> (u64, Vec<u8>) {
        let id = self.next_id;
        self.next_id += 1;
        let message = json!({ "execute": command, "arguments": arguments, "id": id });
        (id, format!("{message}\n").into_bytes())
    }

    fn send(&mut self, command: &str, line: &[u8], within: Duration) -> Result<()> {
        self.set_write_bound(command, within)?;
        self.stream
            .write_all(line)
            .map_err(|source| connection(command, source))
    }

    fn set_write_bound(&self, command: &str, within: Duration) -> Result<()> {
        self.stream
            .set_write_timeout(Some(within.max(Duration::from_millis(1))))
            .map_err(|source| connection(command, source))
    }

    fn answer<T: DeserializeOwned>(
        &mut self,
        command: &str,
        id: u64,
        within: Duration,
    ) -> Result<T> {
        let until = Instant::now() + within;
        loop {
            let Some(message) = self.next_message(command, until)? else {
                return Err(unanswered(command, within));
            };
            if self.keep_event(&message) {
                continue;
            }
            if message.get("id").and_then(Value::as_u64) == Some(id) {
                return reply(command, message);
            }
            if message.get("id").is_none() {
                return Err(protocol(command, &message));
            }
            tracing::warn!(%message, command, "a late QMP reply was skipped");
        }
    }

    /// Keeps `message` if it is an event; `false` if it is something else.
    fn keep_event(&mut self, message: &Value) -> bool {
        if message.get("event").is_none() {
            return false;
        }
        match Event::deserialize(message) {
            Ok(event) => {
                tracing::debug!(event = event.name, data = %event.data, "QMP event");
                if self.events.len() == EVENTS_MAX {
                    self.events.pop_front();
                }
                self.events.push_back(event);
            }
            Err(error) => tracing::warn!(%error, %message, "an event of unknown form was skipped"),
        }
        true
    }

    /// The next message, or `None` when `until` has come.
    fn next_message(&mut self, doing: &str, until: Instant) -> Result<Option<Value>> {
        loop {
            if let Some(line) = self.take_line() {
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| Error::Protocol {
                        doing: doing.to_owned(),
                        found: format!("{error} in {}", quote(&String::from_utf8_lossy(&line))),
                    });
            }
            if !self.read_more(doing, until)? {
                return Ok(None);
            }
        }
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let found = self.unread[self.scanned..].iter().position(|b| *b == b'\n');
        let Some(offset) = found else {
            self.scanned = self.unread.len();
            return None;
        };
        let rest = self.unread.split_off(self.scanned + offset + 1);
        self.scanned = 0;
        Some(std::mem::replace(&mut self.unread, rest))
    }

    /// Reads some bytes; `false` when `until` has come first.
    fn read_more(&mut self, doing: &str, until: Instant) -> Result<bool> {
        if self.unread.len() > MESSAGE_BYTES_MAX {
            return Err(Error::Protocol {
                doing: doing.to_owned(),
                found: format!("a message longer than {MESSAGE_BYTES_MAX} bytes"),
            });
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let fail = |source| connection(doing, source);
        self.stream.set_read_timeout(Some(left)).map_err(fail)?;
        let mut buffer = [0; 64 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => Err(fail(io::ErrorKind::UnexpectedEof.into())),
            Ok(length) => {
                self.unread.extend_from_slice(&buffer[..length]);
                Ok(true)
            }
            Err(error) if is_timeout(&error) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(fail(error)),
        }
    }
}

pub(crate) fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

#[derive(Deserialize)]
struct Refusal {
    class: String,
    desc: String,
}

fn reply<T: DeserializeOwned>(command: &str, mut message: Value) -> Result<T> {
    if let Some(error) = message.get("error") {
        let Ok(refusal) = Refusal::deserialize(error) else {
            return Err(protocol(command, &message));
        };
        return Err(Error::Refused {
            command: command.to_owned(),
            class: refusal.class,
            description: refusal.desc,
        });
    }
    let Some(value) = message.get_mut("return").map(Value::take) else {
        return Err(protocol(command, &message));
    };
    T::deserialize(&value).map_err(|error| Error::Protocol {
        doing: command.to_owned(),
        found: format!("{error} in {}", quote(&value.to_string())),
    })
}

fn greeting_version(message: &Value) -> Option<Version> {
    Version::deserialize(message.pointer("/QMP/version/qemu")?).ok()
}

fn quote(text: &str) -> String {
    text.chars().take(QUOTE_CHARS).collect()
}

fn protocol(doing: &str, message: &Value) -> Error {
    Error::Protocol {
        doing: doing.to_owned(),
        found: quote(&message.to_string()),
    }
}

fn connection(doing: &str, source: io::Error) -> Error {
    Error::Connection {
        doing: doing.to_owned(),
        source,
    }
}

fn unanswered(command: &str, within: Duration) -> Error {
    Error::Unanswered {
        command: command.to_owned(),
        within,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GREETING_10: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian 1:10.0.2+ds-2+deb13u1~bpo12+1"}, "capabilities": ["oob", "something-new"]}}"#;

    /// A connection whose other end says `lines` at once and then stays silent.
    fn told(lines: &[&str]) -> (Result<Qmp>, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        for line in lines {
            theirs.write_all(line.as_bytes()).expect("write");
            theirs.write_all(b"\r\n").expect("write");
        }
        // All that is expected is there already.
        (Qmp::negotiate(ours, Duration::from_secs(20)), theirs)
    }

    #[test]
    fn a_greeting_of_a_newer_version_is_understood() {
        let (qmp, _end) = told(&[GREETING_10, r#"{"return": {}, "id": 1}"#]);
        let version = qmp.expect("negotiate").version();
        assert_eq!(version.to_string(), "10.0.2");
    }

    #[test]
    fn what_an_earlier_client_did_not_read_comes_before_the_greeting_and_is_skipped() {
        let (qmp, _theirs) = told(&[
            r#"{"data":{"id":"job","status":"created"},"event":"JOB_STATUS_CHANGE","timestamp":{"microseconds":1,"seconds":2}}"#,
            r#"{"return":{},"id":17}"#,
            r#"{"QMP":{"version":{"qemu":{"micro":22,"minor":2,"major":7},"package":""},"capabilities":[]}}"#,
            r#"{"return":{},"id":1}"#,
        ]);
        let mut qmp = qmp.expect("negotiate");
        assert_eq!(qmp.version().major, 7);
        assert_eq!(qmp.take_events().len(), 1);
    }

    #[test]
    fn unknown_events_are_kept_and_do_not_disturb_a_reply() {
        let (qmp, _end) = told(&[
            GREETING_10,
            r#"{"return": {}, "id": 1}"#,
            r#"{"event": "FROM_THE_FUTURE", "data": {"x": [1]}, "timestamp": {"seconds": 1, "microseconds": 2}}"#,
            r#"{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}"#,
            r#"{"return": {"status": "paused", "running": false, "new": 1}, "id": 2}"#,
        ]);
        let mut qmp = qmp.expect("negotiate");
        let status: Value = qmp.execute("query-status", json!({})).expect("reply");
        assert_eq!(status["status"], "paused");
        let names: Vec<String> = qmp.take_events().into_iter().map(|e| e.name).collect();
        assert_eq!(names, ["FROM_THE_FUTURE", "STOP"]);
    }

    #[test]
    fn a_late_reply_is_not_taken_for_the_next_one() {
        let (qmp, mut end) = told(&[GREETING_10, r#"{"return": {}, "id": 1}"#]);
        let mut qmp = qmp.expect("negotiate");
        let error = qmp
            .execute_within::<Value>("slow", json!({}), Duration::from_millis(20))
            .expect_err("silent");
        assert!(matches!(error, Error::Unanswered { .. }), "{error}");
        end.write_all(b"{\"return\": \"slow\", \"id\": 2}\n{\"return\": \"quick\", \"id\": 3}\n")
            .expect("write");
        let answer: String = qmp.execute("quick", json!({})).expect("reply");
        assert_eq!(answer, "quick");
    }

    #[test]
    fn an_error_reply_carries_qemus_words() {
        let (qmp, _end) = told(&[
            GREETING_10,
            r#"{"return": {}, "id": 1}"#,
            r#"{"error": {"class": "GenericError", "desc": "no such thing"}, "id": 2}"#,
        ]);
        let error = qmp
            .expect("negotiate")
            .execute::<Value>("x", json!({}))
            .expect_err("refused");
        assert_eq!(error.to_string(), "QEMU refused x: no such thing");
    }

    #[test]
    fn silence_and_a_closed_connection_are_told_apart() {
        let (ours, _end) = UnixStream::pair().expect("pair");
        let silent = Qmp::negotiate(ours, Duration::from_millis(200));
        assert!(matches!(silent, Err(Error::Unanswered { .. })));
        let (ours, theirs) = UnixStream::pair().expect("pair");
        drop(theirs);
        let closed = Qmp::negotiate(ours, Duration::from_secs(5));
        assert!(matches!(closed, Err(Error::Connection { .. })));
    }

    #[test]
    fn a_message_without_end_is_refused() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        let writer = std::thread::spawn(move || {
            let block = vec![b'['; 1 << 20];
            while theirs.write_all(&block).is_ok() {}
        });
        let result = Qmp::negotiate(ours, Duration::from_secs(20));
        assert!(matches!(result, Err(Error::Protocol { .. })), "{result:?}");
        drop(result);
        writer.join().expect("the writer ends with the connection");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_bytes_give_an_error_or_an_answer_and_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let (ours, mut theirs) = UnixStream::pair().expect("pair");
            theirs.write_all(GREETING_10.as_bytes()).expect("write");
            theirs.write_all(b"\n{\"return\":{},\"id\":1}\n").expect("write");
            theirs.write_all(&bytes).expect("write");
            theirs.shutdown(std::net::Shutdown::Write).expect("shut down");
            let mut qmp = Qmp::negotiate(ours, Duration::from_secs(5)).expect("negotiate");
            let answer = qmp.execute::<Value>("x", json!({}));
            prop_assert!(answer.is_err());
        }
    }
}
