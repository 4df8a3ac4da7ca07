//! How a command ends, as whoever started it sees it: one table of exit codes.

use std::fmt;
use std::process::ExitCode;

use crate::config::ConfigError;
use crate::files::LockError;
use crate::fleet::{FleetError, Lost};
use crate::folder::FolderError;
use crate::ledger::LedgerError;
use crate::rungs::OpenError;
use crate::server::ServerError;

/// Why a command ended. The numbers are promised: service managers decide by them whether to start
/// the server again. 2 is also what the parser of the arguments ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It is done.
    Done = 0,
    /// It failed, for a reason that may pass.
    Failed = 1,
    /// The arguments or the settings are wrong: they have to be mended first.
    Settings = 2,
    /// The data folder can't be used as it is: somebody has to decide.
    Folder = 3,
    /// No server answered.
    Unreachable = 4,
    /// What the data folder holds may be handed out elsewhere: somebody has to find out.
    Lost = 5,
    /// The second Ctrl-C or SIGTERM: ended at once, with nothing cleaned up.
    Aborted = 130,
}

impl Exit {
    const ALL: [(Self, &str); 7] = [
        (Self::Done, "done; of serve: stopped as it was told to"),
        (Self::Failed, "failed; of verify: something is not what it should be; of health: no"),
        (Self::Settings, "the arguments or the settings are wrong: mend them first"),
        (Self::Folder, "the data folder is in use, or can't be used as it is: see the message"),
        (Self::Unreachable, "no server answered, or not as one of tombola does"),
        (Self::Lost, "in a fleet: the folder is an old copy, or the store is; see the message"),
        (Self::Aborted, "ended at once by a second Ctrl-C or SIGTERM"),
    ];

    /// The table, for people.
    #[must_use]
    pub fn table() -> String {
        let line = |(exit, meaning): &(Self, &str)| format!("  {:>3}  {meaning}", *exit as u8);
        format!("Exit codes:\n{}", Self::ALL.each_ref().map(line).join("\n"))
    }

    /// What an error of any command ends in.
    #[must_use]
    pub fn of(error: &anyhow::Error) -> Self {
        if let Some(said) = error.downcast_ref::<Ended>() {
            said.exit
        } else if error.is::<ConfigError>() {
            Self::Settings
        } else if let Some(error) = error.downcast_ref::<ServerError>() {
            of_server(error)
        } else if let Some(error) = error.downcast_ref::<FleetError>() {
            of_fleet(error)
        } else if error.is::<Lost>() {
            Self::Lost
        } else if let Some(error) = error.downcast_ref::<FolderError>() {
            of_folder(error)
        } else if let Some(LockError::Held { .. }) = error.downcast_ref() {
            Self::Folder
        } else {
            Self::Failed
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

fn of_server(error: &ServerError) -> Exit {
    match error {
        ServerError::Fleet(error) => of_fleet(error),
        ServerError::OpenDoor { .. } | ServerError::Tls(_) => Exit::Settings,
        ServerError::Folder(error) | ServerError::Store(OpenError::Folder(error)) => {
            of_folder(error)
        }
        ServerError::Store(OpenError::Damaged { .. } | OpenError::OtherRange { .. }) => {
            Exit::Folder
        }
        ServerError::Store(OpenError::File(_) | OpenError::Sqlite { .. })
        | ServerError::Sqlite(_)
        | ServerError::Listen { .. }
        | ServerError::Threads(_) => Exit::Failed,
    }
}

fn of_fleet(error: &FleetError) -> Exit {
    match error {
        FleetError::Lost(_) => Exit::Lost,
        FleetError::OtherRange { .. } | FleetError::Foreign { .. } => Exit::Settings,
        FleetError::Record { .. }
        | FleetError::OtherSpace { .. }
        | FleetError::NoInstance { .. }
        | FleetError::LedgerGone { .. }
        | FleetError::BegunAnew { .. }
        | FleetError::OtherKey { .. }
        | FleetError::Taken { .. } => Exit::Folder,
        FleetError::Folder(error) => of_folder(error),
        FleetError::Ledger(error) => of_ledger(error),
        // It may come.
        FleetError::Store(_) | FleetError::File(_) => Exit::Failed,
    }
}

fn of_folder(error: &FolderError) -> Exit {
    match error {
        FolderError::Lock(LockError::Held { .. })
        | FolderError::OtherMode { .. }
        | FolderError::InFleet { .. }
        | FolderError::LedgerMissing { .. }
        | FolderError::Unexpected { .. } => Exit::Folder,
        FolderError::Ledger(error) => of_ledger(error),
        // The disk may be full, or not there yet.
        FolderError::Lock(LockError::File(_))
        | FolderError::File(_)
        | FolderError::Shard { .. } => Exit::Failed,
    }
}

fn of_ledger(error: &LedgerError) -> Exit {
    match error {
        LedgerError::Damaged { .. }
        | LedgerError::OtherVersion { .. }
        | LedgerError::OtherRange { .. } => Exit::Folder,
        LedgerError::Sqlite { .. } | LedgerError::File(_) | LedgerError::Cancelled => Exit::Failed,
    }
}

/// An error that knows its own exit code.
#[derive(Debug)]
pub(super) struct Ended {
    exit: Exit,
    message: String,
}

impl Ended {
    pub(super) fn error(exit: Exit, message: impl Into<String>) -> anyhow::Error {
        Self { exit, message: message.into() }.into()
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for Ended {}
