"""Read the text that a person sees in the controls of a form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from support.tools.web.html.attributes import is_float, number

if TYPE_CHECKING:
    from bs4 import Tag


def _input_text(element: Tag) -> str:
    chosen = element.has_attr("checked")
    match str(element.get("type", "text")).strip().lower():
        case "checkbox":
            return "[x]" if chosen else "[ ]"
        case "radio":
            return "(x)" if chosen else "( )"
        case "image":
            return str(element.get("alt", ""))
        case "hidden" | "password" | "file":
            return ""
        case _:
            return str(element.get("value", ""))


def _select_text(element: Tag) -> str:
    options = [option for option in element.find_all("option") if not option.has_attr("hidden")]
    chosen = [option for option in options if option.has_attr("selected")]
    if element.has_attr("multiple") or (number(element.get("size")) or 1) > 1:
        marked = (f"{'[x]' if option.has_attr('selected') else '[ ]'} {_label(option)}" for option in options)
        return ", ".join(marked)
    return _label((chosen or options)[-1 if chosen else 0]) if options else ""


def _label(option: Tag) -> str:
    return str(option.get("label", "")).strip() or option.get_text().strip()


def _gauge_text(element: Tag) -> str:
    value, most = (str(element.get(name, "")).strip() for name in ("value", "max"))
    return f"{value} of {most if is_float(most) else '1'}" if is_float(value) else ""


CONTROLS: Mapping[str, Callable[[Tag], str]] = {
    "input": _input_text,
    "select": _select_text,
    "progress": _gauge_text,
    "meter": _gauge_text,
}
