"""Which model answers, and how it is reached. `choose_model` decides; AutoGen is imported when a client is made."""

from support.models.choice import KEYLESS, OFFLINE_NOTE, ModelChoice, choose_model
from support.models.vendors import VENDORS, ModelChoiceError, ModelFailed, Vendor

__all__ = [
    "KEYLESS",
    "OFFLINE_NOTE",
    "VENDORS",
    "ModelChoice",
    "ModelChoiceError",
    "ModelFailed",
    "Vendor",
    "choose_model",
]
