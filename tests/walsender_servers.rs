//! The replication client against real PostgreSQL servers of every major version.
//!
//! Needs `HIGHWATER_PG_ROOT`, a directory with one PostgreSQL tree per major
//! (`14/bin`, `14/lib`, ...), and the `openssl` command. Servers run as an
//! unprivileged user, listen on loopback and a socket of their own, and live
//! in a temporary directory.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use highwater::pg::{Lsn, PgTimestamp, SegmentName, SegmentSize, Timeline};
use highwater::walsender::{
    BackupEvent, BackupOptions, BaseBackup, ConnInfo, Connection, ManifestChecksums, Mode,
    PgEnvironment, PgError, SlotName, SlotState, StreamEvent, StreamStart, StreamStatus,
    Tablespace, WalStream,
};

/// The user that may run servers: ourselves, or `postgres` or `nobody` where we are root.
fn server_user() -> (u32, u32) {
    let own = fs::metadata("/proc/self").unwrap();
    if own.uid() != 0 {
        return (own.uid(), own.gid());
    }
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let find = |name: &str| {
        let line = passwd.lines().find(|line| line.starts_with(&format!("{name}:")))?;
        let mut fields = line.split(':').skip(2);
        Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
    };
    find("postgres").or_else(|| find("nobody")).expect("a user to run servers as")
}

/// Lets the user that runs servers have a file or directory.
fn give(path: &Path) {
    let (uid, gid) = server_user();
    chown(path, Some(uid), Some(gid)).unwrap();
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}\n{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Certificates, made once: an authority with a server and a client certificate
/// signed by it, and another authority.
fn certificates() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(make_certificates)
}

fn make_certificates() -> PathBuf {
    // Nothing drops a static, so the place is a fixed one that is made anew.
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("walsender-certificates");
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    let openssl = |arguments: &str| {
        run(Command::new("openssl").args(arguments.split(' ')).current_dir(&directory));
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    for (name, subject) in
        [("ca", "/CN=ca"), ("other", "/CN=other"), ("selfsigned", "/CN=localhost")]
    {
        openssl(&format!(
            "req -x509 -days 30 {key} -keyout {name}.key -out {name}.crt -subj {subject}"
        ));
    }
    fs::write(directory.join("v3"), "subjectAltName=DNS:localhost\n").unwrap();
    fs::write(directory.join("v3client"), "extendedKeyUsage=clientAuth\n").unwrap();
    for (name, extensions) in
        [("server", "v3"), ("certuser", "v3client"), ("commonname", "v3client")]
    {
        let subject = if name == "certuser" { "certuser" } else { "localhost" };
        openssl(&format!("req -new {key} -keyout {name}.key -out {name}.csr -subj /CN={subject}"));
        // `commonname` has a v3 form without subjectAltName or any purpose.
        if name == "commonname" {
            fs::write(directory.join(extensions), "basicConstraints=CA:FALSE\n").unwrap();
        }
        openssl(&format!(
            "x509 -req -days 30 -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial \
             -out {name}.crt -extfile {extensions} -sha384"
        ));
    }
    // What the manual's recipe makes with OpenSSL 3.0: X.509 version 1. Later
    // ones make version 3 unless asked, with an option that 3.0 lacks.
    fs::write(directory.join("plain.cnf"), "[req]\ndistinguished_name=dn\n[dn]\n").unwrap();
    let version1 = |kind: &str| {
        let rest = format!(
            "-config plain.cnf -days 30 {key} -CA ca.crt -CAkey ca.key -keyout version1.key \
             -out version1.crt -subj /CN=localhost"
        );
        let mut openssl = Command::new("openssl");
        openssl.args(["req", kind]).args(rest.split(' ')).current_dir(&directory);
        openssl.output().unwrap().status.success()
    };
    assert!(version1("-x509v1") || version1("-x509"), "no certificate of version 1");
    directory
}

/// A cluster of one major version; stopped and removed at the end.
struct Server {
    major: u32,
    tree: PathBuf,
    directory: tempfile::TempDir,
    port: u16,
}

const HBA: &str = "\
local     all,replication all                trust
hostssl   all,replication certuser  127.0.0.1/32 cert
hostssl   all,replication tlsonly   127.0.0.1/32 scram-sha-256
hostnossl all,replication plainonly 127.0.0.1/32 scram-sha-256
host      all,replication scram     127.0.0.1/32 scram-sha-256
host      all,replication md5       127.0.0.1/32 md5
host      all,replication clear     127.0.0.1/32 password
host      all             trusted   127.0.0.1/32 trust
";

impl Server {
    fn new(major: u32) -> Self {
        Self::made_by(major, "-k", "")
    }

    /// Makes and starts a cluster, with more words for initdb and more settings.
    fn made_by(major: u32, initdb: &str, more: &str) -> Self {
        let server = Self::empty(major);
        let data = server.path("data");
        run(server
            .tool("initdb")
            .arg("-D")
            .arg(&data)
            .args("-U postgres -A trust -N".split(' '))
            .args(initdb.split(' ')));
        fs::write(data.join("pg_hba.conf"), HBA).unwrap();
        let settings = format!(
            "{}fsync = off\nssl = on\nssl_ca_file = 'ca.crt'\n\
             ssl_cert_file = 'server.crt'\nssl_key_file = 'server.key'\n{more}\n",
            server.own_settings()
        );
        fs::write(data.join("postgresql.auto.conf"), settings).unwrap();
        server.show_certificate("server");
        server.start();
        server
    }

    /// Makes and starts a standby of `primary`.
    fn standby_of(primary: &Self) -> Self {
        let server = Self::empty(primary.major);
        let data = server.path("data");
        fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
        let socket = primary.path("socket");
        let mut copy = server.tool("pg_basebackup");
        copy.args(["-R", "-X", "stream", "-c", "fast", "-U", "postgres"]);
        copy.arg("-h").arg(socket).args(["-p", &primary.port.to_string()]).arg("-D").arg(&data);
        run(&mut copy);
        let path = data.join("postgresql.auto.conf");
        let copied = fs::read_to_string(&path).unwrap();
        fs::write(path, format!("{copied}{}", server.own_settings())).unwrap();
        server.start();
        server
    }

    /// Makes the place for a cluster.
    fn empty(major: u32) -> Self {
        let root = std::env::var_os("HIGHWATER_PG_ROOT")
            .expect("set HIGHWATER_PG_ROOT to a directory with PostgreSQL trees named 14 to 18");
        let directory =
            tempfile::Builder::new().prefix("hw-walsender-").tempdir_in("/tmp").unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let server =
            Self { major, tree: Path::new(&root).join(major.to_string()), directory, port };
        for name in ["data", "socket", "space"] {
            fs::create_dir(server.path(name)).unwrap();
            give(&server.path(name));
        }
        server
    }

    fn own_settings(&self) -> String {
        let (port, socket) = (self.port, self.path("socket"));
        format!(
            "port = {port}\nlisten_addresses = '127.0.0.1'\nunix_socket_directories = '{}'\n",
            socket.display()
        )
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn tool(&self, name: &str) -> Command {
        let (uid, gid) = server_user();
        let mut command = Command::new(self.tree.join("bin").join(name));
        command.env("LD_LIBRARY_PATH", self.tree.join("lib")).env("LC_ALL", "C");
        command.current_dir(self.directory.path()).uid(uid).gid(gid);
        command
    }

    /// Makes the server show another certificate from its next start on.
    fn show_certificate(&self, name: &str) {
        let data = self.path("data");
        for (from, to) in [
            ("ca.crt", "ca.crt"),
            (&*format!("{name}.crt"), "server.crt"),
            (&*format!("{name}.key"), "server.key"),
        ] {
            let to = data.join(to);
            fs::copy(certificates().join(from), &to).unwrap();
            fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
            give(&to);
        }
    }

    fn pg_ctl(&self, arguments: &[&str]) {
        let mut command = self.tool("pg_ctl");
        command.arg("-D").arg(self.path("data")).arg("-w").args(arguments);
        let log = self.path("socket/log");
        let output = command.arg("-l").arg(&log).output().unwrap();
        let said = fs::read_to_string(log).unwrap_or_default();
        assert!(output.status.success(), "pg_ctl {arguments:?} failed; the server said:\n{said}");
    }

    fn start(&self) {
        self.pg_ctl(&["start"]);
    }

    fn stop(&self) {
        self.pg_ctl(&["stop", "-m", "fast"]);
    }

    /// Settings over TCP; TLS by default the strictest.
    fn tcp(&self, more: &str) -> ConnInfo {
        let root = certificates().join("ca.crt");
        let dsn = format!(
            "host=localhost hostaddr=127.0.0.1 port={} dbname=postgres sslmode=verify-full \
             sslrootcert={} {more}",
            self.port,
            root.display()
        );
        ConnInfo::read(Some(&dsn), &PgEnvironment::default()).unwrap()
    }

    /// Settings over the socket, as superuser.
    fn local(&self) -> ConnInfo {
        let host = self.path("socket");
        let dsn = format!("host={} port={} user=postgres", host.display(), self.port);
        ConnInfo::read(Some(&dsn), &PgEnvironment::default()).unwrap()
    }

    async fn sql(&self, text: &str) -> String {
        let mut connection = Connection::connect(&self.local(), Mode::Sql).await.unwrap();
        let answer = connection.query(text).await.unwrap();
        connection.close().await;
        answer.first().unwrap_or_default().to_owned()
    }

    async fn walsender(&self) -> Connection {
        Connection::connect(&self.local(), Mode::Replication).await.unwrap()
    }

    /// Asks `text` until the answer is `wanted`.
    async fn wait_until(&self, text: &str, wanted: &str) {
        let begun = Instant::now();
        loop {
            let answer = self.sql(text).await;
            if answer == wanted {
                return;
            }
            assert!(begun.elapsed() < LIMIT, "{text} is `{answer}` and never `{wanted}`");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn lsn(&self, text: &str) -> Lsn {
        self.sql(text).await.parse().unwrap()
    }

    /// Writes WAL over `segments` ends of segments, and returns where it then ends.
    async fn write_segments(&self, segments: u32) -> Lsn {
        for number in 0..segments {
            self.sql(&format!(
                "SELECT pg_logical_emit_message(true, 'test', repeat('{number}', 300000))"
            ))
            .await;
            self.sql("SELECT pg_switch_wal()").await;
        }
        self.sql("SELECT pg_logical_emit_message(true, 'test', repeat('x', 30000))").await;
        self.lsn("SELECT pg_current_wal_flush_lsn()").await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut stop = self.tool("pg_ctl");
        let _ = stop.arg("-D").arg(self.path("data")).args(["-m", "immediate", "stop"]).output();
    }
}

async fn both_modes(info: &ConnInfo) -> Result<(), PgError> {
    for mode in [Mode::Sql, Mode::Replication] {
        let mut connection = Connection::connect(info, mode).await?;
        let size = connection.show("wal_segment_size").await?;
        assert_eq!(size, "16MB");
        connection.close().await;
    }
    Ok(())
}

async fn logins_work_as_pg_hba_says(server: &Server) {
    for (user, method) in [
        ("scram", "scram-sha-256"),
        ("tlsonly", "scram-sha-256"),
        ("plainonly", "scram-sha-256"),
        ("md5", "md5"),
        ("clear", "scram-sha-256"),
    ] {
        server
            .sql(&format!(
                "SET password_encryption = '{method}'; \
                 CREATE ROLE {user} LOGIN REPLICATION PASSWORD 'it''s {user}'"
            ))
            .await;
    }
    server.sql("CREATE ROLE certuser LOGIN REPLICATION; CREATE ROLE trusted LOGIN").await;
    for user in ["scram", "tlsonly", "md5", "clear"] {
        let password = format!(r"user={user} password='it\'s {user}'");
        both_modes(&server.tcp(&password)).await.unwrap_or_else(|error| panic!("{user}: {error}"));
        let wrong = both_modes(&server.tcp(&format!("user={user} password=x"))).await.unwrap_err();
        assert_eq!(wrong.sqlstate(), Some("28P01"), "{user}: {wrong}");
        let none = both_modes(&server.tcp(&format!("user={user}"))).await.unwrap_err();
        assert!(matches!(none, PgError::Auth { .. }), "{user}: {none}");
    }
    let tls_only = r"user=tlsonly password='it\'s tlsonly'";
    let plain_only = r"user=plainonly password='it\'s plainonly'";
    for (user, mode, works) in [
        (tls_only, "disable", false),
        (tls_only, "allow", true),
        (tls_only, "prefer", true),
        (tls_only, "require", true),
        (tls_only, "verify-ca", true),
        (plain_only, "disable", true),
        (plain_only, "allow", true),
        (plain_only, "prefer", true),
        (plain_only, "require", false),
        (plain_only, "verify-full", false),
    ] {
        let outcome = both_modes(&server.tcp(&format!("{user} sslmode={mode}"))).await;
        assert_eq!(outcome.is_ok(), works, "{user} {mode}: {outcome:?}");
    }
}

async fn passwords_come_from_the_passfile(server: &Server) {
    let passfile = server.path("pass");
    let (port, line) = (server.port, "it's scram");
    fs::write(
        &passfile,
        format!(
            "localhost:{port}:postgres:scram:{line}\nlocalhost:{port}:replication:scram:{line}\n"
        ),
    )
    .unwrap();
    fs::set_permissions(&passfile, fs::Permissions::from_mode(0o600)).unwrap();
    let info = server.tcp(&format!("user=scram passfile={}", passfile.display()));
    both_modes(&info).await.unwrap();
    fs::set_permissions(&passfile, fs::Permissions::from_mode(0o644)).unwrap();
    let error = both_modes(&info).await.unwrap_err();
    assert!(error.to_string().contains("0600"), "{error}");
}

async fn channel_binding_binds(server: &Server) {
    let scram = r"user=scram password='it\'s scram'";
    for (wish, works) in [
        ("channel_binding=require", true),
        ("channel_binding=disable", true),
        ("channel_binding=require ssl_max_protocol_version=TLSv1.2", true),
        ("channel_binding=require require_auth=scram-sha-256", true),
        ("channel_binding=require sslmode=prefer", true),
        ("channel_binding=require sslmode=disable", false),
        ("require_auth=md5", false),
    ] {
        let outcome = both_modes(&server.tcp(&format!("{scram} {wish}"))).await;
        assert_eq!(outcome.is_ok(), works, "{wish}: {outcome:?}");
    }
    for user in ["md5 password='it\\'s md5'", "clear password='it\\'s clear'", "trusted"] {
        let info = server.tcp(&format!("user={user} channel_binding=require"));
        let error = Connection::connect(&info, Mode::Sql).await.unwrap_err();
        assert!(matches!(error, PgError::Auth { .. }), "{user}: {error}");
    }
}

async fn certificates_are_checked_in_both_directions(server: &Server) {
    let scram = r"user=scram password='it\'s scram'";
    let other = certificates().join("other.crt").display().to_string();
    for (change, works) in [
        ("host=127.0.0.1".to_owned(), false),
        ("host=127.0.0.1 sslmode=verify-ca".to_owned(), true),
        ("host=elsewhere".to_owned(), false),
        (format!("sslrootcert={other}"), false),
        (format!("sslrootcert={other} sslmode=verify-ca"), false),
        (format!("sslrootcert={other} sslmode=require"), false),
        (format!("sslrootcert={other} sslmode=prefer"), true),
        ("sslrootcert=/nonexistent/root.crt".to_owned(), false),
        ("sslrootcert=system".to_owned(), false),
        ("sslrootcert='' ".to_owned(), false),
        ("sslrootcert='' sslmode=require".to_owned(), true),
    ] {
        let outcome = both_modes(&server.tcp(&format!("{scram} {change}"))).await;
        assert_eq!(outcome.is_ok(), works, "{change}: {outcome:?}");
        if let Err(error) = outcome {
            assert!(matches!(error, PgError::Tls { .. }), "{change}: {error}");
        }
    }
    let certificate = |name: &str| {
        let path = certificates().join(name).display().to_string();
        format!("user=certuser sslcert={path}.crt sslkey={path}.key")
    };
    both_modes(&server.tcp(&certificate("certuser"))).await.unwrap();
    for bad in [
        certificate("other"),
        "user=certuser".to_owned(),
        format!("{} sslcertmode=disable", certificate("certuser")),
    ] {
        let error = both_modes(&server.tcp(&bad)).await.unwrap_err();
        assert!(!error.is_transient(), "{bad}: {error}");
    }
    let direct = both_modes(&server.tcp(&format!("{scram} sslnegotiation=direct"))).await;
    assert_eq!(direct.is_ok(), server.major >= 17, "{direct:?}");
}

/// The server certificates that the manual teaches to make, which are not
/// what a web browser would take.
async fn homely_certificates_are_accepted_where_libpq_accepts_them(server: &Server) {
    let scram = r"user=scram password='it\'s scram'";
    server.stop();
    server.show_certificate("selfsigned");
    server.start();
    let pinned = certificates().join("selfsigned.crt").display().to_string();
    both_modes(&server.tcp(&format!("{scram} sslrootcert={pinned}"))).await.unwrap();
    both_modes(&server.tcp(&format!("{scram} sslrootcert={pinned} channel_binding=require")))
        .await
        .unwrap();
    let wrong_name = both_modes(&server.tcp(&format!("{scram} host=x sslrootcert={pinned}"))).await;
    assert!(matches!(wrong_name, Err(PgError::Tls { .. })), "{wrong_name:?}");
    let unknown = both_modes(&server.tcp(scram)).await;
    assert!(matches!(unknown, Err(PgError::Tls { .. })), "{unknown:?}");
    server.stop();
    server.show_certificate("commonname");
    server.start();
    both_modes(&server.tcp(scram)).await.unwrap();
    let wrong_name = both_modes(&server.tcp(&format!("{scram} host=x"))).await;
    assert!(matches!(wrong_name, Err(PgError::Tls { .. })), "{wrong_name:?}");
    server.stop();
    server.show_certificate("version1");
    server.start();
    // Nothing is verified but that the server has the key, so binding works.
    let unverified = format!("{scram} sslrootcert='' sslmode=require channel_binding=require");
    both_modes(&server.tcp(&unverified)).await.unwrap();
    let refused = both_modes(&server.tcp(scram)).await.unwrap_err();
    assert!(refused.to_string().contains("version 1"), "{refused}");
}

async fn the_system_is_identified_as_pg_controldata_says(server: &Server) {
    let controldata = run(server.tool("pg_controldata").arg("-D").arg(server.path("data")));
    let line = controldata.lines().find(|line| line.starts_with("Database system identifier"));
    let mut walsender = server.walsender().await;
    assert_eq!(walsender.server_version_num() / 10_000, server.major);
    let identity = walsender.identify_system().await.unwrap();
    assert_eq!(identity.system_id.to_string(), line.unwrap().split_once(':').unwrap().1.trim());
    assert_eq!((identity.timeline, identity.dbname), (Timeline(1), None));
    assert!(
        server.sql(&format!("SELECT pg_current_wal_flush_lsn() >= '{}'", identity.flush_lsn)).await
            == "t"
    );
    // RowDescription comes before this error, and the connection goes on.
    let error = walsender.timeline_history(Timeline(1)).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("58P01"), "{error}");
    let error = walsender.query("SELECT 1").await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("0A000"), "{error}");
    let error = walsender.show("no_such_setting").await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("42704"), "{error}");
    assert_eq!(walsender.show("block_size").await.unwrap(), "8192");
    walsender.close().await;
}

/// One archive of a backup, or its manifest.
type Part = (Option<Tablespace>, Vec<u8>);

async fn take(
    connection: Connection,
    options: &BackupOptions,
) -> Result<(Vec<Part>, Vec<u8>), PgError> {
    let (mut parts, mut manifest, mut in_manifest): (Vec<Part>, _, _) =
        (Vec::new(), Vec::new(), false);
    let mut backup = BaseBackup::start(connection, options).await?;
    let (mut start, mut counted, mut ended) = (None, 0, false);
    while let Some(event) = backup.next().await? {
        assert!(!ended, "{event:?} after the end");
        match event {
            BackupEvent::Start { start_lsn, tablespaces, data_directory_kb, .. } => {
                assert_eq!(data_directory_kb.is_some(), options.progress);
                start = Some((start_lsn, tablespaces.len()));
            }
            BackupEvent::ArchiveBegin { tablespace } => parts.push((tablespace, Vec::new())),
            BackupEvent::Data(bytes) if in_manifest => manifest.extend_from_slice(&bytes),
            BackupEvent::Data(bytes) => parts.last_mut().unwrap().1.extend_from_slice(&bytes),
            BackupEvent::ManifestBegin => in_manifest = true,
            BackupEvent::Progress { bytes_done } => counted = bytes_done,
            BackupEvent::End { stop_lsn, timeline } => {
                let (start_lsn, tablespaces) = start.unwrap();
                assert!(stop_lsn > start_lsn && timeline == Timeline(1));
                assert_eq!(parts.len(), tablespaces + 1);
                ended = true;
            }
        }
    }
    assert!(ended, "the stream ended without End");
    assert_eq!(counted, parts.iter().map(|part| part.1.len() as u64).sum::<u64>());
    // The connection is as good as new.
    let mut connection = backup.into_connection();
    connection.identify_system().await.unwrap();
    connection.close().await;
    Ok((parts, manifest))
}

async fn a_backup_is_what_pg_verifybackup_calls_good(server: &Server) {
    server
        .sql(&format!("CREATE TABLESPACE ts LOCATION '{}'", server.path("space").display()))
        .await;
    server.sql("CREATE TABLE t TABLESPACE ts AS SELECT generate_series(1, 100000) AS n").await;
    for (round, checksums) in
        [ManifestChecksums::Sha256, ManifestChecksums::Crc32c].into_iter().enumerate()
    {
        let options = BackupOptions {
            label: "it's a \"test\" \\ ".to_owned(),
            fast_checkpoint: true,
            progress: round == 0,
            manifest_checksums: checksums,
            ..BackupOptions::default()
        };
        let (parts, manifest) = take(server.walsender().await, &options).await.unwrap();
        assert_eq!(parts.len(), 2);
        let target = server.path(&format!("backup{round}"));
        fs::create_dir(&target).unwrap();
        for (tablespace, archive) in &parts {
            assert_eq!(archive.len() % 512, 0);
            assert!(archive.ends_with(&[0; 1024]), "the archive is not closed");
            let place = match tablespace {
                Some(tablespace) => {
                    assert_eq!(Path::new(&tablespace.location), server.path("space"));
                    assert_eq!(tablespace.size_kb.is_some(), options.progress);
                    target.join("pg_tblspc").join(tablespace.oid.to_string())
                }
                None => target.clone(),
            };
            fs::create_dir_all(&place).unwrap();
            tar::Archive::new(&archive[..]).unpack(&place).unwrap();
        }
        fs::write(target.join("backup_manifest"), manifest).unwrap();
        let label = fs::read_to_string(target.join("backup_label")).unwrap();
        assert!(label.contains("LABEL: it's a \"test\" \\ \n"), "{label}");
        assert!(target.join("tablespace_map").exists());
        run(Command::new("chown").arg("-R").arg(server_user().0.to_string()).arg(&target));
        run(server.tool("pg_verifybackup").arg("-n").arg(&target));
    }
}

async fn a_rate_limit_and_a_refused_role_are_obeyed(server: &Server) {
    let options = BackupOptions {
        fast_checkpoint: true,
        max_rate_kb: Some(1_048_576),
        verify_checksums: false,
        ..BackupOptions::default()
    };
    take(server.walsender().await, &options).await.unwrap();
    server.sql("CREATE ROLE nobody LOGIN").await;
    let dsn = format!("host={} port={} user=nobody", server.path("socket").display(), server.port);
    let info = ConnInfo::read(Some(&dsn), &PgEnvironment::default()).unwrap();
    let error = Connection::connect(&info, Mode::Replication).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("42501"), "{error}");
}

async fn a_bad_page_means_no_backup(server: &Server) {
    let path = server.sql("SELECT pg_relation_filepath('t')").await;
    server.sql("CHECKPOINT").await;
    server.stop();
    let mut file = fs::OpenOptions::new().write(true).open(server.path("data").join(path)).unwrap();
    file.seek(SeekFrom::Start(8192 + 4000)).unwrap();
    file.write_all(b"not what was here").unwrap();
    drop(file);
    server.start();
    let options = BackupOptions { fast_checkpoint: true, ..BackupOptions::default() };
    let error = take(server.walsender().await, &options).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("XX001"), "{error}");
}

async fn a_standby_is_told_from_a_primary(server: &Server) {
    server.stop();
    fs::write(server.path("data/standby.signal"), "").unwrap();
    give(&server.path("data/standby.signal"));
    server.start();
    let with = |target: &str| {
        let dsn = format!(
            "host={} port={} user=postgres target_session_attrs={target}",
            server.path("socket").display(),
            server.port
        );
        ConnInfo::read(Some(&dsn), &PgEnvironment::default()).unwrap()
    };
    for (target, works) in [
        ("any", true),
        ("primary", false),
        ("read-write", false),
        ("standby", true),
        ("read-only", true),
        ("prefer-standby", true),
    ] {
        let outcome = both_modes(&with(target)).await;
        assert_eq!(outcome.is_ok(), works, "{target}: {outcome:?}");
    }
    server.pg_ctl(&["promote"]);
    for (target, works) in
        [("primary", true), ("read-write", true), ("standby", false), ("prefer-standby", true)]
    {
        let outcome = both_modes(&with(target)).await;
        assert_eq!(outcome.is_ok(), works, "{target}: {outcome:?}");
    }
    let history = server.walsender().await.timeline_history(Timeline(2)).await.unwrap();
    assert_eq!(history.file_name, "00000002.history");
    let on_disk = fs::read(server.path("data/pg_wal/00000002.history")).unwrap();
    assert_eq!(history.content, on_disk);
}

async fn everything(major: u32) {
    let server = Server::new(major);
    both_modes(&server.local()).await.unwrap();
    logins_work_as_pg_hba_says(&server).await;
    passwords_come_from_the_passfile(&server).await;
    channel_binding_binds(&server).await;
    certificates_are_checked_in_both_directions(&server).await;
    the_system_is_identified_as_pg_controldata_says(&server).await;
    a_backup_is_what_pg_verifybackup_calls_good(&server).await;
    a_rate_limit_and_a_refused_role_are_obeyed(&server).await;
    a_bad_page_means_no_backup(&server).await;
    homely_certificates_are_accepted_where_libpq_accepts_them(&server).await;
    a_standby_is_told_from_a_primary(&server).await;
}

#[tokio::test]
async fn everything_holds_on_postgresql_14() {
    everything(14).await;
}

#[tokio::test]
async fn everything_holds_on_postgresql_15() {
    everything(15).await;
}

#[tokio::test]
async fn everything_holds_on_postgresql_16() {
    everything(16).await;
}

#[tokio::test]
async fn everything_holds_on_postgresql_17() {
    everything(17).await;
}

#[tokio::test]
async fn everything_holds_on_postgresql_18() {
    everything(18).await;
}

/// No step of a test takes longer.
const LIMIT: Duration = Duration::from_mins(1);

/// The segments of the clusters that WAL is streamed from.
const SEGMENT_BYTES: u64 = 1 << 20;

const SLOT_FACTS: &str = "FROM pg_replication_slots WHERE slot_name = 'highwater_1'";

fn slot() -> SlotName {
    "highwater_1".parse().unwrap()
}

/// The start of the segment that `lsn` lies in.
fn segment_start(lsn: Lsn) -> Lsn {
    Lsn(lsn.0 - lsn.0 % SEGMENT_BYTES)
}

fn stream_from(start_lsn: Lsn, slot: Option<SlotName>) -> StreamStart {
    StreamStart { slot, start_lsn, timeline: Timeline(1) }
}

/// WAL that was received, from `start_lsn` on.
struct Received {
    start_lsn: Lsn,
    bytes: Vec<u8>,
}

impl Received {
    fn from(start_lsn: Lsn) -> Self {
        Self { start_lsn, bytes: Vec::new() }
    }

    fn end_lsn(&self) -> Lsn {
        Lsn(self.start_lsn.0 + self.bytes.len() as u64)
    }

    /// Takes the next event; returns it unless it was WAL.
    async fn take(&mut self, stream: &mut WalStream) -> Result<Option<StreamEvent>, PgError> {
        match tokio::time::timeout(LIMIT, stream.next()).await.expect("an event in time")? {
            StreamEvent::Wal { start_lsn, data, server_end_lsn } => {
                assert_eq!(start_lsn, self.end_lsn());
                self.bytes.extend_from_slice(&data);
                assert!(self.end_lsn() <= server_end_lsn);
                assert_eq!(stream.received_lsn(), self.end_lsn());
                Ok(None)
            }
            other => Ok(Some(other)),
        }
    }

    async fn up_to(&mut self, stream: &mut WalStream, end_lsn: Lsn) {
        while self.end_lsn() < end_lsn {
            let event = self.take(stream).await.unwrap();
            assert!(matches!(event, None | Some(StreamEvent::Keepalive { .. })), "{event:?}");
        }
    }

    /// Compares with the files of the server; returns how many were looked at.
    fn assert_is_on_disk(&self, server: &Server, timeline: Timeline) -> usize {
        assert_eq!(self.start_lsn, segment_start(self.start_lsn));
        let size = SegmentSize::new(u32::try_from(SEGMENT_BYTES).unwrap()).unwrap();
        let first = size.segment_of(self.start_lsn);
        let segments = self.bytes.chunks(usize::try_from(SEGMENT_BYTES).unwrap());
        let mut count = 0;
        for (number, bytes) in (first..).zip(segments) {
            let name = SegmentName::new(timeline, number, size).to_string();
            let file = fs::read(server.path("data/pg_wal").join(&name)).unwrap();
            assert_eq!(file.len() as u64, SEGMENT_BYTES);
            assert!(file[..bytes.len()] == *bytes, "{name} differs");
            count += 1;
        }
        count
    }
}

async fn report(stream: &mut WalStream, write_lsn: Lsn, flush_lsn: Lsn) {
    let status = StreamStatus { write_lsn, flush_lsn, reply_requested: false };
    stream.send_status(&status, PgTimestamp::from_unix_seconds(1_800_000_000)).await.unwrap();
}

/// Streams through TLS with the slot: what comes is what is on disk, and the
/// slot goes where the reports say.
async fn wal_comes_as_it_is_on_disk_and_the_slot_follows_the_reports(server: &Server) {
    server.sql("CREATE ROLE scram LOGIN REPLICATION PASSWORD 'secret'").await;
    let info = server.tcp("user=scram password=secret application_name=stream_test");
    let mut connection = Connection::connect(&info, Mode::Replication).await.unwrap();
    let known = server.major >= 15;
    let state = connection.read_slot(&slot()).await.unwrap();
    assert_eq!(state, if known { SlotState::Absent } else { SlotState::Unknown });
    connection.create_physical_slot(&slot()).await.unwrap();
    let restart_lsn = server.lsn(&format!("SELECT restart_lsn {SLOT_FACTS}")).await;
    let state = connection.read_slot(&slot()).await.unwrap();
    let kept =
        SlotState::Physical { restart_lsn: Some(restart_lsn), restart_timeline: Some(Timeline(1)) };
    assert_eq!(state, if known { kept } else { SlotState::Unknown });

    let start_lsn = segment_start(restart_lsn);
    let mut stream = connection.stream_wal(&stream_from(start_lsn, Some(slot()))).await.unwrap();
    let mut received = Received::from(start_lsn);
    let end_lsn = server.write_segments(4).await;
    received.up_to(&mut stream, end_lsn).await;
    assert!(received.assert_is_on_disk(server, Timeline(1)) >= 5);

    let facts = "FROM pg_stat_replication WHERE application_name = 'stream_test'";
    for flush in [restart_lsn.0 + 8, start_lsn.0 + SEGMENT_BYTES + 77, end_lsn.0 - 1, end_lsn.0] {
        report(&mut stream, received.end_lsn(), Lsn(flush)).await;
        let wanted = Lsn(flush).to_string();
        server.wait_until(&format!("SELECT restart_lsn {SLOT_FACTS}"), &wanted).await;
        server.wait_until(&format!("SELECT flush_lsn {facts}"), &wanted).await;
    }
    // Neither what is received, nor what is written, nor a flush of 0 moves it.
    let more_lsn = server.write_segments(2).await;
    received.up_to(&mut stream, more_lsn).await;
    report(&mut stream, more_lsn, Lsn::INVALID).await;
    server.wait_until(&format!("SELECT write_lsn {facts}"), &more_lsn.to_string()).await;
    assert_eq!(server.lsn(&format!("SELECT restart_lsn {SLOT_FACTS}")).await, end_lsn);
    assert_eq!(server.sql(&format!("SELECT replay_lsn {facts}")).await, "", "applied");
    let status = StreamStatus { write_lsn: more_lsn, flush_lsn: end_lsn, reply_requested: true };
    stream.send_status(&status, PgTimestamp(0)).await.unwrap();
    while !matches!(
        received.take(&mut stream).await.unwrap(),
        Some(StreamEvent::Keepalive { reply_requested: false, .. })
    ) {}

    a_slot_is_one_streams_alone(server).await;
    // The connection is as good as new, and the same WAL comes again.
    let mut connection = stream.stop().await.unwrap();
    server.wait_until(&format!("SELECT active {SLOT_FACTS}"), "f").await;
    connection.identify_system().await.unwrap();
    let again = stream_from(end_lsn, Some(slot()));
    let mut stream = connection.stream_wal(&again).await.unwrap();
    let mut second = Received::from(end_lsn);
    second.up_to(&mut stream, more_lsn).await;
    let seen = usize::try_from(end_lsn.0 - start_lsn.0).unwrap();
    let common = second.bytes.len().min(received.bytes.len() - seen);
    assert!(common > 0 && second.bytes[..common] == received.bytes[seen..seen + common]);
    stream.stop().await.unwrap().close().await;
}

/// Another client meets the slot that a stream holds.
async fn a_slot_is_one_streams_alone(server: &Server) {
    let mut other = server.walsender().await;
    let error = other.create_physical_slot(&slot()).await.unwrap_err();
    assert!(error.is_slot_there_already(), "{error}");
    let error = other.drop_slot(&slot()).await.unwrap_err();
    assert!(error.is_slot_in_use() && error.is_transient(), "{error}");
    let flush_lsn = other.identify_system().await.unwrap().flush_lsn;
    let start = stream_from(segment_start(flush_lsn), Some(slot()));
    let error = other.stream_wal(&start).await.unwrap_err();
    assert!(error.is_slot_in_use(), "{error}");
}

async fn refusals_are_told_apart(server: &Server) {
    let absent: SlotName = "no_such_slot".parse().unwrap();
    let mut connection = server.walsender().await;
    let error = connection.drop_slot(&absent).await.unwrap_err();
    assert!(error.is_slot_absent(), "{error}");
    let flush_lsn = connection.identify_system().await.unwrap().flush_lsn;
    let here = segment_start(flush_lsn);
    let error = connection.stream_wal(&stream_from(here, Some(absent))).await.unwrap_err();
    assert!(error.is_slot_absent(), "{error}");

    server.sql("SELECT pg_create_logical_replication_slot('of_logic', 'pgoutput')").await;
    let logical: SlotName = "of_logic".parse().unwrap();
    let mut connection = server.walsender().await;
    if server.major >= 15 {
        let error = connection.read_slot(&logical).await.unwrap_err();
        assert!(matches!(error, PgError::Server(_)) && !error.is_slot_lost(), "{error}");
    }
    let error = connection.stream_wal(&stream_from(here, Some(logical))).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("55000"), "{error}");
    assert!(!error.is_slot_lost(), "{error}");
    server.sql("SELECT pg_drop_replication_slot('of_logic')").await;

    let elsewhere = StreamStart { timeline: Timeline(7), ..stream_from(here, None) };
    let error = server.walsender().await.stream_wal(&elsewhere).await.unwrap_err();
    assert!(error.is_not_in_history() && !error.is_transient(), "{error}");
    // These come inside the stream, and the connection goes on after them.
    for (start, ahead) in [(Lsn(here.0 + (1 << 40)), true), (Lsn(SEGMENT_BYTES), false)] {
        let connection = server.walsender().await;
        let mut stream = connection.stream_wal(&stream_from(start, None)).await.unwrap();
        let error = stream.next().await.unwrap_err();
        assert_eq!(
            (error.is_ahead_of_server(), error.is_wal_removed()),
            (ahead, !ahead),
            "{error}"
        );
        stream.into_connection().identify_system().await.unwrap();
    }
}

/// The server gives up the slot under a stream that reports nothing.
async fn a_lost_slot_is_as_the_module_says(server: &Server) {
    let wal_status = format!("SELECT wal_status {SLOT_FACTS}");
    let restart = format!("SELECT restart_lsn {SLOT_FACTS}");
    let restart_lsn = server.lsn(&restart).await;
    let connection = server.walsender().await;
    let start = stream_from(segment_start(restart_lsn), Some(slot()));
    let mut stream = connection.stream_wal(&start).await.unwrap();
    let mut received = Received::from(start.start_lsn);
    server.sql("ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'").await;
    server.sql("SELECT pg_reload_conf()").await;
    server.wait_until("SHOW max_slot_wal_keep_size", "1MB").await;
    let end_lsn = server.write_segments(6).await;
    let taken = async {
        loop {
            if let Err(error) = received.take(&mut stream).await {
                return error;
            }
        }
    };
    let (error, _) = tokio::join!(taken, server.sql("CHECKPOINT"));
    assert_eq!(error.sqlstate(), Some("57P01"), "{error}");
    assert!(error.is_transient(), "{error}");
    server.wait_until(&wal_status, "lost").await;

    let mut connection = server.walsender().await;
    if server.major >= 15 {
        let state = connection.read_slot(&slot()).await.unwrap();
        let nothing = SlotState::Physical { restart_lsn: None, restart_timeline: None };
        assert_eq!(state, nothing);
    }
    let here = segment_start(end_lsn);
    let outcome = connection.stream_wal(&stream_from(here, Some(slot()))).await;
    if server.major >= 18 {
        let error = outcome.unwrap_err();
        assert!(error.is_slot_lost() && !error.is_transient(), "{error}");
    } else {
        let mut stream = outcome.unwrap();
        Received::from(here).up_to(&mut stream, end_lsn).await;
        report(&mut stream, end_lsn, end_lsn).await;
        server.wait_until(&restart, &end_lsn.to_string()).await;
        let revived = server.major <= 15;
        let wanted = if revived { "reserved" } else { "unreserved" };
        server.wait_until(&wal_status, wanted).await;
        stream.stop().await.unwrap().close().await;
        server.wait_until(&format!("SELECT active {SLOT_FACTS}"), "f").await;
        let wanted = if revived { "reserved" } else { "lost" };
        server.wait_until(&wal_status, wanted).await;
    }
    server.sql("ALTER SYSTEM RESET max_slot_wal_keep_size").await;
    server.sql("SELECT pg_reload_conf()").await;
    let mut connection = server.walsender().await;
    connection.drop_slot(&slot()).await.unwrap();
    connection.create_physical_slot(&slot()).await.unwrap();
    connection.close().await;
    assert_ne!(server.sql(&wal_status).await, "lost");
}

async fn a_promotion_ends_the_timeline_and_the_next_can_be_streamed(primary: &Server) {
    // No slot keeps anything for the standby, or for who streams from it.
    primary.sql("ALTER SYSTEM SET wal_keep_size = '64MB'").await;
    primary.sql("SELECT pg_reload_conf()").await;
    let standby = Server::standby_of(primary);
    let end_lsn = primary.write_segments(1).await;
    let start = stream_from(Lsn(segment_start(end_lsn).0 - SEGMENT_BYTES), None);
    // The standby may not yet have what it is asked for.
    let replayed = format!("SELECT pg_last_wal_replay_lsn() >= '{end_lsn}'");
    standby.wait_until(&replayed, "t").await;
    let mut stream = standby.walsender().await.stream_wal(&start).await.unwrap();
    assert_eq!(stream.connection().parameter("in_hot_standby"), Some("on"));
    let mut received = Received::from(start.start_lsn);
    received.up_to(&mut stream, end_lsn).await;
    standby.pg_ctl(&["promote"]);
    let (next, switch_lsn) = loop {
        match received.take(&mut stream).await.unwrap() {
            Some(StreamEvent::TimelineEnd { next, switch_lsn }) => break (next, switch_lsn),
            event => {
                assert!(matches!(event, None | Some(StreamEvent::Keepalive { .. })), "{event:?}");
            }
        }
    };
    let history = fs::read_to_string(standby.path("data/pg_wal/00000002.history")).unwrap();
    let mut words = history.split_whitespace();
    assert_eq!((words.next(), words.next()), (Some("1"), Some(&*switch_lsn.to_string())));
    assert_eq!(next, Timeline(2));
    assert_eq!(stream.connection().parameter("in_hot_standby"), Some("off"));

    let mut connection = stream.into_connection();
    assert_eq!(connection.timeline_history(next).await.unwrap().content, history);
    let switch_segment = segment_start(switch_lsn);
    let onwards = StreamStart { timeline: next, ..stream_from(switch_segment, None) };
    let mut stream = connection.stream_wal(&onwards).await.unwrap();
    let mut later = Received::from(switch_segment);
    later.up_to(&mut stream, standby.write_segments(2).await).await;
    assert!(later.assert_is_on_disk(&standby, next) >= 3);
    stream.stop().await.unwrap().close().await;
    the_end_of_a_past_timeline_is_told(&standby, &start, switch_lsn).await;
}

/// Asks a promoted server for the timeline that it left.
async fn the_end_of_a_past_timeline_is_told(server: &Server, start: &StreamStart, switch_lsn: Lsn) {
    let end = StreamEvent::TimelineEnd { next: Timeline(2), switch_lsn };
    let mut stream = server.walsender().await.stream_wal(start).await.unwrap();
    let mut received = Received::from(start.start_lsn);
    let event = loop {
        if let Some(event) = received.take(&mut stream).await.unwrap() {
            break event;
        }
    };
    assert_eq!((event, received.end_lsn()), (end.clone(), switch_lsn));
    let at_the_end = stream_from(switch_lsn, None);
    let mut stream = stream.into_connection().stream_wal(&at_the_end).await.unwrap();
    assert_eq!(stream.next().await.unwrap(), end);
    let past_the_end = stream_from(Lsn(switch_lsn.0 + 8), None);
    let error = stream.into_connection().stream_wal(&past_the_end).await.unwrap_err();
    assert!(error.is_not_in_history() && !error.is_ahead_of_server(), "{error}");
}

/// A fast shutdown waits until the client reports all as flushed, and only then ends.
async fn a_fast_shutdown_waits_for_the_true_flush_position(server: &Server) {
    let held_lsn = server.write_segments(1).await;
    let start = stream_from(segment_start(held_lsn), Some(slot()));
    let mut stream = server.walsender().await.stream_wal(&start).await.unwrap();
    let mut received = Received::from(start.start_lsn);
    received.up_to(&mut stream, held_lsn).await;
    report(&mut stream, held_lsn, held_lsn).await;
    let mut stop = server.tool("pg_ctl");
    stop.arg("-D").arg(server.path("data")).args(["-w", "-m", "fast", "stop"]);
    let mut stop = stop.stdout(std::process::Stdio::null()).spawn().unwrap();
    let mut held_back = 0;
    loop {
        match received.take(&mut stream).await.unwrap() {
            Some(StreamEvent::Keepalive { reply_requested: true, .. }) => {
                let flush_lsn = if held_back < 5 { held_lsn } else { received.end_lsn() };
                held_back += u32::from(received.end_lsn() > held_lsn);
                report(&mut stream, received.end_lsn(), flush_lsn).await;
            }
            Some(StreamEvent::ServerStopped) => break,
            event => {
                assert!(matches!(event, None | Some(StreamEvent::Keepalive { .. })), "{event:?}");
            }
        }
    }
    assert!(held_back > 5, "it ended before it had the flush position");
    assert!(stop.wait().unwrap().success());
    let controldata = run(server.tool("pg_controldata").arg("-D").arg(server.path("data")));
    let fact = |name: &str| {
        let line = controldata.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    assert_eq!(fact("Database cluster state"), "shut down");
    let checkpoint: Lsn = fact("Latest checkpoint location").parse().unwrap();
    assert!(held_lsn <= checkpoint && checkpoint < received.end_lsn(), "no shutdown checkpoint");
    received.assert_is_on_disk(server, Timeline(1));
}

async fn streaming(major: u32) {
    // Nothing is kept but for slots, so that WAL is removed soon.
    let settings = "wal_level = logical\nmin_wal_size = 2MB\nmax_wal_size = 2MB\n\
                    checkpoint_timeout = 1h\nautovacuum = off";
    let server = Server::made_by(major, "--wal-segsize=1", settings);
    wal_comes_as_it_is_on_disk_and_the_slot_follows_the_reports(&server).await;
    server.sql("CHECKPOINT").await;
    refusals_are_told_apart(&server).await;
    a_lost_slot_is_as_the_module_says(&server).await;
    a_promotion_ends_the_timeline_and_the_next_can_be_streamed(&server).await;
    a_fast_shutdown_waits_for_the_true_flush_position(&server).await;
}

#[tokio::test]
async fn wal_streams_from_postgresql_14() {
    streaming(14).await;
}

#[tokio::test]
async fn wal_streams_from_postgresql_15() {
    streaming(15).await;
}

#[tokio::test]
async fn wal_streams_from_postgresql_16() {
    streaming(16).await;
}

#[tokio::test]
async fn wal_streams_from_postgresql_17() {
    streaming(17).await;
}

#[tokio::test]
async fn wal_streams_from_postgresql_18() {
    streaming(18).await;
}

/// Shows a certificate without having its key.
#[derive(Debug)]
struct Thief(std::sync::Arc<rustls::sign::CertifiedKey>);

impl rustls::server::ResolvesServerCert for Thief {
    fn resolve(
        &self,
        _hello: rustls::server::ClientHello<'_>,
    ) -> Option<std::sync::Arc<rustls::sign::CertifiedKey>> {
        Some(std::sync::Arc::clone(&self.0))
    }
}

#[tokio::test]
async fn a_server_that_does_not_have_the_key_of_its_certificate_is_refused_in_every_mode() {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use std::sync::Arc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let provider = rustls::crypto::aws_lc_rs::default_provider();
    let key = PrivateKeyDer::from_pem_file(certificates().join("other.key")).unwrap();
    let key = provider.key_provider.load_private_key(key).unwrap();
    let root = certificates().join("ca.crt").display().to_string();
    for certificate in ["server.crt", "version1.crt"] {
        let chain = vec![CertificateDer::from_pem_file(certificates().join(certificate)).unwrap()];
        let stolen = Arc::new(rustls::sign::CertifiedKey::new(chain, Arc::clone(&key)));
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(provider.clone()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(Thief(stolen)));
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read_exact(&mut [0; 8]).await;
                let _ = stream.write_all(b"S").await;
                let _ = acceptor.accept(stream).await;
            }
        });
        for settings in [
            format!("sslmode=verify-full sslrootcert={root}"),
            "sslmode=require ssl_max_protocol_version=TLSv1.2".to_owned(),
            "sslmode=require".to_owned(),
        ] {
            let dsn = format!("host=localhost hostaddr=127.0.0.1 port={port} user=u {settings}");
            let info = ConnInfo::read(Some(&dsn), &PgEnvironment::default()).unwrap();
            let error = Connection::connect(&info, Mode::Sql).await.unwrap_err();
            assert!(matches!(error, PgError::Tls { .. }), "{certificate} {settings}: {error}");
        }
    }
}
