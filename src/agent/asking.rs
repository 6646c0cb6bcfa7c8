//! How `archive-push` asks the agent, before it does anything itself.
//!
//! Plain blocking calls with short limits, no thread and no runtime: the answer is to be there within a few
//! milliseconds. Only "stored" counts, of the very file that was asked about. Anything else (no agent, one that is
//! stuck, older, newer, of another repository, or something that is no agent at all) is worth a line in the log, and the
//! command goes the direct way, whose verdicts and exit codes are the only ones there are.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, Socket, Type};

use super::message::{Answer, LINE_BYTES_MAX, NotUnderstood, Question, Word};
use super::seat::trusted_socket;
use crate::ops::ahead::Ahead;
use crate::ops::archive_push::Report;
use crate::pg::WalFileName;
use crate::pgdata::FileFacts;
use crate::repo::Put;

/// How long an agent may take to accept, and to say its first word.
const FIRST_WORD_MAX: Duration = Duration::from_secs(1);

/// How long it may be silent while it stores the file: some times [`super::front::WAIT_EVERY`].
const SILENCE_MAX: Duration = Duration::from_secs(3);

/// Why the agent's word does not help.
#[derive(Debug, thiserror::Error)]
enum NoHelp {
    #[error("it cannot be reached: {0}")]
    Unreachable(io::Error),
    #[error("it does not answer in time")]
    Silent,
    #[error("it hung up")]
    HungUp,
    #[error(transparent)]
    NotUnderstood(#[from] NotUnderstood),
    #[error("{0}")]
    SaidNo(String),
    #[error("the file was touched meanwhile")]
    Touched,
}

/// Asks the agent that may live beside the spool whether it has stored the file at `path`, and waits while it says
/// that it is at it, for `patience` at most. `None`: store it the direct way.
pub fn ask_stored(ahead: &Ahead, path: &Path, patience: Duration) -> Option<Report> {
    let name = WalFileName::parse(path.file_name()?.to_str()?).ok()?;
    let socket = trusted_socket(&ahead.find()?)?;
    let facts = FileFacts::of_path(path).ok()?;
    let question = Question::new(&ahead.place, name, facts);
    let asked = ask(&socket, &question, patience).and_then(|word| match FileFacts::of_path(path) {
        Ok(now) if now == facts => Ok(word),
        _ => Err(NoHelp::Touched),
    });
    match asked {
        Ok((plain_bytes, stored_bytes, blake3)) => {
            let blake3 = Some(blake3);
            Some(Report { name, outcome: Put::AlreadyThere, plain_bytes, stored_bytes, blake3 })
        }
        Err(why) => {
            tracing::info!("the agent does not help with `{name}`: {why}");
            None
        }
    }
}

/// Returns length, stored length and digest of a file that the agent has stored.
fn ask(
    socket: &Path,
    question: &Question,
    patience: Duration,
) -> Result<(u64, u64, String), NoHelp> {
    let began = Instant::now();
    let mut line = Line::connect(socket)?;
    line.send(&question.to_line())?;
    let mut limit = FIRST_WORD_MAX;
    loop {
        let left = patience.checked_sub(began.elapsed()).ok_or(NoHelp::Silent)?;
        match Answer::read(&line.next(limit.min(left))?, question)? {
            Word::Stored { plain_bytes, stored_bytes, blake3 } => {
                return Ok((plain_bytes, stored_bytes, blake3));
            }
            Word::Wait => limit = SILENCE_MAX,
            Word::No { why } => return Err(NoHelp::SaidNo(why)),
        }
    }
}

/// A connection on which lines come, each within a time.
struct Line {
    stream: UnixStream,
    /// What has come behind the last line.
    buffer: Vec<u8>,
}

impl Line {
    fn connect(socket: &Path) -> Result<Self, NoHelp> {
        let stream = || {
            let stream = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            // This bounds the wait for a queue that is full as well (`SO_SNDTIMEO` in `unix_stream_connect` of Linux).
            stream.set_write_timeout(Some(FIRST_WORD_MAX))?;
            stream.connect(&SockAddr::unix(socket)?)?;
            Ok(UnixStream::from(OwnedFd::from(stream)))
        };
        let stream = stream().map_err(NoHelp::Unreachable)?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    fn send(&mut self, line: &[u8]) -> Result<(), NoHelp> {
        self.stream.write_all(line).map_err(of_io)
    }

    /// Returns the next line, which must be complete within `limit`.
    fn next(&mut self, limit: Duration) -> Result<Vec<u8>, NoHelp> {
        let deadline = Instant::now() + limit;
        let mut block = [0; 1024];
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                return Ok(self.buffer.drain(..=end).collect());
            }
            if self.buffer.len() > LINE_BYTES_MAX {
                return Err(NotUnderstood::Garbled.into());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NoHelp::Silent);
            }
            self.stream.set_read_timeout(Some(left)).map_err(of_io)?;
            match self.stream.read(&mut block) {
                Ok(0) => return Err(NoHelp::HungUp),
                Ok(n) => self.buffer.extend_from_slice(&block[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(of_io(error)),
            }
        }
    }
}

fn of_io(error: io::Error) -> NoHelp {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => NoHelp::Silent,
        _ => NoHelp::Unreachable(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::pgdata::Spool;

    const FILE: &str = "000000010000000000000007";

    /// A spool with a WAL file beside it.
    struct Place {
        directory: tempfile::TempDir,
        ahead: Ahead,
    }

    impl Place {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join(FILE), "wal").unwrap();
            let spool = directory.path().join("spool");
            Spool::open(&spool).unwrap();
            Self { ahead: Ahead { spool, place: "here".to_owned(), room_bytes: 0 }, directory }
        }

        fn file(&self) -> std::path::PathBuf {
            self.directory.path().join(FILE)
        }

        fn ask(&self) -> Option<Report> {
            ask_stored(&self.ahead, &self.file(), Duration::from_secs(2))
        }

        /// Asks something that listens there, reads the question and then does `answer`.
        fn ask_one_that(
            &self,
            answer: impl FnOnce(&mut UnixStream, Question) + Send,
        ) -> Option<Report> {
            let socket = self.ahead.spool.join("agent.sock");
            let listener = UnixListener::bind(&socket).unwrap();
            let report = std::thread::scope(|scope| {
                scope.spawn(|| {
                    let (mut stream, _) = listener.accept().unwrap();
                    let mut line = Vec::new();
                    BufReader::new(&stream).read_until(b'\n', &mut line).unwrap();
                    let (question, _) = Question::read(&line, "here").unwrap();
                    answer(&mut stream, question);
                });
                self.ask()
            });
            std::fs::remove_file(socket).unwrap();
            report
        }
    }

    fn stored(to: &Question) -> Vec<u8> {
        let word = Word::Stored { plain_bytes: 3, stored_bytes: 2, blake3: "d".to_owned() };
        Answer::new(to, word).to_line()
    }

    #[test]
    fn stored_is_believed_at_once_or_after_a_wait() {
        let place = Place::new();
        let report = place.ask_one_that(|stream, question| {
            stream.write_all(&stored(&question)).unwrap();
        });
        assert_eq!(report.map(|report| report.stored_bytes), Some(2));
        let report = place.ask_one_that(|stream, question| {
            let both = [Answer::new(&question, Word::Wait).to_line(), stored(&question)].concat();
            // In any pieces.
            for part in both.chunks(37) {
                stream.write_all(part).unwrap();
            }
        });
        assert!(report.is_some());
    }

    #[test]
    fn nothing_else_is() {
        let place = Place::new();
        assert_eq!(place.ask(), None, "nobody is there");
        assert_eq!(place.ask_one_that(|_, _| {}), None, "it hangs up");
        let no = Word::No { why: "x".to_owned() };
        let said_no = |stream: &mut UnixStream, question: Question| {
            stream.write_all(&Answer::new(&question, no).to_line()).unwrap();
        };
        assert_eq!(place.ask_one_that(said_no), None);
        let garbage = |stream: &mut UnixStream, _| {
            // It may be hung up on in the middle.
            let _ = stream.write_all(&vec![b'x'; 1 << 20]);
        };
        assert_eq!(place.ask_one_that(garbage), None);
        let half = |stream: &mut UnixStream, question: Question| {
            let line = stored(&question);
            stream.write_all(&line[..line.len() - 1]).unwrap();
        };
        assert_eq!(place.ask_one_that(half), None, "a line without an end is none");
        let path = place.file();
        let touched = |stream: &mut UnixStream, question: Question| {
            std::fs::write(&path, "otherwise").unwrap();
            stream.write_all(&stored(&question)).unwrap();
        };
        assert_eq!(place.ask_one_that(touched), None);
    }

    #[test]
    fn one_that_is_silent_or_dribbles_is_given_up_soon() {
        let place = Place::new();
        let began = Instant::now();
        let silent = |stream: &mut UnixStream, _| {
            let _ = stream.read(&mut [0]);
        };
        assert_eq!(place.ask_one_that(silent), None);
        let dribbles = |stream: &mut UnixStream, _| {
            while stream.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(100));
            }
        };
        assert_eq!(place.ask_one_that(dribbles), None);
        let waits = |stream: &mut UnixStream, question: Question| {
            while stream.write_all(&Answer::new(&question, Word::Wait).to_line()).is_ok() {
                std::thread::sleep(Duration::from_millis(100));
            }
        };
        assert_eq!(place.ask_one_that(waits), None);
        assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    }

    #[test]
    fn a_queue_that_is_full_holds_nobody_up() {
        let place = Place::new();
        let socket = place.ahead.spool.join("agent.sock");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&socket).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let _first = UnixStream::connect(&socket).unwrap();
        let began = Instant::now();
        assert_eq!(place.ask(), None);
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    }
}
