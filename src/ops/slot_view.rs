//! A replication slot as the server's view shows it.

use crate::pg::Lsn;
use crate::plan::slot::SlotRoom;
use crate::walsender::{Connection, PgError, SlotName};

/// One row of `pg_replication_slots`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct SlotView {
    /// How much room it has left.
    pub(super) room: SlotRoom,
    /// Whether somebody streams with it.
    pub(super) is_active: bool,
    /// From where on it keeps WAL, if it keeps any.
    pub(super) restart_lsn: Option<Lsn>,
}

/// Asks for a slot, on an ordinary connection; `None` if there is none of that name.
pub(super) async fn view_slot(
    connection: &mut Connection,
    slot: &SlotName,
) -> Result<Option<SlotView>, PgError> {
    // The letters of a slot's name need no quoting.
    let query = format!(
        "SELECT wal_status, safe_wal_size, active, restart_lsn, pg_catalog.pg_size_bytes(pg_catalog.current_setting('max_slot_wal_keep_size')) AS keep_size FROM pg_catalog.pg_replication_slots WHERE slot_name = '{slot}'"
    );
    let rows = connection.query(&query).await?;
    Ok((!rows.rows.is_empty()).then(|| read_row(|column| rows.get(0, column))))
}

/// Reads a row; what is not there is not known.
fn read_row<'a>(column: impl Fn(&str) -> Option<&'a str>) -> SlotView {
    let bytes = |name| column(name).and_then(|text| text.parse().ok());
    let room = SlotRoom {
        wal_status: column("wal_status").unwrap_or_default().to_owned(),
        safe_bytes: bytes("safe_wal_size"),
        // -1: no limit.
        keep_bytes: bytes("keep_size").filter(|keep| *keep >= 0),
    };
    let restart_lsn = column("restart_lsn").and_then(|lsn| lsn.parse().ok());
    SlotView { room, is_active: column("active") == Some("t"), restart_lsn }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_does_not_say_is_not_known() {
        assert_eq!(read_row(|_| None), SlotView::default());
        let unbounded = read_row(|column| (column == "keep_size").then_some("-1"));
        assert_eq!(unbounded, SlotView::default());
    }

    #[test]
    fn a_row_is_read_as_the_server_prints_it() {
        let columns = [
            ("wal_status", "extended"),
            ("safe_wal_size", "-8192"),
            ("active", "t"),
            ("restart_lsn", "1/2B000028"),
            ("keep_size", "67108864"),
        ];
        let view = read_row(|name| {
            columns.iter().find(|(column, _)| *column == name).map(|(_, text)| *text)
        });
        let room = SlotRoom {
            wal_status: "extended".to_owned(),
            safe_bytes: Some(-8192),
            keep_bytes: Some(64 << 20),
        };
        let restart_lsn = Some(Lsn(0x1_2B00_0028));
        assert_eq!(view, SlotView { room, is_active: true, restart_lsn });
    }
}
