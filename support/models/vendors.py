"""The vendors of models, with their addresses, key variables and model names; and the errors about models."""

from __future__ import annotations

from dataclasses import dataclass


class ModelChoiceError(ValueError):
    """The environment selects no usable model. The error's message is one line and says what to set."""


class ModelFailed(RuntimeError):
    """The model gave no usable answer. The error's message is one line and says why."""


@dataclass(frozen=True)
class Vendor:
    """A vendor: its OpenAI-compatible endpoint, its key's variable, and the prefixes of its models' names."""

    name: str
    key_variable: str
    base_url: str
    default_model: str
    prefixes: tuple[str, ...]


GEMINI = Vendor(
    name="Google Gemini",
    key_variable="GEMINI_API_KEY",
    base_url="https://generativelanguage.googleapis.com/v1beta/openai/",
    # Use Google's alias for its newest Flash model: Google shuts down a numbered model within about a year.
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
