"""The classifiers that ship with the package, as networks."""

import functools
from typing import Any

from ditjax.files.assets import load_asset
from ditjax.models import classifier

Classifier = classifier.DigitsConvNet | classifier.DigitsMixer


@functools.cache
def shipped_classifier(name: str) -> tuple[Classifier, Any]:
    """Return a shipped classifier and its parameters."""
    params, record = load_asset(name)
    widths = dict(record["network"])
    return getattr(classifier, widths.pop("name"))(**widths), params
