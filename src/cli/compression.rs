//! The compression setting: `zstd[:level]`, `lz4` or `none`.
//!
//! Owns its words. Never here: compressing; `format` does that.

use std::fmt;

/// The level of a bare `zstd`: on WAL, higher ones cost CPU and save next to nothing.
const ZSTD_LEVEL_DEFAULT: u8 = 1;

/// Levels above 19 need far more memory to read back, so they are not offered.
const ZSTD_LEVELS: std::ops::RangeInclusive<u8> = 1..=19;

/// How stored objects are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// zstd, at a level from 1 to 19.
    Zstd(u8),
    /// lz4.
    Lz4,
    /// Not at all.
    None,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zstd(level) => write!(f, "zstd:{level}"),
            Self::Lz4 => f.write_str("lz4"),
            Self::None => f.write_str("none"),
        }
    }
}

impl Compression {
    /// Reads the setting; `None` if it is not one of its words or the level is out of range.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "lz4" => Some(Self::Lz4),
            "none" => Some(Self::None),
            "zstd" => Some(Self::Zstd(ZSTD_LEVEL_DEFAULT)),
            _ => {
                let digits = text.strip_prefix("zstd:")?;
                let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
                let level = digits.parse().ok().filter(|level| ZSTD_LEVELS.contains(level))?;
                plain.then_some(Self::Zstd(level))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_survives_its_text() {
        for setting in
            [Compression::Lz4, Compression::None, Compression::Zstd(1), Compression::Zstd(19)]
        {
            assert_eq!(Compression::parse(&setting.to_string()), Some(setting));
        }
        assert_eq!(Compression::parse("zstd"), Some(Compression::Zstd(1)));
        for bad in ["", "zstd:", "zstd:0", "zstd:20", "zstd:+3", "ZSTD", "lz4:1", "gzip"] {
            assert_eq!(Compression::parse(bad), None, "{bad}");
        }
    }
}
