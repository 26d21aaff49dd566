//! Downloads packages for amd64 through the host's apt, with all of apt's state in a directory of our own.
//!
//! The host's proxies and keyrings apply (`apt.conf`, `trusted.gpg.d`). Nothing is installed, no right is needed, and
//! the host's architecture doesn't matter: apt believes that it runs on an empty amd64 system.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use indicatif::{ProgressBar, ProgressStyle};

use super::{BUSYBOX, Error, KERNEL, MANIFEST, cache_error, sources};
use crate::signals;

const ETC: &str = "/etc/apt";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Depends on the newest kernel of its kind.
const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";

/// What the host's configuration might say otherwise. Hooks would change the system.
const CONFIGURATION: &str = r##"#clear APT::Architectures;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Default-Release;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
"##;

/// Debian's own packages win over others of the same name; backports are among the sources only when asked for, and
/// are then to win by their versions.
const PREFERENCES: &str = "Package: *\nPin: release o=Debian\nPin-Priority: 990\n\n\
                           Package: *\nPin: release o=Debian Backports\nPin-Priority: 990\n";

/// Makes sure that the host has every program a fetch needs.
pub fn check() -> Result<(), Error> {
    let missing = ["apt-get", "apt-cache", "dpkg-deb", "tar"].into_iter().find(|program| !in_path(program));
    missing.map_or(Ok(()), |program| Err(Error::NoApt(program)))
}

/// Fetches the guest's files into `destination`, with `work` for everything else. Without a `suite` the host's own
/// package sources say which release they are of.
pub fn fetch(work: &Path, destination: &Path, suite: Option<&str>) -> Result<(), Error> {
    let apt = Apt::new(work, suite)?;
    let progress = progress_bar();
    apt.update(&progress)?;
    let kernel = apt.newest_kernel()?;
    let busybox = apt.version(BUSYBOX_PACKAGE)?;
    apt.download(&[&kernel.name, &busybox.name], &progress)?;

    progress.set_message("unpacking");
    let mut manifest = String::new();
    for (package, pattern, name) in [(&kernel, "./boot/vmlinuz-*", KERNEL), (&busybox, "./*bin/busybox", BUSYBOX)] {
        let path = destination.join(name);
        let bytes = unpack(&apt.package_file(&package.name)?, pattern, &path)?;
        manifest += &format!("{name} {bytes} {} {}\n", package.name, package.version);
    }
    let path = destination.join(MANIFEST);
    fs::write(&path, manifest).map_err(|e| cache_error("write", &path, e))?;
    progress.finish_and_clear();
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Package {
    name: String,
    version: String,
}

struct Apt {
    work: PathBuf,
    sources: PathBuf,
}

impl Apt {
    fn new(work: &Path, suite: Option<&str>) -> Result<Apt, Error> {
        for name in ["state/lists/partial", "cache/archives/partial", "packages"] {
            let path = work.join(name);
            fs::create_dir_all(&path).map_err(|e| cache_error("create", &path, e))?;
        }
        let sources = match sources::debian_sources(Path::new(ETC), suite) {
            Some(sources) => sources,
            None if Path::new(KEYRING).exists() => sources::default_sources(KEYRING, suite),
            None => return Err(Error::NoSources(KEYRING)),
        };
        let apt = Apt { work: work.to_owned(), sources: work.join("debian.sources") };
        for (path, text) in [
            (apt.sources.clone(), sources.as_str()),
            (work.join("apt.conf"), CONFIGURATION),
            (work.join("preferences"), PREFERENCES),
            (work.join("state/status"), ""),
        ] {
            fs::write(&path, text).map_err(|e| cache_error("write", &path, e))?;
        }
        Ok(apt)
    }

    /// An apt program that sees only our directory. Paths go by option: a configuration file couldn't quote them all.
    fn command(&self, program: &'static str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.work.join("apt.conf"));
        for (option, path) in [
            ("Dir::State", self.work.join("state")),
            ("Dir::State::lists", self.work.join("state/lists")),
            ("Dir::State::status", self.work.join("state/status")),
            ("Dir::Cache", self.work.join("cache")),
            ("Dir::Cache::archives", self.work.join("cache/archives")),
            ("Dir::Etc::SourceList", self.sources.clone()),
            ("Dir::Etc::Preferences", self.work.join("preferences")),
            ("Dir::Etc::SourceParts", "-".into()),
            ("Dir::Etc::PreferencesParts", "-".into()),
        ] {
            let mut setting = std::ffi::OsString::from(option);
            setting.push("=");
            setting.push(path);
            command.arg("-o").arg(setting);
        }
        command.env("LC_ALL", "C").stdin(Stdio::null());
        command
    }

    fn update(&self, progress: &ProgressBar) -> Result<(), Error> {
        progress.set_message("package lists");
        let mut command = self.command("apt-get");
        command.args(["-qq", "-o", "APT::Status-Fd=1", "update"]);
        let (status, complaint) = run_with_progress("apt-get", command, progress)?;
        // apt forgives lists it could not get, and with none of them it knows no package.
        if status.success() && self.version(KERNEL_METAPACKAGE).is_ok() {
            return Ok(());
        }
        Err(Error::Fetch { what: "package lists".into(), reason: complaint })
    }

    fn newest_kernel(&self) -> Result<Package, Error> {
        let text = self.show(KERNEL_METAPACKAGE)?;
        kernel_dependency(&text)
            .ok_or_else(|| Error::Fetch { what: KERNEL_METAPACKAGE.into(), reason: "it depends on no kernel".into() })
    }

    fn version(&self, name: &str) -> Result<Package, Error> {
        let text = self.show(name)?;
        let version = field(&text, "Version").unwrap_or("unknown").to_owned();
        Ok(Package { name: name.into(), version })
    }

    /// apt's record of the version it would choose.
    fn show(&self, name: &str) -> Result<String, Error> {
        let mut command = self.command("apt-cache");
        command.args(["show", "--no-all-versions", name]);
        let output = command.output().map_err(|e| start_error("apt-cache", e))?;
        if !output.status.success() {
            let reason = complaint(&String::from_utf8_lossy(&output.stderr));
            return Err(Error::Fetch { what: name.into(), reason });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn download(&self, packages: &[&str], progress: &ProgressBar) -> Result<(), Error> {
        progress.set_position(0);
        progress.set_message("packages");
        let mut command = self.command("apt-get");
        command.args(["-qq", "-o", "APT::Status-Fd=1", "download"]).args(packages);
        command.current_dir(self.work.join("packages"));
        match run_with_progress("apt-get", command, progress)? {
            (status, _) if status.success() => Ok(()),
            (_, reason) => Err(Error::Fetch { what: packages.join(" and "), reason }),
        }
    }

    /// The file that [`Apt::download`] made of a package.
    fn package_file(&self, name: &str) -> Result<PathBuf, Error> {
        let directory = self.work.join("packages");
        let error = |e| cache_error("read", &directory, e);
        for entry in fs::read_dir(&directory).map_err(error)? {
            let path = entry.map_err(error)?.path();
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            if file.strip_prefix(name).is_some_and(|rest| rest.starts_with('_') && rest.ends_with(".deb")) {
                return Ok(path);
            }
        }
        Err(Error::Fetch { what: name.into(), reason: "apt left no file".into() })
    }
}

/// Writes the file that matches `pattern` in a package to `path` and returns its length.
fn unpack(package: &Path, pattern: &str, path: &Path) -> Result<u64, Error> {
    let name = package.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let error = |reason: String| Error::Unpack { package: name.clone(), reason };
    let file = File::create(path).map_err(|e| cache_error("create", path, e))?;

    let mut unpacker = Command::new("dpkg-deb");
    unpacker.arg("--fsys-tarfile").arg(package).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut unpacker = start("dpkg-deb", unpacker)?;
    let archive = unpacker.0.stdout.take().map_or_else(Stdio::null, Stdio::from);
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--to-stdout", "--wildcards", pattern]).stdin(archive).stdout(file).stderr(Stdio::piped());
    let mut tar = start("tar", tar)?;
    let (tar_status, tar_complaint) = tar.wait("tar")?;
    let (status, complaint) = unpacker.wait("dpkg-deb")?;
    // dpkg-deb first: tar's complaint about a cut archive follows from its.
    if !status.success() {
        return Err(error(complaint));
    }
    if !tar_status.success() {
        return Err(error(tar_complaint));
    }
    let bytes = path.metadata().map_err(|e| cache_error("read", path, e))?.len();
    if bytes == 0 { Err(error(format!("there is no {pattern} in it"))) } else { Ok(bytes) }
}

/// A program that doesn't outlive us.
struct Running(Child);

impl Running {
    /// Its status and complaint.
    fn wait(&mut self, program: &'static str) -> Result<(ExitStatus, String), Error> {
        let mut text = String::new();
        if let Some(stderr) = self.0.stderr.take() {
            let _ = BufReader::new(stderr).read_to_string(&mut text);
        }
        let status = self.0.wait().map_err(|source| Error::Start { program, source })?;
        match signals::received() {
            Some(signal) => Err(Error::Interrupted(signal)),
            None => Ok((status, complaint(&text))),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program which a signal to Diglot ends too.
fn start(program: &'static str, mut command: Command) -> Result<Running, Error> {
    let child = Running(command.spawn().map_err(|e| start_error(program, e))?);
    let pid = libc::pid_t::try_from(child.0.id()).unwrap_or_default();
    signals::on_stop(move |_| {
        if pid > 0 {
            // SAFETY: sends a signal to a process; at worst it has ended already.
            unsafe { libc::kill(pid, libc::SIGTERM) };
        }
    });
    Ok(child)
}

fn start_error(program: &'static str, source: io::Error) -> Error {
    if source.kind() == io::ErrorKind::NotFound { Error::NoApt(program) } else { Error::Start { program, source } }
}

/// Runs an apt that reports progress on its standard output.
fn run_with_progress(
    program: &'static str,
    mut command: Command,
    progress: &ProgressBar,
) -> Result<(ExitStatus, String), Error> {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = start(program, command)?;
    if let Some(stdout) = child.0.stdout.take() {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if let Some(percent) = percent(&String::from_utf8_lossy(&line)) {
                progress.set_position(percent);
            }
        }
    }
    child.wait(program)
}

/// The percentage in `dlstatus:<item>:<percentage>:<text>` (apt's README.progress-reporting).
fn percent(line: &str) -> Option<u64> {
    let percent: f64 = line.strip_prefix("dlstatus:")?.split(':').nth(1)?.parse().ok()?;
    Some(percent.clamp(0.0, 100.0) as u64)
}

/// What apt or dpkg complains about, on one line.
fn complaint(stderr: &str) -> String {
    let error = |line: &&str| line.starts_with("E: ");
    let line = stderr.lines().find(error).or_else(|| stderr.lines().find(|line| !line.trim().is_empty()));
    let line = line.unwrap_or("it gave no reason").trim();
    line.trim_start_matches("E: ").trim_start_matches("W: ").trim_end_matches('.').to_owned()
}

/// A field of a package's record.
fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// The kernel among a metapackage's dependencies, such as `linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)`.
fn kernel_dependency(record: &str) -> Option<Package> {
    let dependencies = field(record, "Depends")?.split([',', '|']).map(str::trim);
    let kernel = dependencies.into_iter().find(|d| d.starts_with("linux-image-"))?;
    let (name, version) = kernel.split_once(' ').unwrap_or((kernel, ""));
    let version = version.trim_matches(|c: char| !c.is_alphanumeric());
    let version = if version.is_empty() { field(record, "Version").unwrap_or("unknown") } else { version };
    Some(Package { name: name.into(), version: version.into() })
}

fn in_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(100);
    if let Ok(style) = ProgressStyle::with_template("{msg:14} [{bar:40}] {percent:>3}%") {
        bar.set_style(style);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_and_reports_are_read() {
        let record = "Package: linux-image-cloud-amd64\nVersion: 6.1.176-1\nPre-Depends: x\n\
                      Depends: linux-base, linux-image-6.1.0-50-cloud-amd64 (= 6.1.176-1)\n";
        let kernel = Package { name: "linux-image-6.1.0-50-cloud-amd64".into(), version: "6.1.176-1".into() };
        assert_eq!(kernel_dependency(record), Some(kernel));
        assert_eq!(kernel_dependency("Depends: libc6"), None);
        assert_eq!(field(record, "Version"), Some("6.1.176-1"));

        assert_eq!(percent("dlstatus:2:12.7088:Retrieving file 2 of 2"), Some(12));
        assert_eq!(percent("dlstatus:2:1e9:x"), Some(100));
        assert_eq!(percent("pmstatus:2:12:x"), None);

        assert_eq!(complaint("W: slow\nE: No space left\nE: more\n"), "No space left");
        assert_eq!(complaint("\nW: Failed to fetch x\n"), "Failed to fetch x");
        assert_eq!(complaint(""), "it gave no reason");
    }
}
