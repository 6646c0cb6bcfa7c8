//! From a plan to PostgreSQL's recovery settings.

use super::plan::{PlanReport, timeline_setting};
use super::{Request, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::ops::failures::of_disk;
use crate::pg::ServerVersion;
use crate::pgdata::{
    CommandWord, RecoveryMode, RecoverySettings, RecoverySettingsError, RecoveryTarget,
    TargetAction, command_line,
};
use crate::plan::target::{self, RecoveryPoint};

/// Returns the settings that the new cluster recovers with.
pub(super) fn recovery_settings(
    request: &Request,
    report: &PlanReport,
) -> Result<RecoverySettings, Failure> {
    let mut words: Vec<CommandWord> =
        request.program_flags.iter().map(|word| CommandWord::Text(word.clone())).collect();
    words.push(CommandWord::Text("archive-get".to_owned()));
    words.push(CommandWord::FileName);
    words.push(CommandWord::FilePath);
    let restore_command = command_line(&request.program, &words).map_err(not_written)?;
    let point = if request.standby { &RecoveryPoint::Latest } else { &request.target.point };
    let setting = point.parameter().map(|(_, value)| value).unwrap_or_default();
    Ok(RecoverySettings {
        major: ServerVersion(report.postgres_version).major().0,
        restore_command,
        target: match point {
            RecoveryPoint::Latest => RecoveryTarget::End,
            RecoveryPoint::Immediate => RecoveryTarget::Immediate,
            RecoveryPoint::Time { .. } => RecoveryTarget::Time(setting),
            RecoveryPoint::Lsn(lsn) => RecoveryTarget::Lsn(*lsn),
            RecoveryPoint::Xid(xid) => RecoveryTarget::Xid(*xid),
            RecoveryPoint::Name(name) => RecoveryTarget::Name(name.clone()),
        },
        inclusive: request.target.inclusive,
        timeline: timeline_setting(request, report),
        action: match request.target.action {
            target::TargetAction::Pause => TargetAction::Pause,
            target::TargetAction::Promote => TargetAction::Promote,
            target::TargetAction::Shutdown => TargetAction::Shutdown,
        },
        archive_mode_off: !request.take_over,
        mode: if request.standby { RecoveryMode::Standby } else { RecoveryMode::Recovery },
    })
}

/// Tells why recovery settings could not be written.
pub(super) fn not_written(error: RecoverySettingsError) -> Failure {
    let what = "could not write the recovery settings";
    match error {
        RecoverySettingsError::Disk(error) => of_disk(error, what, UNHARMED),
        other => Failure::new(
            Kind::Usage,
            what,
            UNHARMED,
            "Use paths and names that a settings file can hold, without line breaks.",
        )
        .because(other),
    }
}
