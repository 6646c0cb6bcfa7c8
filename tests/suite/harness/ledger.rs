//! A ledger: every committed transaction writes its own number, its own
//! transaction id and its time, so that a restored copy can be compared with
//! what was committed by then, row for row.

use super::cluster::Cluster;
use std::collections::BTreeMap;

/// One transaction of the ledger, one in eight of them rolled back, some with
/// a savepoint inside.
const SCRIPT: &str = "\
\\set die random(1, 8)
begin;
insert into ledger (xid, note) values (pg_current_xact_id()::text::bigint, 'client :client_id');
\\if :die = 1
rollback;
\\elif :die = 2
savepoint inner_part;
insert into ledger (xid, note) values (-pg_current_xact_id()::text::bigint, 'undone');
rollback to savepoint inner_part;
commit;
\\else
commit;
\\endif
";

/// The whole ledger of the origin: transaction id to row text.
pub struct Ledger {
    rows: BTreeMap<u32, String>,
}

const ALL_ROWS: &str = "select xid, number, written, note from ledger order by number";

impl Ledger {
    /// Makes the ledger's table.
    pub fn create(cluster: &Cluster) {
        cluster.sql(
            "create table ledger (number bigserial primary key, xid bigint not null unique, \
             written timestamptz not null default clock_timestamp(), note text not null)",
        );
    }

    /// Writes from several clients, so many transactions each.
    pub fn write(cluster: &Cluster, clients: u32, transactions: u32) {
        let script = cluster.pgdata.with_extension("ledger.sql");
        std::fs::write(&script, SCRIPT).unwrap();
        cluster.pgbench(&[
            "-n",
            "-f",
            script.to_str().unwrap(),
            "-c",
            &clients.to_string(),
            "-t",
            &transactions.to_string(),
        ]);
    }

    /// Reads what the origin holds now.
    pub fn read(cluster: &Cluster) -> Self {
        Self { rows: by_transaction(&cluster.sql(ALL_ROWS)) }
    }

    /// Returns the number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True if this transaction wrote a row that stayed.
    pub fn has(&self, xid: u32) -> bool {
        self.rows.contains_key(&xid)
    }

    /// Fails unless the restored copy holds exactly the rows of these
    /// transactions, none missing, none more, each with the same content.
    #[track_caller]
    pub fn assert_copy_holds(&self, copy: &Cluster, committed: &[u32], what: &str) {
        let found = by_transaction(&copy.sql(ALL_ROWS));
        let wanted: BTreeMap<u32, String> =
            committed.iter().filter_map(|xid| Some((*xid, self.rows.get(xid)?.clone()))).collect();
        let missing: Vec<_> = wanted.keys().filter(|xid| !found.contains_key(xid)).collect();
        let surplus: Vec<_> = found.keys().filter(|xid| !wanted.contains_key(xid)).collect();
        assert!(
            missing.is_empty() && surplus.is_empty(),
            "{what}: missing {missing:?}, too many {surplus:?}"
        );
        assert_eq!(found, wanted, "{what}: rows differ");
    }
}

fn by_transaction(rows: &str) -> BTreeMap<u32, String> {
    let entry = |row: &str| {
        let (xid, rest) = row.split_once('|').unwrap();
        (xid.parse().unwrap(), rest.to_owned())
    };
    rows.lines().map(entry).collect()
}
