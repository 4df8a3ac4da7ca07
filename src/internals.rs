//! The parts of the crate that its tools, benchmarks, fuzz targets and tests use. They have no other users and
//! change without notice: the interface of tombola is its commands, its HTTP paths and its files.

pub mod receipts;

#[cfg(fuzzing)]
pub use crate::http::parse_query;
pub use crate::{
    auth::credentials,
    batch::{Batch, BatchId, Generation, ShardIndex},
    config::{
        Config, DEFAULTS, LeaseConfig, Location, Mode, Overrides, PoolConfig, PoolName, Recorded,
        RefillConfig, StoreAddress, StoreConfig, StoreTls,
    },
    figures::{thousands, time},
    folder::{Folder, PoolFiles, PoolPaths, ShardFiles},
    import::{Outcome, import},
    ledger::Ledger,
    pool::{Pool, TakeError},
    space::{Code, CodeFormat, DECIMALS_MAX, INTEGER_MAX, Number, ReadError, Space, Value},
};

/// Copies a data folder.
pub mod backup {
    pub use crate::backup::run;
}

/// File operations outside SQLite, and the stand-in for them.
pub mod files {
    pub use crate::files::{
        FileError, Files, LockError, Locking, create, create_folder, length_bytes, list, lock,
        remove, rename, stand_in, sync_file, sync_folder,
    };
}

/// The instances of a fleet and their store.
pub mod fleet {
    pub use crate::fleet::protocol::{Fence, KnownFence, Standing};
    pub use crate::fleet::store::{FleetStore, open as open_store};
    pub use crate::fleet::{Fleet, Membership};
}

/// The stores of the modes below sharded.
pub mod on_demand {
    pub use crate::on_demand::{Candidate, OpenError, PoolIndex, Store, TableStore};
}

/// The building of a shard's next generation.
pub mod refill {
    pub use crate::refill::{Builders, Built, Refill, Refiller, build};
}

/// One shard's file.
pub mod shard {
    pub use crate::shard::{Label, Left, Shard, build, unused_rows};
}

/// SQLite files.
pub mod sqlite {
    pub use crate::sqlite::{Found, LOG_PAGES_MAX, check_version, open_to_read, rusqlite};
}

/// The log.
pub mod telemetry {
    pub use crate::telemetry::{LogFormat, init};
}
