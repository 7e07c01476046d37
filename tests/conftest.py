"""Shared fixtures: a fixed seed for each test, and warnings that are errors where they would hide something."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
