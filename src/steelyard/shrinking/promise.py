"""How much a metric may have fallen in truth, from what some examples say: the bound that a promise rests on.

Decides what a promise is and when examples suffice for one. Arithmetic on arrays; knows nothing of models.

Sources: T. Tango, Equivalence test and confidence interval for the difference in proportions for the paired-sample
design, Statistics in Medicine 1998; C. J. Clopper, E. S. Pearson, The use of confidence or fiducial limits, Biometrika
1934.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from numbers import Real
from statistics import NormalDist

import numpy as np

from steelyard.errors import ModelError
from steelyard.learn.intervals import block_length

_SHARE = 0.85  # of the error is asked of the score limit, which errs in up to 1.12 of the cases that it says
BALANCE = (0.1, 2.0, 0.16)  # of losses and gains among changes: of few, for each share of changes more, its deviation
UNUSUAL = 0.25  # the chance of another one
MOST = 10**9  # examples that anybody could ask for


@dataclass(frozen=True)
class Promise:
    """The metric falls by no more than ``tolerance``, in its own unit, and that is so with ``confidence``.

    A bound is one-sided: over many such promises, at most a share of 1 - confidence is broken.

    >>> promise = Promise(tolerance=0.02)
    >>> worse = np.zeros(450)  # not one of 450 decisions is another
    >>> round(promise.bound(worse), 4), promise.least(450) < 0.02, promise.needed(worse)
    (0.0066, True, 149)
    """

    tolerance: float
    confidence: float = 0.95
    ordered: bool = False  # examples follow one another: neighbours are alike, and count together
    look: int = 1  # how often, with this time, the proof examples have been asked for a promise
    share: float = 1.0  # of the error that this look may make: the rest is kept for other candidates

    def __post_init__(self) -> None:
        number = isinstance(self.tolerance, Real) and not isinstance(self.tolerance, bool)
        if not (number and math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ModelError(f"tolerance={self.tolerance!r}: expected a number above 0, in the unit of the metric")
        if not (isinstance(self.confidence, Real) and 0.5 <= self.confidence < 1):
            raise ModelError(f"confidence={self.confidence!r}: expected 0.5 or more and less than 1, such as 0.95")

    @property
    def level(self) -> float:
        """The confidence of this bound: that of the promise, or more where the examples were asked before.

        Whoever asks until the answer is yes would be told it by luck. So what may go wrong with the first look may go
        wrong once more with all that follow, however many: look k has 1 / (k (k - 1)) of it (Bonferroni), a half, a
        sixth, a twelfth, and so on, which add up to 1.

        >>> [round(Promise(0.02, look=look).level, 4) for look in (1, 2, 3, 4)]
        [0.95, 0.975, 0.9917, 0.9958]
        """
        part = 1 if self.look == 1 else 1 / (self.look * (self.look - 1))
        return 1 - (1 - self.confidence) * part * self.share

    def bound(self, worse: np.ndarray) -> float:
        """The most that the metric may have fallen in truth, at the confidence.

        worse: (examples,), how much worse each example came out: before - after, where more is better.
        If all are -1, 0 or 1 (right or wrong): the upper score limit of a paired difference (Tango), and where nothing
        came out better never less than the exact limit (Clopper and Pearson). Otherwise Student's t, which is exact for
        normal differences and near it for many examples. Where examples follow one another, t of the means of runs that
        are as long as neighbours are alike (`block_length`). Infinite where one example or none cannot say.
        """
        worse = self._apart(worse)
        if len(worse) == 0:
            return math.inf
        if _whole(worse):
            return self._limit(int((worse > 0).sum()), int((worse < 0).sum()), len(worse))
        if len(worse) < 2:
            return math.inf
        from scipy.special import stdtrit

        t = float(stdtrit(len(worse) - 1, self.level))
        return float(worse.mean() + t * worse.std(ddof=1) / math.sqrt(len(worse)))

    def kept(self, worse: np.ndarray) -> bool:
        """Whether these examples prove it."""
        return self.bound(worse) <= self.tolerance

    def least(self, examples: int) -> float:
        """The smallest tolerance that so many right-or-wrong examples can prove, if not one of them changes."""
        return self._limit(0, 0, examples) if examples else math.inf

    def needed(self, worse: np.ndarray) -> int | None:
        """How many examples would prove it, if they came out as these; None if no number would."""
        if len(worse) == 0 or float(worse.mean()) >= self.tolerance:
            return None
        low, high = 0, 1
        while not self.would(worse, high):
            low, high = high, high * 2
            if high > MOST:
                return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.would(worse, middle) else (middle, high)
        return high

    def would(self, worse: np.ndarray, examples: int) -> bool:
        """Whether so many examples would prove it, if they came out as these."""
        return self.foreseen(worse, examples) <= self.tolerance

    def foreseen(self, worse: np.ndarray, examples: int) -> float:
        """The bound of so many examples, if they came out as these; infinite where one or none cannot say."""
        worse, examples = self._apart(worse), examples // self._run(worse)
        if len(worse) < 2 or not examples:
            return math.inf
        scale = examples / len(worse)
        if _whole(worse):
            lost, gained = (int((worse > 0).sum()) * scale, int((worse < 0).sum()) * scale)
            return self._limit(lost, gained, examples)
        from scipy.special import stdtrit

        spread = float(worse.std(ddof=1)) / math.sqrt(examples)
        t = float(stdtrit(max(examples - 1, 1), self.level))
        return float(worse.mean()) + t * spread

    def chance(self, mean: float, variance: float, seen: int, examples: int, *, shares: bool) -> float:
        """How probable it is that so many examples prove it, where those that were seen had this mean and variance.

        shares: they are right or wrong; where more is lost, more change, and what changes is lost for the greater part
        only where much does (`_ratios`). It decides what is worth a proof, and nothing else rests on it.
        """
        if shares:
            return self._chance_of_shares(mean, variance, seen, examples)
        bar = self.tolerance - NormalDist().inv_cdf(self.level) * math.sqrt(variance / examples)
        spread = math.sqrt(variance * (1 / seen + 1 / examples))
        return NormalDist().cdf((bar - mean) / spread) if spread else float(mean <= bar)

    def _chance_of_shares(self, mean: float, changed: float, seen: int, examples: int) -> float:
        """In the mean of what the changes that were seen may say."""
        from scipy.special import ndtr

        ratio, weight = _ratios(mean, changed, seen)
        lost = ratio * changed
        z = NormalDist().inv_cdf(1 - _SHARE * (1 - self.level))
        bar = self.tolerance - z * np.sqrt((changed + np.maximum(self.tolerance - lost, 0.0)) / examples)
        spread = np.sqrt(changed / examples + ratio**2 * changed / seen)
        return float(weight @ ndtr((bar - lost) / spread))

    def _run(self, worse: np.ndarray) -> int:
        return block_length(worse) if self.ordered else 1

    def _apart(self, worse: np.ndarray) -> np.ndarray:
        """The differences as they may be held to be independent."""
        run = self._run(worse)
        if run == 1:
            return worse
        return np.array([part.mean() for part in np.array_split(worse, max(1, len(worse) // run))])

    def _limit(self, lost: float, gained: float, examples: int) -> float:
        """The upper limit of the rate of losses less the rate of gains."""
        from scipy.special import betaincinv

        if lost >= examples:
            return 1.0
        exact = 0.0 if gained else float(betaincinv(lost + 1, examples - lost, self.level))
        return max(exact, _score_limit(lost, gained, examples, 1 - _SHARE * (1 - self.level)))


def rounded(x: float, digits: int, *, up: bool = True) -> str:
    """x to so many significant digits, never below what it is (up=False: never above it).

    >>> rounded(0.02137, 2), rounded(0.02137, 2, up=False), rounded(0.25, 3)
    ('0.022', '0.021', '0.25')
    """
    found = Context(prec=digits, rounding=ROUND_CEILING if up else ROUND_FLOOR).create_decimal(Decimal(x))
    return f"{float(found):.{digits}g}"


def _ratios(mean: float, changed: float, seen: int) -> tuple[np.ndarray, np.ndarray]:
    """Which part of the changes may be lost in truth, less the part that is gained, and how probable each is.

    Of few changes some are lost, some gained: those are examples that lie between two answers. Their balance is known
    better from other models than from a handful of changes: over many files of sixteen nets it was 0.1 and twice the
    share of changes, give or take 0.16 (bench/shrink_peers). A net that is nearly always right can only lose:
    so in a quarter of cases it may be anything.
    """
    ratio = np.linspace(-0.99, 0.99, 100)
    usual = np.exp(-0.5 * ((ratio - min(BALANCE[0] + BALANCE[1] * changed, 0.9)) / BALANCE[2]) ** 2)
    prior = (1 - UNUSUAL) * usual / usual.sum() + UNUSUAL / len(ratio)
    count, more = changed * seen, mean * seen
    lost, gained = max(count + more, 0.0) / 2, max(count - more, 0.0) / 2
    log = lost * np.log1p(ratio) + gained * np.log1p(-ratio) + np.log(prior)
    weight = np.exp(log - log.max())
    return ratio, weight / weight.sum()


def _whole(worse: np.ndarray) -> bool:
    return bool(np.isin(worse, (-1.0, 0.0, 1.0)).all())


def _score_limit(lost: float, gained: float, examples: int, confidence: float) -> float:
    """The difference at which the score statistic of a paired difference reaches the normal quantile."""
    z, n = NormalDist().inv_cdf(confidence), examples

    def far(d: float) -> bool:  # whether d is farther above what was seen than chance explains
        middle, last = (2 * n - lost + gained) * d - lost - gained, -gained * d * (1 - d)
        least = (math.sqrt(max(middle**2 - 8 * n * last, 0.0)) - middle) / (4 * n)  # likeliest rate of gains
        return lost - gained - n * d <= -z * math.sqrt(max(n * (2 * least + d * (1 - d)), 0.0))

    low, high = (lost - gained) / n, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if far(middle) else (middle, high)
    return high
