//! Manual pages, made from the same declarations as `--help`.
//!
//! Owns the hidden `man` command, for packagers. Never here: any text.

use std::path::Path;

use clap::CommandFactory;

use super::args::CommandLine;
use crate::failure::{Failure, Kind};

/// Writes `highwater.1`, `highwater-backup.1` and so on into `directory`, over older ones.
///
/// # Errors
/// [`Kind::Disk`] when the directory is missing or cannot be written to.
pub fn write(directory: &Path) -> Result<(), Failure> {
    clap_mangen::generate_to(CommandLine::command(), directory).map_err(|error| {
        Failure::new(
            Kind::Disk,
            format!("could not write the manual pages into {}", directory.display()),
            "nothing but manual pages was written",
            "name an existing directory that you may write to",
        )
        .because(error)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_visible_command_has_a_page() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).unwrap();
        let mut names: Vec<String> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let expected = [
            "highwater-agent.1",
            "highwater-archive-get.1",
            "highwater-archive-push.1",
            "highwater-backup.1",
            "highwater-check.1",
            "highwater-config.1",
            "highwater-copy.1",
            "highwater-drill.1",
            "highwater-expire.1",
            "highwater-info.1",
            "highwater-init.1",
            "highwater-key-add.1",
            "highwater-key-list.1",
            "highwater-key-new.1",
            "highwater-key-remove.1",
            "highwater-key-rewrap.1",
            "highwater-key-rotate.1",
            "highwater-key.1",
            "highwater-log.1",
            "highwater-pin.1",
            "highwater-receive.1",
            "highwater-restore.1",
            "highwater-spool.1",
            "highwater-unpin.1",
            "highwater-verify.1",
            "highwater.1",
        ];
        assert_eq!(names, expected);
        assert!(write(Path::new("/nonexistent/dir")).is_err());
    }
}
