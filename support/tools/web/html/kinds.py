"""The kinds of HTML elements: which are seen, which are blocks, which emphasize, and which tables are layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from support.tools.web.html.attributes import elements, is_element, names
from support.tools.web.html.style import Style, hides_all

if TYPE_CHECKING:
    from bs4 import Tag

# A table without heading cells is a layout if one of its cells exceeds one of these limits.
LAYOUT_CELL = 1_000  # characters
LAYOUT_NODES = 100  # texts and elements

UNSEEN = names(
    "head title script style noscript template iframe object canvas audio video datalist map area param"
    " noframes noembed embed rp annotation annotation-xml mphantom base link meta drawing-title"
)
UNDRAWN = names("defs symbol clippath mask marker pattern desc metadata")  # unseen parts of a drawing
AROUND = frozenset({"header", "footer", "aside"})  # around the page's content, unless within an article
WHOLES = frozenset({"main", "article", "blockquote", "figure"})
BLOCKS = names(
    "address article aside body center details dialog dir div dl fieldset figcaption figure footer form frameset header"
    " hgroup html legend li main menu optgroup option p section summary table tbody td textarea tfoot th thead tr"
    " blockquote caption dd dt search h1 h2 h3 h4 h5 h6 ol ul pre listing xmp plaintext isindex"
)
HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
TERMS = frozenset({"dt", "dd"})  # a term and its definition
LISTS = {"ul": "ul", "menu": "ul", "dir": "ul", "ol": "ol"}
PREFORMATTED = frozenset({"pre", "listing", "xmp", "plaintext", "textarea"})
MARKS = {"b": "strong", "strong": "strong", "i": "em", "em": "em", "sup": "sup", "sub": "sub"}
MARKS |= {"del": "del", "s": "del", "strike": "del", "code": "code", "kbd": "code", "samp": "code", "tt": "code"}
NESTING = frozenset({"sup", "sub"})  # such an element may be within another one, such as a power of a power
SECTIONS = {"thead": "head", "tbody": "body", "tfoot": "foot"}
BLOCK_DISPLAYS = frozenset({"block", "flex", "grid", "table", "list-item", "flow-root", "table-row"})
KEPT_LINES = frozenset({"pre", "pre-wrap", "pre-line", "break-spaces"})


def is_unseen(element: Tag, name: str, style: Style) -> bool:
    if name == "template" and element.has_attr("shadowrootmode"):
        return False  # browsers show this template's content instead of the other content of its parent
    if name in UNSEEN or name == "nav" or element.has_attr("hidden") or element.has_attr("popover"):
        return True
    if name == "dialog" and not element.has_attr("open"):
        return True
    # Skip what is hidden from screen readers, but not a picture: a formula's picture is often hidden from them.
    if element.get("aria-hidden") == "true" and name != "img":
        return True
    return bool(style) and hides_all(style)


def part_name(element: Tag, name: str) -> str:
    if name in ("main", "article"):
        return name
    return "role=main" if element.get("role") == "main" else ""


def is_layout(table: Tag) -> bool:
    """Return whether the table only lays out parts of the page. The cells of such a table are not data."""
    if table.get("role") in ("presentation", "none"):
        return True
    parts: list[Tag] = []
    for child in elements(table):
        parts += elements(child) if child.name in SECTIONS else [child]
    rows = [elements(part) for part in parts if part.name == "tr"]
    if any(part.name in ("caption", "th") for part in parts) or any(cell.name == "th" for r in rows for cell in r):
        return False
    if rows and all(len(row) <= 1 for row in rows) and all(part.name == "tr" for part in parts):
        return True
    return any(_is_long(cell) for row in rows for cell in row)


def _is_long(cell: Tag) -> bool:
    # Don't use `descendants`, which first walks to the end of the cell: in nested tables that takes quadratic time.
    length = count = 0
    open_nodes = [iter(cell.contents)]
    while open_nodes:
        node = next(open_nodes[-1], None)
        if node is None:
            open_nodes.pop()
            continue
        count += 1
        if is_element(node):
            open_nodes.append(iter(node.contents))
        else:
            length += len(str(node).strip())
        if length > LAYOUT_CELL or count > LAYOUT_NODES:
            return True
    return False
