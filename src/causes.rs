//! An error and what is below it, as text.
//!
//! Owns: walking an error's sources and leaving out what is said twice. Never here: what
//! a text means, or advice.

use std::error::Error;

/// Returns what an error and its causes say, outermost first, without repeats: many wrappers tell
/// their source in their own text.
pub fn told(error: &(dyn Error + 'static)) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if !lines.iter().any(|line| line.contains(&text)) {
            lines.push(text);
        }
        next = error.source();
    }
    lines
}

/// Returns an error and its causes in one line.
pub fn in_one_line(error: &(dyn Error + 'static)) -> String {
    told(error).join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{what}")]
    struct Layer {
        what: &'static str,
        #[source]
        cause: Option<Box<Layer>>,
    }

    fn layers(texts: &[&'static str]) -> Option<Box<Layer>> {
        let (what, below) = texts.split_first()?;
        Some(Box::new(Layer { what, cause: layers(below) }))
    }

    #[test]
    fn every_cause_is_told_once_from_the_outside_in() {
        let cases = [
            (vec!["could not write"], "could not write"),
            (vec!["could not write", "disk full"], "could not write: disk full"),
            (vec!["could not write: disk full", "disk full"], "could not write: disk full"),
            (vec!["a", "b", "a", "c"], "a: b: c"),
        ];
        for (texts, line) in cases {
            let error: Box<dyn Error> = layers(&texts).map_or("".into(), |layer| layer as _);
            assert_eq!(in_one_line(&*error), line);
        }
    }
}
