"""AutoGen's OpenAI client, adapted to the three vendors. Import this module only when needed: it imports AutoGen."""

import re
from collections.abc import AsyncGenerator, Mapping
from typing import Any, cast

from autogen_core.models import CreateResult, ModelFamily, ModelInfo
from autogen_ext.models.openai import OpenAIChatCompletionClient
from openai import APIConnectionError, DefaultAsyncHttpxClient

from support.models.vendors import ANTHROPIC, GEMINI, OPENAI, ModelFailed
from support.tools.clean_text import one_line

# Send this value instead of a tool call's "thought signature", which AutoGen 0.7.5 drops (microsoft/autogen#7136).
# Without any signature, Gemini 3 and later answer 400. Google documents the value for calls that have no signature.
UNSIGNED = {"google": {"thought_signature": "skip_thought_signature_validator"}}

ERROR_LENGTH = 400  # ModelFailed shows at most this many characters of a vendor's error message

HEADERS_SENT = (
    *("host", "accept", "accept-encoding", "connection", "user-agent"),
    *("authorization", "content-type", "content-length"),
)

FAMILIES: Mapping[str, str] = {
    GEMINI.name: ModelFamily.GEMINI_2_5_FLASH,
    ANTHROPIC.name: ModelFamily.CLAUDE_4_SONNET,
    OPENAI.name: ModelFamily.GPT_5,
}


class LiveModel(OpenAIChatCompletionClient):
    """A client for one model. The client never reads the model, the address or the key from the environment."""

    def __init__(self, *, vendor: str, model: str, base_url: str, api_key: str) -> None:
        self._who = f"{vendor}, {model}"
        self._unsigned_calls = vendor == GEMINI.name
        arguments: dict[str, Any] = {
            "model": model,
            "base_url": base_url,
            "api_key": api_key,
            "model_info": model_info(vendor),
            # Send a message's `name` only to OpenAI: some other servers refuse the field as unknown.
            "include_name_in_message": vendor == OPENAI.name,
            # Set the Authorization header here: otherwise OPENAI_CUSTOM_HEADERS could replace the header.
            "default_headers": {"Authorization": f"Bearer {api_key}"},
            # Don't follow redirects: a redirect could send the request, with its key, to another host.
            "http_client": DefaultAsyncHttpxClient(
                follow_redirects=False,
                event_hooks={"request": [] if vendor == OPENAI.name else [drop_openai_headers]},
            ),
        }
        if vendor == OPENAI.name and refuses_tools_while_reasoning(model):
            arguments["reasoning_effort"] = "none"
        super().__init__(**cast(Any, arguments))
        self._resolved_model = None  # prevents AutoGen's warning at each call of a model that is named by an alias

    async def create(self, *args: Any, **kwargs: Any) -> CreateResult:
        """Return the model's reply. Raises ModelFailed for any error."""
        try:
            return await super().create(*args, **kwargs)
        except Exception as error:
            raise self._failed(error) from error

    async def create_stream(self, *args: Any, **kwargs: Any) -> AsyncGenerator[str | CreateResult, None]:
        """Yield the model's reply in pieces, with a count of tokens at the end. Raises ModelFailed for any error."""
        try:
            async for piece in super().create_stream(*args, **{"include_usage": True, **kwargs}):
                yield piece
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> ModelFailed:
        # Accept every exception type: a server that isn't OpenAI-compatible can cause any of them inside AutoGen.
        cause = f" ({error.__cause__})" if isinstance(error, APIConnectionError) and error.__cause__ else ""
        why = one_line(f"{type(error).__name__}: {error}{cause}", ERROR_LENGTH)
        return ModelFailed(f"the model gave no usable answer ({self._who}): {why}")

    def _process_create_args(self, *args: Any, **kwargs: Any) -> Any:
        params = super()._process_create_args(*args, **kwargs)
        if self._unsigned_calls:
            for message in cast(list[dict[str, Any]], params.messages):
                for call in (message.get("tool_calls") or [])[:1]:  # of parallel calls, Gemini signs only the first
                    call["extra_content"] = UNSIGNED
        return params


def model_info(vendor: str) -> ModelInfo:
    """Return a vendor's ModelInfo. AutoGen needs one for each model name that it doesn't know."""
    return ModelInfo(
        vision=False,
        function_calling=True,
        json_output=True,
        structured_output=vendor in FAMILIES,
        family=FAMILIES.get(vendor, ModelFamily.UNKNOWN),
        multiple_system_messages=vendor == OPENAI.name,
    )


def refuses_tools_while_reasoning(model: str) -> bool:
    """Return whether the model takes function tools only with reasoning_effort "none", as GPT-5.4 and later do."""
    version = re.match(r"gpt-(\d+)(?:\.(\d+))?", model)
    return version is not None and (int(version[1]), int(version[2] or 0)) >= (5, 4)


async def drop_openai_headers(request: Any) -> None:
    """Remove the headers that the openai package makes from OPENAI_ORG_ID, OPENAI_PROJECT_ID, OPENAI_CUSTOM_HEADERS.

    The headers identify an OpenAI account, so no other vendor may see them.
    """
    for name in list(request.headers.keys()):
        if name.lower() not in HEADERS_SENT:
            del request.headers[name]
