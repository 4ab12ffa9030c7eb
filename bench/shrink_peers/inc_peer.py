"""Neural Compressor on one net, in its own environment: ``inc_peer.py FOLDER TOLERANCE``, of what run.py prepared.

Writes inc.json, a row for each set of configurations, and inc.npz, which examples come out right. Bytes are those of
the folder as it is saved, and of the tensors alone, after zstd -19 where that is less.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import real  # noqa: F401  the nets are built by it
import torch
import zstandard
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import (
    DynamicQuantConfig,
    INT8StaticQuantConfig,
    RTNConfig,
    TuningConfig,
    autotune,
    get_woq_tuning_config,
)
from torch import nn

SPLITS = ("valid", "test", "truth")
BITS = range(2, 9)
Row = dict[str, Any]


def main(place: Path, tolerance: float) -> None:
    """All sets, each with what it failed with if it did."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    data = dict(np.load(place / "data.npz"))
    rows: list[Row] = []
    right: dict[str, np.ndarray] = {}
    for method, (configs, graph) in WAYS.items():
        began = time.process_time()
        model = torch.load(place / "model.pt", weights_only=False).eval()
        try:
            done = tuned(model, data, configs(), graph, tolerance)
            rows.append({"method": method, **saved(done, place / f"inc-{method.replace(' ', '-')}", data, graph)})
            right |= {f"{method} {split}": correct(done, data, split) for split in SPLITS}
        except Exception as error:  # noqa: BLE001 - whatever a rival fails with is its result
            said = str(error).strip().splitlines() or [""]
            rows.append({"method": method, "failed": f"{type(error).__name__}: {said[0]}"[:200]})
        rows[-1]["seconds"] = time.process_time() - began
    (place / "inc.json").write_text(json.dumps(rows, indent=1))
    np.savez(place / "inc.npz", **right)  # type: ignore[arg-type]


def tuned(model: nn.Module, data: dict[str, np.ndarray], configs: list[Any], graph: bool, tolerance: float) -> Any:
    """The first of the configurations that validation examples bear.

    graph: it is asked of the exported graph, as static and dynamic int8 are.
    """
    torch.backends.mha.set_fastpath_enabled(False)  # which reads the weights of layers that are packed now
    direct = [f"{name}.out_proj" for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for config, name in product([] if graph else configs, direct):  # attention reads this weight itself, too
        config.set_local(name, type(config)(dtype="fp32"))
    base = float(correct(model, data, "valid").mean())
    x = torch.from_numpy(data["train x"])
    if graph:
        free = ({0: torch.export.Dim("batch", min=2, max=1 << 16)},)
        model = export(model, example_inputs=(x[:8],), dynamic_shapes=free)

    def calibrate(model: Any) -> None:
        with torch.no_grad():
            for batch in x.split(64):
                model(batch)

    plan = TuningConfig(config_set=configs, tolerable_loss=tolerance / base)
    found = autotune(model, plan, eval_fn=lambda m: float(correct(m, data, "valid").mean()), run_fn=calibrate,
                     example_inputs=(x[:8],))  # fmt: skip
    if found is None:
        raise ValueError("no configuration is within the tolerance")
    return found


def correct(model: Any, data: dict[str, np.ndarray], split: str) -> np.ndarray:
    """Whether each example of a split comes out right."""
    with torch.no_grad():
        outputs = torch.cat([model(x) for x in torch.from_numpy(data[f"{split} x"]).split(500)])
    return np.asarray(outputs.argmax(-1).numpy() == data[f"{split} y"])


def saved(model: Any, folder: Path, data: dict[str, np.ndarray], graph: bool) -> Row:
    """Bytes of what it writes, and of the tensors."""
    held = {name: x.clone() for name, x in model.state_dict().items() if isinstance(x, torch.Tensor)}
    if graph:
        model.save((torch.from_numpy(data["train x"][:8]),), output_dir=str(folder))
    else:
        model.save(str(folder))
    raw = b"".join(x.contiguous().flatten().view(torch.uint8).numpy().tobytes() for x in held.values())
    whole = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"saved": whole, "weights": min(len(raw), len(zstandard.ZstdCompressor(19).compress(raw)))}


def by_bits() -> list[Any]:
    """Rounding to nearest, a scale for each output; the fewest bits first."""
    return [RTNConfig(bits=bits, group_size=-1, use_sym=False, quant_lm_head=True) for bits in BITS]


WAYS: dict[str, tuple[Callable[[], list[Any]], bool]] = {
    "weights, documented": (get_woq_tuning_config, False),
    "weights, fewest bits": (by_bits, False),
    "static int8": (lambda: [INT8StaticQuantConfig()], True),
    "dynamic int8": (lambda: [DynamicQuantConfig()], True),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
