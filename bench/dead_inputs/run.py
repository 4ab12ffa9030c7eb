"""Inputs that are zero in every example of calibration and alive later: what does each method make of their weights?

python bench/dead_inputs/run.py --mnist mnist10k.npz [--seeds 3]

A net of 784-256-256-10 units is trained on 7,000 digits, moved at random by up to 4 pixels, and measured on 3,000
others. Hessians are measured on 2,000 of the training images, of which 10 or 30 % of the pixels, chosen at random, are
made zero. Errors are those on images with the same pixels zero ("dead") and on whole ones ("alive"). `--damping` is
that of AWQ; 1e-8 bounds its scales about as they were bounded before there was any.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import steelyard as sy
from steelyard.core.transform import Step
from steelyard.edit.adaround import AdaRound
from steelyard.edit.awq import Awq
from steelyard.edit.gptq import Gptq
from steelyard.edit.quantize import Quantize
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.edit.sparsegpt import SparseGPT

TRAIN, MEASURED, GROUP = 7000, 2000, 64


def moved(images: Tensor, random: torch.Generator) -> Tensor:
    """Each by up to 4 pixels, around the edges."""
    steps = torch.randint(-4, 5, (len(images), 2), generator=random).tolist()
    return torch.stack([torch.roll(x, tuple(by), (0, 1)) for x, by in zip(images, steps, strict=True)])


def blank() -> nn.Module:
    widths = (784, 256, 256, 10)
    layers = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


def trained(images: Tensor, labels: Tensor, random: torch.Generator) -> nn.Module:
    net = blank()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(6):
        shifted = moved(images, random)
        for some in torch.randperm(len(images), generator=random).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(shifted[some]), labels[some]).backward()
            optimizer.step()
    return net


def methods(h: sy.Weights, dampings: list[float]) -> dict[str, Step]:
    made: dict[str, Step] = {}
    for bits in (4, 3):
        made[f"nearest {bits}"] = Quantize(bits, symmetric=False, group=GROUP, error=2)
        for damping in dampings:
            made[f"awq {bits}, damping {damping:g}"] = Awq(bits, group=GROUP, by=h, damping=damping)
        made[f"gptq {bits}"] = Gptq(bits, symmetric=False, group=GROUP, by=h)
        made[f"adaround {bits}"] = AdaRound(bits, symmetric=False, group=GROUP, by=h, rounds=200)
        made[f"entropy {bits}"] = RateDistortion(bits, by=h)
    return made | {f"sparsegpt {fraction:.0%}": SparseGPT(fraction, by=h) for fraction in (0.05, 0.5)}


def wrong(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images, in per cent."""
    with torch.no_grad():
        return 100 * float((net(images).argmax(1) != labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--damping", type=float, nargs="+", default=[1e-8, 0.01])
    options = parser.parse_args()
    torch.set_num_threads(1)
    with np.load(options.mnist) as found:
        images, labels = (next(found[n] for n in found.files if found[n].ndim == axes) for axes in (3, 1))
    x, y = torch.from_numpy(images.astype(np.float32) / 255), torch.from_numpy(labels.astype(np.int64))
    rows = []
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        random = torch.Generator().manual_seed(seed)
        net = trained(x[:TRAIN], y[:TRAIN], random)
        some, test, truth = moved(x[:MEASURED], random), moved(x[TRAIN:], random), y[TRAIN:]
        for share in (0.1, 0.3):
            kept = (torch.rand(28, 28, generator=random) >= share).float()
            h = sy.score(net, list((some * kept).split(100)), "hessian")
            weights, fresh = sy.from_module(net), blank()
            steps: dict[str, Step | None] = {"as it was": None, **methods(h, options.damping)}
            for name, step in steps.items():
                sy.into_module(weights if step is None else step(weights), fresh)
                errors = {"dead": wrong(fresh, test * kept, truth), "alive": wrong(fresh, test, truth)}
                rows.append({"seed": seed, "share": share, "method": name, **errors})
                print(json.dumps(rows[-1]), flush=True)
    file = Path(__file__).parent / "results" / f"{date.today()}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
