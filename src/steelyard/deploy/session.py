"""An ONNX file as a module: what ONNX Runtime computes, so that whatever measures a model measures the file.

Decides that a session runs on one thread, as the figures of a comparison have to. Needs the extra ``deploy``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steelyard.deploy.apart import session
from steelyard.deploy.onnx import require
from steelyard.learn.calling import calling


class OnnxModule(nn.Module):  # type: ignore[misc]  # torch is not followed
    """What the first output of an ONNX file is for the inputs of a batch, in their order; without parameters.

    Raises MissingExtraError without ONNX Runtime, ModelError for a file that it cannot run.

    ::

        sy.evaluate(sy.OnnxModule("small.onnx"), task)
    """

    def __init__(self, file: str | Path):
        super().__init__()
        require()
        with calling(f"ONNX Runtime, loading {Path(file).name},"):
            self._session: Any = session(file)
        self._names = [spec.name for spec in self._session.get_inputs()]

    def forward(self, *inputs: Tensor) -> Tensor:
        """(examples, ...) each -> (examples, ...)."""
        asked = {name: x.numpy() for name, x in zip(self._names, inputs, strict=True)}
        return torch.from_numpy(self._session.run(None, asked)[0])
