"""Compiled loops over arrays: arrays in, arrays out, nothing else.

Decides how a loop is compiled and where the machine code is kept. Knows nothing of codecs, tensors or files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from platformdirs import user_cache_dir


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` at its first call, without the GIL, and keep the machine code for the next process.

    The code is kept in the user's cache folder, or in NUMBA_CACHE_DIR where that is set; where neither can
    be written, each process compiles for itself.

    >>> @kernel
    ... def total(values):
    ...     result = 0.0
    ...     for v in values:
    ...         result += v
    ...     return result
    >>> import numpy as np
    >>> total(np.ones(3))
    3.0
    """
    import numba

    before = numba.config.CACHE_DIR
    if not os.environ.get("NUMBA_CACHE_DIR"):
        # numba asks for the folder when it decorates; other users of numba in this process keep theirs
        numba.config.CACHE_DIR = user_cache_dir("steelyard", appauthor=False)
    try:
        compiled: Callable[..., Any] = numba.njit(nogil=True, cache=True)(function)
    except (RuntimeError, OSError):  # no folder that can be written, or a function without a file
        compiled = numba.njit(nogil=True)(function)
    finally:
        numba.config.CACHE_DIR = before
    return compiled
