//! Which of the known words somebody probably meant.
//!
//! Owns: the distance between two short words. Never here: what the words mean.

/// The longest word that is compared, in bytes. Longer ones get no suggestion.
const WORD_BYTES_MAX: usize = 64;

/// Returns the known word nearest to `word`, if one is near enough to be a
/// likely slip: at most half of its letters differ, and never more than three.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    if word.len() > WORD_BYTES_MAX {
        return None;
    }
    let word = word.to_ascii_lowercase();
    known
        .into_iter()
        .map(|candidate| (edits(&word, &candidate.to_ascii_lowercase()), candidate))
        .filter(|(edits, candidate)| *edits <= (candidate.len() / 2).clamp(1, 3))
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

/// Returns how far a word is from a known one; the first or last part of a dotted name is a near slip.
fn edits(word: &str, known: &str) -> usize {
    let is_part = known.split_once('.').is_some_and(|(first, last)| word == first || word == last);
    if is_part { 1 } else { distance(word.as_bytes(), known.as_bytes()) }
}

/// Returns Levenshtein's distance: how many bytes to insert, delete or replace.
pub fn distance(left: &[u8], right: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in right.iter().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_finds_its_word_and_a_stranger_finds_none() {
        let known = ["endpoint", "region", "s3", "gs"];
        assert_eq!(nearest("endpiont", known), Some("endpoint"));
        assert_eq!(nearest("REGION", known), Some("region"));
        assert_eq!(nearest("s4", known), Some("s3"));
        assert_eq!(nearest("fiel", ["file", "s3"]), Some("file"));
        assert_eq!(nearest("HIGHWATER_CLUSTR", ["HIGHWATER_CLUSTER"]), Some("HIGHWATER_CLUSTER"));
        assert_eq!(nearest("url", ["repo.url", "jobs"]), Some("repo.url"));
        assert_eq!(nearest("repo", ["repo.url", "jobs"]), Some("repo.url"));
        assert_eq!(nearest("password", known), None);
        assert_eq!(distance(b"kitten", b"sitting"), 3);
        assert_eq!(nearest(&"x".repeat(1000), known), None);
    }

    #[test]
    fn distance_counts_single_edits() {
        assert_eq!(distance(b"kitten", b"sitting"), 3);
        assert_eq!(distance(b"", b"abc"), 3);
        assert_eq!(distance(b"abc", b"abc"), 0);
    }
}
