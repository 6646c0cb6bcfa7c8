//! Tests of the settings as a whole: precedence, lists, defaults, refusals.

#![allow(clippy::unwrap_used, clippy::panic)]

use super::resolve::{CONNECT_LIMIT_DEFAULT, CONNECT_LIMIT_MAX};
use super::*;

fn environment(vars: &[(&str, &str)]) -> PgEnvironment {
    PgEnvironment {
        vars: vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        home: Some(PathBuf::from("/home/someone")),
        user: Some("someone".to_owned()),
    }
}

fn read(dsn: &str) -> Result<ConnInfo, SettingsError> {
    ConnInfo::read(Some(dsn), &environment(&[]))
}

fn labels(info: &ConnInfo) -> Vec<String> {
    info.hosts.iter().map(Host::label).collect()
}

#[test]
fn nothing_given_means_the_local_socket_as_the_operating_system_user() {
    let info = ConnInfo::read(None, &environment(&[])).unwrap();
    assert_eq!(info.hosts[0], Host { name: HostName::DefaultSocket, address: None, port: 5432 });
    assert_eq!((info.user(), info.dbname()), ("someone", "someone"));
    assert_eq!(info.tls.mode, SslMode::Prefer);
    assert_eq!(info.connect_limit, CONNECT_LIMIT_DEFAULT);
    assert_eq!(info.passfile.as_deref(), Some(Path::new("/home/someone/.pgpass")));
    assert!(matches!(ConnInfo::read(None, &PgEnvironment::default()), Err(SettingsError::NoUser)));
}

#[test]
fn the_string_beats_the_service_which_beats_the_environment() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("services");
    std::fs::write(&file, "[s]\nhost=from_service\nport=2\n").unwrap();
    let environment = environment(&[
        ("PGHOST", "from_environment"),
        ("PGPORT", "3"),
        ("PGUSER", "from_environment"),
        ("PGSERVICE", "s"),
        ("PGSERVICEFILE", file.to_str().unwrap()),
    ]);
    let info = ConnInfo::read(Some("port=1"), &environment).unwrap();
    assert_eq!(labels(&info), ["from_service:1"]);
    assert_eq!(info.user(), "from_environment");
    let info = ConnInfo::read(Some("port=1 service=''"), &environment).unwrap();
    assert_eq!(labels(&info), ["from_environment:1"]);
    let missing = format!("service=t servicefile={}", file.display());
    assert!(matches!(
        ConnInfo::read(Some(&missing), &environment),
        Err(SettingsError::ServiceNotFound { .. })
    ));
}

#[test]
fn an_empty_value_means_the_default_and_hides_the_environment() {
    let environment = environment(&[("PGHOST", "db"), ("PGPORT", "1")]);
    let info = ConnInfo::read(Some("host='' port=''"), &environment).unwrap();
    assert_eq!(info.hosts[0], Host { name: HostName::DefaultSocket, address: None, port: 5432 });
}

#[test]
fn lists_of_hosts_addresses_and_ports_are_paired() {
    assert_eq!(labels(&read("host=a,b port=1,2").unwrap()), ["a:1", "b:2"]);
    assert_eq!(labels(&read("host=a,b port=7").unwrap()), ["a:7", "b:7"]);
    assert_eq!(labels(&read("host=a,b port=,2").unwrap()), ["a:5432", "b:2"]);
    assert_eq!(labels(&read("hostaddr=::1").unwrap()), ["[::1]:5432"]);
    assert_eq!(
        labels(&read("postgresql://[::1]:9,%2Frun%2Fpg").unwrap()),
        ["[::1]:9", "/run/pg:5432"]
    );
    let named = read("host=db hostaddr=127.0.0.1").unwrap();
    assert_eq!(named.hosts[0].name, HostName::Name("db".to_owned()));
    assert_eq!(named.hosts[0].address, Some("127.0.0.1".parse().unwrap()));
    for bad in
        ["host=a,b port=1,2,3", "host=a,b hostaddr=1.1.1.1", "host=a hostaddr=1.1.1.1,2.2.2.2"]
    {
        assert!(matches!(read(bad), Err(SettingsError::Count { .. })), "{bad}");
    }
    for bad in ["port=0", "port=65536", "port=x", "hostaddr=db", "host=@abstract"] {
        assert!(matches!(read(bad), Err(SettingsError::Invalid { .. })), "{bad}");
    }
}

#[test]
fn each_host_is_one_server_that_may_be_of_any_kind() {
    let info = read("host=a,b port=1,2 target_session_attrs=primary").unwrap();
    let each = info.each_host();
    assert_eq!(each.iter().map(labels).collect::<Vec<_>>(), [["a:1"], ["b:2"]]);
    assert!(each.iter().all(|one| one.target == SessionTarget::Any));
    assert_eq!((info.place(), each[1].place()), ("a:1,b:2".to_owned(), "b:2".to_owned()));
}

#[test]
fn the_password_is_shown_nowhere() {
    let info = read("host=db user=u password=swordfish sslmode=require").unwrap();
    assert_eq!(info.password.as_ref().unwrap().reveal(), "swordfish");
    for text in [info.without_password(), format!("{info:?}"), format!("{:?}", info.password)] {
        assert!(!text.contains("swordfish"), "{text}");
    }
    assert_eq!(info.without_password(), "db:5432 user=u dbname=u sslmode=require");
}

#[test]
fn system_roots_demand_that_the_name_is_checked() {
    assert_eq!(read("sslrootcert=system").unwrap().tls.mode, SslMode::VerifyFull);
    assert!(read("sslrootcert=system sslmode=require").is_err());
    assert!(read("sslnegotiation=direct").is_err());
    assert!(read("sslnegotiation=direct sslmode=require").unwrap().tls.direct);
}

#[test]
fn a_wish_for_safety_that_cannot_be_met_is_refused() {
    for dsn in [
        "gssencmode=require",
        "sslcertmode=require",
        "min_protocol_version=3.2",
        "sslpassword=x",
        "oauth_issuer=https://x",
    ] {
        assert!(matches!(read(dsn), Err(SettingsError::Unsupported { .. })), "{dsn}");
    }
    for dsn in ["sslmode=verify", "channel_binding=yes", "require_auth=scram", "gssencmode=maybe"] {
        assert!(matches!(read(dsn), Err(SettingsError::Invalid { .. })), "{dsn}");
    }
    assert!(read("gssencmode=prefer krbsrvname=x load_balance_hosts=random replication=1").is_ok());
    assert!(read("ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2").is_err());
}

#[test]
fn times_have_units_and_an_end() {
    assert_eq!(read("connect_timeout=3").unwrap().connect_limit, Duration::from_secs(3));
    assert_eq!(read("connect_timeout=0").unwrap().connect_limit, CONNECT_LIMIT_MAX);
    assert_eq!(read("connect_timeout=-1").unwrap().connect_limit, CONNECT_LIMIT_MAX);
    let kept = read("keepalives_idle=5 tcp_user_timeout=1500 keepalives_count=0").unwrap();
    assert_eq!(kept.keepalives.idle, Some(Duration::from_secs(5)));
    assert_eq!(kept.keepalives.user_timeout, Some(Duration::from_millis(1500)));
    assert_eq!(kept.keepalives.count, None);
    assert!(!read("keepalives=0").unwrap().keepalives.enabled);
    assert!(read("keepalives_idle=4294967295").is_err());
}
