//! The values that settings take, read from text.
//!
//! Owns one small function for each type; `None` means "not accepted". Never here: ranges (they are in
//! `settings_table`), and what is said of a value that is not accepted (`settings`).

use std::path::PathBuf;
use std::time::Duration;

use super::settings_table::{Accepts, Id, setting};
use super::units::{parse_duration, parse_size};
use crate::walsender::SlotName;

/// What was said about the replication slot: its name, or that there is to be none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotChoice(pub Option<SlotName>);

/// Where work ahead of PostgreSQL is noted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SpoolChoice {
    /// In a directory beside the WAL.
    BesideWal,
    /// In this directory; absolute.
    Directory(PathBuf),
    /// Nothing is done ahead.
    None,
}

/// In how many repositories WAL must be stored before the server may let it go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalCopies {
    /// In one of them, while the other cannot be reached.
    Any,
    /// In each.
    All,
}

pub(super) fn parse_copies(text: &str) -> Option<WalCopies> {
    match text {
        "any" => Some(WalCopies::Any),
        "all" => Some(WalCopies::All),
        _ => None,
    }
}

/// `[A-Za-z0-9][A-Za-z0-9._-]{0,62}`: safe in every store's keys, in URLs and in shells.
pub(super) fn is_cluster_name(text: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=63).contains(&text.len())
        && text.bytes().all(legal)
        && text.as_bytes()[0].is_ascii_alphanumeric()
}

pub(super) fn absolute(text: &str) -> Option<PathBuf> {
    text.starts_with('/').then(|| PathBuf::from(text))
}

/// Reads the name of a replication slot; `none` is the wish to have none.
pub(super) fn parse_slot(text: &str) -> Option<SlotChoice> {
    if text == "none" {
        return Some(SlotChoice(None));
    }
    text.parse().ok().map(|slot| SlotChoice(Some(slot)))
}

pub(super) fn parse_spool(text: &str) -> Option<SpoolChoice> {
    match text {
        "none" => Some(SpoolChoice::None),
        "pg_wal" => Some(SpoolChoice::BesideWal),
        _ => absolute(text).map(SpoolChoice::Directory),
    }
}

pub(super) fn parse_switch(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "on" | "true" | "yes" | "1" => Some(true),
        "off" | "false" | "no" | "0" => Some(false),
        _ => None,
    }
}

pub(super) fn within_count(id: Id, text: &str) -> Option<usize> {
    let Accepts::Count { min, max } = setting(id).accepts else { return None };
    let number = text.parse::<u64>().ok().filter(|number| (min..=max).contains(number))?;
    usize::try_from(number).ok()
}

pub(super) fn within_size(id: Id, text: &str) -> Option<u64> {
    let Accepts::Size { min, max } = setting(id).accepts else { return None };
    parse_size(text).filter(|bytes| (min..=max).contains(bytes))
}

pub(super) fn within_duration(id: Id, text: &str) -> Option<Duration> {
    let Accepts::Duration { min, max } = setting(id).accepts else { return None };
    let range = Duration::from_secs(min)..=Duration::from_secs(max);
    parse_duration(text).filter(|time| range.contains(time))
}
