//! The kernel's local APIC as [`LapicState`].

use diglot_translator::engine::LapicState;
use kvm_bindings::kvm_lapic_state;

/// The registers of the kernel's page.
pub fn registers(page: &kvm_lapic_state) -> [u32; 64] {
    std::array::from_fn(|n| u32::from_le_bytes(std::array::from_fn(|k| page.regs[16 * n + k] as u8)))
}

/// The page that the kernel takes.
pub fn page(state: &LapicState) -> kvm_lapic_state {
    let mut page = kvm_lapic_state::default();
    for (n, register) in state.registers.iter().enumerate() {
        for (k, byte) in register.to_le_bytes().into_iter().enumerate() {
            page.regs[16 * n + k] = byte as _;
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use diglot_translator::engine::Startup;

    use super::*;

    #[test]
    fn a_page_comes_out_as_it_went_in() {
        let registers_in = std::array::from_fn(|n| 0x0102_0304u32.wrapping_mul(n as u32 + 1));
        let state =
            LapicState { base: 0, registers: registers_in, tsc_deadline: 0, nmi: false, startup: Startup::Runs };
        assert_eq!(registers(&page(&state)), registers_in);
    }
}
