//! [`CpuState`] into and out of KVM.
//!
//! What a vCPU's local APIC has of it (IA32_APIC_BASE and CR8) stays as it is here.

use diglot_translator::engine::{CpuState, Due, DueKind, Segment, Table, cr, xsave_area};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, Msrs, kvm_dtable, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::{call, msr};
use crate::KvmError;

/// CpuState's bits of the interrupt shadow.
const STI: u8 = 1;
const MOV_SS: u8 = 2;
const NMI: u8 = 2;

/// The order of the general-purpose registers in `kvm_regs`, as [`CpuState::gpr`] has them.
fn gprs(r: &mut kvm_regs) -> [&mut u64; 16] {
    [
        &mut r.rax, &mut r.rcx, &mut r.rdx, &mut r.rbx, &mut r.rsp, &mut r.rbp, &mut r.rsi, &mut r.rdi, &mut r.r8,
        &mut r.r9, &mut r.r10, &mut r.r11, &mut r.r12, &mut r.r13, &mut r.r14, &mut r.r15,
    ]
}

fn segments(s: &mut kvm_sregs) -> [&mut kvm_segment; 6] {
    [&mut s.es, &mut s.cs, &mut s.ss, &mut s.ds, &mut s.fs, &mut s.gs]
}

/// A segment register for KVM; `dpl` is that of a null selector.
fn to_segment(s: &Segment, dpl: u8) -> kvm_segment {
    let bit = |mask: u32| u8::from(s.attr & mask != 0);
    let mut segment = kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind() as u8,
        s: bit(Segment::S),
        dpl: s.dpl(),
        present: bit(Segment::PRESENT),
        avl: bit(1 << 12),
        l: bit(Segment::L),
        db: bit(Segment::DB),
        g: bit(Segment::G),
        ..Default::default()
    };
    if !s.present() {
        (segment.unusable, segment.dpl) = (1, dpl);
    }
    segment
}

fn from_segment(k: &kvm_segment) -> Segment {
    let bit = |on: u8, mask: u32| if on != 0 { mask } else { 0 };
    let attr = u32::from(k.type_ & 15)
        | bit(k.s, Segment::S)
        | u32::from(k.dpl & 3) << 5
        | bit(k.present, Segment::PRESENT)
        | bit(k.avl, 1 << 12)
        | bit(k.l, Segment::L)
        | bit(k.db, Segment::DB)
        | bit(k.g, Segment::G);
    // What a null selector left in the hidden part is not to be seen by anybody.
    let attr = if k.unusable != 0 || k.present == 0 { 0 } else { attr };
    Segment { base: k.base, limit: k.limit, attr, selector: k.selector }
}

fn to_table(t: &Table) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..Default::default() }
}

fn from_table(k: &kvm_dtable) -> Table {
    Table { base: k.base, limit: k.limit }
}

/// Where XSAVE has PKRU on this host, if guests may have that.
#[derive(Clone, Copy)]
pub struct Layout {
    pub pkru: Option<usize>,
}

/// Reads the state, but for the time-stamp counter's offset. What KVM does not have stays in `s`.
pub fn load(fd: &VcpuFd, s: &mut CpuState, layout: Layout) -> Result<(), KvmError> {
    let failed = |e| call("tell a vCPU's state", e);
    let mut regs = fd.get_regs().map_err(failed)?;
    let mut sregs = fd.get_sregs().map_err(failed)?;
    let debug = fd.get_debug_regs().map_err(failed)?;
    let events = fd.get_vcpu_events().map_err(failed)?;
    let xcrs = fd.get_xcrs().map_err(failed)?;
    let area = fd.get_xsave().map_err(failed)?;
    let mp = fd.get_mp_state().map_err(failed)?;

    s.rip = regs.rip;
    s.set_flags(regs.rflags);
    s.gpr = gprs(&mut regs).map(|r| *r);
    s.seg = segments(&mut sregs).map(|k| from_segment(k));
    s.cpl = sregs.ss.dpl & 3;
    (s.ldtr, s.tr) = (from_segment(&sregs.ldt), from_segment(&sregs.tr));
    (s.gdtr, s.idtr) = (from_table(&sregs.gdt), from_table(&sregs.idt));
    (s.cr0, s.cr2, s.cr3, s.cr4) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4);
    // SVM's own bit is the host's.
    s.efer = sregs.efer & (cr::EFER_SCE | cr::EFER_LME | cr::EFER_LMA | cr::EFER_NXE);
    s.dr[..4].copy_from_slice(&debug.db);
    (s.dr[6], s.dr[7]) = (debug.dr6, debug.dr7);
    s.xcr0 =
        xcrs.xcrs[..(xcrs.nr_xcrs as usize).min(xcrs.xcrs.len())].iter().find(|x| x.xcr == 0).map_or(1, |x| x.value);
    xsave_area::read(s, &bytes(&area.region), layout.pkru);

    let shadow = u32::from(events.interrupt.shadow);
    // SVM has one shadow, which KVM reports as both.
    s.shadow = match (shadow & KVM_X86_SHADOW_INT_STI != 0, shadow & KVM_X86_SHADOW_INT_MOV_SS != 0) {
        (true, _) => STI,
        (false, true) => MOV_SS,
        (false, false) => 0,
    };
    s.nmi_blocked = events.nmi.masked != 0;
    s.halted = mp.mp_state == KVM_MP_STATE_HALTED;
    s.due = due(&events);

    let wanted = msrs(s);
    let mut read = Msrs::from_entries(&wanted).map_err(|e| KvmError::Broken(format!("no room for its MSRs: {e:?}")))?;
    // It stops at the first that it does not have; those come one by one then.
    if fd.get_msrs(&mut read).map_err(failed)? == wanted.len() {
        let mut values = read.as_slice().iter();
        msr::each(&mut s.msr, |_, value| *value = values.next().map_or(*value, |entry| entry.data));
    } else {
        msr::each(&mut s.msr, |index, value| *value = get_msr(fd, index).unwrap_or(*value));
    }
    Ok(())
}

/// Replaces the state, but for the time-stamp counter.
pub fn store(fd: &VcpuFd, s: &CpuState, layout: Layout) -> Result<(), KvmError> {
    let failed = |e| call("take a vCPU's state", e);
    let mut sregs = fd.get_sregs().map_err(failed)?;
    for (k, segment) in segments(&mut sregs).into_iter().zip(&s.seg) {
        *k = to_segment(segment, 0);
    }
    // From which KVM has the privilege level, whatever is loaded there.
    sregs.ss.dpl = s.cpl;
    (sregs.ldt, sregs.tr) = (to_segment(&s.ldtr, 0), to_segment(&s.tr, 0));
    (sregs.gdt, sregs.idt) = (to_table(&s.gdtr), to_table(&s.idtr));
    (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer) = (s.cr0, s.cr2, s.cr3, s.cr4, s.efer);
    sregs.interrupt_bitmap = [0; 4];
    fd.set_sregs(&sregs).map_err(failed)?;

    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = s.xcr0;
    fd.set_xcrs(&xcrs).map_err(failed)?;
    let mut image = [0; 4096];
    xsave_area::write(s, &mut image, layout.pkru);
    let mut area = kvm_bindings::kvm_xsave::default();
    for (word, bytes) in area.region.iter_mut().zip(image.chunks_exact(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    // SAFETY: the area has the size of `kvm_xsave`, all of which there is while no feature with more state is enabled by
    // arch_prctl, which Diglot does not.
    unsafe { fd.set_xsave(&area) }.map_err(failed)?;

    let mut regs = kvm_regs { rip: s.rip, rflags: s.flags(), ..Default::default() };
    for (register, value) in gprs(&mut regs).into_iter().zip(s.gpr) {
        *register = value;
    }
    fd.set_regs(&regs).map_err(failed)?;
    let mut debug = kvm_bindings::kvm_debugregs { dr6: s.dr[6], dr7: s.dr[7], ..Default::default() };
    debug.db.copy_from_slice(&s.dr[..4]);
    fd.set_debug_regs(&debug).map_err(failed)?;
    store_msrs(fd, s)?;

    // A waiting NMI is the local APIC's, and stays.
    let mut events = kvm_vcpu_events { flags: KVM_VCPUEVENT_VALID_SHADOW, ..Default::default() };
    events.interrupt.shadow = (if s.shadow & STI != 0 { KVM_X86_SHADOW_INT_STI } else { 0 }
        | if s.shadow & MOV_SS != 0 { KVM_X86_SHADOW_INT_MOV_SS } else { 0 }) as u8;
    events.nmi.masked = u8::from(s.nmi_blocked);
    if let Some(due) = s.due {
        set_due(&mut events, due);
    }
    fd.set_vcpu_events(&events).map_err(failed)?;
    let mp_state = if s.halted && s.due.is_none() { KVM_MP_STATE_HALTED } else { KVM_MP_STATE_RUNNABLE };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(failed)
}

/// What KVM has begun to deliver, or is about to. Events of instructions (INT n, INT3, INTO) are not among it: the
/// instruction is executed again.
fn due(events: &kvm_vcpu_events) -> Option<Due> {
    let (e, i) = (&events.exception, &events.interrupt);
    if e.injected != 0 || e.pending != 0 {
        let error = (e.has_error_code != 0).then_some(e.error_code);
        Some(Due { vector: e.nr, kind: DueKind::Exception(error) })
    } else if events.nmi.injected != 0 {
        Some(Due { vector: NMI, kind: DueKind::Nmi })
    } else if i.injected != 0 && i.soft == 0 {
        Some(Due { vector: i.nr, kind: DueKind::Interrupt })
    } else {
        None
    }
}

fn set_due(events: &mut kvm_vcpu_events, due: Due) {
    match due.kind {
        DueKind::Interrupt => (events.interrupt.injected, events.interrupt.nr) = (1, due.vector),
        DueKind::Nmi => events.nmi.injected = 1,
        DueKind::Exception(error) => {
            let e = &mut events.exception;
            (e.injected, e.nr) = (1, due.vector);
            (e.has_error_code, e.error_code) = (u8::from(error.is_some()), error.unwrap_or(0));
        }
    }
}

/// The vCPU's events, unless one is under way on top of which no interrupt may be injected.
pub fn quiet(fd: &VcpuFd) -> Result<Option<kvm_vcpu_events>, KvmError> {
    let events = fd.get_vcpu_events().map_err(|e| call("tell a vCPU's state", e))?;
    Ok(due(&events).is_none().then_some(events))
}

/// Has an acknowledged interrupt delivered before the next instruction, which wakes a halted vCPU; [`quiet`] gave `events`.
pub fn inject(fd: &VcpuFd, mut events: kvm_vcpu_events, vector: u8) -> Result<(), KvmError> {
    let failed = |e| call("deliver an interrupt", e);
    set_due(&mut events, Due { vector, kind: DueKind::Interrupt });
    events.interrupt.soft = 0;
    fd.set_vcpu_events(&events).map_err(failed)?;
    if fd.get_mp_state().map_err(failed)?.mp_state == KVM_MP_STATE_HALTED {
        fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(failed)?;
    }
    Ok(())
}

fn msrs(s: &mut CpuState) -> Vec<kvm_msr_entry> {
    let mut entries = Vec::new();
    msr::each(&mut s.msr, |index, value| {
        entries.push(kvm_msr_entry { index, data: *value, ..Default::default() });
    });
    entries
}

fn store_msrs(fd: &VcpuFd, s: &CpuState) -> Result<(), KvmError> {
    let entries = msrs(&mut s.clone());
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let list = Msrs::from_entries(rest).map_err(|e| KvmError::Broken(format!("no room for its MSRs: {e:?}")))?;
        let done = fd.set_msrs(&list).map_err(|e| call("take a vCPU's state", e))?;
        let Some(refused) = rest.get(done) else { break };
        // What this processor does not have and the guest does not use is nobody's loss.
        if refused.data != 0 {
            return Err(KvmError::Call {
                what: "take a vCPU's state",
                why: format!("MSR {:#x} does not take {:#x}", refused.index, refused.data),
                advice: "use --backend jit",
            });
        }
        rest = &rest[done + 1..];
    }
    Ok(())
}

/// Reads one MSR; `None` if KVM does not have it.
pub fn get_msr(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut list = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let read = fd.get_msrs(&mut list).ok()?;
    list.as_slice().first().filter(|_| read == 1).map(|entry| entry.data)
}

/// Writes one MSR; whether KVM took it.
pub fn set_msr(fd: &VcpuFd, index: u32, data: u64) -> bool {
    let list = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]);
    list.is_ok_and(|list| fd.set_msrs(&list).is_ok_and(|written| written == 1))
}

fn bytes(region: &[u32; 1024]) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    for (four, word) in bytes.chunks_exact_mut(4).zip(region) {
        four.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}
