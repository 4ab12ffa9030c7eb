"""What the scales of a pass say of a start: which layers lose the signal or the gradient, and in what words.

Decides what is healthy. Forwards a layer is judged by what the layers that it feeds are given (the more strictly, the
less gradient comes back), and only if the loss reaches the end: a branch, a gate or a head that starts at zero is no
fault. Backwards it is judged by dL/d(output) against that of the layers that it feeds, and only if the loss reaches
the layers that see the data. The gradient of the weights is no witness: it is a product of both, and stays at scale
while both vanish.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from steelyard.learn.passage import Call, Scale

LIMIT = 1e3  # so many times smaller or larger than where it came from is lost
BOTH = 2.5e4  # the same of signal and gradient together, where both shrink: what a weight learns from is their product
LEAST = 30.0  # and each of them at least so many times
UNIT = 10.0  # and so many times away from 1: losses, norms and rates are made for numbers of that size

HEALTHY = "healthy"
WORDS: dict[str, tuple[str, str]] = {
    "inputs not finite": ("the inputs hold numbers that are not finite", "mend the data: look for NaN and infinities"),
    "not finite": ("the scale left the range of the number format", "start with a smaller scale, or lower the rate"),
    "symmetric": (
        "the units of this layer have the same weights and get the same gradient, so that they stay one unit",
        "start it with random weights, such as He",
    ),
    "exploding signal": (
        "each layer enlarges what passes through it",
        "start with a smaller scale (He for ReLU, Xavier for tanh) or a data-driven start; or add normalisation",
    ),
    "vanishing signal": (
        "each layer shrinks what passes through it, so that inputs look alike here",
        "start with He for ReLU, Xavier for tanh, or a data-driven start; or add normalisation",
    ),
    "dead": (
        "most units are zero for every sample: their biases are too negative or a step was too long",
        "start again with He and small biases, lower the rate, or use leaky ReLU or GELU",
    ),
    "saturated": (
        "most activations are at their limits, where the slope is almost zero",
        "start with a smaller scale (Xavier) or normalise the inputs",
    ),
    "exploding gradient": (
        "each layer enlarges the gradient on its way back",
        "start with a smaller scale, or clip the gradient",
    ),
    "vanishing gradient": (
        "each layer shrinks the gradient on its way back, so that this layer hardly learns",
        "start with He for ReLU, Xavier for tanh, or a data-driven start; or add residual connections",
    ),
    "frozen": (
        "its weights do not move, although they may be trained and others move",
        "give them to the optimizer, let a gradient reach them (no detach), or hold them in a wider number format",
    ),
}
"""Verdict -> cause and cure, in the order of precedence: the verdict of a model is the first that a layer has."""

LOST = ("exploding signal", "vanishing signal", "dead")  # on the way forwards


def sentence(verdict: str) -> str:
    """Cause and cure in one line; '' for what is healthy."""
    return "; ".join(WORDS[verdict]) if verdict in WORDS else ""


def overall(verdicts: Iterable[str]) -> str:
    """The verdict of the whole: what explains the others comes first."""
    given = set(verdicts)
    return next((word for word in WORDS if word in given), HEALTHY)


def blamed(layers: Sequence[tuple[set[str], set[str]]]) -> tuple[str, int | None]:
    """The verdict of a model, and the first layer that it holds for: of what is lost forwards, what is lost first.

    `layers` in the order of execution: the verdicts of the scales, and those of a closer look, which may be harmless.
    """
    lost = next((i for i, (found, _) in enumerate(layers) if found & set(LOST)), None)
    for word in WORDS:
        if word in LOST and lost is not None:
            return overall(layers[lost][0]), lost
        first = next((i for i, (found, closer) in enumerate(layers) if word in found | closer), None)
        if first is not None:
            return word, first
    return HEALTHY, None


def depends_on_data(calls: Sequence[Call]) -> bool:
    """Whether anything tells the samples of the batch apart."""
    return any(_dependent(calls))


def fades(calls: Sequence[Call]) -> bool:
    """Whether the gradient shrinks so much on its way back that with it a signal may be lost that is not by itself."""
    return _gradient_left(calls, _feeds(calls)) * LEAST < 1


def _feeds(calls: Sequence[Call]) -> list[list[int]]:
    """Of each call those that it feeds."""
    feeds: list[list[int]] = [[] for _ in calls]
    for call in calls:
        for before in call.fed_by:
            feeds[before].append(call.order)
    return feeds


def judged(calls: Sequence[Call]) -> list[str]:
    """The verdict of each call, by its scales alone; `calls` in their order, with or without gradients."""
    feeds = _feeds(calls)
    verdicts = [HEALTHY] * len(calls)
    for words in (_forwards(calls, feeds, _limit(calls, feeds)), _backwards(calls, feeds)):
        verdicts = [old if old != HEALTHY else new for old, new in zip(verdicts, words, strict=True)]
    for order, word in _not_finite(calls).items():
        verdicts[order] = word
    return verdicts


def _not_finite(calls: Sequence[Call]) -> dict[int, str]:
    """The calls that give numbers that are not finite; or else that from which on the gradients are not."""
    outputs = [call.order for call in calls if not all(map(math.isfinite, call.output[:3]))]
    given = [call.order for call in calls if not call.fed_by and not all(map(math.isfinite, (call.inputs or ())[:3]))]
    if outputs:
        return dict.fromkeys(outputs, "not finite") | dict.fromkeys(given, "inputs not finite")
    slopes = [call.order for call in calls if call.gradient is not None and not math.isfinite(call.gradient)]
    return dict.fromkeys(slopes[:-1], "exploding gradient") | dict.fromkeys(slopes[-1:], "not finite")


def _limit(calls: Sequence[Call], feeds: Sequence[Sequence[int]]) -> float:
    """How many times smaller a signal may become, given what becomes of the gradient on its way back."""
    left = _gradient_left(calls, feeds)
    return min(LIMIT, max(LEAST, BOTH * left)) if math.isfinite(left) else LIMIT


def _gradient_left(calls: Sequence[Call], feeds: Sequence[Sequence[int]]) -> float:
    """What is left of the gradient where it reaches the layers that see the data; one way is enough to learn."""
    below, sources = _against_the_end(calls, feeds, _low), _first_to_see_data(calls)
    return max((below[order] for order in sources), default=1.0)


def _forwards(calls: Sequence[Call], feeds: Sequence[Sequence[int]], limit: float) -> list[str]:
    dependent, references = _dependent(calls), _references(calls)

    def lost(call: Call) -> bool:
        ends = _dead_end(call, feeds)
        if not dependent[call.order] or not call.fed_by or (ends and not call.followed):
            return False
        return _small(_spread(call), references[call.order], limit)

    def blown(call: Call) -> bool:
        if not dependent[call.order] or (_dead_end(call, feeds) and not call.followed):
            return False
        own = call.output.spread if _dead_end(call, feeds) else 0.0
        given = _spread(call) if call.fed_by else 0.0
        return _large(max(own, given), references[call.order])

    verdicts = [HEALTHY] * len(calls)
    for found, word in ((lost, "vanishing signal"), (blown, "exploding signal")):
        here = [found(call) for call in calls]
        reaching = list(here)  # what is found here and at some layer after it, up to the end
        for call in reversed(calls):
            after = feeds[call.order]
            reaching[call.order] = here[call.order] and (not after or any(reaching[k] for k in after))
        for call in calls:
            after = feeds[call.order]
            blamed = bool(after) and all(here[k] for k in after) and any(reaching[k] for k in after)
            if blamed or (word == "exploding signal" and not after and here[call.order]):
                silent = all(_given(calls[k]) == 0 for k in after) and call.made.rms > 0
                verdicts[call.order] = "dead" if word == "vanishing signal" and silent else word
    return verdicts


def _backwards(calls: Sequence[Call], feeds: Sequence[Sequence[int]]) -> list[str]:
    """Where the scale of outputs is extreme, as before a norm, gradients make up for it: the product counts."""

    def high(call: Call) -> float:
        return (call.gradient or 0.0) * min(1.0, call.made.spread)

    verdicts = [HEALTHY] * len(calls)
    below, above = _against_the_end(calls, feeds, _low), _against_the_end(calls, feeds, high)
    vanishing = {call.order for call, ratio in zip(calls, below, strict=True) if ratio * LIMIT < 1}
    exploding = {call.order for call, ratio in zip(calls, above, strict=True) if ratio > LIMIT}
    sources = _first_to_see_data(calls)
    for found, word, reaching in (
        (vanishing, "vanishing gradient", sources if sources <= vanishing else set()),  # one way is enough to learn
        (exploding, "exploding gradient", sources & exploding),
    ):
        blamed = set(reaching)
        for call in calls:
            if call.order in found and call.fed_by & blamed:
                blamed.add(call.order)
        if word == "vanishing gradient":  # a layer learns from all of its calls: it is enough that one gets a gradient
            learning = {call.layer for call in calls if call.order not in blamed}
            blamed = {order for order in blamed if calls[order].layer not in learning}
        for order in blamed:
            verdicts[order] = word
    return verdicts


def _low(call: Call) -> float:
    return (call.gradient or 0.0) * max(1.0, call.made.spread)


def _first_to_see_data(calls: Sequence[Call]) -> set[int]:
    """The calls that depend on the samples and get a gradient, while no call that feeds them does both."""
    dependent = _dependent(calls)
    reached = {call.order for call in calls if call.followed and dependent[call.order]}
    return {o for o in reached if calls[o].gradient is not None and not calls[o].fed_by & reached}


def _against_the_end(
    calls: Sequence[Call], feeds: Sequence[Sequence[int]], size: Callable[[Call], float]
) -> list[float]:
    """The size of each gradient over that at the end of the model, or before the first gate on the way there.

    1 where there is nothing to compare with.
    """
    references = [0.0] * len(calls)
    for call in reversed(calls):
        after = feeds[call.order]
        opens = not after or any(calls[k].gate for k in after)
        references[call.order] = size(call) if opens else max(references[k] for k in after)
    known = [call.gradient is not None and references[call.order] > 0 for call in calls]
    return [size(c) / references[c.order] if k else 1.0 for c, k in zip(calls, known, strict=True)]


def _dead_end(call: Call, feeds: Sequence[Sequence[int]]) -> bool:
    return not feeds[call.order]


def _given(call: Call) -> float:
    return call.inputs.rms if call.inputs is not None else call.output.rms


def _spread(call: Call) -> float:
    return call.inputs.spread if call.inputs is not None else call.output.spread


def _start(call: Call) -> Scale:
    """Where the signal of a layer that no other feeds comes in: its input, or its output if that is looked up."""
    return call.output if call.inputs is None else call.inputs


def _dependent(calls: Sequence[Call]) -> list[bool]:
    """Which calls depend on the samples: not those of learned queries or positions."""
    found: list[bool] = []
    for call in calls:
        found.append(any(found[k] for k in call.fed_by) if call.fed_by else _start(call).spread != 0)
    return found


def _references(calls: Sequence[Call]) -> list[float]:
    """The spread with which the signal came in, on the way to each call: the smallest of several."""
    found: list[float] = []
    for call in calls:
        before = [found[k] for k in call.fed_by if found[k] > 0]
        found.append(min(before) if before else _start(call).spread)
    return found


def _small(spread: float, reference: float, limit: float) -> bool:
    return spread * limit < reference and spread * UNIT < 1


def _large(spread: float, reference: float) -> bool:
    return spread > reference * LIMIT and spread > UNIT
