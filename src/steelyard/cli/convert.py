"""``steelyard convert SOURCE TARGET``: the same weights in another format, dtype, under other names or codecs."""

from __future__ import annotations

import click

from steelyard.cli.options import Output, codec_option, output, show, source_and_target, where_option
from steelyard.cli.progress import watching
from steelyard.core.transform import Step, chain
from steelyard.core.where import Where


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
    verify: bool,
    codec: Step | None,
    where: Where | None,
    output: Output,
) -> None:
    """Write the weights of SOURCE to TARGET; the suffix of TARGET says the format.

    TARGET appears under its name when it is complete, and with --verify only if what is read back is what was to
    be written: each tensor as the source and the options give it.

    With --where, only the tensors that match are cast, renamed or encoded; the others are copied.

    \b
    Example:
      steelyard convert model.safetensors half.safetensors --dtype bf16 --rename "model.*=*"
    """
    from steelyard.edit.cast import Cast
    from steelyard.edit.rename import Rename
    from steelyard.explain.rewrite import rewrite

    steps: list[Step] = [Rename(*_pair(text)) for text in renames]
    if dtype is not None:
        steps.insert(0, Cast(dtype, overflow))  # type: ignore[arg-type]
    if codec is not None:
        steps.append(codec)
    with watching() as watch:
        tables = rewrite(source, target, chain(*steps), where, force, verified=verify, values=False, watch=watch)
    show(tables, output)


def _pair(text: str) -> tuple[str, str]:
    pattern, sign, new = text.partition("=")
    if not sign or not pattern:
        raise click.BadParameter(
            f"expected PATTERN=NEW, got {text!r}", click.get_current_context(), param_hint="--rename"
        )
    return pattern, new
