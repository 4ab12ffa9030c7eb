"""Weights through a step from one place into another, in blocks: nothing is in memory but what is on its way.

Decides that a target appears under its name as a whole or not at all, that one which was to be verified appears
only after it was read back, and what "the same" means. Knows nothing of any container; how a job that was broken
off is gone on with is in ``_unfinished``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from steelyard import formats
from steelyard.core.packed import Packed
from steelyard.core.transform import Transform, on
from steelyard.core.weights import Weight, Weights
from steelyard.core.where import Where
from steelyard.edit._unfinished import describe, finished, was_moved, workplace
from steelyard.errors import FormatError, VerdictError, printable, quoted
from steelyard.formats.base import Resumable, Writable, check_target

if TYPE_CHECKING:
    import numpy as np

BLOCK = 1 << 20  # bytes that are compared at a time
Tell = Callable[[int], None]  # is told the number of bytes that have been read since it was last called
Watch = Callable[[str, int], Tell]  # is told what begins and how many bytes it will take


def unwatched(_what: str, _total: int) -> Tell:
    """A watch that tells nobody."""
    return lambda _count: None


@dataclass(frozen=True)
class Transferred:
    """What was read and what was written."""

    before: Weights
    after: Weights
    files: tuple[int | None, int]  # the bytes of all files of both; None for what does not lie on this machine
    verified: int | None  # tensors that were read back and compared


def transfer(
    source: str | Path,
    target: str | Path,
    step: Transform,
    where: Where | None = None,
    *,
    force: bool = False,
    format: str | Writable | None = None,
    verified: bool = False,
    resumed: bool = False,
    watch: Watch = unwatched,
) -> Transferred:
    """Apply `step` to the tensors of `source` that `where` chooses, and write them all to `target`.

    `format` is how (None: the suffix of `target` says it). With `verified` the target is read back and compared
    with what the step gives, bit for bit, before it gets its name. With `resumed`, what is done of a job that is
    broken off stays in a folder beside `target`, where the format can be written so, and the same job goes on
    from there; `step` must then be a Step.

    Raises FormatError where `target` is a file of `source`, or exists and `force` is off; WeightsError if no tensor
    matches `where`; VerdictError where what was read back differs. Whatever goes wrong, nothing half-written bears
    the name of the target, and what bore it before is whole.

    >>> transfer("nowhere.safetensors", "b.npz", lambda w: w)
    Traceback (most recent call last):
    ...
    steelyard.errors.FormatError: nowhere.safetensors: there is no such file; check the path
    """
    target = Path(target)
    before = formats.open(source)
    files = formats.files(before, source)

    def check() -> None:
        for path in files or [None]:
            check_target(target, path, force=force)

    if not was_moved(target):
        check()
    before.choose(where)
    made = (on(where, step) if where else step)(before)
    writer = formats.writer(target, format)
    job = None
    if resumed and files is not None and isinstance(writer, Resumable):
        job = describe(files, before, made, step, where, writer)
    size = None if files is None else sum(os.stat(path).st_size for path in files)
    if job is not None and finished(target, job):
        after = formats.open(target)
        count = formats.nbytes(after, target) or 0
        return Transferred(before, after, (size, count), len(after) if verified else None)
    check()
    tell = watch("writing", made.nbytes)
    if job is None and not verified:
        count = writer.write(told(made, tell), target)
        return Transferred(before, formats.open(target), (size, count), None)
    with workplace(Path(os.path.realpath(target)), job) as place:
        tell(place.kept)
        put = writer.resume if job is not None and isinstance(writer, Resumable) else writer.write
        kept = made if job is None else place.keeping(made)
        try:
            count = put(told(kept, tell), place.draft)
        except FormatError as error:
            raise place.named_as(error, target) from error
        number = None
        if verified:
            number = verify(formats.open(place.draft), made, target, watch("verifying", made.nbytes))
        place.forget()
        place.announce()
        writer.move(place.draft, place.target)
    return Transferred(before, formats.open(target), (size, count), number)


def told(weights: Weights, tell: Tell) -> Weights:
    """The same weights; whatever is read of them is told, in bytes of plain values.

    >>> import numpy as np
    >>> seen = []
    >>> list(told(Weights.of({"w": np.zeros(3)}), seen.append).arrays()), seen
    (['w'], [24])
    """
    return weights.with_items(_told(item, tell) for item in weights.values())


def _told(weight: Weight, tell: Tell) -> Weight:
    inner = weight.fill

    def read() -> np.ndarray | Packed:
        value = weight.read()
        tell(weight.spec.nbytes)
        return value

    def fill(first: int, flat: np.ndarray) -> None:
        if inner is not None:
            inner(first, flat)
        tell(flat.nbytes)

    return replace(weight, read=read, fill=None if inner is None else fill)


def verify(found: Weights, expected: Weights, target: Path, tell: Tell = lambda _: None) -> int:
    """Compare names, ties, metadata and every tensor, bit for bit and in blocks; the number of tensors.

    Raises VerdictError naming the first tensor that differs, and the element.

    >>> import numpy as np
    >>> verify(Weights.of({"w": np.float32([0.0])}), Weights.of({"w": np.float32([-0.0])}), Path("t.npz"))
    Traceback (most recent call last):
    ...
    steelyard.errors.VerdictError: t.npz: verifying failed: element 0 of 'w' was to be -0.0, read back 0.0
    """

    def wrong(text: str) -> VerdictError:
        return VerdictError(f"{printable(str(target))}: verifying failed: {text}")

    for a, b in zip_longest(expected, found):
        if a != b:
            names = ["nothing" if name is None else quoted(name) for name in (a, b)]
            raise wrong(f"where the tensor {names[0]} was to be, {names[1]} was read back")
    kept = {key: text for key, text in found.meta.items() if key in expected.meta}  # a container may add its own
    if (dict(found.ties), kept) != (dict(expected.ties), dict(expected.meta)):
        raise wrong("ties or metadata were read back otherwise than they were to be")
    for name, item in expected.items():
        if found[name].spec != item.spec:
            raise wrong(f"{quoted(name)} was to be {item.spec}, read back {found[name].spec}")
        difference = _difference(found[name], item, tell)
        if difference is not None:
            at, was, should = difference
            raise wrong(f"element {at} of {quoted(name)} was to be {should}, read back {was}")
    return len(expected)


def _difference(found: Weight, expected: Weight, tell: Tell) -> tuple[int, object, object] | None:
    """The first element whose bits differ: its index in C order, what was found and what was expected."""
    import numpy as np

    at, elements = 0, max(1, BLOCK // expected.spec.dtype.numpy.itemsize)
    # what is expected is read first: where neither can be decoded, the error is the source's and names it
    for b, a in zip(expected.blocks(elements), found.blocks(elements), strict=True):
        bits = [np.ascontiguousarray(x).view(np.uint8) for x in (a, b)]
        if not np.array_equal(*bits):
            first = int(np.not_equal(*bits).argmax()) // a.itemsize
            return at + first, a[first], b[first]
        at += a.size
        tell(a.nbytes)
    return None
