"""Names by pattern: what a glob matches, and how the text that its wildcards stand for gets into a new name."""

from __future__ import annotations

import re


def rule(pattern: str) -> re.Pattern[str]:
    """A regular expression for whole names: ``*`` any text, ``?`` one character, ``#`` a number (group "number").

    >>> rule("*.experts.#.w").match("m.experts.12.w").groupdict()
    {'number': '12'}
    """
    kinds = {"*": "(.*)", "?": "(.)", "#": "(?P<number>[0-9]{1,9})"}
    return re.compile(rf"\A{''.join(kinds.get(c, re.escape(c)) for c in pattern)}\Z", re.DOTALL)


def fill(template: str, texts: list[str]) -> str:
    """`template` with each ``*`` replaced by the text at the same position.

    >>> fill("*.q.*", ["layers.0", "weight"])
    'layers.0.q.weight'
    """
    pieces = template.split("*")
    return "".join(text for pair in zip(pieces, [*texts, ""], strict=False) for text in pair)
