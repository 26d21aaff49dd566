//! The statistics file: made certain before the guest starts, complete or absent at the end.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A place for statistics that is known to be writable.
///
/// A regular file is written beside its final name and renamed when complete, so that a run which ends badly leaves
/// neither half a file nor an empty one. Anything else (a pipe, a terminal, `/dev/null`) is opened as it is.
#[derive(Debug)]
pub struct StatsFile {
    file: File,
    /// The temporary name and the final one, until the rename.
    pending: Option<(PathBuf, PathBuf)>,
}

impl StatsFile {
    /// Makes sure that `path` can be written.
    pub fn create(path: &Path) -> io::Result<StatsFile> {
        match path.metadata() {
            // Renaming needs no leave to write the file it replaces; the user may have taken it away for a reason.
            Ok(meta) if meta.is_file() => drop(OpenOptions::new().append(true).open(path)?),
            Ok(_) => return Ok(StatsFile { file: OpenOptions::new().write(true).open(path)?, pending: None }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        // A link is written through, not replaced.
        let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let name = target.file_name().ok_or(io::ErrorKind::InvalidFilename)?;
        let mut temporary = std::ffi::OsString::from(".");
        temporary.push(name);
        temporary.push(format!(".{}", std::process::id()));
        let temporary = target.with_file_name(temporary);
        Ok(StatsFile { file: File::create(&temporary)?, pending: Some((temporary, target)) })
    }

    /// Writes the statistics and gives the file its name.
    pub fn write(mut self, json: &serde_json::Value) -> io::Result<()> {
        writeln!(self.file, "{json:#}")?;
        if let Some((temporary, target)) = &self.pending {
            std::fs::rename(temporary, target)?;
            self.pending = None;
        }
        Ok(())
    }
}

impl Drop for StatsFile {
    fn drop(&mut self) {
        if let Some((temporary, _)) = &self.pending {
            let _ = std::fs::remove_file(temporary);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        std::fs::read_dir(dir)
            .expect("dir")
            .map(|e| e.expect("entry").file_name().into_string().expect("name"))
            .collect()
    }

    #[test]
    fn complete_or_absent() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("stats.json");
        drop(StatsFile::create(&path).expect("create"));
        assert!(names(dir.path()).is_empty());
        for round in 0..2 {
            let json = serde_json::json!({ "round": round });
            StatsFile::create(&path).expect("create").write(&json).expect("write");
            let text = std::fs::read_to_string(&path).expect("read");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("json"), json);
            assert_eq!(names(dir.path()), ["stats.json"]);
        }
    }

    #[test]
    fn unwritable_places_are_told_at_once() {
        let dir = tempfile::tempdir().expect("directory");
        for path in [dir.path().to_owned(), dir.path().join("no/such/stats.json"), PathBuf::new()] {
            assert!(StatsFile::create(&path).is_err(), "{path:?}");
        }
        StatsFile::create(Path::new("/dev/null")).expect("device").write(&serde_json::json!({})).expect("write");
    }
}
