//! What the scenarios stand on: servers, the binary under test, waiting with a
//! limit, and the outside truth from pg_waldump.

#[path = "../../servers/script.rs"]
mod script;

mod archived;
mod binary;
mod cluster;
mod lab;
mod ledger;
mod not_run;
mod receiver;
mod small_disk;
mod statement;
mod stored;
mod templates;
mod trees;
mod truth;
mod wait;
mod weather;

pub use archived::Archived;
pub use binary::{Highwater, Run, Running, reachable_binary};
pub use cluster::{Cluster, ClusterBuilder, Load, finish};
pub use lab::{Lab, Random, copy_tree, files_below, fingerprint, flip_bit, remove_tree, rounds};
pub use ledger::Ledger;
pub use not_run::not_run;
pub use receiver::Receiver;
pub use small_disk::{NO_SMALL_DISK, on_small_disk};
pub use statement::{Statement, WAITING_COMMITS};
pub use stored::Stored;
pub use trees::{MAJORS, NEWEST, as_server_user};
pub use truth::{
    Event, EventKind, Target, events_in, events_of, offset_in_segment, parse_lsn, switch_lsn,
};
pub use wait::{passes_within, wait_for};
pub use weather::{Way, Weather};
