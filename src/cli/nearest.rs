//! The known word nearest to one that is not known.
//!
//! Owns the spelling hint of settings. Never here: what the words mean.

/// Returns the candidate with the fewest edits from `word`, when the two have at
/// least half of their letters in common; `None` when nothing is near.
///
/// Of equally near candidates the first wins. Case is ignored.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (edits(&word, &candidate.to_lowercase()), candidate))
        .filter(|(edits, candidate)| edits * 2 <= word.chars().count().max(candidate.len()))
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

/// Counts the insertions, deletions and replacements between two words
/// (Levenshtein), row by row.
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_finds_its_word() {
        let known = ["repo", "cluster", "compression", "memory_max"];
        assert_eq!(nearest("compresion", known), Some("compression"));
        assert_eq!(nearest("memorymax", known), Some("memory_max"));
        assert_eq!(nearest("Cluster", known), Some("cluster"));
        assert_eq!(nearest("retention_full", known), None);
        assert_eq!(nearest("", known), None);
    }

    #[test]
    fn edits_are_counted_as_levenshtein_did() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("", "abc"), 3);
        assert_eq!(edits("abc", ""), 3);
        assert_eq!(edits("flaw", "lawn"), 2);
    }
}
