//! What of a file that the agent has stored may be told to a command that asks for it.
//!
//! A command that stores a file itself says: the bytes that I read after I was called are in the store. The agent
//! may say no less. It has read earlier, so it must know that nobody wrote since; where times cannot show that,
//! the bytes are hashed again. Whoever gets no such answer stores the file himself.

use std::time::Duration;

use crate::pgdata::FileFacts;

/// How long what the store confirmed is told without asking it again. It could be taken away, by a person who sets
/// the repository up anew: the shorter, the less can be acknowledged that is not there any more.
pub const ANSWER_AGE_MAX: Duration = Duration::from_mins(10);

/// A file that was read, checked, hashed and stored, and had the same facts before and after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// What it was when it was read.
    pub facts: FileFacts,
    /// Whether a write since it was read must show in its facts. Where times are too young, or another machine
    /// sets them, it need not.
    pub shows_writes: bool,
    /// BLAKE3 of its bytes, in hex; never empty.
    pub blake3: String,
    /// Its length in bytes.
    pub plain_bytes: u64,
    /// Its length as stored, in bytes.
    pub stored_bytes: u64,
}

/// What is known about a file that is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// What it is for the one who asks.
    pub facts: FileFacts,
    /// What it is for us, looked at after the question came.
    pub seen: FileFacts,
    /// Whether reading it began after the question came.
    pub read_since: bool,
    /// How long ago the store confirmed it.
    pub age: Duration,
}

/// What may be said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Belief {
    /// The bytes that it has are stored.
    Stored,
    /// They are, if they still have the same digest.
    IfSameDigest,
    /// Nothing: it is another file, was written to, or was stored too long ago.
    Nothing,
}

impl StoredFile {
    /// Says what may be told of it.
    pub fn belief(&self, asked: Asked) -> Belief {
        if asked.facts != self.facts || asked.seen != self.facts || asked.age > ANSWER_AGE_MAX {
            return Belief::Nothing;
        }
        if asked.read_since || self.shows_writes {
            return Belief::Stored;
        }
        Belief::IfSameDigest
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A file of a moment ago.
    fn facts(directory: &tempfile::TempDir, name: &str) -> FileFacts {
        let path = directory.path().join(name);
        std::fs::write(&path, name).unwrap();
        FileFacts::of_path(&path).unwrap()
    }

    fn stored(facts: FileFacts, shows_writes: bool) -> StoredFile {
        StoredFile { facts, shows_writes, blake3: "d1".to_owned(), plain_bytes: 1, stored_bytes: 1 }
    }

    fn asked(facts: FileFacts) -> Asked {
        Asked { facts, seen: facts, read_since: false, age: Duration::from_secs(1) }
    }

    #[test]
    fn a_file_that_had_rested_before_it_was_read_is_stored() {
        let directory = tempfile::tempdir().unwrap();
        let facts = facts(&directory, "a");
        assert_eq!(stored(facts, true).belief(asked(facts)), Belief::Stored);
        assert_eq!(stored(facts, false).belief(asked(facts)), Belief::IfSameDigest);
    }

    #[test]
    fn a_reading_that_began_after_the_question_is_as_good_as_the_commands_own() {
        let directory = tempfile::tempdir().unwrap();
        let facts = facts(&directory, "a");
        let asked = Asked { read_since: true, ..asked(facts) };
        assert_eq!(stored(facts, false).belief(asked), Belief::Stored);
    }

    #[test]
    fn nothing_is_said_of_another_file_or_long_after() {
        let directory = tempfile::tempdir().unwrap();
        let (ours, other) = (facts(&directory, "a"), facts(&directory, "b"));
        for read_since in [false, true] {
            let asked = Asked { read_since, ..asked(ours) };
            let stored = stored(ours, true);
            let believed = |asked| stored.belief(asked);
            assert_eq!(believed(Asked { facts: other, ..asked }), Belief::Nothing);
            assert_eq!(believed(Asked { seen: other, ..asked }), Belief::Nothing);
            let late = ANSWER_AGE_MAX + Duration::from_millis(1);
            assert_eq!(believed(Asked { age: late, ..asked }), Belief::Nothing);
            assert_eq!(believed(Asked { age: ANSWER_AGE_MAX, ..asked }), Belief::Stored);
        }
    }
}
