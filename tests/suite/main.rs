//! End-to-end tests: the real binary against real PostgreSQL servers.
//!
//! `make test` installs the servers and runs these. Each test opens a
//! [`harness::Lab`], which owns everything that the test starts or writes and
//! removes it afterwards. Tests check content, not only exit codes, and take
//! their expected values from PostgreSQL's own tools.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    missing_docs,
    unreachable_pub
)]

mod harness;

mod agent;
mod ahead;
mod ahead_on_s3;
mod archive;
mod backup_files;
mod backup_restore;
mod by_hand;
mod copy_beside_expire;
mod delta;
mod drill;
mod encryption;
mod expire;
mod fire;
mod get;
mod guide;
mod harness_check;
mod increments;
mod kills;
mod ledger;
mod log;
mod memory;
mod pieces;
mod power_cut;
mod protected_life;
mod receive;
mod receive_begin;
mod receive_disk;
mod receive_life;
mod receive_network;
mod receive_restore;
mod receive_resume;
mod receive_shutdown;
mod receive_slot;
mod receive_watch;
mod refusals;
mod schedule;
mod schedule_shared;
mod stall;
mod stall_two;
mod stops;
mod timelines;
mod two_hosts;
mod two_receivers;
mod two_repos;
mod two_streams;
mod verify;
mod wal_walk;
