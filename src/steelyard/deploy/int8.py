"""An ONNX file with whole numbers of eight bits, in the forms for which ONNX Runtime has kernels.

Decides which operations become integer and how their scales are found. Whether that is faster, and what it costs, is
measured by whoever asks. Needs the extra ``deploy``.

Source: weights and activations as B. Jacob et al., Quantization and training of neural networks for efficient
integer-arithmetic-only inference, CVPR 2018; the rounding itself is ONNX Runtime's.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.deploy.onnx import require
from steelyard.errors import UnknownNameError
from steelyard.learn.calling import calling

Arguments = Sequence[np.ndarray]  # of one call; the first axis of each counts the examples

_MATRICES = ("Conv", "Gemm", "MatMul")
# Convolutions of integers that are scaled as they come have no fast kernel: they stay as they are in the first form.
FORMS: Mapping[str, str] = {
    "int8 on the way": "weights by row; what goes into a matrix is scaled batch by batch, as it comes",
    "int8": "weights by channel; what goes in and out of every operation is scaled as it was in training batches",
    "int8 matrices": "the same of matrices and convolutions alone",
}


def quantized(source: str | Path, target: str | Path, form: str, batches: Iterable[Arguments]) -> None:
    """Write the ONNX file `source` to `target` in a form of FORMS.

    batches: what the model is called with; the ranges of activations are those of these calls (all forms but the
    first ask for them). Activations are unsigned and weights signed, for which there are kernels on every x86.
    Raises UnknownNameError for another form, ModelError if ONNX Runtime cannot make it.
    """
    if form not in FORMS:
        raise UnknownNameError("form", form, FORMS)
    require()
    with calling(f"ONNX Runtime, asked for {form!r},"), _quiet(), tempfile.TemporaryDirectory() as folder:
        from onnxruntime import quantization as ort
        from onnxruntime.quantization.shape_inference import quant_pre_process

        ready = Path(folder) / "ready.onnx"
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        signed, unsigned = ort.QuantType.QInt8, ort.QuantType.QUInt8
        if form == "int8 on the way":
            ort.quantize_dynamic(
                _unshaped(ready), target, op_types_to_quantize=["MatMul", "LSTM"], per_channel=True, weight_type=signed
            )
            return
        ort.quantize_static(
            ready, target, _Reader(ready, batches), per_channel=True, activation_type=unsigned, weight_type=signed,
            op_types_to_quantize=list(_MATRICES) if form == "int8 matrices" else None,
        )  # fmt: skip


def _unshaped(file: Path) -> Any:
    """The model without what it says of shapes on the way: it stays as it is where a Gemm becomes a MatMul."""
    import onnx

    model = onnx.load(str(file))
    del model.graph.value_info[:]
    return model


class _Reader:
    """Batches as ONNX Runtime asks for them: one dict of inputs after the other, then None."""

    def __init__(self, file: Path, batches: Iterable[Arguments]):
        from onnxruntime import InferenceSession

        asked = InferenceSession(str(file), providers=["CPUExecutionProvider"]).get_inputs()
        self._names, self._batches = [spec.name for spec in asked], iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else dict(zip(self._names, batch, strict=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Its advice on how to prepare a file goes to the root logger."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
