"""Choose a model and make its client. `choose_model` reads the environment. Making a client imports AutoGen."""

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
