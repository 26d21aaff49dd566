//! Operand widths as types, so that the semantics of an instruction are specialised for each at compile time.

/// An integer operand width.
pub trait Width: Copy + 'static {
    /// Width in bits: 8, 16, 32 or 64.
    const BITS: u32;
    /// Width in bytes.
    const BYTES: u64 = (Self::BITS / 8) as u64;
    /// All bits of the width set.
    const MASK: u64 = u64::MAX >> (64 - Self::BITS);
    /// The most significant bit of the width.
    const SIGN: u64 = 1 << (Self::BITS - 1);

    /// `value` cut to the width, zero-extended.
    #[inline(always)]
    fn zext(value: u64) -> u64 {
        value & Self::MASK
    }

    /// `value` cut to the width, sign-extended to 64 bits.
    #[inline(always)]
    fn sext(value: u64) -> u64 {
        (((value << (64 - Self::BITS)) as i64) >> (64 - Self::BITS)) as u64
    }
}

macro_rules! widths {
    ($($name:ident $bits:literal),*) => {$(
        #[doc = concat!("Operands of ", stringify!($bits), " bits.")]
        #[derive(Clone, Copy, Debug)]
        pub struct $name;
        impl Width for $name {
            const BITS: u32 = $bits;
        }
    )*};
}

widths!(W8 8, W16 16, W32 32, W64 64);
