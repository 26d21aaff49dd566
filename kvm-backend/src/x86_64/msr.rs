//! Model-specific registers: which of them are state, and what KVM leaves to us.

use diglot_translator::engine::Msrs;
use kvm_bindings::{KVM_MSR_EXIT_REASON_INVAL, KVM_MSR_EXIT_REASON_UNKNOWN};

/// Accesses that come to us instead of raising #GP.
pub const TO_US: u32 = KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL;

/// IA32_TIME_STAMP_COUNTER.
pub const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// IA32_MCG_CAP's number of banks.
pub const MC_BANKS: u64 = 4;

/// Where the value of an MSR is.
type Place = fn(&mut Msrs) -> &mut u64;

/// Those with a field of their own.
const NAMED: [(u32, Place); 16] = [
    (0xc000_0081, |m| &mut m.star),
    (0xc000_0082, |m| &mut m.lstar),
    (0xc000_0083, |m| &mut m.cstar),
    (0xc000_0084, |m| &mut m.fmask),
    (0xc000_0102, |m| &mut m.kernel_gs_base),
    (0xc000_0103, |m| &mut m.tsc_aux),
    (0x3b, |m| &mut m.tsc_adjust),
    (0x174, |m| &mut m.sysenter_cs),
    (0x175, |m| &mut m.sysenter_esp),
    (0x176, |m| &mut m.sysenter_eip),
    (0x277, |m| &mut m.pat),
    (0x1a0, |m| &mut m.misc_enable),
    (0x48, |m| &mut m.spec_ctrl),
    (0x1d9, |m| &mut m.debugctl),
    (0x2ff, |m| &mut m.mtrr_def_type),
    (0x17a, |m| &mut m.mcg_status),
];
/// Fixed-range MTRRs in the order of [`Msrs::mtrr_fixed`].
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// The first variable-range MTRR; base and mask take turns.
const MTRR_VARIABLE: u32 = 0x200;
/// The first machine-check register; each bank has four.
const MC_FIRST: u32 = 0x400;

/// Calls `visit` with the number of each MSR that is state, and with where its value is (SDM vol. 4 table 2-2).
pub fn each(m: &mut Msrs, mut visit: impl FnMut(u32, &mut u64)) {
    for (index, place) in NAMED {
        visit(index, place(m));
    }
    for (index, value) in MTRR_FIXED.into_iter().zip(&mut m.mtrr_fixed) {
        visit(index, value);
    }
    for (index, value) in (MTRR_VARIABLE..).zip(m.mtrr_variable.as_flattened_mut()) {
        visit(index, value);
    }
    for (index, value) in (MC_FIRST..).zip(m.mc_banks.as_flattened_mut()) {
        visit(index, value);
    }
}

/// What an MSR reads as that KVM does not have and the machine does.
pub fn read(index: u32) -> Option<u64> {
    match index {
        // IA32_PLATFORM_ID, MSR_MISC_FEATURES_ENABLES.
        0x17 | 0x140 => Some(0),
        // IA32_FEATURE_CONTROL: locked, nothing enabled.
        0x3a => Some(1),
        _ => None,
    }
}

/// Whether writing such an MSR does nothing instead of raising #GP.
pub fn write(index: u32) -> bool {
    // IA32_BIOS_UPDT_TRIG, IA32_BIOS_SIGN_ID, MSR_MISC_FEATURES_ENABLES.
    matches!(index, 0x79 | 0x8b | 0x140)
}

/// What KVM is told once, as the machine has it: MSR_PLATFORM_INFO, with a base ratio of 100 MHz, and
/// IA32_BIOS_SIGN_ID.
pub fn constants(tsc_hz: u64) -> [(u32, u64); 2] {
    [(0xce, (tsc_hz / 100_000_000) << 8), (0x8b, 1 << 32)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_msr_is_visited_once_and_where_it_is() {
        let mut m = Msrs::default();
        let mut seen = Vec::new();
        each(&mut m, |index, value| {
            *value = u64::from(index);
            seen.push(index);
        });
        let all = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!((seen.len(), all), (16 + 11 + 16 + 16, all));
        assert_eq!(
            (m.lstar, m.mtrr_fixed[3], m.mtrr_variable[2][1], m.mc_banks[1][0]),
            (0xc000_0082, 0x268, 0x205, 0x404)
        );
    }
}
