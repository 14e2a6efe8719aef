"""Find out what a page's own style sheets hide.

Only simple selectors are evaluated: a name, an id and classes of one element, as in `p.note`. If a rule has another
selector, it is unknown whether the rule applies. The properties that the rule sets are then unknown, too, and an
unknown property hides nothing. So no visible word is lost, and an element needs only one look-up for each class.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple

from support.tools.web.html.attributes import names
from support.tools.web.html.style import Style

MAX_SHEETS = 200_000  # characters of all sheets together; if there are more, no rule is read
MAX_NESTING = 4  # levels of rules within rules, for example within `@media`; deeper rules are ignored
MAX_CHECKS = 500_000  # comparisons of elements with rules; once they are used up, no rule is applied

# The CSS properties that may hide an element. Opacity and the sizes of boxes are left out: a page may use them to hide
# content until a script or an animation shows it.
_PROPERTIES = names(
    "display visibility content-visibility font font-size text-indent position left top right bottom inset clip"
    " clip-path"
)
# The values to assume if an inherited value is unknown.
_SHOWN = {"visibility": "visible", "font-size": "medium", "text-indent": "0"}
# Pseudo-classes of states that need a person's input.
_UNTOUCHED = names("active focus focus-visible focus-within hover target")
_DRAWN = names("after before first-letter first-line")  # pseudo-elements that may be written with one colon
_GROUPS = names("container layer media scope starting-style supports")
_COMBINATORS = (">", "+", "~")


class _Selector(NamedTuple):
    """A selector by name, id and classes; "" is any name or id.

    If `exact` is false, the page's selector has further conditions. Then an element that meets these conditions may not
    be selected.
    """

    name: str
    id: str
    classes: frozenset[str]
    exact: bool
    specificity: tuple[int, int, int]

    @property
    def key(self) -> str:
        return f".{min(self.classes)}" if self.classes else f"#{self.id}" if self.id else self.name

    def meets(self, name: str, id_: str, classes: frozenset[str]) -> bool:
        return self.name in ("", name) and self.id in ("", id_) and self.classes <= classes


class _Rule(NamedTuple):
    """A rule with its values by property. `applies` is False if it is unknown whether the rule applies."""

    selector: _Selector
    applies: bool
    values: dict[str, str]
    important: frozenset[str]


class Sheets:
    """The rules of a page's style sheets."""

    def __init__(self, sheets: Sequence[str]) -> None:
        self._rules: defaultdict[str, list[tuple[int, _Rule]]] = defaultdict(list)
        self._known: dict[tuple[str, str, frozenset[str]], tuple[Style, Style]] = {}
        self._checks = 0
        if sum(map(len, sheets)) <= MAX_SHEETS:
            for order, rule in enumerate(chain.from_iterable(map(_read, sheets))):
                self._rules[rule.selector.key].append((order, rule))

    def style_of(self, name: str, id_: str, classes: Iterable[str], inline: Style) -> Style:
        """Return the style of an element from the sheets and from its own `style` attribute."""
        if not self._rules or name in ("html", "body"):  # if a sheet hides these, a script shows them
            return inline
        element = (name, id_, frozenset(classes))
        if element not in self._known:
            self._known[element] = self._cascade(*element)
        normal, important = self._known[element]
        return {**normal, **inline, **important} if normal or important else inline

    def _cascade(self, name: str, id_: str, classes: frozenset[str]) -> tuple[Style, Style]:
        """Return the values that certainly apply to the element: the normal values, and the `!important` values."""
        keys = ("", name, f"#{id_}", *(f".{one}" for one in classes))
        candidates = [entry for key in keys for entry in self._rules.get(key, ())]
        self._checks += len(candidates)
        if self._checks > MAX_CHECKS:
            return {}, {}
        met = [entry for entry in candidates if entry[1].selector.meets(name, id_, classes)]
        met.sort(key=lambda entry: (entry[1].selector.specificity, entry[0]))
        normal: dict[str, str | None] = {}
        important: dict[str, str | None] = {}
        for _, rule in met:
            for property_, value in rule.values.items():
                target = important if property_ in rule.important else normal
                target[property_] = value if rule.applies or target.get(property_) == value else None
        return _certain(normal), _certain(important)


def _certain(values: dict[str, str | None]) -> Style:
    known = {name: _SHOWN.get(name) if value is None else value for name, value in values.items()}
    return {name: value for name, value in known.items() if value is not None}


def _read(sheet: str) -> Iterator[_Rule]:
    import tinycss2

    yield from _rules(tinycss2.parse_stylesheet(sheet), exact=True, level=0)


def _rules(nodes: Iterable[Any], *, exact: bool, level: int) -> Iterator[_Rule]:
    """Return the sheet's rules, in the sheet's order. If `exact` is false, it is unknown whether the rules apply."""
    import tinycss2

    for node in nodes:
        if node.type == "at-rule" and node.lower_at_keyword in _GROUPS and node.content is not None:
            conditions = {one.strip() for one in tinycss2.serialize(node.prelude).lower().split(",")}
            holds = node.lower_at_keyword == "media" and not conditions.isdisjoint({"", "all", "screen"})
            if conditions != {"print"} and level < MAX_NESTING:
                inner = tinycss2.parse_blocks_contents(node.content)
                yield from _rules(inner, exact=exact and holds, level=level + 1)
        elif node.type == "qualified-rule":
            inner = tinycss2.parse_blocks_contents(node.content)
            values, important = _values(inner)
            for selector in _selectors(node.prelude) if values else ():
                yield _Rule(selector, exact and selector.exact, values, important)
            if level < MAX_NESTING:
                yield from _rules(inner, exact=False, level=level + 1)


def _values(nodes: Iterable[Any]) -> tuple[dict[str, str], frozenset[str]]:
    """Return the values of the declarations that may hide an element, and the properties that are `!important`."""
    import tinycss2

    declared = [one for one in nodes if one.type == "declaration" and one.lower_name in _PROPERTIES]
    values = {one.lower_name: " ".join(tinycss2.serialize(one.value).lower().split()) for one in declared}
    return values, frozenset(one.lower_name for one in declared if one.important)


def _selectors(prelude: Iterable[Any]) -> Iterator[_Selector]:
    for is_comma, tokens in groupby(prelude, key=lambda token: token == ","):
        selector = None if is_comma else _selector([token for token in tokens if token.type != "comment"])
        if selector is not None:
            yield selector


def _selector(tokens: list[Any]) -> _Selector | None:
    """Return the condition that a selector sets for the selected element, without those for other elements.

    Return None if the selector selects only pseudo-elements, or only elements in a state that needs a person's input,
    such as `:hover`.
    """
    while tokens and tokens[-1].type == "whitespace":
        tokens.pop()
    while tokens and tokens[0].type == "whitespace":
        tokens.pop(0)
    specificity = _specificity(tokens)
    name = id_ = ""
    classes: set[str] = set()
    exact = bool(tokens)
    while tokens:
        token = tokens.pop()
        mark = tokens[-1] if tokens and tokens[-1] in (".", ":") else ""
        if token.type == "whitespace" or token in _COMBINATORS:
            exact = False  # the rest of the selector is about other elements
            break
        if mark == ":" and token.type in ("ident", "function"):
            pseudo = token.lower_value if token.type == "ident" else token.lower_name
            if pseudo in _UNTOUCHED or pseudo in _DRAWN or tokens[-2:] == [":", ":"]:
                return None
            exact = False
        elif mark == "." and token.type == "ident":
            classes.add(token.value)
        elif token.type == "ident":
            name = token.lower_value
        elif token.type == "hash":
            id_ = token.value
        elif token != "*":
            exact = False
        if mark:
            tokens.pop()
    return _Selector(name, id_, frozenset(classes), exact, specificity)


def _specificity(tokens: list[Any]) -> tuple[int, int, int]:
    """Return the number of ids, the number of classes and similar conditions, and the number of names.

    The rank of a selector with "&" depends on the outer selector. It is also unknown whether the selector's rule
    applies, so the rule's values are unknown. Rank the selector above all others: unknown values hide nothing.
    """
    if "&" in tokens:
        return (len(tokens), 0, 0)
    ids = sum(token.type == "hash" for token in tokens)
    like_classes = sum(token in (".", ":") or token.type == "[] block" for token in tokens)
    only_names = sum(
        one.type == "ident" and before not in (".", ":") for before, one in zip(["", *tokens], tokens, strict=False)
    )
    return ids, like_classes, only_names
