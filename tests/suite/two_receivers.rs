//! Two servers that write one timeline, each followed into the same place.

use std::fs;

use crate::harness::{Archived, NEWEST, Receiver, parse_lsn};

/// Only one of the two can have the complete segment; what the other acknowledged of it stays, and both are told.
#[test]
fn who_completes_a_segment_does_not_remove_what_another_servers_receiver_acknowledged() {
    for major in [14, NEWEST] {
        let mut place = Archived::by_hand(major, 16);
        let twin = place.twin();
        let ours = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        ours.wait_acknowledged(&place.cluster);
        let its = Receiver::streaming(&place.highwater.on(&twin), &twin, &[]);
        its.wait_acknowledged(&twin);

        place.cluster.sql("create table ours as select generate_series(1, 900) n");
        let acknowledged = parse_lsn(&ours.wait_acknowledged(&place.cluster));
        let pieces: Vec<_> = place
            .wal_objects()
            .into_iter()
            .map(|(_, path)| (fs::read(&path).unwrap(), path))
            .collect();
        assert!(!pieces.is_empty());
        twin.sql("create table its as select md5(n::text) from generate_series(1, 1777) n");
        its.wait_acknowledged(&twin);
        let name = twin.switch_wal();
        let refused = its.wait().ends_with(3);
        refused.says(".parts/").says(&format!("/{name}`")).says("holds other WAL than");
        let stand =
            || pieces.iter().all(|(bytes, path)| fs::read(path).ok().as_ref() == Some(bytes));
        assert!(stand(), "acknowledged WAL was removed");

        assert_eq!(place.cluster.switch_wal(), name);
        ours.wait().ends_with(3).says(".parts/").says(&format!("/{name}`"));
        assert!(stand(), "acknowledged WAL was removed");
        place.highwater.run(&["verify", "--deep"]).ends_with(4).says(&name);

        // As the message says.
        let whole = place.wal_objects().into_iter().map(|(_, path)| path);
        let whole = whole.into_iter().find(|path| path.ends_with(&name)).unwrap();
        fs::rename(whole, place.lab.path().join("aside")).unwrap();
        let (run, fetched) = place.fetch(&name);
        run.done();
        let until = usize::try_from(acknowledged % (16 << 20)).unwrap();
        let wanted = fs::read(place.cluster.wal(&name)).unwrap();
        assert!(fs::read(fetched).unwrap()[..until] == wanted[..until], "other bytes came back");
    }
}
