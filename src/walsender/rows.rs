//! Result sets of the simple query protocol: RowDescription and DataRow.
//!
//! ```text
//! RowDescription 'T': count u16, then per column: name\0, 18 bytes of type facts
//! DataRow        'D': count u16, then per column: length i32 (-1 = null), bytes
//! ```
//!
//! Source: manual, "Message Formats".

use bytes::{Buf, Bytes};

/// The bytes of RowDescription after each column's name.
const COLUMN_FACTS_BYTES: usize = 18;

/// The most bytes of values that one result set may hold; no command of ours
/// returns more than a timeline history.
const RESULT_BYTES_MAX: usize = 64 << 20;

/// One result set, its values as the server sent them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct RawRows {
    pub(super) columns: Vec<String>,
    pub(super) rows: Vec<Vec<Option<Bytes>>>,
    bytes: usize,
}

/// One result set as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows {
    /// The column names, in order; empty for a command that returns no rows.
    pub columns: Vec<String>,
    /// The rows, each with one value per column; `None` is SQL's null.
    pub rows: Vec<Vec<Option<String>>>,
}

impl Rows {
    /// Returns the value in `column` of `row` (from 0); `None` if it is null
    /// or there is no such row or column.
    pub fn get(&self, row: usize, column: &str) -> Option<&str> {
        let column = self.columns.iter().position(|name| name == column)?;
        self.rows.get(row)?.get(column)?.as_deref()
    }

    /// Returns the first value of the first row, unless there is none or it is null.
    pub fn first(&self) -> Option<&str> {
        self.rows.first()?.first()?.as_deref()
    }
}

impl RawRows {
    /// Begins a result set from a RowDescription body. Errors: what is malformed.
    pub(super) fn begin(mut body: Bytes) -> Result<Self, &'static str> {
        const MALFORMED: &str = "a RowDescription message is malformed";
        let count = body.try_get_u16().map_err(|_| MALFORMED)?;
        let mut columns = Vec::new();
        for _ in 0..count {
            let end = body.iter().position(|byte| *byte == 0).ok_or(MALFORMED)?;
            columns.push(String::from_utf8_lossy(&body[..end]).into_owned());
            if body.len() < end + 1 + COLUMN_FACTS_BYTES {
                return Err(MALFORMED);
            }
            body.advance(end + 1 + COLUMN_FACTS_BYTES);
        }
        if body.is_empty() { Ok(Self { columns, ..Self::default() }) } else { Err(MALFORMED) }
    }

    /// Adds a row from a DataRow body. Errors: what is malformed.
    pub(super) fn push(&mut self, mut body: Bytes) -> Result<(), &'static str> {
        const MALFORMED: &str = "a DataRow message is malformed";
        self.bytes += body.len();
        if self.bytes > RESULT_BYTES_MAX {
            return Err("a result is larger than any that is expected");
        }
        let count = usize::from(body.try_get_u16().map_err(|_| MALFORMED)?);
        if count != self.columns.len() {
            return Err("a row has not as many values as there are columns");
        }
        let mut row = Vec::with_capacity(count);
        for _ in 0..count {
            let length = body.try_get_i32().map_err(|_| MALFORMED)?;
            row.push(match usize::try_from(length) {
                Ok(length) if length <= body.len() => Some(body.split_to(length)),
                Ok(_) => return Err(MALFORMED),
                Err(_) => None,
            });
        }
        self.rows.push(row);
        if body.is_empty() { Ok(()) } else { Err(MALFORMED) }
    }

    /// Returns the values as text. Errors: a value that is not UTF-8.
    pub(super) fn into_text(self) -> Result<Rows, &'static str> {
        let text = |value: Option<Bytes>| {
            value
                .map(|value| String::from_utf8(value.into()).map_err(|_| "a value is not UTF-8"))
                .transpose()
        };
        let rows = self.rows.into_iter().map(|row| row.into_iter().map(text).collect());
        Ok(Rows { columns: self.columns, rows: rows.collect::<Result<_, _>>()? })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn description(names: &[&str]) -> Bytes {
        let mut body = u16::try_from(names.len()).unwrap().to_be_bytes().to_vec();
        for name in names {
            body.extend(name.bytes());
            body.extend([0; 1 + COLUMN_FACTS_BYTES]);
        }
        body.into()
    }

    #[test]
    fn rows_are_read_with_nulls_and_empty_values() {
        let mut rows = RawRows::begin(description(&["a", "b", "c"])).unwrap();
        let body = b"\0\x03\xff\xff\xff\xff\0\0\0\0\0\0\0\x02hi";
        rows.push(Bytes::from_static(body)).unwrap();
        let rows = rows.into_text().unwrap();
        assert_eq!(rows.get(0, "a"), None);
        assert_eq!(rows.get(0, "b"), Some(""));
        assert_eq!(rows.get(0, "c"), Some("hi"));
        assert_eq!((rows.get(1, "c"), rows.get(0, "d"), rows.first()), (None, None, None));
    }

    #[test]
    fn a_row_that_is_cut_or_too_long_is_refused() {
        let whole = b"\0\x01\0\0\0\x02hi";
        let begin = || RawRows::begin(description(&["a"])).unwrap();
        for end in 0..whole.len() {
            assert!(begin().push(Bytes::copy_from_slice(&whole[..end])).is_err(), "{end}");
        }
        let longer = [&whole[..], b"x"].concat();
        assert!(begin().push(longer.into()).is_err());
        assert!(begin().push(Bytes::from_static(b"\0\0")).is_err(), "a value is missing");
        assert!(begin().push(Bytes::from_static(b"\0\x01\x7f\xff\xff\xff")).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_fall(head: Vec<u8>, row: Vec<u8>) {
            let _ = RawRows::begin(head.into());
            let mut rows = RawRows::begin(description(&["a", "b"])).unwrap();
            let _ = rows.push(row.into());
        }
    }
}
