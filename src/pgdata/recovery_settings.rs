//! The settings and the signal file that make PostgreSQL recover as planned.
//!
//! Owns: which settings belong to recovery, the rewriting of
//! `postgresql.auto.conf`, quoting for that file, the text of a
//! `restore_command`. Never here: choosing a target, or where the archive is.
//!
//! A base backup brings the source's `postgresql.auto.conf` along, and with it
//! whatever recovery settings linger there. PostgreSQL reads that file after
//! `postgresql.conf`, and the last line for a name wins, so this file alone
//! decides once every recovery setting is named in it:
//!
//! ```text
//! work_mem = '64MB'                                       kept, byte for byte
//! # Written by highwater restore at 2026-11-22 03:00:00+00:
//! restore_command = 'highwater ... archive-get %f "%p"'
//! recovery_target_lsn = ''                                unused targets, emptied
//! recovery_target_time = '2026-11-22 00:29:27.243882+00'  the used one, last
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::disk::{DiskError, Owner, parent_of, remove_if_there, sync_directory};
use super::running::read_at_most;
use super::staged::{Durability, Existing, StagedFile};
use crate::pg::Lsn;

/// Every setting that steers recovery in PostgreSQL 12 to 18 (manual, sections
/// "Archive Recovery", "Recovery Target" and "Standby Servers"). Old lines with
/// these names never survive a restore.
///
/// `recovery_min_apply_delay` is among them: a backup of a delayed standby would
/// otherwise keep a restore waiting for just that delay.
pub const RECOVERY_SETTINGS: [&str; 15] = [
    "archive_cleanup_command",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "recovery_end_command",
    "recovery_min_apply_delay",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "restore_command",
];

/// Last major version that knows `promote_trigger_file`; later ones refuse to start with it.
const PROMOTE_TRIGGER_FILE_MAJOR_MAX: u32 = 15;

/// Longest restore point name, in bytes: `MAXFNAMELEN` - 1 (`xlog_internal.h`).
pub const RESTORE_POINT_NAME_BYTES_MAX: usize = 63;

/// Largest `postgresql.auto.conf` taken. Real ones have a few KiB.
const AUTO_CONF_BYTES_MAX: u64 = 16 << 20;

/// How our comment line begins; an earlier restore's line is removed by it.
const COMMENT: &str = "# Written by highwater restore at ";

/// Where recovery stops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecoveryTarget {
    /// At the end of the archive.
    End,
    /// As soon as the backup is consistent.
    Immediate,
    /// By commit time. The text is written as it is and must carry its offset,
    /// `2026-11-22 00:29:27.243882+00`: PostgreSQL would read a bare time in the
    /// server's `timezone`.
    Time(String),
    /// By position.
    Lsn(Lsn),
    /// By transaction.
    Xid(u32),
    /// By restore point.
    Name(String),
}

/// What PostgreSQL does at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetAction {
    /// Stays in recovery, readable, until told to go on.
    Pause,
    /// Becomes a primary on a new timeline.
    Promote,
    /// Stops the server.
    Shutdown,
}

/// Whether a standby or a cluster of its own is being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecoveryMode {
    /// `recovery.signal`: recover to the target, then end recovery.
    Recovery,
    /// `standby.signal`: keep asking for more WAL.
    Standby,
}

impl RecoveryMode {
    /// Returns the name of the signal file, in the data directory.
    pub fn signal_file(self) -> &'static str {
        match self {
            Self::Recovery => "recovery.signal",
            Self::Standby => "standby.signal",
        }
    }

    fn other_signal_file(self) -> &'static str {
        match self {
            Self::Recovery => Self::Standby.signal_file(),
            Self::Standby => Self::Recovery.signal_file(),
        }
    }
}

/// All that a restore decides about recovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoverySettings {
    /// Major version of the server that will read them.
    pub major: u32,
    /// Shell command, as [`command_line`] makes it.
    pub restore_command: String,
    /// Where to stop.
    pub target: RecoveryTarget,
    /// True: apply the target itself too (`recovery_target_inclusive`).
    pub inclusive: bool,
    /// `latest`, `current`, or a decimal number.
    pub timeline: String,
    /// What to do at the target.
    pub action: TargetAction,
    /// True: write `archive_mode = off`, so that a clone cannot archive into its origin's place.
    pub archive_mode_off: bool,
    /// Which signal file.
    pub mode: RecoveryMode,
}

/// A setting and its value, unquoted.
pub type Setting = (&'static str, String);

/// The settings cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum RecoverySettingsError {
    /// A value that PostgreSQL's configuration file cannot hold.
    #[error("the value of `{name}` contains a line break or a NUL byte")]
    UnwritableValue {
        /// The setting.
        name: String,
    },
    /// A restore point name that PostgreSQL cannot have made.
    #[error(
        "the restore point name `{name}` has more than {RESTORE_POINT_NAME_BYTES_MAX} bytes or none"
    )]
    RestorePointName {
        /// The name asked for.
        name: String,
    },
    /// A word of a command that a settings file or a shell cannot carry.
    #[error("the command word `{word}` is not UTF-8 or contains a line break or a NUL byte")]
    UnwritableWord {
        /// The word, with bytes that are not UTF-8 replaced.
        word: String,
    },
    /// The old file is no settings file.
    #[error("`{}` has more than {AUTO_CONF_BYTES_MAX} bytes", path.display())]
    TooLarge {
        /// Which file.
        path: PathBuf,
    },
    /// The disk refused.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl RecoverySettings {
    /// Returns the settings in the order in which they must be written.
    ///
    /// Names are unique and each is known to the major version. The target in use
    /// comes behind the emptied ones: PostgreSQL applies the lines in order, and
    /// emptying one target while another is set is its error "multiple recovery
    /// targets specified" (`assign_recovery_target_*` in
    /// `src/backend/access/transam/xlogrecovery.c`).
    pub fn settings(&self) -> Result<Vec<Setting>, RecoverySettingsError> {
        let mut list: Vec<Setting> = vec![
            ("restore_command", self.restore_command.clone()),
            // The source's cleanup would delete WAL in the source's own archive.
            ("archive_cleanup_command", String::new()),
            ("recovery_end_command", String::new()),
        ];
        if self.major <= PROMOTE_TRIGGER_FILE_MAJOR_MAX {
            list.push(("promote_trigger_file", String::new()));
        }
        if self.mode == RecoveryMode::Recovery {
            list.push(("recovery_min_apply_delay", "0".to_owned()));
        }
        if self.archive_mode_off {
            list.push(("archive_mode", "off".to_owned()));
        }
        list.push(("recovery_target_timeline", self.timeline.clone()));
        let inclusive = if self.inclusive { "on" } else { "off" };
        list.push(("recovery_target_inclusive", inclusive.to_owned()));
        let action = match self.action {
            TargetAction::Pause => "pause",
            TargetAction::Promote => "promote",
            TargetAction::Shutdown => "shutdown",
        };
        list.push(("recovery_target_action", action.to_owned()));

        let used = self.target_setting()?;
        for name in [
            "recovery_target",
            "recovery_target_lsn",
            "recovery_target_name",
            "recovery_target_time",
            "recovery_target_xid",
        ] {
            if used.as_ref().is_none_or(|(used, _)| *used != name) {
                list.push((name, String::new()));
            }
        }
        list.extend(used);
        Ok(list)
    }

    fn target_setting(&self) -> Result<Option<Setting>, RecoverySettingsError> {
        Ok(Some(match &self.target {
            RecoveryTarget::End => return Ok(None),
            RecoveryTarget::Immediate => ("recovery_target", "immediate".to_owned()),
            RecoveryTarget::Time(text) => ("recovery_target_time", text.clone()),
            RecoveryTarget::Lsn(lsn) => ("recovery_target_lsn", lsn.to_string()),
            RecoveryTarget::Xid(xid) => ("recovery_target_xid", xid.to_string()),
            RecoveryTarget::Name(name) => {
                if name.is_empty() || name.len() > RESTORE_POINT_NAME_BYTES_MAX {
                    return Err(RecoverySettingsError::RestorePointName { name: name.clone() });
                }
                ("recovery_target_name", name.clone())
            }
        }))
    }
}

/// Returns the text of a new `postgresql.auto.conf`.
///
/// Lines of `old` that set a recovery setting or one of `settings` are left out,
/// whatever their spelling; all others are kept byte for byte, in order. Then
/// follow a comment with `written_at` and `settings` in their order. Doing it
/// again with the same input changes nothing more.
pub fn rewrite_auto_conf(
    old: &[u8],
    settings: &[Setting],
    written_at: &str,
) -> Result<Vec<u8>, RecoverySettingsError> {
    let replaced = |name: &str| {
        RECOVERY_SETTINGS.iter().any(|known| known.eq_ignore_ascii_case(name))
            || settings.iter().any(|(known, _)| known.eq_ignore_ascii_case(name))
    };
    let mut new = Vec::with_capacity(old.len() + 1024);
    for line in old.split_inclusive(|b| *b == b'\n') {
        let ours = line.starts_with(COMMENT.as_bytes());
        if !ours && !setting_name(line).is_some_and(replaced) {
            new.extend_from_slice(line);
        }
    }
    if !new.is_empty() && !new.ends_with(b"\n") {
        new.push(b'\n');
    }
    refuse_line_breaks("the time of writing", written_at)?;
    new.extend_from_slice(format!("{COMMENT}{written_at}:\n").as_bytes());
    new.extend_from_slice(settings_text(settings)?.as_bytes());
    Ok(new)
}

/// Returns settings as lines of a settings file, in their order.
///
/// # Errors
/// [`RecoverySettingsError::UnwritableValue`]
pub fn settings_text(settings: &[Setting]) -> Result<String, RecoverySettingsError> {
    let line = |(name, value): &Setting| Ok(format!("{name} = {}\n", quote_value(name, value)?));
    settings.iter().map(line).collect()
}

/// Returns the part of a `postgresql.auto.conf` that a restore has written into it, and no line of the cluster's
/// own; empty where none has.
pub fn restore_part(text: &[u8]) -> &[u8] {
    let comment = COMMENT.as_bytes();
    let begins = |at: &usize| {
        text[*at..].starts_with(comment) && (*at == 0 || text.get(at - 1) == Some(&b'\n'))
    };
    (0..text.len()).rfind(begins).map_or(&[], |at| &text[at..])
}

/// Returns the value of a setting as the last line that sets it in `text` has it, without its quotes; `None` where
/// no line does. Included files are not followed.
pub fn last_value(text: &[u8], name: &str) -> Option<String> {
    let is_set = |line: &&[u8]| setting_name(line).is_some_and(|n| n.eq_ignore_ascii_case(name));
    let line = text.split(|b| *b == b'\n').rfind(is_set)?;
    let line = String::from_utf8_lossy(line);
    let value = line.trim_start().get(name.len()..)?.trim_start();
    let value = value.strip_prefix('=').unwrap_or(value).trim_start();
    let quoted = value.strip_prefix('\'').and_then(|rest| rest.split('\'').next());
    let plain = value.split(|c: char| c == '#' || c.is_whitespace()).next().unwrap_or_default();
    Some(quoted.unwrap_or(plain).to_owned())
}

/// Returns the name that a line of a settings file sets, or `None` for blank
/// lines, comments and anything else.
///
/// A setting is always one line: a quoted value cannot contain a line break, not
/// even behind a backslash. Blanks may precede the name and `=` may be missing.
/// Source: the lexer `src/backend/utils/misc/guc-file.l`.
fn setting_name(line: &[u8]) -> Option<&str> {
    let start = line.iter().position(|b| !matches!(b, b' ' | b'\t' | b'\r'))?;
    let rest = &line[start..];
    let in_name = |b: &u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | 0x80..);
    let end = rest.iter().position(|b| !in_name(b)).unwrap_or(rest.len());
    // Names with other bytes are some extension's, never one of ours.
    std::str::from_utf8(&rest[..end]).ok().filter(|name| !name.is_empty())
}

fn refuse_line_breaks(name: &str, value: &str) -> Result<(), RecoverySettingsError> {
    if value.contains(['\n', '\r', '\0']) {
        return Err(RecoverySettingsError::UnwritableValue { name: name.to_owned() });
    }
    Ok(())
}

/// Quotes for the settings file: quotes and backslashes are doubled, for a
/// backslash begins an escape there (`DeescapeQuotedString` in `guc-file.l`).
fn quote_value(name: &str, value: &str) -> Result<String, RecoverySettingsError> {
    refuse_line_breaks(name, value)?;
    Ok(format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''")))
}

/// Writes the settings and the signal file into `pgdata`, durably.
///
/// A missing `postgresql.auto.conf` counts as empty; its mode is kept, else 0600.
/// The other signal file is removed. `owner` is given to what is written, when
/// root does this for the server's user. Idempotent; the old settings stay in
/// force until the new file has replaced them in one step.
pub fn write_recovery_settings(
    pgdata: &Path,
    settings: &RecoverySettings,
    written_at: &str,
    owner: Option<Owner>,
) -> Result<(), RecoverySettingsError> {
    let path = pgdata.join("postgresql.auto.conf");
    let (old, mode) = match read_at_most(&path, AUTO_CONF_BYTES_MAX + 1) {
        Ok(old) => {
            let facts = fs::metadata(&path).map_err(|e| DiskError::new("read", &path, e))?;
            (old, facts.permissions().mode())
        }
        Err(DiskError::Missing { .. }) => (Vec::new(), 0o600),
        Err(e) => return Err(e.into()),
    };
    if old.len() as u64 > AUTO_CONF_BYTES_MAX {
        return Err(RecoverySettingsError::TooLarge { path });
    }
    let new = rewrite_auto_conf(&old, &settings.settings()?, written_at)?;
    let publish = |target: &Path, bytes: &[u8]| -> Result<(), DiskError> {
        let mut staged = StagedFile::create(target)?;
        staged.append(bytes)?;
        staged.set_mode(mode)?;
        if let Some(owner) = owner {
            staged.set_owner(owner)?;
        }
        staged.publish(Durability::Fsync, Existing::Replace)
    };
    publish(&path, &new)?;
    publish(&pgdata.join(settings.mode.signal_file()), b"")?;
    let other = pgdata.join(settings.mode.other_signal_file());
    remove_if_there(&other)?;
    sync_directory(parent_of(&other))?;
    Ok(())
}

/// One word of a `restore_command` behind the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandWord {
    /// Reaches the program exactly as it is here.
    Text(String),
    /// `%f`: the name of the file wanted.
    FileName,
    /// `"%p"`: where the file shall be put, relative to the data directory.
    FilePath,
}

/// Returns a shell command line that runs `binary` with `words`, for
/// `restore_command` or `archive_command`.
///
/// Words are quoted for a POSIX shell where needed. `%` is doubled, for
/// PostgreSQL replaces placeholders before the shell sees the line, and from 16
/// on refuses unknown ones.
pub fn command_line(binary: &Path, words: &[CommandWord]) -> Result<String, RecoverySettingsError> {
    let unwritable = |word: String| RecoverySettingsError::UnwritableWord { word };
    let binary = binary.to_str().ok_or_else(|| unwritable(binary.display().to_string()))?;
    let mut line = shell_word(binary)?;
    for word in words {
        line.push(' ');
        match word {
            CommandWord::Text(text) => line.push_str(&shell_word(text)?),
            CommandWord::FileName => line.push_str("%f"),
            CommandWord::FilePath => line.push_str("\"%p\""),
        }
    }
    Ok(line)
}

fn shell_word(text: &str) -> Result<String, RecoverySettingsError> {
    if text.contains(['\n', '\r', '\0']) {
        return Err(RecoverySettingsError::UnwritableWord { word: text.to_owned() });
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./:=,@+%".contains(&b);
    // A `=` in the first word would be an assignment; only paths stand there, but
    // a quoted word is right everywhere.
    let bare = !text.is_empty() && text.bytes().all(plain) && !text.contains('=');
    let doubled = text.replace('%', "%%");
    Ok(if bare { doubled } else { format!("'{}'", doubled.replace('\'', r"'\''")) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plan() -> RecoverySettings {
        RecoverySettings {
            major: 18,
            restore_command: "highwater archive-get %f \"%p\"".to_owned(),
            target: RecoveryTarget::End,
            inclusive: true,
            timeline: "latest".to_owned(),
            action: TargetAction::Pause,
            archive_mode_off: true,
            mode: RecoveryMode::Recovery,
        }
    }

    fn rewritten(old: &str) -> String {
        let new = rewrite_auto_conf(old.as_bytes(), &[], "now").unwrap();
        String::from_utf8(new).unwrap()
    }

    #[test]
    fn old_recovery_settings_go_in_every_spelling() {
        let old = "# Do not edit this file manually!\n\
                   restore_command = 'cp /old/%f %p'\n\
                   Restore_Command='x'\n\
                   \t recovery_target_time '2020-01-01'\r\n\
                   recovery_target_xid=5 # a comment\n\
                   primary_conninfo = 'password=it''s \\' primary # no comment'\n\
                   recovery_target\t=\timmediate\n\
                   RECOVERY_TARGET_NAME'glued'\n\
                   promote_trigger_file = ''\n\
                   recovery_min_apply_delay = 3h\n\
                   recovery_end_command = ''";
        assert_eq!(
            rewritten(old),
            "# Do not edit this file manually!\n# Written by highwater restore at now:\n"
        );
    }

    #[test]
    fn everything_else_is_kept_byte_for_byte() {
        let old = b"  \n#restore_command = 'x'\nrestore_command2 = 'y'\nmy.restore_command = 'z'\n\
                    hot_standby = on\r\nrecovery_prefetch = 'off'\n= 'x'\nwork_mem = '64MB'\n\
                    application_name = '\xff\xfe restore_command = x'";
        let new = rewrite_auto_conf(old, &[], "now").unwrap();
        assert_eq!(&new[..old.len()], old);
        assert_eq!(&new[old.len()..], b"\n# Written by highwater restore at now:\n");
    }

    #[test]
    fn a_setting_that_we_write_replaces_its_old_line() {
        let settings = [("archive_mode", "off".to_owned())];
        let new = rewrite_auto_conf(b"Archive_Mode = always\n", &settings, "now").unwrap();
        assert_eq!(new, b"# Written by highwater restore at now:\narchive_mode = 'off'\n");
    }

    #[test]
    fn the_target_in_use_comes_after_the_emptied_ones() {
        let targets = [
            (RecoveryTarget::Immediate, "recovery_target", "immediate"),
            (
                RecoveryTarget::Time("2026-11-22 00+00".into()),
                "recovery_target_time",
                "2026-11-22 00+00",
            ),
            (RecoveryTarget::Lsn(Lsn(0x16_B374_D848)), "recovery_target_lsn", "16/B374D848"),
            (RecoveryTarget::Xid(771), "recovery_target_xid", "771"),
            (RecoveryTarget::Name("before".into()), "recovery_target_name", "before"),
        ];
        for (target, name, value) in targets {
            let list = RecoverySettings { target, ..plan() }.settings().unwrap();
            let (used, others) = list.split_last().unwrap();
            assert_eq!((used.0, used.1.as_str()), (name, value));
            let emptied = others
                .iter()
                .filter(|(n, v)| n.starts_with("recovery_target") && v.is_empty())
                .count();
            assert_eq!(emptied, 4, "{name}");
            let mut names: Vec<_> = list.iter().map(|(n, _)| *n).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), list.len(), "a name is written twice");
        }
    }

    #[test]
    fn promote_trigger_file_is_written_only_where_it_is_known() {
        for major in 14..=18 {
            let list = RecoverySettings { major, ..plan() }.settings().unwrap();
            let written = list.iter().any(|(name, _)| *name == "promote_trigger_file");
            assert_eq!(written, major <= 15, "{major}");
        }
    }

    #[test]
    fn restore_point_names_are_held_to_postgresqls_length() {
        let settings = |name: String| {
            RecoverySettings { target: RecoveryTarget::Name(name), ..plan() }.settings()
        };
        assert!(settings("n".repeat(63)).is_ok());
        assert!(settings("n".repeat(64)).is_err());
        assert!(settings(String::new()).is_err());
    }

    #[test]
    fn values_are_quoted_as_postgresql_reads_them() {
        assert_eq!(quote_value("x", r"it's a \ 'x'").unwrap(), r"'it''s a \\ ''x'''");
        for bad in ["a\nb", "a\rb", "a\0b"] {
            assert!(quote_value("x", bad).is_err());
            assert!(command_line(Path::new(bad), &[]).is_err());
        }
    }

    #[test]
    fn what_a_restore_wrote_is_told_from_the_clusters_own_lines() {
        let own = b"ssl = on\n# Written by highwater restore, says somebody\nwork_mem = '1MB'\n";
        assert_eq!(restore_part(own), b"");
        let settings = plan().settings().unwrap();
        let text = rewrite_auto_conf(own, &settings, "now").unwrap();
        let part = String::from_utf8(restore_part(&text).to_vec()).unwrap();
        assert!(part.starts_with(COMMENT), "{part}");
        assert!(part.contains("restore_command = ") && !part.contains("ssl"), "{part}");
        assert_eq!(part.lines().count(), settings.len() + 1);
    }

    #[test]
    fn the_last_line_that_sets_something_is_found() {
        let text = b"#a = 'x'\nA='one'\n  a   'two, three' # why\nb = 4 # c\nab = 5\n";
        assert_eq!(last_value(text, "a").as_deref(), Some("two, three"));
        assert_eq!(last_value(text, "b").as_deref(), Some("4"));
        assert_eq!(last_value(text, "c"), None);
        assert_eq!(last_value(b"a = ''", "a").as_deref(), Some(""));
    }

    #[test]
    fn written_settings_leave_one_signal_file_and_keep_the_mode() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("postgresql.auto.conf");
        fs::write(&conf, "work_mem = '1MB'\nrestore_command = 'old'\n").unwrap();
        fs::set_permissions(&conf, fs::Permissions::from_mode(0o640)).unwrap();
        fs::write(dir.path().join("standby.signal"), "").unwrap();

        write_recovery_settings(dir.path(), &plan(), "now", None).unwrap();
        let first = fs::read_to_string(&conf).unwrap();
        write_recovery_settings(dir.path(), &plan(), "now", None).unwrap();
        assert_eq!(fs::read_to_string(&conf).unwrap(), first, "a second time adds something");

        assert!(first.starts_with("work_mem = '1MB'\n# Written by"));
        assert!(!first.contains("'old'"));
        assert_eq!(fs::metadata(&conf).unwrap().permissions().mode() & 0o777, 0o640);
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["postgresql.auto.conf", "recovery.signal"]);
    }

    /// Does what the server does with the placeholders (`BuildRestoreCommand` in
    /// `src/common/archive.c`), then runs the shell and returns what the program got.
    fn words_that_arrive(line: &str) -> Vec<String> {
        let mut command = String::new();
        let mut rest = line.chars();
        while let Some(c) = rest.next() {
            match (c, c == '%') {
                (_, true) => match rest.next() {
                    Some('%') => command.push('%'),
                    Some('f') => command.push_str("000000010000000000000001"),
                    Some('p') => command.push_str("pg_wal/RECOVERYXLOG"),
                    other => assert_eq!(other, None, "an unknown placeholder in {line}"),
                },
                (c, false) => command.push(c),
            }
        }
        let run = std::process::Command::new("/bin/sh").arg("-c").arg(&command).output().unwrap();
        assert!(run.status.success(), "{command}: {}", String::from_utf8_lossy(&run.stderr));
        let text = String::from_utf8(run.stdout).unwrap();
        text.split_terminator('\n').map(str::to_owned).collect()
    }

    /// A program at an awkward place that prints each of its arguments on a line.
    fn printer(directory: &Path) -> PathBuf {
        let place = directory.join("a dir with 'quotes', 100%f $HOME `id` & =");
        fs::create_dir(&place).unwrap();
        let program = place.join("print\\er");
        fs::write(&program, "#!/bin/sh\nprintf '%s\\n' \"$@\"\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        program
    }

    #[test]
    fn command_words_reach_the_program_through_postgresql_and_the_shell() {
        let dir = tempfile::tempdir().unwrap();
        let program = printer(dir.path());
        let texts = [
            "--repo",
            "file:///a b/c",
            "it's",
            "100%",
            "%p",
            "%%f",
            "$HOME",
            "a\"b",
            "",
            "*",
            "~",
            "a\\b",
            "-",
            "x=y",
            "#",
            "ä",
            "`id`",
            "(;)",
            "!",
            "[a]",
            "\t",
        ];
        let mut words: Vec<_> = texts.iter().map(|t| CommandWord::Text((*t).to_owned())).collect();
        words.extend([CommandWord::FileName, CommandWord::FilePath]);
        let line = command_line(&program, &words).unwrap();
        let mut expected = texts.map(str::to_owned).to_vec();
        expected.extend(["000000010000000000000001".into(), "pg_wal/RECOVERYXLOG".into()]);
        assert_eq!(words_that_arrive(&line), expected);
    }

    #[test]
    fn plain_command_stays_readable() {
        let words = [
            CommandWord::Text("--repo".into()),
            CommandWord::Text("s3://bucket/prefix".into()),
            CommandWord::Text("archive-get".into()),
            CommandWord::FileName,
            CommandWord::FilePath,
        ];
        assert_eq!(
            command_line(Path::new("/usr/bin/highwater"), &words).unwrap(),
            "/usr/bin/highwater --repo s3://bucket/prefix archive-get %f \"%p\""
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn any_word_reaches_the_program(word in "[^\n\r\0]{0,20}") {
            let line = command_line(
                Path::new("/usr/bin/printf"),
                &[CommandWord::Text("%s\\n".into()), CommandWord::Text(word.clone())],
            ).unwrap();
            prop_assert_eq!(words_that_arrive(&line), [word]);
        }

        #[test]
        fn no_recovery_setting_survives_and_nothing_else_is_lost(
            lines in proptest::collection::vec(
                ("[ \t]{0,2}", proptest::sample::select(&["restore_command", "RECOVERY_target",
                    "work_mem", "#x", "recovery_target_x", ""][..]), "[ =]{0,2}'[a-z']{0,5}'"), 0..12)
        ) {
            let text = |all: bool| {
                let mut text = String::new();
                for (blank, name, value) in &lines {
                    if all || !["restore_command", "RECOVERY_target"].contains(name) {
                        text.extend([blank.as_str(), name, value, "\n"]);
                    }
                }
                text
            };
            let expected = text(false) + "# Written by highwater restore at now:\n";
            prop_assert_eq!(rewritten(&text(true)), expected);
        }
    }
}
