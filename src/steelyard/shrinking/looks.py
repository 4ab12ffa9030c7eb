"""How often the proof examples have been asked, by this search or by others that share its journal.

Decides what is a look of its own: whoever asks the same once more, as after an interrupt, sees nothing new.
"""

from __future__ import annotations

import json
from typing import Any

from steelyard.shrinking.journal import Journal

_LOOK, _ANSWER = "look: ", "answer: "
Asked = dict[str, Any]  # what a promise was asked for: the settings of a search, or of a choice


def number(journal: Journal, asked: Asked) -> int:
    """Which look this is, or would be: the first is 1.

    >>> journal = Journal(None, {})
    >>> taken(journal, {"tolerance": 0.02})
    >>> number(journal, {"tolerance": 0.02}), number(journal, {"tolerance": 0.03})
    (1, 2)
    """
    known = journal.known(_LOOK)
    return int(known.get(_question(asked), {"look": following(journal)})["look"])


def following(journal: Journal) -> int:
    """Which look another question would be."""
    return len(journal.known(_LOOK)) + 1


def taken(journal: Journal, asked: Asked) -> None:
    """Write down that the proof examples are asked."""
    found = number(journal, asked)
    journal.of(_question(asked), lambda: {**asked, "look": found})


def answer(journal: Journal, asked: Asked, candidate: str, share: float) -> None:
    """Write down what the proof accepted, and the share of the error that it was asked at."""
    found = {**asked, "look": number(journal, asked), "candidate": candidate, "share": share}
    journal.of(_ANSWER + _question(asked), lambda: found)


def answers(journal: Journal, tolerance: float, confidence: float) -> list[Asked]:
    """What the proof accepted of files of any size, for this promise."""
    return [
        found
        for found in journal.known(_ANSWER).values()
        if (found["tolerance"], found["confidence"], found.get("bytes")) == (tolerance, confidence, None)
        and found["aim"] in ("file", "chosen")
    ]


def searches(journal: Journal) -> list[Asked]:
    """What searches for the smallest file have asked, the first one first."""
    return [asked for asked in journal.known(_LOOK).values() if asked.get("aim") == "file"]


def _question(asked: Asked) -> str:
    return _LOOK + json.dumps(asked, sort_keys=True)
