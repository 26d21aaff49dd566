//! From a planned region to host code: one Cranelift function each.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use cranelift_codegen::Context;
use cranelift_codegen::binemit::Reloc;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{
    AbiParam, ExternalName, Function, InstBuilder, MemFlagsData, Signature, UserFuncName, Value,
};
use cranelift_codegen::isa::{CallConv, TargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::{FinalizedMachReloc, FinalizedRelocTarget};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};

use crate::code::{HostIsa, elide_frame, lead};
use crate::cpu::ANCHOR;
use crate::insn::Insn;
use crate::jit::access::site_thunk;
use crate::jit::emit::{Emitted, Helper, JitEmit, Signatures, at, name};
use crate::jit::frame::HELPERS;
use crate::jit::host;
use crate::jit::leave;
use crate::jit::region::Plan;
use crate::jit::strays::DEAR;
use crate::quick::{Entered, Quick, Routine, cross};

/// A direct branch out of a region.
#[derive(Clone, Copy, Debug)]
pub struct Branch {
    /// Its site in the code ([`crate::code`]).
    pub site: usize,
    /// The page offset it leads to; `None` for wherever RIP says.
    pub to: Option<u64>,
    /// Where in the code it leads while nothing else runs at `to`; `None` for wherever RIP says.
    pub otherwise: Option<usize>,
    /// Whether it is quick code's.
    pub quick: bool,
}

/// What code has the address of.
#[derive(Clone, Copy, Debug)]
pub enum Referent {
    /// One of [`Compiled::insns`].
    Insn(usize),
    /// One of the region's bridges.
    Bridge(usize),
    /// The name of one, not its address.
    Name(usize),
}

/// A compiled region. Its code is position independent but for its branches and the addresses of instructions and
/// bridges.
pub struct Compiled {
    /// Host code.
    pub code: Vec<u8>,
    /// Where direct branches of other regions enter it.
    pub tail: usize,
    /// Where quick code is entered by quick code; 0 for regions.
    pub inner: usize,
    /// Direct branches out of it.
    pub branches: Vec<Branch>,
    /// Instructions that helpers evaluate.
    pub insns: Vec<Insn>,
    /// How many bridges it has ([`crate::jit::bridge`]).
    pub bridges: usize,
    /// From which on they are quick code's.
    pub quick_bridges: usize,
    /// Where the code holds an address, and of what: 8 bytes at this offset.
    pub addresses: Vec<(usize, Referent)>,
    /// Of each bridge, where the code has its key, 8 bytes, and the patchable site of the branch that it is for; none where
    /// bridges themselves say where they lead.
    pub crossings: Vec<(usize, usize)>,
    /// Displacements of 32 bits to code that quick code shares.
    pub calls: Vec<(usize, Routine)>,
    /// Time that it took.
    pub nanos: u64,
}

/// One thread's compiler.
pub struct Compiler {
    isa: Arc<dyn TargetIsa>,
    context: Context,
    builder: FunctionBuilderContext,
    /// Makes the slow versions of blocks.
    quick: Option<Quick>,
}

impl Compiled {
    /// Appends the quick code of a block; where regions enter it.
    fn append(&mut self, block: Compiled) -> usize {
        // Its patchable places are patchable still.
        self.code.resize(self.code.len().next_multiple_of(8), 0);
        let base = self.code.len();
        self.code.extend(block.code);
        let branch = |b: Branch| Branch { site: base + b.site, otherwise: b.otherwise.map(|at| base + at), ..b };
        self.branches.extend(block.branches.into_iter().map(branch));
        for (at, referent) in block.addresses {
            let referent = match referent {
                Referent::Insn(n) => Referent::Insn(self.insns.len() + n),
                Referent::Bridge(n) => Referent::Bridge(self.bridges + n),
                Referent::Name(n) => Referent::Name(self.bridges + n),
            };
            self.addresses.push((base + at, referent));
        }
        self.insns.extend(block.insns);
        if !block.crossings.is_empty() {
            self.crossings.resize(self.bridges, (0, 0));
        }
        self.crossings.extend(block.crossings.into_iter().map(|(key, site)| (base + key, base + site)));
        self.bridges += block.bridges;
        self.calls.extend(block.calls.into_iter().map(|(at, routine)| (base + at, routine)));
        base + block.tail
    }
}

impl Compiler {
    /// A compiler for this host.
    pub fn new() -> Result<Compiler, String> {
        if let Some(missing) = host::lacks() {
            return Err(format!("it has no {missing}"));
        }
        let mut flags = settings::builder();
        let settings = [
            ("opt_level", "none"),
            ("enable_verifier", if cfg!(debug_assertions) { "true" } else { "false" }),
            ("unwind_info", "false"),
            // Tail calls need it on x86-64.
            ("preserve_frame_pointers", "true"),
        ];
        for (name, value) in settings {
            flags.set(name, value).map_err(|e| e.to_string())?;
        }
        let triple = std::env::consts::ARCH;
        let mut builder = cranelift_codegen::isa::lookup_by_name(&format!("{triple}-unknown-linux-gnu"))
            .map_err(|e| e.to_string())?;
        for f in host::features() {
            builder.enable(f).map_err(|e| e.to_string())?;
        }
        let isa = builder.finish(settings::Flags::new(flags)).map_err(|e| e.to_string())?;
        let quick = HostIsa::native().map(Quick::new);
        Ok(Compiler { isa, context: Context::new(), builder: FunctionBuilderContext::new(), quick })
    }

    /// Code of compiled regions: the CPU in, nothing out.
    fn region_signature(&self) -> Signature {
        let mut s = Signature::new(CallConv::Tail);
        s.params.push(AbiParam::new(I64));
        s
    }

    /// Helpers: the CPU and three words.
    fn helper_signature(&self, convention: CallConv) -> Signature {
        let mut s = Signature::new(convention);
        s.params.extend([AbiParam::new(I64); 4]);
        s
    }

    /// Compiles a region.
    pub fn compile(&mut self, plan: &Plan) -> Result<Compiled, String> {
        let start = Instant::now();
        let signature = self.region_signature();
        let helper = self.helper_signature(CallConv::PreserveAll);
        let evaluate = self.helper_signature(CallConv::SystemV);
        self.context.func = Function::with_name_signature(UserFuncName::default(), signature.clone());
        let mut b = FunctionBuilder::new(&mut self.context.func, &mut self.builder);
        let signatures = Signatures {
            helper: b.import_signature(helper),
            evaluate: b.import_signature(evaluate),
            tail: b.import_signature(signature),
        };
        let (b, Emitted { links, insns, bridges, slow, pieces }) = JitEmit::new(b, plan, signatures).emit();
        b.finalize(self.isa.frontend_config());
        let Finished { code, mut relocations, jumps } = self.finish()?;
        // Its working memory, megabytes behind a large region, goes back.
        self.context = Context::new();
        let mut compiled = Compiled {
            code,
            tail: 0,
            inner: 0,
            branches: Vec::new(),
            insns,
            bridges,
            quick_bridges: bridges,
            addresses: Vec::new(),
            crossings: Vec::new(),
            calls: Vec::new(),
            nanos: 0,
        };
        if HostIsa::native() == Some(HostIsa::X86_64) {
            let (tail_calls, sites): (Vec<_>, Vec<_>) = relocations
                .iter_mut()
                .filter(|r| name::TAIL_CALLS.contains(&r.namespace))
                .map(|r| (r.offset, &mut r.offset))
                .unzip();
            let elided = elide_frame(&mut compiled.code, &tail_calls, &jumps).ok_or("a tail call of another form")?;
            compiled.tail = elided.entry;
            sites.into_iter().zip(elided.sites).for_each(|(site, now)| *site = now);
        }
        let pieces = append(&mut compiled.code, &pieces);
        let mut to_slow = Vec::new();
        for Relocation { offset, kind, namespace, index } in relocations {
            match (namespace, kind) {
                (name::LINK, Reloc::X86CallPCRel4 | Reloc::Arm64Call) => {
                    let to = links.get(index).copied();
                    compiled.branches.push(Branch { site: offset, to, otherwise: None, quick: false });
                }
                (name::LOOKUP, Reloc::X86CallPCRel4 | Reloc::Arm64Call) => {
                    compiled.branches.push(Branch { site: offset, to: None, otherwise: None, quick: false });
                }
                (name::CROSS, Reloc::X86CallPCRel4) => {
                    let start = compiled.code.len();
                    let crossing = cross::append(&mut compiled.code);
                    lead(HostIsa::X86_64, &mut compiled.code, offset, 0, start).ok_or("a way out has no place")?;
                    compiled.addresses.push((crossing.bridge, Referent::Name(index)));
                    compiled.calls.push((crossing.missed, Routine::Missed));
                    compiled.crossings.resize(bridges, (0, 0));
                    let way = compiled.crossings.get_mut(index).zip(crossing.way);
                    let (at, way) = way.ok_or("a way out of no number")?;
                    *at = way;
                }
                (name::INSN, Reloc::Abs8) => compiled.addresses.push((offset, Referent::Insn(index))),
                (name::BRIDGE, Reloc::Abs8) => compiled.addresses.push((offset, Referent::Bridge(index))),
                (name::PIECE, Reloc::X86CallPCRel4) if index < pieces.len() => {
                    let piece = pieces[index];
                    lead(HostIsa::X86_64, &mut compiled.code, offset, 0, piece)
                        .ok_or("a call of a piece has no place")?;
                }
                (name::SLOW, Reloc::X86CallPCRel4 | Reloc::Arm64Call) => to_slow.push((offset, index)),
                other => return Err(format!("relocation {other:?} at {offset}")),
            }
        }
        for (site, index) in to_slow {
            let host = HostIsa::native().zip(self.quick);
            let (&(block, from), (native, quick)) = slow.get(index).zip(host).ok_or("a slow version of no number")?;
            let insns = &plan.blocks[block].insns[from..];
            let start = insns[0].off;
            let insns: Vec<Insn> = insns.iter().map(|i| Insn { off: i.off - start, ..*i }).collect();
            let compile =
                |strays| quick.compile(&insns, plan.mode, start.into(), plan.options, Entered::Instead { strays });
            let mut made = compile(0);
            if !made.insns.is_empty() {
                made = compile(DEAR * made.insns.len() as i32);
            }
            let start = compiled.append(made);
            lead(native, &mut compiled.code, site, 0, start).ok_or("a slow version has no place")?;
        }
        compiled.nanos = start.elapsed().as_nanos() as u64;
        Ok(compiled)
    }

    /// Compiles a function of one block, whose parameters `body` gets; it refers to nothing outside.
    fn stub_function(
        &mut self,
        signature: Signature,
        body: impl FnOnce(&mut FunctionBuilder<'_>, &[Value]),
    ) -> Result<Vec<u8>, String> {
        self.context.func = Function::with_name_signature(UserFuncName::default(), signature);
        let mut b = FunctionBuilder::new(&mut self.context.func, &mut self.builder);
        let block = b.create_block();
        b.append_block_params_for_function_params(block);
        b.switch_to_block(block);
        let params = b.block_params(block).to_vec();
        body(&mut b, &params);
        b.seal_all_blocks();
        b.finalize(self.isa.frontend_config());
        match self.finish()? {
            Finished { code, relocations, .. } if relocations.is_empty() => Ok(code),
            Finished { relocations, .. } => Err(format!("{relocations:?}")),
        }
    }

    /// A region that returns at once.
    pub fn stub(&mut self) -> Result<Vec<u8>, String> {
        self.stub_function(self.region_signature(), |b, _| {
            b.ins().return_(&[]);
        })
    }

    /// A region that goes where the jump cache says for RIP ([`leave::lookup`]).
    pub fn lookup(&mut self) -> Result<Vec<u8>, String> {
        let signature = self.region_signature();
        self.stub_function(signature.clone(), |b, params| {
            let tail = b.import_signature(signature);
            leave::lookup(b, params[0], tail);
        })
    }

    /// A region that goes where RIP says though the jump cache does not know ([`leave::way`]).
    pub fn way(&mut self) -> Result<Vec<u8>, String> {
        let signature = self.region_signature();
        let mut find = Signature::new(CallConv::SystemV);
        find.params.push(AbiParam::new(I64));
        find.returns.push(AbiParam::new(I64));
        self.stub_function(signature.clone(), |b, params| {
            let [find, tail] = [find, signature].map(|signature| b.import_signature(signature));
            leave::way(b, params[0], find, tail);
        })
    }

    /// Thunk number `thunk` ([`THUNKS`](crate::jit::frame::THUNKS)), which preserves every register but flags.
    pub fn thunk(&mut self, thunk: usize) -> Result<Vec<u8>, String> {
        match thunk.checked_sub(HELPERS) {
            None => self.helper_thunk(thunk),
            Some(n) => {
                let signature = self.helper_signature(CallConv::PreserveAll);
                self.stub_function(signature.clone(), |b, params| {
                    let signature = b.import_signature(signature);
                    site_thunk(b, params, [Helper::Load, Helper::Store, Helper::Modify, Helper::Find][n], signature);
                })
            }
        }
    }

    /// Calls helper number `helper`.
    fn helper_thunk(&mut self, helper: usize) -> Result<Vec<u8>, String> {
        let callee = self.helper_signature(CallConv::SystemV);
        self.stub_function(self.helper_signature(CallConv::PreserveAll), |b, params| {
            let callee = b.import_signature(callee);
            let f = b.ins().load(I64, MemFlagsData::trusted(), params[0], at!(jit.helpers) + 8 * helper as i32);
            let cpu = b.ins().iadd_imm_s(params[0], -i64::from(ANCHOR));
            b.ins().call_indirect(callee, f, &[&[cpu], &params[1..]].concat());
            b.ins().return_(&[]);
        })
    }

    fn finish(&mut self) -> Result<Finished, String> {
        let result = self.context.compile(&*self.isa, &mut ControlPlane::default());
        let finished = match result {
            Ok(c) => {
                let code = c.code_buffer().to_vec();
                let relocations = c.buffer.relocs().to_vec();
                let jumps = c.buffer.get_srclocs_sorted().iter().filter(|l| l.loc.bits() == leave::TAIL_JUMP);
                let jumps = jumps.map(|l| l.start as usize..l.end as usize).collect();
                let relocations = relocations.iter().map(|r| relocation(&self.context.func, r)).collect();
                let finished = |relocations| Finished { code, relocations, jumps };
                Result::<Vec<_>, _>::map(relocations, finished)
            }
            Err(e) => Err(format!("{:?}", e.inner)),
        };
        self.context.clear();
        finished
    }
}

/// What Cranelift made.
struct Finished {
    code: Vec<u8>,
    relocations: Vec<Relocation>,
    /// Computed tail jumps.
    jumps: Vec<Range<usize>>,
}

/// Appends pieces of code; where each begins.
fn append(code: &mut Vec<u8>, pieces: &[Vec<u8>]) -> Vec<usize> {
    let mut starts = Vec::new();
    for piece in pieces {
        starts.push(code.len());
        code.extend(piece);
    }
    starts
}

/// A relocation whose target is one of our own names ([`name`]).
#[derive(Debug)]
struct Relocation {
    offset: usize,
    kind: Reloc,
    namespace: u32,
    index: usize,
}

fn relocation(f: &Function, r: &FinalizedMachReloc) -> Result<Relocation, String> {
    let FinalizedRelocTarget::ExternalName(ExternalName::User(name)) = &r.target else {
        return Err(format!("needs a library call: {r:?}"));
    };
    let name = &f.params.user_named_funcs()[*name];
    Ok(Relocation { offset: r.offset as usize, kind: r.kind, namespace: name.namespace, index: name.index as usize })
}
