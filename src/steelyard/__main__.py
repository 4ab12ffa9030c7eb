"""``python -m steelyard`` is the console script ``steelyard``."""

from __future__ import annotations

import sys

from steelyard.cli import main

if __name__ == "__main__":
    sys.exit(main())
