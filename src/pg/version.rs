//! Which PostgreSQL a number on disk or on the wire belongs to.
//!
//! Three numbers name a major version: the page magic of WAL, the catalog
//! version in `pg_control`, and `server_version_num`. `pg_control_version`
//! alone does not (13 to 16 share 1300).
//!
//! Sources: `src/include/access/xlog_internal.h` (`XLOG_PAGE_MAGIC`),
//! `src/include/catalog/catversion.h`, `src/include/pg_config.h` (`PG_VERSION_NUM`).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A PostgreSQL major version, such as 18.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MajorVersion(pub u32);

/// Major version, WAL page magic, catalog version. Released versions only; the
/// catalog version of 19 was not yet fixed, its page magic is that of the betas.
const KNOWN: [(u32, u16, Option<u32>); 7] = [
    (13, 0xD106, Some(202_007_201)),
    (14, 0xD10D, Some(202_107_181)),
    (15, 0xD110, Some(202_209_061)),
    (16, 0xD113, Some(202_307_071)),
    (17, 0xD116, Some(202_406_281)),
    (18, 0xD118, Some(202_506_291)),
    (19, 0xD120, None),
];

impl MajorVersion {
    /// The oldest version that Highwater works with.
    pub const OLDEST_SUPPORTED: Self = Self(14);
    /// The newest version that Highwater works with.
    pub const NEWEST_SUPPORTED: Self = Self(18);

    /// Returns whether Highwater works with this version (14 to 18).
    pub fn is_supported(self) -> bool {
        (Self::OLDEST_SUPPORTED..=Self::NEWEST_SUPPORTED).contains(&self)
    }

    /// Returns the version that writes WAL pages with this magic (`xlp_magic`),
    /// or `None` for a number no release from 13 to 19 uses.
    pub fn from_page_magic(magic: u16) -> Option<Self> {
        KNOWN.iter().find(|known| known.1 == magic).map(|known| Self(known.0))
    }

    /// Returns the version whose catalog has this number (`catalog_version_no`),
    /// or `None` for a number no release from 13 to 18 uses.
    pub fn from_catalog_version(number: u32) -> Option<Self> {
        KNOWN.iter().find(|known| known.2 == Some(number)).map(|known| Self(known.0))
    }

    /// Returns the WAL page magic of this version, or `None` where it is not known.
    pub fn page_magic(self) -> Option<u16> {
        KNOWN.iter().find(|known| known.0 == self.0).map(|known| known.1)
    }
}

impl fmt::Display for MajorVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A server's full version as `server_version_num` gives it, such as 180006 for 18.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServerVersion(pub u32);

impl ServerVersion {
    /// Returns the major version. Meaningful from PostgreSQL 10 on, when the
    /// number became major × 10000 + minor; 9.6.24 (90624) gives 9.
    pub fn major(self) -> MajorVersion {
        MajorVersion(self.0 / 10_000)
    }

    /// Returns the minor version, 6 for 18.6.
    pub fn minor(self) -> u32 {
        self.0 % 10_000
    }
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())
    }
}

/// The text was not a `server_version_num`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a server_version_num; one looks like `180006`")]
pub struct ParseServerVersionError(pub String);

impl FromStr for ServerVersion {
    type Err = ParseServerVersionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = (5..=7).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = plain.then(|| text.parse().ok()).flatten();
        number.map(Self).ok_or_else(|| ParseServerVersionError(text.to_owned()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_known_number_names_its_major_version() {
        assert_eq!(MajorVersion::from_page_magic(0xD110), Some(MajorVersion(15)));
        assert_eq!(MajorVersion::from_page_magic(0xD117), None);
        assert_eq!(MajorVersion::from_page_magic(0), None);
        assert_eq!(MajorVersion::from_catalog_version(202_406_281), Some(MajorVersion(17)));
        assert_eq!(MajorVersion::from_catalog_version(0), None);
        assert_eq!(MajorVersion(18).page_magic(), Some(0xD118));
    }

    #[test]
    fn fourteen_to_eighteen_are_supported() {
        let supported: Vec<u32> =
            (9..25).filter(|&number| MajorVersion(number).is_supported()).collect();
        assert_eq!(supported, [14, 15, 16, 17, 18]);
    }

    #[test]
    fn server_version_num_is_read_and_shown() {
        let version: ServerVersion = "180006".parse().unwrap();
        assert_eq!((version.major(), version.minor()), (MajorVersion(18), 6));
        assert_eq!(version.to_string(), "18.6");
        for bad in ["", "18", "18.6", "+180006", "-18000", "99999999", "18000x"] {
            assert!(bad.parse::<ServerVersion>().is_err(), "{bad}");
        }
    }
}
