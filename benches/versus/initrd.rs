//! An initial RAM disk of one file, in the format that Linux unpacks: cpio, "newc".

/// An archive with `init` as /init.
pub fn archive(init: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(init.len() + 1024);
    let directory = 0o040_755;
    let device = 0o020_600;
    entry(&mut out, "dev", directory, (0, 0), &[]);
    entry(&mut out, "dev/console", device, (5, 1), &[]);
    entry(&mut out, "dev/null", device, (1, 3), &[]);
    entry(&mut out, "init", 0o100_755, (0, 0), init);
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
