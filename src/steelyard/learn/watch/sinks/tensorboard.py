"""TensorBoard: scalars and texts in event files. Needs the package ``tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping

from steelyard.learn.watch.sinks import Sink


class TensorBoard(Sink):
    """Event files in a folder; scalars by name, faults as texts."""

    def __init__(self, folder: str = "runs"):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """A scalar for each number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def fault(self, step: int, text: str) -> None:
        """A text, written at once."""
        self._writer.add_text("faults", text, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what waits."""
        self._writer.close()
