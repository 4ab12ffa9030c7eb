"""The group of verbs, and the boundary where every error becomes one line and an exit status.

0 done; 1 the answer is no; 2 wrong use or bad input; 70 a defect of ours; 130 interrupted; 141 the reader of
a pipe has gone. Never a traceback, unless STEELYARD_TRACEBACK is set. Knows nothing of any verb.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

import click

from steelyard.cli import VERBS
from steelyard.errors import SteelyardError, missing_extra, printable

WHOLE = "interrupted; no file was left half-written"  # what every verb may say that has no more to say
_REMEDIES = {
    errno.ENOENT: "check the spelling of the path",
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "choose another name",
    errno.ENOSPC: "free some space, or choose another disk",
}


class VerbGroup(click.Group):
    """The verbs as click wants them: listed from the table, imported when called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:  # noqa: ARG002
        return VERBS[cmd_name]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Verbs"):
            formatter.write_dl([(name, row.about) for name, row in VERBS.rows.items()])


def _print_version(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        from steelyard import __version__

        click.echo(f"steelyard {__version__}")
        ctx.exit()


@click.group(
    "steelyard",
    cls=VerbGroup,
    invoke_without_command=True,
    subcommand_metavar="VERB [ARGUMENTS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every verb explains itself: steelyard VERB --help.",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version and exit.",
)
@click.pass_context
def steelyard(ctx: click.Context) -> None:
    """Weigh, train, explain, shrink, move and ship the weights of neural networks."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; every error is one line on standard error."""
    if "_STEELYARD_COMPLETE" in os.environ:  # a shell asks for completions
        steelyard.main(prog_name="steelyard")
    words = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    came: list[int] = []
    try:
        with _noting_interrupts(came), steelyard.make_context("steelyard", words) as ctx:
            steelyard.invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except BaseException as error:
        if os.environ.get("STEELYARD_TRACEBACK") or isinstance(error, (SystemExit, GeneratorExit)):
            raise
        status, line = (130, WHOLE) if came and explain(error)[0] == 70 else explain(error)
        if status == 130 and arguments is None:  # the process ends; a further Ctrl-C would only spill a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if status == 141:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit flushes into the pipe again
        if line:
            line = "; ".join([line, *map(_one_line, getattr(error, "__notes__", ()))])
            click.echo(f"steelyard: {line}", err=True)
        return status
    return 0


@contextmanager
def _noting_interrupts(came: list[int]) -> Iterator[None]:
    """Within the block, note each Ctrl-C: where it meets an import, that may swallow it and fail in some other way."""

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or current_thread() is not main_thread():
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _open_closed_streams() -> None:
    """Send to nowhere what would go to a stream that the shell has closed (``>&-``): no one wants to read it."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it is open until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def explain(error: BaseException) -> tuple[int, str]:
    """The exit status and the line for an error.

    >>> explain(SteelyardError("two\\nlines"))
    (2, 'two lines')
    """
    if isinstance(error, SteelyardError):
        return error.status, _one_line(str(error))
    if isinstance(error, click.ClickException):
        return 2, _one_line(_usage(error))
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        noted = getattr(error, "__notes__", ())  # which follow the line, and say what is kept
        return 130, _one_line(_told(error)) or ("interrupted" if noted else WHOLE)
    if isinstance(error, BrokenPipeError):
        return 141, ""
    if isinstance(error, OSError):
        return 2, _one_line(_system(error))
    if isinstance(error, ModuleNotFoundError) and (missing := missing_extra(error, "this verb")) is not None:
        return missing.status, _one_line(str(missing))
    if isinstance(error, MemoryError):
        return 2, "there is not enough memory for this; choose fewer tensors with --where"
    what = _one_line(f"{type(error).__name__}: {error}")
    return 70, f"a defect in steelyard: {what}; please report it with the output of STEELYARD_TRACEBACK=1"


def _told(error: BaseException | None) -> str:
    """What an interrupt says, or one that it came on top of: whoever presses Ctrl-C again is to be told as well."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt) and str(error):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


def _usage(error: click.ClickException) -> str:
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "steelyard"
    message = error.format_message().rstrip(".")
    return f"{message}; see '{path} --help'"


def _system(error: OSError) -> str:
    reason = (error.strerror or type(error).__name__).lower()
    remedy = _REMEDIES.get(error.errno or 0)
    path = error.filename2 or error.filename
    where = f"{os.fsdecode(path)}: " if isinstance(path, (str, bytes)) else ""
    return f"{where}{reason}" + (f"; {remedy}" if remedy else "")


def _one_line(message: str) -> str:
    return printable(" ".join(message.split()))
