//! Debian's entries among the host's package sources, as sources.list(5) describes both formats.
//!
//! Entries of third parties are left out, so that one which is unreachable or broken doesn't stand in the way. What an
//! entry says about its keys and its mirror is kept as it is.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

/// Names of Debian's releases, and of what they are to the others.
const RELEASES: [&str; 13] = [
    "stable",
    "oldstable",
    "oldoldstable",
    "testing",
    "unstable",
    "sid",
    "buster",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "experimental",
];
/// What may follow a release's name. Backports are left out: their packages aren't chosen by default.
const POCKETS: [&str; 4] = ["", "-updates", "-security", "/updates"];

/// One entry. Fields are those of the deb822 format, by which both formats are written back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Entry {
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    /// Other fields, such as `Signed-By`, each with the lines it continues on.
    other: Vec<(String, String)>,
}

/// Debian's sources on this host as one deb822 text for packages of `amd64`; `None` if there aren't any.
///
/// `etc` is apt's configuration directory. With a `suite`, such as `trixie` or `bookworm-backports`, the host's mirror
/// and keys serve for that suite instead.
pub fn debian_sources(etc: &Path, suite: Option<&str>) -> Option<String> {
    let entries: Vec<Entry> = files(etc)
        .iter()
        .flat_map(|path| {
            let text = fs::read_to_string(path).unwrap_or_default();
            if path.extension().is_some_and(|e| e == "sources") { parse_deb822(&text) } else { parse_lines(&text) }
        })
        .filter_map(only_debian)
        .collect();
    // A mirror may hide Debian under another name; one that says `debian` is the better guess.
    let named = |entry: &Entry| entry.uris.iter().any(|uri| uri.contains("debian"));
    let any_named = entries.iter().any(named);
    let mut entries: Vec<Entry> = entries.into_iter().filter(|entry| !any_named || named(entry)).collect();
    if let Some(suite) = suite {
        // Updates and security are elsewhere on many mirrors; a whole release is where the others are too.
        entries.retain(|entry| entry.suites.iter().any(|suite| RELEASES.contains(&&**suite)));
        entries.truncate(1);
        entries.iter_mut().for_each(|entry| entry.suites = with_base(suite));
    }
    let text: String = entries.iter().map(write).collect();
    (!text.is_empty()).then_some(text)
}

/// A suite, and the release that it adds to: backports don't have everything.
fn with_base(suite: &str) -> Vec<String> {
    let base = suite.strip_suffix("-backports");
    base.into_iter().chain([suite]).map(str::to_owned).collect()
}

/// Debian's own servers, its packages verified with `keyring`.
pub fn default_sources(keyring: &str, suite: Option<&str>) -> String {
    let entry = |uri: &str, suite: &str| Entry {
        uris: vec![uri.into()],
        suites: with_base(suite),
        components: vec!["main".into()],
        other: vec![("Signed-By".into(), keyring.into())],
    };
    if let Some(suite) = suite {
        return write(&entry("http://deb.debian.org/debian", suite));
    }
    write(&entry("http://deb.debian.org/debian", "stable"))
        + &write(&entry("http://deb.debian.org/debian-security", "stable-security"))
}

fn files(etc: &Path) -> Vec<PathBuf> {
    let parts = fs::read_dir(etc.join("sources.list.d"));
    let mut files: Vec<PathBuf> = parts.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| e == "list" || e == "sources"));
    files.sort();
    files.insert(0, etc.join("sources.list"));
    files
}

/// The part of an entry that is Debian's `main`, if there is one.
fn only_debian(mut entry: Entry) -> Option<Entry> {
    entry.suites.retain(|suite| {
        RELEASES.iter().any(|release| suite.strip_prefix(release).is_some_and(|pocket| POCKETS.contains(&pocket)))
    });
    entry.uris.retain(|uri| !uri.starts_with("cdrom:"));
    let main = entry.components.iter().any(|component| component == "main");
    (main && !entry.suites.is_empty() && !entry.uris.is_empty()).then_some(entry)
}

fn write(entry: &Entry) -> String {
    let mut text = format!(
        "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\nArchitectures: amd64\nTargets: Packages\n",
        entry.uris.join(" "),
        entry.suites.join(" ")
    );
    for (name, value) in &entry.other {
        let _ = writeln!(text, "{name}: {value}");
    }
    text.push('\n');
    text
}

/// True for a field that [`write`] sets itself, under any of its names.
fn is_replaced(name: &str) -> bool {
    matches!(name, "arch" | "architectures" | "lang" | "languages" | "target" | "targets" | "types" | "enabled")
        || name.ends_with("-add")
        || name.ends_with("-remove")
}

/// One line an entry: `deb [option=value ...] uri suite component...`.
fn parse_lines(text: &str) -> Vec<Entry> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Entry> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?;
    let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    let mut entry =
        Entry { uris: vec![words.next()?], suites: vec![words.next()?], components: words.collect(), other: vec![] };
    for option in options.split_whitespace() {
        let (name, value) = option.split_once('=')?;
        let name = name.trim_end_matches(['+', '-']).to_ascii_lowercase();
        if !is_replaced(&name) {
            // A list is separated by commas here and by blanks there.
            entry.other.push((name, value.replace(',', " ")));
        }
    }
    Some(entry)
}

/// Paragraphs of `Field: value`, with values that continue on indented lines.
fn parse_deb822(text: &str) -> Vec<Entry> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.split(|line| line.trim().is_empty()).filter_map(parse_paragraph).collect()
}

fn parse_paragraph(lines: &[&str]) -> Option<Entry> {
    let mut fields: Vec<(String, String)> = Vec::new();
    for line in lines {
        if line.starts_with([' ', '\t']) {
            let (_, value) = fields.last_mut()?;
            value.push('\n');
            value.push_str(line);
        } else {
            let (name, value) = line.split_once(':')?;
            fields.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    let list = |field: &str| -> Vec<String> {
        let values = fields.iter().filter(|(name, _)| name == field);
        values.flat_map(|(_, value)| value.split_whitespace()).map(str::to_owned).collect()
    };
    let disabled = matches!(list("enabled").first().map(|v| v.to_ascii_lowercase()).as_deref(), Some("no" | "false"));
    if disabled || !list("types").iter().any(|kind| kind == "deb") {
        return None;
    }
    let mut entry = Entry { uris: list("uris"), suites: list("suites"), components: list("components"), other: vec![] };
    let own = |name: &str| matches!(name, "uris" | "suites" | "components") || is_replaced(name);
    entry.other = fields.into_iter().filter(|(name, _)| !own(name)).collect();
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "Types: deb\nURIs: ";

    fn read(list: &str, sources: &str) -> Option<String> {
        let etc = tempfile::tempdir().expect("directory");
        fs::create_dir(etc.path().join("sources.list.d")).expect("directory");
        fs::write(etc.path().join("sources.list"), list).expect("write");
        fs::write(etc.path().join("sources.list.d/x.sources"), sources).expect("write");
        fs::write(etc.path().join("sources.list.d/x.sources.save"), "deb http://saved/debian sid main").expect("write");
        debian_sources(etc.path(), None)
    }

    /// URIs and suites of what was chosen, an entry a line.
    fn chosen(list: &str, sources: &str) -> Vec<String> {
        let text = read(list, sources).unwrap_or_default();
        let field = |paragraph: &str, name: &str| {
            paragraph.lines().find_map(|l| l.strip_prefix(name)).expect("field").trim().to_owned()
        };
        let paragraphs = text.split("\n\n").filter(|p| !p.is_empty());
        paragraphs.map(|p| field(p, "URIs:") + " " + &field(p, "Suites:")).collect()
    }

    #[test]
    fn one_line_entries() {
        let cases = [
            ("deb http://deb.debian.org/debian bookworm main", "http://deb.debian.org/debian bookworm"),
            ("deb [arch=arm64] http://d.org/debian sid contrib main # x", "http://d.org/debian sid"),
            ("deb\thttp://d.org/debian-security buster/updates main", "http://d.org/debian-security buster/updates"),
            ("deb http://mirror.example/apt trixie-security main", "http://mirror.example/apt trixie-security"),
        ];
        for (line, expected) in cases {
            assert_eq!(chosen(line, ""), [expected], "{line}");
        }
        for line in [
            "",
            "# deb http://deb.debian.org/debian bookworm main",
            "deb-src http://deb.debian.org/debian bookworm main",
            "deb http://deb.debian.org/debian bookworm-backports main",
            "deb http://deb.debian.org/debian bookworm non-free",
            "deb cdrom:[Debian 12]/ bookworm main",
            "deb http://archive.ubuntu.com/ubuntu noble main",
            "deb https://deb.nodesource.com/node_20.x nodistro main",
            "deb https://packages.cloud.google.com/apt cloud-sdk-bookworm main",
            "deb https://download.docker.com/linux/debian bookworm stable",
            "deb http://example.org/flat ./",
            "deb [signed-by=x http://deb.debian.org/debian bookworm main",
        ] {
            assert_eq!(chosen(line, ""), Vec::<String>::new(), "{line}");
        }
    }

    #[test]
    fn deb822_entries_keep_their_keys() {
        let sources = "# comment\nTypes: deb deb-src\nURIs: http://d.org/debian\nSuites: bookworm bookworm-backports\n  \
                       bookworm-updates\nComponents: main contrib\nArchitectures: arm64\nSigned-By:\n -----BEGIN-----\n .\n \
                       xyz\n\nTypes: deb\nEnabled: no\nURIs: http://off.org/debian\nSuites: sid\nComponents: main\n";
        let expected = format!(
            "{HEAD}http://d.org/debian\nSuites: bookworm bookworm-updates\nComponents: main\nArchitectures: amd64\n\
             Targets: Packages\nsigned-by: \n -----BEGIN-----\n .\n xyz\n\n"
        );
        assert_eq!(read("", sources).as_deref(), Some(&*expected));
    }

    #[test]
    fn options_of_a_line_become_fields() {
        let line = "deb [ signed-by=/a.gpg,/b.gpg arch=arm64,i386 trusted=yes ] http://d.org/debian sid main";
        let expected = format!(
            "{HEAD}http://d.org/debian\nSuites: sid\nComponents: main\nArchitectures: amd64\nTargets: Packages\n\
             signed-by: /a.gpg /b.gpg\ntrusted: yes\n\n"
        );
        assert_eq!(read(line, "").as_deref(), Some(&*expected));
    }

    #[test]
    fn a_suite_is_taken_from_the_hosts_mirror() {
        let etc = tempfile::tempdir().expect("directory");
        let list = "deb [signed-by=/k] http://m.example/debian bookworm main\n\
                    deb http://m.example/debian bookworm-updates main\n\
                    deb http://m.example/debian-security bookworm-security main\n";
        fs::write(etc.path().join("sources.list"), list).expect("write");
        for (suite, suites) in [("trixie", "trixie"), ("bookworm-backports", "bookworm bookworm-backports")] {
            let expected = format!(
                "{HEAD}http://m.example/debian\nSuites: {suites}\nComponents: main\nArchitectures: amd64\n\
                 Targets: Packages\nsigned-by: /k\n\n"
            );
            assert_eq!(debian_sources(etc.path(), Some(suite)).as_deref(), Some(&*expected));
            assert!(default_sources("/k", Some(suite)).contains(&format!("Suites: {suites}\n")));
        }
    }

    #[test]
    fn third_parties_step_back_behind_debian() {
        let list = "deb https://apt.example.com bookworm main\ndeb http://deb.debian.org/debian bookworm main\n";
        assert_eq!(chosen(list, ""), ["http://deb.debian.org/debian bookworm"]);
    }
}
