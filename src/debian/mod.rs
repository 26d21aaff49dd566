//! The `debian` guest: Debian's cloud kernel and BusyBox, fetched once through the host's apt and kept in the user's
//! cache directory.
//!
//! `sources.rs` picks Debian's entries from the host's package sources, `apt.rs` downloads with them without touching
//! the system, `initramfs.rs` builds the guest's root file system around BusyBox.

mod apt;
mod initramfs;
mod sources;

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use thiserror::Error;

use crate::signals;
use crate::terminal::say;

pub use initramfs::{Session, build as initramfs};

const KERNEL: &str = "vmlinuz";
const BUSYBOX: &str = "busybox";
/// Lists the packages, and the length of each file: `vmlinuz <bytes> <package> <version>`.
const MANIFEST: &str = "packages";

/// Why there is no `debian` guest. Each message is one line.
#[derive(Debug, Error)]
pub enum Error {
    /// The host has no apt, or not all of it.
    #[error(
        "{0} is not here, and 'debian' comes through apt; get a kernel and an initrd yourself: diglot run --kernel vmlinuz --initrd initrd.gz --append console=ttyS0"
    )]
    NoApt(&'static str),
    /// Not a Debian host, and nothing to verify Debian's packages with.
    #[error(
        "apt here has no Debian sources, and {0} is missing to verify Debian's own; install debian-archive-keyring, or give --kernel and --initrd"
    )]
    NoSources(&'static str),
    /// Neither variable is set.
    #[error("there is no place to keep the debian guest; set HOME or XDG_CACHE_HOME")]
    NoHome,
    /// The cache can't be used.
    #[error("cannot {what} {path}: {source}", path = .path.display())]
    Cache {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// A program could not be started.
    #[error("cannot run {program}: {source}")]
    Start {
        /// Which.
        program: &'static str,
        /// The host's reason.
        source: io::Error,
    },
    /// apt did not deliver.
    #[error(
        "apt could not get Debian's {what}: {reason}; check --suite and the network, or give --kernel and --initrd"
    )]
    Fetch {
        /// What was wanted.
        what: String,
        /// apt's own words.
        reason: String,
    },
    /// A package doesn't hold what it should.
    #[error("cannot unpack {package}: {reason}")]
    Unpack {
        /// Its file name.
        package: String,
        /// Why.
        reason: String,
    },
    /// A signal came.
    #[error("fetching the debian guest was ended by {}", signals::name(*.0))]
    Interrupted(i32),
}

/// The guest's files on the host.
#[derive(Debug)]
pub struct Files {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// BusyBox itself, an x86-64 executable without dependencies.
    pub busybox: Vec<u8>,
}

/// Returns the guest's files, fetching them if they aren't there yet. A `suite` is a release or backports of Debian's
/// to take them from; without one the host's package sources decide.
pub fn files(suite: Option<&str>) -> Result<Files, Error> {
    let cache = cache_directory()?;
    let name = suite.map_or("amd64".into(), |suite| format!("amd64-{suite}"));
    let ready = cache.join(&name);
    if let Some(packages) = read_manifest(&ready) {
        say(&format!("{packages}, from {} (no network used)", ready.display()));
        return open(&ready);
    }
    apt::check()?;
    fs::create_dir_all(&cache).map_err(|e| cache_error("create", &cache, e))?;
    let _lock = lock(&cache)?;
    // Another Diglot may have fetched them while this one waited.
    if read_manifest(&ready).is_none() {
        say(&format!("fetching Debian's kernel and BusyBox into {} (once)", cache.display()));
        let work = WorkDirectory::create(cache.join("fetch"))?;
        let fetched = work.0.join(&name);
        fs::create_dir(&fetched).map_err(|e| cache_error("create", &fetched, e))?;
        apt::fetch(&work.0, &fetched, suite)?;
        if ready.exists() {
            fs::remove_dir_all(&ready).map_err(|e| cache_error("replace", &ready, e))?;
        }
        fs::rename(&fetched, &ready).map_err(|e| cache_error("create", &ready, e))?;
    }
    open(&ready)
}

fn open(ready: &Path) -> Result<Files, Error> {
    let busybox = ready.join(BUSYBOX);
    let busybox = fs::read(&busybox).map_err(|e| cache_error("read", &busybox, e))?;
    Ok(Files { kernel: ready.join(KERNEL), busybox })
}

fn cache_directory() -> Result<PathBuf, Error> {
    let directory = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = directory("XDG_CACHE_HOME").or_else(|| Some(directory("HOME")?.join(".cache"))).ok_or(Error::NoHome)?;
    Ok(base.join("diglot/debian"))
}

fn cache_error(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Cache { what, path: path.to_owned(), source }
}

/// The packages in `directory`, if each file is there and as long as it was when it was fetched.
fn read_manifest(directory: &Path) -> Option<String> {
    let text = fs::read_to_string(directory.join(MANIFEST)).ok()?;
    let mut packages = Vec::new();
    let mut files = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (file, bytes, package, version) = (words.next()?, words.next()?, words.next()?, words.next()?);
        if directory.join(file).metadata().ok()?.len() != bytes.parse::<u64>().ok()? {
            return None;
        }
        files.push(file);
        packages.push(format!("{package} {version}"));
    }
    (files == [KERNEL, BUSYBOX]).then(|| packages.join(", "))
}

/// Waits until no other Diglot fetches. The lock goes with the file handle, however the process ends.
fn lock(cache: &Path) -> Result<File, Error> {
    let path = cache.join("lock");
    let error = |e| cache_error("lock", &path, e);
    let file = File::options().create(true).append(true).open(&path).map_err(error)?;
    let mut told = false;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => {
                if !std::mem::replace(&mut told, true) {
                    say("waiting for another diglot that fetches the same");
                }
                if let Some(signal) = signals::received() {
                    return Err(Error::Interrupted(signal));
                }
                thread::sleep(Duration::from_millis(100));
            }
            Err(TryLockError::Error(e)) => return Err(error(e)),
        }
    }
}

/// A directory for the time of a fetch.
#[derive(Debug)]
struct WorkDirectory(PathBuf);

impl WorkDirectory {
    /// Creates it empty; what a killed Diglot left there goes. The caller holds the lock.
    fn create(path: PathBuf) -> Result<WorkDirectory, Error> {
        match fs::remove_dir_all(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(cache_error("empty", &path, e)),
            _ => {}
        }
        fs::create_dir(&path).map_err(|e| cache_error("create", &path, e))?;
        Ok(WorkDirectory(path))
    }
}

impl Drop for WorkDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_cache_counts_as_none() {
        let directory = tempfile::tempdir().expect("directory");
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).expect("write");
        let manifest = "vmlinuz 3 linux-image-6.1.0-1-cloud-amd64 6.1.1-1\nbusybox 2 busybox-static 1:1.35\n";
        assert_eq!(read_manifest(directory.path()), None);
        write(MANIFEST, manifest);
        assert_eq!(read_manifest(directory.path()), None);
        write(KERNEL, "abc");
        write(BUSYBOX, "ab");
        let packages = "linux-image-6.1.0-1-cloud-amd64 6.1.1-1, busybox-static 1:1.35";
        assert_eq!(read_manifest(directory.path()).as_deref(), Some(packages));
        write(KERNEL, "a");
        assert_eq!(read_manifest(directory.path()), None);
        write(KERNEL, "abc");
        write(MANIFEST, &manifest[..60]);
        assert_eq!(read_manifest(directory.path()), None);
    }
}
