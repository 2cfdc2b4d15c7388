//! Elements of the XML, and what is said of one that is missing or not as it must be.

use roxmltree::Node;

/// What is wrong with a domain, in words.
pub(super) type Refusal = String;
pub(super) type Read<T> = std::result::Result<T, Refusal>;

pub(super) fn at_slot(node: Node<'_, '_>, slot: usize) -> Read<()> {
    let what = node.tag_name().name();
    let address = child(node, "address")?;
    let of = |name: &str| address.attribute(name).and_then(hex);
    let found = (of("bus"), of("slot"), of("function"));
    require(found == (Some(0), Some(slot), Some(0)), || {
        format!("its {what} is not at slot {slot:#x} of the root bus")
    })
}

fn hex(text: &str) -> Option<usize> {
    match text.strip_prefix("0x") {
        Some(digits) => usize::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

pub(super) fn number<T: std::str::FromStr>(text: &str) -> Read<T> {
    text.parse()
        .map_err(|_not_a_number: T::Err| format!("{text:?} is no number that fits"))
}

pub(super) fn known(node: Node<'_, '_>, names: &[&str], inside: &str) -> Read<()> {
    let name = node.tag_name().name();
    let ours = node.tag_name().namespace().is_none();
    require(ours && names.contains(&name), || {
        format!("its <{inside}> has <{name}>")
    })
}

pub(super) fn require(holds: bool, refusal: impl FnOnce() -> Refusal) -> Read<()> {
    if holds { Ok(()) } else { Err(refusal()) }
}

pub(super) fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Read<Node<'a, 'input>> {
    let found = node.children().find(|part| part.tag_name().name() == name);
    found.ok_or_else(|| format!("its <{}> has no <{name}>", node.tag_name().name()))
}

pub(super) fn attribute<'a>(node: Node<'a, '_>, name: &str) -> Read<&'a str> {
    let found = node.attribute(name);
    found.ok_or_else(|| format!("its <{}> has no {name}", node.tag_name().name()))
}

pub(super) fn text<'a>(node: Node<'a, '_>) -> &'a str {
    node.text().unwrap_or_default().trim()
}
