//! The symbol file by which Linux `perf` names samples in compiled code.
//!
//! `perf report` reads `/tmp/perf-<pid>.map` after the program has ended, so the file is left behind: it is written
//! only when the user asked for it. Addresses are never reassigned in the file; after evictions the newest line wins.

use crate::sync::Mutex;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// An open symbol file.
pub struct PerfMap {
    file: Mutex<File>,
    path: PathBuf,
}

impl PerfMap {
    /// Creates, or empties, the file of this process.
    ///
    /// # Errors
    /// Whatever the file system says; a symbolic link of that name is refused, as anyone may put one there.
    pub fn create() -> io::Result<Self> {
        Self::create_at(PathBuf::from(format!("/tmp/perf-{}.map", std::process::id())))
    }

    fn create_at(path: PathBuf) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        Ok(Self { file: Mutex::new(options.open(&path)?), path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a line: `len` bytes of code at `address` are `name`.
    ///
    /// # Errors
    /// Whatever the file system says; the code itself is not affected.
    pub fn record(&self, address: *const u8, len: usize, name: &str) -> io::Result<()> {
        let name: String = name.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        let line = format!("{:x} {len:x} {name}\n", address as usize);
        self.file.lock().write_all(line.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_perfs_format_and_the_file_stays() {
        let path = std::env::temp_dir().join(format!("diglot-perf-test-{}.map", std::process::id()));
        let map = PerfMap::create_at(path.clone()).unwrap();
        map.record(0x7f00_0000_1000 as *const u8, 0x2c, "guest ffffffff81000000").unwrap();
        map.record(0x10 as *const u8, 1, "two\nlines").unwrap();
        drop(map);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "7f0000001000 2c guest ffffffff81000000\n10 1 two?lines\n");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_symbolic_link_is_refused() {
        let path = std::env::temp_dir().join(format!("diglot-perf-link-{}.map", std::process::id()));
        std::os::unix::fs::symlink("/dev/null", &path).unwrap();
        assert!(PerfMap::create_at(path.clone()).is_err());
        std::fs::remove_file(&path).unwrap();
    }
}
