//! Those who run the programs, and how each is started.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::initrd;
use crate::support::{DIGLOT, Guard, export_debian};

/// A run that takes longer is ended, and its contender is out.
const LIMIT: Duration = Duration::from_secs(600);
/// A program's name in the results for the time from power-on to init.
pub const BOOT: &str = "boot";

/// Where a contender runs the programs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Native,
    Diglot(&'static str),
    Qemu(&'static str),
}

/// One who runs the programs.
pub struct Contender {
    /// What the table calls it.
    pub name: &'static str,
    kind: Kind,
    /// How often each program runs in a round; the slow ones take their time.
    repetitions: u32,
}

/// Names of contenders that ratios are made of.
pub const NATIVE: &str = "native";
#[allow(missing_docs)]
pub const JIT: &str = "jit";
#[allow(missing_docs)]
pub const QEMU: &str = "QEMU TCG";

/// All of them, in the order in which a round runs them.
pub const CONTENDERS: [Contender; 6] = [
    Contender { name: NATIVE, kind: Kind::Native, repetitions: 3 },
    Contender { name: "kvm", kind: Kind::Diglot("kvm"), repetitions: 3 },
    Contender { name: JIT, kind: Kind::Diglot("jit"), repetitions: 3 },
    Contender { name: QEMU, kind: Kind::Qemu("tcg"), repetitions: 3 },
    Contender { name: "interp", kind: Kind::Diglot("interp"), repetitions: 1 },
    Contender { name: "QEMU KVM", kind: Kind::Qemu("kvm"), repetitions: 3 },
];

/// What came of a run.
pub enum Outcome {
    /// Times.
    Measured(Run),
    /// The contender is not to be had here: why.
    Unavailable(String),
    /// A program's result was not what it must be.
    Wrong(String),
}

/// The times of one run: seconds by program, one for each repetition.
#[derive(Default)]
pub struct Run {
    /// By program.
    pub seconds: BTreeMap<String, Vec<f64>>,
    /// Results that are only known to be the same everywhere, by program.
    pub results: BTreeMap<String, String>,
}

/// The program that needs a C compiler in the guest.
pub const C_COMPILE: &str = "c-compile";

/// What the guests boot.
pub struct Files {
    program: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
    /// The host's C compiler proper, and a RAM disk that has it too.
    compiler: Option<(PathBuf, PathBuf)>,
}

impl Files {
    /// Makes the initial RAM disks and fetches the kernel, all into `directory`.
    pub fn prepare(directory: &Path, program: PathBuf) -> Result<Files, String> {
        if !export_debian(directory) {
            return Err("there is no kernel for the guests, for the reason above".into());
        }
        let init = std::fs::read(&program).map_err(|e| format!("{}: {e}", program.display()))?;
        let write = |name: &str, others: &[initrd::File]| {
            let path = directory.join(name);
            match std::fs::write(&path, initrd::archive(&init, others)) {
                Ok(()) => Ok(path),
                Err(e) => Err(format!("{}: {e}", path.display())),
            }
        };
        let initrd = write("programs.cpio", &[])?;
        let compiler = match compiler() {
            Some((path, files)) => Some((path, write("compiler.cpio", &files)?)),
            None => None,
        };
        Ok(Files { program, kernel: directory.join("vmlinuz"), initrd, compiler })
    }
}

/// The C compiler proper of the host's GCC, and what a guest needs of it, if this host has one that a guest of its can
/// run.
fn compiler() -> Option<(PathBuf, Vec<initrd::File>)> {
    let said = |command: &mut Command| {
        let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        String::from_utf8(output.stdout).ok()
    };
    let path = PathBuf::from(said(Command::new("gcc").arg("-print-prog-name=cc1"))?.trim());
    let libraries = said(Command::new("ldd").arg(&path))?;
    // "name => path (address)", and "path (address)" for the loader.
    let libraries = libraries.lines().filter_map(|l| l.split_whitespace().find(|w| w.starts_with('/')));
    let mut files = vec![(PathBuf::from("/cc1"), std::fs::read(&path).ok()?)];
    for library in libraries {
        files.push((library.into(), std::fs::read(library).ok()?));
    }
    (std::env::consts::ARCH == "x86_64").then_some((path, files))
}

impl Contender {
    /// Runs the programs once round, in a guest with so many CPUs. The one that needs a compiler has a boot of its own: the
    /// others' is measured.
    pub fn run(&self, files: &Files, programs: &[String], cpus: u8) -> Outcome {
        let (with, without): (Vec<String>, Vec<String>) = programs.iter().cloned().partition(|p| p == C_COMPILE);
        let mut whole = Run::default();
        if !without.is_empty() {
            match self.run_from(files, &files.initrd, &without, cpus) {
                Outcome::Measured(run) => whole = run,
                other => return other,
            }
        }
        if let Some((_, initrd)) = files.compiler.as_ref().filter(|_| !with.is_empty()) {
            match self.run_from(files, initrd, &with, cpus) {
                Outcome::Measured(mut run) => {
                    run.seconds.remove(BOOT);
                    whole.seconds.append(&mut run.seconds);
                    whole.results.append(&mut run.results);
                }
                other => return other,
            }
        }
        Outcome::Measured(whole)
    }

    fn run_from(&self, files: &Files, initrd: &Path, programs: &[String], cpus: u8) -> Outcome {
        // Where Diglot would not use KVM, QEMU would take for ever with it or fail.
        if self.kind == Kind::Qemu("kvm")
            && let Some(problem) = diglot_runtime::survey::survey().problem
        {
            return Outcome::Unavailable(problem);
        }
        let mut command = self.command(files, initrd, programs, cpus);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: prctl may be called between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let start = Instant::now();
        let child = match command.spawn() {
            Ok(child) => child,
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Outcome::Unavailable(format!("{} is not installed", command.get_program().display()));
            }
            Err(e) => return Outcome::Unavailable(format!("{}: {e}", command.get_program().display())),
        };
        self.follow(child, start)
    }

    fn command(&self, files: &Files, initrd: &Path, programs: &[String], cpus: u8) -> Command {
        let cpus = cpus.to_string();
        let repetitions = self.repetitions.to_string();
        // What is behind the dashes goes to init.
        let cmdline = format!("console=ttyS0 quiet panic=-1 -- {repetitions} {}", programs.join(" "));
        let mut command = match self.kind {
            Kind::Native => {
                let mut command = Command::new(&files.program);
                command.arg(repetitions).args(programs);
                if let Some((compiler, _)) = &files.compiler {
                    command.env("CC1", compiler);
                }
                return command;
            }
            Kind::Diglot(backend) => {
                let mut command = Command::new(DIGLOT);
                command.args([
                    "run",
                    "--memory",
                    "512M",
                    "--cpus",
                    &cpus,
                    "--backend",
                    backend,
                    "--no-reboot",
                    "--kernel",
                ]);
                command.arg(&files.kernel).arg("--initrd").arg(initrd).arg("--append");
                command
            }
            Kind::Qemu(accelerator) => {
                let accelerator = match (accelerator, cpus.as_str()) {
                    ("tcg", "1") => "tcg,thread=single",
                    ("tcg", _) => "tcg,thread=multi",
                    (other, _) => other,
                };
                let mut command = Command::new("qemu-system-x86_64");
                command.args(["-accel", accelerator, "-cpu", "max", "-smp", &cpus, "-m", "512"]);
                command.args(["-nographic", "-no-reboot"]);
                command.arg("-kernel").arg(&files.kernel).arg("-initrd").arg(initrd).arg("-append");
                command
            }
        };
        command.arg(cmdline);
        command
    }

    fn follow(&self, mut child: Child, start: Instant) -> Outcome {
        let (Some(output), Some(mut errors)) = (child.stdout.take(), child.stderr.take()) else {
            return Outcome::Unavailable("it has no output".into());
        };
        let _guard = Guard(child);
        let (lines, received) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if lines.send((line, Instant::now())).is_err() {
                    break;
                }
            }
        });
        let mut run = Run::default();
        loop {
            let left = LIMIT.saturating_sub(start.elapsed());
            let (line, at) = match received.recv_timeout(left) {
                Ok(received) => received,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Outcome::Unavailable(format!("not done after {} s", LIMIT.as_secs()));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    let mut said = String::new();
                    let _ = errors.read_to_string(&mut said);
                    let last = said.lines().last().unwrap_or("it ended before its programs did");
                    return Outcome::Unavailable(last.trim_start_matches("diglot: ").to_owned());
                }
            };
            let words: Vec<&str> = line.split_whitespace().collect();
            match words.as_slice() {
                // QEMU's firmware leaves the line begun.
                [.., last] if last.ends_with("begin") && self.kind != Kind::Native => {
                    run.seconds.insert(BOOT.into(), vec![(at - start).as_secs_f64()]);
                }
                ["end"] => return Outcome::Measured(run),
                ["program", name, nanoseconds] => {
                    if let Ok(n) = nanoseconds.parse::<f64>() {
                        run.seconds.entry((*name).into()).or_default().push(n / 1e9);
                    }
                }
                ["result", name, result] => _ = run.results.insert((*name).into(), (*result).into()),
                ["wrong", name, result] => return Outcome::Wrong(format!("{name} comes to {result}, which is wrong")),
                _ => {}
            }
        }
    }
}

/// On Ctrl-C and SIGTERM removes the temporary directory and ends, and with it the contender that runs.
pub fn end_on_signals(directory: PathBuf) {
    // SAFETY: the set is initialised before use; blocking signals in this thread, before it starts others, leaves them
    // to the one that waits.
    let set = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGINT);
        libc::sigaddset(&raw mut set, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        set
    };
    std::thread::spawn(move || {
        let mut signal = 0;
        // SAFETY: both are valid for the call.
        unsafe { libc::sigwait(&raw const set, &raw mut signal) };
        let _ = std::fs::remove_dir_all(&directory);
        std::process::exit(128 + signal);
    });
}
