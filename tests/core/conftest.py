"""Two small codecs: one that halves, one that takes a tensor apart. The nouns are tested without the real ones."""

from __future__ import annotations

import numpy as np
import pytest

from steelyard.core.packed import pack

import small_codecs


@pytest.fixture(scope="session")
def codecs():
    return small_codecs.CODECS


@pytest.fixture
def halves():
    return pack(np.array([1.0, 2.0]), small_codecs.Scaled())
