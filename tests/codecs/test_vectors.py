"""Codebooks of runs: as good as scikit-learn's k-means, the bytes that they promise, and a book for each place."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans

from steelyard.codecs.vectors import Vectors
from steelyard.core.packed import pack
from steelyard.errors import CodecError


def loss(x: np.ndarray, codec: Vectors) -> float:
    return float(np.square(pack(x, codec).array() - x).sum())


def test_the_error_is_near_that_of_scikit_learn() -> None:
    x = np.random.default_rng(0).normal(size=(200, 40)).astype(np.float32)
    peer = KMeans(32, n_init=3, random_state=0).fit(x.reshape(-1, 4))
    assert loss(x, Vectors(32, 4)) <= 1.03 * peer.inertia_


def test_runs_of_related_elements_lose_less_than_elements_alone_in_the_same_bytes() -> None:
    random = np.random.default_rng(1)
    x = (random.normal(size=(500, 20, 1)) + 0.3 * random.normal(size=(500, 20, 4))).reshape(500, 80).astype(np.float32)
    runs, alone = pack(x, Vectors(256, 4)), pack(x, Vectors(4, 1))
    assert runs.nbytes == x.size * 2 // 8 + 256 * 16 + 1  # 8 bits for four
    assert alone.nbytes == x.size * 2 // 8 + 4 * 4 + 1
    assert loss(x, Vectors(256, 4)) < 0.8 * loss(x, Vectors(4, 1))


def test_a_book_for_each_place_fits_places_that_differ() -> None:
    random = np.random.default_rng(2)
    x = (random.normal(size=(300, 6)) + 10 * np.arange(6)).astype(np.float32)
    assert loss(x, Vectors(8, 2, product=True)) < 0.5 * loss(x, Vectors(8, 2))
    assert Vectors(8, 2, product=True).encode(x)["codebook"].shape == (3, 8, 2)


@pytest.mark.parametrize(("settings", "says"), [((0,), "k is 0"), ((4, 0), "width is 0"), ((4, 65), "1 to 64")])
def test_settings_are_checked(settings, says: str) -> None:
    with pytest.raises(CodecError, match=says):
        Vectors(*settings)


def test_nan_is_refused_where_it_cannot_be_kept() -> None:
    x = np.arange(40, dtype=np.float32)
    x[3] = np.nan
    with pytest.raises(CodecError, match="NaN or infinite among more than k = 2"):
        Vectors(2, 4).encode(x)
    assert np.isnan(pack(x, Vectors(16, 4)).array()[3])
