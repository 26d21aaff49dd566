//! The guest's root file system: a cpio archive in the `newc` format, of which the kernel makes its first file system
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use crate::console::Markers;

/// The bits of a mode that say what the file is.
const FORMAT: u32 = 0o170_000;
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

const DIRECTORIES: [&str; 13] =
    ["bin", "dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "usr/bin", "usr/sbin", "var"];

/// What the guest does once it is up.
#[derive(Debug)]
pub enum Session<'a> {
    /// A shell on the serial port, for a user at a terminal.
    Shell {
        /// The user's kind of terminal.
        terminal: &'a str,
        /// Rows and columns.
        size: Option<(u16, u16)>,
    },
    /// A shell that reads its commands from the serial port.
    Script(&'a Markers),
    /// One command with its arguments.
    Command(&'a Markers, &'a [OsString]),
}

/// Builds the archive around `busybox`.
pub fn build(busybox: &[u8], session: &Session) -> Vec<u8> {
    let mut archive = Archive::default();
    for directory in DIRECTORIES {
        let mode = if directory == "tmp" { 0o1777 } else { 0o755 };
        archive.add(directory, DIRECTORY | mode, (0, 0), &[]);
    }
    // The kernel opens it for init before anything is mounted (devices.txt: 5, 1).
    archive.add("dev/console", CHARACTER_DEVICE | 0o600, (5, 1), &[]);
    archive.add("bin/busybox", REGULAR | 0o755, (0, 0), busybox);
    archive.add("etc/passwd", REGULAR | 0o644, (0, 0), b"root:x:0:0:root:/root:/bin/sh\n");
    archive.add("etc/group", REGULAR | 0o644, (0, 0), b"root:x:0:\ntty:x:5:\n");
    archive.add("etc/hosts", REGULAR | 0o644, (0, 0), b"127.0.0.1 localhost debian\n");
    archive.add("etc/profile", REGULAR | 0o644, (0, 0), b"PS1='\\u@\\h:\\w\\$ '\n");
    archive.add("init", REGULAR | 0o755, (0, 0), &init(session));
    archive.finish()
}

/// The first process. BusyBox is named in full until its links exist.
const SET_UP: &str = "\
#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root USER=root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox mkdir -p /dev/pts
/bin/busybox mount -t devpts devpts /dev/pts
/bin/busybox --install -s
hostname debian
ifconfig lo up 2>/dev/null
cd /root
";

const SHELL: &str = "\
echo \"Debian kernel $(uname -r), BusyBox. 'exit' powers off.\"
setsid cttyhack sh -l
poweroff -f
";

/// The command's output goes through a pipe, so that it sees no terminal, and through a serial port that changes none
/// of its bytes. A pipe is read to its end: nothing is lost of what the command wrote.
const RUN: &str = "\
{ (\"$@\" <\"$input\" 2>&1); echo $? >/run/status; } | cat
echo \"$end $(cat /run/status 2>/dev/null || echo 137)\"
poweroff -f
";

fn init(session: &Session) -> Vec<u8> {
    let mut script = SET_UP.as_bytes().to_vec();
    match session {
        Session::Shell { terminal, size } => {
            script.extend(b"export TERM=");
            script.extend(quote(terminal.as_bytes()));
            script.push(b'\n');
            if let Some((rows, columns)) = size {
                script.extend(format!("stty rows {rows} cols {columns}\n").bytes());
            }
            script.extend(SHELL.bytes());
        }
        Session::Script(markers) => {
            // A shell that ends before its input does must not wait for it: so the input comes by way of a pipe.
            script.extend(b"mkfifo /run/input\ncat </dev/console >/run/input 2>/dev/null &\n");
            run(&mut script, markers, "/run/input", &["sh".into()]);
        }
        Session::Command(markers, command) => run(&mut script, markers, "/dev/null", command),
    }
    script
}

fn run(script: &mut Vec<u8>, markers: &Markers, input: &str, command: &[OsString]) {
    script.extend(b"stty -opost -echo\nset --");
    for argument in command {
        script.push(b' ');
        script.extend(quote(argument.as_bytes()));
    }
    let (begin, end) = (quote(markers.begin.as_bytes()), quote(markers.end.as_bytes()));
    for part in [b"\ninput=", input.as_bytes(), b"\nend=", &end, b"\necho ", &begin, b"\n", RUN.as_bytes()] {
        script.extend(part);
    }
}

/// A word of the shell with exactly these bytes.
fn quote(bytes: &[u8]) -> Vec<u8> {
    let mut word = vec![b'\''];
    for &byte in bytes {
        match byte {
            b'\'' => word.extend(b"'\\''"),
            _ => word.push(byte),
        }
    }
    word.push(b'\'');
    word
}

/// A cpio archive in the making.
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// Adds a file; `device` is its major and minor number if it is a device.
    fn add(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let links = if mode & FORMAT == DIRECTORY { 2 } else { 1 };
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.bytes.extend(b"070701");
        // Inode, mode, user, group, links, time, length, device of the file, the device it is, length of the name
        // with its NUL, check sum (unused in this format): eight hexadecimal digits each.
        for field in [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            length(content),
            0,
            0,
            device.0,
            device.1,
            length(name.as_bytes()) + 1,
            0,
        ] {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn words_reach_a_shell_unchanged() {
        let words: [&[u8]; 6] = [b"a b", b"", b"it's", b"$HOME `id` \\n \"x\"", b"two\nlines", b"\xff\xfe!*?"];
        let mut script = b"printf '<%s>'".to_vec();
        for word in words {
            script.push(b' ');
            script.extend(quote(word));
        }
        let output = Command::new("sh").arg("-c").arg(std::ffi::OsStr::from_bytes(&script)).output().expect("sh");
        let expected: Vec<u8> = words.iter().flat_map(|w| [b"<", *w, b">"].concat()).collect();
        assert_eq!(output.stdout, expected);
    }

    /// Name, mode, device, content.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// Reads an archive back.
    fn entries(mut bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        while !bytes.is_empty() {
            let field = |n: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).expect("text");
                u32::from_str_radix(text, 16).expect("hexadecimal")
            };
            assert_eq!(&bytes[..6], b"070701", "entry at {at}");
            let (size, name_size) = (field(6) as usize, field(11) as usize);
            let name = std::str::from_utf8(&bytes[110..109 + name_size]).expect("name").to_owned();
            let start = (110 + name_size).next_multiple_of(4);
            entries.push((name, field(1), (field(9), field(10)), bytes[start..start + size].to_vec()));
            let next = (start + size).next_multiple_of(4);
            at += next;
            bytes = &bytes[next..];
        }
        entries
    }

    #[test]
    fn archives_can_be_read_back() {
        let markers = Markers::new();
        let archive = build(b"\x7fELF.", &Session::Command(&markers, &["echo".into(), "it's".into()]));
        let entries = entries(&archive);
        let find = |name: &str| entries.iter().find(|e| e.0 == name).expect(name);
        assert_eq!((find("bin/busybox").1, find("bin/busybox").3.as_slice()), (0o100_755, b"\x7fELF.".as_slice()));
        assert_eq!((find("dev/console").1, find("dev/console").2), (0o020_600, (5, 1)));
        assert_eq!(find("tmp").1, 0o041_777);
        assert_eq!(entries.last().expect("trailer").0, "TRAILER!!!");
        let init = String::from_utf8(find("init").3.clone()).expect("text");
        assert!(init.contains("set -- 'echo' 'it'\\''s'\n") && init.contains(&markers.end), "{init}");
        // A directory comes before what is in it.
        for (at, (name, ..)) in entries.iter().enumerate() {
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert!(entries[..at].iter().any(|e| e.0 == parent), "{name}");
            }
        }
    }
}
