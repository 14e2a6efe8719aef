"""Find out what a `style` attribute hides from a person who looks at a page."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

Style = dict[str, str]

SMALLEST_LETTERS = 2.0  # pixels; a person can't read smaller letters
LEAST_OPACITY = 0.05  # an element with a lower opacity is invisible
OFF_SCREEN = 900.0  # an element that is moved this many pixels to the left or upwards is off the page
_A_PIXEL = 1.0

# Pixels per unit. The units that are relative to the window assume a window of 1000 by 1000 pixels.
_ABSOLUTE = {"": 1.0, "px": 1.0, "pt": 1.33, "pc": 16.0, "in": 96.0, "cm": 37.8, "mm": 3.78, "q": 0.94, "rem": 16.0}
_ABSOLUTE |= {"vw": 10.0, "vh": 10.0, "vmin": 10.0, "vmax": 10.0}
_RELATIVE = {"em": 16.0, "ex": 8.0, "ch": 8.0, "%": 10.0}
_KEYWORD_SIZES = frozenset(
    {"initial", "xx-small", "x-small", "small", "medium", "large", "x-large", "xx-large", "xxx-large"}
)
_LENGTH = re.compile(r"([+-]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9})(?:e[+-]?\d{1,2})?)([a-z]{0,5}|%)")
_COLOURS = {"white": "#ffffff", "black": "#000000", "red": "#ff0000", "transparent": "#00000000"}
_NUMBER = re.compile(r"[\d.]{1,12}%?")
_SHRUNK = re.compile(r"scale(?:3d|x|y)?\( ?0*(?:\.0+)? ?[,)]")
_MOVED = re.compile(r"translate(?:3d|x|y)?\(([^()]{1,60})\)")
_TURNED_OUT = re.compile(
    r"inset\( ?(?:100|[5-9]\d)%|(?:circle|ellipse)\( ?0(?![.\d])|polygon\( ?0[a-z%]{0,3} 0[a-z%]{0,3} ?\)"
)


@dataclass(frozen=True)
class Sight:
    """The visibility that an element's children inherit."""

    visible: bool = True
    readable_size: bool = True
    coloured: bool = True
    on_screen: bool = True

    @property
    def seen(self) -> bool:
        """Whether words in the element are visible."""
        return self.visible and self.readable_size and self.coloured and self.on_screen


def parse_style(text: str) -> Style:
    """Return the declarations of a `style` attribute by property.

    If a property is declared more than once, its last `!important` declaration wins. If none of its declarations is
    `!important`, the last declaration wins.
    """
    plain = "".join(part.partition("*/")[2] if index else part for index, part in enumerate(text.split("/*")))
    style: Style = {}
    important: set[str] = set()
    for declaration in plain.lower().split(";"):
        name, colon, value = declaration.partition(":")
        name = name.strip()
        value, mark, word = value.partition("!")
        value = " ".join(value.split())  # the patterns below expect single blanks, and are slow for many blanks
        is_important = bool(mark) and word.strip() == "important"
        if not colon or not value or (name in important and not is_important):
            continue
        if is_important:
            important.add(name)
        style[name] = value
    return style


def hides_all(style: Style) -> bool:
    """Return whether the style hides everything within the element, even children with a style of their own."""
    if style.get("display") == "none" or style.get("content-visibility") == "hidden":
        return True
    opacity = style.get("opacity")
    if opacity is not None and (share := _share(opacity)) is not None and share < LEAST_OPACITY:
        return True
    filters = style.get("filter", "")
    if "opacity(" in filters and (share := _share(filters.split("opacity(", 1)[1].split(")")[0])) is not None:
        return share < LEAST_OPACITY
    return _is_clipped(style) or _is_elsewhere(style)


def look(style: Style, above: Sight) -> Sight:
    """Return the visibility within an element with the style `style`, whose parent has the visibility `above`."""
    sight = above
    match style.get("visibility"):
        case "hidden" | "collapse":
            sight = replace(sight, visible=False)
        case "visible" | "initial":
            sight = replace(sight, visible=True)
    size = style.get("font-size") or _size_of_font(style.get("font", ""))
    if size:
        sight = replace(sight, readable_size=_is_readable(size, above.readable_size))
    colour = style.get("-webkit-text-fill-color", style.get("color", "inherit"))
    if colour not in ("inherit", "currentcolor", "unset"):
        sight = replace(sight, coloured=_is_coloured(colour, style))
    indent = _pixels(style.get("text-indent", ""))
    if indent is not None:
        sight = replace(sight, on_screen=indent > -OFF_SCREEN)
    return sight


def _share(value: str) -> float | None:
    found = _LENGTH.fullmatch(value.strip())
    if found is None or found[2] not in ("", "%"):
        return None
    return float(found[1]) / (100 if found[2] else 1)


def _pixels(value: str) -> float | None:
    found = _LENGTH.fullmatch(value.strip())
    factor = (_ABSOLUTE | _RELATIVE).get(found[2]) if found else None
    return None if found is None or factor is None else float(found[1]) * factor


def _is_readable(size: str, above: bool) -> bool:
    if size in _KEYWORD_SIZES:
        return True
    found = _LENGTH.fullmatch(size)
    if found is None:
        return above
    value = float(found[1])
    if found[2] in _ABSOLUTE:
        return value * _ABSOLUTE[found[2]] >= SMALLEST_LETTERS
    return above and value * _RELATIVE.get(found[2], 16.0) >= SMALLEST_LETTERS


def _size_of_font(font: str) -> str:
    """Return the size in a `font` value: 0 for `bold 0/1.5 serif`."""
    sizes = [word.partition("/")[0] for word in font.split() if word[0] in "0123456789."]
    return sizes[-1] if sizes else ""


def _is_coloured(colour: str, style: Style) -> bool:
    # Letters are visible in any colour if a background picture fills them or if they have a shadow.
    if "text" in (style.get("background-clip"), style.get("-webkit-background-clip")) or "text-shadow" in style:
        return True
    colour = _colour(colour)
    if len(colour) == 9:
        return not colour.endswith("00")
    ground = style.get("background-color", style.get("background", ""))
    return not colour.startswith("#") or colour != _colour(ground)


def _colour(value: str) -> str:
    """Return the colour as #rrggbb, or as #rrggbbaa if it is translucent. Return any other notation unchanged."""
    value = _COLOURS.get(value, value)
    if value.startswith("#") and len(value) in (4, 5):
        value = "#" + "".join(2 * digit for digit in value[1:])
    if value.startswith("#"):
        return value[:7] if len(value) == 9 and value.endswith("ff") else value
    if not value.startswith(("rgb", "hsl")):
        return value
    numbers = _NUMBER.findall(value)
    if len(numbers) == 4 and _share(numbers[3]) == 0:
        return "#00000000"
    if value.startswith("rgb") and all(number.isdecimal() for number in numbers[:3]):
        return "#" + "".join(f"{min(int(number), 255):02x}" for number in numbers[:3])
    return value


def _is_clipped(style: Style) -> bool:
    out_of_flow = style.get("position") in ("absolute", "fixed")
    clip = style.get("clip", "").replace(" ", "").replace(",", "").replace("px", "")
    if out_of_flow and clip in ("rect(0000)", "rect(1111)"):
        return True
    if _TURNED_OUT.search(style.get("clip-path", "")) or _SHRUNK.search(style.get("transform", "")):
        return True
    if style.get("scale") == "0":
        return True
    overflow = style.get("overflow", style.get("overflow-y", style.get("overflow-x", "")))
    # A box of height 0 hides nothing if its overflow is shown or a padding gives it height.
    if not overflow.startswith(("hidden", "clip")) or any(name.startswith(("padding", "min-")) for name in style):
        return False
    boxes = [(_pixels(style.get(side, "")), _pixels(style.get(f"max-{side}", ""))) for side in ("width", "height")]
    if any(0 in lengths for lengths in boxes):
        return True
    return all(any(length is not None and length <= _A_PIXEL for length in lengths) for lengths in boxes)


def _is_elsewhere(style: Style) -> bool:
    moved = [style.get(name, "") for name in ("margin-left", "margin-top")]
    if style.get("position") in ("absolute", "fixed", "relative"):
        moved += [style.get(name, "") for name in ("left", "top", "right", "bottom")] + style.get("inset", "").split()
    for shift in _MOVED.findall(style.get("transform", "")):
        moved += shift.split(",")
    return any(pixels is not None and pixels <= -OFF_SCREEN for pixels in map(_pixels, moved))
