//! What commands and the agent say to each other: one JSON object in a line, each way.
//!
//! ```text
//! command  {"version":1,"place":"…","file":"000000010000000000000007","facts":{…}}
//! agent    {"version":1,"place":"…","file":"000000010000000000000007","facts":{…},"word":"wait"}        as often as it takes
//! agent    {"version":1,"place":"…","file":"000000010000000000000007","facts":{…},"word":{"stored":{…}}}
//! ```
//!
//! Each side says of which repository and cluster it speaks (`place`, see `ops::ahead::Ahead`), and of which file. An
//! answer that differs in any of these, or in its version, is none. Never here: whether an answer is true.

use serde::{Deserialize, Serialize};

use crate::pg::WalFileName;
use crate::pgdata::FileFacts;

/// What both sides must speak; another one means that they know nothing of each other.
const VERSION: u32 = 1;

/// No line is longer, in bytes, its end included.
pub(super) const LINE_BYTES_MAX: usize = 4096;

/// What is asked: have you stored this file?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Question {
    version: u32,
    /// The mark of repository and cluster.
    place: String,
    /// Its name.
    file: String,
    /// Which file of this name.
    pub(super) facts: FileFacts,
}

/// What is answered to a [`Question`], which it repeats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answer {
    #[serde(flatten)]
    to: Question,
    word: Word,
}

/// The answer proper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Word {
    /// Its bytes are in the repository, confirmed by the store.
    Stored {
        /// Their number.
        plain_bytes: u64,
        /// As stored.
        stored_bytes: u64,
        /// Their BLAKE3 digest, in hex.
        blake3: String,
    },
    /// It is being stored: another answer follows, and this one again if that takes long.
    Wait,
    /// Store it yourself.
    No {
        /// Why, for the log.
        why: String,
    },
}

/// Why a line says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum NotUnderstood {
    #[error("it speaks another language")]
    Garbled,
    #[error("it is of another version")]
    OtherVersion,
    #[error("it serves another repository or cluster, or has other settings for it")]
    OtherPlace,
    #[error("it speaks of another file")]
    OtherFile,
}

/// What every line of every version begins with.
#[derive(Serialize, Deserialize)]
struct Greeting {
    version: u32,
    place: String,
}

/// Returns what is sent to one who was not understood: what we speak, and of which repository and cluster.
pub(super) fn greeting(place: &str) -> Vec<u8> {
    to_line(&Greeting { version: VERSION, place: place.to_owned() })
}

impl Question {
    /// Asks about a file.
    pub(super) fn new(place: &str, file: WalFileName, facts: FileFacts) -> Self {
        Self { version: VERSION, place: place.to_owned(), file: file.to_string(), facts }
    }

    /// Returns the question as it is sent.
    pub(super) fn to_line(&self) -> Vec<u8> {
        to_line(self)
    }

    /// Reads a question of those who speak of `place`, and the file that it is about.
    pub(super) fn read(line: &[u8], place: &str) -> Result<(Self, WalFileName), NotUnderstood> {
        let question: Self = read(line, place)?;
        let file = WalFileName::parse(&question.file).map_err(|_| NotUnderstood::Garbled)?;
        Ok((question, file))
    }
}

impl Answer {
    /// Answers a question.
    pub(super) fn new(to: &Question, word: Word) -> Self {
        Self { to: to.clone(), word }
    }

    /// Returns the answer as it is sent.
    pub(super) fn to_line(&self) -> Vec<u8> {
        to_line(self)
    }

    /// Reads the answer to this very question.
    pub(super) fn read(line: &[u8], to: &Question) -> Result<Word, NotUnderstood> {
        let answer: Self = read(line, &to.place)?;
        if answer.to != *to {
            return Err(NotUnderstood::OtherFile);
        }
        Ok(answer.word)
    }
}

fn to_line(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.push(b'\n');
    line
}

fn read<'a, T: Deserialize<'a>>(line: &'a [u8], place: &str) -> Result<T, NotUnderstood> {
    let greeting: Greeting = serde_json::from_slice(line).map_err(|_| NotUnderstood::Garbled)?;
    if greeting.version != VERSION {
        return Err(NotUnderstood::OtherVersion);
    }
    if greeting.place != place {
        return Err(NotUnderstood::OtherPlace);
    }
    serde_json::from_slice(line).map_err(|_| NotUnderstood::Garbled)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> WalFileName {
        WalFileName::parse(text).unwrap()
    }

    fn question(bytes: &[u8]) -> Question {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        std::fs::write(&path, bytes).unwrap();
        let facts = FileFacts::of_path(&path).unwrap();
        Question::new("here", name("000000010000000000000007"), facts)
    }

    fn stored() -> Word {
        Word::Stored { plain_bytes: 1, stored_bytes: 2, blake3: "d1".to_owned() }
    }

    #[test]
    fn each_side_understands_the_other() {
        let question = question(b"1");
        let (read, file) = Question::read(&question.to_line(), "here").unwrap();
        assert_eq!((&read, file), (&question, name("000000010000000000000007")));
        for word in [stored(), Word::Wait, Word::No { why: "a \"b\"\n".to_owned() }] {
            let line = Answer::new(&read, word.clone()).to_line();
            assert!(line.len() <= LINE_BYTES_MAX);
            assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1));
            assert_eq!(Answer::read(&line, &question), Ok(word));
        }
    }

    #[test]
    fn an_answer_to_another_question_is_none() {
        let question = question(b"1");
        let read = |to: &Question| Answer::read(&Answer::new(to, stored()).to_line(), &question);
        assert_eq!(read(&question), Ok(stored()));
        let there = Question { place: "there".to_owned(), ..question.clone() };
        assert_eq!(read(&there), Err(NotUnderstood::OtherPlace));
        let other = Question { file: "000000010000000000000008".to_owned(), ..question.clone() };
        assert_eq!(read(&other), Err(NotUnderstood::OtherFile));
        let touched = self::question(b"2");
        assert_eq!(read(&touched), Err(NotUnderstood::OtherFile));
        let newer = Question { version: VERSION + 1, ..question.clone() };
        assert_eq!(read(&newer), Err(NotUnderstood::OtherVersion));
    }

    #[test]
    fn a_question_from_elsewhere_or_from_the_future_is_not_answered() {
        let question = question(b"1");
        let read = |line: &[u8]| Question::read(line, "here").map(|_| ());
        assert_eq!(Question::read(&question.to_line(), "x"), Err(NotUnderstood::OtherPlace));
        let newer = b"{\"version\":2,\"place\":\"here\",\"what\":[]}";
        assert_eq!(read(newer), Err(NotUnderstood::OtherVersion));
        assert_eq!(read(&greeting("here")), Err(NotUnderstood::Garbled));
        assert_eq!(read(&greeting("there")), Err(NotUnderstood::OtherPlace));
        let path = Question { file: "../000000010000000000000007".to_owned(), ..question };
        assert_eq!(read(&path.to_line()), Err(NotUnderstood::Garbled), "only a name is a name");
    }

    proptest! {
        #[test]
        fn no_bytes_are_taken_for_an_answer_or_a_question(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            prop_assert!(Question::read(&bytes, "here").is_err());
            prop_assert!(Answer::read(&bytes, &question(b"1")).is_err());
        }

        /// What is damaged on its way may say less, but never "stored" of another file.
        #[test]
        fn a_damaged_answer_never_speaks_of_another_file(at in 0_usize..1000, byte: u8, cut in 0_usize..1000) {
            let question = question(b"1");
            let mut line = Answer::new(&question, Word::Wait).to_line();
            let end = line.len() - 1;
            prop_assert!(cut >= end || Answer::read(&line[..cut], &question).is_err());
            line[at % end] = byte;
            let says_stored = matches!(Answer::read(&line, &question), Ok(Word::Stored { .. }));
            prop_assert!(!says_stored);
        }
    }
}
