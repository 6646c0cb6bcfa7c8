//! The settings of `drill`.

use std::path::{Path, PathBuf};

use super::setting_check::Check;
use super::setting_values::{absolute, within_size};
use super::settings::{NOTHING_DONE, Origin, Sourced};
use super::settings_table::Id;
use super::units::setting_size;
use crate::failure::{Failure, Kind};
use crate::pgdata::Owner;

/// A user database larger than this is not searched.
const PASSWD_BYTES_MAX: u64 = 16 << 20;

/// What a drill may use.
#[derive(Clone)]
pub struct DrillSettings {
    /// The scratch directory.
    scratch: Option<Sourced<PathBuf>>,
    /// The directory of PostgreSQL's programs.
    pub bindir: Option<Sourced<PathBuf>>,
    /// The directory of the user's checks.
    pub checks: Option<Sourced<PathBuf>>,
    /// The user whose the server is, where root drills.
    user: Option<Sourced<String>>,
    /// `shared_preload_libraries` of the private server.
    pub preload: Option<Sourced<String>>,
    /// The room that must stay free, in bytes.
    pub free_bytes_min: Sourced<u64>,
}

impl DrillSettings {
    pub(super) fn validate(check: &Check<'_>) -> Result<Self, Failure> {
        let free_min = |text: &str| within_size(Id::DrillDiskFreeMin, text);
        Ok(Self {
            scratch: check.one(Id::DrillScratch, absolute)?,
            bindir: check.one(Id::PostgresBin, absolute)?,
            checks: check.one(Id::DrillChecks, absolute)?,
            user: check.one(Id::DrillUser, named)?,
            preload: check.one(Id::DrillPreload, named)?,
            free_bytes_min: check.or_default(Id::DrillDiskFreeMin, free_min)?,
        })
    }

    /// Returns the scratch directory.
    ///
    /// # Errors
    /// [`Kind::Usage`] when nobody named one.
    pub fn require_scratch(&self) -> Result<&Path, Failure> {
        let scratch = self.scratch.as_ref().map(|scratch| scratch.value.as_path());
        scratch.ok_or_else(|| {
            let next = "name an empty or new directory with --scratch, HIGHWATER_SCRATCH or `drill_scratch` in the settings file; it needs the room of the cluster";
            Failure::new(Kind::Usage, "no scratch directory is named", NOTHING_DONE, next)
        })
    }

    /// Returns whose everything shall be, where root drills and a user was named.
    ///
    /// # Errors
    /// [`Kind::Usage`] for a user that is not in `/etc/passwd`.
    pub fn owner(&self) -> Result<Option<Owner>, Failure> {
        let Some(user) = &self.user else { return Ok(None) };
        let passwd = std::fs::File::open("/etc/passwd").and_then(|file| {
            let mut text = String::new();
            std::io::Read::read_to_string(
                &mut std::io::Read::take(file, PASSWD_BYTES_MAX),
                &mut text,
            )?;
            Ok(text)
        });
        let owner = owner_of(&passwd.unwrap_or_default(), &user.value);
        owner.map(Some).ok_or_else(|| {
            let what = format!("the user `{}` ({}) is not known here", user.value, user.origin);
            let next = "name a user of /etc/passwd, or give uid and gid as numbers: 999:999";
            Failure::new(Kind::Usage, what, NOTHING_DONE, next)
        })
    }

    /// Returns one of them as it may be shown; `None` if it is not set or not one of them.
    pub(super) fn shown(&self, id: Id) -> Option<(Option<String>, bool, Origin)> {
        let path = |value: &Option<Sourced<PathBuf>>| {
            let value = value.as_ref()?;
            Some((Some(value.value.display().to_string()), false, value.origin.clone()))
        };
        let text = |value: &Option<Sourced<String>>| {
            let value = value.as_ref()?;
            Some((Some(value.value.clone()), false, value.origin.clone()))
        };
        match id {
            Id::DrillScratch => path(&self.scratch),
            Id::PostgresBin => path(&self.bindir),
            Id::DrillChecks => path(&self.checks),
            Id::DrillUser => text(&self.user),
            Id::DrillPreload => text(&self.preload),
            Id::DrillDiskFreeMin => {
                let free = &self.free_bytes_min;
                Some((Some(setting_size(free.value)), false, free.origin.clone()))
            }
            _ => None,
        }
    }
}

/// A name, or a list of names: something, in one line.
fn named(text: &str) -> Option<String> {
    let is_fine = !text.is_empty() && !text.contains(char::is_control);
    is_fine.then(|| text.to_owned())
}

/// Finds uid and gid: `postgres`, as `passwd(5)` has it, or `999:999`.
fn owner_of(passwd: &str, user: &str) -> Option<Owner> {
    let by_number = user
        .split_once(':')
        .and_then(|(uid, gid)| Some(Owner { uid: uid.parse().ok()?, gid: gid.parse().ok()? }));
    by_number.or_else(|| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(user))?;
        let mut fields = line.split(':').skip(2);
        Some(Owner { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_name_or_given_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\npostgres:x:101:104::/:/bin/sh\n";
        assert_eq!(owner_of(passwd, "postgres"), Some(Owner { uid: 101, gid: 104 }));
        assert_eq!(owner_of("", "999:998"), Some(Owner { uid: 999, gid: 998 }));
        for unknown in ["postgre", "", "999", "a:b", "999:"] {
            assert_eq!(owner_of(passwd, unknown), None, "{unknown}");
        }
    }
}
