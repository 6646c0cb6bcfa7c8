//! Working ahead of PostgreSQL: which segments come next, and what of a note may be believed.
//!
//! A note is never more than a reason to do less: whoever doubts it does the whole work.

use serde::{Deserialize, Serialize};

use crate::pg::{SegmentName, SegmentSize};
use crate::pgdata::{FileFacts, Moment};

/// The form of a note; another one is not read.
const NOTE_FORMAT: u32 = 1;

/// How long a note is believed, in seconds. What is stored could be taken away again, by a person who sets the
/// repository up anew: the shorter, the less can be acknowledged that is not there any more.
const NOTE_SECONDS_MAX: u64 = 600;

/// The most segments that one `archive-push` stores besides its own, and their bytes.
const PUSH_AHEAD_MAX: usize = 16;
const PUSH_AHEAD_BYTES_MAX: u64 = 256 << 20;

/// The most segments that are fetched ahead.
const FETCH_AHEAD_MAX: usize = 64;

/// What is known of a segment that was pushed or fetched ahead.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    format: u32,
    /// Repository and cluster, as one mark.
    place: String,
    segment: String,
    /// Its length in bytes.
    pub plain_bytes: u64,
    /// Its length as stored, in bytes; 0 where it was fetched.
    pub stored_bytes: u64,
    /// BLAKE3 of its bytes, in hex; empty where it was fetched.
    pub blake3: String,
    /// When the store confirmed it, or gave it out.
    noted: Moment,
    /// The file that was fetched.
    file: Option<FileFacts>,
}

/// Why a note is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    /// It cannot be read.
    #[error("it cannot be read")]
    Garbled,
    /// It is about another segment.
    #[error("it is about another segment")]
    OtherSegment,
    /// It is about another repository or cluster.
    #[error("it is about another repository or cluster")]
    OtherPlace,
    /// The machine was restarted since.
    #[error("the machine was restarted since")]
    OtherBoot,
    /// It is too old, or from the future.
    #[error("it is too old")]
    TooOld,
    /// The file is not the one it is about.
    #[error("the file is not the one it is about")]
    OtherFile,
}

/// What a note is compared with.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances<'a> {
    /// The mark of our repository and cluster.
    pub place: &'a str,
    /// The segment at hand.
    pub segment: SegmentName,
    /// The present.
    pub now: &'a Moment,
}

impl Note {
    /// Makes the note of a segment that the store has confirmed.
    pub fn of_stored(at: Circumstances<'_>, bytes: (u64, u64), blake3: String) -> Self {
        let (plain_bytes, stored_bytes) = bytes;
        Self { plain_bytes, stored_bytes, blake3, ..Self::of(at, None) }
    }

    /// Makes the note of a segment that was fetched and checked.
    pub fn of_fetched(at: Circumstances<'_>, file: FileFacts) -> Self {
        Self { plain_bytes: file.bytes(), ..Self::of(at, Some(file)) }
    }

    fn of(at: Circumstances<'_>, file: Option<FileFacts>) -> Self {
        Self {
            format: NOTE_FORMAT,
            place: at.place.to_owned(),
            segment: at.segment.to_string(),
            plain_bytes: 0,
            stored_bytes: 0,
            blake3: String::new(),
            noted: at.now.clone(),
            file,
        }
    }

    /// Returns the note as it is written.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads a note and looks whether it speaks of these circumstances.
    ///
    /// # Errors
    /// [`Doubt`]: then it is worth nothing.
    pub fn read(bytes: &[u8], at: Circumstances<'_>) -> Result<Self, Doubt> {
        let note: Self = serde_json::from_slice(bytes).map_err(|_| Doubt::Garbled)?;
        if note.format != NOTE_FORMAT {
            return Err(Doubt::Garbled);
        }
        if note.segment != at.segment.to_string() {
            return Err(Doubt::OtherSegment);
        }
        if note.place != at.place {
            return Err(Doubt::OtherPlace);
        }
        if note.noted.boot != at.now.boot {
            return Err(Doubt::OtherBoot);
        }
        let age = at.now.seconds.checked_sub(note.noted.seconds);
        if age.is_none_or(|age| age > NOTE_SECONDS_MAX) {
            return Err(Doubt::TooOld);
        }
        Ok(note)
    }

    /// Says whether the bytes at hand are those that are stored.
    ///
    /// # Errors
    /// [`Doubt::OtherFile`].
    pub fn is_of_bytes(&self, plain_bytes: u64, blake3: &str) -> Result<(), Doubt> {
        let same = !blake3.is_empty() && self.plain_bytes == plain_bytes && self.blake3 == blake3;
        if same { Ok(()) } else { Err(Doubt::OtherFile) }
    }

    /// Says whether a fetched file is the very one that was checked, and as long as a segment.
    ///
    /// # Errors
    /// [`Doubt::OtherFile`].
    pub fn is_of_file(&self, file: FileFacts, size: SegmentSize) -> Result<(), Doubt> {
        let same = self.file == Some(file) && file.bytes() == size.bytes();
        if same { Ok(()) } else { Err(Doubt::OtherFile) }
    }
}

/// How long one of two repositories that could not be reached is not waited for again, in seconds. Short: whatever is
/// stored meanwhile is stored in the other alone.
const OUTAGE_SECONDS_MAX: u64 = 60;

/// What is known of one of two repositories that could not be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutageNote {
    format: u32,
    /// Both repositories and the cluster, as one mark.
    place: String,
    /// When it did not answer.
    noted: Moment,
}

impl OutageNote {
    /// Makes the note of an outage that was just met.
    pub fn new(place: &str, now: Moment) -> Self {
        Self { format: NOTE_FORMAT, place: place.to_owned(), noted: now }
    }

    /// Returns the note as it is written.
    pub fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Returns whether a note still speaks of these repositories now.
    pub fn holds(bytes: &[u8], place: &str, now: &Moment) -> bool {
        let Ok(note) = serde_json::from_slice::<Self>(bytes) else { return false };
        let age = now.seconds.checked_sub(note.noted.seconds);
        note.format == NOTE_FORMAT
            && note.place == place
            && note.noted.boot == now.boot
            && age.is_some_and(|age| age < OUTAGE_SECONDS_MAX)
    }
}

/// Returns the segments that follow on the same timeline, in order.
pub fn following(segment: SegmentName, size: SegmentSize) -> impl Iterator<Item = SegmentName> {
    let number = segment.number(size);
    // The last segment of all is the one in which LSNs end.
    let last = u64::MAX / size.bytes();
    let numbers = number.map(|number| number.saturating_add(1)..=last);
    let timeline = segment.timeline;
    numbers.into_iter().flatten().map(move |number| SegmentName::new(timeline, number, size))
}

/// Returns which segments are pushed besides `own`: those that follow and are ready, oldest first and
/// without a hole, but not those pushed ahead already.
pub fn to_push_ahead(
    own: SegmentName,
    size: SegmentSize,
    is_ready: impl Fn(SegmentName) -> bool,
    is_noted: impl Fn(SegmentName) -> bool,
) -> Vec<SegmentName> {
    let by_bytes = usize::try_from(PUSH_AHEAD_BYTES_MAX / size.bytes()).unwrap_or(usize::MAX);
    let reach = following(own, size).take(by_bytes.min(PUSH_AHEAD_MAX));
    reach.take_while(|segment| is_ready(*segment)).filter(|segment| !is_noted(*segment)).collect()
}

/// Returns which segments the spool is to hold when `last` was asked for last: those that follow, as many as
/// fit into `room_bytes`.
pub fn to_hold(last: SegmentName, size: SegmentSize, room_bytes: u64) -> Vec<SegmentName> {
    let by_bytes = usize::try_from(room_bytes / size.bytes()).unwrap_or(usize::MAX);
    following(last, size).take(by_bytes.min(FETCH_AHEAD_MAX)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pg::Timeline;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    #[test]
    fn an_outage_is_remembered_for_a_minute_of_this_boot_and_these_repositories_alone() {
        let at = |boot: &str, seconds| Moment { boot: boot.to_owned(), seconds };
        let note = OutageNote::new("here", at("b", 100)).to_bytes();
        let holds = |place: &str, now: Moment| OutageNote::holds(&note, place, &now);
        assert!(holds("here", at("b", 100)) && holds("here", at("b", 159)));
        assert!(!holds("here", at("b", 160)), "too old");
        assert!(!holds("here", at("b", 99)), "from the future");
        assert!(!holds("here", at("c", 101)), "another boot");
        assert!(!holds("there", at("b", 101)), "other repositories");
        assert!(!OutageNote::holds(b"{", "here", &at("b", 101)));
    }

    fn segment(number: u64) -> SegmentName {
        SegmentName::new(Timeline(1), number, SIZE)
    }

    fn moment(boot: &str, seconds: u64) -> Moment {
        Moment { boot: boot.to_owned(), seconds }
    }

    fn at(now: &Moment) -> Circumstances<'_> {
        Circumstances { place: "here", segment: segment(7), now }
    }

    #[test]
    fn a_note_is_believed_by_the_same_cluster_on_the_same_boot_for_ten_minutes() {
        let noted = moment("a", 1000);
        let bytes = Note::of_stored(at(&noted), (16, 4), "d1".to_owned()).to_bytes();
        let read = |now: &Moment| Note::read(&bytes, at(now)).map(|note| note.stored_bytes);
        assert_eq!(read(&noted), Ok(4));
        assert_eq!(read(&moment("a", 1600)), Ok(4));
        assert_eq!(read(&moment("a", 1601)), Err(Doubt::TooOld));
        assert_eq!(read(&moment("a", 999)), Err(Doubt::TooOld), "from the future");
        assert_eq!(read(&moment("b", 1000)), Err(Doubt::OtherBoot));
        let elsewhere = Circumstances { place: "there", ..at(&noted) };
        assert_eq!(Note::read(&bytes, elsewhere), Err(Doubt::OtherPlace));
        let other = Circumstances { segment: segment(8), ..at(&noted) };
        assert_eq!(Note::read(&bytes, other), Err(Doubt::OtherSegment));
    }

    #[test]
    fn a_note_is_about_bytes_and_not_about_a_name() {
        let noted = moment("a", 1);
        let note = Note::of_stored(at(&noted), (16, 4), "d1".to_owned());
        assert_eq!(note.is_of_bytes(16, "d1"), Ok(()));
        assert_eq!(note.is_of_bytes(16, "d2"), Err(Doubt::OtherFile));
        assert_eq!(note.is_of_bytes(15, "d1"), Err(Doubt::OtherFile));
        let without = Note::of_stored(at(&noted), (16, 4), String::new());
        assert_eq!(without.is_of_bytes(16, ""), Err(Doubt::OtherFile));
    }

    proptest! {
        /// A note cut or garbled anywhere says nothing else than it said.
        #[test]
        fn a_damaged_note_is_never_believed_for_something_else(
            cut in 0_usize..400, at_byte in 0_usize..400, byte: u8,
        ) {
            let now = moment("a", 1);
            let note = Note::of_stored(at(&now), (16, 4), "d1".to_owned());
            let mut bytes = note.to_bytes();
            prop_assert!(cut >= bytes.len() || Note::read(&bytes[..cut], at(&now)) == Err(Doubt::Garbled));
            let place = at_byte % bytes.len();
            bytes[place] = byte;
            if let Ok(read) = Note::read(&bytes, at(&now)) {
                let (length, digest) = (read.plain_bytes, read.blake3.clone());
                prop_assert!(read.is_of_bytes(length, &digest).is_ok() || digest.is_empty());
            }
        }
    }

    #[test]
    fn what_follows_goes_on_into_the_next_log_and_ends_with_the_lsns() {
        let names = |from: &str| -> Vec<String> {
            let from = SegmentName::parse(from).unwrap();
            following(from, SIZE).take(2).map(|name| name.to_string()).collect()
        };
        assert_eq!(
            names("0000000300000001000000FE"),
            ["0000000300000001000000FF", "000000030000000200000000"]
        );
        assert_eq!(names("00000001FFFFFFFF000000FE"), ["00000001FFFFFFFF000000FF"]);
        assert_eq!(names("00000001FFFFFFFF000000FF"), Vec::<String>::new());
        assert_eq!(names("000000010000000000000100"), Vec::<String>::new(), "no such segment");
    }

    #[test]
    fn pushing_ahead_takes_what_is_ready_up_to_the_first_that_is_not() {
        let none = |_: SegmentName| false;
        let ready = |names: &'static [u64]| {
            move |name: SegmentName| names.iter().any(|number| segment(*number) == name)
        };
        assert_eq!(to_push_ahead(segment(7), SIZE, none, none), []);
        let taken = to_push_ahead(segment(7), SIZE, ready(&[6, 8, 9, 11]), none);
        assert_eq!(taken, [segment(8), segment(9)]);
        let taken = to_push_ahead(segment(7), SIZE, ready(&[8, 9, 10]), ready(&[9]));
        assert_eq!(taken, [segment(8), segment(10)], "9 is stored already");
        let taken = to_push_ahead(segment(7), SIZE, |_| true, none);
        assert_eq!((taken.len(), taken.last()), (PUSH_AHEAD_MAX, Some(&segment(23))));
        let large = SegmentSize::new(1 << 30).unwrap();
        let own = SegmentName::new(Timeline(1), 1, large);
        assert_eq!(to_push_ahead(own, large, |_| true, none), [], "none of 1 GiB");
    }

    #[test]
    fn no_more_is_held_than_there_is_room_for() {
        assert_eq!(to_hold(segment(7), SIZE, (48 << 20) - 1), [segment(8), segment(9)]);
        assert_eq!(to_hold(segment(7), SIZE, 100), []);
        assert_eq!(to_hold(segment(7), SIZE, u64::MAX).len(), FETCH_AHEAD_MAX);
    }
}
