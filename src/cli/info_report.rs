//! What a person reads: the text of `info`.

use super::drill::last_drill;
use super::output::columns;
use super::reports::damaged_pages;
use super::retention::policy_in_words;
use super::units::human_size;
use crate::format::KeyId;
use crate::ops::info;

pub(super) fn info(report: &info::Report) -> String {
    let mut text = format!(
        "cluster {} in {}\n  system identifier {}, PostgreSQL {}, WAL segments of {}\n{}\n",
        report.cluster,
        report.repository,
        report.system_identifier,
        report.postgres_version,
        human_size(report.wal_segment_bytes),
        report.encryption.as_ref().map_or_else(String::new, encryption),
    );
    match &report.recovery_window {
        None if !report.damaged_backups.is_empty() => {
            text.push_str("recovery window: NONE, no other backup than the damaged is usable\n\n");
        }
        None => text.push_str("recovery window: NONE, there is no usable backup yet\n\n"),
        Some(window) => {
            let latest = window
                .latest_time
                .map_or_else(|| "no commit since".to_owned(), |time| format!("last commit {time}"));
            text.push_str(&format!(
                "recovery window on timeline {}:\n  from  {}  ({})\n  to    {latest}  ({})\n\n",
                window.timeline, window.earliest_time, window.earliest_lsn, window.latest_lsn,
            ));
        }
    }
    text.push_str(&elsewhere(report));
    if let Some(verified) = &report.verification {
        let how = if verified.deep { "every byte" } else { "sizes and headers" };
        let wrong = match verified.unacknowledged {
            0 => "nothing new was wrong".to_owned(),
            new => format!("{new} FOUND WRONG: run `highwater verify`"),
        };
        text.push_str(&format!("last verified {} ({how}): {wrong}\n", verified.finished_at));
    }
    for known in &report.acknowledged {
        text.push_str(&format!("acknowledged loss: {}: {}\n", known.what, known.reason));
    }
    if report.drill.is_some() || !report.backups.is_empty() {
        text.push_str(&last_drill(report.drill.as_ref()));
        text.push('\n');
    } else if report.verification.is_some() || !report.acknowledged.is_empty() {
        text.push('\n');
    }
    match &report.retention {
        None => text.push_str("retention: none is set, so that nothing is ever deleted (see `highwater expire --help`)\n\n"),
        Some(policy) => text.push_str(&format!("retention: {}\n\n", policy_in_words(policy))),
    }
    text.push_str(&backups(report));
    text.push_str(&wal(report));
    text.push_str(&super::stall::of_info(report));
    text
}

fn encryption(keys: &info::EncryptionInfo) -> String {
    let word = |key: &KeyId| {
        let ours = if *key == keys.in_hand { " (this one)" } else { "" };
        format!("{key}{ours}")
    };
    let users: Vec<String> = keys.user_keys.iter().map(word).collect();
    let rotated = match keys.repository_keys {
        0 | 1 => String::new(),
        2 => ", and 1 before it".to_owned(),
        keys => format!(", and {} before it", keys - 1),
    };
    format!(
        "  encrypted under repository key {}{rotated}; opened by {}\n",
        keys.repository_key,
        users.join(", ")
    )
}

/// What else can be reached: before holes, and on other timelines.
fn elsewhere(report: &info::Report) -> String {
    let main = report.recovery_window.as_ref();
    let is_main = |one: &&info::WindowInfo| {
        main.is_some_and(|main| {
            (main.timeline, main.earliest_lsn, main.latest_lsn)
                == (one.timeline, one.earliest_lsn, one.latest_lsn)
        })
    };
    let others: Vec<_> = report.reachable.iter().filter(|one| !is_main(one)).collect();
    if others.is_empty() {
        return String::new();
    }
    let mut text = "can be reached besides:\n".to_owned();
    for one in others {
        let latest =
            one.latest_time.map_or_else(String::new, |time| format!("last commit {time}, "));
        text.push_str(&format!(
            "  timeline {}: {} ({}) to {latest}{}\n",
            one.timeline, one.earliest_time, one.earliest_lsn, one.latest_lsn
        ));
    }
    text.push('\n');
    text
}

fn backups(report: &info::Report) -> String {
    let mut text = String::new();
    if report.backups.is_empty() {
        text.push_str("no backups\n");
    } else {
        let mut rows = vec![
            ["backup", "size", "stored", "timeline", "WAL from", "to", "from", "usable"]
                .map(ToOwned::to_owned)
                .to_vec(),
        ];
        rows.extend(report.backups.iter().map(backup_row));
        if report.retention.is_some() {
            rows[0].push("kept".to_owned());
            for (row, backup) in rows[1..].iter_mut().zip(&report.backups) {
                let goes = backup.kept_why.is_empty();
                row.push(if goes { "no: it goes".to_owned() } else { backup.kept_why.join("; ") });
            }
        }
        text.push_str(&columns(&rows));
    }
    for backup in &report.backups {
        for (key, value) in &backup.annotations {
            text.push_str(&format!("  {}: {key} = {value}\n", backup.id));
        }
        for pin in &backup.pins {
            text.push_str(&format!("  {}: pinned{}\n", backup.id, pin_in_words(pin)));
        }
        if backup.kept.as_ref().is_some_and(Vec::is_empty) {
            text.push_str(&format!(
                "  {}: no longer kept; the next expire deletes it\n",
                backup.id
            ));
        }
        if let Some(pages) = &backup.damaged_pages {
            text.push_str(&format!("{}: {}", backup.id, damaged_pages(pages)));
        }
    }
    for backup in &report.unfinished_backups {
        let Some(begun) = backup.begun_at else {
            text.push_str(&format!("left of a deleted backup: {}\n", backup.id));
            continue;
        };
        let begun = format!(", begun {begun}");
        let host = backup.host.as_ref().map_or_else(String::new, |host| format!(" on {host}"));
        let needed = match backup.needed_by.first() {
            Some(id) => format!("; backup {id} needs packs of it: it must stay"),
            None => String::new(),
        };
        let id = &backup.id;
        text.push_str(&format!("unfinished: {id}{begun}{host} (running, or dead){needed}\n"));
    }
    for backup in &report.damaged_backups {
        text.push_str(&format!("DAMAGED: {}: {}\n", backup.id, backup.why));
    }
    text.push('\n');
    text
}

fn backup_row(backup: &info::BackupInfo) -> Vec<String> {
    vec![
        backup.id.to_string(),
        human_size(backup.size_bytes),
        human_size(backup.stored_bytes),
        backup.timeline.to_string(),
        backup.start_lsn.to_string(),
        backup.stop_lsn.to_string(),
        backup.taken_from.clone(),
        if backup.usable { "yes" } else { "NO: its WAL is not here" }.to_owned(),
    ]
}

fn pin_in_words(pin: &info::PinInfo) -> String {
    let until = pin.until.map_or_else(String::new, |until| format!(" until {until}"));
    let reason = pin.reason.as_ref().map_or_else(String::new, |reason| format!(": {reason}"));
    let damaged = pin
        .damaged
        .as_ref()
        .map_or_else(String::new, |why| format!("; THE PIN IS DAMAGED ({why})"));
    format!("{until}{reason}{damaged}")
}

fn wal(report: &info::Report) -> String {
    if report.wal.is_empty() {
        return "no WAL\n".to_owned();
    }
    let mut text = String::new();
    for wal in &report.wal {
        text.push_str(&format!(
            "WAL of timeline {}: {} to {}, {} stored{}\n",
            wal.timeline,
            wal.start_lsn,
            wal.end_lsn,
            human_size(wal.stored_bytes),
            if wal.gaps.is_empty() { ", no gaps" } else { "" },
        ));
        for segment in &wal.damaged {
            text.push_str(&format!(
                "  DAMAGED on the server: {segment}; no recovery can pass it\n"
            ));
        }
        for gap in &wal.gaps {
            text.push_str(&format!("  GAP from {} to {}\n", gap.start_lsn, gap.end_lsn));
        }
    }
    text
}
