//! Names of relation files, and which directories hold them.
//!
//! ```text
//! base/<database>/, global/, pg_tblspc/<oid>/PG_<major>_<catalog>/<database>/
//!     16384   16384.1   16384_fsm   16384_vm.2   16384_init      number, fork, segment
//!     t3_16384   t3_16384_fsm.1                                  of a temporary relation
//! ```
//!
//! Sources: `src/common/relpath.c`, `src/backend/storage/file/reinit.c`
//! (`parse_filename_for_nontemp_relation`), `src/backend/storage/file/fd.c` (`looks_like_temp_rel_name`).

use super::RelFileLocator;

/// `DEFAULTTABLESPACE_OID` and `GLOBALTABLESPACE_OID` (`src/include/catalog/pg_tablespace.dat`).
const DEFAULT_TABLESPACE: u32 = 1663;
const GLOBAL_TABLESPACE: u32 = 1664;

/// Which part of a relation a file holds (`ForkNumber`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fork {
    /// The rows.
    Main,
    /// The free space map.
    FreeSpaceMap,
    /// The visibility map.
    VisibilityMap,
    /// What an unlogged relation is reset to.
    Init,
}

impl Fork {
    /// Returns the fork of this number (`ForkNumber` in `src/include/common/relpath.h`).
    pub fn from_number(number: u32) -> Option<Self> {
        [Self::Main, Self::FreeSpaceMap, Self::VisibilityMap, Self::Init]
            .get(usize::try_from(number).ok()?)
            .copied()
    }

    fn from_name(name: &[u8]) -> Option<Self> {
        match name {
            b"fsm" => Some(Self::FreeSpaceMap),
            b"vm" => Some(Self::VisibilityMap),
            b"init" => Some(Self::Init),
            _ => None,
        }
    }
}

/// What the name of a relation's file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationFile {
    /// `relfilenode`; never 0.
    pub number: u32,
    /// The fork.
    pub fork: Fork,
    /// Which file of the fork, from 0; each but the last has `relseg_size` blocks.
    pub segment: u32,
}

impl RelationFile {
    /// Returns what a file's name says, or `None` if it is no (lasting) relation's.
    pub fn parse(name: &[u8]) -> Option<Self> {
        let (name, segment) = match name.iter().position(|byte| *byte == b'.') {
            Some(dot) => (&name[..dot], number(&name[dot + 1..])?),
            None => (name, 0),
        };
        let (digits, fork) = match name.iter().position(|byte| *byte == b'_') {
            Some(line) => (&name[..line], Fork::from_name(&name[line + 1..])?),
            None => (name, Fork::Main),
        };
        Some(Self { number: number(digits)?, fork, segment })
    }
}

/// Reads a number above 0 without leading zeros, as PostgreSQL writes them into names.
fn number(digits: &[u8]) -> Option<u32> {
    let plain = digits.iter().all(u8::is_ascii_digit) && digits.first() != Some(&b'0');
    plain.then(|| str::from_utf8(digits).ok()?.parse().ok()).flatten()
}

/// Returns whether a file of a database's directory is a temporary relation's, which no other
/// session can read and no recovery needs.
pub fn is_temporary_relation(name: &[u8]) -> bool {
    let digits = |text: &[u8]| !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let Some(rest) = name.strip_prefix(b"t") else { return false };
    let Some(line) = rest.iter().position(|byte| *byte == b'_') else { return false };
    let (process, rest) = (&rest[..line], &rest[line + 1..]);
    let (rest, segment) = match rest.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&rest[..dot], Some(&rest[dot + 1..])),
        None => (rest, None),
    };
    let (relation, fork) = match rest.iter().position(|byte| *byte == b'_') {
        Some(line) => (&rest[..line], Some(&rest[line + 1..])),
        None => (rest, None),
    };
    digits(process)
        && digits(relation)
        && segment.is_none_or(digits)
        && fork.is_none_or(|fork| Fork::from_name(fork).is_some())
}

/// A directory of relation files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelationDirectory {
    /// The tablespace's OID.
    pub tablespace: u32,
    /// The database's OID; 0 for `global`.
    pub database: u32,
}

impl RelationDirectory {
    /// Returns what the directory holds at this path below the data directory, tablespaces as
    /// `pg_tblspc/<oid>/…`, or `None` if no relations belong there.
    pub fn at(path: &[u8]) -> Option<Self> {
        let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
        match parts[..] {
            [b"global"] => Some(Self { tablespace: GLOBAL_TABLESPACE, database: 0 }),
            [b"base", database] => {
                Some(Self { tablespace: DEFAULT_TABLESPACE, database: number(database)? })
            }
            [b"pg_tblspc", oid, version, database] if version.starts_with(b"PG_") => {
                Some(Self { tablespace: number(oid)?, database: number(database)? })
            }
            _ => None,
        }
    }

    /// Returns the relation whose file this is.
    pub fn relation(self, file: RelationFile) -> RelFileLocator {
        let Self { tablespace, database } = self;
        RelFileLocator { tablespace, database, relation: file.number }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_of_relation_files_are_read() {
        let read = |name: &str| {
            RelationFile::parse(name.as_bytes()).map(|file| (file.number, file.fork, file.segment))
        };
        assert_eq!(read("16384"), Some((16384, Fork::Main, 0)));
        assert_eq!(read("16384.12"), Some((16384, Fork::Main, 12)));
        assert_eq!(read("1_fsm"), Some((1, Fork::FreeSpaceMap, 0)));
        assert_eq!(read("4294967295_vm.3"), Some((u32::MAX, Fork::VisibilityMap, 3)));
        assert_eq!(read("7_init"), Some((7, Fork::Init, 0)));
        for other in [
            "",
            "0",
            "016384",
            "4294967296",
            "16384.",
            "16384.0",
            "16384.01",
            "16384_",
            "16384_x",
            "16384_fsm_vm",
            "t3_16384",
            "PG_VERSION",
            "pg_filenode.map",
            "+1",
            "1.1.1",
        ] {
            assert_eq!(read(other), None, "{other}");
        }
    }

    #[test]
    fn names_of_temporary_relations_are_known() {
        for name in ["t3_16384", "t3_16384.1", "t0_1_fsm", "t12_34_vm.5", "t1_2_init"] {
            assert!(is_temporary_relation(name.as_bytes()), "{name}");
        }
        for name in ["", "t", "t_1", "t1_", "t1", "1_2", "t1_2_", "t1_2_x", "t1_2.", "t1_2.x"] {
            assert!(!is_temporary_relation(name.as_bytes()), "{name}");
        }
    }

    #[test]
    fn relations_are_only_looked_for_where_postgresql_keeps_them() {
        let at = |path: &str| {
            RelationDirectory::at(path.as_bytes()).map(|at| (at.tablespace, at.database))
        };
        assert_eq!(at("global"), Some((1664, 0)));
        assert_eq!(at("base/5"), Some((1663, 5)));
        assert_eq!(at("pg_tblspc/16385/PG_18_202506291/16400"), Some((16385, 16400)));
        for other in
            ["", "base", "base/x", "base/5/6", "pg_xact", "pg_tblspc/1/x/2", "pg_tblspc/1/PG_18_2"]
        {
            assert_eq!(at(other), None, "{other}");
        }
    }

    proptest! {
        #[test]
        fn no_name_panics(name: Vec<u8>) {
            let _ = (RelationFile::parse(&name), is_temporary_relation(&name));
            let _ = RelationDirectory::at(&name);
        }

        #[test]
        fn a_written_name_is_read(number in 1u32.., segment in 1u32..) {
            let file = RelationFile::parse(format!("{number}_vm.{segment}").as_bytes()).unwrap();
            prop_assert_eq!(file, RelationFile { number, fork: Fork::VisibilityMap, segment });
        }
    }
}
