//! One run: the machine is built, connected to the host's console, signals and clock, and its end becomes an exit code.

use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use diglot_runtime::{
    Boot, Console, Controller, Initrd, Machine, MachineConfig, Outcome, RebootPolicy, RuntimeError, Stats, StopReason,
    Trace,
};
use thiserror::Error;

use crate::args::{Guest, RunArgs, Serial, exit};
use crate::console::{self, Event, Gate, Markers, Output, SerialOut, Source};
use crate::debian::{self, Session};
use crate::signals;
use crate::stats::StatsFile;
use crate::terminal::{self, RawMode, Stderr, say};

/// Why a run did not take place, or did not end well.
#[derive(Debug, Error)]
enum RunError {
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Debian(#[from] debian::Error),
    #[error("cannot write statistics to {path}: {source}; give another path", path = .path.display())]
    Stats { path: PathBuf, source: io::Error },
    #[error("cannot write serial output to {place}: {source}")]
    Serial { place: String, source: io::Error },
    #[error("cannot write the trace to {path}: {source}; give another path", path = .path.display())]
    Trace { path: PathBuf, source: io::Error },
    #[error("cannot export to {path}: {source}; give another path", path = .path.display())]
    Export { path: PathBuf, source: io::Error },
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    #[error("ended by {} before the guest started", signals::name(*.0))]
    Interrupted(i32),
}

impl RunError {
    fn exit_code(&self) -> u8 {
        match self {
            RunError::Interrupted(signal) | RunError::Debian(debian::Error::Interrupted(signal)) => {
                signals::exit_code(*signal)
            }
            _ => exit::FAILED,
        }
    }
}

/// Runs a guest as `args` say and returns the exit code. What there is to tell about the end is told on standard error.
pub fn run(args: &RunArgs) -> u8 {
    // From here on a signal lets the run end by itself, so that no file is left behind.
    signals::on_stop(|_| ());
    let result = match &args.export {
        Some(directory) => export(args, directory).map(|()| (exit::OK, None)),
        None => try_run(args),
    };
    match result {
        Ok((code, message)) => {
            if let Some(message) = message {
                say(&message);
            }
            code
        }
        Err(error) => {
            say(&error.to_string());
            error.exit_code()
        }
    }
}

/// What is booted, and how its console is used.
struct Plan {
    boot: Boot,
    reboot: RebootPolicy,
    /// The console carries one command's output, between these.
    markers: Option<Markers>,
    /// The guest reads standard input.
    input: bool,
    /// The end of standard input is told to the guest.
    end_of_file: bool,
}

/// What is learned while the guest runs.
#[derive(Debug, Default)]
struct Observed {
    until: bool,
    panic: Option<String>,
    panic_ended: bool,
    command_code: Option<u8>,
}

/// Ends the run from any thread.
#[derive(Clone)]
struct Stopper {
    controller: Arc<OnceLock<Controller>>,
    output: Option<Output>,
}

impl Stopper {
    /// Cuts the run short.
    fn stop(&self, why: StopReason) {
        // The guest may be waiting for a reader, and can't see the request before that has an end.
        if let Some(output) = &self.output {
            output.release();
        }
        self.end(why);
    }

    /// Ends a run that has reached its aim: all it has printed is still to be read.
    fn end(&self, why: StopReason) {
        if let Some(controller) = self.controller.get() {
            controller.stop(why);
        }
    }
}

fn try_run(args: &RunArgs) -> Result<(u8, Option<String>), RunError> {
    let stats_file = match &args.stats_json {
        Some(path) => Some(StatsFile::create(path).map_err(|source| RunError::Stats { path: path.clone(), source })?),
        None => None,
    };
    let trace = open_trace(args)?;
    let controller = Arc::new(OnceLock::new());
    let (output, place) = open_output(&args.serial, &controller)?;
    let plan = plan(args)?;
    let stopper = Stopper { controller: Arc::clone(&controller), output: output.clone() };

    let observed = Arc::new(Mutex::new(Observed::default()));
    let gate = Gate::new(plan.markers.is_none());
    let on_event = observer(Arc::clone(&observed), stopper.clone(), gate.clone());
    let serial = SerialOut::new(output.clone(), args.until.as_deref(), plan.markers.as_ref(), on_event);
    let config = MachineConfig {
        memory_bytes: args.memory,
        cpus: args.cpus,
        cpu_model: args.cpu,
        backend: args.backend,
        slow_kvm: args.slow_kvm,
        switches: !args.switch_after.is_empty(),
        switch_to: args.switch_to,
        boot: plan.boot,
        reboot: plan.reboot,
        code_cache_bytes: args.code_cache,
        debug_exit: args.debug_exit,
        test_device: args.test_device,
        lockstep: args.lockstep,
        trace,
        counted: args.stats || args.stats_json.is_some(),
        perf_map: args.perf_map,
    };
    let machine = Machine::new(config, Console { output: Box::new(serial) })?;
    let handle = controller.get_or_init(|| machine.controller()).clone();
    say(&machine.backend_line());

    let on_signal = stopper.clone();
    signals::on_stop(move |signal| on_signal.stop(StopReason::Signal(signal)));
    if let Some(signal) = signals::received() {
        return Err(RunError::Interrupted(signal));
    }
    if let Some(timeout) = args.timeout {
        let stopper = stopper.clone();
        start_timer("timeout", timeout, move || stopper.stop(StopReason::Timeout)).map_err(RunError::Thread)?;
    }
    for after in &args.switch_after {
        let controller = handle.clone();
        start_timer("switch", *after, move || controller.switch()).map_err(RunError::Thread)?;
    }
    let mut raw = None;
    if plan.input {
        raw = RawMode::new();
        let source = Source::of_stdin(gate, plan.end_of_file);
        console::start_input(source, handle, move || stopper.stop(StopReason::Quit)).map_err(RunError::Thread)?;
    }

    let result = machine.run();
    let written = output.as_ref().map_or(Ok(()), Output::close);
    drop(raw);
    let mid_line = output.as_ref().is_some_and(Output::mid_line);
    if mid_line && args.serial == Serial::Stdio && io::stdout().is_terminal() {
        let _ = Stderr.write_all(b"\n");
    }
    let (outcome, stats) = result?;
    report(args, stats_file, &stats)?;
    match written {
        // The user has seen enough; the outcome says the same.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {}
        Err(source) => return Err(RunError::Serial { place, source }),
        Ok(()) => {}
    }
    let observed = lock(&observed);
    Ok(verdict(&outcome, &observed, plan.markers.is_some() && !args.command.is_empty()))
}

/// Writes what would be booted to a directory.
fn export(args: &RunArgs, directory: &Path) -> Result<(), RunError> {
    let Boot::Linux { kernel, initrd: Some(Initrd::Bytes(initrd)), .. } = plan(args)?.boot else { return Ok(()) };
    let error = |path: &Path| {
        let path = path.to_owned();
        move |source| RunError::Export { path, source }
    };
    fs::create_dir_all(directory).map_err(error(directory))?;
    let (to, initrd_to) = (directory.join("vmlinuz"), directory.join("initrd"));
    fs::copy(kernel, &to).map_err(error(&to))?;
    fs::write(&initrd_to, initrd).map_err(error(&initrd_to))
}

/// Opens the place for serial output, and names it.
fn open_output(serial: &Serial, controller: &Arc<OnceLock<Controller>>) -> Result<(Option<Output>, String), RunError> {
    let (file, place) = match serial {
        Serial::Null => return Ok((None, String::new())),
        Serial::Stdio => (io::stdout().as_fd().try_clone_to_owned().map(File::from), "standard output".into()),
        Serial::File(path) => (File::create(path), path.display().to_string()),
    };
    let error = |source| RunError::Serial { place: place.clone(), source };
    let controller = Arc::clone(controller);
    let on_error = move |_: &io::Error| {
        if let Some(controller) = controller.get() {
            controller.stop(StopReason::Signal(libc::SIGPIPE));
        }
    };
    let output = Output::new(file.map_err(error)?, on_error).map_err(RunError::Thread)?;
    Ok((Some(output), place))
}

/// Opens the place for traced instructions.
fn open_trace(args: &RunArgs) -> Result<Option<Trace>, RunError> {
    let Some(filter) = args.trace.clone() else { return Ok(None) };
    let output: Box<dyn Write + Send> = match &args.trace_file {
        Some(path) => {
            let file = File::create(path).map_err(|source| RunError::Trace { path: path.clone(), source })?;
            Box::new(BufWriter::new(file))
        }
        None => Box::new(BufWriter::new(Stderr)),
    };
    Ok(Some(Trace::new(filter, args.trace_registers, output)))
}

fn plan(args: &RunArgs) -> Result<Plan, RunError> {
    let reboot = if args.no_reboot { RebootPolicy::Exit } else { RebootPolicy::Reset };
    let input = args.serial == Serial::Stdio;
    let cmdline = |own: &str| match &args.append {
        Some(append) if own.is_empty() => append.clone(),
        Some(append) => format!("{own} {append}"),
        None => own.to_owned(),
    };
    if let Some(kernel) = &args.kernel {
        let boot =
            Boot::Linux { kernel: kernel.clone(), initrd: args.initrd.clone().map(Initrd::Path), cmdline: cmdline("") };
        return Ok(Plan { boot, reboot, markers: None, input, end_of_file: false });
    }
    let Some(Guest::Debian) = args.guest else {
        return Ok(Plan { boot: Boot::Embedded, reboot, markers: None, input: false, end_of_file: false });
    };

    let files = debian::files(args.suite.as_deref())?;
    let boot = |session: &Session, own: &str| Boot::Linux {
        kernel: files.kernel.clone(),
        initrd: Some(Initrd::Bytes(debian::initramfs(&files.busybox, session))),
        cmdline: cmdline(own),
    };
    // Another monitor knows nothing of markers, so what is exported is the shell too.
    let shell = !input || io::stdin().is_terminal() || args.export.is_some();
    if args.command.is_empty() && shell {
        let terminal = std::env::var("TERM").unwrap_or_else(|_| "vt100".into());
        let session = Session::Shell { terminal: &terminal, size: terminal::size() };
        let boot = boot(&session, "console=ttyS0 quiet");
        return Ok(Plan { boot, reboot, markers: None, input, end_of_file: false });
    }
    let markers = Markers::new();
    let script = args.command.is_empty();
    let session = if script { Session::Script(&markers) } else { Session::Command(&markers, args.command.as_slice()) };
    // A kernel that panics resets at once, and the reset ends the run. With a log level of 0 it would not say why.
    let boot = boot(&session, "console=ttyS0 quiet loglevel=1 panic=-1");
    Ok(Plan { boot, reboot: RebootPolicy::Exit, markers: Some(markers), input: script, end_of_file: script })
}

/// What is to be done about events of the console.
fn observer(observed: Arc<Mutex<Observed>>, stopper: Stopper, gate: Gate) -> impl FnMut(Event) + Send {
    move |event| {
        let mut observed = lock(&observed);
        match event {
            Event::PanicBegun(reason) => observed.panic = Some(reason),
            Event::CommandBegun => gate.open(),
            Event::Until => observed.until = true,
            Event::PanicEnded => observed.panic_ended = true,
            Event::CommandEnded(code) => observed.command_code = Some(code),
        }
        if observed.until || observed.panic_ended || observed.command_code.is_some() {
            stopper.end(StopReason::Until);
        }
    }
}

/// Does something once, after a time.
fn start_timer(name: &str, after: Duration, action: impl FnOnce() + Send + 'static) -> Result<(), io::Error> {
    let run = move || {
        thread::sleep(after);
        action();
    };
    thread::Builder::new().name(name.into()).spawn(run).map(drop)
}

fn report(args: &RunArgs, file: Option<StatsFile>, stats: &Stats) -> Result<(), RunError> {
    if args.stats {
        let _ = writeln!(Stderr, "{stats}");
    }
    match (file, &args.stats_json) {
        (Some(file), Some(path)) => {
            file.write(&stats.to_json()).map_err(|source| RunError::Stats { path: path.clone(), source })
        }
        _ => Ok(()),
    }
}

/// The exit code, and what there is to say about it.
fn verdict(outcome: &Outcome, observed: &Observed, command: bool) -> (u8, Option<String>) {
    let crash = |what: &str| {
        let what = observed.panic.as_deref().unwrap_or(what);
        (exit::CRASHED, Some(format!("the guest crashed: {what}")))
    };
    match outcome {
        Outcome::TripleFault { detail } => crash(&format!("triple fault, {detail}")),
        Outcome::Exited(code) => (*code, None),
        Outcome::Reset => crash("it asked for a reset"),
        Outcome::Failed(why) => (exit::FAILED, Some(why.clone())),
        Outcome::Stopped(StopReason::Timeout) => (exit::TIMEOUT, Some("the time given by --timeout is over".into())),
        Outcome::Stopped(StopReason::Signal(libc::SIGPIPE)) => {
            (signals::exit_code(libc::SIGPIPE), Some("nobody reads the output any more; the guest was stopped".into()))
        }
        Outcome::Stopped(StopReason::Signal(signal)) => {
            (signals::exit_code(*signal), Some(format!("the guest was stopped by {}", signals::name(*signal))))
        }
        Outcome::Stopped(StopReason::Quit) => (exit::OK, Some("the guest was stopped".into())),
        Outcome::PoweredOff | Outcome::Stopped(StopReason::Until) => match observed.command_code {
            Some(code) => (code, None),
            None if observed.until => (exit::OK, None),
            None if observed.panic_ended => crash("kernel panic"),
            None if command => (exit::CRASHED, Some("the guest powered off before the command was done".into())),
            None => (exit::OK, None),
        },
    }
}

fn lock(observed: &Mutex<Observed>) -> MutexGuard<'_, Observed> {
    observed.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_end_has_its_code() {
        let seen = Observed::default;
        let panic = || Some("Kernel panic - not syncing: x".to_owned());
        let until = || Outcome::Stopped(StopReason::Until);
        let signal = |n| Outcome::Stopped(StopReason::Signal(n));
        let cases = [
            (Outcome::PoweredOff, seen(), false, 0, ""),
            (Outcome::Exited(33), seen(), false, 33, ""),
            (Outcome::PoweredOff, seen(), true, 255, "before the command was done"),
            (until(), Observed { until: true, ..seen() }, false, 0, ""),
            (until(), Observed { command_code: Some(42), ..seen() }, true, 42, ""),
            (until(), Observed { panic: panic(), panic_ended: true, ..seen() }, false, 255, "not syncing: x"),
            (Outcome::Reset, Observed { panic: panic(), ..seen() }, true, 255, "not syncing: x"),
            (Outcome::Reset, seen(), false, 255, "asked for a reset"),
            (Outcome::TripleFault { detail: "rip 0".into() }, seen(), false, 255, "triple fault, rip 0"),
            (Outcome::Stopped(StopReason::Timeout), seen(), true, 124, "--timeout"),
            (Outcome::Stopped(StopReason::Quit), seen(), false, 0, "stopped"),
            (signal(libc::SIGINT), seen(), false, 130, "SIGINT"),
            (signal(libc::SIGTERM), seen(), false, 143, "SIGTERM"),
            (signal(libc::SIGHUP), seen(), false, 129, "SIGHUP"),
            (signal(libc::SIGPIPE), seen(), false, 141, "nobody reads"),
        ];
        for (outcome, observed, command, code, part) in cases {
            let (given, message) = verdict(&outcome, &observed, command);
            let message = message.unwrap_or_default();
            assert_eq!(given, code, "{message}");
            assert!(message.contains(part) && message.is_empty() == part.is_empty(), "{message}");
        }
    }
}
