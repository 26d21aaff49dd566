//! The host's own x87 unit while compiled code runs guest instructions on it.
//!
//! Between [`load`] and [`unload`] its control and status words are the guest's, but for TOP: its stack is empty
//! wherever Rust code runs. Nothing on an x86-64 computes in the unit but what asks for it, so that Rust code may run in
//! between; what it is given back with is the control word that the calling convention promises.

/// Gives the host's unit a control word that masks every exception and a status word, and an empty stack.
pub fn load(fcw: u16, fsw: u16) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        // The 28 bytes of an environment (SDM vol. 1 figure 8-9): control, status and tag word, no pointers.
        let status = fsw & !super::status::TOP;
        let environment = [u32::from(fcw), u32::from(status), 0xffff, 0, 0, 0, 0];
        // SAFETY: the pointer is to 28 bytes that live. With everything masked no exception can be pending, and the
        // stack stays empty.
        unsafe { std::arch::asm!("fldenv [{}]", in(reg) &environment, options(nostack, readonly)) };
    }
    #[cfg(any(not(target_arch = "x86_64"), miri))]
    let _ = (fcw, fsw);
}

/// Gives the unit its usual control word back. Exception flags stay, as they mean nothing to anybody.
pub fn unload() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: the pointer is to two bytes that live; the control word is the one of the calling convention.
    unsafe {
        std::arch::asm!("fldcw word ptr [{}]", in(reg) &super::control::INITIAL, options(nostack, readonly))
    };
}
