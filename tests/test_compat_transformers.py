"""What can be said of `modalign.compat.transformers` without transformers; the rest is in tests/hosts, which `make test-hosts` runs."""

from __future__ import annotations

import sys

import pytest
import torch

from modalign import masks
from modalign.compat import transformers as compat


def test_without_transformers_it_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (compat.register, lambda: compat.use_mask(torch.nn.Linear(1, 1), masks.causal(3)).__enter__()):
        with pytest.raises(ImportError, match="modalign.compat.transformers: transformers must be installed, in version 5 or later"):
            call()
