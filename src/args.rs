//! What may be asked for on the command line, and the exit codes.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use diglot_runtime::memory::{MIN_RAM, parse_size};
use diglot_runtime::{Backend, CpuModel, TraceFilter};

/// The exit codes the user is promised.
pub mod exit {
    /// The guest powered off, `--until` was seen, or the user quit.
    pub const OK: u8 = 0;
    /// Wrong usage.
    pub const USAGE: u8 = 2;
    /// `--timeout` ran out.
    pub const TIMEOUT: u8 = 124;
    /// Diglot could not start or run the guest.
    pub const FAILED: u8 = 125;
    /// Added to the number of the signal that ended Diglot.
    pub const SIGNAL_BASE: u8 = 128;
    /// The guest crashed.
    pub const CRASHED: u8 = 255;
}

const AFTER_HELP: &str = "\
Guests:
  (none)                  the guest built into Diglot
  --kernel FILE           a Linux bzImage, a Multiboot or a PVH ELF kernel
  debian                  Debian's cloud kernel and BusyBox, fetched once through the host's apt
  debian -- CMD [ARG]..   the same; runs CMD, prints its output, exits with its code.
                          CMD's standard input is empty; output of processes it leaves behind is waited for

Exit codes:
  0      the guest powered off, --until was seen, or Ctrl-A x; CMD's own code with 'debian -- CMD'
  2      wrong usage
  124    --timeout ran out
  125    Diglot could not start or run the guest, or --lockstep found a difference
  128+N  Diglot was ended by signal N
  odd    the guest's own, by --debug-exit; Diglot's own 125 and 255 come with a line that says why
  255    the guest crashed: triple fault, kernel panic, reset under --no-reboot

Keys, on a terminal that the guest owns:
  Ctrl-A x quits, Ctrl-A h helps, Ctrl-A Ctrl-A sends Ctrl-A

Environment:
  XDG_CACHE_HOME  where the debian guest is kept (default ~/.cache)
  DIGLOT_KVM      the device that is KVM (default /dev/kvm)
  DIGLOT_LOG      what to log to standard error, such as diglot_translator=debug";

/// Runs whole x86-64 computers on this host. Without a command it boots the guest built into it.
#[derive(Debug, Parser)]
#[command(name = "diglot", version, after_help = AFTER_HELP, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a guest
    #[command(after_help = AFTER_HELP)]
    Run(Box<RunArgs>),
    /// Report what this host offers and which engine --backend auto chooses
    Doctor {
        /// As one JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Options of `run`.
#[derive(Args, Clone, Debug)]
pub struct RunArgs {
    /// A guest Diglot knows how to get
    #[arg(value_enum, conflicts_with_all = ["kernel", "initrd"])]
    pub guest: Option<Guest>,

    /// What to run in the debian guest instead of a shell
    #[arg(last = true, value_name = "CMD", requires = "guest", conflicts_with = "serial")]
    pub command: Vec<OsString>,

    /// Debian release or backports that the debian guest comes from, such as trixie or bookworm-backports; by default
    /// what the host's package sources say
    #[arg(long, value_name = "NAME", requires = "guest", value_parser = suite)]
    pub suite: Option<String>,

    /// Run nothing, but write the debian guest's kernel and initial RAM disk to DIR (vmlinuz, initrd), for use with
    /// --kernel and --initrd or with another monitor
    #[arg(long, value_name = "DIR", requires = "guest", conflicts_with = "command")]
    pub export: Option<PathBuf>,

    /// Kernel to boot: a Linux bzImage, a Multiboot or a PVH ELF file
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Initial RAM disk of the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// Kernel command line; with debian, added to its own
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,

    /// Guest memory; MiB without a unit
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory_size)]
    pub memory: u64,

    /// Number of virtual CPUs, each on a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub cpus: u8,

    /// CPU the guest sees: x86-64-v2, x86-64-v3, max or, on KVM, host
    #[arg(long, value_name = "MODEL", default_value = "max", value_parser = cpu_model)]
    pub cpu: CpuModel,

    /// What executes guest code: auto (KVM where it works, else jit), kvm, jit or interp
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = backend)]
    pub backend: Backend,

    /// Use KVM even where it is emulated, slower than jit
    #[arg(long)]
    pub slow_kvm: bool,

    /// Move the running guest to another engine after this time; several times, separated by commas, move it to and fro
    #[arg(long, value_name = "SECONDS", value_delimiter = ',', value_parser = seconds,
          conflicts_with_all = ["trace", "lockstep"])]
    pub switch_after: Vec<Duration>,

    /// Where --switch-after moves the guest: kvm, jit or interp; by default jit, or kvm from there
    #[arg(long, value_name = "ENGINE", requires = "switch_after", value_parser = engine)]
    pub switch_to: Option<Backend>,

    /// Where the serial port is connected: stdio, null or file:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = serial)]
    pub serial: Serial,

    /// End with code 124 after this time
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,

    /// End with code 0 once the serial output contains TEXT
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub until: Option<String>,

    /// Print statistics to standard error at the end
    #[arg(long)]
    pub stats: bool,

    /// Write statistics as JSON at the end
    #[arg(long, value_name = "PATH")]
    pub stats_json: Option<PathBuf>,

    /// End with code 255 when the guest asks for a reset
    #[arg(long)]
    pub no_reboot: bool,

    /// Port at which the guest ends the run: writing V gives the exit code (V * 2 + 1) & 255; such as 0xf4
    #[arg(long, value_name = "PORT", value_parser = port)]
    pub debug_exit: Option<u16>,

    /// Add the device that hypervisor tests drive: interrupt lines, a port and memory, as QEMU's pc-testdev
    #[arg(long)]
    pub test_device: bool,

    /// Memory for compiled code; MiB without a unit
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = code_cache_size)]
    pub code_cache: u64,

    /// Repeat every run of compiled code interpreted, and stop at the first difference (slow)
    #[arg(long)]
    pub lockstep: bool,

    /// Write each guest instruction that executes to standard error; FILTER: 0xADDRESS, 0xSTART-0xEND, user, kernel,
    /// names of instructions, separated by commas. The guest is interpreted (slow)
    #[arg(long, value_name = "FILTER", num_args = 0..=1, require_equals = true, default_missing_value = "",
          value_parser = TraceFilter::parse, conflicts_with = "lockstep")]
    pub trace: Option<TraceFilter>,

    /// Write the trace to a file instead
    #[arg(long, value_name = "PATH", requires = "trace")]
    pub trace_file: Option<PathBuf>,

    /// Write the registers before each traced instruction
    #[arg(long, requires = "trace")]
    pub trace_registers: bool,

    /// Write /tmp/perf-PID.map, by which Linux perf names compiled guest code; it is yours to delete
    #[arg(long)]
    pub perf_map: bool,
}

/// Guests with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Guest {
    /// Debian's cloud kernel and BusyBox
    Debian,
}

/// Where the serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    /// Standard input and output.
    Stdio,
    /// Nowhere.
    Null,
    /// Output to a file, no input.
    File(PathBuf),
}

/// What became of the command line.
#[derive(Debug)]
pub enum Parsed {
    /// Run a guest.
    Run(Box<RunArgs>),
    /// Report on the host, perhaps as JSON.
    Doctor {
        /// Whether.
        json: bool,
    },
    /// All is said already; exit with this code.
    Exit(u8),
}

/// Reads the command line. Help and version are printed here, and a mistake as one line.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Parsed {
    match try_parse(args) {
        Ok(Command::Run(run)) => Parsed::Run(run),
        Ok(Command::Doctor { json }) => Parsed::Doctor { json },
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            // A reader that has gone away has seen enough.
            let _ = error.print().and_then(|()| std::io::stdout().flush());
            Parsed::Exit(exit::OK)
        }
        Err(error) => {
            crate::terminal::say(&format!("{} (see 'diglot --help')", one_line(&error.render().to_string())));
            Parsed::Exit(exit::USAGE)
        }
    }
}

fn try_parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, clap::Error> {
    match Cli::try_parse_from(args)?.command {
        Some(Command::Run(run)) => match mistake(&run) {
            Some((kind, message)) => Err(clap::Error::raw(kind, message)),
            None => Ok(Command::Run(run)),
        },
        Some(command) => Ok(command),
        // No command is `run` with everything at its default.
        None => try_parse(["diglot".into(), "run".into()]),
    }
}

/// What options contradict one another in ways that their definition does not say.
fn mistake(run: &RunArgs) -> Option<(ErrorKind, &'static str)> {
    use ErrorKind::{ArgumentConflict, MissingRequiredArgument};
    let compiles = matches!(run.backend, Backend::Auto | Backend::Jit);
    if run.switch_to == Some(run.backend) {
        return Some((ArgumentConflict, "--switch-to needs another engine than --backend"));
    }
    if run.trace.is_some() && !matches!(run.backend, Backend::Auto | Backend::Interp) {
        return Some((ArgumentConflict, "--trace needs --backend interp"));
    }
    if run.lockstep && !compiles {
        return Some((ArgumentConflict, "--lockstep needs --backend jit"));
    }
    if run.perf_map && (run.trace.is_some() || !compiles) {
        return Some((ArgumentConflict, "--perf-map needs --backend jit, and no --trace"));
    }
    if run.append.is_some() && run.kernel.is_none() && run.guest.is_none() {
        return Some((MissingRequiredArgument, "--append needs --kernel or debian"));
    }
    None
}

/// clap's message is a paragraph, then usage and advice: the paragraph, on one line.
fn one_line(message: &str) -> String {
    let paragraph: Vec<&str> = message.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
    let line = paragraph.join(" ");
    line.strip_prefix("error: ").unwrap_or(&line).to_owned()
}

fn memory_size(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text).map_err(|e| e.to_string())?;
    if bytes < MIN_RAM {
        return Err(format!("a guest needs at least {}M", MIN_RAM >> 20));
    }
    Ok(bytes)
}

fn code_cache_size(text: &str) -> Result<u64, String> {
    const MIN: u64 = 1 << 20;
    let bytes = parse_size(text).map_err(|e| e.to_string())?;
    if bytes < MIN {
        return Err(format!("the code cache needs at least {}M", MIN >> 20));
    }
    Ok(bytes)
}

fn port(text: &str) -> Result<u16, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| "write a port from 0 to 0xffff, such as 0xf4".into())
}

fn cpu_model(text: &str) -> Result<CpuModel, String> {
    match text {
        "x86-64-v2" => Ok(CpuModel::V2),
        "x86-64-v3" => Ok(CpuModel::V3),
        "max" => Ok(CpuModel::Max),
        "host" => Ok(CpuModel::Host),
        _ => Err("the models are x86-64-v2, x86-64-v3, max and host".into()),
    }
}

fn backend(text: &str) -> Result<Backend, String> {
    match text {
        "auto" => Ok(Backend::Auto),
        "jit" => Ok(Backend::Jit),
        "interp" => Ok(Backend::Interp),
        "kvm" => Ok(Backend::Kvm),
        _ => Err("the engines are auto, jit, interp and kvm".into()),
    }
}

/// An engine by its name.
fn engine(text: &str) -> Result<Backend, String> {
    backend(text).ok().filter(|b| *b != Backend::Auto).ok_or_else(|| "the engines are jit, interp and kvm".into())
}

fn serial(text: &str) -> Result<Serial, String> {
    match text.split_once(':') {
        None if text == "stdio" => Ok(Serial::Stdio),
        None if text == "null" => Ok(Serial::Null),
        Some(("file", path)) if !path.is_empty() => Ok(Serial::File(path.into())),
        _ => Err("write stdio, null or file:PATH".into()),
    }
}

/// Names the cache's directory too, so that nothing but a name will do.
fn suite(text: &str) -> Result<String, String> {
    let named = text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if named { Ok(text.into()) } else { Err("write a name such as trixie or bookworm-backports".into()) }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let duration = text.parse::<f64>().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
    duration.filter(|d| !d.is_zero()).ok_or_else(|| "write a number of seconds above 0, such as 30 or 0.5".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<RunArgs, String> {
        let words = std::iter::once("diglot").chain(line.split_whitespace()).map(OsString::from);
        match try_parse(words).map_err(|e| one_line(&e.render().to_string()))? {
            Command::Run(run) => Ok(*run),
            Command::Doctor { .. } => Err("doctor".into()),
        }
    }

    #[test]
    fn the_definition_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn no_arguments_mean_the_embedded_guest() {
        for line in ["", "run"] {
            let args = read(line).expect(line);
            assert!(args.guest.is_none() && args.kernel.is_none() && args.command.is_empty(), "{line}");
            assert_eq!((args.memory, args.cpus, args.code_cache), (512 << 20, 1, 64 << 20));
            assert!(matches!(args.cpu, CpuModel::Max) && matches!(args.backend, Backend::Auto));
            assert_eq!((args.serial, args.timeout, args.no_reboot), (Serial::Stdio, None, false));
        }
    }

    #[test]
    fn good_lines() {
        let args =
            read("run --kernel k --initrd i --append console=ttyS0 --serial file:a:b --timeout 0.5").expect("kernel");
        assert_eq!(args.append.as_deref(), Some("console=ttyS0"));
        assert_eq!(args.serial, Serial::File("a:b".into()));
        assert_eq!(args.timeout, Some(Duration::from_millis(500)));
        let args = read("run debian --memory 1g -- ls -la --memory 0").expect("debian");
        assert_eq!((args.guest, args.memory), (Some(Guest::Debian), 1 << 30));
        assert_eq!(args.command, ["ls", "-la", "--memory", "0"]);
    }

    #[test]
    fn bad_lines_say_what_is_wrong() {
        let cases = [
            ("--frob", "--frob"),
            ("frob", "frob"),
            ("run --frob", "--frob"),
            ("run fedora", "debian"),
            ("run --memory 0", "at least 2M"),
            ("run --memory 1M", "at least 2M"),
            ("run --memory lots", "not understood"),
            ("run --memory -5", "-5"),
            ("run --memory 99999999999999999999", "beyond any host"),
            ("run --code-cache 0", "at least 1M"),
            ("run --debug-exit 0x10000", "such as 0xf4"),
            ("run --cpus 0", "0"),
            ("run --cpu pentium", "x86-64-v2"),
            ("run --backend tcg", "auto, jit, interp and kvm"),
            ("run debian --suite ../x", "bookworm-backports"),
            ("run debian --suite -x", "-x"),
            ("run --suite trixie", "GUEST"),
            ("run --export x", "GUEST"),
            ("run --trace=frob", "frob"),
            ("run --trace=0x2-0x1", "0x2-0x1"),
            ("run --trace --backend jit", "--backend interp"),
            ("run --trace --lockstep", "--lockstep"),
            ("run --lockstep --backend interp", "--backend jit"),
            ("run --perf-map --backend interp", "--backend jit"),
            ("run --perf-map --trace", "--trace"),
            ("run --perf-map --backend kvm", "--backend jit"),
            ("run --lockstep --backend kvm", "--backend jit"),
            ("run --switch-to kvm", "--switch-after"),
            ("run --switch-after 1 --switch-to auto", "jit, interp and kvm"),
            ("run --switch-after 1 --backend jit --switch-to jit", "another engine"),
            ("run --switch-after 1,x", "above 0"),
            ("run --switch-after 1 --lockstep", "--lockstep"),
            ("run --trace-file x", "--trace"),
            ("run --trace-registers", "--trace"),
            ("run --serial tcp:1", "file:PATH"),
            ("run --serial file:", "file:PATH"),
            ("run --timeout 0", "above 0"),
            ("run --timeout -1", "-1"),
            ("run --timeout nan", "above 0"),
            ("run --timeout 1e300", "above 0"),
            ("run --initrd i", "--kernel"),
            ("run --append x", "--kernel"),
            ("run debian --kernel k", "--kernel"),
            ("run debian --serial null -- id", "--serial"),
            ("run -- uname", "GUEST"),
        ];
        for (line, part) in cases {
            let message = read(line).expect_err(line);
            assert!(message.contains(part), "{line}: {message}");
            assert!(!message.contains('\n'), "{line}: {message}");
        }
    }
}
