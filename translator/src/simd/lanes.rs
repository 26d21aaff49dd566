//! A 128-bit value as an array of lanes and back. The loops over these arrays are what LLVM vectorises.

use std::array::from_fn;

/// An integer lane type.
pub(super) trait Lane: Copy {
    /// Lane size in bytes.
    const BYTES: usize;
    /// Reads a lane from the start of `bytes`.
    fn read(bytes: &[u8]) -> Self;
    /// Writes the lane to the start of `bytes`.
    fn write(self, bytes: &mut [u8]);
}

macro_rules! lane {
    ($($t:ty)*) => {$(
        impl Lane for $t {
            const BYTES: usize = size_of::<$t>();
            #[inline(always)]
            fn read(bytes: &[u8]) -> Self {
                Self::from_le_bytes(from_fn(|i| bytes[i]))
            }
            #[inline(always)]
            fn write(self, bytes: &mut [u8]) {
                bytes[..Self::BYTES].copy_from_slice(&self.to_le_bytes());
            }
        }
    )*};
}
lane!(u8 u16 u32 u64 i8 i16 i32 i64);

/// The lanes of `x`, lowest first. `N * T::BYTES` is 16, or less to read only the low lanes.
#[inline(always)]
pub(super) fn split<T: Lane, const N: usize>(x: u128) -> [T; N] {
    let bytes = x.to_le_bytes();
    from_fn(|i| T::read(&bytes[i * T::BYTES..]))
}

/// The 128-bit value made of `lanes`; lanes that are not given are zero.
#[inline(always)]
pub(super) fn join<T: Lane, const N: usize>(lanes: [T; N]) -> u128 {
    let mut bytes = [0u8; 16];
    for (i, lane) in lanes.into_iter().enumerate() {
        lane.write(&mut bytes[i * T::BYTES..]);
    }
    u128::from_le_bytes(bytes)
}

/// `f` on each lane of `a`.
#[inline(always)]
pub(super) fn map<T: Lane, const N: usize>(a: u128, f: impl Fn(T) -> T) -> u128 {
    join(split::<T, N>(a).map(f))
}

/// `f` on each pair of lanes of `a` and `b`.
#[inline(always)]
pub(super) fn zip<T: Lane, const N: usize>(a: u128, b: u128, f: impl Fn(T, T) -> T) -> u128 {
    let (a, b) = (split::<T, N>(a), split::<T, N>(b));
    join::<T, N>(from_fn(|i| f(a[i], b[i])))
}

/// A field-less enum whose variants can be listed and numbered, so that compiled code may name an operation by an
/// integer.
macro_rules! op_enum {
    ($(#[$meta:meta])* $name:ident { $($(#[$vmeta:meta])* $variant:ident),* $(,)? }) => {
        $(#[$meta])*
        #[allow(missing_docs)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u16)]
        pub enum $name { $($(#[$vmeta])* $variant),* }

        impl $name {
            /// Every operation, in the order of its number.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// The operation with this number (`op as u16`).
            pub fn from_number(number: u16) -> Option<Self> {
                Self::ALL.get(usize::from(number)).copied()
            }
        }
    };
}
pub(super) use op_enum;
