//! What the scenarios stand on: servers, the binary under test, waiting with a
//! limit, and the outside truth from pg_waldump.

mod binary;
mod cluster;
mod lab;
mod ledger;
mod trees;
mod truth;
mod wait;

pub use binary::{Highwater, Run};
pub use cluster::{Cluster, ClusterBuilder};
pub use lab::{Lab, Random, copy_tree, files_below, fingerprint, flip_bit};
pub use ledger::Ledger;
pub use trees::{MAJORS, NEWEST};
pub use truth::{Event, EventKind, Target, events_of, format_time};
pub use wait::{passes_within, wait_for};
