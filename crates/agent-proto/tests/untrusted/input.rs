//! An input is a script: what the other side sends, and what the world around a machine does in between.

use stead_agent_proto::message::*;
use stead_agent_proto::{Epoch, ExecKey};

/// The script that is left. After its end everything is zero.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn byte(&mut self) -> u8 {
        let Some((&first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        first
    }

    pub fn one_in(&mut self, count: u8) -> bool {
        self.byte().is_multiple_of(count)
    }

    pub fn bytes(&mut self) -> Vec<u8> {
        let length = usize::from(self.byte());
        let (head, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        head.to_vec()
    }

    /// A length that may be larger than anything allowed.
    pub fn size(&mut self) -> usize {
        usize::from(self.byte()) << (self.byte() % 16)
    }

    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub fn epoch(&mut self) -> Epoch {
        Epoch([self.byte() % 4; 16])
    }

    pub fn key(&mut self) -> ExecKey {
        ExecKey([self.byte() % 4; 16])
    }

    pub fn id(&mut self) -> u64 {
        u64::from(self.byte())
    }

    pub fn stream(&mut self) -> OutputStream {
        OutputStream::ALL[usize::from(self.byte() % 2)]
    }

    fn number(&mut self) -> u32 {
        u32::try_from(self.size()).unwrap_or(u32::MAX)
    }

    fn data(&mut self) -> Bytes {
        let (size, fill) = (self.size(), self.byte());
        Bytes(vec![fill; size.min(60_000)])
    }

    fn text(&mut self) -> String {
        "x".repeat(self.size().min(50_000))
    }

    pub fn reason(&mut self) -> Reason {
        match self.byte() % 5 {
            0 => Reason::Restore,
            1 => Reason::Reattach,
            2 => Reason::Fork,
            3 => Reason::Wake,
            _ => Reason::Boot,
        }
    }

    pub fn setup(&mut self) -> Setup {
        Setup {
            wall_clock_ns: self.id(),
            seed: Seed([1; 64]),
            identity: Identity::Keep,
        }
    }

    pub fn exec(&mut self) -> ExecRequest {
        let pty = (self.one_in(2)).then(|| Pty {
            rows: 1,
            cols: 2,
            term: self.text(),
        });
        ExecRequest {
            argv: vec![self.data()],
            stdin: self.one_in(2),
            pty,
            ..ExecRequest::default()
        }
    }

    pub fn request(&mut self) -> Request {
        match self.byte() % 11 {
            0 => Request::Release,
            1 => Request::FreezeWorkload { limit_ms: 1 },
            2 => Request::ThawWorkload,
            3 => Request::Ping,
            4 => Request::Freeze { limit_ms: 1 },
            5 => Request::Thaw,
            6 => Request::Sync,
            7 => Request::DropCaches,
            8 => Request::Shutdown(ShutdownKind::Poweroff),
            9 => Request::List,
            _ => Request::Query {
                key: self.key(),
                epoch: self.epoch(),
            },
        }
    }

    pub fn host_message(&mut self) -> HostMessage {
        let (kind, id) = (self.byte() % 17, self.id());
        match kind {
            0 => HostMessage::Hello(Hello {
                reason: self.reason(),
            }),
            1 => HostMessage::Setup(self.setup()),
            2 => HostMessage::Request {
                id,
                request: self.request(),
            },
            3 => HostMessage::Exec {
                id,
                key: self.key(),
                again: (self.one_in(2)).then(|| self.epoch()),
                request: self.exec(),
            },
            4 => HostMessage::Go { id },
            5 => HostMessage::Attach {
                id,
                key: self.key(),
                from: [self.id(), self.id()],
            },
            6 => HostMessage::Detach { id },
            7 => HostMessage::Stdin {
                id,
                data: self.data(),
            },
            8 => HostMessage::StdinEnd { id },
            9 => HostMessage::Signal {
                id,
                signal: i32::from(self.byte()),
            },
            10 => HostMessage::Resize {
                id,
                rows: 1,
                cols: 1,
            },
            11 => HostMessage::Credit {
                id,
                stream: self.stream(),
                bytes: self.number(),
            },
            12 => HostMessage::File {
                id,
                op: self.data(),
            },
            13 => HostMessage::FileData {
                id,
                data: self.data(),
            },
            14 => HostMessage::FileEnd { id },
            15 => HostMessage::FileCredit {
                id,
                bytes: self.number(),
            },
            _ => HostMessage::FileCancel { id },
        }
    }

    fn state(&mut self) -> CommandState {
        match self.byte() % 4 {
            0 => CommandState::Running,
            1 => CommandState::Ended(ExitStatus::Code(1)),
            2 => CommandState::NotRun,
            _ => CommandState::Forgotten,
        }
    }

    fn done(&mut self) -> Done {
        match self.byte() % 5 {
            0 => Done::Ok,
            1 => Done::Released { duration_ns: 1 },
            2 => Done::Failed(self.text()),
            3 => Done::Command(self.state()),
            _ => Done::Commands {
                entries: vec![],
                left_out: self.number(),
            },
        }
    }

    fn ready(&mut self) -> Ready {
        Ready {
            epoch: self.epoch(),
            agent_version: self.text(),
            boot_id: self.text(),
            phases: vec![],
            workload: WorkloadState::Running,
            released: self.one_in(2),
        }
    }

    pub fn guest_message(&mut self) -> GuestMessage {
        let (kind, id) = (self.byte() % 18, self.id());
        match kind {
            0 => GuestMessage::Hail(Hail {
                agent_version: self.text(),
            }),
            1 => GuestMessage::Ready(self.ready()),
            2 => GuestMessage::Failed(Failed {
                phase: Phase::Clock,
                error: self.text(),
            }),
            3 => GuestMessage::Accepted { id },
            4 => GuestMessage::Started {
                id,
                pid: 1,
                stdin_window_bytes: self.number(),
            },
            5 => GuestMessage::Rejected {
                id,
                reason: Rejection::NotReleased,
            },
            6 => GuestMessage::Known {
                id,
                state: self.state(),
            },
            7 => {
                let stdin = (self.one_in(2)).then(|| StdinState {
                    received: self.id(),
                    window_bytes: self.number(),
                });
                let at = Attachment {
                    pid: None,
                    first: [0, 0],
                    stdin,
                };
                GuestMessage::Attached { id, at }
            }
            8 => GuestMessage::Detached {
                id,
                reason: self.text(),
            },
            9 => GuestMessage::Output {
                id,
                stream: self.stream(),
                data: self.data(),
            },
            10 => GuestMessage::StdinCredit {
                id,
                bytes: self.number(),
            },
            11 => GuestMessage::StdinClosed { id },
            12 => GuestMessage::Exit {
                id,
                status: ExitStatus::Code(0),
            },
            13 => GuestMessage::Done {
                id,
                outcome: self.done(),
            },
            14 => GuestMessage::SessionBroken {
                reason: self.text(),
            },
            15 => GuestMessage::File {
                id,
                reply: self.data(),
                last: self.one_in(2),
            },
            16 => GuestMessage::FileData {
                id,
                data: self.data(),
            },
            _ => GuestMessage::FileCredit {
                id,
                bytes: self.number(),
            },
        }
    }
}
