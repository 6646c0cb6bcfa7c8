//! How long work tells how far it is, without knowing who listens.
//!
//! Owns the trait that use cases report to. Never here: a terminal, a clock, or
//! how a line looks; `cli` owns those.

/// A listener for the progress of one piece of work.
///
/// Calls are cheap and may come from several tasks at once; none of them can fail, since work
/// must not end because nobody looks at it.
pub trait Progress: Send + Sync {
    /// Says how many bytes there will be, or `None` while that is unknown. May be
    /// called again when a better figure is known.
    fn total(&self, bytes: Option<u64>);

    /// Says that `bytes` more are done (a difference, not a position).
    fn advance(&self, bytes: u64);

    /// Says what is being done now, in a few words without a full stop
    /// (`waiting for WAL up to 0/5000100`).
    fn note(&self, message: &str);

    /// Says that the work is over, well or not. Nothing may follow it.
    fn finish(&self);
}

/// A listener that ignores everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn total(&self, _bytes: Option<u64>) {}
    fn advance(&self, _bytes: u64) {}
    fn note(&self, _message: &str) {}
    fn finish(&self) {}
}
