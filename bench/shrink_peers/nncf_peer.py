"""NNCF on one net, in its own environment: ``nncf_peer.py FOLDER TOLERANCE``, of a folder that run.py has prepared.

Writes nncf.json, a row for each way that there is, and nncf.npz, which examples come out right. Bytes are those of the
files as they are saved, and of the weights alone (.bin of OpenVINO, initializers of ONNX), after zstd -19 where that
is less.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import onnx
import onnxruntime
import openvino
import zstandard
from onnx import numpy_helper

SPLITS = ("valid", "test", "truth")
Answer = Callable[[np.ndarray], np.ndarray]  # inputs to logits
Row = dict[str, Any]


def main(place: Path, tolerance: float) -> None:
    """All ways, each with what it failed with if it did."""
    nncf.set_log_level(logging.ERROR)
    data = dict(np.load(place / "data.npz"))
    rows: list[Row] = []
    right: dict[str, np.ndarray] = {}
    for method, way in WAYS.items():
        began = time.process_time()
        try:
            row, answer = way(place, data, tolerance)
        except Exception as error:  # noqa: BLE001 - whatever a rival fails with is its result
            row = {
                "failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
            }
        else:
            right |= {f"{method} {split}": correct(answer, data, split) for split in SPLITS}
        rows.append({"method": method, **row, "seconds": time.process_time() - began})
    (place / "nncf.json").write_text(json.dumps(rows, indent=1))
    np.savez(place / "nncf.npz", **right)  # type: ignore[arg-type]


def correct(answer: Answer, data: dict[str, np.ndarray], split: str) -> np.ndarray:
    """Whether each example of a split comes out right."""
    return answer(data[f"{split} x"]).argmax(-1) == data[f"{split} y"]


def calibration(data: dict[str, np.ndarray], feed: Callable[[np.ndarray], Any]) -> nncf.Dataset:
    """All training examples, one by one."""
    return nncf.Dataset([feed(x[None]) for x in data["train x"]])


def pairs(data: dict[str, np.ndarray]) -> nncf.Dataset:
    """Validation examples with their labels; what is fed is the input."""
    return nncf.Dataset([(x[None], int(y)) for x, y in zip(data["valid x"], data["valid y"], strict=True)])


def scored(answer: Answer, items: Iterable[tuple[np.ndarray, int]]) -> tuple[float, list[float]]:
    """Accuracy, and each example's."""
    found = [float(answer(x)[0].argmax() == y) for x, y in items]
    return sum(found) / len(found), found


def openvino_controlled(place: Path, data: dict[str, np.ndarray], tolerance: float) -> tuple[Row, Answer]:
    """Int8 by accuracy control, OpenVINO."""
    model = openvino.convert_model(place / "model.onnx")

    def validate(compiled: openvino.CompiledModel, items: Iterable[Any]) -> tuple[float, list[float]]:
        return scored(lambda x: compiled(x)[0], items)

    done = nncf.quantize_with_accuracy_control(
        model, calibration(data, lambda x: x), pairs(data), validate,
        max_drop=tolerance, drop_type=nncf.DropType.ABSOLUTE, subset_size=len(data["train x"]),
    )  # fmt: skip
    return saved(done, place / "nncf-openvino")


def openvino_weights(mode: nncf.CompressWeightsMode) -> Callable[..., tuple[Row, Answer]]:
    """Weights alone, in a mode; no accuracy control."""

    def way(place: Path, *_unused: Any) -> tuple[Row, Answer]:
        model = openvino.convert_model(place / "model.onnx")
        options = {} if mode == nncf.CompressWeightsMode.INT8_ASYM else {"group_size": -1, "all_layers": True}
        return saved(nncf.compress_weights(model, mode=mode, **options), place / f"nncf-{mode.value}")

    return way


def saved(model: openvino.Model, stem: Path) -> tuple[Row, Answer]:
    """Bytes of both files of OpenVINO, and what the read file answers."""
    graph, weights = stem.with_suffix(".xml"), stem.with_suffix(".bin")
    openvino.save_model(model, graph)
    compiled = openvino.compile_model(graph, "CPU")
    row = {"saved": graph.stat().st_size + weights.stat().st_size, "weights": squeezed(weights.read_bytes())}
    return row, lambda x: compiled(x)[0]


def onnx_controlled(place: Path, data: dict[str, np.ndarray], tolerance: float) -> tuple[Row, Answer]:
    """Int8 by accuracy control, ONNX."""
    model = onnx.load(place / "model.onnx")
    name = model.graph.input[0].name

    def validate(model: onnx.ModelProto, items: Iterable[Any]) -> tuple[float, list[float]]:
        return scored(running(model.SerializeToString(), name), items)

    done = nncf.quantize_with_accuracy_control(
        model, calibration(data, lambda x: {name: x}), pairs(data),
        validate, max_drop=tolerance, drop_type=nncf.DropType.ABSOLUTE, subset_size=len(data["train x"]),
    )  # fmt: skip
    file = place / "nncf.onnx"
    onnx.save(done, file)
    raw = b"".join(numpy_helper.to_array(tensor).tobytes() for tensor in done.graph.initializer)
    return {"saved": file.stat().st_size, "weights": squeezed(raw)}, running(str(file), name)


def running(model: str | bytes, name: str) -> Answer:
    """A session of ONNX Runtime."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {name: x})[0]  # type: ignore[no-any-return]


def squeezed(data: bytes) -> int:
    """Bytes after zstd -19, where that is less."""
    return min(len(data), len(zstandard.ZstdCompressor(19).compress(data)))


WAYS: dict[str, Callable[..., tuple[Row, Answer]]] = {
    "openvino, accuracy control": openvino_controlled,
    "onnx, accuracy control": onnx_controlled,
    "openvino, weights int8": openvino_weights(nncf.CompressWeightsMode.INT8_ASYM),
    "openvino, weights int4": openvino_weights(nncf.CompressWeightsMode.INT4_ASYM),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
