//! The x86-64 CPU: one semantics, interpreted while cold and compiled by Cranelift when hot.
