"""``steelyard convert SOURCE TARGET``: the same weights in another format, dtype, other pieces, names or codecs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from steelyard.cli.options import Output, codec_option, output, show, source_and_target, where_option
from steelyard.cli.progress import watching
from steelyard.core.transform import Step, chain
from steelyard.core.where import Where
from steelyard.errors import quoted

if TYPE_CHECKING:
    from steelyard.formats.sharded import Sharded

_SIZES = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_SIZES |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)}


@click.command("convert")
@source_and_target
@click.option("--dtype", help="Cast floating-point tensors, such as bf16; whole numbers to whole numbers.")
@click.option(
    "--overflow",
    type=click.Choice(["error", "saturate", "allow"]),
    default="error",
    show_default=True,
    help="For a number that the dtype cannot hold.",
)
@click.option(
    "--rename", "renames", metavar="PATTERN=NEW", multiple=True, help="Rename by glob; '*' stays '*'. Repeatable."
)
@click.option(
    "--split",
    "splits",
    metavar="PATTERN=NEW[:SHARE],...",
    multiple=True,
    help="Cut tensors along axis 0 (PATTERN@1: axis 1) into equal parts, or in proportion to shares. Repeatable.",
)
@click.option(
    "--join",
    "joins",
    metavar="PATTERN,...=NEW",
    multiple=True,
    help="The inverse of --split (NEW@1: axis 1). Repeatable.",
)
@click.option(
    "--stack",
    "stacks",
    metavar="PATTERN=NEW",
    multiple=True,
    help="Put tensors numbered by '#' in PATTERN along a new axis 0. Repeatable.",
)
@click.option(
    "--unstack",
    "unstacks",
    metavar="PATTERN=NEW",
    multiple=True,
    help="The inverse of --stack: '#' in NEW. Repeatable.",
)
@click.option(
    "--shard-size",
    metavar="SIZE",
    callback=lambda _ctx, option, text: None if text is None else _size(text, option),
    help="Write an index and files of at most SIZE, such as 5GB or 500MiB; TARGET is the index or a folder.",
)
@click.option("--untie", is_flag=True, help="Write each further name of a tensor as a tensor of its own.")
@click.option("--verify", is_flag=True, help="Read TARGET back before it gets its name, and compare it bit for bit.")
@codec_option(None, "How to hold the tensors, such as entropy, or plain to decode.")
@where_option
@output
def verb(
    source: str,
    target: str,
    force: bool,
    dtype: str | None,
    overflow: str,
    renames: tuple[str, ...],
    splits: tuple[str, ...],
    joins: tuple[str, ...],
    stacks: tuple[str, ...],
    unstacks: tuple[str, ...],
    shard_size: int | None,
    untie: bool,
    verify: bool,
    codec: Step | None,
    where: Where | None,
    output: Output,
) -> None:
    """Write the weights of SOURCE to TARGET; the suffix of TARGET says the format.

    TARGET appears under its name when it is complete, and with --verify only if what is read back is what was to
    be written: each tensor as the source and the options give it. What is done of a job that is broken off stays
    beside TARGET, for safetensors in one file or many and for GGUF, and the same command goes on from there.

    A tensor with several names is written once, and the further names are kept as metadata, which other readers
    do not know; with --untie, each is written as a tensor of its own.

    Steps follow in this order: --untie, --dtype, --split, --unstack, --join, --stack, --rename, --codec; patterns
    speak of the names that the steps before have left. With --where, only the tensors that match take part in them.

    \b
    Example:
      steelyard convert model.safetensors half.safetensors --dtype bf16 --rename "model.*=*"
      steelyard convert model.safetensors . --shard-size 5GB --split "*.a.weight=*.q.weight,*.k.weight"
    """
    from steelyard.edit.cast import Cast
    from steelyard.edit.rename import Rename
    from steelyard.edit.split import Join
    from steelyard.edit.stack import Stack, Unstack
    from steelyard.edit.untie import Untie
    from steelyard.explain.rewrite import rewrite

    steps: list[Step] = [Untie()] if untie else []
    steps += [] if dtype is None else [Cast(dtype, overflow)]  # type: ignore[arg-type]
    steps += [_split(text) for text in splits]
    steps += [Unstack(*_pair(text, "--unstack")) for text in unstacks]
    for text in joins:
        parts, new = _pair(text, "--join")
        new, axis = _axis(new)
        steps.append(Join(tuple(parts.split(",")), new, axis))
    steps += [Stack(*_pair(text, "--stack")) for text in stacks]
    steps += [Rename(*_pair(text, "--rename")) for text in renames]
    if codec is not None:
        steps.append(codec)
    format, path = _sharded(target, shard_size)
    with watching() as watch:
        tables = rewrite(
            source,
            path,
            chain(*steps),
            where,
            force,
            format=format,
            verified=verify,
            resumed=True,
            values=False,
            watch=watch,
        )
    show(tables, output)
    _tell_missing(path)


def _tell_missing(path: Path) -> None:
    """Say on standard error what was left out, and which names other readers will miss: those in the metadata alone."""
    from steelyard import formats
    from steelyard.explain.wanted import skipped

    written = formats.open(path)
    if left := skipped(written):
        what = "1 tensor of the checkpoint was" if len(left) == 1 else f"{len(left)} tensors of the checkpoint were"
        listed = ", ".join(map(quoted, left[:3])) + (", ..." if len(left) > 3 else "")
        click.echo(f"{what} left out ({listed}); steelyard inspect lists all", err=True)
    count = len(written.ties)
    if count:
        what = "1 tie is" if count == 1 else f"{count} ties are"
        click.echo(f"{what} kept as metadata; other readers see one name: --untie writes each", err=True)


def _pair(text: str, option: str) -> tuple[str, str]:
    pattern, sign, new = text.partition("=")
    if not sign or not pattern:
        _wrong(f"expected PATTERN=NEW, got {text!r}", option)
    return pattern, new


def _split(text: str) -> Step:
    from steelyard.edit.split import Split

    pattern, new = _pair(text, "--split")
    pattern, axis = _axis(pattern)
    names, shares = [], []
    for part in new.split(","):
        name, sign, share = part.rpartition(":")
        known = bool(sign) and share.isascii() and share.isdigit()
        names.append(name if known else part)
        shares += [int(share)] if known else []
    if shares and len(shares) != len(names):
        _wrong(f"expected a share for each of the {len(names)} parts or for none, got {text!r}", "--split")
    return Split(pattern, tuple(names), tuple(shares) or None, axis)


def _axis(text: str) -> tuple[str, int]:
    """The text before '@', and the axis after it; 0 where there is none."""
    name, sign, axis = text.rpartition("@")
    known = bool(sign) and axis.removeprefix("-").isdigit() and axis.isascii()
    return (name, int(axis)) if known else (text, 0)


def _size(text: str, option: click.Parameter) -> int:
    """A number of bytes."""
    number = text.strip().rstrip("bBkKmMgGtTiI ")
    unit = text.strip()[len(number) :].strip().upper()
    try:
        size = round(float(number) * _SIZES[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise click.BadParameter(
            f"expected a size such as 5GB, 500MiB or 1000000, got {text!r}", click.get_current_context(), option
        )
    return size


def _sharded(target: str, shard_size: int | None) -> tuple[Sharded | None, Path]:
    """How to write what was asked for, and where: in a folder, the index has its usual name."""
    path = Path(target)
    if shard_size is None:
        return None, path
    from steelyard.formats.sharded import Sharded

    if path.is_dir() or target.endswith("/"):
        path /= "model.safetensors.index.json"
    if not path.name.lower().endswith(Sharded.suffixes):
        if not path.suffix and not path.exists():
            _wrong(
                f"the folder {quoted(target)} is not there; create it first, or name an index that ends in "
                f"{Sharded.suffixes[0]}",
                "--shard-size",
            )
        _wrong(
            f"writes an index: expected a folder or a name ending in {Sharded.suffixes[0]}, got {target!r}",
            "--shard-size",
        )
    return Sharded(shard_size), path


def _wrong(text: str, option: str) -> NoReturn:
    raise click.BadParameter(text, click.get_current_context(), param_hint=option)
