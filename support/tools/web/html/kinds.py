"""The kinds of HTML elements: which are seen, which are blocks, which emphasize, and which tables are layouts."""

from __future__ import annotations

from support.tools.web.html.attributes import names
from support.tools.web.html.style import Style, hides_all
from support.tools.web.html.tree import Element

# A table without heading cells is a layout if one of its cells exceeds one of these limits.
LAYOUT_CELL = 1_000  # characters
LAYOUT_NODES = 100  # texts and elements

# The contents of these elements are never visible.
UNSEEN = names(
    "head title script style noscript template iframe object canvas audio video datalist map area param"
    " noframes noembed embed rp annotation annotation-xml mphantom base link meta"
)
UNDRAWN = names("defs symbol clippath mask marker pattern desc metadata")  # unseen parts of a drawing
# Elements around the content of a page. Inside one of WHOLES, they belong to the content.
AROUND = frozenset({"header", "footer", "aside"})
WHOLES = frozenset({"main", "article", "blockquote", "figure"})
BLOCKS = names(
    "address article aside body center details dialog dir div dl fieldset figcaption figure footer form frameset header"
    " hgroup html legend li main menu optgroup option p section summary table tbody td textarea tfoot th thead tr"
    " blockquote caption dd dt search h1 h2 h3 h4 h5 h6 ol ul pre listing xmp plaintext"
)
HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
LISTS = {"ul": "ul", "menu": "ul", "dir": "ul", "ol": "ol"}
PREFORMATTED = frozenset({"pre", "listing", "xmp", "plaintext", "textarea"})
MARKS = {"b": "strong", "strong": "strong", "i": "em", "em": "em", "sup": "sup", "sub": "sub"}
MARKS |= {"del": "del", "s": "del", "strike": "del", "code": "code", "kbd": "code", "samp": "code", "tt": "code"}
NESTING = frozenset({"sup", "sub"})  # may be within an element of the same kind, as in a power of a power
SECTIONS = {"thead": "head", "tbody": "body", "tfoot": "foot"}
BLOCK_DISPLAYS = frozenset({"block", "flex", "grid", "table", "list-item", "flow-root", "table-row"})
KEPT_LINES = frozenset({"pre", "pre-wrap", "pre-line", "break-spaces"})


def is_unseen(element: Element, style: Style) -> bool:
    if element.name == "template" and "shadowrootmode" in element.attrs:
        return False  # a shadow root, whose content browsers show in place of the parent's other content
    if element.name in UNSEEN or element.name == "nav" or "hidden" in element.attrs or "popover" in element.attrs:
        return True
    if element.name == "dialog" and "open" not in element.attrs:
        return True
    # Skip elements that are hidden from screen readers, except pictures. Pages often hide the picture of a formula from
    # screen readers, although it is visible.
    if element.attrs.get("aria-hidden") == "true" and element.name != "img":
        return True
    return bool(style) and hides_all(style)


def part_name(element: Element) -> str:
    if element.name in ("main", "article"):
        return element.name
    return "role=main" if element.attrs.get("role") == "main" else ""


def is_layout(table: Element) -> bool:
    """Return whether the table only lays out parts of the page. The cells of a layout table are not data."""
    if table.attrs.get("role") in ("presentation", "none"):
        return True
    parts: list[Element] = []
    for child in table.elements:
        if child.name in UNSEEN:
            continue
        parts += child.elements if child.name in SECTIONS else [child]
    rows = [part.elements for part in parts if part.name == "tr"]
    if any(part.name in ("caption", "th") for part in parts) or any(cell.name == "th" for r in rows for cell in r):
        return False
    if rows and all(len(row) <= 1 for row in rows) and all(part.name == "tr" for part in parts):
        return True
    return any(_is_long(cell) for row in rows for cell in row)


def _is_long(cell: Element) -> bool:
    length = 0
    for count, node in enumerate(cell.descendants(), start=1):
        if isinstance(node, str):
            length += len(node.strip())
        if length > LAYOUT_CELL or count > LAYOUT_NODES:
            return True
    return False
