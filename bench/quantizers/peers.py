"""The packages' own code beside run.py's methods: hqq, optimum-quanto and torchao, weights only, on a CPU.

python bench/quantizers/peers.py --model characters --text moby-dick.txt --work FOLDER [--only NAME ...] [--out FILE]

Needs what run.py needs, and hqq, optimum-quanto, torchao and zstandard. The model, the tokens and the perplexity are
those of run.py; so is what is rounded: every matrix, the embedding that is also the head once, as the linear layer that
the head is. Vectors, scales and zero points are float16, as these packages hold them. Each package rounds the modules
by its own entry point; then what it holds is decoded by its own code, in float32, into the plain model that is
measured: its kernels are not judged. Bytes are those of torch.save of the state dict, and of that file after zstd -19.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import zstandard
from run import characters, smollm2
from torch import Tensor, nn

HEADS = {"smollm2": "lm_head", "characters": "head"}  # whose weight is the embedding, too
State = dict[str, Any]
Rounded = tuple[State, dict[str, Tensor]]  # what is saved, and the matrices that it stands for


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def rest(model: nn.Module) -> State:
    """What no package rounds: the vectors."""
    return {name: p.detach() for name, p in model.named_parameters() if p.ndim < 2}


def held(model: nn.Module) -> State:
    """The state of a rounded model, without the embedding: it is the head's."""
    return {name: x for name, x in model.state_dict().items() if "embed" not in name}


def hqq(bits: int, group: int, axis: int, model: nn.Module) -> Rounded:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
    layers = linears(model)
    saved, decoded = {n: x for n, x in rest(model).items() if n.rpartition(".")[0] not in layers}, {}
    for name, layer in layers.items():
        made = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        saved[name], decoded[name] = made.state_dict(), made.dequantize().float()
    return saved, decoded


def quanto(bits: int, by_hqq: bool, model: nn.Module) -> Rounded:
    from optimum import quanto as q

    optimizer = q.HqqOptimizer() if by_hqq else None
    q.quantize(model, weights={4: q.qint4, 2: q.qint2}[bits], optimizer=optimizer)
    q.freeze(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, q.nn.QLinear)}
    return held(model), {name: module.weight.dequantize().float() for name, module in layers.items()}


def torchao(config: Callable[[], Any], model: nn.Module) -> Rounded:
    from torchao.quantization import quantize_

    quantize_(model, config(), filter_fn=lambda module, _: isinstance(module, nn.Linear))
    return held(model), {name: layer.weight.dequantize().float() for name, layer in linears(model).items()}


def intx(bits: int, group: int) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    dtype = getattr(torch, f"int{bits}")
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerGroup(group), mapping_type=MappingType.ASYMMETRIC)


def methods() -> dict[str, Callable[[nn.Module], Rounded]]:
    made: dict[str, Callable[[nn.Module], Rounded]] = {}
    for bits, group in ((4, 64), (3, 64), (2, 32), (2, 16)):
        for axis in (1, 0):
            made[f"hqq, group {group}, axis {axis} {bits}"] = partial(hqq, bits, group, axis)
    for bits in (4, 2):
        made[f"quanto {bits}"] = partial(quanto, bits, False)
        made[f"quanto, HqqOptimizer {bits}"] = partial(quanto, bits, True)
    for bits in (4, 3, 2):
        made[f"torchao, intx, group 32 {bits}"] = partial(torchao, partial(intx, bits, 32))
    return made


def measure(subject: Any, name: str, method: Callable[[nn.Module], Rounded], work: Path) -> dict[str, Any]:
    """Bytes of what is saved, perplexity of the plain model with what it stands for, and CPU seconds of rounding."""
    model = subject.build()
    head = model.get_submodule(HEADS[name])
    head.weight = nn.Parameter(head.weight.detach().clone())  # a matrix of its own, which packages take for a head's
    model.half().requires_grad_(False)
    start = time.process_time()
    saved, decoded = method(model)
    seconds = time.process_time() - start
    file = work / "peer.pt"
    torch.save(saved, file)
    size = file.stat().st_size
    packed = len(zstandard.ZstdCompressor(level=19).compress(file.read_bytes()))
    fresh = subject.build()
    with torch.no_grad():
        for place, layer in linears(fresh).items():
            layer.weight.copy_(decoded[place])  # the embedding is the head's
        for parameter in fresh.parameters():
            if parameter.ndim < 2:
                parameter.copy_(parameter.half())
    weights = sum(p.numel() for p in fresh.parameters())
    found = {"bytes": size, "bits a weight": 8 * size / weights, "bytes, zstd": packed}
    return found | {"bits, zstd": 8 * packed / weights, **subject.perplexity(fresh), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=list(HEADS), default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="methods whose name begins so")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True, parents=True)
    small = options.model == "characters"
    subject = characters(options.text, options.work) if small else smollm2(options.text.read_text(), options.work)
    out = options.out or Path(__file__).parent / "results" / f"{date.today()}-{options.model}-peers.json"
    found = json.loads(out.read_text()) if out.exists() else {"model": options.model}
    found["versions"] = {name: version(name) for name in ("hqq", "optimum-quanto", "torchao", "torch")}
    rows = found.setdefault("rows", {})
    for name, method in methods().items():
        if name not in rows and (not options.only or any(name.startswith(o) for o in options.only)):
            rows[name] = measure(subject, options.model, method, options.work)
            out.write_text(json.dumps(found, indent=1) + "\n")
            print(name, rows[name], flush=True)


if __name__ == "__main__":
    main()
