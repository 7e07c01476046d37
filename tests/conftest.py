"""Shared fixtures: a fixed seed for each test, and benchmark declarations that end with it."""

import signal

import pytest
import torch

from modalign.bench.registry import _cases, _providers, _sources

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background, and what is started from here would inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def registry():
    """Benchmark cases and providers declared in a test are gone after it."""
    cases, providers, sources = dict(_cases), {name: dict(those) for name, those in _providers.items()}, list(_sources)
    yield
    _cases.clear(), _providers.clear(), _sources.clear()
    _cases.update(cases), _providers.update(providers), _sources.extend(sources)
