"""What all tests share: golden texts, one file for each test, written anew with ``pytest --regenerate``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write the golden texts anew instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with the file that is named after the test."""

    def compare(text: str) -> None:
        name = request.node.name.replace("[", "-").replace("]", "").replace("/", "_")
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--regenerate"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"there is no {path.name}; run pytest --regenerate and read what it wrote"
        assert text == path.read_text(encoding="utf-8")

    return compare
