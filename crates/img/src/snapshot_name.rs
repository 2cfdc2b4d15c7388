//! What a user calls an internal snapshot: its id, its name, or `snapshot.id=…,snapshot.name=…`.

use stead_qcow2::{Chain, InternalSnapshot};

use crate::failure::{Failure, Outcome};
use crate::keyval;

/// How an internal snapshot is looked for.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    id: Option<String>,
    name: Option<String>,
    /// Either will do, the id first.
    either: bool,
}

fn wanted(text: &str) -> Outcome<Wanted> {
    if !text.starts_with("snapshot.") {
        return Ok(Wanted {
            id: Some(text.to_owned()),
            name: Some(text.to_owned()),
            either: true,
        });
    }
    let mut wanted = Wanted {
        id: None,
        name: None,
        either: false,
    };
    for (key, value) in keyval::parse(text) {
        match key.as_str() {
            "snapshot.id" => wanted.id = Some(value),
            "snapshot.name" => wanted.name = Some(value),
            _ => {
                return Err(Failure::new(format!(
                    "Invalid parameter '{key}'\nFailed in parsing snapshot param '{text}'"
                )));
            }
        }
    }
    Ok(wanted)
}

/// The internal snapshot that `wanted` means.
fn find<'a>(all: &'a [InternalSnapshot], wanted: &Wanted) -> Option<&'a InternalSnapshot> {
    let is = |bytes: &[u8], text: &Option<String>| {
        text.as_ref().is_some_and(|text| text.as_bytes() == bytes)
    };
    let by_id = |snapshot: &&InternalSnapshot| is(&snapshot.id, &wanted.id);
    let by_name = |snapshot: &&InternalSnapshot| is(&snapshot.name, &wanted.name);
    if wanted.either {
        return all.iter().find(by_id).or_else(|| all.iter().find(by_name));
    }
    let fits = |snapshot: &&InternalSnapshot| {
        (wanted.id.is_none() || by_id(snapshot)) && (wanted.name.is_none() || by_name(snapshot))
    };
    all.iter().find(fits)
}

/// The disk as it was when the internal snapshot that `text` means was made.
pub(crate) fn view(chain: &Chain, text: &str) -> Outcome<Chain> {
    let wanted = wanted(text)?;
    let missing = || Failure::new("Failed to load snapshot: Can't find snapshot");
    let layer = chain.layer(0).ok_or_else(missing)?;
    let all = layer.internal_snapshots()?;
    let snapshot = find(&all, &wanted).ok_or_else(missing)?;
    Ok(chain.view_of(snapshot)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_word_is_an_id_or_a_name_and_parameters_are_what_they_say() {
        let either = wanted("1").expect("good");
        assert!(either.either);
        let named = wanted("snapshot.name=a,,b").expect("good");
        assert_eq!(named.name.as_deref(), Some("a,b"));
        assert_eq!((named.id, named.either), (None, false));
        let error = wanted("snapshot.foo=1").expect_err("unknown");
        assert!(error.text.starts_with("Invalid parameter 'snapshot.foo'"));
    }
}
