"""What a search has to say: the promise, where the bytes went and why, and the sizes to choose from."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from steelyard import formats
from steelyard.core.table import Column, Table
from steelyard.core.weights import Weight, Weights
from steelyard.edit.kronecker import OUTPUTS, Kronecker
from steelyard.shrinking.deep import MATRICES
from steelyard.shrinking.promise import Promise
from steelyard.shrinking.search import ASKED, USED, Candidate, Search, held_bytes

OUTCOME = (
    "of the proof, which goes from larger to smaller, those that are worth asking, and ends where one fails{again}; "
    "and why it was not asked about others"
)
AGAIN = " (if already the first does, it goes from the largest of all once more)"
MOVED = (
    "of training and rounding together: more than 100 % where that moved the tensor further than leaving it out would; "
    "no error, because what it does to the outputs is what the promise says"
)


def proof(
    search: Search, worse: np.ndarray, promise: Promise, sizes: tuple[int, int], seconds: float, said: dict[str, str]
) -> Table:
    """One row: the metric before and after on the proof examples, its bound, and the bytes of both files.

    worse: how much worse each proof example came out; promise: which these were to prove. said: what else there is to
    say; "before" is the kind of file whose bytes are those before.
    """
    before, headline = search.before["test"], search.task.headline
    sign = -1 if headline in search.task.lower_is_better else 1
    unit = "%" if headline == "accuracy" else ""
    columns = [
        Column("bytes before", "B", f"of the original as {said['before']}, which a file of yours may not be"),
        Column("bytes", "B", "of the finished file"),
        Column("smaller", "x"),
        Column("loss", "pp" if unit else "", "how much worse: before - after, where more is better"),
        Column("loss at most", "pp" if unit else "", f"in truth, at {promise.confidence:.0%} confidence"),
        Column("tolerance", "pp" if unit else ""),
        Column("examples", "", "of the proof"),
        Column("examples changed", "", "that came out better or worse"),
        Column("seconds", "s"),
    ]
    own = {column.name for column in columns}
    called = f"{headline} (metric)" if {headline, f"{headline} before"} & own else headline
    columns[3:3] = [
        Column(f"{called} before", unit, "mean over the proof examples"),
        Column(called, unit, "of the file as another process read it"),
    ]
    row = {
        "bytes before": sizes[0],
        "bytes": sizes[1],
        "smaller": sizes[0] / sizes[1],
        f"{called} before": before.mean(),
        called: (before - sign * worse).mean(),
        "loss": worse.mean(),
        "loss at most": promise.bound(worse),
        "tolerance": promise.tolerance,
        "examples": len(worse),
        "examples changed": int(np.count_nonzero(worse)),
        "seconds": seconds,
    }
    meta = {
        "task": search.task.name,
        "the original": search.learned.told,
        **said,
        "evaluations": search.evaluations,
        "confidence": promise.confidence,
        **({"but": search.seen_before} if search.seen_before else {}),
        **({} if promise.look == 1 else {"look": looked(promise)}),
    }
    return Table.of(f"{search.task.name}: the promise", columns, [row], meta)


def looked(promise: Promise) -> str:
    """What a look at proof examples that were asked before is worth."""
    return (
        f"{promise.look} at these proof examples: its bound is at {promise.level:.4g}, so that all looks after the "
        f"first have {promise.confidence:.0%} together"
    )


def splits(search: Search) -> str:
    """What each split was for. The sensitivities go on with validation batches where there are few of training."""
    used = search.minds.meta[USED].split()
    train = [*(["training"] if search.epochs else []), *(["sensitivities"] if "train" in used else [])]
    valid = [*(["sensitivities"] if "valid" in used else []), "chooses what the proof is asked"]
    return f"train: {', '.join(train)}; valid: {', '.join(valid)}; test: proves, and nothing else"


def why(search: Search, found: Candidate) -> Table:
    """A row for each tensor: what it took, what it takes, how roughly it is held, and what made it so."""
    off = "change" if found.trained else "error"
    columns = [
        Column("tensor"),
        Column("shape"),
        Column("bytes before", "B"),
        Column("bytes", "B"),
        Column("bits", "bits", "for each element"),
        Column("zeros", "%"),
        Column(off, "%", "as the outputs mind it: 100 % is what leaving the tensor out would do"),
        Column("sensitivity", "", "of the outputs: what an error as large as the tensor would do"),
        Column("damage", "%", "its share of the whole: sensitivity times squared error"),
        Column("note"),
    ]
    packed = {weight.name: weight for weight in found.weights.values()}
    rows = [_row(search, weight, packed[weight.name], off) for weight in search.original.values()]
    whole = sum(row.get("damage", 0.0) for row in rows) or 1.0
    meta = {"candidate": found.called}
    if found.trained:  # squares foretell what small errors do
        columns = [column for column in columns if column.name != "damage"]
        meta |= {off: MOVED}
    rows = [{c.name: row.get(c.name) for c in columns} for row in rows]
    if not found.trained:
        rows = [row if row["damage"] is None else row | {"damage": row["damage"] / whole} for row in rows]
    return Table.of("where the bytes went, and why", columns, rows, meta)


def _row(search: Search, weight: Weight, held: Weight, off: str) -> dict[str, Any]:
    size, spec = held_bytes(held), weight.spec
    row = {"tensor": weight.name, "shape": str(list(spec.shape)), "bytes before": spec.nbytes, "bytes": size}
    row |= {"bits": 8 * size / spec.size if spec.size else None, "note": _note(weight, held)}
    if not MATRICES(weight) or not spec.size or weight.name + OUTPUTS not in search.minds:
        return row
    before, after = (w.array().astype(np.float64) for w in (weight, held))
    minds, wrong = Kronecker.of(search.minds, weight), after - before
    square, left_out, damage = float(np.square(before).mean()), minds.cost(before), minds.cost(wrong)
    row |= {"zeros": float(np.mean(after == 0)), off: math.sqrt(damage / left_out) if left_out else 0.0}
    return row | {"sensitivity": float(minds.single.sum()) * square / 2, "damage": damage / 2}


def _note(weight: Weight, held: Weight) -> str:
    if held.scheme is not None:
        return ""
    return "plain" if held.spec.dtype == weight.spec.dtype else f"plain, {held.spec.dtype.name}"


def curve(search: Search, found: Candidate, suffix: str) -> Table:
    """A row for each candidate that was made, the largest first: bytes against what it loses, and what came of it.

    suffix: of the kind of file whose bytes they are.
    """
    headline = search.task.headline
    unit = "pp" if headline == "accuracy" else ""
    columns = [
        Column("candidate", "", "rounded alone, or trained under a price of bits beside the first that was tried"),
        Column("bytes", "B", "of its file"),
        Column("bits", "bits", "for each weight, of all its file"),
        Column("valid loss", unit, f"how much worse {headline} is on validation data; none where it was not asked"),
        Column("loss", unit, "the same on the proof examples; none where it was not tried"),
        Column("loss at most", unit, "in truth, at the confidence of the promise"),
        Column("outcome", "", OUTCOME.format(again=AGAIN if search.reserved else "")),
    ]
    tried = {candidate.name: candidate for candidate in search.tried}
    every = [*search.made.values(), *search.measured.values(), *search.others]
    made = {candidate.name: candidate for candidate in every} | tried
    asked = {question.removesuffix(ASKED) for question in search.journal.known("") if question.endswith(ASKED)}
    rows = []
    for candidate in made.values():
        size = file_bytes(search, candidate, suffix)
        row: dict[str, Any] = {"candidate": candidate.called, "bytes": size, "bits": 8 * size / search.original.size}
        row |= {} if candidate.valid is None else {"valid loss": candidate.valid.mean()}
        if candidate.test is None and candidate.name in asked:
            candidate = search.asked(candidate, found.asked or search.promise)  # as surely as what was chosen
            row["outcome"] = f"asked before: {'holds' if candidate.holds else 'fails'}"
        else:
            row["outcome"] = _outcome(search, candidate, found)
        if candidate.test is not None:
            row |= {"loss": candidate.test.mean(), "loss at most": candidate.most}
        rows.append(row)
    rows.sort(key=lambda row: -row["bytes"])
    return Table.of(f"{search.task.name}: sizes to choose from", columns, rows)


def _outcome(search: Search, candidate: Candidate, found: Candidate) -> str:
    if candidate.test is not None:
        return "chosen" if candidate.name == found.name else "holds" if candidate.holds else "fails"
    if candidate.bytes > found.bytes:
        return "not asked: larger than the chosen one"
    if candidate.valid is not None and not search.hopeful(candidate.valid):
        return "not asked: likelier to fail, by validation data"
    return "not asked: after one that failed, or not in the order"


def kind(target: Path | None) -> str:
    """The suffix of a file that is written, or would be."""
    return ".safetensors" if target is None else target.suffix


def file_bytes(search: Search, candidate: Candidate, suffix: str) -> int:
    """The bytes of the file of a candidate, which is written once to know them."""
    known = (candidate.name, suffix)
    if known not in search.files:
        with tempfile.TemporaryDirectory() as folder:
            search.files[known] = formats.write(as_written(search, candidate), Path(folder) / f"small{suffix}")
    return search.files[known]


def as_written(search: Search, candidate: Candidate) -> Weights:
    """The weights of a candidate with what a file says of them."""
    return candidate.weights.with_meta(task=search.task.name)
