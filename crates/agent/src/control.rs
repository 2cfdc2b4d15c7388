//! Orders to the running agent from inside the guest: `stead-agent upgrade` tells it what to become.
//!
//! The agent listens at a socket with an abstract name, which needs no file and is gone with the process. Only root is heard:
//! who asks for another agent could have replaced the file anyway. One request is one line, and so is the answer; a connection
//! that ends after [`RESTARTING`] has been answered by the exec itself.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::core::Core;
use crate::error::{AgentError, Attempt, chain};
use crate::upgrade;

/// Where the agent of a machine listens.
const NAME: &str = "org.steadfast.agent.control";
/// The option that names another place, or a place where there is none else.
const OPTION: &str = "--control";
/// The longest request, in bytes: a path and a digest.
const MAX_REQUEST_BYTES: u64 = 8192;
/// How long a connection may take to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// How long the agent may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const RESTARTING: &str = "restarting";
const STACK_BYTES: usize = 256 * 1024;

/// A new agent, by its file and the BLAKE3 digest of it.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    file: PathBuf,
    digest: [u8; 32],
}

/// Where orders come in, if they do.
#[derive(Debug)]
pub(crate) struct Control {
    listener: Option<UnixListener>,
    // What this agent was started with, and the next one will be.
    options: Vec<OsString>,
}

/// Listens as the options of `serve` say, and gives the others. An agent that serves a socket listens only where it is told to.
///
/// # Errors
/// When the name that the options give is taken.
pub(crate) fn listen(options: &[OsString]) -> Result<(Vec<OsString>, Control), AgentError> {
    let mut others = options.to_vec();
    let given = match others.iter().position(|option| option == OPTION) {
        Some(at) if at + 1 < others.len() => {
            others.remove(at);
            Some(others.remove(at).to_string_lossy().into_owned())
        }
        Some(_) => return Err(AgentError::Usage(format!("{OPTION} needs a name"))),
        None => None,
    };
    let listener = match given {
        Some(name) => Some(bind(&name)?),
        None if others.iter().any(is_no_machine) => None,
        None => match bind(NAME) {
            Ok(listener) => Some(listener),
            // Somebody else in the guest may have the name: no reason to let nobody in.
            Err(error) => {
                eprintln!("stead-agent: {}", chain(&error));
                None
            }
        },
    };
    let options = options.to_vec();
    Ok((others, Control { listener, options }))
}

/// Whether an option makes the agent serve less than a machine.
fn is_no_machine(option: &OsString) -> bool {
    let option = option.to_string_lossy();
    option.ends_with("socket") || option == "--vsock-local"
}

fn bind(name: &str) -> Result<UnixListener, AgentError> {
    address(name)
        .and_then(|address| UnixListener::bind_addr(&address))
        .attempt(|| format!("listen for orders at {name}"))
}

impl Control {
    /// Begins to follow orders, on a thread of its own.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub(crate) fn start(self, core: &Arc<Core>) -> Result<(), AgentError> {
        let Some(listener) = self.listener else {
            return Ok(());
        };
        let core = Arc::clone(core);
        thread::Builder::new()
            .name("control".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || follow(&core, &listener, &self.options))
            .attempt(|| "start the thread control".to_owned())
            .map(drop)
    }
}

fn follow(core: &Core, listener: &UnixListener, options: &[OsString]) {
    loop {
        let served = listener.accept().and_then(|(mut stream, _)| {
            let answer = match serve(core, &mut stream, options) {
                Ok(never) => match never {},
                Err(error) => chain(&error),
            };
            writeln!(stream, "{answer}")
        });
        if let Err(error) = served {
            eprintln!("stead-agent: an order from inside: {error}");
        }
    }
}

enum Never {}

fn serve(core: &Core, stream: &mut UnixStream, options: &[OsString]) -> Result<Never, AgentError> {
    let peer =
        rustix::net::sockopt::socket_peercred(&*stream).attempt(|| "learn who asks".to_owned())?;
    if !peer.uid.is_root() {
        return Err(AgentError::Usage(format!(
            "only root may give orders, not user {}",
            peer.uid.as_raw()
        )));
    }
    let request = read_request(stream).attempt(|| "read an order".to_owned())?;
    if let Some(why) = core.find_handover_hindrance() {
        return Err(AgentError::Usage(format!(
            "not now: {why}; the agent is unchanged"
        )));
    }
    let target = upgrade::own_file()?;
    let installed = upgrade::install(&request.file, &request.digest, &target)?;
    eprintln!(
        "stead-agent: becoming version {} ({} bytes)",
        installed.version, installed.bytes
    );
    Err(core.hand_over(|handover| {
        match writeln!(stream, "{RESTARTING}").attempt(|| "answer an order".to_owned()) {
            Ok(()) => upgrade::restart(&target, options, handover),
            Err(error) => error,
        }
    }))
}

/// Whoever is at the other end must be root: anybody may connect to an abstract name, and take one that is free.
fn check_root(stream: &UnixStream) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    if peer.uid.is_root() {
        return Ok(());
    }
    let text = format!("the other side is user {}, not root", peer.uid.as_raw());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
}

fn read_request(stream: &UnixStream) -> io::Result<Request> {
    stream.set_read_timeout(Some(REQUEST_LIMIT))?;
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_REQUEST_BYTES)).read_until(b'\n', &mut line)?;
    Request::parse(&line)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not understood"))
}

impl Request {
    /// `DIGEST PATH` and the end of the line.
    fn parse(line: &[u8]) -> Option<Self> {
        let line = line.strip_suffix(b"\n")?;
        let space = line.iter().position(|&byte| byte == b' ')?;
        let (digest, path) = (&line[..space], &line[space + 1..]);
        let file = PathBuf::from(OsString::from_vec(path.to_vec()));
        let digest = *blake3::Hash::from_hex(digest).ok()?.as_bytes();
        file.is_absolute().then_some(Self { file, digest })
    }

    fn line(&self) -> Vec<u8> {
        let mut line = blake3::Hash::from_bytes(self.digest)
            .to_hex()
            .as_bytes()
            .to_vec();
        line.push(b' ');
        line.extend_from_slice(self.file.as_os_str().as_bytes());
        line.push(b'\n');
        line
    }
}

/// `stead-agent upgrade FILE DIGEST`: asks the running agent to become another.
///
/// # Errors
/// What the agent says against it; it then goes on as it was.
pub(crate) fn upgrade(arguments: &[OsString]) -> Result<(), AgentError> {
    let (name, rest) = match arguments {
        [option, name, rest @ ..] if option == OPTION => {
            (name.to_string_lossy().into_owned(), rest)
        }
        rest => (NAME.to_owned(), rest),
    };
    let [file, digest] = rest else {
        return Err(AgentError::Usage(
            "usage: stead-agent upgrade [--control NAME] FILE DIGEST (BLAKE3, 64 digits)"
                .to_owned(),
        ));
    };
    let digest = blake3::Hash::from_hex(digest.as_bytes())
        .map_err(|error| AgentError::Usage(format!("{digest:?} is no BLAKE3 digest: {error}")))?;
    let file = std::fs::canonicalize(file).attempt(|| format!("find {}", file.display()))?;
    let request = Request {
        file,
        digest: *digest.as_bytes(),
    };
    let answer = ask(&name, &request).attempt(|| format!("ask the agent at {name}"))?;
    match answer.trim_end() {
        RESTARTING => Ok(()),
        "" => Err(AgentError::Usage(
            "the agent said nothing; see its log".to_owned(),
        )),
        error => Err(AgentError::Usage(error.to_owned())),
    }
}

fn ask(name: &str, request: &Request) -> io::Result<String> {
    let mut stream = UnixStream::connect_addr(&address(name)?)?;
    check_root(&stream)?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    stream.write_all(&request.line())?;
    let mut answer = String::new();
    stream.take(MAX_REQUEST_BYTES).read_to_string(&mut answer)?;
    Ok(answer)
}

fn address(name: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_as_it_was_written_and_any_other_line_is_refused() {
        let request = Request {
            file: PathBuf::from("/tmp/new agent"),
            digest: [0xab; 32],
        };
        assert_eq!(Request::parse(&request.line()), Some(request));
        let digest = "ab".repeat(32);
        for line in [
            String::new(),
            "\n".to_owned(),
            format!("{digest} /x"),
            format!("{digest} x\n"),
            format!("{}0 /x\n", &digest[..60]),
            format!("{digest}\n"),
            format!("/x {digest}\n"),
        ] {
            assert_eq!(Request::parse(line.as_bytes()), None, "{line:?}");
        }
    }

    #[test]
    fn an_agent_that_serves_a_socket_takes_orders_only_where_it_is_told_to() {
        let options = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let given = options(&["--socket", "/x", "--no-clock"]);
        let (others, control) = listen(&given).expect("nothing to do");
        assert_eq!(others, given);
        assert!(control.listener.is_none());
        let name = format!("stead-test-{}", std::process::id());
        let named = options(&["--control", &name, "--socket", "/x"]);
        let (others, control) = listen(&named).expect("listens");
        assert_eq!(others, options(&["--socket", "/x"]));
        assert_eq!(control.options, named);
        assert!(listen(&named).is_err(), "the name is taken");
        assert!(listen(&options(&["--control"])).is_err());
    }
}
