//! One connection to a server, and the simple query protocol on it.
//!
//! A connection is idle, or in the middle of a reply. Whoever stops reading a
//! reply half-way (an error, a dropped future) leaves it unusable, and later
//! calls say so; nothing is ever read as the answer to another question.
//! Dropping a connection at any time is safe: the server notices the closed
//! socket, ends the command and frees what it held.

use std::time::Duration;

use bytes::BytesMut;
use postgres_protocol::message::frontend;

use super::auth::Login;
use super::conninfo::{ConnInfo, Host, SessionTarget};
use super::dial::{self, Address, NextStep, Way};
use super::error::{PgError, ServerError};
use super::rows::{RawRows, Rows};
use super::wire::{Frame, Wire};

/// The longest silence in a reply, unless the caller says otherwise.
const SILENCE_LIMIT_DEFAULT: Duration = Duration::from_mins(5);

/// How long a polite goodbye may take.
const GOODBYE_LIMIT: Duration = Duration::from_secs(5);

/// The most result sets one query may return.
const RESULT_SETS_MAX: usize = 64;

/// What the connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// SQL in the database of the settings.
    Sql,
    /// A physical walsender (`replication=true`): replication commands and
    /// SHOW only. It uses one of `max_wal_senders`, and pg_hba.conf must have
    /// a line whose database is the word `replication`.
    Replication,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    /// A command was sent and ReadyForQuery has not come.
    InReply,
    /// No reply can be trusted any more.
    Unusable,
}

/// A connection that is logged in.
#[derive(Debug)]
pub struct Connection {
    wire: Wire,
    mode: Mode,
    state: State,
    /// An error of the server; it is returned when the reply was read to its end.
    pending_error: Option<Box<ServerError>>,
    server_version_num: u32,
}

impl Connection {
    /// Connects to the first server of `info` that can be reached, lets us in
    /// and is of the kind that `target_session_attrs` asks for.
    ///
    /// Each address has `connect_timeout` (default 30 s) for itself. As in
    /// libpq, a server that turns the login down ends the search.
    ///
    /// Errors: any [`PgError`]; `AllFailed` where more than one attempt was
    /// made. A retry can cure those that are [transient](PgError::is_transient).
    pub async fn connect(info: &ConnInfo, mode: Mode) -> Result<Self, PgError> {
        if info.target == SessionTarget::PreferStandby {
            match Self::search(info, mode, SessionTarget::Standby).await {
                Ok(connection) => return Ok(connection),
                Err(error) => tracing::debug!("no standby: {error}"),
            }
            return Self::search(info, mode, SessionTarget::Any).await;
        }
        Self::search(info, mode, info.target).await
    }

    /// Tries the hosts in order.
    async fn search(info: &ConnInfo, mode: Mode, target: SessionTarget) -> Result<Self, PgError> {
        let mut failures = Vec::new();
        for host in &info.hosts {
            let addresses = match dial::addresses(info, host).await {
                Ok(addresses) => addresses,
                Err(error) => {
                    failures.push(error);
                    continue;
                }
            };
            'host: for address in addresses {
                for way in dial::ways(info, &address) {
                    let place = dial::place(host, &address);
                    let attempt = Self::attempt(info, host, &address, *way, mode, target);
                    match dial::limited(info, &place, "connecting", attempt).await {
                        Ok(connection) => return Ok(connection),
                        Err(error) => {
                            let step = dial::next_step(*way, &error);
                            failures.push(error);
                            match step {
                                NextStep::NextWay => {}
                                NextStep::NextAddress => break,
                                NextStep::NextHost => break 'host,
                                NextStep::GiveUp => return Err(PgError::of_attempts(failures)),
                            }
                        }
                    }
                }
            }
        }
        Err(PgError::of_attempts(failures))
    }

    /// Connects and logs in at one address in one way.
    async fn attempt(
        info: &ConnInfo,
        host: &Host,
        address: &Address,
        way: Way,
        mode: Mode,
        target: SessionTarget,
    ) -> Result<Self, PgError> {
        let place = dial::place(host, address);
        let opened = dial::open(info, host, address, way, &place).await?;
        let mut wire = Wire::new(opened.socket, place);
        frontend::startup_message(start_up_parameters(info, mode), &mut wire.output)
            .map_err(|error| wire.broken(format!("a setting cannot be sent: {error}")))?;
        wire.flush().await?;
        let (encrypted, end_point) = (opened.encrypted, opened.end_point);
        Login { info, host, mode, encrypted, end_point }.run(&mut wire).await?;
        wire.login_is_done();
        let mut connection =
            Self { wire, mode, state: State::InReply, pending_error: None, server_version_num: 0 };
        while connection.state == State::InReply {
            let frame = connection.next_frame().await?;
            // Besides ReadyForQuery only BackendKeyData comes, for
            // cancel requests, which are never made here.
            if !matches!(frame.tag, b'Z' | b'K') {
                return Err(connection.unexpected(&frame, "at the end of the login"));
            }
        }
        connection.wire.silence_limit = Some(SILENCE_LIMIT_DEFAULT);
        connection.server_version_num = connection.read_server_version()?;
        connection.check_target(target).await?;
        Ok(connection)
    }

    /// Takes a stream for a connection to a server of today that is logged in.
    #[cfg(test)]
    pub(super) fn over(stream: Box<dyn super::wire::Socket>) -> Self {
        let mut wire = Wire::new(stream, "test".to_owned());
        wire.login_is_done();
        let (mode, state) = (Mode::Replication, State::Idle);
        Self { wire, mode, state, pending_error: None, server_version_num: 180_000 }
    }

    /// Returns how much room the read buffer has, in bytes.
    #[cfg(test)]
    pub(super) fn input_room(&self) -> usize {
        self.wire.input_room()
    }

    /// Returns who is at the other end: `host:port (address)`, or a socket's path.
    pub fn place(&self) -> &str {
        self.wire.place()
    }

    /// Returns what the connection is for.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Returns the server's version as `server_version_num` has it: 150020 is 15.20.
    pub fn server_version_num(&self) -> u32 {
        self.server_version_num
    }

    /// Returns the last value the server reported for a parameter that it
    /// reports by itself, such as `server_version` or `in_hot_standby`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.wire.parameter(name)
    }

    /// Sets the longest silence allowed while a reply is awaited or a request
    /// sent (default 300 s); `None` waits without end. Bytes reset it.
    pub fn set_silence_limit(&mut self, limit: Option<Duration>) {
        self.wire.silence_limit = limit;
    }

    /// Runs `text` and returns its last result set.
    ///
    /// Errors: `Server` leaves the connection usable unless its severity is
    /// FATAL; after any other the connection is unusable.
    pub async fn query(&mut self, text: &str) -> Result<Rows, PgError> {
        Ok(self.query_all(text).await?.pop().unwrap_or_default())
    }

    /// Runs `text`, which may be several statements, and returns a result set
    /// for each, empty for those that return no rows. Errors: as [`Self::query`].
    pub async fn query_all(&mut self, text: &str) -> Result<Vec<Rows>, PgError> {
        let sets = self.query_raw(text).await?;
        sets.into_iter()
            .map(|set| set.into_text().map_err(|reason| self.wire.broken(reason)))
            .collect()
    }

    /// Says goodbye and closes. Nothing can go wrong that matters.
    pub async fn close(mut self) {
        self.wire.output.clear();
        frontend::terminate(&mut self.wire.output);
        let _ = tokio::time::timeout(GOODBYE_LIMIT, self.wire.shut_down()).await;
    }

    /// Runs `text` and returns every result set as bytes.
    pub(super) async fn query_raw(&mut self, text: &str) -> Result<Vec<RawRows>, PgError> {
        self.send_query(text).await?;
        let mut sets: Vec<RawRows> = Vec::new();
        let mut open: Option<RawRows> = None;
        loop {
            let Frame { tag, body } = self.next_frame().await?;
            match (tag, open.as_mut()) {
                (b'T', None) => open = Some(self.checked(RawRows::begin(body))?),
                (b'D', Some(set)) => {
                    let pushed = set.push(body);
                    self.checked(pushed)?;
                }
                (b'C' | b'I', _) if sets.len() < RESULT_SETS_MAX => {
                    sets.push(open.take().unwrap_or_default());
                }
                (b'Z', None) => return Ok(sets),
                _ => return Err(self.unexpected(&Frame { tag, body }, "in a query's reply")),
            }
        }
    }

    /// Sends a command; its reply is then read by [`Self::next_frame`].
    pub(super) async fn send_query(&mut self, text: &str) -> Result<(), PgError> {
        if self.state != State::Idle {
            return Err(PgError::Closed {
                place: self.place().to_owned(),
                reason: "an earlier reply was not read to its end".to_owned(),
            });
        }
        self.state = State::InReply;
        self.wire.activity = "waiting for a reply";
        frontend::query(text, &mut self.wire.output)
            .map_err(|error| self.wire.broken(format!("a command cannot be sent: {error}")))?;
        self.wire.flush().await
    }

    /// Reads one result set of a reply that has more to come.
    pub(super) async fn next_row_set(&mut self) -> Result<RawRows, PgError> {
        let frame = self.next_frame().await?;
        if frame.tag != b'T' {
            return Err(self.unexpected(&frame, "where a result set begins"));
        }
        let mut set = self.checked(RawRows::begin(frame.body))?;
        loop {
            let frame = self.next_frame().await?;
            match frame.tag {
                b'D' => self.checked(set.push(frame.body))?,
                b'C' => return Ok(set),
                _ => return Err(self.unexpected(&frame, "in a result set")),
            }
        }
    }

    /// Returns the next message of the reply. On ReadyForQuery the connection is idle again.
    ///
    /// An ErrorResponse becomes an error only after the rest of the reply was
    /// read, so that the connection is idle again where the server lets it.
    /// Cancel-safe: a call that is dropped loses no message and no error.
    pub(super) async fn next_frame(&mut self) -> Result<Frame, PgError> {
        loop {
            if self.state != State::InReply
                && let Some(error) = self.pending_error.take()
            {
                return Err(PgError::Server(error));
            }
            let frame = match self.next_of_wire().await {
                Ok(frame) => frame,
                // What the server said before is the better news.
                Err(broken) => {
                    return Err(self.pending_error.take().map_or(broken, PgError::Server));
                }
            };
            if self.pending_error.is_some() {
                // What still comes is of no use.
                continue;
            }
            if frame.tag != b'E' {
                return Ok(frame);
            }
            let error = self.wire.server_error(&frame.body);
            if error.ends_connection() {
                self.state = State::Unusable;
            }
            self.pending_error = Some(Box::new(error));
        }
    }

    /// Puts a message into what the next [`Self::flush`] sends.
    pub(super) fn put(&mut self, write: impl FnOnce(&mut BytesMut)) {
        write(&mut self.wire.output);
    }

    /// Sends what was put. Errors leave the connection unusable. Cancel-safe:
    /// after a call that is dropped, the next one sends the rest.
    pub(super) async fn flush(&mut self) -> Result<(), PgError> {
        if !self.wire.has_output() {
            return Ok(());
        }
        let sent = self.wire.flush().await;
        if sent.is_err() {
            self.state = State::Unusable;
        }
        sent
    }

    async fn next_of_wire(&mut self) -> Result<Frame, PgError> {
        match self.wire.next().await {
            Ok(frame) => {
                if frame.tag == b'Z' {
                    self.state = State::Idle;
                }
                Ok(frame)
            }
            Err(error) => {
                self.state = State::Unusable;
                Err(error)
            }
        }
    }

    /// Makes a decoding problem a protocol error.
    pub(super) fn checked<T>(&mut self, decoded: Result<T, &'static str>) -> Result<T, PgError> {
        decoded.map_err(|reason| self.broken(reason))
    }

    /// Gives up on the connection because of what the server sent.
    pub(super) fn broken(&mut self, reason: impl Into<String>) -> PgError {
        self.state = State::Unusable;
        self.wire.broken(reason)
    }

    /// Gives up on the connection because of a message that has no place here.
    pub(super) fn unexpected(&mut self, frame: &Frame, position: &str) -> PgError {
        let kind = frame.tag.escape_ascii();
        self.broken(format!("a message of kind {kind} {position}"))
    }

    /// Sets what a timeout says was being done.
    pub(super) fn set_activity(&mut self, activity: &'static str) {
        self.wire.activity = activity;
    }

    fn read_server_version(&mut self) -> Result<u32, PgError> {
        let version = self.parameter("server_version").unwrap_or_default().to_owned();
        server_version_num(&version)
            .ok_or_else(|| self.broken(format!("the server's version is `{version}`")))
    }

    /// Refuses a server that is not what `target_session_attrs` asks for, by
    /// the rules of libpq for PostgreSQL 14 and later.
    async fn check_target(&mut self, target: SessionTarget) -> Result<(), PgError> {
        let fits = match target {
            SessionTarget::Any | SessionTarget::PreferStandby => true,
            SessionTarget::Primary => !self.is_on("in_hot_standby").await?,
            SessionTarget::Standby => self.is_on("in_hot_standby").await?,
            SessionTarget::ReadWrite => !self.is_read_only().await?,
            SessionTarget::ReadOnly => self.is_read_only().await?,
        };
        if fits {
            return Ok(());
        }
        Err(PgError::Unsuitable { place: self.place().to_owned(), wanted: target.name() })
    }

    async fn is_read_only(&mut self) -> Result<bool, PgError> {
        Ok(self.is_on("in_hot_standby").await?
            || self.is_on("default_transaction_read_only").await?)
    }

    /// Returns a switch that servers from 14 on report by themselves; a pooler
    /// in between may not pass it on, so otherwise it is asked for.
    async fn is_on(&mut self, name: &str) -> Result<bool, PgError> {
        if let Some(value) = self.parameter(name) {
            return Ok(value == "on");
        }
        Ok(self.show(name).await? == "on")
    }
}

/// The start-up parameters, in the order sent.
fn start_up_parameters(info: &ConnInfo, mode: Mode) -> Vec<(&str, &str)> {
    let mut parameters = vec![("user", info.user.as_str())];
    match mode {
        // Messages and values are read as UTF-8.
        Mode::Sql => {
            parameters.extend([("database", info.dbname.as_str()), ("client_encoding", "UTF8")]);
        }
        // A physical walsender has no database, and so no encoding to convert from.
        Mode::Replication => parameters.push(("replication", "true")),
    }
    parameters.push(("application_name", &info.application_name));
    parameters.extend(info.options.as_deref().map(|options| ("options", options)));
    parameters
}

/// Reads `15.20 (Debian 15.20-0+deb12u1)`, `18beta1` or `19devel` as a number,
/// as libpq's `PQserverVersion` does for versions from 10 on.
fn server_version_num(version: &str) -> Option<u32> {
    let digits = |text: &str| {
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        text[..end].parse::<u32>().ok()
    };
    let major = digits(version).filter(|major| (1..1000).contains(major))?;
    let minor = version.split_once('.').and_then(|(_, minor)| digits(minor)).unwrap_or(0);
    Some(major * 10_000 + minor.min(9_999))
}

#[cfg(test)]
mod tests;
