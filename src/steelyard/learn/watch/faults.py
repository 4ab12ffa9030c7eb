"""What is wrong with a training, by name: from the norms of every step, what the layers did at looks, and the losses.

Decides what counts as a fault, with a threshold and the reason for it. A fault is told once for each place, when it
has been seen often enough to be no accident of one batch. Knows nothing of hooks, models or logs.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from steelyard.learn.verdicts import HEALTHY, WORDS
from steelyard.learn.watch.pairing import Pairing
from steelyard.learn.watch.taps import Layer

DEAD = 0.6  # of a layer's units, at each of the last looks; up to half are no rarity in healthy ReLU nets
SATURATED = 0.8  # of the activations at their limits
PEAKED = 0.5  # of attention's queries at a single key; 2 % at most in healthy trainings
DRIFT = 0.5  # nats: the mean off by a standard deviation, or the variance by a factor of 3.5; healthy are 0.1 at most
LOST = 0.8  # of the elements that have a gradient and do not move
SETTLED = 32  # steps after which running statistics with momentum 0.1 have forgotten their start (0.9^32 = 3 %)
LOOKS = 3  # at which it must be seen, each with another batch
STILL = 10  # steps without any move, while others move
HIGH = 0.3  # update ratio: weights that are replaced within three steps cannot keep what they learn
TRIED = 150  # steps after which a loss should have moved
PATH = 0.1  # sum of update ratios over those steps: weights that went further have had the chance to learn
SHORT = 0.06  # and those that went no further hardly; 100 times too low are 0.04 at most, healthy ones 0.08 at least
FALLING = 3.0  # standard errors by which the loss is lower in the last third of the steps than in the first
LEARNED = 0.3  # of the first loss: below that it has learned, however short the way
FALLEN = 0.1  # share of the loss: less than that is no progress; some slow healthy trainings make 12 %
LOOKUPS, UNSEEN = 50, 0.1  # look-ups for each row after which no more than that share, rare ones, is still unmet
AGREED = 0.1  # of a gradient's square is common to two batches in a row while there is a common way to go ...
SINGLE = 0.5  # ... and more than that while it is the same way, and slow
BATCHES = 20  # from which on outputs that do not know their labels say something
UNSURE = 3.0  # standard deviations: what is beyond chance to some, and not to all, who look at a hundred trainings
SPREAD = 0.5  # of a squared loss: outputs whose variance is less than that say little of each example
COMMON = 16  # steps in which what is common is the mean of the targets

SIGNAL = ("exploding signal", "vanishing signal", "exploding gradient", "vanishing gradient")  # see learn/verdicts
REMEDIES: Mapping[str, str] = {
    **{word: WORDS[word][1] for word in SIGNAL},
    "NaN": "mend the data if it is the inputs; else lower the rate, clip the gradient, or keep this layer in float32",
    "dead ReLU": "start again with He and small biases, lower the rate, or use leaky ReLU or GELU",
    "saturated activation": "start with a smaller scale (Xavier), normalise the inputs, or lower the rate",
    "saturated softmax": "scale queries and keys down (1 / sqrt(width), QK-norm), or lower the rate",
    "frozen": "",  # the remedy follows from the cause
    "lost updates": "keep a float32 copy of the weights, round stochastically, or raise the rate",
    "untied": "assign the same parameter again after copying or loading: head.weight = embed.weight",
    "batch-norm drift": "raise momentum, let the statistics run in training mode, or compute them anew (update_bn)",
    "dead embedding rows": "check the tokenizer and the ids in the data, or remove these rows",
    "rate too high": "lower the learning rate by a factor of 10 to 100, or warm up",
    "rate too low": "raise the learning rate by a factor of 10 to 100",
    "loss as of shuffled labels": "check that inputs and labels belong together, and how they are shuffled",
}
ERRORS = ("NaN", "exploding signal", "exploding gradient", "frozen", "untied")  # the others are warnings
BESIDE = ("untied", "batch-norm drift", "dead embedding rows")  # those that do not explain why a loss does not fall
MODEL = "model"  # where a fault is of no single layer


@dataclass(frozen=True)
class Fault:
    """One fault, when it was found, where, how it shows and what to do."""

    step: int
    fault: str
    where: str
    severity: str
    evidence: str
    remedy: str

    @property
    def text(self) -> str:
        """What, where, how it shows and what to do, in one line."""
        return f"{self.fault} in {self.where}: {self.evidence}; {self.remedy}"

    def __str__(self) -> str:
        return f"step {self.step}: {self.text}"


@dataclass
class Faults:
    """The faults found so far; `tensors` are the names that the arrays of `stepped` belong to.

    layers: the layer of each tensor. matrices: bool, whether it has two axes or more.
    """

    tensors: Sequence[str]
    layers: Sequence[str]
    matrices: np.ndarray
    pairing: Pairing = field(default_factory=Pairing)  # of the outputs and their labels
    found: list[Fault] = field(default_factory=list)
    _told: set[tuple[str, str]] = field(default_factory=set)
    _streaks: dict[tuple[str, str], int] = field(default_factory=dict)
    _dead: dict[str, deque[frozenset[int]]] = field(default_factory=dict)  # at the last looks
    _spread: float = math.inf  # of the outputs over the examples, at the last look
    _still: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    _ratios: deque[float] = field(default_factory=lambda: deque(maxlen=TRIED))  # median over the matrices, by step
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=TRIED))
    _highest: float = 0.0  # the highest rate so far
    _calm: int = 0  # steps for which it did not rise: while it is warming up, no rate is too low
    _agreement: list[tuple[float, float]] = field(default_factory=list)  # (g·g', mean square) of pairs of steps

    @property
    def broken(self) -> bool:
        """Whether numbers have stopped being finite."""
        return bool(self.found) and self.found[-1].fault == "NaN"

    def tell(self, step: int, fault: str, where: str, evidence: str, remedy: str | None = None) -> list[Fault]:
        """The fault, if it is new at that place, and numbers are finite: all that follows NaN is its consequence."""
        if (fault, where) in self._told or self.broken:
            return []
        self._told.add((fault, where))
        severity = "error" if fault in ERRORS else "warning"
        one = Fault(step, fault, where, severity, evidence, REMEDIES[fault] if remedy is None else remedy)
        self.found.append(one)
        return [one]

    def noted(self, loss: float) -> None:
        """The loss of a step."""
        self._losses.append(loss)

    def agreed(self, step: int, common: float, square: float) -> None:
        """What two gradients in a row have in common, g·g', and the mean of their squares."""
        if step >= COMMON:
            self._agreement.append((common, square))

    def stepped(
        self,
        step: int,
        rate: float,
        weight: np.ndarray,
        update: np.ndarray,
        trained: np.ndarray,
        why: Sequence[str],
        decayed: np.ndarray | None = None,
    ) -> Iterator[Fault]:
        """The norms of a step, (tensors,). `trained`: bool, those that should move; `why` says why one does not.

        decayed: bool, those that got no gradient and were moved by their decay alone.
        """
        decayed = np.zeros_like(trained) if decayed is None else decayed
        if not self._still.size:
            self._still = np.zeros(len(self.tensors), int)
        known = self.matrices & trained & (weight > 0)
        if known.any():
            self._ratios.append(float(np.median(update[known] / weight[known])))
        self._still = np.where(trained & ((update == 0) | decayed), self._still + 1, 0)
        if ((update > 0) & ~decayed).any():
            yield from self._frozen(step, trained, why, decayed)
        else:
            self._still[:] = 0
        yield from self._rate(step, rate)

    def _frozen(self, step: int, trained: np.ndarray, why: Sequence[str], decayed: np.ndarray) -> Iterator[Fault]:
        """Layers of which nothing moves: a bias alone may have no effect, before a normalisation, say."""
        for i in np.flatnonzero(self._still == STILL):
            mine = [k for k, layer in enumerate(self.layers) if layer == self.layers[i] and trained[k]]
            if all(self._still[k] >= STILL for k in mine):
                first = mine[0]
                still = "was moved by its decay alone" if decayed[first] else "has not moved"
                text = f"{self.tensors[first]} {still} in {STILL} steps, others have learned: {why[first]}"
                yield from self.tell(step, "frozen", self.layers[i], text, _cure(why[first]))

    def looked(self, step: int, layers: Sequence[Layer]) -> Iterator[Fault]:
        """What the layers did at a look, in the order in which they ran."""
        spreads = [layer.spread for layer in layers if layer.spread is not None]
        self._spread = spreads[-1] if spreads else math.inf
        for layer in layers:
            for word in SIGNAL:
                evidence = _scales(layer) if layer.verdict == word else ""
                yield from self._again(step, word, layer.name, evidence, bad=layer.verdict == word, looks=2)
            yield from self._limits(step, layer)

    def verdict(self, step: int, layer: Layer) -> str:
        """What is said of a layer at one look: of its signal and gradient, or else of a limit that it is beyond."""
        shares = (("saturated activation", layer.saturated, SATURATED), ("saturated softmax", layer.peaked, PEAKED),
                  ("batch-norm drift", layer.drift if step >= SETTLED else None, DRIFT))  # fmt: skip
        beyond = [word for word, value, most in shares if value is not None and value >= most]
        return layer.verdict if layer.verdict != HEALTHY or not beyond else beyond[0]

    def _limits(self, step: int, layer: Layer) -> Iterator[Fault]:
        if layer.dead is not None:
            looks = self._dead.setdefault(layer.name, deque(maxlen=LOOKS))
            looks.append(layer.dead)
            always = frozenset.intersection(*looks)
            text = f"{len(always)} of {layer.units} units are zero for every example of {LOOKS} batches"
            if len(looks) == LOOKS and layer.units > 1 and len(always) >= DEAD * layer.units:
                yield from self.tell(step, "dead ReLU", layer.name, text)
        for word, share, most, what in (
            ("saturated activation", layer.saturated, SATURATED, "activations are at their limits"),
            ("saturated softmax", layer.peaked, PEAKED, "of the queries attend to a single key"),
        ):
            if share is not None:
                text = f"{100 * share:.0f} % {what}"
                yield from self._again(step, word, layer.name, text, bad=share >= most)
        if layer.drift is not None and step >= SETTLED:
            text = f"the batch is {layer.drift:.2g} nats from the running statistics, median over the channels"
            yield from self._again(step, "batch-norm drift", layer.name, text, bad=layer.drift >= DRIFT)

    def _again(
        self, step: int, fault: str, where: str, evidence: str, *, bad: bool, looks: int = LOOKS, key: str = ""
    ) -> list[Fault]:
        """The fault, once it was seen at so many looks in a row; `key`: of what, if that is not where."""
        seen = fault, key or where
        streak = self._streaks[seen] = self._streaks.get(seen, 0) + 1 if bad else 0
        return self.tell(step, fault, where, evidence) if streak >= looks else []

    def lost(self, step: int, tensor: int, share: float, dtype: str) -> list[Fault]:
        """The share of elements of a tensor that have a gradient and did not move at a look."""
        text = f"{self.tensors[tensor]}: {100 * share:.0f} % of the updates are below half of the last digit of {dtype}"
        bad = share >= LOST  # by tensor: a bias that starts at zero loses nothing
        return self._again(step, "lost updates", self.layers[tensor], text, bad=bad, key=self.tensors[tensor])

    def unseen(self, step: int, layer: str, rows: Sequence[int], of: int, lookups: int) -> list[Fault]:
        """The rows of a table that were never looked up, of so many, in so many look-ups."""
        if lookups < LOOKUPS * of or len(rows) < max(2, UNSEEN * of):
            return []
        listed = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        text = f"{len(rows)} of {of} rows were never looked up in {lookups:,} look-ups: {listed}"
        return self.tell(step, "dead embedding rows", layer, text)

    def overshot(self, step: int) -> list[Fault]:
        """Whether a step replaced the weights: told before what follows from it, NaN for one."""
        peak = max(self._last_ratios(), default=0.0)
        if peak < HIGH:
            return []
        text = f"a step moves the matrices by {peak:.2g} of their size (median)"
        return self.tell(step, "rate too high", MODEL, text)

    def _rate(self, step: int, rate: float) -> Iterator[Fault]:
        """Whether the rate is far off, or the loss is that of labels that mean nothing."""
        rises = rate > 1.01 * self._highest
        self._highest, self._calm = max(rate, self._highest), 0 if rises else self._calm + 1
        if len(self._ratios) >= 3 and sum(self._last_ratios()) >= 3 * HIGH:
            yield from self.overshot(step)
        if self._calm == TRIED and len(self._losses) > TRIED // 2:
            yield from self._stuck(step, list(self._losses))

    def _last_ratios(self) -> list[float]:
        return list(islice(reversed(self._ratios), 3))

    def _stuck(self, step: int, losses: Sequence[float]) -> Iterator[Fault]:
        """What is told once, after so many steps at a rate that does not rise."""
        first, last, path = _mean(losses[:5]), _mean(losses[-25:]), sum(self._ratios)
        common, square = (sum(part) for part in zip(*self._agreement, strict=True)) if self._agreement else (0.0, 0.0)
        share = common / square if square else 0.0
        text = f"the loss went from {first:.4g} to {last:.4g} in {TRIED} steps, gradients of two batches have "
        text += f"{100 * share:.0f} % in common, and the matrices moved by {path:.2g} of their size in all (median)"
        blamed = any(f.fault == "rate too high" or (f.where != MODEL and f.severity == "error") for f in self.found)
        explained = any(f.fault not in BESIDE for f in self.found)
        to_go = share >= AGREED or _falling(losses) >= FALLING  # a training at its end has nowhere to go
        if path < SHORT and to_go and last > LEARNED * first and not blamed:
            yield from self.tell(step, "rate too low", MODEL, text)
        elif path >= PATH and share < SINGLE and not explained and (why := self._guessing(losses, last)):
            yield from self.tell(step, "loss as of shuffled labels", MODEL, f"{text}; {why}")

    def _guessing(self, losses: Sequence[float], last: float) -> str:
        """What shows that nothing was learned of single examples; '' if nothing does.

        With a cross-entropy the outputs do not know the labels of their own examples. With another loss, which has to
        be a squared error for that, it has not fallen, and the outputs vary less than they are off.
        """
        if (found := self.pairing).shown:
            if found.batches < BATCHES or found.sure or abs(found.score) >= UNSURE:
                return ""
            text = f"over {found.examples:,} new examples the outputs go with the labels of others as well as with "
            return f"{text}their own ({found.score:.1f} standard deviations apart)"
        first, varied = _mean(losses[:5]), self._spread**2
        if last <= (1 - FALLEN) * min(first, _mean(losses[5:30])) or varied >= SPREAD * last:
            return ""
        return f"the outputs vary by {varied:.2g} over the examples"


def _falling(losses: Sequence[float]) -> float:
    """By how many standard errors the last third of the losses is below the first, without its very first ones."""
    third = len(losses) // 3
    early, late = np.array(losses[third // 3 : third // 3 + third]), np.array(losses[-third:])
    error = math.sqrt((early.var(ddof=1) + late.var(ddof=1)) / third)
    return float(early.mean() - late.mean()) / error if error else 0.0


def _scales(layer: Layer) -> str:
    gradient = "" if layer.gradient is None else f", dL/d(activation) has rms {layer.gradient:.3g}"
    return f"the activation has rms {layer.rms:.3g} and spread {layer.spread:.3g}{gradient}"


def _cure(why: str) -> str:
    return {
        NOT_HELD: "give it to the optimizer: make that from model.parameters() after the last layer was added",
        NO_GRADIENT: "let a gradient reach it: no detach, no no_grad, and the layer in use",
        ZERO_GRADIENT: "look for what cuts the gradient off: a dead or saturated layer, or a factor of zero",
        ZERO_RATE: "give its parameter group a rate",
    }.get(why, REMEDIES["lost updates"])


NOT_HELD = "the optimizer does not hold it"
NO_GRADIENT = "it gets no gradient"
ZERO_GRADIENT = "its gradient is zero"
ZERO_RATE = "the rate of its group is zero"
TOO_SMALL = "its updates are too small for its number format"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
