//! Rules that the host's processor has settled, as single instructions on both engines: what holds on hosts without a
//! judge, too.

use super::engine::{Engine, Kind};
use super::{ABSENT, DATA, DATA_LEN, EDGE_LEN, Fault, INSN, Machine, READ_ONLY, TAKEN};
use crate::exception::vector;
use crate::state::flag;

/// The lowest address that is not canonical.
const HOLE: u64 = 1 << 47;

fn fault(vector: u8, error: u32, address: u64) -> Option<Fault> {
    Some(Fault { vector, error, address })
}

fn run(kind: Kind, bits: u32, code: &[u8], before: &Machine) -> Machine {
    let mut engine = Engine::new(kind, bits);
    engine.load(code, std::slice::from_ref(before)).unwrap();
    engine.run(before).unwrap()
}

/// Runs `code` on every engine from a state that `set` makes of one of zeros, and looks at how it faults.
fn check(bits: u32, code: &[u8], set: impl Fn(&mut Machine), expected: Option<Fault>) {
    let mut before = Machine::new([0; 16], 0x202, vec![0; DATA_LEN]);
    before.gpr[4] = DATA + 0x100;
    set(&mut before);
    for kind in Kind::ALL {
        let after = run(kind, bits, code, &before);
        assert_eq!(after.fault, expected, "{code:02x?}, {kind:?}");
        if expected.is_some() {
            assert_eq!((after.rip, &after.gpr, &after.ymm), (INSN, &before.gpr, &before.ymm), "{code:02x?}");
        }
    }
}

/// An operand any byte of which has no canonical address is not looked at further: not for its pages, nor for its
/// alignment (SDM vol. 1 §3.3.7.1).
#[test]
fn operands_that_leave_the_canonical_addresses() {
    let (gp, ss) = (fault(vector::GP, 0, 0), fault(vector::SS, 0, 0));
    for flags in [0x202, 0x202 | flag::AC] {
        // mov rax, [rsi]; mov [rsi], rax; add [rsi], rax; movups xmm0, [rsi]
        for code in [&[0x48, 0x8b, 0x06][..], &[0x48, 0x89, 0x06], &[0x48, 0x01, 0x06], &[0x0f, 0x10, 0x06]] {
            check(64, code, |m| (m.gpr[6], m.flags) = (HOLE - 3, flags), gp);
        }
        // mov rax, [rbp]
        check(64, &[0x48, 0x8b, 0x45, 0], |m| (m.gpr[5], m.flags) = (HOLE - 3, flags), ss);
        // vmovups ymm0, [rsi], and vaddps ymm0, ymm0, [rsi]
        for at in [HOLE - 31, HOLE - 16, HOLE - 1] {
            check(64, &[0xc5, 0xfc, 0x10, 0x06], |m| (m.gpr[6], m.flags) = (at, flags), gp);
            check(64, &[0xc5, 0xfc, 0x58, 0x06], |m| (m.gpr[6], m.flags) = (at, flags), gp);
        }
        // vmovups [rsi], ymm0
        check(64, &[0xc5, 0xfc, 0x11, 0x06], |m| (m.gpr[6], m.flags) = (HOLE - 17, flags), gp);
    }
    // fxrstor [rbp], misaligned as well
    check(64, &[0x0f, 0xae, 0x4d, 0], |m| m.gpr[5] = HOLE + 3, fault(vector::SS, 0, 0));
    // rep movsq
    let set = |m: &mut Machine| (m.gpr[1], m.gpr[6], m.gpr[7]) = (2, HOLE - 6, DATA);
    check(64, &[0xf3, 0x48, 0xa5], set, fault(vector::GP, 0, 0));
    check(64, &[0x48, 0x8b, 0x06], |m| m.gpr[6] = HOLE - 8, fault(vector::PF, 4, HOLE - 8));
}

/// 64-bit mode ignores overrides by ES, CS, SS and DS: they do not make a fault one of the stack, nor stop it from being.
#[test]
fn ignored_overrides() {
    for prefix in [0x26, 0x2e, 0x36, 0x3e] {
        check(64, &[prefix, 0x48, 0x8b, 0x06], |m| m.gpr[6] = HOLE, fault(vector::GP, 0, 0));
        check(64, &[prefix, 0x48, 0x8b, 0x45, 0], |m| m.gpr[5] = HOLE, fault(vector::SS, 0, 0));
    }
}

/// An operand at a 32-bit address goes on beyond 4 GiB: VMASKMOVPS of element 1 alone.
#[test]
fn an_operand_across_four_gigabytes() {
    let set = |m: &mut Machine| {
        m.gpr[6] = 0xffff_fffc;
        m.ymm[2] = [1 << 63, 0, 0, 0];
    };
    check(64, &[0x67, 0xc4, 0xe2, 0x6d, 0x2c, 0x0e], set, fault(vector::PF, 4, 1 << 32));
}

/// Fields of one object, of which some lie in another page than the first: before it, behind it, and across its edges.
#[test]
fn fields_beside_a_page() {
    let code = [
        &[0x48, 0x8b, 0x06][..],         // mov rax, [rsi]
        &[0x48, 0x89, 0x4e, 0x08],       // mov [rsi + 8], rcx
        &[0x48, 0x8b, 0x56, 0xfc],       // mov rdx, [rsi - 4]
        &[0x48, 0x89, 0x4e, 0xfb],       // mov [rsi - 5], rcx
        &[0x4c, 0x8b, 0x46, 0xf0],       // mov r8, [rsi - 10h]
        &[0xc5, 0xfe, 0x6f, 0x4e, 0xe1], // vmovdqu ymm1, [rsi - 1fh]
        &[0x48, 0x01, 0x4e, 0xf9],       // add [rsi - 7], rcx
        &[0x51, 0x58],                   // push rcx; pop rax
    ]
    .concat();
    // cmp rcx, rdx; lea rsi, [rdi + rbp]
    let pointed =
        [&[0x48, 0x39, 0xd1, 0x48, 0x8d, 0x34, 0x2f][..], &code[..code.len() - 6], &[0x0f, 0x92, 0xc3]].concat();
    let edge = (DATA | 0xfff) + 1;
    for at in [edge - 16, edge - 8, edge - 3, edge, edge + 1, edge + 4, edge + 16, edge + 32] {
        for code in [&code, &pointed] {
            let mut before = Machine::new([0; 16], 0x202, (0..=255).cycle().take(DATA_LEN + EDGE_LEN).collect());
            (before.gpr[1], before.gpr[4], before.gpr[6], before.gpr[7]) = (0x1122_3344_5566_7788, DATA + 0x40, at, at);
            before.gpr[2] = u64::MAX;
            assert_eq!(on_every_engine(code, &before), None);
        }
    }
}

/// Runs code on every engine; how all of them fault.
fn on_every_engine(code: &[u8], before: &Machine) -> Option<Fault> {
    let [interpreted, quick, compiled] = Kind::ALL.map(|kind| run(kind, 64, code, before));
    for other in [quick, compiled] {
        assert_eq!((interpreted.fault, interpreted.rip), (other.fault, other.rip), "{before:x?}");
        assert_eq!((interpreted.gpr, interpreted.flags), (other.gpr, other.flags), "{before:x?}");
        assert_eq!((interpreted.ymm, &interpreted.data), (other.ymm, &other.data), "{before:x?}");
    }
    interpreted.fault
}

/// What a function keeps on a stack of which a page's end lies in the middle, or part cannot be accessed; flags of before
/// are read behind it.
#[test]
fn a_stack_beside_a_page() {
    let code = [
        &[0x48, 0x39, 0xd1][..],         // cmp rcx, rdx
        &[0x50, 0x51, 0x53],             // push rax; push rcx; push rbx
        &[0x48, 0x8d, 0x6c, 0x24, 0xf0], // lea rbp, [rsp - 10h]
        &[0x48, 0x89, 0x55, 0x00],       // mov [rbp], rdx
        &[0x8b, 0x7d, 0x1c],             // mov edi, [rbp + 1ch]
        &[0x0f, 0x92, 0x45, 0x08],       // setc [rbp + 8]
        &[0x48, 0x8d, 0x65, 0x10],       // lea rsp, [rbp + 10h]
        &[0x41, 0x58, 0x41, 0x59, 0x58], // pop r8; pop r9; pop rax
    ]
    .concat();
    let edge = (DATA | 0xfff) + 1;
    let near = |at: u64| (0..48).step_by(4).map(move |n| at + n);
    let faults = |top: u64| {
        let mut before = Machine::new([0; 16], 0x202, (0..=255).cycle().take(DATA_LEN + EDGE_LEN).collect());
        before.gpr[..4].copy_from_slice(&[3, 0x1122_3344_5566_7788, 0x9988_7766_5544_3322, 7]);
        before.gpr[4] = top;
        on_every_engine(&code, &before).is_some()
    };
    assert!(!near(edge).any(faults));
    for page in [ABSENT, READ_ONLY] {
        assert!(near(page).chain(near(page + 0xff0)).filter(|&top| faults(top)).count() > 12);
    }
}

/// Elements at a page's end: backwards they are not inside it, and the source comes first.
#[test]
fn string_elements_across_pages() {
    let set = |m: &mut Machine| {
        (m.gpr[1], m.gpr[6], m.gpr[7]) = (2, ABSENT - 2, ABSENT - 2);
        m.flags |= flag::DF;
    };
    check(64, &[0xf3, 0x48, 0xab], set, fault(vector::PF, 6, ABSENT)); // rep stosq
    check(64, &[0xf3, 0x48, 0xa5], set, fault(vector::PF, 4, ABSENT)); // rep movsq
    let set = |m: &mut Machine| (m.gpr[1], m.gpr[6], m.gpr[7]) = (2, ABSENT - 2, ABSENT + 5);
    check(64, &[0xf3, 0x48, 0xa5], set, fault(vector::PF, 4, ABSENT));
}

/// A far call's frame is checked for alignment like any other operand.
#[test]
fn a_far_call_onto_a_misaligned_stack() {
    let code = [&[0x9a][..], &(TAKEN as u32).to_le_bytes(), &[0x23, 0]].concat();
    check(32, &code, |m| m.gpr[4] += 1, None);
    let set = |m: &mut Machine| {
        m.gpr[4] += 1;
        m.flags |= flag::AC;
    };
    check(32, &code, set, fault(vector::AC, 0, 0));
}

/// The right to use a port is looked at even where nothing is transferred.
#[test]
fn string_input_of_nothing() {
    for code in [[0xf3, 0x6c], [0xf3, 0x6e]] {
        check(64, &code, |m| (m.gpr[6], m.gpr[7]) = (DATA, DATA), fault(vector::GP, 0, 0));
    }
}
