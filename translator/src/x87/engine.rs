//! The arithmetic engine: what computes results, apart from the register stack that holds them.

use super::F80;

/// An arithmetic operation on ST(0) and, where it has two operands, a second one (`a` and `b` below).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// a + b.
    Add,
    /// a × b.
    Mul,
    /// a − b.
    Sub,
    /// b − a.
    SubR,
    /// a ÷ b.
    Div,
    /// b ÷ a.
    DivR,
    /// √a.
    Sqrt,
    /// a rounded to an integer.
    RoundInt,
    /// a × 2^trunc(b).
    Scale,
    /// Partial remainder of a ÷ b, quotient truncated.
    Prem,
    /// Partial remainder of a ÷ b, quotient rounded to nearest.
    Prem1,
    /// Exponent (value) and significand (second) of a.
    Xtract,
    /// 2^a − 1.
    F2xm1,
    /// b × log₂ a.
    Yl2x,
    /// b × log₂(a + 1).
    Yl2xp1,
    /// Tangent of a (value) and 1 (second).
    Ptan,
    /// Angle of the point (a, b).
    Patan,
    /// Sine of a.
    Sin,
    /// Cosine of a.
    Cos,
    /// Sine (value) and cosine (second) of a.
    SinCos,
}

/// What an operation gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// The result; meaningless if `status` holds an unmasked IE, DE or ZE.
    pub value: F80,
    /// What the operations with two results push after `value`.
    pub second: F80,
    /// Exception flags raised and condition codes, at their places in the status word.
    pub status: u16,
}

impl Outcome {
    /// One result with its flags.
    pub(super) fn new(value: F80, status: u16) -> Outcome {
        Outcome { value, second: value, status }
    }
}

/// Something that computes. Implementations honour the rounding control, precision control and exception masks of
/// control word `cw`, hold no state and leave no trace in the host's floating-point environment.
pub trait Engine {
    /// Computes `operation` on `a` and `b`; those with one operand ignore `b`.
    fn run(operation: Operation, a: F80, b: F80, cw: u16) -> Outcome;
}
