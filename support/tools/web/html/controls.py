"""Read the text that a person sees in the controls of a form."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from support.tools.web.html.attributes import is_float, number
from support.tools.web.html.tree import Element


def _input_text(element: Element) -> str | None:
    chosen = "checked" in element.attrs
    match element.attrs.get("type", "text").strip().lower():
        case "checkbox":
            return "[x]" if chosen else "[ ]"
        case "radio":
            return "(x)" if chosen else "( )"
        case "image":
            return element.attrs.get("alt", "")
        case "hidden":
            return None
        case "password" | "file":
            return ""
        case _:
            return element.attrs.get("value", "")


def _select_text(element: Element) -> str:
    within = (node for node in element.descendants() if isinstance(node, Element) and node.name == "option")
    options = [option for option in within if "hidden" not in option.attrs]
    chosen = [option for option in options if "selected" in option.attrs]
    if "multiple" in element.attrs or (number(element.attrs.get("size")) or 1) > 1:
        return ", ".join(f"{'[x]' if 'selected' in option.attrs else '[ ]'} {_label(option)}" for option in options)
    return _label((chosen or options)[-1 if chosen else 0]) if options else ""


def _label(option: Element) -> str:
    return option.attrs.get("label", "").strip() or option.text.strip()


def _gauge_text(element: Element) -> str:
    value, most = (element.attrs.get(name, "").strip() for name in ("value", "max"))
    return f"{value} of {most if is_float(most) else '1'}" if is_float(value) else ""


CONTROLS: Mapping[str, Callable[[Element], str | None]] = {
    "input": _input_text,
    "select": _select_text,
    "progress": _gauge_text,
    "meter": _gauge_text,
}
