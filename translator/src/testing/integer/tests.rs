//! Each row and form, one instruction at a time.

use iced_x86::{Instruction, Mnemonic, Register};

use super::{Operands, Place, each, undefined};
use crate::state::flag;
use crate::testing::bench::Bench;
use crate::testing::native::host_has;
use crate::testing::outcome::Case;
use crate::testing::{DATA, DATA_LEN, Machine, Random, TAKEN};

/// A state that `i` can run from: pointers of every memory operand lead into the data.
fn before(r: &mut Random, i: &Instruction, form: Operands) -> Machine {
    use Mnemonic::*;
    let mut gpr: [u64; 16] = std::array::from_fn(|_| r.nasty());
    let mut data: Vec<u8> = (0..DATA_LEN).map(|_| r.u64() as u8).collect();
    let mut flags = r.u64() & flag::STATUS | 0x202;
    // Operands often reach across the page boundary in the middle.
    let middle = DATA
        + match i.mnemonic() {
            Cmpxchg16b => 0x80,
            _ => 0xf8 + r.below(16),
        };
    gpr[4] = middle;
    let bit_offset = matches!(i.mnemonic(), Bt | Bts | Btr | Btc) && i.op1_register() != Register::None;
    if bit_offset && form.place.is_some() {
        gpr[usize::from(form.reg)] = (r.below(1024) as i64 - 512) as u64;
    }
    if matches!(i.mnemonic(), Div | Idiv) {
        // Quotients that fit.
        gpr[2] = match r.below(3) {
            0 => 0,
            1 => ((gpr[0] as i64) >> 63) as u64,
            _ => r.nasty() >> r.below(64),
        };
        gpr[0] >>= r.below(64);
    }
    match form.place {
        Some(Place::Base) => gpr[3] = middle - 0x10,
        Some(Place::Stack) => gpr[4] = middle - 0x10,
        // The upper half must not count.
        Some(Place::Short) => gpr[3] = middle | r.u64() << 32,
        Some(Place::Index) => {
            gpr[6] = r.below(8);
            gpr[9] = middle + 0x20 - 4 * gpr[6];
        }
        _ => {}
    }
    match i.mnemonic() {
        Xlatb => gpr[3] = DATA | if i.memory_base() == Register::EBX { r.u64() << 32 } else { 0 },
        Leave => gpr[5] = middle,
        Enter => gpr[5] = middle + r.below(32),
        Cmpxchg | Cmpxchg8b | Cmpxchg16b if r.below(2) == 0 => {
            // Equal, so that the exchange happens.
            let at = if form.place == Some(Place::Rip) { 0x60 } else { (middle - DATA) as usize };
            let half = if i.mnemonic() == Cmpxchg8b { 4 } else { 8 };
            data[at..at + half].copy_from_slice(&gpr[0].to_le_bytes()[..half]);
            data[at + half..at + 2 * half].copy_from_slice(&gpr[2].to_le_bytes()[..half]);
            if form.place.is_none() {
                gpr[usize::from(form.rm)] = gpr[0];
            }
        }
        Loop | Loope | Loopne | Jrcxz | Jecxz if r.below(2) == 0 => gpr[1] = r.below(3) | r.below(2) << 32,
        Jmp | Call => match form.place {
            Some(Place::Rip) => data[0x60..0x68].copy_from_slice(&TAKEN.to_le_bytes()),
            Some(_) => data[(middle - DATA) as usize..][..8].copy_from_slice(&TAKEN.to_le_bytes()),
            None if form.rm != 4 => gpr[usize::from(form.rm)] = TAKEN,
            None => {}
        },
        Ret => data[(middle - DATA) as usize..][..8].copy_from_slice(&TAKEN.to_le_bytes()),
        _ => {}
    }
    if i.is_string_instruction() {
        let upper = if i.op0_kind() as u32 + i.op1_kind() as u32 != 0 && short_address(i) { r.u64() << 32 } else { 0 };
        gpr[1] = r.below(14) | upper;
        gpr[6] = middle - 8 + r.below(16) | upper;
        gpr[7] = middle - 8 + r.below(16) | upper;
        flags |= if r.below(2) == 0 { flag::DF } else { 0 };
        if r.below(2) == 0 {
            // Something to find or to pass over.
            let byte = gpr[0] as u8;
            gpr[0] = u64::from_le_bytes([byte; 8]);
            data.iter_mut().filter(|_| r.below(16) != 0).for_each(|b| *b = byte);
        }
    }
    Machine::new(gpr, flags, data)
}

/// Whether a string instruction uses ESI and EDI.
fn short_address(i: &Instruction) -> bool {
    use iced_x86::OpKind::*;
    (0..i.op_count()).any(|n| matches!(i.op_kind(n), MemorySegESI | MemoryESEDI))
}

#[test]
fn as_the_processor_does() {
    let mut bench = Bench::new();
    let mut r = Random::new(1);
    let mut failures: Vec<String> = Vec::new();
    let mut skipped = std::collections::BTreeSet::new();
    let mut compared = 0;
    each(&mut r, |r, row, form, code, i| {
        if let Some(&f) = i.cpuid_features().iter().find(|&&f| !host_has(f)) {
            skipped.insert(format!("{f:?}"));
            return;
        }
        let cases: Vec<_> = (0..24)
            .filter_map(|_| {
                let before = before(r, i, form);
                let undefined = undefined(i, before.gpr[1])?;
                Some(Case::single(before, undefined))
            })
            .collect();
        compared += cases.len();
        if let Err(e) = bench.check(64, code, &cases) {
            failures.push(format!("{row}: {i} ({code:02x?})\n{e}"));
        }
    });
    if !skipped.is_empty() {
        eprintln!("skipped: this processor has no {skipped:?}");
    }
    assert!(failures.is_empty(), "{} forms differ:\n{}", failures.len(), failures.join("\n"));
    assert!(compared > 30_000, "{compared}");
}
