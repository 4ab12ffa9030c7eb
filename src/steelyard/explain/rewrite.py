"""A file through a step into another one, with an account of what it cost.

Decides when values are read again to say how they changed: where they may have.
"""

from __future__ import annotations

from pathlib import Path

from steelyard.core.table import Table
from steelyard.core.transform import Transform
from steelyard.core.where import Where
from steelyard.edit.transfer import Watch, transfer, unwatched
from steelyard.explain.account import account, exact
from steelyard.formats.base import Writable


def rewrite(
    source: str | Path,
    target: str | Path,
    step: Transform,
    where: Where | None = None,
    force: bool = False,
    *,
    format: str | Writable | None = None,
    verified: bool = False,
    resumed: bool = False,
    values: bool = True,
    watch: Watch = unwatched,
) -> list[Table]:
    """`transfer` the weights, and return the `account` of them.

    With ``values`` off, zeros and errors are told only where a dtype or a codec may have changed a value: what
    dtypes and codecs leave alone must then be left alone by `step`, too.
    """
    done = transfer(
        source, target, step, where, force=force, format=format, verified=verified, resumed=resumed, watch=watch
    )
    read = values or (len(done.before) == len(done.after) and not exact(done.before, done.after))
    tell = watch("comparing", done.before.nbytes + done.after.nbytes) if read else None
    return account(done.before, done.after, done.files, values=read, verified=done.verified, tell=tell)
