//! An initial RAM disk of few files, in the format that Linux unpacks: cpio, "newc".

use std::collections::BTreeSet;
use std::path::PathBuf;

/// A file's absolute path and its content.
pub type File = (PathBuf, Vec<u8>);

/// An archive with `init` as /init and other files, named by absolute paths.
pub fn archive(init: &[u8], others: &[File]) -> Vec<u8> {
    let mut out = Vec::with_capacity(init.len() + others.iter().map(|o| o.1.len()).sum::<usize>() + 4096);
    let directory = 0o040_755;
    let device = 0o020_600;
    let executable = 0o100_755;
    let parents = others.iter().flat_map(|(path, _)| path.ancestors().skip(1));
    let parents: BTreeSet<&str> = parents.filter_map(|p| p.to_str()?.strip_prefix('/')).collect();
    for name in parents.into_iter().chain(["dev"]).filter(|name| !name.is_empty()) {
        entry(&mut out, name, directory, (0, 0), &[]);
    }
    entry(&mut out, "dev/console", device, (5, 1), &[]);
    entry(&mut out, "dev/null", device, (1, 3), &[]);
    entry(&mut out, "init", executable, (0, 0), init);
    for (path, content) in others {
        let name = path.to_string_lossy();
        entry(&mut out, name.trim_start_matches('/'), executable, (0, 0), content);
    }
    entry(&mut out, "TRAILER!!!", 0, (0, 0), &[]);
    out
}

fn entry(out: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
    let inode = out.len() as u32 + 1;
    let fields = [inode, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, device.0, device.1, name.len() as u32 + 1, 0];
    out.extend(b"070701");
    fields.iter().for_each(|field| out.extend(format!("{field:08x}").bytes()));
    out.extend(name.bytes().chain([0]));
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(content);
    out.resize(out.len().next_multiple_of(4), 0);
}
