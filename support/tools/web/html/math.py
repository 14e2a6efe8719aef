"""Convert formulas in MathML to text on one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from support.tools.web.html.attributes import names
from support.tools.web.html.tree import Element


@dataclass(frozen=True)
class Raised:
    """A superscript ("sup") or subscript ("sub") of a formula."""

    name: str
    part: Element


MATHS = names(
    "math semantics mfrac msqrt mroot msup msub msubsup munder mover munderover mmultiscripts mspace mfenced mtable mtr"
)
_SCRIPTS = {"msup": ("sup",), "msub": ("sub",), "msubsup": ("sub", "sup")}
_SCRIPTS |= {"mover": ("sup",), "munder": ("sub",), "munderover": ("sub", "sup")}
_TOKENS = frozenset({"mi", "mn", "mtext"})


def formula(element: Element) -> Sequence[object]:
    """Return the nodes that write a formula on one line: super- and subscripts are marked, fractions have a slash."""
    nodes: Sequence[object] = element.contents
    parts = element.elements
    if any(node.strip() for node in element.contents if isinstance(node, str)):
        return nodes  # words outside a token element are not valid MathML, but browsers show them
    if element.name in _SCRIPTS and len(parts) == 1 + len(_SCRIPTS[element.name]):
        return [parts[0], *(Raised(mark, part) for mark, part in zip(_SCRIPTS[element.name], parts[1:], strict=True))]
    match element.name, len(parts):
        case "semantics", _:
            return list(parts[:1])
        case "mfrac", 2:
            return [*_bracketed(parts[0]), "/", *_bracketed(parts[1])]
        case "msqrt", _:
            return ["√(", *nodes, ")"]
        case "mroot", 2:
            return [Raised("sup", parts[1]), "√(", parts[0], ")"]
        case "mmultiscripts", _:
            scripts = [part for part in parts[1:] if part.name not in ("none", "mprescripts")]
            return [*parts[:1], *(Raised("sub" if n % 2 == 0 else "sup", part) for n, part in enumerate(scripts))]
        case "mspace", _:
            return [" "]
        case "mtable", _:
            return ["[", *_separated(parts, "; "), "]"]
        case "mtr", _:
            return _separated(parts, ", ")
        case "mfenced", _:
            opening, closing = element.attrs.get("open", "(")[:3], element.attrs.get("close", ")")[:3]
            return [opening, *_separated(parts, ","), closing]
    return nodes


def _separated(parts: list[Element], separator: str) -> Sequence[object]:
    return [node for part in parts for node in (part, separator)][:-1]


def _bracketed(part: Element) -> Sequence[object]:
    return [part] if part.name in _TOKENS else ["(", part, ")"]
