"""A trained module as an ONNX file, checked in ONNX Runtime before it gets its name.

Decides how to export and what counts as agreement; knows nothing of tasks. Needs the extra ``deploy``.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from steelyard.core.table import Table
from steelyard.errors import MissingExtraError, ModelError, VerdictError
from steelyard.formats.base import replacing
from steelyard.learn.evaluate import evaluating

_AXIS = "batch"  # the name of the axis that stays free in the file


def export_onnx(model: nn.Module, inputs: Sequence[Tensor], path: str | Path, *, tolerance: float = 1e-4) -> Table:
    """Write `model` as ONNX and measure that ONNX Runtime computes the same.

    ``inputs`` are example arguments whose first axis is the batch: (examples, ...). The exported file takes any
    batch size; it is run on all of `inputs` and on the first example alone. Returns one row: bytes of the file,
    the largest absolute difference of any output, the share of examples with the same largest output.

    Raises ModelError if the model cannot be exported with a free batch axis, VerdictError if an output differs by
    more than ``tolerance * max(1, largest |output|)``; in both cases no file is written under `path`.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder, evaluating(model):
        temporary = Path(folder) / "model.onnx"
        write_onnx(model, inputs, temporary)
        difference, scale, agreement = _compare(model, inputs, str(temporary))
        if not difference <= tolerance * max(1.0, scale):
            raise VerdictError(
                f"{path}: ONNX Runtime differs from PyTorch by {difference:.2g}, allowed {tolerance:g} of "
                f"{max(1.0, scale):.3g}; no file was written"
            )
        with replacing(path) as file, temporary.open("rb") as finished:
            shutil.copyfileobj(finished, file)
    row = {"file": path.name, "bytes": path.stat().st_size, "largest difference": difference}
    row |= {"same decision": agreement, "examples": len(inputs[0])}
    units = {"file": "", "bytes": "B", "largest difference": "", "same decision": "%", "examples": ""}
    return Table.of("ONNX", units, [row])


def write_onnx(model: nn.Module, inputs: Sequence[Tensor], path: str | Path) -> None:
    """Write `model`, in the mode it is in, as ONNX with a free batch axis; nothing is compared.

    Raises ModelError if it cannot be exported so.
    """
    require()
    names = ["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
    free = tuple({0: torch.export.Dim(_AXIS)} for _ in inputs)
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                model, tuple(inputs), str(path), dynamo=True, input_names=names, output_names=["output"],
                dynamic_shapes=free, external_data=False, verbose=False,
            )  # fmt: skip
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{type(model).__name__} cannot be exported to ONNX with a free batch axis: {first}"
        ) from error


def require() -> None:
    """Raise MissingExtraError if a package that the export needs is not installed; imports none of them."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("the export to ONNX", package, "deploy")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress to the log and warns of packages that it does not need."""
    loggers = [logging.getLogger("torch.onnx"), logging.getLogger("onnxscript"), logging.getLogger("torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _compare(model: nn.Module, inputs: Sequence[Tensor], path: str) -> tuple[float, float, float]:
    """The largest difference, the largest |output|, and the share of equal decisions, over two batch sizes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for spec in session.get_inputs():
        if isinstance(spec.shape[0], int):
            raise ModelError(f"the exporter fixed the batch axis of {spec.name!r} to {spec.shape[0]}")
    differences, scale, agreement = [], 0.0, 1.0
    for count in (len(inputs[0]), 1):
        batch = [x[:count] for x in inputs]
        with torch.no_grad():
            expected = model(*batch).numpy()
        found = session.run(None, {s.name: x.numpy() for s, x in zip(session.get_inputs(), batch, strict=True)})[0]
        differences.append(float(np.abs(found - expected).max()))
        scale = max(scale, float(np.abs(expected).max()))
        agreement = min(agreement, float((found.argmax(-1) == expected.argmax(-1)).mean()))
    return max(differences), scale, agreement
