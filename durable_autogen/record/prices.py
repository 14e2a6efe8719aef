"""The cost of model replies, from the prices in the package `genai-prices`. No server is asked."""

from __future__ import annotations

from datetime import datetime, timezone
from importlib.util import find_spec

from nexum_engine.errors import InvalidRequest


def has_prices() -> bool:
    """Return whether the package `genai-prices` is installed. Don't import it: that takes 0.4 s."""
    return find_spec("genai_prices") is not None


def check_prices() -> None:
    """Raise InvalidRequest if the package `genai-prices` is not installed."""
    if not has_prices():
        raise InvalidRequest(
            "a budget in US dollars needs the package genai-prices: install it with pip install genai-prices, or limit "
            "the tokens instead"
        )


def price_of(model: str, prompt_tokens: int, completion_tokens: int, at_ms: int) -> float | None:
    """Return the cost of a reply at the time `at_ms`, in US dollars; None if the model has no known price."""
    from genai_prices import Usage, calc_price

    usage = Usage(input_tokens=prompt_tokens, output_tokens=completion_tokens)
    at = datetime.fromtimestamp(at_ms / 1000, tz=timezone.utc)
    try:
        return float(calc_price(usage, model, genai_request_timestamp=at).total_price)
    except LookupError:
        return None
