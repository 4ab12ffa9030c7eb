"""Write docs/cli.md from the help of every verb; with --check, only say whether it is up to date.

python docs/generate.py [--check]
"""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path

import click

import steelyard
from steelyard.cli import VERBS

PAGE = Path(__file__).parent / "cli.md"
HEAD = """# The command line

Generated from the help of each verb by `make docs`; do not edit.

"""


def page() -> str:
    """The text of docs/cli.md."""
    parts = [HEAD]
    for name in VERBS:
        context = click.Context(
            VERBS[name], info_name=f"steelyard {name}", terminal_width=100, max_content_width=100,
            help_option_names=["-h", "--help"],
        )  # fmt: skip
        about = VERBS.rows[name].about
        parts.append(f"## {name}\n\n{about[0].upper()}{about[1:]}.\n\n```\n{VERBS[name].get_help(context)}\n```\n\n")
    return "".join(parts).rstrip() + "\n"


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        return int(not PAGE.exists() or PAGE.read_text() != page())
    PAGE.write_text(page())
    reference()
    return 0


def reference() -> None:
    """Every module by pdoc. The façade's names are imported first: pdoc sees only what is there."""
    import pdoc

    for name in steelyard.__all__:
        setattr(steelyard, name, getattr(steelyard, name))
    found = [m.name for m in pkgutil.walk_packages(steelyard.__path__, "steelyard.") if "__main__" not in m.name]
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("steelyard", *found, output_directory=PAGE.parent / "api")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
