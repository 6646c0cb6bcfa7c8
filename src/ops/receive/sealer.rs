//! One thread that makes objects of what was received, one after another.
//!
//! A thread of its own, not any of the runtime's: an allocator keeps an arena for each thread, and
//! each that had sealed once would keep some MiB for the next time.

use std::io;
use std::sync::mpsc;
use std::thread;

use tokio::sync::oneshot;

use crate::repo::{SealedPiece, Unsealed};

/// The stack: the codec's tables are elsewhere.
const STACK_BYTES: usize = 512 << 10;

/// What is to be sealed, and who waits for it.
type Order = (Unsealed, oneshot::Sender<io::Result<SealedPiece>>);

/// The way to the thread, which ends when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Sealer {
    orders: Option<mpsc::Sender<Order>>,
}

impl Sealer {
    /// Has `unsealed` sealed when all before it are; returns at once. The future fails as
    /// [`Unsealed::seal`] does, or if no thread can be had.
    pub(super) fn seal(
        &mut self,
        unsealed: Unsealed,
    ) -> impl Future<Output = io::Result<SealedPiece>> + Send + use<> {
        let (promise, sealed) = oneshot::channel();
        let sent = self.orders().and_then(|orders| {
            orders.send((unsealed, promise)).map_err(|_| io::Error::other("the thread has ended"))
        });
        async move {
            sent?;
            sealed.await.map_err(io::Error::other)?
        }
    }

    /// Starts the thread with the first order.
    fn orders(&mut self) -> io::Result<&mpsc::Sender<Order>> {
        if self.orders.is_none() {
            let (orders, waiting) = mpsc::channel::<Order>();
            thread::Builder::new().name("sealer".to_owned()).stack_size(STACK_BYTES).spawn(
                move || {
                    for (unsealed, promise) in waiting {
                        // Whoever does not wait any more has no use for it.
                        let _ = promise.send(unsealed.seal());
                    }
                },
            )?;
            self.orders = Some(orders);
        }
        self.orders.as_ref().ok_or_else(|| io::Error::other("no thread"))
    }
}
