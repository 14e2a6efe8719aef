"""Choose the model by environment variables only.

    GEMINI_API_KEY / OPENAI_API_KEY / ANTHROPIC_API_KEY   the first one found, in this order, picks the vendor
    NEXUM_MODEL                                           a model by name; needs the key of its vendor
    OPENAI_BASE_URL with NEXUM_MODEL                      any OpenAI-compatible server; needs no key
    none of these, or the program's --offline option      the offline model: rule-based, no network

Each key is sent only to its vendor. OPENAI_API_KEY is also sent to the server that OPENAI_BASE_URL names. An address
and its key are always passed together, so that a library's default address never gets a key.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import AnyHttpUrl, BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from support.models.vendors import GEMINI, OPENAI, VENDORS, ModelChoiceError, Vendor

if TYPE_CHECKING:
    from autogen_core.models import ChatCompletionClient

OFFLINE_NOTE = ": rules instead of a model, and this project's own pages instead of the web"
KEYLESS = "no-key-needed"  # sent to a server without authentication, because the client requires a key


class ModelChoice(BaseModel):
    """The chosen model. `str` and `repr` never show the key."""

    model_config = ConfigDict(frozen=True)

    vendor: str
    model: str
    base_url: str | None = None
    api_key: SecretStr | None = Field(default=None, repr=False, exclude=True)
    offline: bool = False
    description: str

    @property
    def streams(self) -> bool:
        """Whether replies are streamed. Gemini's replies are not streamed: its endpoint sometimes omits a tool call's
        index, and AutoGen 0.7.5 needs the index to tell parallel calls in a stream apart."""
        return self.vendor != GEMINI.name

    @property
    def slug(self) -> str:
        """A name of this choice in letters, digits and dashes. The id of a demo's session is derived from this name."""
        if self.offline:
            return "offline"
        parts = [self.vendor, self.model]
        if self.vendor not in {vendor.name for vendor in VENDORS}:
            parts.append(self.base_url or "")
        return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")

    def client(self, share: tuple[int, int] = (1, 1)) -> "ChatCompletionClient":
        """Return an AutoGen model client.

        `share` is the part of a question's searches that the offline model makes. (1, 2) means share 1 of 2.
        """
        if self.offline:
            from support.offline.model import OfflineModel

            return OfflineModel(_offline_topics, share)
        from support.models.live import LiveModel

        if self.base_url is None or self.api_key is None:
            raise ModelChoiceError(f"{self.vendor} has no address or key; make a choice with choose_model()")
        return LiveModel(
            vendor=self.vendor, model=self.model, base_url=self.base_url, api_key=self.api_key.get_secret_value()
        )


def choose_model(env: Mapping[str, str], *, offline: bool, vendors: Sequence[Vendor] = VENDORS) -> ModelChoice:
    """Return the model that `env` selects. Raises ModelChoiceError if a setting is wrong or its key is missing."""
    if offline:
        return _offline("requested")
    name = _setting(env, "NEXUM_MODEL")
    server = _setting(env, "OPENAI_BASE_URL")
    if server is not None:
        return _compatible_server(server, name, _key(env, OPENAI.key_variable))
    if name is not None:
        return _named(name, env, vendors)
    for vendor in vendors:
        key = _key(env, vendor.key_variable)
        if key is not None:
            return _at(vendor, vendor.default_model, key)
    return _offline("no model key found")


def _offline(why: str) -> ModelChoice:
    return ModelChoice(vendor="offline", model="rules", offline=True, description=f"offline ({why})")


def _offline_topics() -> list[str]:
    # Import the offline web and read its pages only here: both are slow, and few questions need the topics.
    from support.offline.web import OfflineWeb

    return OfflineWeb().topics()


def _compatible_server(server: str, name: str | None, key: SecretStr | None) -> ModelChoice:
    try:
        url = TypeAdapter(AnyHttpUrl).validate_python(server)
    except ValidationError:  # don't chain this error: its text has the value, which may hold a password
        raise ModelChoiceError("OPENAI_BASE_URL is not a URL like http://localhost:11434/v1") from None
    if name is None:
        raise ModelChoiceError("OPENAI_BASE_URL needs NEXUM_MODEL: the name of a model on that server")
    return ModelChoice(
        vendor="OpenAI-compatible server",
        model=name,
        base_url=str(url),
        api_key=key or SecretStr(KEYLESS),
        description=f"OpenAI-compatible server at {url.host}{f':{url.port}' if url.port else ''}, {name}",
    )


def _named(name: str, env: Mapping[str, str], vendors: Sequence[Vendor]) -> ModelChoice:
    name = name.removeprefix("gemini/")  # LiteLLM's prefix for Gemini models
    owner = next((vendor for vendor in vendors if name.startswith(vendor.prefixes)), None)
    # A name without a known prefix may be the name of a fine-tuned or a new OpenAI model. So treat it as OpenAI's.
    vendor = owner or next(vendor for vendor in vendors if vendor.name == OPENAI.name)
    key = _key(env, vendor.key_variable)
    if key is not None:
        return _at(vendor, name, key)
    if owner is not None:
        raise ModelChoiceError(f"NEXUM_MODEL={name} needs {owner.key_variable}, which is not set")
    raise ModelChoiceError(
        f"NEXUM_MODEL={name} needs OPENAI_BASE_URL (the model's server), or OPENAI_API_KEY if the model is OpenAI's"
    )


def _at(vendor: Vendor, model: str, key: SecretStr) -> ModelChoice:
    return ModelChoice(
        vendor=vendor.name,
        model=model,
        base_url=vendor.base_url,
        api_key=key,
        description=f"{vendor.name}, {model}",
    )


def _setting(env: Mapping[str, str], variable: str) -> str | None:
    """Return a variable's value without surrounding blanks, or None if the variable is unset or blank."""
    value = env.get(variable, "").strip()
    if not value.isprintable():
        raise ModelChoiceError(f"{variable} holds a control character or a line break")
    return value or None


def _key(env: Mapping[str, str], variable: str) -> SecretStr | None:
    value = _setting(env, variable)
    if value is None:
        return None
    # Reject a malformed key here: the HTTP client's error would print the key.
    if not value.isascii() or " " in value:
        raise ModelChoiceError(f"{variable} holds a blank or a character outside ASCII, which no key has")
    return SecretStr(value)
