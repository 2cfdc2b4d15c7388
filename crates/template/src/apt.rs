//! The host's apt, asked about Debian only.
//!
//! A build uses whatever Debian mirror the host is configured for: apt itself lists its sources, we
//! keep those of Debian's own archive for one suite (with its updates and security fixes, component
//! `main`), and leave third-party sources out. apt then works in a folder of ours, with an empty
//! package status, so nothing of the host's state is changed or matters.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use stead_sys::durable::{self, Existing};

use crate::error::{OnPath, TemplateError};
use crate::program::run;
use crate::progress::Step;

/// Where Debian keeps its archive's keys, the newer name first; used where it exists, so that the
/// sources of a template are trusted for Debian's keys and no others.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.pgp",
    "/usr/share/keyrings/debian-archive-keyring.gpg",
];

/// What `apt-get indextargets` prints a line, tab-separated.
const TARGET_FORMAT: &str = "$(REPO_URI)\t$(RELEASE)\t$(COMPONENT)\t$(CODENAME)\t$(ORIGIN)";

/// The metapackage whose dependency is the kernel for virtual machines.
pub(crate) const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";

/// A package and its version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Package {
    /// The name, without architecture.
    pub name: String,
    /// Debian's version.
    pub version: String,
}

/// The Debian sources of one suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sources {
    /// The suite's code name.
    pub(crate) suite: String,
    targets: Vec<Target>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Target {
    uri: String,
    release: String,
    component: String,
    codename: String,
}

impl Sources {
    /// Asks the host's apt for its Debian sources of `suite`, or of the suite the host itself runs.
    pub(crate) fn of_host(suite: Option<&str>, step: &Step<'_>) -> Result<Self, TemplateError> {
        let mut command = Command::new("apt-get");
        command.args([
            "indextargets",
            "--format",
            TARGET_FORMAT,
            "Created-By: Packages",
        ]);
        let listed = run(&mut command, "listing apt's sources", step)?;
        let targets = debian_targets(&String::from_utf8_lossy(&listed));
        let host = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        Self::choose(
            targets,
            suite.map(str::to_owned).or_else(|| codename_of(&host)),
        )
    }

    fn choose(targets: Vec<Target>, suite: Option<String>) -> Result<Self, TemplateError> {
        let known: BTreeSet<&str> = targets
            .iter()
            .map(|target| base_suite(&target.codename))
            .collect();
        let found = if known.is_empty() {
            "none".to_owned()
        } else {
            known.iter().copied().collect::<Vec<_>>().join(", ")
        };
        let suite = match suite {
            Some(suite) if known.contains(suite.as_str()) => suite,
            None if known.len() == 1 => found,
            Some(wanted) => return Err(TemplateError::NoSource { wanted, found }),
            None => {
                let wanted = "a Debian suite".to_owned();
                return Err(TemplateError::NoSource { wanted, found });
            }
        };
        let targets = targets
            .into_iter()
            .filter(|target| base_suite(&target.codename) == suite)
            .collect();
        Ok(Self { suite, targets })
    }

    /// The lines of a `sources.list`.
    pub(crate) fn lines(&self) -> String {
        let keyring = KEYRINGS.iter().find(|path| Path::new(path).is_file());
        let option = keyring
            .map(|path| format!("[signed-by={path}] "))
            .unwrap_or_default();
        self.targets
            .iter()
            .map(|target| {
                format!(
                    "deb {option}{} {} {}\n",
                    target.uri, target.release, target.component
                )
            })
            .collect()
    }

    /// The mirror of the suite itself, without updates: what debootstrap takes.
    pub(crate) fn main_mirror(&self) -> Option<&str> {
        self.targets
            .iter()
            .find(|target| target.codename == self.suite)
            .map(|target| target.uri.as_str())
    }
}

/// The Debian targets among apt's: component `main`, no backports or proposed updates.
fn debian_targets(listed: &str) -> Vec<Target> {
    let mut targets: Vec<Target> = listed
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split('\t').collect();
            let [uri, release, component, codename, origin] = fields[..] else {
                return None;
            };
            let wanted = ["", "-updates", "-security"].contains(&pocket(codename));
            (origin == "Debian" && component == "main" && wanted).then(|| Target {
                uri: uri.to_owned(),
                release: release.to_owned(),
                component: component.to_owned(),
                codename: codename.to_owned(),
            })
        })
        .collect();
    targets.sort();
    targets.dedup();
    targets
}

fn base_suite(codename: &str) -> &str {
    codename.split('-').next().unwrap_or(codename)
}

fn pocket(codename: &str) -> &str {
    &codename[base_suite(codename).len()..]
}

fn codename_of(os_release: &str) -> Option<String> {
    os_release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .filter(|name| !name.is_empty())
}

/// Refuses what apt would not take for a package name (and might take for an option).
pub(crate) fn check_package_name(name: &str) -> Result<(), TemplateError> {
    let sound = name.len() >= 2
        && name.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c));
    if sound {
        return Ok(());
    }
    Err(TemplateError::Invalid {
        what: "a package name",
        found: name.to_owned(),
        expected: "Debian's form: two or more of a-z 0-9 + - . beginning with a letter or digit"
            .to_owned(),
    })
}

/// apt, working in a folder of its own.
#[derive(Debug)]
pub(crate) struct Apt {
    root: PathBuf,
}

impl Apt {
    /// Sets up `root`; what an earlier build left there is used again.
    pub(crate) fn set_up(root: &Path, sources: &Sources) -> Result<Self, TemplateError> {
        for folder in ["lists/partial", "cache/archives/partial"] {
            durable::create_dir(&root.join(folder), 0o755).on("creating", root)?;
        }
        let apt = Self {
            root: root.to_owned(),
        };
        for (name, text) in [
            ("status", String::new()),
            ("sources.list", sources.lines()),
            ("apt.conf", apt.configuration()),
        ] {
            let path = root.join(name);
            durable::publish(&path, 0o644, text.as_bytes(), Existing::Replace)
                .on("writing", &path)?;
        }
        Ok(apt)
    }

    /// The `sources.list` in use.
    pub(crate) fn sources_list(&self) -> PathBuf {
        self.root.join("sources.list")
    }

    fn configuration(&self) -> String {
        let root = self.root.display();
        let mut text = String::new();
        for (key, value) in [
            ("Dir::State", ""),
            ("Dir::State::status", "/status"),
            ("Dir::State::lists", "/lists"),
            ("Dir::Cache", "/cache"),
            ("Dir::Etc::sourcelist", "/sources.list"),
        ] {
            // Writing to a String cannot fail.
            writeln!(text, "{key} \"{root}{value}\";").unwrap_or_default();
        }
        // The host's pins are about the host; the download user of apt may not enter our folder.
        text.push_str(concat!(
            "Dir::Etc::sourceparts \"/dev/null\";\n",
            "Dir::Etc::preferences \"/dev/null\";\n",
            "Dir::Etc::preferencesparts \"/dev/null\";\n",
            "APT::Sandbox::User \"root\";\n",
            "APT::Install-Recommends \"false\";\n",
            "Acquire::Languages \"none\";\n",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";\n",
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled \"false\";\n",
            "Acquire::Retries \"3\";\n",
        ));
        text
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.root.join("apt.conf"));
        command
    }

    /// Refreshes the index.
    pub(crate) fn update(&self, step: &Step<'_>) -> Result<(), TemplateError> {
        let mut command = self.command("apt-get");
        command.args(["-q", "-o", "APT::Update::Error-Mode=any", "update"]);
        run(&mut command, "refreshing the package index", step).map(drop)
    }

    /// A fingerprint of the index: changes whenever a source has published something.
    pub(crate) fn index_fingerprint(&self) -> Result<String, TemplateError> {
        let folder = self.root.join("lists");
        let mut paths: Vec<PathBuf> = std::fs::read_dir(&folder)
            .and_then(|entries| {
                entries
                    .map(|entry| entry.map(|entry| entry.path()))
                    .collect()
            })
            .on("listing", &folder)?;
        // Release files hold the hashes of all others.
        paths.retain(|path| path.to_string_lossy().ends_with("Release"));
        paths.sort();
        let mut hasher = blake3::Hasher::new();
        for path in paths {
            hasher.update(path.to_string_lossy().as_bytes());
            hasher.update(&std::fs::read(&path).on("reading", &path)?);
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Which packages, in which versions, an installation of Debian's essential ones and `packages` has.
    pub(crate) fn resolve(
        &self,
        packages: &[String],
        step: &Step<'_>,
    ) -> Result<Vec<Package>, TemplateError> {
        let mut command = self.command("apt-get");
        command
            .args(["-q", "--simulate", "install", "?essential", "apt"])
            .args(packages);
        let planned = run(&mut command, "resolving the packages", step)?;
        let planned = parse_plan(&String::from_utf8_lossy(&planned));
        if planned.is_empty() {
            return Err(TemplateError::Answer {
                doing: "resolving the packages".to_owned(),
                program: "apt-get".to_owned(),
                found: "no package".to_owned(),
                expected: "at least the essential ones".to_owned(),
            });
        }
        Ok(planned)
    }

    /// The kernel that [`KERNEL_METAPACKAGE`] stands for today.
    pub(crate) fn kernel(&self, step: &Step<'_>) -> Result<Package, TemplateError> {
        let mut command = self.command("apt-cache");
        command.args(["show", "--no-all-versions", KERNEL_METAPACKAGE]);
        let doing = "looking for the kernel";
        let shown = run(&mut command, doing, step)?;
        let name = kernel_dependency(&String::from_utf8_lossy(&shown)).ok_or_else(|| {
            TemplateError::Answer {
                doing: doing.to_owned(),
                program: "apt-cache".to_owned(),
                found: "no dependency on a linux-image package".to_owned(),
                expected: format!("one dependency of {KERNEL_METAPACKAGE}"),
            }
        })?;
        self.newest(&name, step)
    }

    /// The version of a package that would be installed today.
    pub(crate) fn newest(&self, name: &str, step: &Step<'_>) -> Result<Package, TemplateError> {
        let doing = "looking for a package";
        let mut command = self.command("apt-cache");
        command.args(["show", "--no-all-versions", name]);
        let shown = run(&mut command, doing, step)?;
        let version = field(&String::from_utf8_lossy(&shown), "Version").ok_or_else(|| {
            TemplateError::Answer {
                doing: doing.to_owned(),
                program: "apt-cache".to_owned(),
                found: format!("no version of {name}"),
                expected: "a version".to_owned(),
            }
        })?;
        let name = name.to_owned();
        Ok(Package { name, version })
    }

    /// Downloads `package` into the empty folder `into`, checked by apt against the signed index.
    pub(crate) fn download(
        &self,
        package: &Package,
        into: &Path,
        step: &Step<'_>,
    ) -> Result<PathBuf, TemplateError> {
        let mut command = self.command("apt-get");
        command
            .args(["-q", "download"])
            .arg(format!("{}={}", package.name, package.version))
            .current_dir(into);
        let doing = "downloading a package";
        run(&mut command, doing, step)?;
        let downloaded: Vec<PathBuf> = std::fs::read_dir(into)
            .and_then(|entries| {
                entries
                    .map(|entry| entry.map(|entry| entry.path()))
                    .collect()
            })
            .on("listing", into)?;
        match <[PathBuf; 1]>::try_from(downloaded) {
            Ok([deb]) => Ok(deb),
            Err(found) => Err(TemplateError::Answer {
                doing: doing.to_owned(),
                program: "apt-get".to_owned(),
                found: format!("{} files", found.len()),
                expected: "one package".to_owned(),
            }),
        }
    }
}

/// Reads `Inst name (version archive …)` lines.
fn parse_plan(plan: &str) -> Vec<Package> {
    let mut packages: Vec<Package> = plan
        .lines()
        .filter_map(|line| {
            let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
            let version = rest.strip_prefix('(')?.split([' ', ')']).next()?;
            Some(Package {
                name: name.to_owned(),
                version: version.to_owned(),
            })
        })
        .collect();
    packages.sort();
    packages
}

fn kernel_dependency(shown: &str) -> Option<String> {
    field(shown, "Depends")?
        .split(',')
        .filter_map(|dependency| {
            dependency
                .split([' ', '(', '|'])
                .find(|word| !word.is_empty())
        })
        .find(|name| name.starts_with("linux-image-") && check_package_name(name).is_ok())
        .map(str::to_owned)
}

/// The value of `key` in the first paragraph that has it.
fn field(text: &str, key: &str) -> Option<String> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .map(|value| value.trim().to_owned())
}

/// The installed packages that a dpkg status file lists.
///
/// # Source
/// Debian policy, chapter 5 (control data), and dpkg-query(1): `Status: install ok installed`.
pub(crate) fn installed(status: &str) -> Vec<Package> {
    let mut packages: Vec<Package> = status
        .split("\n\n")
        .filter(|paragraph| {
            field(paragraph, "Status").is_some_and(|status| status.ends_with(" installed"))
        })
        .filter_map(|paragraph| {
            Some(Package {
                name: field(paragraph, "Package")?,
                version: field(paragraph, "Version")?,
            })
        })
        .collect();
    packages.sort();
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTED: &str = "http://mirror.test/debian/\tstable\tmain\tbookworm\tDebian\n\
        http://mirror.test/debian/\tbookworm-updates\tmain\tbookworm-updates\tDebian\n\
        http://mirror.test/debian/\tbookworm-backports\tmain\tbookworm-backports\tDebian Backports\n\
        http://mirror.test/debian/\tbookworm\tcontrib\tbookworm\tDebian\n\
        http://mirror.test/sec/\tbookworm-security\tmain\tbookworm-security\tDebian\n\
        http://third.test/\tnodistro\tmain\tnodistro\tSomebody\n\
        http://unread.test/\tbookworm\tmain\t\t\n";

    #[test]
    fn only_debian_main_of_one_suite_is_used() {
        let sources = Sources::choose(debian_targets(LISTED), None).expect("one suite");
        assert_eq!(sources.suite, "bookworm");
        let lines = sources.lines();
        assert_eq!(lines.lines().count(), 3, "{lines}");
        assert!(lines.contains("http://mirror.test/debian/ stable main"));
        assert!(lines.contains("bookworm-security main"));
        assert!(
            !lines.contains("third.test")
                && !lines.contains("contrib")
                && !lines.contains("backports")
        );
        assert_eq!(sources.main_mirror(), Some("http://mirror.test/debian/"));
    }

    #[test]
    fn a_suite_that_apt_does_not_know_is_refused_with_those_it_knows() {
        let error =
            Sources::choose(debian_targets(LISTED), Some("sid".to_owned())).expect_err("unknown");
        assert!(
            error.to_string().contains("no apt source for sid"),
            "{error}"
        );
        assert!(error.to_string().contains("bookworm"), "{error}");
        let error = Sources::choose(Vec::new(), None).expect_err("no source");
        assert!(error.to_string().contains("knows none"), "{error}");
    }

    #[test]
    fn two_suites_need_a_choice() {
        let both = format!("{LISTED}http://mirror.test/debian/\ttrixie\tmain\ttrixie\tDebian\n");
        assert!(Sources::choose(debian_targets(&both), None).is_err());
        let chosen =
            Sources::choose(debian_targets(&both), Some("trixie".to_owned())).expect("known");
        assert_eq!(chosen.targets.len(), 1);
    }

    #[test]
    fn package_names_cannot_become_options_or_paths() {
        for bad in [
            "",
            "a",
            "-y",
            "--help",
            "git;reboot",
            "git,perl",
            "../x",
            "Git",
            "git=1",
            "?essential",
            "a b",
        ] {
            assert!(check_package_name(bad).is_err(), "{bad}");
        }
        for good in ["git", "g++", "libstdc++6", "python3.11", "0ad"] {
            assert!(check_package_name(good).is_ok(), "{good}");
        }
    }

    #[test]
    fn a_plan_names_packages_with_versions() {
        let plan = "NOTE: a simulation\nInst libc6 (2.36-9 Debian:12 [amd64]) []\nInst bash (5.2)\nConf bash (5.2)\n";
        let read = parse_plan(plan);
        assert_eq!(read.len(), 2);
        assert_eq!(
            (read[1].name.as_str(), read[1].version.as_str()),
            ("libc6", "2.36-9")
        );
        assert_eq!(read[0].version, "5.2");
    }

    #[test]
    fn the_kernel_is_the_dependency_of_the_metapackage() {
        let shown = "Package: linux-image-cloud-amd64\nDepends: foo, linux-image-6.1.0-9-cloud-amd64 (= 6.1.27-1)\n";
        assert_eq!(
            kernel_dependency(shown).as_deref(),
            Some("linux-image-6.1.0-9-cloud-amd64")
        );
        assert_eq!(kernel_dependency("Package: x\n"), None);
        assert_eq!(kernel_dependency("Depends: linux-image-../../x\n"), None);
    }

    #[test]
    fn removed_packages_are_not_installed() {
        let status = "Package: a\nStatus: install ok installed\nVersion: 1\n\n\
            Package: b\nStatus: deinstall ok config-files\nVersion: 2\n\nPackage: c\nStatus: install ok not-installed\n";
        let read = installed(status);
        assert_eq!(
            read,
            [Package {
                name: "a".to_owned(),
                version: "1".to_owned()
            }]
        );
    }
}
