"""How many evaluations a search may make, and what they are spent on.

An evaluation is one pass over all examples of one split: of the original, of a candidate, or of the finished file.
Three are spent in any case: the original's on the validation and on the test split, and the finished file's on the
latter.
"""

from __future__ import annotations

from dataclasses import dataclass

from steelyard.errors import ModelError
from steelyard.learn.options import check_kind

ANYHOW = 3  # the original's two, and the file's
MOST_LOOKS = 5  # at sizes: halving leaves one or two undecided
PRICES = 6  # of a bit, at most


@dataclass(frozen=True)
class Budget:
    """At most so many evaluations; what the proof may ask is what the others have left over.

    >>> Budget.of(12, training=False)
    Budget(evaluations=12, looks=4, prices=0)
    """

    evaluations: int
    looks: int  # at sizes, on validation data
    prices: int  # of a bit, at which is trained: an evaluation of each

    @property
    def proofs(self) -> int:
        """Candidates that the proof may be asked about, if all others are spent."""
        return self.evaluations - ANYHOW - self.looks - self.prices

    @staticmethod
    def of(evaluations: int, *, training: bool) -> Budget:
        """Four ninths of what is free for looks, the rest for the proof; with training, three elevenths for looks, and
        four ninths for prices (bench/proof_order).

        Raises ModelError for fewer than a search cannot do without.
        """
        check_kind("evaluations", evaluations, int, "a whole number")
        least = ANYHOW + (4 if training else 3)  # two looks (the second at the largest size), a price, a proof
        if evaluations < least:
            raise ModelError(
                f"evaluations={evaluations}: expected at least {least}, of which {ANYHOW} are those of the original "
                f"and of the finished file{', and one that of training' if training else ''}"
            )
        free = evaluations - ANYHOW
        if not training:
            return Budget(evaluations, min(max(1, free * 4 // 9), MOST_LOOKS), 0)
        looks = min(max(1, free * 3 // 11), MOST_LOOKS)
        return Budget(evaluations, looks, min(max(1, free * 4 // 9), PRICES))


USUAL = Budget.of(12, training=False)
