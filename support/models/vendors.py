"""The vendors of models: where each is and which key it takes; and how a model can fail."""

from __future__ import annotations

from dataclasses import dataclass


class ModelChoiceError(ValueError):
    """The environment names no usable model; the message is one line and says what to set."""


class ModelFailed(RuntimeError):
    """The model gave no usable answer; the message is one line and says why."""


@dataclass(frozen=True)
class Vendor:
    """One vendor: where its OpenAI-compatible endpoint is, which key it takes, which names are its own."""

    name: str
    key_variable: str
    base_url: str
    default_model: str
    prefixes: tuple[str, ...]


GEMINI = Vendor(
    name="Google Gemini",
    key_variable="GEMINI_API_KEY",
    base_url="https://generativelanguage.googleapis.com/v1beta/openai/",
    # Google's own alias for its newest Flash model: numbered ones are shut down within about a year.
    default_model="gemini-flash-latest",
    prefixes=("gemini-",),
)
OPENAI = Vendor(
    name="OpenAI",
    key_variable="OPENAI_API_KEY",
    base_url="https://api.openai.com/v1/",
    default_model="gpt-5.4-mini",
    prefixes=("gpt-", "chatgpt-", "o1", "o3", "o4"),
)
ANTHROPIC = Vendor(
    name="Anthropic Claude",
    key_variable="ANTHROPIC_API_KEY",
    base_url="https://api.anthropic.com/v1/",
    default_model="claude-sonnet-5",
    prefixes=("claude-",),
)
VENDORS = (GEMINI, OPENAI, ANTHROPIC)
