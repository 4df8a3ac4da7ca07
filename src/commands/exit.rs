//! The one table of exit codes.

use std::fmt;
use std::process::ExitCode;

use crate::config::ConfigError;
use crate::files::LockError;
use crate::fleet::{FleetError, Lost};
use crate::folder::FolderError;
use crate::import::{ImportError, LinesError};
use crate::ledger::LedgerError;
use crate::on_demand::{self, OpenError};
use crate::receipts;
use crate::server::ServerError;

/// Why a command ended. The numbers are stable, because service managers decide by them whether to restart
/// the server. The parser of the arguments exits with 2 too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// It succeeded.
    Done = 0,
    /// It failed, for a reason that may be temporary.
    Failed = 1,
    /// The arguments, the settings or the lines of an import are wrong, and have to be corrected.
    Settings = 2,
    /// The data folder can't be used as it is, and an operator has to decide what to do.
    Folder = 3,
    /// No server responded.
    Unreachable = 4,
    /// The content of the data folder may be handed out elsewhere, and an operator has to find out.
    Lost = 5,
    /// Another process uses the data folder, which may be free later.
    InUse = 6,
    /// A second Ctrl-C or SIGTERM ended it at once, with nothing cleaned up. A draw ends at the first one.
    Aborted = 130,
}

impl Exit {
    const ALL: [(Self, &str); 8] = [
        (Self::Done, "done; serve: stopped as requested"),
        (Self::Failed, "failed; verify: found violations; health: not ready"),
        (
            Self::Settings,
            "the arguments, the settings or the lines of an import are wrong: correct them",
        ),
        (Self::Folder, "the data folder can't be used as it is: see the message"),
        (Self::Unreachable, "no server responded, or it is not a tombola server"),
        (Self::Lost, "in a fleet: the folder is an old copy, or the store is; see the message"),
        (Self::InUse, "another process uses the data folder; serve waits for it for 10 s"),
        (Self::Aborted, "ended at once by a second Ctrl-C or SIGTERM; draw: by the first"),
    ];

    /// Returns the table as text for people.
    pub fn table() -> String {
        let line = |(exit, meaning): &(Self, &str)| format!("  {:>3}  {meaning}", *exit as u8);
        format!("Exit codes:\n{}", Self::ALL.each_ref().map(line).join("\n"))
    }

    /// Returns the exit code for an error of any command.
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
        } else if let Some(error) = error.downcast_ref::<ImportError>() {
            of_import(error)
        } else if let Some(error) = error.downcast_ref::<on_demand::ImportError>() {
            match error {
                on_demand::ImportError::Open(error) => of_store(error),
                on_demand::ImportError::Store(_) => Self::Failed,
            }
        } else if let Some(error) = error.downcast_ref::<LinesError>() {
            of_lines(error)
        } else if let Some(error) = error.downcast_ref::<receipts::OpenError>() {
            of_receipts(error)
        } else if let Some(LockError::Held { .. }) = error.downcast_ref() {
            Self::InUse
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
        ServerError::Folder(error) => of_folder(error),
        ServerError::Store(error) => of_store(error),
        ServerError::Receipts(error) => of_receipts(error),
        ServerError::Sqlite(_) | ServerError::Listen { .. } | ServerError::Threads(_) => {
            Exit::Failed
        }
    }
}

fn of_store(error: &OpenError) -> Exit {
    match error {
        OpenError::Folder(error) => of_folder(error),
        OpenError::Damaged { .. } | OpenError::OtherRange { .. } => Exit::Folder,
        OpenError::File(_) | OpenError::Sqlite { .. } => Exit::Failed,
    }
}

fn of_receipts(error: &receipts::OpenError) -> Exit {
    match error {
        receipts::OpenError::Damaged { .. } | receipts::OpenError::OtherVersion { .. } => {
            Exit::Folder
        }
        receipts::OpenError::File(_) | receipts::OpenError::Sqlite { .. } => Exit::Failed,
        #[cfg(feature = "postgres")]
        receipts::OpenError::Database { .. } => Exit::Failed,
    }
}

fn of_fleet(error: &FleetError) -> Exit {
    match error {
        FleetError::Lost(_) => Exit::Lost,
        FleetError::OtherRange { .. }
        | FleetError::OtherUsed { .. }
        | FleetError::UsedFile { .. }
        | FleetError::Foreign { .. } => Exit::Settings,
        FleetError::Record { .. }
        | FleetError::OtherSpace { .. }
        | FleetError::NoInstance { .. }
        | FleetError::LedgerGone { .. }
        | FleetError::Recreated { .. }
        | FleetError::OtherKey { .. }
        | FleetError::UsedTooLate { .. }
        | FleetError::Taken { .. } => Exit::Folder,
        FleetError::Folder(error) => of_folder(error),
        FleetError::Ledger(error) => of_ledger(error),
        // These may be temporary.
        FleetError::Store(_) | FleetError::File(_) => Exit::Failed,
    }
}

fn of_folder(error: &FolderError) -> Exit {
    match error {
        FolderError::Lock(LockError::Held { .. }) => Exit::InUse,
        FolderError::OtherMode { .. }
        | FolderError::InFleet { .. }
        | FolderError::LedgerMissing { .. }
        | FolderError::Unexpected { .. } => Exit::Folder,
        FolderError::Ledger(error) => of_ledger(error),
        // The disk may be full, or not mounted yet.
        FolderError::Lock(LockError::File(_))
        | FolderError::File(_)
        | FolderError::Shard { .. } => Exit::Failed,
    }
}

fn of_import(error: &ImportError) -> Exit {
    match error {
        ImportError::Folder(error) => of_folder(error),
        ImportError::Ledger(error) => of_ledger(error),
        ImportError::Shard { .. }
        | ImportError::Away { .. }
        | ImportError::Busy
        | ImportError::Stopped => Exit::Failed,
    }
}

fn of_lines(error: &LinesError) -> Exit {
    match error {
        LinesError::Io(_) => Exit::Failed,
        LinesError::NoColumn { .. } | LinesError::Wrong(_) => Exit::Settings,
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

/// An error with an exit code of its own.
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
