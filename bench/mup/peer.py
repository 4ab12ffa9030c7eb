"""The peer `mup` on the MLP, in its own environment: called by run.py with a file of digits and an optimizer."""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from mup import MuAdam, MuReadout, MuSGD, make_base_shapes, set_base_shapes
from search import best, digit_batches, final_loss
from torch import nn


def mlp(width: int) -> nn.Module:
    """The MLP of run.py with the output layer that `mup` asks for."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), MuReadout(width, 10))


def main() -> None:
    data, kind, widths, seeds, start, steps, size = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
    torch.set_num_threads(1)
    arrays = np.load(data)
    images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    shapes = make_base_shapes(mlp(64), mlp(128))
    found = {}
    for width in widths:

        def trained(rate: float, seed: int, width: int = width) -> float:
            torch.manual_seed(seed)
            model = set_base_shapes(mlp(width), shapes)
            if kind == "adam":
                optimizer = MuAdam(model.parameters(), lr=rate)
            else:
                optimizer = MuSGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)
            return final_loss(model, optimizer, digit_batches(images, labels, steps, size, seed))

        found[width] = best(trained, seeds, start)
        start = found[width]["step"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
