//! placeholder until merge
use super::{Lsn, Timeline};
/// x
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    /// x
    pub timeline: Timeline,
    /// x
    pub ancestors: Vec<(Timeline, Lsn)>,
}
