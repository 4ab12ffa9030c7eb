"""How small does a sentence encoder get with 2,000 sentences that nobody has labelled? Bytes, cosine, ranks of pairs.

``python bench/small_minilm/with_sentences.py --model FOLDER --sentences sentences.txt --bits 2.2 2.6 3``: the first
2,000 sentences say what errors cost (`sy.kronecker`), nothing is trained, and the next 2,000 measure: the mean cosine
with the original's embeddings, and Spearman's correlation of the cosines of 20,000 pairs with those of the original.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from encoder import batches, embed, what_errors_cost
from scipy import stats
from torch import Tensor, nn

import steelyard as sy
from steelyard.shrinking.deep import vectors_halved


def ranks(embeddings: Tensor) -> np.ndarray:
    """The cosines of 20,000 pairs."""
    unit, random = nn.functional.normalize(embeddings, dim=1), np.random.default_rng(0)
    first, second = random.integers(0, len(unit), (2, 20_000))
    apart = first != second
    return (unit[first[apart]] * unit[second[apart]]).sum(1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--sentences", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.2, 2.6, 3.0, 3.6])
    parser.add_argument("--evidence", type=Path, help="a file to keep what errors cost, and to take it from next time")
    told = parser.parse_args()
    torch.set_num_threads(1)
    lines = told.sentences.read_text().split("\n")
    source = sy.open(told.model / "model.safetensors")
    original = {name: torch.from_numpy(x) for name, x in source.arrays().items() if x.dtype == np.float32}
    seen, fresh = (batches(told.model, lines[at : at + 2000]) for at in (0, 2000))
    reference = embed(original, fresh)
    clock, kept, what = time.process_time(), told.evidence, "evidence"
    if kept and kept.exists():
        by, what = sy.open(kept), "evidence from a file"
    else:
        by = what_errors_cost(original, seen)
        if kept:
            sy.write(by, kept)
    rows: list[dict[str, object]] = [{"what": what, "CPU seconds": round(time.process_time() - clock, 1)}]
    path = Path(__file__).parent / "results" / f"{date.today()}-with-sentences.json"
    weights = source.select(lambda weight: weight.name in original)
    for bits in told.bits:
        with TemporaryDirectory() as folder:
            clock, file = time.process_time(), Path(folder) / "small.safetensors"
            size = sy.write(vectors_halved()(sy.RateDistortion(bits=bits, by=by, min_ndim=2)(weights)), file)
            spent = time.process_time() - clock
            found = embed(
                {name: torch.from_numpy(np.asarray(x, np.float32)) for name, x in sy.open(file).arrays().items()}, fresh
            )
        cosines = nn.functional.cosine_similarity(found, reference)
        row = {"what": f"{bits:g} bits", "bytes": size, "cosine": float(cosines.mean()), "least": float(cosines.min())}
        row |= {"spearman": float(stats.spearmanr(ranks(found), ranks(reference))[0]), "CPU seconds": round(spent, 1)}
        rows.append(row)
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()
        path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
