//! The longer texts of `--help` and the manual pages.
//!
//! Owns examples and the words around them. Never here: the arguments
//! themselves, which `args` describes one by one.

/// Under `highwater --help`.
pub const MAIN: &str = "\
From nothing to a backup that can be restored:
  export HIGHWATER_REPO=s3://backups/postgres HIGHWATER_CLUSTER=main
  highwater init                       once, with PostgreSQL running
  archive_command = 'highwater archive-push %p'      in postgresql.conf, with archive_mode = on
  highwater check                      proves that WAL arrives
  highwater backup                     every night
  highwater verify                     after it; with --deep now and then
  highwater expire                     after it, with retain_window = \"30d\"
  highwater restore --pgdata DIR --to-time '2026-11-22 03:00:00'

Settings come from flags, then HIGHWATER_* variables, then the file given by --config or
HIGHWATER_CONFIG or /etc/highwater/highwater.toml. `highwater config` shows the result.

Exit codes:
  0 done   1 certainly absent   2 wrong use or settings   3 conflict   4 integrity
  5 store unavailable   6 PostgreSQL unavailable   7 local disk   70 bug
  archive-get adds 128 to all but 0 and 1.";

/// Under `init --help`.
pub const INIT: &str = "\
Examples:
  highwater --repo file:///backups --cluster main init
  highwater init --successor           after pg_upgrade, to go on in the same place

A place that belongs to another cluster is refused (exit 3) and stays as it is.";

/// Under `check --help`.
pub const CHECK: &str = "\
Examples:
  highwater check
  highwater check --no-switch          changes nothing on the server

Without --no-switch it forces a WAL switch and waits for that very segment in the repository.";

/// Under `archive-push --help`.
pub const ARCHIVE_PUSH: &str = "\
In postgresql.conf:
  archive_mode = on
  archive_command = 'highwater archive-push %p'

With settings by flag:
  archive_command = 'highwater --repo s3://backups/pg --cluster main archive-push %p'

Segments that wait behind it are stored as well, and their own calls are short.
Exit 0 means stored and durable. The same file again is success; another file under the same
name is refused (exit 3). Failures exit 1 to 125, so that pg_stat_archiver counts them and
PostgreSQL keeps the file and tries again.

With `stall_spool` set, 0 may also mean kept on this host, and with `wal_backlog_max` let go and
recorded, while the store is away: each is said in the server's log. See `highwater spool --help`.";

/// Under `spool --help`.
pub const SPOOL: &str = "\
Examples:
  highwater spool                      what waits on this host, and since when
  highwater spool --drain              bring it into the repository now

With `stall_spool` set, archive-push keeps WAL there while the store is away, and acknowledges it:
it is on this host only until it is drained. An agent drains it, or a process that archive-push
starts; by hand it is needed only on a host where neither runs.

Exit 3: WAL was put aside because the repository holds something else under its name.
Exit 4: WAL was put aside because it is damaged, or WAL that was let go is not closed by a backup.
Exit 5: the store is away still, or another process drains.";
/// Under `copy --help`.
pub const COPY: &str = "\
Examples:
  highwater copy --wal                 both ways: what one has stored while the other was away
  highwater copy --newest              the newest backup, with the WAL that it needs
  highwater copy --all --wal           everything that the other one's retention keeps
  highwater copy 20261122T031500Z --from second

What stands at the destination is not sent again and never replaced: it may be interrupted, and run
beside backups, archiving and expire. Each object is proven before it is stored. What is damaged or in
conflict is told (exit 4 or 3) and stops nothing else.";

/// Under `archive-get --help`.
pub const ARCHIVE_GET: &str = "\
In postgresql.conf (restore writes it for you):
  restore_command = 'highwater archive-get %f %p'

Exit codes:
  0    the file is in place, checked
  1    the repository certainly has no such file
  130  wrong use or settings        131 conflict      132 integrity
  133  store unavailable            135 local disk    198 bug
Every code above 125 stops recovery, where 1 to 125 would end it as if the archive ended here.";

/// Under `receive --help`.
pub const RECEIVE: &str = "\
Examples:
  highwater receive                    at most one second of commits is lost with the server
  highwater receive --dsn 'host=db1,db2 user=highwater'      whichever is the primary is followed
  highwater receive --synchronous      no acknowledged commit is lost; in postgresql.conf:
      synchronous_standby_names = 'highwater'

It runs until SIGTERM or SIGINT, then stores what it holds and exits 0. With two repositories it
streams into both, each with a slot and an application_name of its own (…_second). Archiving with
archive_command may go on beside it. The server keeps WAL for the slot while receive is away:
drop the slot when you stop using it, or pg_wal fills the disk.";

/// Under `agent --help`.
pub const AGENT: &str = "\
Examples:
  highwater agent --pgdata /var/lib/postgresql/18/main
  highwater agent --pgdata DIR --receive         streams WAL too, as highwater receive does

Runs as the server's user, with the same settings as archive_command, until SIGTERM or SIGINT.
WAL that is ready is stored before archive-push is called for it, which then only asks; what
recovery will want next is fetched before archive-get is called. Both find it by themselves,
and do their work without it when it is away: it may be stopped or killed at any moment.";

/// Under `backup --help`.
pub const BACKUP: &str = "\
Examples:
  highwater backup
  highwater backup --fast --annotate why='before the release'
  highwater backup --dsn 'host=db1,db2 user=highwater' --prefer-standby
  highwater backup --source files    on the server's own host: faster, and it checks each page

The backup counts from the moment its WAL is in the repository; until then, and after any
failure, it does not exist for restore. With --source files, exit code 4 and a report mean a
backup that stands and names pages that are damaged on the server's disk.";

/// Under `restore --help`.
pub const RESTORE: &str = "\
Examples:
  highwater restore --pgdata /var/lib/postgresql/18/main --dry-run
  highwater restore --pgdata DIR --to-time '2026-11-22 03:00:00'
  highwater restore --pgdata DIR --to-time '2026-11-22 01:00:00+00' --exclusive
  highwater restore --pgdata DIR --to-name before_release --target-action promote
  highwater restore --pgdata DIR --standby

A time without a zone is read in the machine's zone and told back with its offset. DIR must
be empty or absent. The new cluster does not archive unless --take-over says that it
replaces the old one.";

/// Under `info --help`.
pub const INFO: &str = "\
Examples:
  highwater info
  highwater info --at '2026-11-22 03:00:00'      what a restore to then would use
  highwater info --json | jq -r .recovery_window.latest_time";

/// Under `verify --help`.
pub const VERIFY: &str = "\
Examples:
  highwater verify                     every object's size and header, and that WAL is unbroken
  highwater verify --deep              every byte too; what was proven before is skipped
  highwater verify --deep --rate 50MB  beside production
  highwater verify --deep --all        everything again, for a disk that may have lost bits
  highwater verify --acknowledge 0f3c5a92d1e7 --reason 'the disk of 22 November'

Exit code 4: something is wrong that nobody has acknowledged; each finding says which moments
are lost and what to do. 5: the store failed, which is never a finding; what was proven until
then is remembered, and the next run goes on from there. It may run beside everything else.";

/// Under `drill --help`.
pub const DRILL: &str = "\
Examples:
  highwater drill --scratch /var/tmp/highwater-drill       the newest backup and all WAL since
  highwater drill --random-moment                          some moment of those that can be reached
  highwater drill --backup 20261122T031500Z --to-immediate
  highwater drill --checks /etc/highwater/checks           your own questions, such as orders.sql:
      -- database: shop
      SELECT count(*) > 1000 FROM orders WHERE placed > now() - interval '2 days'
  and orders.expected beside it, with the rows as psql -At prints them:
      t

The copy runs as a private server: on a socket that nobody else can reach, without archiving,
without the cluster's own settings, at low priority. It may run beside production, and be
killed at any moment. Exit code 0: it came back and every check passed. 4: the target was not
reached, or a check failed. 5, 6, 7: store, PostgreSQL's programs or disk kept it from being
proved; 2 and 3: it was not begun. What came of it is put on record; highwater info shows it.";

/// Under `log --help`.
pub const LOG: &str = "\
Examples:
  highwater log --limit 20                             the newest 20 things that happened
  highwater log --since '2026-11-22 03:00:00' --until '2026-11-22 04:00:00' --oldest-first
  highwater log --kinds drops,large-deletes             what may have been a mistake
  highwater log --relation public.orders --since 0/3000000
  highwater log --before-drop public.orders --pgdata /var/lib/postgresql/restored
  highwater log --json | jq -c 'select(.kind == \"restore-point\")'

The LSN of a line is where its record begins: `restore --to-lsn LSN --exclusive` brings the
cluster to just before it. Names come from the backups nearest to a line; a relation that
none of them knows is told by the number of its files. Exit code 4: WAL is missing in what was
asked for, and the lines say where; 1: no such drop, or no WAL at all.";

/// Under `expire --help`.
pub const EXPIRE: &str = "\
Examples:
  highwater expire --dry-run           what would go, and why each thing that stays does
  highwater expire                     after the nightly backup; in the settings file:
      retain_window = \"30d\"            every moment of the last 30 days
      retain_weekly = 8                beyond them, the last backup of each of 8 weeks
  highwater expire --retain-window 14d --dry-run

Whatever one of the settings keeps is kept. Without any, nothing is deleted and the exit code
is 2. The last usable backup is never deleted. It may run beside backups, archiving and
another expire, and after an interruption it goes on where it stopped. Exit code 5: the store
refused to delete something; 4: a backup cannot be read, and everything it may need was kept.";

/// Under `pin --help`.
pub const PIN: &str = "\
Examples:
  highwater pin 20261122T031500Z --reason 'before the migration'
  highwater pin 20261122T031500Z --until '2027-06-30 00:00:00+00'
  highwater backup --keep-until '2027-06-30 00:00:00+00'

A pinned backup stays with the WAL that makes it consistent. Of several pins on one backup the
longest counts; `unpin` takes them all off.";

/// Under `config --help`.
pub const CONFIG: &str = "\
Examples:
  highwater config
  sudo -u postgres highwater config    what archive_command will see from the file

Secrets are hidden. Each value is shown with its origin: a flag, a variable or a line of the file.";

/// Under `key --help`.
pub const KEY: &str = "\
Encrypted from the beginning (a cluster that was set up without a key stays as it is):
  highwater key new /etc/highwater/main.key
  highwater --key-file /etc/highwater/main.key init
  highwater key add /mnt/safe/second.key         a second key, kept elsewhere

A key that leaked:
  highwater key new /etc/highwater/new.key
  highwater key rewrap /etc/highwater/new.key    the old one opens nothing any more
  highwater --key-file /etc/highwater/new.key key rotate --also /mnt/safe/second.key

The key itself is taken from a file, from what key_command prints, or from the variable
HIGHWATER_KEY: 64 hex digits. Nothing ever prints it.";
