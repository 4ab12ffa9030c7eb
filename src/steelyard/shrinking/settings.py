"""How hard to press, and how long to heal: what a recipe can say. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from steelyard.errors import RecipeError

Aim = Literal["file", "latency", "memory"]  # what is to be least
TOLERANCE = 0.005  # how much worse the headline metric may be, in its own unit, where nobody says


@dataclass(frozen=True)
class Settings:
    """Prune in stages, share, code; train in between.

    Raises RecipeError for a sparsity outside 0 to 1, and for anything else that must be more than 0 and is not.
    """

    tolerance: float = TOLERANCE  # how much worse the headline metric may be, in its own unit
    sparsity: float = 0.93  # of all weights in matrices and filters
    prune_stages: int = 4
    prune_epochs: int = 12  # after each stage
    k: int = 16  # distinct values for each tensor, zero aside
    share_epochs: int = 10
    rate: float = 3e-3

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise RecipeError(f"expected 0 <= sparsity < 1, got {self.sparsity:g}")
        for name in ("tolerance", "prune_stages", "k", "rate"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"expected {name} to be more than 0, got {getattr(self, name):g}")
        for name in ("prune_epochs", "share_epochs"):
            if getattr(self, name) < 0:
                raise RecipeError(f"expected {name} to be 0 or more, got {getattr(self, name)}")
