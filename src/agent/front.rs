//! Where commands come to: connections, each with one question and its answer.
//!
//! Never here: what is answered (`pushing`).

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::message::{Answer, LINE_BYTES_MAX, NotUnderstood, Question, Word, greeting};
use super::pushing::Asked;

/// Conversations at a time: PostgreSQL runs one command, a person perhaps some more. Others wait to be let in.
pub(super) const CONVERSATIONS_MAX: usize = 16;

/// How long a question may take to arrive, or an answer to be taken.
const LINE_MAX: Duration = Duration::from_secs(1);

/// How often one who waits is told that it goes on.
pub(super) const WAIT_EVERY: Duration = Duration::from_millis(500);

/// How often it is said that commands with other settings ask.
const COMPLAIN_EVERY: Duration = Duration::from_mins(10);

/// How long to wait when no connection can be taken, as when there are too many open files.
const BREATHER: Duration = Duration::from_millis(100);

/// Lets commands in and passes their questions on, for ever.
pub(super) async fn serve(listener: &UnixListener, place: &str, questions: mpsc::Sender<Asked>) {
    let mut conversations = JoinSet::new();
    let mut complained: Option<Instant> = None;
    loop {
        tokio::select! {
            accepted = listener.accept(), if conversations.len() < CONVERSATIONS_MAX => match accepted {
                Ok((stream, _)) => {
                    let (place, questions) = (place.to_owned(), questions.clone());
                    conversations.spawn(async move { converse(stream, &place, &questions).await });
                }
                Err(error) => {
                    tracing::warn!("could not let a command in: {error}");
                    tokio::time::sleep(BREATHER).await;
                }
            },
            Some(ended) = conversations.join_next() => {
                let is_new = complained.is_none_or(|before| before.elapsed() >= COMPLAIN_EVERY);
                if let Ok(Err(NotUnderstood::OtherPlace)) = ended && is_new {
                    complained = Some(Instant::now());
                    tracing::warn!(
                        "commands ask with other settings of the repository than this agent's, and do their work without it: `highwater config` shows both sides'"
                    );
                }
            }
        }
    }
}

/// Hears one question and answers it. Whoever hangs up has heard enough.
async fn converse(
    mut stream: UnixStream,
    place: &str,
    questions: &mpsc::Sender<Asked>,
) -> Result<(), NotUnderstood> {
    let Some(line) = question_line(&mut stream).await else { return Ok(()) };
    let at = Instant::now();
    let (question, file) = match Question::read(&line, place) {
        Ok(read) => read,
        Err(why) => {
            send(&mut stream, &greeting(place)).await;
            return Err(why);
        }
    };
    let (reply, mut answer) = oneshot::channel();
    let facts = question.facts;
    if questions.send(Asked { file, facts, at, reply }).await.is_err() {
        return Ok(());
    }
    loop {
        let word = match tokio::time::timeout(WAIT_EVERY, &mut answer).await {
            Ok(Ok(word)) => word,
            Ok(Err(_)) => Word::No { why: "it is ending".to_owned() },
            Err(_) => Word::Wait,
        };
        let sent = send(&mut stream, &Answer::new(&question, word.clone()).to_line()).await;
        if !sent || word != Word::Wait {
            return Ok(());
        }
    }
}

/// Reads up to the end of a line; `None` if none comes in time.
async fn question_line(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    let read = async {
        while !line.ends_with(b"\n") && line.len() < LINE_BYTES_MAX {
            if stream.read_buf(&mut line).await.ok()? == 0 {
                return None;
            }
        }
        Some(())
    };
    tokio::time::timeout(LINE_MAX, read).await.ok()??;
    Some(line)
}

/// Sends a line; returns whether it was taken.
async fn send(stream: &mut UnixStream, line: &[u8]) -> bool {
    matches!(tokio::time::timeout(LINE_MAX, stream.write_all(line)).await, Ok(Ok(())))
}
