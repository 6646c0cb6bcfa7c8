//! The wish that a use case end early, as far as it can do so cleanly.

use tokio::sync::watch;

use crate::failure::{Failure, Kind, StopSignal};

/// Tells whether somebody wants the work to stop. Cheap to clone.
#[derive(Debug, Clone)]
pub struct StopRequest(watch::Receiver<Option<StopSignal>>);

impl StopRequest {
    /// Makes a request that is not made yet, and what makes it. It is never made if the
    /// sender is dropped.
    pub fn new() -> (watch::Sender<Option<StopSignal>>, Self) {
        let (sender, receiver) = watch::channel(None);
        (sender, Self(receiver))
    }

    /// Returns whether somebody wants the work to stop.
    pub fn is_wanted(&self) -> bool {
        self.0.borrow().is_some()
    }

    /// Ends work of which `done` is done, once somebody wants it to stop.
    ///
    /// # Errors
    /// [`Kind::Stopped`], with `unharmed` and `next`.
    pub(super) async fn check(
        &mut self,
        done: impl FnOnce() -> String,
        unharmed: &str,
        next: &str,
    ) -> Result<(), Failure> {
        if !self.is_wanted() {
            return Ok(());
        }
        let signal = self.wanted().await;
        let what = format!("stopped by {signal} after {}", done());
        Err(Failure::new(Kind::Stopped(signal), what, unharmed, next))
    }

    /// Waits until somebody wants the work to stop, perhaps for ever. Cancel-safe; may be asked again.
    pub async fn wanted(&mut self) -> StopSignal {
        let signal = self.0.wait_for(Option::is_some).await.ok().and_then(|signal| *signal);
        match signal {
            Some(signal) => signal,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn a_request_is_seen_as_often_as_it_is_looked_for_and_never_made_up() {
        let (sender, mut request) = StopRequest::new();
        assert_eq!(request.wanted().now_or_never(), None);
        sender.send_replace(Some(StopSignal::Terminate));
        assert_eq!(request.wanted().now_or_never(), Some(StopSignal::Terminate));
        assert_eq!(request.clone().wanted().now_or_never(), Some(StopSignal::Terminate));
        let (sender, mut request) = StopRequest::new();
        drop(sender);
        assert_eq!(request.wanted().now_or_never(), None);
    }
}
