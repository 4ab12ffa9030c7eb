"""k-means on a line: the codebook with the least squared error, and how far from the optimum it can be.

Decides how to search: on the line an optimal cluster is an interval of the sorted values, so the best
partition is a shortest path over cut points. Knows nothing of tensors, zeros or number formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steelyard.errors import CodecError
from steelyard.kernels import kernel

MAX_CLUSTERS = 65_536
CELLS = 1 << 25  # distinct values x clusters that the exact search takes on: 134 MB of back pointers
BINS = 1 << 16  # above that, the values are gathered into so many bins,
FINE_BINS = 1 << 20  # or into so many where there are too many clusters for the back pointers
LLOYD_STEPS = 100
LIGHTEST = 1e-15  # of the weight of all values: what a running sum of float64 would lose


@dataclass(frozen=True, eq=False)
class Clustering:
    """Centres on a line, with a proof of how good they are: ``lower <= optimum <= loss``."""

    centres: np.ndarray  # (<= k,) float64, ascending, distinct
    loss: float  # sum of weight x (value - nearest centre)^2
    lower: float  # no k centres have a smaller loss than this; equal to `loss` where the search was exact
    exact: bool  # the optimum itself, up to the rounding of float64 sums

    @property
    def excess(self) -> float:
        """The largest possible relative loss against the optimum: loss / lower - 1."""
        return 0.0 if self.exact else self.loss / self.lower - 1 if self.lower > 0 else float("inf")


def kmeans_1d(values: np.ndarray, k: int, weights: np.ndarray | None = None) -> np.ndarray:
    """At most `k` centres with the least weighted sum of squared distances to `values`; see `cluster_1d`.

    >>> kmeans_1d(np.array([1.0, 1.2, 5.0, 5.2, 9.0]), 3).tolist()
    [1.1, 5.1, 9.0]
    """
    return cluster_1d(values, k, weights).centres


def cluster_1d(values: np.ndarray, k: int, weights: np.ndarray | None = None) -> Clustering:
    """The k-means of a line, with a bound on the loss.

    Minimises ``sum_i w_i min_c (x_i - c)^2`` over sets of `k` centres. With n distinct values: for
    n k <= 2^25 by dynamic programming over cut points, exactly (divide and conquer on the monotone
    argmin, O(k n log n)). Beyond, exactly over up to 65,536 bins of neighbouring values (or, from 512
    clusters on, over up to 1,048,576 bins with a price per cluster in place of their number), then by
    Lloyd's iteration over all values; `lower` is then a proven bound.

    Args: `values` (n,) finite; `k` from 1 to 65,536; `weights` (n,) finite, >= 0 (all zero counts as
    all one; less than 1e-15 of all together counts as zero, since sums of float64 do not know it).
    Raises CodecError for anything else.

    >>> found = cluster_1d(np.array([0.0, 1.0, 10.0]), 2)
    >>> found.centres.tolist(), found.loss, found.exact
    ([0.5, 10.0], 0.5, True)

    Source: Wang and Song, "Ckmeans.1d.dp", The R Journal 3(2), 2011; Grønlund et al., "Fast Exact
    k-Means, k-Medians and Bregman Divergence Clustering in 1D", arXiv:1701.07204, 2017.
    """
    x, mass = _distinct(values, k, weights)
    if x.size <= k:
        return Clustering(x, 0.0, 0.0, True)
    # Sums of squares are taken in units of the range around the median, so that they neither overflow nor cancel.
    shift = x[x.size // 2]
    scale = max(x[-1] - shift, shift - x[0])
    unit = (x - shift) / scale
    sums = _sums(unit, mass)
    if x.size * k <= CELLS:
        cuts = _optimal_cuts(*sums, k)
        centres = _centres(unit, mass, cuts)
        loss = _loss(unit, mass, centres)
        lower, exact = loss, True
    else:
        cuts, lower = _binned_cuts(unit, mass, k)
        cuts = _lloyd(unit, sums[0], sums[1], cuts, LLOYD_STEPS)
        centres = _centres(unit, mass, cuts)
        loss = _loss(unit, mass, centres)
        lower, exact = min(lower, loss), False
    single = np.diff(cuts) == 1  # a value that has a centre to itself is met exactly, not up to rounding
    centres = np.where(single, x[cuts[:-1]], centres * scale + shift)
    with np.errstate(over="ignore"):  # the centres fit into float64; the squares of their distances need not
        return Clustering(np.unique(centres), float(loss * scale * scale), float(lower * scale * scale), exact)


def _distinct(values: np.ndarray, k: int, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values that weigh anything, ascending, and their total weights."""
    if not 1 <= k <= MAX_CLUSTERS:
        raise CodecError(f"the number of clusters is 1 to {MAX_CLUSTERS}, not {k}")
    x = np.asarray(values, np.float64).ravel()
    if not np.isfinite(x).all():
        raise CodecError("cannot cluster values that are NaN or infinite")
    if weights is None:
        found, counts = np.unique(x, return_counts=True)
        return found, counts.astype(np.float64)
    w = np.asarray(weights, np.float64).ravel()
    if w.size != x.size or not (np.isfinite(w) & (w >= 0)).all():
        raise CodecError(f"expected {x.size} finite weights >= 0 to cluster {x.size} values, got {w.size}")
    if not w.any():
        return _distinct(x, k, None)
    found, where = np.unique(x[w > 0], return_inverse=True)
    mass = np.bincount(where.ravel(), w[w > 0])
    share = mass / mass.max()
    counted = share > LIGHTEST * share.sum()
    return found[counted], mass[counted]


def gather(values: np.ndarray, weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `count` points (means and weights of neighbouring values) that stand for all `values`."""
    if not weights.any():
        return values[:0], weights[:0]
    x, mass = _distinct(values, 1, weights)
    starts = _bins(x, mass, count)
    weight = np.add.reduceat(mass, starts)
    return np.add.reduceat(mass * x, starts) / weight, weight


def _sums(x: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Running sums (n + 1,) of mass, mass x and mass x^2, counted from the middle value outwards.

    A far outlier then spoils the precision of the sums beyond itself only.
    """
    middle = x.size // 2

    def outwards(terms: np.ndarray) -> np.ndarray:
        right = np.cumsum(terms[middle:])
        left = -np.cumsum(terms[:middle][::-1])[::-1]
        return np.concatenate([left, [0.0], right])

    return outwards(mass), outwards(mass * x), outwards(mass * x * x)


def _centres(x: np.ndarray, mass: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """The mean of each interval."""
    means: np.ndarray = np.add.reduceat(mass * x, cuts[:-1]) / np.add.reduceat(mass, cuts[:-1])
    return means


def _loss(x: np.ndarray, mass: np.ndarray, centres: np.ndarray) -> float:
    """The weighted sum of squared distances to the nearest centre."""
    nearest = centres[np.searchsorted((centres[1:] + centres[:-1]) / 2, x)]
    return float(np.sum(mass * (x - nearest) ** 2))


def _binned_cuts(x: np.ndarray, mass: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Cuts that are optimal among those between bins, and a lower bound of the optimum over all cuts.

    Let B be the optimal loss over the bins' means, W the loss inside bins and V its part in the k - 1
    bins that have most of it. The k - 1 borders of the true optimum fall into at most k - 1 bins. An
    unsplit bin costs what its mean costs plus its inner loss; a split one costs s >= 0 where its mean
    costs at most (sqrt(s) + sqrt(inner))^2, by the triangle inequality. Summed up,
    B <= OPT - W + 2 V + 2 sqrt(OPT V), hence OPT >= (sqrt(B + W - V) - sqrt(V))^2.
    """
    fine = BINS * k > CELLS
    starts = _bins(x, mass, FINE_BINS if fine else BINS)
    weight = np.add.reduceat(mass, starts)
    mean = np.add.reduceat(mass * x, starts) / weight
    sizes = np.diff(np.append(starts, x.size))
    inner = np.add.reduceat(mass * (x - np.repeat(mean, sizes)) ** 2, starts)
    if mean.size <= k:
        cuts, best = np.arange(mean.size + 1), 0.0
    elif fine:
        cuts, best = _priced_cuts(*_sums(mean, weight), k)
    else:
        cuts = _optimal_cuts(*_sums(mean, weight), k)
        best = _loss(mean, weight, _centres(mean, weight, cuts))
    split = float(np.sort(inner)[::-1][: k - 1].sum())
    rest = max(0.0, best + float(inner.sum()) - split)
    lower = max(0.0, np.sqrt(rest) - np.sqrt(split)) ** 2
    return np.append(starts, x.size)[cuts], float(lower)


def _bins(x: np.ndarray, mass: np.ndarray, count: int) -> np.ndarray:
    """Where bins of neighbouring values start: half of them of equal mass, half of equal width."""
    running = np.cumsum(mass)
    by_mass = np.searchsorted(running, np.linspace(0, running[-1], count // 2, endpoint=False))
    by_width = np.searchsorted(x, np.linspace(x[0], x[-1], count // 2, endpoint=False))
    return np.unique(np.concatenate([[0], by_mass, by_width]))


def _priced_cuts(mass: np.ndarray, first: np.ndarray, second: np.ndarray, k: int) -> tuple[np.ndarray, float]:
    """Cuts into at most k intervals by a price per interval, and the dual lower bound of the loss.

    For every price p, min over all partitions of (loss + p x intervals) - p k bounds the loss of the
    best k intervals from below (weak duality); the price is bisected until the partition has k.
    """
    n = mass.size - 1
    total = second[n] - second[0]
    low, high = np.log(total) - 60.0, np.log(total)
    cuts, bound = np.array([0, n], np.int64), 0.0
    for _ in range(50):
        price = float(np.exp((low + high) / 2))
        cost, found = _priced_partition(mass, first, second, price)
        bound = max(bound, cost - price * k)
        if cuts.size < found.size <= k + 1:
            cuts = found
        if found.size == k + 1:
            break
        low, high = (low, (low + high) / 2) if found.size <= k else ((low + high) / 2, high)
    return cuts, bound


@kernel
def _optimal_cuts(mass, first, second, k):
    """The cut points 0 = c_0 < ... < c_k = n with the least sum of squares inside the k intervals."""
    n = mass.size - 1
    before = np.empty(n + 1)  # the least loss of the first i values in j intervals
    for i in range(1, n + 1):
        d = first[i] - first[0]
        before[i] = second[i] - second[0] - d * d / (mass[i] - mass[0])
    after = np.empty(n + 1)
    back = np.zeros((k, n + 1), np.int32)  # where the last of j + 1 intervals starts
    todo = np.empty((128, 4), np.int64)  # ranges of i, and the range in which their argmin lies
    for j in range(1, k):
        todo[0, 0], todo[0, 1], todo[0, 2], todo[0, 3] = (n if j == k - 1 else j + 1), n, j, n - 1
        top = 1
        while top:
            top -= 1
            low, high, start, end = todo[top, 0], todo[top, 1], todo[top, 2], todo[top, 3]
            i = (low + high) // 2
            w, s, q = mass[i], first[i], second[i]
            best, arg = np.inf, max(start, back[j - 1, i])
            # The argmin grows with i and with j (the loss of an interval is Monge).
            for m in range(arg, min(end, i - 1) + 1):
                d = s - first[m]
                loss = before[m] + (q - second[m]) - d * d / (w - mass[m])
                if loss < best:
                    best, arg = loss, m
            after[i] = best
            back[j, i] = arg
            if i < high:
                todo[top, 0], todo[top, 1], todo[top, 2], todo[top, 3] = i + 1, high, arg, end
                top += 1
            if low < i:
                todo[top, 0], todo[top, 1], todo[top, 2], todo[top, 3] = low, i - 1, start, arg
                top += 1
        before, after = after, before
    cuts = np.empty(k + 1, np.int64)
    cuts[k] = n
    for j in range(k - 1, -1, -1):
        cuts[j] = back[j, cuts[j + 1]]
    return cuts


@kernel
def _priced_partition(mass, first, second, price):
    """The least (loss + price x intervals) over all partitions, and its cut points.

    The candidates for the start of the last interval wait in a queue, each with the end from which on
    it is the best; a later one, once better, stays better (the loss is Monge).
    """
    n = mass.size - 1
    best = np.empty(n + 1)
    best[0] = 0.0
    back = np.zeros(n + 1, np.int64)
    queue, since = np.empty(n + 1, np.int64), np.empty(n + 1, np.int64)
    queue[0], since[0] = 0, 1
    head, tail = 0, 1
    for i in range(1, n + 1):
        while head + 1 < tail and since[head + 1] <= i:
            head += 1
        m = queue[head]
        d = first[i] - first[m]
        best[i] = best[m] + (second[i] - second[m]) - d * d / (mass[i] - mass[m]) + price
        back[i] = m
        start = i + 1  # the first end at which i is the best candidate so far
        while head < tail:
            m, low = queue[tail - 1], max(since[tail - 1], i + 1)
            if low <= n and _beats(mass, first, second, best, i, m, low):
                tail -= 1
                start = low
                continue
            start = n + 1
            while start - low > 1:
                middle = (low + start) // 2
                if _beats(mass, first, second, best, i, m, middle):
                    start = middle
                else:
                    low = middle
            break
        if start <= n:
            queue[tail], since[tail] = i, start
            tail += 1
    count = 0
    i = n
    while i > 0:
        i = back[i]
        count += 1
    cuts = np.empty(count + 1, np.int64)
    i = n
    for c in range(count, -1, -1):
        cuts[c] = i
        i = back[i]
    return best[n], cuts


@kernel
def _beats(mass, first, second, best, i, m, end):
    """Whether an interval up to `end` is at least as good when it starts at i as when it starts at m."""
    a, b = first[end] - first[i], first[end] - first[m]
    with_i = best[i] - second[i] - a * a / (mass[end] - mass[i])
    with_m = best[m] - second[m] - b * b / (mass[end] - mass[m])
    return with_i <= with_m


@kernel
def _lloyd(x, mass, first, cuts, steps):
    """Cuts after Lloyd's iteration: each to the middle of its two means, until none moves; empty intervals go."""
    for _ in range(steps):
        k = cuts.size - 1
        new = cuts.copy()
        moved = False
        for c in range(1, k):
            a, b, d = cuts[c - 1], cuts[c], cuts[c + 1]
            left = (first[b] - first[a]) / (mass[b] - mass[a])
            right = (first[d] - first[b]) / (mass[d] - mass[b])
            border = (left + right) / 2
            low, high = a, d  # the first value above the border
            while low < high:
                middle = (low + high) // 2
                if x[middle] <= border:
                    low = middle + 1
                else:
                    high = middle
            moved = moved or low != b
            new[c] = low
        if not moved:
            break
        kept = 1
        for c in range(1, k + 1):
            if new[c] > new[kept - 1]:
                new[kept] = new[c]
                kept += 1
        cuts = new[:kept]
    return cuts
