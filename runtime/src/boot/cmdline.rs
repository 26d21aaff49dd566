//! The kernel command line.

use linux_loader::loader::{Cmdline, load_cmdline};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::BootError;

/// Where the command line is put.
pub(super) const ADDRESS: u64 = 0x2_0000;
/// Bytes kept for it, the final NUL included.
pub(super) const AREA: usize = 0x1_0000;

/// Writes `text` to [`ADDRESS`], NUL-terminated. `limit` is the most bytes the kernel takes, without the NUL.
///
/// Blanks around it and around `--` are trimmed.
pub(super) fn write(ram: &GuestMemoryMmap, text: &str, limit: usize) -> Result<(), BootError> {
    let limit = limit.min(AREA - 1);
    let text = text.trim();
    if text.contains('\0') {
        return Err(BootError::CmdlineInvalid("it contains a NUL byte"));
    }
    if text.len() > limit {
        return Err(BootError::CmdlineTooLong { len: text.len(), limit });
    }
    let cmdline = Cmdline::try_from(text, limit + 1).map_err(|_| BootError::CmdlineInvalid("its '--' is misplaced"))?;
    load_cmdline(ram, GuestAddress(ADDRESS), &cmdline)
        .map_err(|_| BootError::CmdlineInvalid("it does not reach guest memory"))
}
