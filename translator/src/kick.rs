//! The word by which other threads get a vCPU's attention.

use std::sync::Arc;

use crate::sync::{AtomicU32, Mutex, Ordering};

/// Asks a vCPU, from any thread, to leave guest code soon and look at what changed.
#[derive(Clone)]
pub struct Kick(Arc<Inner>);

struct Inner {
    word: AtomicU32,
    waker: Mutex<Option<Waker>>,
}

/// How a vCPU that does not poll the word is made to look at it. Called on the asking thread.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

impl Default for Kick {
    /// One that asks for nothing.
    fn default() -> Kick {
        Kick(Arc::new(Inner { word: AtomicU32::new(0), waker: Mutex::new(None) }))
    }
}

impl Kick {
    /// Kick bit: an interrupt may wait, or a timer is due.
    pub const ATTENTION: u32 = 1;
    /// Kick bit: [`crate::vcpu::Vcpu::run`] shall return.
    pub const STOP: u32 = 2;
    /// Kick bit: other vCPUs want something ([`crate::peers`]).
    pub const PEERS: u32 = 4;

    /// Sets bits of the request.
    pub fn request(&self, bits: u32) {
        // Together with the waker's own store: whoever clears that and then finds no bit here will be woken again.
        self.0.word.fetch_or(bits, Ordering::SeqCst);
        let waker = self.0.waker.lock().clone();
        if let Some(waker) = waker {
            waker();
        }
    }

    /// Sets or removes what [`Self::request`] calls besides.
    pub fn set_waker(&self, waker: Option<Waker>) {
        *self.0.waker.lock() = waker;
    }

    /// The requested bits, left set.
    #[inline(always)]
    pub fn pending(&self) -> u32 {
        self.0.word.load(Ordering::Relaxed)
    }

    /// Takes the bits of `mask`.
    pub fn take(&self, mask: u32) -> u32 {
        self.0.word.fetch_and(!mask, Ordering::SeqCst) & mask
    }

    /// The word that compiled code polls.
    pub fn as_ptr(&self) -> *const AtomicU32 {
        &raw const self.0.word
    }
}
