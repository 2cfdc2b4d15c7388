//! Requests: answered at once, or when what they ask for is done.

use super::{Action, Agent, Chore, StreamKey, bounded_text};
use crate::message::{CommandEntry, Done, GuestMessage, Request};
use crate::{ProtocolError, frame::MAX_PAYLOAD_BYTES};

/// What a list of commands may be at most, with room for what is around it.
const LIST_BYTES: usize = MAX_PAYLOAD_BYTES - 1024;
/// What an entry takes besides its words.
const ENTRY_BYTES: usize = 160;

impl Agent {
    pub(super) fn answer(&mut self, key: StreamKey, outcome: Done) -> Vec<Action> {
        let id = key.id;
        self.send(key, &GuestMessage::Done { id, outcome })
    }

    /// Answers a ping with the agent's resident memory.
    pub fn pong(&mut self, key: StreamKey, resident_kib: u64) -> Vec<Action> {
        let status = Box::new(self.status(resident_kib));
        self.answer(key, Done::Status(status))
    }

    /// Takes what a chore came to.
    pub fn chore_done(&mut self, key: StreamKey, result: Result<(), String>) -> Vec<Action> {
        let outcome = result.map_or_else(|error| Done::Failed(bounded_text(error)), |()| Done::Ok);
        self.answer(key, outcome)
    }

    pub(super) fn on_request(
        &mut self,
        key: StreamKey,
        request: Request,
        actions: &mut Vec<Action>,
    ) -> Result<(), ProtocolError> {
        self.take_id(key)?;
        let chore = |chore| vec![Action::Chore { key, chore }];
        let done = match request {
            Request::Ping => vec![Action::Pong { key }],
            Request::Sync => chore(Chore::Sync),
            Request::DropCaches => chore(Chore::DropCaches),
            Request::Freeze { limit_ms } => self.on_freeze(key, limit_ms),
            Request::Thaw => self.on_thaw(key),
            Request::Release => self.on_release(key),
            Request::FreezeWorkload { limit_ms } => self.on_freeze_workload(key, limit_ms),
            Request::ThawWorkload => self.on_thaw_workload(key),
            Request::Query {
                key: command,
                epoch,
            } => {
                let state = self.command_state(command, epoch);
                self.answer(key, Done::Command(state))
            }
            Request::List => {
                let list = self.list();
                self.answer(key, list)
            }
            Request::Shutdown(kind) => self.on_shutdown(key, kind),
        };
        actions.extend(done);
        Ok(())
    }

    fn list(&self) -> Done {
        let mut all: Vec<CommandEntry> = self.commands.entries().collect();
        all.reverse();
        let mut left = LIST_BYTES;
        let entries: Vec<CommandEntry> = all
            .iter()
            .take_while(|entry| {
                let words: usize = entry.argv.iter().map(|word| word.0.len() + 3).sum();
                let fits = words + ENTRY_BYTES <= left;
                left = left.saturating_sub(words + ENTRY_BYTES);
                fits
            })
            .cloned()
            .collect();
        let left_out = u32::try_from(all.len() - entries.len()).unwrap_or(u32::MAX);
        Done::Commands { entries, left_out }
    }
}
