//! What can be told without silicon: images, tags, MMX aliasing and a few known results.

use super::*;

fn sample() -> X87 {
    let mut x = X87::initialized();
    for (i, r) in (0u8..).zip(x.st.iter_mut()) {
        *r = F80::from_i64(i64::from(i) - 3);
    }
    x.st[5] = F80::INDEFINITE;
    x.ftw = 0b1011_1010;
    x.set_control(0x0f7b);
    x.set_status(5 << 11 | status::C3 | status::ZE | status::PE);
    x.set_last(0x1f2, 0x1_2345, 0x33);
    x.set_last_operand(0x5_4321, 0x2b);
    x
}

#[test]
fn reset_is_as_the_manual_says() {
    let x = X87::reset();
    assert_eq!((x.fcw, x.fsw, x.full_tags()), (0x40, 0, 0x5555));
    assert_eq!((X87::initialized().full_tags(), X87::initialized().is_initial()), (0xffff, true));
}

#[test]
fn images_round_trip() {
    for (wide, protected) in [(false, false), (false, true), (true, false), (true, true)] {
        let layout = Layout { wide, protected };
        let x = sample();
        let mut y = X87::reset();
        y.restore(&x.save(layout), layout);
        let mut expected = x;
        let mask = if wide || !protected { u64::MAX } else { 0xffff };
        if !protected {
            (expected.fip, expected.fcs) = (x.fip + 0x330, 0);
            (expected.fdp, expected.fds) = (x.fdp + 0x2b0, 0);
        }
        (expected.fip, expected.fdp) = (expected.fip & mask, expected.fdp & mask);
        if protected && !wide {
            expected.fop = 0;
        }
        assert_eq!(y, expected, "{layout:?}");
    }
}

#[test]
fn narrow_real_environment() {
    let image = sample().environment(Layout { wide: false, protected: false });
    let words: Vec<u16> = image.chunks_exact(2).take(7).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
    // 0f7b leaves ZE unmasked, so that ES and B are set. Pointers are linear: CS × 16 + IP.
    assert_eq!(words, [0x0f7b, 0xe8a4, 0x3873, 0x2675, 0x11f2, 0x45d1, 0x5000]);
}

#[test]
fn fxsave_round_trips() {
    for rex_w in [false, true] {
        let mut x = sample();
        if rex_w {
            (x.fip, x.fcs, x.fdp, x.fds) = (0xffff_8000_1234_5678, 0, 0x7fff_0000_0010, 0);
        }
        let mut image = [0; 512];
        x.fxsave(&mut image, rex_w);
        assert_eq!(image[..8], [0x7b, 0x0f, 0xa4, 0xe8, 0xba, 0, 0xf2, 0x01]);
        // ST(0) is R5.
        assert_eq!(image[32..42], F80::INDEFINITE.to_bits().to_le_bytes()[..10]);
        let mut y = X87::reset();
        y.fxrstor(&image, rex_w);
        assert_eq!(x, y);
    }
}

#[test]
fn mmx_aliases_the_physical_registers() {
    let mut x = sample();
    x.set_mmx(2, 0x0123_4567_89ab_cdef);
    assert_eq!((x.top(), x.ftw, x.mmx(2)), (0, 0xff, 0x0123_4567_89ab_cdef));
    assert_eq!(x.st(2), F80 { mantissa: 0x0123_4567_89ab_cdef, sign_exp: 0xffff });
    x.emms();
    assert_eq!((x.ftw, x.top()), (0, 0));
}

#[test]
fn unmasked_exceptions_wait() {
    let mut x = X87::initialized();
    x.set_control(control::INITIAL & !status::ZE);
    let fld = |fop| Op::decode(fop).unwrap_or(Op::Nop);
    x.execute(fld(0x1e8), 0); // FLD1
    x.execute(fld(0x1ee), 0); // FLDZ
    let before = x;
    x.execute(fld(0x6f9), 0); // FDIVP ST(1), ST(0)
    assert!(x.pending_exception() && fld(0x1e8).waits() && !fld(0x3e2).waits());
    assert_eq!((x.fsw & 0xff, x.top(), x.st), (status::ZE | status::ES, before.top(), before.st));
    x.execute(fld(0x3e2), 0); // FNCLEX
    assert!(!x.pending_exception());
    x.set_control(control::INITIAL);
    x.execute(fld(0x6f9), 0);
    assert_eq!((x.st(0), x.is_empty(1), x.pending_exception()), (F80::INFINITY, true, false));
}

/// Opcode, operands as integers, result: arithmetic on any host.
#[test]
fn known_results() {
    let cases = [
        (Operation::Add, 1, 3, 0x4001, 1 << 63, 0),
        (Operation::Sub, 3, 3, 0x0000, 0, 0),
        (Operation::Div, 1, 3, 0x3ffd, 0xaaaa_aaaa_aaaa_aaab, status::PE | status::C1),
        (Operation::Sqrt, 2, 0, 0x3fff, 0xb504_f333_f9de_6484, status::PE),
        (Operation::Prem, 17, 5, 0x4000, 1 << 63, status::C3 | status::C1),
        (Operation::Patan, 1, 1, 0x3ffe, 0xc90f_daa2_2168_c235, status::PE | status::C1),
        (Operation::Yl2x, 8, 1, 0x4000, 0xc000_0000_0000_0000, status::PE),
        (Operation::Sin, 1, 0, 0x3ffe, 0xd76a_a478_4867_7021, status::PE | status::C1),
    ];
    for (operation, a, b, sign_exp, mantissa, flags) in cases {
        let outcome = Soft::run(operation, F80::from_i64(a), F80::from_i64(b), control::INITIAL);
        assert_eq!((outcome.value, outcome.status), (F80 { mantissa, sign_exp }, flags), "{operation:?} {a} {b}");
    }
}
