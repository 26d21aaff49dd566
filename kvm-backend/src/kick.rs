//! How other threads get a vCPU out of guest code: its run page's `immediate_exit` and a signal. And how what must not
//! be interrupted is not.
//!
//! The signal interrupts KVM_RUN where that runs guest code or sleeps in the kernel; `immediate_exit` has it return at
//! once where it is only about to.

use std::sync::atomic::{AtomicU8, Ordering, fence};
use std::sync::{Arc, Once};

use diglot_translator::engine::Kick;
use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use parking_lot::Mutex;
use vmm_sys_util::ioctl::{ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::ioctl_iow_nr;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// A vCPU that runs now.
#[derive(Clone, Copy)]
struct Running {
    /// Of the run page.
    immediate_exit: *mut u8,
    thread: libc::pthread_t,
}

// SAFETY: the pointer is used under the lock of `Door` only, behind which it is valid; a thread's name may be known to
// any thread.
unsafe impl Send for Running {}

/// Where a vCPU's thread is while it runs guest code.
#[derive(Clone, Default)]
pub struct Door(Arc<Mutex<Option<Running>>>);

impl Door {
    /// Has requests of `kick` come through.
    pub fn open_to(&self, kick: &Kick) {
        static HANDLER: Once = Once::new();
        // It only has to be there: without a handler the signal would kill the process.
        extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        HANDLER.call_once(|| {
            if let Err(e) = register_signal_handler(SIGRTMIN(), nothing) {
                tracing::error!("cannot watch for the signal that interrupts vCPUs: {e}");
            }
        });
        let door = self.clone();
        kick.set_waker(Some(Arc::new(move || door.knock())));
    }

    fn knock(&self) {
        if let Some(running) = *self.0.lock() {
            // SAFETY: while the lock is held the vCPU does not leave `Inside`, so its run page is mapped and its thread
            // alive. The kernel reads the byte only; everybody else accesses it atomically.
            unsafe {
                AtomicU8::from_ptr(running.immediate_exit).store(1, Ordering::SeqCst);
                libc::pthread_kill(running.thread, SIGRTMIN());
            }
        }
    }

    /// Says that this thread is about to run `vcpu`, until what is returned is dropped.
    pub fn enter(&self, vcpu: &mut VcpuFd) -> Inside {
        let immediate_exit = &raw mut vcpu.get_kvm_run().immediate_exit;
        // SAFETY: asking for one's own name has no conditions.
        let thread = unsafe { libc::pthread_self() };
        *self.0.lock() = Some(Running { immediate_exit, thread });
        Inside { door: self.clone(), immediate_exit }
    }
}

/// A thread that runs a vCPU.
pub struct Inside {
    door: Door,
    immediate_exit: *mut u8,
}

impl Inside {
    /// Lets KVM_RUN run guest code again. Whoever knocked before had set a bit of the kick word first, so that it is there
    /// to see afterwards.
    pub fn clear(&self) {
        self.set(0);
        fence(Ordering::SeqCst);
    }

    /// Has the next KVM_RUN complete what the last left unfinished, and no more.
    pub fn finish_only(&self) {
        self.set(1);
    }

    fn set(&self, value: u8) {
        // SAFETY: the run page is mapped as long as the vCPU is, which is borrowed from nobody while it runs.
        unsafe { AtomicU8::from_ptr(self.immediate_exit).store(value, Ordering::SeqCst) };
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        *self.door.0.lock() = None;
    }
}

/// Does something while the signal waits for this thread and interrupts KVM_RUN alone, at once and each time.
pub fn interrupted<T>(vcpu: &mut VcpuFd, work: impl FnOnce(&mut VcpuFd) -> T) -> T {
    // SAFETY: the sets are valid for all zeroes, and the calls only write to those that they are given to write to. The
    // kernel's own set is eight bytes, behind a length. Nobody else waits for the signal, so that it can be taken back.
    unsafe {
        let mut only: libc::sigset_t = std::mem::zeroed();
        let mut before = std::mem::zeroed();
        libc::sigaddset(&mut only, SIGRTMIN());
        libc::pthread_sigmask(libc::SIG_BLOCK, &only, &mut before);
        libc::pthread_kill(libc::pthread_self(), SIGRTMIN());
        let mask = SignalMask { len: 8, set: [0; 8] };
        ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &mask);
        let result = work(vcpu);
        ioctl_with_ptr(vcpu, KVM_SET_SIGNAL_MASK(), std::ptr::null::<SignalMask>());
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        libc::sigtimedwait(&only, std::ptr::null_mut(), &none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        result
    }
}

/// `kvm_signal_mask`: which signals are blocked in KVM_RUN; here none.
#[repr(C)]
struct SignalMask {
    len: u32,
    set: [u8; 8],
}

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, u32);

/// Does something with all signals held back, which makes KVM_CREATE_VM give up halfway.
pub fn undisturbed<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are valid for all zeroes, and the calls only write to them; the thread's own mask comes back.
    unsafe {
        let mut all = std::mem::zeroed();
        let mut before = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let result = work();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        result
    }
}
