//! Guest memory as compiled code reaches it: the soft TLB's fast path inline, everything else by helper.
//!
//! How an access is emitted is decided here and nowhere else.

use std::mem::offset_of;

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::types::{I8, I8X16, I16, I32, I64};
use cranelift_codegen::ir::{Block, BlockArg, InstBuilder, SigRef, Type, Value};
use cranelift_frontend::FunctionBuilder;

use crate::addr::{PAGE_MASK, PAGE_SIZE};
use crate::code::HostIsa;
use crate::emit::{Emit, Word};
use crate::insn::{Insn, Mode};
use crate::jit::Unsupported;
use crate::jit::emit::{Helper, JitEmit, aligned, at, name, plain};
use crate::jit::frame::HELPERS;
use crate::jit::groups::Group;
use crate::jit::pages::{self, Found};
use crate::mmu::tlb::{Place, SITE_GROUP, Sites, TABLE_ANCHOR, TlbEntry, Translations, site};
use crate::state::seg;

/// Where in a table the mask and the sites are, from its [`TABLE_ANCHOR`]; entries are there.
pub(crate) const MASK_AT: i32 = offset_of!(Translations, mask) as i32 - TABLE_ANCHOR as i32;
const SITES_AT: i32 = offset_of!(Translations, sites) as i32 - TABLE_ANCHOR as i32;
const _: () = assert!(SITES_AT % size_of::<Place>() as i32 == 0);
/// Where in the table it says which groups of sites are used.
pub(crate) const USED_AT: i32 = SITES_AT + offset_of!(Sites, used) as i32;

/// No page's linear address, nor near any: what comes back from a slow path had a canonical address.
const NO_PAGE: i64 = i64::MIN;

/// Offsets of places in [`Sites`].
pub(crate) const LAST: usize = offset_of!(Sites, last);
pub(crate) const BEFORE: usize = offset_of!(Sites, before);

/// Where in the table a site's word is, of those at `field` of `places`.
pub(crate) fn site_at(places: usize, field: usize, site: usize) -> i32 {
    SITES_AT + (places + field + size_of::<Place>() * site) as i32
}

impl JitEmit<'_> {
    pub(super) fn linear(&mut self, i: &Insn, s: u8, ea: Value) -> Result<Value, Unsupported> {
        if s >= seg::FS {
            if !self.plan.mode.has(Mode::CODE64) {
                return Err(Unsupported);
            }
            let base = self.word(Word::Base(s));
            return Ok(self.b.ins().iadd(base, ea));
        }
        // Outside 64-bit mode CS may not be written, and perhaps not read: `i.flat` says so.
        let plain = i.flat || (s != seg::CS && self.plan.mode.has(Mode::FLAT));
        if plain { Ok(ea) } else { Err(Unsupported) }
    }

    /// Accesses an operand: `at` is the access, given its host address, and may be emitted several times; `slow` gives the
    /// address on a miss, unless it has done the access. What `at` gives, values of the types `results`, is given back.
    fn access(
        &mut self,
        operand: Operand,
        results: [Option<Type>; 2],
        at: impl Fn(&mut Self, Value) -> [Option<Value>; 2],
        slow: impl FnOnce(&mut Self) -> Option<Value>,
    ) -> [Option<Value>; 2] {
        if let Some(host) = self.covered_host(operand) {
            return at(self, host);
        }
        if operand.may_leave {
            self.before_access();
        }
        let Operand { linear, bytes, write, .. } = operand;
        let done = self.b.create_block();
        let results = results.map(|t| t.map(|t| self.b.append_block_param(done, t)));
        let address = self.pages.address(linear, self.b.func).filter(|_| !self.in_loops[self.current]);
        let near = address.and_then(|at| self.pages.find(at, write));
        let noted = address.filter(|&at| near.is_none() && self.pages.is_used_again(at));
        let page_and_addend = noted.map(|at| (at, [(); 2].map(|()| self.b.append_block_param(done, I64))));
        let finish = |e: &mut Self, host, found: [Value; 2]| {
            let found = found.into_iter().filter(|_| noted.is_some());
            let values: Vec<BlockArg> = at(e, host).into_iter().flatten().chain(found).map(BlockArg::Value).collect();
            e.b.ins().jump(done, &values);
        };
        let look = self.look();
        self.by_thunk = look != Look::Table || near.is_some();
        if look != Look::Table {
            self.by_site(linear, bytes, write, look, |e, host| finish(e, host, [host; 2]));
        } else if let Some(near) = near {
            self.next_site += 1;
            let hit = self.lies_in(linear, bytes, near);
            let elsewhere = self.go_on_if(hit);
            let host = self.b.ins().iadd(near.addend, linear);
            finish(self, host, [host; 2]);
            self.b.switch_to_block(elsewhere);
        } else {
            let table = self.b.use_var(self.tlb);
            let Lookup { entry, page, hit } = look_up(&mut self.b, table, linear, Width::Known(bytes), write);
            let miss = self.go_on_if(hit);
            let addend = addend_of(&mut self.b, entry);
            let host = self.b.ins().iadd(addend, linear);
            finish(self, host, [page, addend]);
            self.b.switch_to_block(miss);
        }
        let found = slow(self);
        let nowhere = [NO_PAGE, 0].map(|k| self.b.ins().iconst(I64, k));
        match found {
            Some(host) => finish(self, host, nowhere),
            None => {
                let nothing: &[BlockArg] = if noted.is_some() { &nowhere.map(BlockArg::Value) } else { &[] };
                self.b.ins().jump(done, nothing);
            }
        }
        self.b.switch_to_block(done);
        if let Some((at, [page, addend])) = page_and_addend {
            self.pages.note(at, write, page, addend);
        }
        results
    }

    /// The host address of an operand that needs no look any more.
    fn covered_host(&mut self, Operand { linear, bytes, write, .. }: Operand) -> Option<Value> {
        let at = self.pages.address(linear, self.b.func)?;
        let addend = self.pages.covers(at, bytes, write)?;
        Some(self.b.ins().iadd(addend, linear))
    }

    /// Looks up the memory of the current block's groups by what registers have from instruction number `n` on, which
    /// comes next ([`super::groups`]).
    pub(super) fn look_up_groups(&mut self, n: usize) {
        let mut slow = None;
        let groups = std::mem::take(&mut self.groups[self.current]);
        for &Group { base, from, to, write, .. } in groups.iter().filter(|g| g.base.since == n) {
            let Some(var) = self.gpr[usize::from(base.register)] else { continue };
            let value = self.b.use_var(var);
            self.pages.is_read(base.register, value);
            let linear = self.b.ins().iadd_imm_s(value, from);
            let bytes = (to - from) as u64;
            let at = self.pages.address(linear, self.b.func);
            let near = at.and_then(|at| self.pages.find(at, write));
            let (hit, known) = match near {
                Some(near) => (self.lies_in(linear, bytes, near), Ok((near.page, near.addend))),
                None => {
                    let table = self.b.use_var(self.tlb);
                    let Lookup { entry, page, hit } = look_up(&mut self.b, table, linear, Width::Known(bytes), write);
                    (hit, Err((page, entry)))
                }
            };
            let go_on = self.b.create_block();
            let miss = slow.unwrap_or_else(|| self.b.create_block());
            self.b.ins().brif(hit, go_on, &[], miss, &[]);
            if slow.replace(miss).is_none() {
                self.b.set_cold_block(miss);
                self.b.switch_to_block(miss);
                self.leave_for_slow_version(n);
            }
            self.b.switch_to_block(go_on);
            let (page, addend) = known.unwrap_or_else(|(page, entry)| (page, addend_of(&mut self.b, entry)));
            if let Some(at) = at {
                self.pages.cover(at, to - from, write, page, addend);
            }
        }
        self.groups[self.current] = groups;
    }

    /// Whether an access lies in a page that an earlier one was found in.
    fn lies_in(&mut self, linear: Value, bytes: u64, near: Found) -> Value {
        let offset = self.b.ins().isub(linear, near.page);
        let most = (PAGE_SIZE - bytes) as i64;
        self.b.ins().icmp_imm_u(IntCC::UnsignedLessThanOrEqual, offset, most)
    }

    /// Ends the current Cranelift block by going on in the slow version of the guest's, at instruction number `n`.
    fn leave_for_slow_version(&mut self, n: usize) {
        let from = (self.current, n);
        let off = self.plan.blocks[self.current].insns[n].off;
        self.store_pending_flags();
        let rip = self.ip_at(off.into());
        self.leave_to(rip, n as i64);
        self.emitted.slow.push(from);
        self.tail_call(name::SLOW, self.emitted.slow.len() - 1);
    }

    /// Behind a load: nothing that comes later is seen before it ([`super::ordering`]).
    pub(super) fn loaded(&mut self) {
        if self.plan.options.fenced() {
            self.b.ins().fence();
        }
    }

    /// Before a store: nothing that came earlier is seen after it.
    pub(super) fn storing(&mut self) {
        self.loaded();
    }

    /// Goes on where `hit` is true; the block, an unlikely one, where it is not.
    fn go_on_if(&mut self, hit: Value) -> Block {
        let (here, elsewhere) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(elsewhere);
        self.b.ins().brif(hit, here, &[], elsewhere, &[]);
        self.b.switch_to_block(here);
        elsewhere
    }

    /// How the current instruction looks for what it accesses.
    fn look(&self) -> Look {
        match (self.in_loops[self.current], self.is_scattered, self.plan.strayed(self.off)) {
            (true, false, 0) => Look::LastOrBefore,
            (true, true, 0) => Look::Last,
            (true, true, 1) => Look::Either,
            _ => Look::Table,
        }
    }

    /// Begins an access by where it was last, which `finish` does and ends; the current block is where it is somewhere
    /// else.
    fn by_site(&mut self, linear: Value, bytes: u64, store: bool, look: Look, finish: impl Fn(&mut Self, Value)) {
        self.next_site += 1;
        let site = site(self.next_site, store, bytes);
        let last = self.place(LAST, site);
        let is_last = self.is_in(last, linear);
        let before = (look == Look::Either).then(|| self.place(BEFORE, site));
        let is_before = before.map(|before| self.is_in(before, linear));
        let hit = is_before.map_or(is_last, |is_before| self.b.ins().bor(is_last, is_before));
        let elsewhere = self.go_on_if(hit);
        let mut addend = self.addend_at(last);
        if let Some(before) = before {
            // No branch: the host could not tell which way.
            let before = self.addend_at(before);
            addend = self.b.ins().select(is_last, addend, before);
        }
        let host = self.b.ins().iadd(addend, linear);
        finish(self, host);
        self.b.switch_to_block(elsewhere);
        if look == Look::LastOrBefore {
            let before = self.place(BEFORE, site);
            let is_before = self.is_in(before, linear);
            let elsewhere = self.go_on_if(is_before);
            self.b.current_block().into_iter().for_each(|here| self.b.set_cold_block(here));
            let addend = self.addend_at(before);
            let host = self.b.ins().iadd(addend, linear);
            finish(self, host);
            self.b.switch_to_block(elsewhere);
        }
    }

    /// A site's place: an address, and how far it is from there.
    fn place(&mut self, places: usize, site: usize) -> (Value, i32) {
        let table = self.b.use_var(self.tlb);
        let at = site_at(places, 0, site);
        if HostIsa::native().is_none_or(HostIsa::reaches_far) {
            return (table, at);
        }
        // One instruction for all of it, which lies in one such stretch. (An addition would go back into each load.)
        let near = at.rem_euclid(1 << 12);
        let far = self.b.ins().iconst(I64, i64::from(near - at));
        (self.b.ins().isub(table, far), near)
    }

    /// Whether an access is in the page of a site's place.
    fn is_in(&mut self, (place, at): (Value, i32), linear: Value) -> Value {
        let at = |field: usize| at + field as i32;
        // Of use once, and in place: such a load is part of the subtraction.
        let base = self.b.ins().load(I64, aligned(), place, at(offset_of!(Place, base)));
        let offset = self.b.ins().isub(linear, base);
        let limit = self.b.ins().load(I64, aligned(), place, at(offset_of!(Place, limit)));
        self.b.ins().icmp(IntCC::UnsignedLessThan, offset, limit)
    }

    fn addend_at(&mut self, (place, at): (Value, i32)) -> Value {
        self.b.ins().load(I64, aligned(), place, at + offset_of!(Place, addend) as i32)
    }

    /// Calls a slow path and leaves to the interpreter if it says so; gives the address it found.
    pub(super) fn slow(&mut self, helper: Helper, linear: Value, bytes: u64, value: Option<Value>) -> Value {
        let (out, go_on) = (self.b.create_block(), self.b.create_block());
        self.b.set_cold_block(go_on);
        self.b.set_cold_block(out);
        let found = self.ask(helper, linear, bytes, value);
        self.b.ins().brif(found, go_on, &[], out, &[]);
        self.b.switch_to_block(out);
        self.leave_to_interpreter();
        self.b.switch_to_block(go_on);
        found
    }

    /// Calls a slow path; what it says.
    fn ask(&mut self, helper: Helper, linear: Value, bytes: u64, value: Option<Value>) -> Value {
        if self.by_thunk {
            let site = site(self.next_site, matches!(helper, Helper::Store | Helper::Modify), bytes);
            let which = self.b.ins().iconst(I64, (site << 8) as i64 | bytes as i64);
            self.call_thunk(HELPERS + helper as usize, linear, which, value);
        } else {
            let bytes = self.b.ins().iconst(I64, bytes as i64);
            self.call(helper, linear, bytes, value);
        }
        self.b.ins().load(I64, aligned(), self.cpu, at!(jit.slow_result))
    }

    /// A load of a value of type `t`.
    pub(super) fn load_value(&mut self, linear: Value, bytes: u64, t: Type) -> Value {
        let narrow = t.is_int() && t.bytes() < 8;
        let load = |e: &mut Self, host| {
            let b = e.b.ins();
            let value = match t {
                I8 => b.uload8(I64, plain(), host, 0),
                I16 => b.uload16(I64, plain(), host, 0),
                I32 => b.uload32(plain(), host, 0),
                _ => b.load(t, plain(), host, 0),
            };
            [Some(value), None]
        };
        let slow = |e: &mut Self| Some(e.slow(Helper::Load, linear, bytes, None));
        let result = if narrow { I64 } else { t };
        let operand = Operand { linear, bytes, write: false, may_leave: true };
        let [value, _] = self.access(operand, [Some(result), None], load, slow);
        self.loaded();
        // An access with a result has one.
        let value = value.unwrap_or(linear);
        if !narrow {
            return value;
        }
        let part = self.b.ins().ireduce(t, value);
        self.wide.insert(part, value);
        part
    }

    /// The host address of bytes that are read and then written.
    pub(super) fn host_to_modify(&mut self, linear: Value, bytes: u64) -> Value {
        let slow = |e: &mut Self| Some(e.slow(Helper::Modify, linear, bytes, None));
        let same = |_: &mut Self, host| [Some(host), None];
        let operand = Operand { linear, bytes, write: true, may_leave: true };
        let [found, _] = self.access(operand, [Some(I64), None], same, slow);
        found.unwrap_or(linear)
    }

    /// The host address of an operand that lies in one page of plain RAM; control goes to `elsewhere` if it does not. No
    /// register is stored for that.
    pub(super) fn host_of(&mut self, linear: Value, bytes: u64, store: bool, elsewhere: Block) -> Value {
        let helper = if store { Helper::Modify } else { Helper::Find };
        let slow = |e: &mut Self| {
            let found = e.ask(helper, linear, bytes, None);
            let go_on = e.b.create_block();
            e.b.set_cold_block(go_on);
            e.b.ins().brif(found, go_on, &[], elsewhere, &[]);
            e.b.switch_to_block(go_on);
            Some(found)
        };
        let same = |_: &mut Self, host| [Some(host), None];
        // Control may come to what is behind by way of `elsewhere`, too.
        let later = std::mem::take(&mut self.pages.later);
        let operand = Operand { linear, bytes, write: store, may_leave: false };
        let [found, _] = self.access(operand, [Some(I64), None], same, slow);
        self.pages.later = later;
        found.unwrap_or(linear)
    }

    pub(super) fn store_value(&mut self, linear: Value, bytes: u64, v: Value) {
        self.storing();
        let store = |e: &mut Self, host| {
            e.b.ins().store(plain(), v, host, 0);
            [None; 2]
        };
        let operand = Operand { linear, bytes, write: true, may_leave: true };
        self.access(operand, [None; 2], store, |e| {
            let wide = if bytes == 16 {
                e.b.ins().store(plain(), v, e.cpu, at!(jit.bounce));
                e.b.ins().iconst(I64, 0)
            } else {
                e.extend(v, bytes)
            };
            e.slow(Helper::Store, linear, bytes, Some(wide));
            None
        });
    }

    /// A load of 32 bytes.
    pub(super) fn load_values(&mut self, linear: Value) -> (Value, Value) {
        let load = |e: &mut Self, host| [0, 16].map(|at| Some(e.b.ins().load(I8X16, plain(), host, at)));
        let slow = |e: &mut Self| Some(e.slow(Helper::Load, linear, 32, None));
        let operand = Operand { linear, bytes: 32, write: false, may_leave: true };
        let values = self.access(operand, [Some(I8X16); 2], load, slow);
        self.loaded();
        // An access with results has them.
        let [low, high] = values.map(|v| v.unwrap_or(linear));
        (low, high)
    }

    /// A store of 32 bytes.
    pub(super) fn store_values(&mut self, linear: Value, (low, high): (Value, Value)) {
        self.storing();
        let store = |e: &mut Self, host| {
            e.b.ins().store(plain(), low, host, 0);
            e.b.ins().store(plain(), high, host, 16);
            [None; 2]
        };
        let operand = Operand { linear, bytes: 32, write: true, may_leave: true };
        self.access(operand, [None; 2], store, |e| {
            e.b.ins().store(plain(), low, e.cpu, at!(jit.bounce));
            e.b.ins().store(plain(), high, e.cpu, at!(jit.bounce) + 16);
            let none = e.b.ins().iconst(I64, 0);
            e.slow(Helper::Store, linear, 32, Some(none));
            None
        });
    }

    pub(super) fn check_alignment(&mut self, linear: Value) {
        let low = self.b.ins().band_imm_u(linear, 15);
        self.side_exit_if(low);
    }

    pub(super) fn extend(&mut self, v: Value, bytes: u64) -> Value {
        if bytes == 8 { v } else { self.b.ins().uextend(I64, v) }
    }
}

/// Where an access looks for its page first; otherwise a thunk finds it, or a helper.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    /// In the soft TLB: outside loops, and what [strays](super::strays) far.
    Table,
    /// Where it was last, and then where it was before that: data may lie across the end of a page.
    LastOrBefore,
    /// Where it was last: [scattered](super::scattered) accesses, as of a table.
    Last,
    /// In either of the two, without a branch whose way the host could not tell: those of them that stray.
    Either,
}

/// A memory operand that is accessed.
#[derive(Clone, Copy)]
struct Operand {
    linear: Value,
    bytes: u64,
    /// Whether it is written.
    write: bool,
    /// Whether the access may leave the region: registers are stored for that.
    may_leave: bool,
}

/// How wide an access is.
enum Width {
    Known(u64),
    /// The number of bytes.
    Given(Value),
}

/// A lookup in a table.
struct Lookup {
    entry: Value,
    /// The page of the access's last byte.
    page: Value,
    hit: Value,
}

fn look_up(b: &mut FunctionBuilder<'_>, table: Value, linear: Value, bytes: Width, write: bool) -> Lookup {
    let tag = if write { offset_of!(TlbEntry, write) } else { offset_of!(TlbEntry, read) };
    let shift = size_of::<TlbEntry>().trailing_zeros();
    let index = b.ins().ushr_imm_u(linear, i64::from(12 - shift));
    let mask = b.ins().load(I64, aligned(), table, MASK_AT);
    let index = b.ins().band(index, mask);
    let entry = b.ins().iadd(table, index);
    let page = page_of_last(b, linear, bytes);
    let found = b.ins().load(I64, aligned(), entry, tag as i32);
    let hit = b.ins().icmp(IntCC::Equal, found, page);
    Lookup { entry, page, hit }
}

/// What the host's addresses are more than the linear ones of an entry that was hit.
fn addend_of(b: &mut FunctionBuilder<'_>, entry: Value) -> Value {
    b.ins().load(I64, aligned(), entry, offset_of!(TlbEntry, addend) as i32)
}

/// The page of an access's last byte.
fn page_of_last(b: &mut FunctionBuilder<'_>, linear: Value, bytes: Width) -> Value {
    let last = match bytes {
        Width::Known(1) => linear,
        Width::Known(n) => {
            // One addition where the address is a sum already.
            let (part, k) = pages::sum(linear, b.func).unwrap_or((linear, 0));
            b.ins().iadd_imm_s(part, k.wrapping_add(n as i64 - 1))
        }
        Width::Given(n) => {
            let behind = b.ins().iadd(linear, n);
            b.ins().iadd_imm_s(behind, -1)
        }
    };
    b.ins().band_imm_s(last, !(PAGE_MASK as i64))
}

/// The body of a thunk that compiled code calls for an access that is not where its site was last: by the table, whose
/// page the site remembers then, or else by the helper's own thunk. Parameters are those of helpers, with the site's
/// number above the number of bytes. ([`crate::quick::site`] has shorter ones of some.)
pub fn site_thunk(b: &mut FunctionBuilder<'_>, params: &[Value], helper: Helper, signature: SigRef) {
    let [cpu, linear, which, value] = *params else { return };
    let left = b.ins().load(I64, aligned(), cpu, at!(jit.until_stray));
    let left = b.ins().iadd_imm_s(left, -1);
    b.ins().store(aligned(), left, cpu, at!(jit.until_stray));
    let stray = b.ins().icmp_imm_s(IntCC::SignedLessThan, left, 0);
    let (look_at, go_on) = (b.create_block(), b.create_block());
    b.set_cold_block(look_at);
    b.ins().brif(stray, look_at, &[], go_on, &[]);
    b.switch_to_block(look_at);
    let interpret = b.ins().iconst(I64, 0);
    b.ins().store(aligned(), interpret, cpu, at!(jit.slow_result));
    b.ins().return_(&[]);

    b.switch_to_block(go_on);
    let bytes = b.ins().band_imm_u(which, 0xff);
    let site = b.ins().ushr_imm_u(which, 8);
    let table = b.ins().load(I64, aligned(), cpu, at!(jit.tlb));
    let write = !matches!(helper, Helper::Load | Helper::Find);
    let Lookup { entry, page, hit } = look_up(b, table, linear, Width::Given(bytes), write);
    let (known, miss) = (b.create_block(), b.create_block());
    b.ins().brif(hit, known, &[], miss, &[]);

    b.switch_to_block(known);
    let addend = addend_of(b, entry);
    let of_site = b.ins().ishl_imm_u(site, i64::from(size_of::<Place>().trailing_zeros()));
    let at = b.ins().iadd(table, of_site);
    let size = b.ins().iconst(I64, PAGE_SIZE as i64 + 1);
    let limit = b.ins().isub(size, bytes);
    let used = b.ins().iconst(I64, 1);
    let fields = [offset_of!(Place, base), offset_of!(Place, limit), offset_of!(Place, addend)];
    for (field, now) in fields.into_iter().zip([page, limit, addend]) {
        let last = b.ins().load(I64, aligned(), at, site_at(LAST, field, 0));
        b.ins().store(aligned(), last, at, site_at(BEFORE, field, 0));
        b.ins().store(aligned(), now, at, site_at(LAST, field, 0));
    }
    let group = b.ins().ushr_imm_u(site, i64::from(SITE_GROUP.trailing_zeros()));
    let at = b.ins().iadd(table, group);
    b.ins().istore8(aligned(), used, at, USED_AT);
    let host = b.ins().iadd(addend, linear);
    if matches!(helper, Helper::Store) {
        store_some(b, cpu, host, bytes, value);
        let done = b.ins().iconst(I64, 1);
        b.ins().store(aligned(), done, cpu, at!(jit.slow_result));
    } else {
        b.ins().store(aligned(), host, cpu, at!(jit.slow_result));
    }
    b.ins().return_(&[]);

    b.switch_to_block(miss);
    let thunk = b.ins().load(I64, aligned(), cpu, at!(jit.thunks) + 8 * helper as i32);
    b.ins().call_indirect(signature, thunk, &[cpu, linear, bytes, value]);
    b.ins().return_(&[]);
}

/// Stores 1, 2, 4 or 8 bytes of `value`, or 16 or 32 of the bounce buffer.
fn store_some(b: &mut FunctionBuilder<'_>, cpu: Value, host: Value, bytes: Value, value: Value) {
    let done = b.create_block();
    for (n, t) in [(8, I64), (4, I32), (1, I8), (2, I16), (16, I8X16), (32, I8X16)] {
        let (this, other) = (b.create_block(), b.create_block());
        let is_this = b.ins().icmp_imm_u(IntCC::Equal, bytes, n);
        b.ins().brif(is_this, this, &[], other, &[]);
        b.switch_to_block(this);
        let part = match t {
            I64 => value,
            I8X16 => b.ins().load(I8X16, plain(), cpu, at!(jit.bounce)),
            _ => b.ins().ireduce(t, value),
        };
        b.ins().store(plain(), part, host, 0);
        if n == 32 {
            let high = b.ins().load(I8X16, plain(), cpu, at!(jit.bounce) + 16);
            b.ins().store(plain(), high, host, 16);
        }
        b.ins().jump(done, &[]);
        b.switch_to_block(other);
    }
    b.ins().jump(done, &[]);
    b.switch_to_block(done);
}
