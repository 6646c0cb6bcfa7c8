//! `tablespace_map`: where each tablespace of a base backup lives.
//!
//! One line per tablespace, `<oid> <path>`; line feed, carriage return and
//! backslash within the path are led by a backslash:
//!
//! ```text
//! 16384 /srv/fast
//! 16385 /srv/odd\\name
//! ```
//!
//! A server that starts with `backup_label` present makes the links in `pg_tblspc` from it.
//! Sources: `src/backend/access/transam/xlog.c` (`do_pg_backup_start`),
//! `xlogrecovery.c` (`read_tablespace_map`).

/// The longest `tablespace_map` that is read, in bytes.
const MAP_BYTES_MAX: usize = 16 << 20;

/// One tablespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceMapEntry {
    /// Its OID, the name of its link in `pg_tblspc`.
    pub oid: u32,
    /// Its directory, as bytes: PostgreSQL does not ask for UTF-8.
    pub path: Vec<u8>,
}

/// The tablespaces, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TablespaceMap {
    /// One entry per tablespace.
    pub entries: Vec<TablespaceMapEntry>,
}

/// Why bytes are not a `tablespace_map`. No retry cures it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TablespaceMapError {
    /// A line is not `<oid> <path>`.
    #[error("line {line} of tablespace_map is not `<oid> <path>`")]
    BadLine {
        /// The line, from 1.
        line: usize,
    },
    /// The last line has no end.
    #[error("tablespace_map ends inside line {line}")]
    Cut {
        /// The line, from 1.
        line: usize,
    },
    /// The file is far longer than any real one.
    #[error("tablespace_map has {found} bytes, more than {MAP_BYTES_MAX}")]
    TooLong {
        /// How many bytes.
        found: usize,
    },
}

impl TablespaceMap {
    /// Returns the tablespaces in the file; an empty file has none.
    pub fn parse(bytes: &[u8]) -> Result<Self, TablespaceMapError> {
        if bytes.len() > MAP_BYTES_MAX {
            return Err(TablespaceMapError::TooLong { found: bytes.len() });
        }
        let mut entries = Vec::new();
        let mut text = Vec::new();
        let mut escaped = false;
        for &byte in bytes {
            match byte {
                b'\\' if !escaped => {
                    escaped = true;
                    continue;
                }
                b'\n' | b'\r' if !escaped => {
                    // PostgreSQL ends a line at either, and passes over empty ones.
                    if !text.is_empty() {
                        let line = entries.len() + 1;
                        let entry =
                            parse_line(&text).ok_or(TablespaceMapError::BadLine { line })?;
                        entries.push(entry);
                        text.clear();
                    }
                }
                _ => text.push(byte),
            }
            escaped = false;
        }
        if escaped || !text.is_empty() {
            return Err(TablespaceMapError::Cut { line: entries.len() + 1 });
        }
        Ok(Self { entries })
    }

    /// Returns the file that PostgreSQL would write for these tablespaces.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for entry in &self.entries {
            bytes.extend(entry.oid.to_string().as_bytes());
            bytes.push(b' ');
            for &byte in &entry.path {
                if matches!(byte, b'\n' | b'\r' | b'\\') {
                    bytes.push(b'\\');
                }
                bytes.push(byte);
            }
            bytes.push(b'\n');
        }
        bytes
    }
}

fn parse_line(text: &[u8]) -> Option<TablespaceMapEntry> {
    let space = text.iter().position(|&byte| byte == b' ')?;
    let (oid, path) = (str::from_utf8(&text[..space]).ok()?, &text[space + 1..]);
    let plain = oid.bytes().all(|byte| byte.is_ascii_digit());
    let oid: u32 = plain.then(|| oid.parse().ok()).flatten()?;
    (oid != 0 && !path.is_empty()).then(|| TablespaceMapEntry { oid, path: path.to_vec() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_are_unescaped() {
        let map = TablespaceMap::parse(b"16384 /srv/a b\n16385 /srv/x\\\ny\\\\z\\\r\n").unwrap();
        assert_eq!(map.entries[0], TablespaceMapEntry { oid: 16384, path: b"/srv/a b".to_vec() });
        assert_eq!(map.entries[1].path, b"/srv/x\ny\\z\r");
        assert_eq!(TablespaceMap::parse(b"").unwrap(), TablespaceMap::default());
    }

    #[test]
    fn malformed_maps_are_refused() {
        for bad in ["16384\n", "x /srv\n", "+1 /srv\n", "0 /srv\n", "1 \n", "99999999999 /a\n"] {
            let error = TablespaceMap::parse(bad.as_bytes()).unwrap_err();
            assert_eq!(error, TablespaceMapError::BadLine { line: 1 }, "{bad}");
        }
        let cut = TablespaceMap::parse(b"1 /a\n2 /b").unwrap_err();
        assert_eq!(cut, TablespaceMapError::Cut { line: 2 });
    }

    proptest! {
        #[test]
        fn a_map_survives_its_file(
            entries in proptest::collection::vec(
                (1u32.., proptest::collection::vec(any::<u8>(), 1..40)), 0..5),
        ) {
            let entries =
                entries.into_iter().map(|(oid, path)| TablespaceMapEntry { oid, path }).collect();
            let map = TablespaceMap { entries };
            prop_assert_eq!(TablespaceMap::parse(&map.to_bytes()).unwrap(), map);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = TablespaceMap::parse(&bytes);
        }
    }
}
