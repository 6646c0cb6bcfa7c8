//! A server with a repository claimed for it: where most scenarios begin.

use super::binary::{Highwater, Run};
use super::cluster::Cluster;
use super::lab::{Lab, copy_tree, files_below, fingerprint};
use std::path::PathBuf;

/// A running cluster, and a repository in which `init` was run for it.
pub struct Archived {
    // Dropped in this order: the server ends before its place is removed.
    pub cluster: Cluster,
    pub highwater: Highwater,
    pub lab: Lab,
}

impl Archived {
    /// A cluster that does not archive by itself; the test pushes by hand.
    pub fn by_hand(major: u32, segment_mib: u32) -> Self {
        let lab = Lab::open();
        let highwater = lab.highwater();
        Self::by_hand_into(&highwater, lab, major, segment_mib)
    }

    /// The same with its repository on an S3 server.
    pub fn by_hand_on_s3(major: u32, segment_mib: u32) -> Self {
        let lab = Lab::open();
        let highwater = lab.highwater_on_s3();
        Self::by_hand_into(&highwater, lab, major, segment_mib)
    }

    fn by_hand_into(highwater: &Highwater, lab: Lab, major: u32, segment_mib: u32) -> Self {
        let cluster = lab.cluster(major).segment_mib(segment_mib).start();
        let highwater = highwater.on(&cluster);
        highwater.run(&["init"]).done();
        Self { cluster, highwater, lab }
    }

    /// A cluster that archives by `archive_command`.
    pub fn by_server(major: u32) -> Self {
        Self::by_server_with(major, |builder| builder)
    }

    /// The same, with more said about the cluster.
    pub fn by_server_with(
        major: u32,
        more: impl FnOnce(super::cluster::ClusterBuilder) -> super::cluster::ClusterBuilder,
    ) -> Self {
        let lab = Lab::open();
        let highwater = lab.highwater();
        Self::by_server_into(&highwater, lab, major, more)
    }

    /// The same with its repository on an S3 server.
    pub fn by_server_on_s3(
        major: u32,
        more: impl FnOnce(super::cluster::ClusterBuilder) -> super::cluster::ClusterBuilder,
    ) -> Self {
        let lab = Lab::open();
        let highwater = lab.highwater_on_s3();
        Self::by_server_into(&highwater, lab, major, more)
    }

    /// The same with everything encrypted, into the repository that `choose` makes; the key is in the file `key`.
    pub fn by_server_encrypted(
        major: u32,
        choose: impl FnOnce(&Lab) -> Highwater,
        more: impl FnOnce(super::cluster::ClusterBuilder) -> super::cluster::ClusterBuilder,
    ) -> Self {
        let lab = Lab::open();
        let highwater = choose(&lab);
        let highwater = highwater.with_key(&highwater.new_key("key"));
        Self::by_server_into(&highwater, lab, major, more)
    }

    fn by_server_into(
        highwater: &Highwater,
        lab: Lab,
        major: u32,
        more: impl FnOnce(super::cluster::ClusterBuilder) -> super::cluster::ClusterBuilder,
    ) -> Self {
        // Archiving is on but paused until the repository is claimed; an empty
        // command is PostgreSQL's documented way to pause.
        let cluster = more(lab.cluster(major).conf("archive_mode = on")).start();
        let highwater = highwater.on(&cluster);
        highwater.run(&["init"]).done();
        cluster.archive_into(&highwater);
        Self { cluster, highwater, lab }
    }

    /// Writes a little and ends so many segments; returns their names.
    pub fn segments(&self, count: usize) -> Vec<String> {
        self.segments_with(count, 4000)
    }

    /// The same with so many rows in each, of about 100 bytes.
    pub fn segments_with(&self, count: usize, rows: u32) -> Vec<String> {
        self.cluster.sql("create table if not exists filler (n bigint, t text)");
        let segment = |n: usize| {
            self.cluster.sql(&format!(
                "insert into filler select g, md5((g + {n})::text) from generate_series(1, {rows}) g"
            ));
            self.cluster.switch_wal()
        };
        (0..count).map(segment).collect()
    }

    /// Stops the cluster, copies it, starts both: two servers with one system
    /// identifier that go on writing different WAL under the same names.
    pub fn twin(&mut self) -> Cluster {
        self.cluster.fast_stop();
        let copy = self.lab.path().join("twin");
        copy_tree(&self.cluster.pgdata, &copy);
        let mut twin = Cluster::adopt(&self.lab, self.cluster.major, &copy);
        self.cluster.start();
        twin.start();
        twin
    }

    /// Asks for a WAL file into a fresh place; returns the run and that place.
    pub fn fetch(&self, name: &str) -> (Run, PathBuf) {
        let place = self.lab.path().join(format!("fetched-{name}"));
        std::fs::remove_file(&place).ok();
        (self.highwater.get(name, &place), place)
    }

    /// Fails unless the repository gives back exactly these bytes.
    #[track_caller]
    pub fn assert_gives_back(&self, name: &str, wanted: &[u8]) {
        let (run, place) = self.fetch(name);
        run.done();
        assert!(std::fs::read(&place).unwrap() == wanted, "{name}: other bytes came back");
    }

    /// Returns each object of the repository that holds WAL, with the directory of pieces or the file name it
    /// stands under.
    pub fn wal_objects(&self) -> Vec<(String, PathBuf)> {
        let wal = self.highwater.repo_directory().join("main/wal");
        let named = |path: PathBuf| {
            let name = path.iter().nth(2)?.to_string_lossy().into_owned();
            Some((name, wal.join(path)))
        };
        files_below(&wal).into_iter().filter_map(named).collect()
    }

    /// Returns the stored objects of one WAL file.
    pub fn objects_of(&self, name: &str) -> Vec<PathBuf> {
        let repo = self.highwater.repo_directory();
        let is_part = |path: &PathBuf| path.iter().any(|part| part.to_string_lossy() == name);
        let parts = format!("{name}.parts");
        let in_parts = |path: &PathBuf| path.iter().any(|part| part.to_string_lossy() == parts);
        let all = files_below(&repo).into_iter();
        all.filter(|path| is_part(path) || in_parts(path)).map(|path| repo.join(path)).collect()
    }

    /// Restores into a new directory of this name and takes charge of it; the
    /// server is not started.
    #[track_caller]
    pub fn restore(&self, name: &str, arguments: &[&str]) -> Cluster {
        let pgdata = self.lab.path().join(name);
        let mut all = vec!["restore", "--pgdata", pgdata.to_str().unwrap()];
        all.extend(arguments);
        self.highwater.run(&all).done();
        Cluster::adopt(&self.lab, self.cluster.major, &pgdata)
    }

    /// Restores into a directory of this name, lets the server replay everything, and fails unless it
    /// then holds what `dump` says.
    #[track_caller]
    pub fn assert_copy_equals(&self, name: &str, dump: &str) {
        let mut copy = self.restore(name, &[]);
        copy.start();
        copy.wait_until("select pg_is_in_recovery()", "f");
        assert!(copy.dump() == dump, "the copy differs");
        copy.amcheck();
    }

    /// Fails unless every finished segment from `first` on comes back as the server has it.
    #[track_caller]
    pub fn assert_all_comes_back_from(&self, first: &str) {
        let names = self.cluster.finished_segments();
        let names: Vec<_> = names.into_iter().filter(|name| name.as_str() >= first).collect();
        assert!(names.len() > 2, "{names:?}");
        for name in &names {
            self.assert_gives_back(name, &std::fs::read(self.cluster.wal(name)).unwrap());
        }
    }

    /// Stores a segment, then pushes what this twin of the cluster has under the same name: that must be
    /// refused, and what is stored must stay as it is. Returns the name.
    #[track_caller]
    pub fn assert_keeps_its_own_against(&self, twin: &Cluster) -> String {
        let ours = self.segments(1).remove(0);
        twin.sql("create table another_life as select generate_series(1, 5000) n");
        let theirs = twin.switch_wal();
        assert_eq!(ours, theirs, "both servers end the same segment");
        self.highwater.push(&self.cluster.wal(&ours)).done();
        let stored = fingerprint(&self.highwater.repo_directory());
        self.highwater.push(&twin.wal(&theirs)).ends_with(3).says(&ours);
        assert_eq!(fingerprint(&self.highwater.repo_directory()), stored);
        self.assert_gives_back(&ours, &std::fs::read(self.cluster.wal(&ours)).unwrap());
        ours
    }

    /// Waits until the server's clock has passed the earliest time that can be asked for: the
    /// time of a backup is known in whole seconds.
    pub fn pass_earliest_time(&self) {
        let earliest = self.highwater.info()["recovery_window"]["earliest_time"].clone();
        let earliest = earliest.as_str().unwrap();
        self.cluster.wait_until(&format!("select clock_timestamp() > '{earliest}'"), "t");
    }

    /// Waits until the server's clock is past the end of a backup, as its report tells it.
    pub fn pass_time_of(&self, made: &serde_json::Value) {
        let end = made["finished_at"].as_str().unwrap();
        self.cluster.wait_until(&format!("select clock_timestamp() > '{end}'"), "t");
    }

    /// Returns the server's present time with an explicit zone.
    pub fn now(&self) -> String {
        self.cluster.sql(
            "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') \
             || '+00'",
        )
    }
}
