"""k-means on a line: 10^6 values, k = 256, beside scikit-learn and the exact kmeans1d, in CPU seconds.

python bench/kmeans/run.py [--size 1000000] [--k 256] [--seeds 3] [--rounds 300] [--tol 1e-4] [--peer FOLDER]

With few `--rounds` of scikit-learn its time is a lower bound, and its error an upper one; with 0 it is left out.
`--peer` holds kmeans1d (pip install --no-deps --target FOLDER kmeans1d). Values are normal, Student t with 3 degrees of
freedom, and a mixture. The error is the sum of squares to the nearest centre, summed in float64 the same way for all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans

from steelyard.kernels.kmeans import kmeans_1d


def values(kind: str, size: int, seed: int) -> np.ndarray:
    """Numbers of one kind of distribution, float64."""
    random = np.random.default_rng([seed, len(kind)])
    if kind == "normal":
        return random.normal(size=size)
    if kind == "student":
        return random.standard_t(3, size=size)
    return random.normal(size=size) * 0.2 + random.choice([-2.0, 0.0, 0.5], size)


def error(x: np.ndarray, centres: np.ndarray) -> float:
    """The sum of squares to the nearest centre."""
    c = np.sort(centres)
    return float(np.square(x - c[np.searchsorted((c[1:] + c[:-1]) / 2, x)]).sum())


def theirs(x: np.ndarray, k: int, seed: int, rounds: int, tol: float) -> np.ndarray:
    """scikit-learn as it is by default, one start, at most so many rounds, or until centres move less than `tol`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        return KMeans(k, n_init=1, max_iter=rounds, tol=tol, random_state=seed).fit(x[:, None]).cluster_centers_[:, 0]


def timed(function: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    start = time.process_time()
    return function(), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=10**6)
    parser.add_argument("--k", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--tol", type=float, default=1e-4, help="of scikit-learn, whose default it is")
    parser.add_argument("--kinds", nargs="+", default=["normal", "student", "mixture"])
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{date.today()}.json")
    options = parser.parse_args()
    kmeans_1d(values("normal", 1000, 0), 4)  # compiled, or loaded
    rows = []
    for kind in options.kinds:
        for seed in range(options.seeds):
            x = values(kind, options.size, seed)
            ours, seconds = timed(lambda x=x: kmeans_1d(x, options.k))
            row = {"values": kind, "seed": seed, "seconds": seconds}
            if options.rounds:
                other, slow = timed(lambda x=x, seed=seed: theirs(x, options.k, seed, options.rounds, options.tol))
                row |= {"scikit-learn seconds": slow, "of its time": seconds / slow}
                row |= {"of its error": error(x, ours) / error(x, other)}
            if options.peer is not None and seed == 0:
                sys.path.insert(0, str(options.peer))
                import kmeans1d

                exact, took = timed(lambda x=x: np.array(kmeans1d.cluster(x, options.k).centroids))
                row |= {"kmeans1d seconds": took, "of the least error": error(x, ours) / error(x, exact)}
            rows.append(row)
            print(row, flush=True)
            options.out.write_text(
                json.dumps(
                    {"size": options.size, "k": options.k, "rounds": options.rounds, "tol": options.tol, "rows": rows},
                    indent=1,
                )
                + "\n"
            )


if __name__ == "__main__":
    main()
