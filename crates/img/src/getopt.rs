//! Command lines as `getopt_long` reads them: short options in clusters (`-pq`, `-fraw`), long ones
//! with `=` or a space and cut short where that is unambiguous, operands in between, `--` as the end
//! of options.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// An option: what it is called here, how it is written, and whether it takes a value.
#[derive(Debug)]
pub(crate) struct Opt {
    /// The name by which [`Parsed`] is asked.
    pub id: &'static str,
    /// The letters that stand for it.
    pub shorts: &'static str,
    /// Its long names.
    pub longs: &'static [&'static str],
    /// Whether a value follows.
    pub takes_value: bool,
}

impl Opt {
    /// An option without a value.
    pub const fn flag(
        id: &'static str,
        shorts: &'static str,
        longs: &'static [&'static str],
    ) -> Self {
        Self {
            id,
            shorts,
            longs,
            takes_value: false,
        }
    }

    /// An option with a value.
    pub const fn value(
        id: &'static str,
        shorts: &'static str,
        longs: &'static [&'static str],
    ) -> Self {
        Self {
            id,
            shorts,
            longs,
            takes_value: true,
        }
    }
}

/// `-h` and `--help`, which every command has.
pub(crate) const HELP: Opt = Opt::flag("help", "h", &["help"]);

/// What is wrong with a command line, with the argument that it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// There is no such option, or a value was given to one that takes none.
    Unknown(String),
    /// The option needs a value.
    NoValue(String),
}

impl Wrong {
    /// The text for people.
    pub fn text(&self) -> String {
        match self {
            Self::Unknown(what) => format!("unrecognized option '{what}'"),
            Self::NoValue(what) => format!("missing argument for option '{what}'"),
        }
    }
}

/// A command line, taken apart.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    given: Vec<(&'static str, OsString)>,
    /// What is no option, in order.
    pub operands: Vec<OsString>,
}

impl Parsed {
    /// Whether the option was given.
    pub fn has(&self, id: &str) -> bool {
        self.given.iter().any(|(given, _)| *given == id)
    }

    /// The value that was given last.
    pub fn last(&self, id: &str) -> Option<&OsStr> {
        let found = self.given.iter().rev().find(|(given, _)| *given == id)?;
        Some(&found.1)
    }

    /// All options in the order they were given.
    pub fn given(&self) -> impl Iterator<Item = (&'static str, &OsStr)> {
        self.given
            .iter()
            .map(|(id, value)| (*id, value.as_os_str()))
    }
}

/// How far to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Until {
    /// Operands may stand between options.
    End,
    /// The first operand ends the options; it and all behind it are operands.
    FirstOperand,
}

/// Takes `args` apart. `-h` and `--help` are known without being in `opts`.
pub(crate) fn parse(args: &[OsString], opts: &[Opt], until: Until) -> Result<Parsed, Wrong> {
    let mut parsed = Parsed::default();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            parsed.operands.extend(rest.cloned());
            return Ok(parsed);
        }
        if let Some(name) = bytes.strip_prefix(b"--") {
            let option = long(opts, arg, name, &mut rest)?;
            parsed.given.push(option);
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            cluster(opts, arg, &mut rest, &mut parsed)?;
        } else {
            parsed.operands.push(arg.clone());
            if until == Until::FirstOperand {
                parsed.operands.extend(rest.cloned());
                return Ok(parsed);
            }
        }
    }
    Ok(parsed)
}

fn shown(arg: &OsStr) -> String {
    arg.to_string_lossy().into_owned()
}

fn long<'a>(
    opts: &[Opt],
    arg: &OsStr,
    name: &[u8],
    rest: &mut impl Iterator<Item = &'a OsString>,
) -> Result<(&'static str, OsString), Wrong> {
    let equals = name.iter().position(|byte| *byte == b'=');
    let (name, value) = match equals {
        Some(at) => (
            &name[..at],
            Some(OsString::from_vec(name[at + 1..].to_vec())),
        ),
        None => (name, None),
    };
    let option = find_long(opts, name).ok_or_else(|| Wrong::Unknown(shown(arg)))?;
    match (option.takes_value, value) {
        (false, None) => Ok((option.id, OsString::new())),
        (false, Some(_)) => Err(Wrong::Unknown(shown(arg))),
        (true, Some(value)) => Ok((option.id, value)),
        (true, None) => match rest.next() {
            Some(value) => Ok((option.id, value.clone())),
            None => Err(Wrong::NoValue(shown(arg))),
        },
    }
}

/// The option of that name, or the only one whose name begins so.
fn find_long<'a>(opts: &'a [Opt], name: &[u8]) -> Option<&'a Opt> {
    let all = || opts.iter().chain([&HELP]);
    let exact = all().find(|opt| opt.longs.iter().any(|long| long.as_bytes() == name));
    if exact.is_some() {
        return exact;
    }
    let begins = |opt: &&Opt| opt.longs.iter().any(|l| l.as_bytes().starts_with(name));
    let mut found = all().filter(begins);
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

fn cluster<'a>(
    opts: &[Opt],
    arg: &OsStr,
    rest: &mut impl Iterator<Item = &'a OsString>,
    parsed: &mut Parsed,
) -> Result<(), Wrong> {
    let letters = &arg.as_bytes()[1..];
    for (at, letter) in letters.iter().enumerate() {
        let mut all = opts.iter().chain([&HELP]);
        let option = all
            .find(|opt| opt.shorts.as_bytes().contains(letter))
            .ok_or_else(|| Wrong::Unknown(shown(arg)))?;
        if !option.takes_value {
            parsed.given.push((option.id, OsString::new()));
            continue;
        }
        let joined = &letters[at + 1..];
        let value = if joined.is_empty() {
            rest.next().cloned()
        } else {
            Some(OsString::from_vec(joined.to_vec()))
        };
        let value = value.ok_or_else(|| Wrong::NoValue(shown(arg)))?;
        parsed.given.push((option.id, value));
        return Ok(());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTS: &[Opt] = &[
        Opt::value("format", "f", &["format"]),
        Opt::flag("progress", "p", &["progress"]),
        Opt::flag("quiet", "q", &["quiet"]),
        Opt::value("output", "", &["output"]),
        Opt::value("object", "", &["object"]),
    ];

    fn read(args: &[&str]) -> Result<Parsed, Wrong> {
        let args: Vec<OsString> = args.iter().map(OsString::from).collect();
        parse(&args, OPTS, Until::End)
    }

    #[test]
    fn options_come_in_clusters_joined_cut_short_and_between_operands() {
        for args in [
            &["-pqf", "raw", "a", "--output=json", "b"][..],
            &["a", "-p", "b", "-q", "-fraw", "--outp", "json"],
            &[
                "-q", "-p", "--format", "raw", "--output", "json", "--", "a", "b",
            ],
        ] {
            let parsed = read(args).expect("a good command line");
            assert!(parsed.has("progress") && parsed.has("quiet"), "{args:?}");
            assert_eq!(parsed.last("format"), Some(OsStr::new("raw")), "{args:?}");
            assert_eq!(parsed.last("output"), Some(OsStr::new("json")), "{args:?}");
            assert_eq!(parsed.operands, ["a", "b"], "{args:?}");
        }
    }

    #[test]
    fn behind_two_dashes_everything_is_an_operand() {
        let parsed = read(&["--", "-p", "--quiet"]).expect("a good command line");
        assert!(!parsed.has("progress"));
        assert_eq!(parsed.operands, ["-p", "--quiet"]);
    }

    #[test]
    fn what_is_unknown_ambiguous_or_lacks_its_value_is_named() {
        let unknown = |arg: &str| Wrong::Unknown(arg.to_owned());
        let wrong = |args: &[&str]| read(args).expect_err("a wrong command line");
        assert_eq!(wrong(&["-pZ"]), unknown("-pZ"));
        assert_eq!(wrong(&["--o=json"]), unknown("--o=json"));
        assert_eq!(wrong(&["--quiet=1"]), unknown("--quiet=1"));
        assert_eq!(wrong(&["-f"]), Wrong::NoValue("-f".into()));
        assert_eq!(wrong(&["--output"]), Wrong::NoValue("--output".into()));
    }

    #[test]
    fn a_lone_dash_is_an_operand_and_the_last_value_counts() {
        let parsed = read(&["-f", "a", "-", "-f", "b"]).expect("a good command line");
        assert_eq!(parsed.operands, ["-"]);
        assert_eq!(parsed.last("format"), Some(OsStr::new("b")));
    }
}
