//! The dispatch loop of one vCPU: find the block, run it, take what came of it.

use crate::addr::{PAGE_MASK, PAGE_SIZE};
use crate::block::{Block, BlockCache, BlockId};
use crate::cpu::{Again, Cpu, Kick, mode_cut};
use crate::decode::{self, MAX_LEN};
use crate::exception::{Exception, Trap, vector};
use crate::insn::{Insn, Mode};
use crate::jit::cache::{Change, Runs};
use crate::jit::frame::reason;
use crate::jit::region::Plan;
use crate::jit::strays::STRAYS;
use crate::jit::{Jit, THRESHOLD};
use crate::state::{CpuState, Due, DueKind, Segment, flag, seg};

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The CPU is halted and no interrupt waits: run again after the next event.
    Halt,
    /// A triple fault: the machine resets.
    Shutdown,
    /// [`Kick::STOP`] was requested.
    Stopped,
}

/// Interpreted runs of a block before it gets quick code.
const QUICK: u32 = 12;
/// So many times more of a block whose end has led to several places of its page, as far as is known.
const WATCHED: u32 = 8;
/// Evictions of a block's code, after each of which the block is to run twice as often before it gets quick code again: up
/// to about where to interpret it costs what making the code does.
const EVICTIONS: u8 = 4;
/// How often quick code goes on at a block, back or from elsewhere, before that gets a region.
const PATIENCE: u32 = 20_000;
/// Of so many times that quick code goes on back or elsewhere it is looked where it is. A prime, for loops to have no part
/// of it for their period.
const LOOK: u32 = 1009;
/// DR6: B0 to B3, BD, BS, BT.
const DR6_CONDITIONS: u64 = 0xe00f;
/// Invalidations of compiled code in a page after which its blocks must be twice as hot to be compiled again.
const REWRITES: u32 = 8;

/// What the dispatch loop counted.
#[allow(missing_docs)]
#[derive(Clone, Debug, Default)]
pub struct RunCounts {
    pub interpreted: u64,
    pub blocks_run: u64,
    pub jump_misses: u64,
    pub stepped: u64,
    pub entries: u64,
    /// Bridges led to a region.
    pub bridged: u64,
    /// Returns of compiled code by [`reason`].
    pub exits: [u64; reason::COUNT],
}

/// One vCPU with its code caches.
pub struct Vcpu {
    /// The CPU.
    pub cpu: Cpu,
    /// Predecoded blocks.
    pub blocks: BlockCache,
    /// The compiler, unless the vCPU only interprets.
    pub jit: Option<Jit>,
    /// What a lock-step run found, or why a traced one cannot go on.
    pub difference: Option<String>,
    /// How often a block is interpreted before it gets quick code; `None` if it does not.
    quick: Option<u32>,
    /// Runs of a block's quick code, or interpreted runs of a block that gets none, before its region is compiled.
    threshold: u32,
    /// Where blocks are decoded.
    decoded: Vec<Insn>,
    /// Statistics.
    pub counts: RunCounts,
}

impl Vcpu {
    /// A vCPU around `cpu`.
    pub fn new(mut cpu: Cpu, jit: Option<Jit>) -> Vcpu {
        if let Some(jit) = &jit {
            cpu.connect_jit(jit);
        }
        let quick = jit.is_some();
        Vcpu {
            cpu,
            blocks: BlockCache::default(),
            jit,
            difference: None,
            quick: quick.then_some(QUICK),
            threshold: if quick { PATIENCE } else { THRESHOLD },
            decoded: Vec::new(),
            counts: RunCounts::default(),
        }
    }

    /// Sets how often a block is interpreted before its region is compiled, without quick code between: tests compile
    /// at once.
    pub fn set_threshold(&mut self, threshold: u32) {
        self.quick = None;
        self.threshold = threshold;
    }

    /// Sets how often a block is interpreted before it gets quick code, and how often that runs
    /// before its region is compiled.
    pub fn set_quick(&mut self, interpreted: u32, quick: u32) {
        self.quick = self.jit.is_some().then_some(interpreted);
        self.threshold = quick;
    }

    /// Runs guest code until something needs the machine's attention.
    pub fn run(&mut self) -> Exit {
        let peers = self.cpu.peers.clone();
        if let Some(peers) = &peers {
            peers.come(self.cpu.index);
            self.answer_peers();
        }
        let exit = loop {
            if let Some(exit) = self.turn() {
                break exit;
            }
        };
        if let Some(peers) = peers {
            peers.go(self.cpu.index);
        }
        exit
    }

    /// Does what other vCPUs ask.
    #[cold]
    fn answer_peers(&mut self) {
        let Some(peers) = self.cpu.peers.clone() else { return };
        while self.cpu.kick.take(Kick::PEERS) != 0 {
            let mail = peers.take(self.cpu.index);
            mail.protect.into_keys().for_each(|page| self.cpu.protect_code(page));
            for (page, granules) in mail.overwritten {
                self.invalidate(page, granules);
            }
            if !self.cpu.alone {
                peers.make_way(self.cpu.index);
            }
        }
    }

    /// Runs one instruction while no other vCPU runs any.
    #[cold]
    fn step_alone(&mut self) -> Result<(), TripleFault> {
        let Some(peers) = self.cpu.peers.clone() else { return Ok(()) };
        peers.begin_alone(self.cpu.index);
        self.cpu.alone = true;
        self.answer_peers();
        let result = self.step();
        self.cpu.alone = false;
        peers.end_alone();
        result
    }

    /// Runs one block, region or event delivery; what ends [`Self::run`] if anything does.
    #[inline(always)]
    pub fn turn(&mut self) -> Option<Exit> {
        if let Some(exit) = self.prepare() {
            return Some(exit);
        }
        let result = if self.cpu.must_step() { self.step() } else { self.run_block() };
        result.is_err().then_some(Exit::Shutdown)
    }

    /// What comes before guest code: requests of other threads, and the interrupt that waits.
    #[inline(always)]
    pub(crate) fn prepare(&mut self) -> Option<Exit> {
        if self.cpu.kick.pending() != 0 {
            if self.cpu.kick.take(Kick::STOP) != 0 {
                return Some(Exit::Stopped);
            }
            self.answer_peers();
            if self.cpu.kick.take(Kick::ATTENTION) != 0 {
                self.cpu.irq_maybe = true;
                self.cpu.nmi_maybe = true;
            }
        }
        if (self.cpu.irq_maybe || self.cpu.s.halted) && self.take_interrupt().is_err() {
            return Some(Exit::Shutdown);
        }
        self.cpu.s.halted.then_some(Exit::Halt)
    }

    /// Delivers an NMI or a maskable interrupt if one waits and may be taken now.
    fn take_interrupt(&mut self) -> Result<(), TripleFault> {
        let cpu = &mut self.cpu;
        // Debug traps come before interrupts (SDM vol. 3 §6.9).
        if cpu.s.shadow != 0 || cpu.pending_debug != 0 {
            return Ok(());
        }
        if cpu.nmi_maybe && !cpu.s.nmi_blocked {
            if cpu.platform.take_nmi() {
                cpu.s.nmi_blocked = true;
                return self.deliver(Event::Nmi);
            }
            cpu.nmi_maybe = false;
        }
        if cpu.s.rflags & flag::IF == 0 {
            // Nothing else can wake the CPU; what waits is looked at again when IF is set.
            return Ok(());
        }
        if !cpu.platform.interrupt_pending() {
            cpu.irq_maybe = false;
            return Ok(());
        }
        match cpu.platform.acknowledge() {
            Some(vector) => {
                cpu.counts.interrupts += 1;
                self.deliver(Event::Interrupt(vector))
            }
            None => Ok(()),
        }
    }

    /// What the state has to be delivered before the next instruction. To be called after a state was set.
    pub fn deliver_due(&mut self) -> Result<(), TripleFault> {
        let s = &mut self.cpu.s;
        let Some(due) = s.due.take() else { return Ok(()) };
        let event = match due.kind {
            DueKind::Interrupt => Event::Interrupt(due.vector),
            DueKind::Nmi => {
                s.nmi_blocked = true;
                Event::Nmi
            }
            // RF is in the flags already if it is to be.
            DueKind::Exception(error) => {
                let payload = match due.vector {
                    vector::PF => s.cr2,
                    vector::DB => s.dr[6] & DR6_CONDITIONS,
                    _ => 0,
                };
                Event::Trap(Exception { vector: due.vector, error, payload })
            }
        };
        self.deliver(event)
    }

    /// The state between two instructions. What is to be delivered before the next one is in it.
    pub fn state(&self) -> CpuState {
        let mut state = self.cpu.s.clone();
        // Equal flags have one form.
        state.set_flags(state.flags());
        if self.cpu.pending_debug != 0 {
            state.dr[6] = state.dr[6] & !15 | self.cpu.pending_debug;
            state.due = Some(Due { vector: vector::DB, kind: DueKind::Exception(None) });
        }
        state
    }

    /// Delivers an event, which wakes a halted CPU and ends interrupt shadows.
    fn deliver(&mut self, event: Event) -> Result<(), TripleFault> {
        self.cpu.s.halted = false;
        self.cpu.s.shadow = 0;
        let delivered = self.cpu.deliver(event);
        // The frame on the stack may have overwritten code, the handler's even.
        self.drop_overwritten_code();
        delivered?;
        // A task gate may have led to another address space.
        if self.cpu.flush_jump_cache {
            self.flush_jump_cache();
        }
        Ok(())
    }

    /// Whether `len` bytes at RIP lie inside CS's limit, which may have been another when they were decoded.
    #[inline(always)]
    fn inside_code_segment(&self, len: u64) -> bool {
        let cs = &self.cpu.s.seg[usize::from(seg::CS)];
        self.cpu.mode.has(Mode::FLAT) || self.cpu.s.rip.wrapping_add(len - 1) <= u64::from(cs.limit)
    }

    /// Runs the block at RIP.
    pub(crate) fn run_block(&mut self) -> Result<(), TripleFault> {
        if self.cpu.flush_jump_cache {
            self.flush_jump_cache();
        }
        let id = match self.find_block() {
            Ok(id) => id,
            Err(Trap) => return self.fault(),
        };
        if !self.inside_code_segment(u64::from(self.blocks.get(id).len)) {
            return self.step();
        }
        if let Some(jit) = &self.jit {
            if jit.has_done() {
                self.install_regions();
                return Ok(());
            }
            let code = self.blocks.get(id).runs.code;
            if code != 0 {
                return self.run_compiled(code);
            }
        }
        self.interpret(id)
    }

    /// Runs compiled code from the entry of block `id`.
    fn run_compiled(&mut self, code: u64) -> Result<(), TripleFault> {
        let Some(jit) = &self.jit else { return Ok(()) };
        self.counts.entries += 1;
        self.cpu.begin_instruction();
        self.cpu.jit.exit_reason = reason::NEXT;
        if self.cpu.journal.is_some() {
            if let Err(difference) = self.run_compared(code) {
                self.difference = Some(difference);
                self.cpu.kick.request(Kick::STOP);
                return Ok(());
            }
        } else {
            jit.enter(&mut self.cpu, code);
            self.cpu.fold_flags();
        }
        if let Some(count) = self.counts.exits.get_mut(self.cpu.jit.exit_reason as usize) {
            *count += 1;
        }
        if self.cpu.jit.asking != 0 {
            self.lead_bridge();
        }
        match self.cpu.jit.exit_reason {
            reason::LOOK => match self.find_block() {
                Ok(id) => {
                    self.look(id);
                    Ok(())
                }
                Err(Trap) => self.fault(),
            },
            reason::INTERPRET => {
                if self.cpu.jit.until_stray < 0 {
                    self.stray();
                }
                match self.find_block() {
                    Ok(id) => self.interpret(id),
                    Err(Trap) => self.fault(),
                }
            }
            reason::FAULT => self.after(Err(Trap)),
            reason::STOP => self.after(Ok(())),
            _ => Ok(()),
        }
    }

    /// Tells the bridge that asks the way to RIP, if it is known; else the dispatch loop is about to find out, for when the
    /// bridge asks again.
    fn lead_bridge(&mut self) {
        let bridge = std::mem::take(&mut self.cpu.jit.asking);
        let Some(jit) = self.jit.as_mut().filter(|_| self.cpu.journal.is_none()) else { return };
        let place = self.cpu.code_place(self.cpu.s.rip);
        let known = self.cpu.jump.find(place).filter(|_| !self.cpu.flush_jump_cache);
        let known = known.or_else(|| self.cpu.find_way().map(|(id, _)| id));
        let to = known.map(|id| self.blocks.get(id)).map(|block| ((block.gpa, block.mode.0), block.next_page));
        self.counts.bridged += u64::from(jit.lead(bridge, place.key, to));
    }

    /// Takes compiled regions into use.
    #[cold]
    fn install_regions(&mut self) {
        if let Some(jit) = &mut self.jit {
            jit.install();
        }
        self.follow_regions();
    }

    /// Brings blocks, jump cache and code marks up to date with the regions that came and went.
    fn follow_regions(&mut self) {
        let Some(jit) = &mut self.jit else { return };
        let mut doubtful = Vec::new();
        for change in jit.changes() {
            match change {
                Change::Code((gpa, mode), runs) => {
                    let Some(id) = self.blocks.find(gpa, Mode(mode)) else { continue };
                    let block = self.blocks.get_mut(id);
                    block.runs = runs;
                    let in_page = block.next_page.is_none();
                    if runs.code != 0 {
                        self.blocks.drop_insns(id);
                    }
                    let code = if self.cpu.journal.is_none() { runs.code } else { 0 };
                    self.cpu.jump.set_code(id, code);
                    if in_page {
                        self.cpu.jump.know(gpa, Mode(mode), id, code);
                    }
                }
                Change::Cool((gpa, mode)) => {
                    if let Some(id) = self.blocks.find(gpa, Mode(mode)) {
                        self.blocks.get_mut(id).heat = 0;
                    }
                }
                Change::Evicted((gpa, mode)) => {
                    if let Some(id) = self.blocks.find(gpa, Mode(mode)) {
                        let block = self.blocks.get_mut(id);
                        block.evicted = (block.evicted + 1).min(EVICTIONS);
                    }
                }
                Change::Mark(page, granules) => {
                    if self.cpu.ram.mark_code(page, granules) {
                        self.cpu.protect_code(page);
                        doubtful.push((page, granules));
                    }
                }
            }
        }
        // Others may have stored to a page while nothing of it was marked.
        if self.cpu.peers.is_some() {
            doubtful.into_iter().for_each(|(page, granules)| self.invalidate(page, granules));
        }
    }

    /// Notes that quick code was found at a block, which stands for all the times since it was looked for last. One that has
    /// no code yet, where quick code goes on, is counted as it is interpreted.
    #[cold]
    fn look(&mut self, id: BlockId) {
        let interval = LOOK.min(self.threshold);
        self.cpu.jit.until_look = interval.into();
        let block = self.blocks.get_mut(id);
        if block.runs.code != 0 && block.heat < self.threshold {
            block.heat = block.heat.saturating_add(interval).min(self.threshold);
            if block.heat == self.threshold {
                self.request_region(id);
            }
        }
    }

    /// Notes that the access of the instruction at RIP is not where it was last, which stands for all since the one before.
    #[cold]
    fn stray(&mut self) {
        self.cpu.jit.until_stray = STRAYS.into();
        // If there is no more code at RIP, that is for whoever goes on to find.
        let Ok(id) = self.find_block() else { return };
        let block = self.blocks.get(id);
        if let Some(jit) = &mut self.jit {
            jit.stray((block.gpa, block.mode.0));
            self.follow_regions();
        }
    }

    /// Asks for a region at a block that has become hot.
    #[cold]
    fn request_region(&mut self, id: BlockId) {
        let Some(jit) = &mut self.jit else { return };
        let block = self.blocks.get(id);
        // What has been asked for is on its way.
        if !Jit::compiles(block.mode) || block.runs.in_region() || block.heat > self.threshold {
            return;
        }
        // A page that keeps being rewritten is interpreted for longer and longer.
        let patience = 1 << (jit.rewrites(block.gpa) / REWRITES).min(8);
        let block = self.blocks.get_mut(id);
        block.postponed += 1;
        if block.postponed < patience {
            block.heat = 0;
            return;
        }
        let block = self.blocks.get(id);
        // Quick code has run often enough to be worth its place.
        let heat = |block: &Block| if block.runs.quick { self.threshold } else { block.heat };
        let Some(mut plan) = Plan::grow(&self.blocks, &self.cpu, block.gpa, block.mode, heat, jit.options) else {
            return;
        };
        plan.rip = self.cpu.s.rip;
        let keys: Vec<_> = plan.keys().collect();
        if !jit.request(plan) {
            let block = self.blocks.get_mut(id);
            block.heat = block.heat.min(self.threshold / 2);
            return;
        }
        // None of them asks again while this region is on its way.
        for (gpa, mode) in keys {
            if let Some(id) = self.blocks.find(gpa, Mode(mode)) {
                self.blocks.get_mut(id).heat = self.threshold + 1;
            }
        }
    }

    /// Gives a block quick code.
    #[cold]
    fn quicken(&mut self, id: BlockId) {
        let block = self.blocks.get(id);
        let Some(jit) = &mut self.jit else { return };
        jit.quicken(block, &self.cpu);
        self.follow_regions();
    }

    /// Interprets a block.
    fn interpret(&mut self, id: BlockId) -> Result<(), TripleFault> {
        self.counts.blocks_run += 1;
        let block = self.blocks.get_mut(id);
        block.heat = block.heat.saturating_add(1);
        if block.runs.code == 0 && self.jit.is_some() {
            self.warm_up(id);
        }
        let indirect = self.blocks.get(id).indirect;
        let insns = self.blocks.insns(id, &self.cpu);
        let cpu = &mut self.cpu;
        cpu.begin_instruction();
        cpu.ip_base = cpu.s.rip;
        cpu.stop_block = false;
        cpu.again = false;
        let (last, body) = match insns.split_last() {
            Some(parts) => parts,
            None => return Ok(()),
        };
        for (k, insn) in body.iter().enumerate() {
            let result = (insn.run)(cpu, insn);
            if result.is_err() || cpu.stop_block {
                self.counts.interpreted += k as u64 + 1;
                let unfinished = result.is_err() || cpu.again;
                let off = if unfinished { u64::from(insn.off) } else { insn.next_off() };
                cpu.s.rip = cpu.cut_ip(cpu.ip_base.wrapping_add(off));
                return self.after(result);
            }
        }
        self.counts.interpreted += insns.len() as u64;
        cpu.s.rip = cpu.next_ip_value(last);
        let (mode, ends) = (cpu.mode, last.sem.ends);
        let result = (last.run)(cpu, last);
        if result.is_err() {
            cpu.s.rip = mode_cut(mode, cpu.ip_base.wrapping_add(u64::from(last.off)));
            return self.fault();
        }
        if indirect {
            let (ip, target) = (cpu.ip_base, cpu.s.rip);
            self.blocks.get_mut(id).note_target(ip, target);
        }
        if ends {
            self.cpu.serialize();
        }
        if self.cpu.stop_block { self.after(Ok(())) } else { Ok(()) }
    }

    /// Has a block compiled that has been interpreted often enough.
    #[inline]
    fn warm_up(&mut self, id: BlockId) {
        let block = self.blocks.get(id);
        match self.quick.filter(|_| block.next_page.is_none() && Jit::compiles(block.mode)) {
            Some(runs) => {
                // Where the indirect branch at the end leads is seen only while the block is interpreted.
                let watched = block.leads_about();
                if block.heat == (if watched { runs * WATCHED } else { runs }) << block.evicted {
                    self.quicken(id);
                }
            }
            None if block.heat == self.threshold.min(THRESHOLD) => self.request_region(id),
            None => {}
        }
    }

    /// Interprets at most `most` instructions of the block at RIP, without deliveries: for lock-step.
    pub(crate) fn interpret_some(&mut self, most: u64) -> Result<u64, Trap> {
        let id = self.find_block()?;
        let insns = self.blocks.insns(id, &self.cpu);
        let cpu = &mut self.cpu;
        cpu.ip_base = cpu.s.rip;
        let mut done = 0;
        for insn in insns.iter().take(most as usize) {
            cpu.s.rip = cpu.next_ip_value(insn);
            if let Err(Trap) = (insn.run)(cpu, insn) {
                cpu.s.rip = mode_cut(cpu.mode, cpu.ip_base.wrapping_add(u64::from(insn.off)));
                return Err(Trap);
            }
            done += 1;
        }
        Ok(done)
    }

    /// What has to happen after an instruction that asked to stop, or failed.
    #[cold]
    #[inline(never)]
    fn after(&mut self, result: Result<(), Trap>) -> Result<(), TripleFault> {
        self.drop_overwritten_code();
        if self.cpu.flush_jump_cache {
            self.flush_jump_cache();
        }
        match result {
            Err(Trap) => self.fault(),
            Ok(()) if std::mem::take(&mut self.cpu.late_fault) => self.fault(),
            Ok(()) if self.debug_trap_due() => self.debug_trap(),
            Ok(()) => Ok(()),
        }
    }

    /// Delivers the exception that the current instruction raised; RIP is at its start.
    #[cold]
    #[inline(never)]
    fn fault(&mut self) -> Result<(), TripleFault> {
        self.drop_overwritten_code();
        match self.cpu.again_how.take() {
            None => {}
            Some(Again::Now) => return Ok(()),
            Some(Again::Alone) => return self.step_alone(),
        }
        let e = self.cpu.raised;
        tracing::trace!("{e:x?} at {:#x}", self.cpu.s.rip);
        self.cpu.pending_debug = 0;
        self.cpu.s.shadow = 0;
        self.cpu.counts.exceptions[usize::from(e.vector & 31)] += 1;
        self.deliver(Event::Fault(e))
    }

    /// Whether debug conditions wait that may be reported now: MOV SS and POP SS hold them back until the instruction
    /// behind them has completed (SDM vol. 3 §6.8.3).
    fn debug_trap_due(&self) -> bool {
        self.cpu.pending_debug != 0 && self.cpu.s.shadow & SHADOW_MOV_SS == 0
    }

    /// Delivers #DB as a trap for the conditions met by the instruction that has just completed.
    fn debug_trap(&mut self) -> Result<(), TripleFault> {
        let conditions = std::mem::take(&mut self.cpu.pending_debug);
        self.cpu.counts.exceptions[usize::from(vector::DB)] += 1;
        self.deliver(Event::Trap(Exception { vector: vector::DB, error: None, payload: conditions }))
    }

    /// Runs exactly one instruction, with single-step and breakpoint checks around it.
    pub(crate) fn step(&mut self) -> Result<(), TripleFault> {
        if self.debug_trap_due() {
            return self.debug_trap();
        }
        self.counts.stepped += 1;
        let single_step = self.cpu.s.rflags & flag::TF != 0;
        let shadow = self.cpu.s.shadow;
        if self.cpu.s.dr[7] & 0xff != 0
            && self.cpu.s.rflags & flag::RF == 0
            && shadow & SHADOW_MOV_SS == 0
            && let Some(hit) = self.cpu.execute_breakpoint()
        {
            self.cpu.counts.exceptions[usize::from(vector::DB)] += 1;
            let e = Exception { vector: vector::DB, error: None, payload: hit };
            return self.deliver(Event::Fault(e));
        }
        let insn = match self.find_block().map(|id| self.blocks.insns(id, &self.cpu).first().copied()) {
            Ok(Some(insn)) if self.inside_code_segment(u64::from(insn.len)) => Ok(insn),
            Ok(_) => self.fetch_one(),
            Err(Trap) => Err(Trap),
        };
        let Ok(insn) = insn else { return self.fault() };
        let cpu = &mut self.cpu;
        let start = cpu.s.rip;
        cpu.ip_base = start;
        cpu.stop_block = false;
        cpu.again = false;
        cpu.s.shadow = 0;
        cpu.begin_instruction();
        let next = cpu.next_ip_value(&insn);
        cpu.s.rip = next;
        self.counts.interpreted += 1;
        let result = (insn.run)(cpu, &insn);
        if result.is_err() {
            cpu.s.rip = start;
            if cpu.again_how.is_some() {
                cpu.s.shadow = shadow;
            }
            return self.after(result);
        }
        // With IA32_DEBUGCTL.BTF only branches taken are stepped (SDM vol. 3 §17.4.3).
        let stepped = cpu.s.msr.debugctl & DEBUGCTL_BTF == 0 || (cpu.s.rip != next && cpu.s.rip != start);
        let traps = cpu.s.rflags & flag::TF != 0 || !clears_trap_flag(&insn);
        if single_step && stepped && traps && cpu.s.shadow & SHADOW_MOV_SS == 0 {
            cpu.pending_debug |= DR6_BS;
        }
        self.after(Ok(()))
    }

    /// Decodes the one instruction at RIP, without caching it.
    fn fetch_one(&mut self) -> Result<Insn, Trap> {
        self.fetch_bytes().map(|(insn, _)| insn)
    }

    /// Decodes the one instruction at RIP; its bytes too.
    fn fetch_bytes(&mut self) -> Result<(Insn, [u8; MAX_LEN]), Trap> {
        let mut bytes = [0; MAX_LEN];
        let mut have = 0;
        loop {
            have += self.fetch(have, &mut bytes)?;
            match decode::decode(&bytes[..have], self.cpu.mode, &self.cpu.model) {
                Ok(insn) => return Ok((insn, bytes)),
                Err(decode::NeedMoreBytes) if have < MAX_LEN => {}
                Err(decode::NeedMoreBytes) => return Err(self.cpu.gp(0)),
            }
        }
    }

    /// Fetches instruction bytes from `rip + have` up to the end of that page, of CS, or of `out`; at least one.
    pub(crate) fn fetch(&mut self, have: usize, out: &mut [u8; MAX_LEN]) -> Result<usize, Trap> {
        let cpu = &mut self.cpu;
        let ip = cpu.s.rip.wrapping_add(have as u64);
        let mut n = MAX_LEN - have;
        let linear = if cpu.mode.has(Mode::CODE64) {
            ip
        } else {
            let cs: &Segment = &cpu.s.seg[usize::from(seg::CS)];
            let left = (u64::from(cs.limit) + 1).saturating_sub(ip);
            if left == 0 {
                return Err(cpu.gp(0));
            }
            n = n.min(left as usize);
            cs.base.wrapping_add(ip) & 0xffff_ffff
        };
        n = n.min((PAGE_SIZE - (linear & PAGE_MASK)) as usize);
        let gpa = cpu.translate_code(linear)?;
        if !cpu.ram.read_in_page(gpa, &mut out[have..have + n]) {
            // Code in MMIO space: what the bus reads.
            for (k, b) in out[have..have + n].iter_mut().enumerate() {
                *b = cpu.platform.mmio_read(gpa + k as u64, 1) as u8;
            }
        }
        Ok(n)
    }

    /// The linear address of RIP.
    #[inline(always)]
    fn linear_rip(&self) -> u64 {
        let s = &self.cpu.s;
        if self.cpu.mode.has(Mode::CODE64) {
            s.rip
        } else {
            s.seg[usize::from(seg::CS)].base.wrapping_add(s.rip) & 0xffff_ffff
        }
    }

    /// The block at RIP: from the jump cache, the block cache, or freshly decoded.
    #[inline(always)]
    fn find_block(&mut self) -> Result<BlockId, Trap> {
        let linear = self.linear_rip();
        match self.cpu.jump.find(self.cpu.code_place(linear)) {
            Some(id) => Ok(id),
            None => self.find_block_slow(linear),
        }
    }

    #[cold]
    #[inline(never)]
    fn find_block_slow(&mut self, linear: u64) -> Result<BlockId, Trap> {
        self.counts.jump_misses += 1;
        if self.cpu.flush_jump_cache {
            self.flush_jump_cache();
        }
        let gpa = self.cpu.translate_code(linear)?;
        if let Some((id, _)) = self.cpu.enter_known(linear, gpa) {
            return Ok(id);
        }
        let mut id = match self.blocks.find(gpa, self.cpu.mode) {
            Some(id) => id,
            None => self.decode_block(gpa)?,
        };
        let block = self.blocks.get(id);
        if let Some(page) = block.next_page {
            // The second page must be the one that was decoded. Having been asked for, its translation can't change
            // without the entry being dropped, as for the first.
            let next = self.cpu.wrap_linear(linear.wrapping_add(u64::from(block.len) - 1));
            let len = block.len;
            if self.cpu.translate_code(next & !PAGE_MASK)? & !PAGE_MASK != page {
                let first = gpa & !PAGE_MASK;
                self.invalidate(first, crate::mem::granule_mask(gpa & PAGE_MASK, u64::from(len)));
                id = self.decode_block(gpa)?;
            }
        }
        let block = self.blocks.get(id);
        let code = if self.cpu.journal.is_none() { block.runs.code } else { 0 };
        if code != 0 && block.next_page.is_none() {
            self.cpu.jump.know(gpa, block.mode, id, code);
        }
        self.cpu.jump.insert(self.cpu.code_place(linear), id, code);
        Ok(id)
    }

    /// Decodes the block at RIP, whose physical address is `gpa`, and caches it.
    fn decode_block(&mut self, gpa: u64) -> Result<BlockId, Trap> {
        let start = self.cpu.s.rip;
        let room = PAGE_SIZE - (gpa & PAGE_MASK);
        let limit = if self.cpu.mode.has(Mode::CODE64) {
            room
        } else {
            (u64::from(self.cpu.s.seg[usize::from(seg::CS)].limit) + 1).saturating_sub(start).min(room)
        };
        let mut bytes = [0; decode::MAX_BYTES];
        let there = &mut bytes[..decode::MAX_BYTES.min(limit as usize)];
        let there = if self.cpu.ram.read_in_page(gpa, there) { there } else { &mut [] };
        let mut off = decode::straight(there, self.cpu.mode, &self.cpu.model, &mut self.decoded) as u64;
        let in_ram = !self.decoded.is_empty();
        let mut next_page = None;
        if !in_ram {
            // The first instruction crosses the page or CS's limit, or is not in RAM.
            let (insn, fetched) = self.fetch_bytes()?;
            off = u64::from(insn.len);
            bytes[..MAX_LEN].copy_from_slice(&fetched);
            let linear = self.linear_rip();
            if off > room {
                let next = self.cpu.wrap_linear(linear.wrapping_add(room));
                next_page = Some(self.cpu.translate_code(next)? & !PAGE_MASK);
            }
            self.decoded.push(insn);
        }
        if self.blocks.is_full(self.decoded.len()) {
            let jit = self.jit.as_ref();
            self.blocks.clear(&self.cpu.ram, |page| jit.map_or(0, |jit| jit.granules(page)));
            if let Some(jit) = &mut self.jit {
                jit.cancel_pending();
            }
            self.cpu.jump.forget_blocks();
            self.flush_jump_cache();
        }
        let runs = self.jit.as_ref().map_or(Runs::default(), |j| j.find((gpa, self.cpu.mode.0), next_page));
        let mut block = Block::new(gpa, self.cpu.mode, off as u16, next_page, &self.decoded, in_ram);
        block.runs = runs;
        let (id, fresh) = self.blocks.insert(block, &self.cpu.ram);
        for page in fresh.into_iter().flatten() {
            self.cpu.protect_code(page);
        }
        if self.cpu.peers.is_some() && self.cpu.ram.host_page(gpa).is_some() {
            fresh.into_iter().flatten().for_each(|page| self.have_others_protect(page));
            // From here on whoever overwrites them says so. What was stored before that is found now.
            if !self.cpu.ram.holds(gpa, next_page, &bytes[..off as usize]) {
                self.invalidate(gpa & !PAGE_MASK, crate::mem::granule_mask(gpa & PAGE_MASK, off));
                return Err(self.cpu.try_again(Again::Now));
            }
        }
        Ok(id)
    }

    /// Has no other vCPU's stores to a page take the fast path, now that it is marked as code.
    fn have_others_protect(&mut self, page: u64) {
        let Some(peers) = self.cpu.peers.clone() else { return };
        let ram = self.cpu.ram.clone();
        let others: Vec<usize> = ram.others_fast(page).collect();
        let is_fast = |vcpu| ram.others_fast(page).any(|other| other == vcpu);
        peers.protected(&others, page, is_fast, || {
            let asked = peers.take_protect(self.cpu.index);
            asked.into_keys().for_each(|page| self.cpu.protect_code(page));
        });
    }

    /// Drops the translations of code that stores have overwritten.
    fn drop_overwritten_code(&mut self) {
        if self.cpu.smc.is_empty() {
            return;
        }
        for (page, granules) in std::mem::take(&mut self.cpu.smc) {
            self.invalidate(page, granules);
        }
    }

    /// Drops blocks and regions that touch `granules` of a page.
    fn invalidate(&mut self, page: u64, granules: u64) {
        let mut kept = 0;
        if let Some(jit) = &mut self.jit {
            jit.invalidate(page, granules);
            kept = jit.granules(page);
        }
        let gone = self.blocks.invalidate(page, granules, kept, &self.cpu.ram);
        self.forget(&gone);
        self.follow_regions();
    }

    /// Removes blocks that are gone from the jump cache.
    fn forget(&mut self, gone: &[BlockId]) {
        for &id in gone {
            let block = self.blocks.get(id);
            self.cpu.jump.know(block.gpa, block.mode, id, 0);
            self.cpu.jump.remove(id);
        }
    }

    /// Empties the jump cache, and has no bridge lead anywhere.
    pub(crate) fn flush_jump_cache(&mut self) {
        self.cpu.flush_jump_cache = false;
        if self.cpu.next_generation() {
            self.cpu.jump.clear();
            if let Some(jit) = &mut self.jit {
                jit.part_bridges();
            }
        }
    }
}

/// Interrupt shadow of STI.
pub const SHADOW_STI: u8 = 1;
/// Interrupt and debug shadow of MOV SS and POP SS.
pub const SHADOW_MOV_SS: u8 = 2;
/// IA32_DEBUGCTL.BTF: single-step on branches.
const DEBUGCTL_BTF: u64 = 1 << 1;
/// DR6.BS: single step.
pub const DR6_BS: u64 = 1 << 14;

/// An event to deliver through the IDT.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// A fault (or abort): RIP is at the instruction, RF is set in the pushed flags.
    Fault(Exception),
    /// A trap-class exception: RIP is behind the instruction.
    Trap(Exception),
    /// An external interrupt.
    Interrupt(u8),
    /// The non-maskable interrupt.
    Nmi,
}

/// An exception while a double fault was delivered: shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TripleFault;

/// Whether an instruction that clears TF is not single-stepped: software interrupts, whose delivery clears it, and
/// SYSCALL and SYSRET, which are judged by the flag they leave.
fn clears_trap_flag(insn: &Insn) -> bool {
    use iced_x86::Mnemonic::*;
    matches!(insn.iced_code().mnemonic(), Int | Int1 | Int3 | Into | Syscall | Sysret | Sysretq)
}
