//! From a planned region to host code: one Cranelift function each.

use std::sync::Arc;
use std::time::Instant;

use cranelift_codegen::Context;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::ir::types::I64;
use cranelift_codegen::ir::{AbiParam, Function, InstBuilder, Signature, UserFuncName};
use cranelift_codegen::isa::{CallConv, TargetIsa};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};

use crate::jit::emit::JitEmit;
use crate::jit::host;
use crate::jit::region::Plan;

/// A compiled region.
pub struct Compiled {
    /// Position-independent host code.
    pub code: Vec<u8>,
    /// Time that it took.
    pub nanos: u64,
}

/// Blocks above which a compiler's working memory is given back after use.
const LARGE: usize = 20;

/// One thread's compiler.
pub struct Compiler {
    isa: Arc<dyn TargetIsa>,
    context: Context,
    builder: FunctionBuilderContext,
}

impl Compiler {
    /// A compiler for this host.
    pub fn new() -> Result<Compiler, String> {
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
        Ok(Compiler { isa, context: Context::new(), builder: FunctionBuilderContext::new() })
    }

    /// Code of compiled regions: the CPU in, nothing out.
    fn region_signature(&self) -> Signature {
        let mut s = Signature::new(CallConv::Tail);
        s.params.push(AbiParam::new(I64));
        s
    }

    /// Helpers: the CPU and three words.
    fn helper_signature(&self) -> Signature {
        let mut s = Signature::new(CallConv::SystemV);
        s.params.extend([AbiParam::new(I64); 4]);
        s
    }

    /// Compiles a region.
    pub fn compile(&mut self, plan: &Plan) -> Result<Compiled, String> {
        let start = Instant::now();
        let signature = self.region_signature();
        let helper = self.helper_signature();
        self.context.func = Function::with_name_signature(UserFuncName::default(), signature.clone());
        let mut b = FunctionBuilder::new(&mut self.context.func, &mut self.builder);
        let helper = b.import_signature(helper);
        let tail = b.import_signature(signature);
        let b = JitEmit::new(b, plan, helper, tail).emit();
        b.finalize(self.isa.frontend_config());
        let code = self.finish()?;
        if plan.blocks.len() > LARGE {
            self.context = Context::new();
        }
        Ok(Compiled { code, nanos: start.elapsed().as_nanos() as u64 })
    }

    /// `extern "C" fn(cpu, code)`: calls compiled code.
    pub fn trampoline(&mut self) -> Result<Vec<u8>, String> {
        let mut signature = Signature::new(CallConv::SystemV);
        signature.params.extend([AbiParam::new(I64); 2]);
        let region = self.region_signature();
        self.context.func = Function::with_name_signature(UserFuncName::default(), signature);
        let mut b = FunctionBuilder::new(&mut self.context.func, &mut self.builder);
        let block = b.create_block();
        b.append_block_params_for_function_params(block);
        b.switch_to_block(block);
        let (cpu, code) = (b.block_params(block)[0], b.block_params(block)[1]);
        let region = b.import_signature(region);
        b.ins().call_indirect(region, code, &[cpu]);
        b.ins().return_(&[]);
        b.seal_all_blocks();
        b.finalize(self.isa.frontend_config());
        self.finish()
    }

    /// A region that returns at once.
    pub fn stub(&mut self) -> Result<Vec<u8>, String> {
        self.context.func = Function::with_name_signature(UserFuncName::default(), self.region_signature());
        let mut b = FunctionBuilder::new(&mut self.context.func, &mut self.builder);
        let block = b.create_block();
        b.append_block_params_for_function_params(block);
        b.switch_to_block(block);
        b.ins().return_(&[]);
        b.seal_all_blocks();
        b.finalize(self.isa.frontend_config());
        self.finish()
    }

    fn finish(&mut self) -> Result<Vec<u8>, String> {
        let result = self.context.compile(&*self.isa, &mut ControlPlane::default());
        let code = match result {
            // Code that refers to anything by a relocation would not be position independent.
            Ok(c) if c.buffer.relocs().is_empty() => Ok(c.code_buffer().to_vec()),
            Ok(c) => Err(format!("needs a library call: {:?}", c.buffer.relocs().first())),
            Err(e) => Err(format!("{:?}", e.inner)),
        };
        self.context.clear();
        code
    }
}
