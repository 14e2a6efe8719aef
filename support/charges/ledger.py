"""The outside world of the charging tools: a payment service that keeps its books in a file."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Request(BaseModel):
    """One request that reached the payment service: one line of its file."""

    model_config = ConfigDict(frozen=True)

    reference: str
    """The idempotency key that the tool sent."""
    customer: str
    cents: int
    is_booked: bool
    """Whether the customer paid for this request. If the service knows the key already, it books nothing."""


class Ledger:
    """The payment service's file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def charge(self, customer: str, cents: int, reference: str, *, once_per_reference: bool) -> str:
        """Charge the customer; return the number of the receipt. The request is in the file when this returns.

        With `once_per_reference`, a second request with the same reference books nothing, and gets the first receipt.
        """
        known = self.receipt(reference) if once_per_reference else None
        request = Request(reference=reference, customer=customer, cents=cents, is_booked=known is None)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(request.model_dump_json() + "\n")
        return known or f"receipt {len(self.requests())}"

    def receipt(self, reference: str) -> str | None:
        """Return the number of the receipt that the reference got, or None if it was never booked."""
        for number, request in enumerate(self.requests(), 1):
            if request.reference == reference and request.is_booked:
                return f"receipt {number}"
        return None

    def requests(self) -> list[Request]:
        """Return all requests, the oldest first."""
        if not self.path.exists():
            return []
        return [Request.model_validate_json(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
