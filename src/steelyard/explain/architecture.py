"""Which family of models a file holds, told by names and shapes, with the evidence; and what the file says itself.

Decides by FAMILIES, where the first whose evidence is all there counts. Says "unknown" where nothing fits: a guess
without evidence helps nobody. Reads no value, and repeats the metadata: they decide only where names and
shapes tell nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from steelyard.core.spec import Spec
from steelyard.core.table import Column, Table
from steelyard.core.weights import Texts, Weights
from steelyard.errors import quoted
from steelyard.explain.roles import KINDS, LONGEST, OUTSIDE, kind_of, layer, roles_of

SAID = ("config.model_type", "general.architecture", "config.architectures")  # metadata that name an architecture


@dataclass(frozen=True)
class Family:
    """A family, and what must be found among the names of its tensors, each at least once."""

    name: str
    needs: tuple[str, ...]


FAMILIES = (
    Family("LoRA adapter", (r"lora_?(?:a|b|A|B|down|up)(?:[._]|$)",)),
    Family("Mixtral (Mistral with experts)", (r"block_sparse_moe\.experts", r"self_attn\.q_proj")),
    Family("DeepSeek (latent attention)", (r"kv_a_proj_with_mqa|attn_kv_a_mqa",)),
    Family("Llama with experts (Qwen-MoE and others)", (r"mlp\.experts\.", r"self_attn\.q_proj", r"input_layernorm")),
    Family("Gemma 2 or 3", (r"pre_feedforward_layernorm", r"mlp\.gate_proj")),
    Family("Phi-3", (r"self_attn\.qkv_proj", r"mlp\.gate_up_proj")),
    Family("Qwen 3", (r"self_attn\.q_norm", r"mlp\.gate_proj", r"input_layernorm")),
    Family("Qwen 2", (r"self_attn\.q_proj\.bias", r"mlp\.gate_proj", r"input_layernorm")),
    Family("Llama or Mistral, whose names agree", (r"self_attn\.q_proj", r"mlp\.gate_proj", r"input_layernorm")),
    Family("Llama, in the names of Meta", (r"attention\.wq", r"feed_forward\.w1", r"tok_embeddings")),
    Family("GPT-2", (r"attn\.c_attn", r"mlp\.c_fc", r"wpe")),
    Family("GPT-NeoX (Pythia)", (r"attention\.query_key_value", r"dense_h_to_4h", r"embed_in")),
    Family("BLOOM", (r"self_attention\.query_key_value", r"word_embeddings_layernorm")),
    Family("Falcon", (r"self_attention\.query_key_value", r"dense_h_to_4h", r"word_embeddings")),
    Family("Whisper", (r"encoder_attn\.q_proj", r"encoder\.conv1")),
    Family("BART", (r"encoder_attn\.q_proj", r"layernorm_embedding")),
    Family("OPT", (r"decoder\.layers\.\d+\.self_attn", r"\.fc1", r"embed_positions")),
    Family("T5", (r"SelfAttention\.q", r"DenseReluDense")),
    Family("CLIP", (r"text_model\.", r"vision_model\.")),
    Family("DistilBERT", (r"attention\.q_lin", r"ffn\.lin1")),
    Family("vision transformer, in the names of Hugging Face", (r"patch_embeddings", r"attention\.attention\.query")),
    Family("vision transformer, in the names of timm", (r"patch_embed\.", r"attn\.qkv", r"mlp\.fc1")),
    Family("RoBERTa", (r"^roberta\.", r"attention\.self\.query")),
    Family("BERT", (r"attention\.self\.query", r"intermediate\.dense", r"word_embeddings")),
    Family("Mamba", (r"mixer\.A_log|ssm_a",)),
    Family("diffusion U-Net", (r"down_blocks\.", r"up_blocks\.")),
    Family("ResNet", (r"layer1\.\d+\.conv1", r"bn1\.")),
    Family("transformer, in the names of llama.cpp", (r"blk\.\d+\.attn_", r"token_embd")),
    Family("transformer, in the names of torch", (r"self_attn\.in_proj_weight", r"linear1")),
    Family("transformer, in the names of Keras", (r"multi_head_attention", r"query/kernel")),
)


def architecture(weights: Weights, of: Mapping[str, str] | None = None) -> Table:
    """One row: the family and the evidence for it, and the sizes that names and shapes tell.

    >>> import numpy as np
    >>> w = Weights.of({"0.weight": np.zeros((9, 4)), "0.bias": np.zeros(9), "2.weight": np.zeros((2, 9))})
    >>> architecture(w).rows[0]["family"], architecture(w).rows[0]["evidence"]
    ('perceptron of 2 matrices', '4 → 9 → 2: each takes what the one before gives')

    ``of`` is what `roles_of` found, where it is known already.
    """
    said = roles_of(weights) if of is None else of
    kinds = _kinds([*weights, *weights.ties])
    none = _by_metadata(weights.meta), "no rule for these names and shapes"
    family, evidence = _family(kinds) or _by_shapes(weights, said) or none
    named = [f"the metadata say {key} = {quoted(weights.meta[key])}" for key in SAID if key in weights.meta]
    row = {"family": family, "evidence": "; ".join([evidence, *named]), **_sizes(weights, said)}
    columns = [Column("family", "", "a guess"), Column("evidence"), Column("layers", "", "in the longest stack")]
    columns += [Column("width", "", "numbers per token or position"), Column("vocabulary", "", "rows of the embedding")]
    return Table.of("architecture", columns, [row])


def metadata(weights: Weights, longest: int | None = None) -> Table | None:
    """What the file says of itself, a row for each key; values are cut to `longest` characters. None for nothing."""
    if not weights.meta:
        return None
    rows = [{"key": key, "value": _value(weights.meta, key, longest)} for key in weights.meta]
    return Table.of("metadata", [Column("key"), Column("value", "", "as the file has it")], rows)


def _value(meta: Mapping[str, str], key: str, longest: int | None) -> str:
    """One value, cut; of a text that is made when it is asked for, such as a vocabulary, no more than is shown."""
    if longest is None or not isinstance(meta, Texts):
        return _cut(meta[key], longest)
    text = meta.beginning(key, longest + 1)
    return text if len(text) <= longest else f"{text[:longest]}…"


def _cut(text: str, longest: int | None) -> str:
    return text if longest is None or len(text) <= longest else f"{text[:longest]}… ({len(text)} characters)"


def _kinds(names: Iterable[str]) -> dict[str, str]:
    """The first name of each kind."""
    found: dict[str, str] = {}
    for name in names:
        if len(found) < KINDS and len(name) <= LONGEST:
            found.setdefault(kind_of(name), name)
    return found


def _family(kinds: Mapping[str, str]) -> tuple[str, str] | None:
    """The first family of which everything is there, and the names that show it."""
    for family in FAMILIES:
        shown = [next((kinds[kind] for kind in kinds if re.search(need, kind)), None) for need in family.needs]
        if None not in shown:
            return family.name, "names such as " + ", ".join(quoted(name) for name in shown if name is not None)
    return None


def _by_shapes(weights: Weights, said: Mapping[str, str]) -> tuple[str, str] | None:
    """A family that shapes tell: a recurrent cell by its gates, a convolutional network, a chain of matrices."""
    specs = {name: item.spec for name, item in weights.items()}
    recurrent = [name for name in specs if said[name] == "recurrent"]
    for name in recurrent:
        if (cell := _cell(name, specs[name])) is not None:
            return cell
    roles = set(said.values())
    if "convolution" in roles:
        count = sum(role == "convolution" for role in said.values())
        first = next(name for name in specs if said[name] == "convolution")
        return "convolutional network", f"{count} kernels such as {quoted(first)} {specs[first]}"
    if roles <= {"linear", "head", "bias"} and roles & {"linear", "head"}:
        return _chain([spec.shape for name, spec in specs.items() if said[name] != "bias"])
    return None


def _by_metadata(meta: Mapping[str, str]) -> str:
    """What the metadata name, in their words; "unknown" where they name nothing."""
    return next((quoted(meta[key])[1:-1] for key in SAID if meta.get(key)), "unknown")


def _cell(name: str, spec: Spec) -> tuple[str, str] | None:
    """A recurrent cell by how many gates the matrix of its state has."""
    state = re.search(r"weight_hh|recurrent_kernel|(?<![a-z])w_hh", name)
    if state is None or len(spec.shape) != 2 or 0 in spec.shape:
        return None
    gates = max(spec.shape) / min(spec.shape)
    cell = {4.0: "LSTM", 3.0: "GRU", 1.0: "plain recurrent network"}.get(gates)
    return None if cell is None else (cell, f"{quoted(name)} {spec}: {int(gates)} gates of {min(spec.shape)}")


def _chain(shapes: list[tuple[int, ...]]) -> tuple[str, str] | None:
    """A perceptron, if each matrix takes what the one before gives: (out, in) as in torch, or (in, out) as in Keras."""
    if any(len(shape) != 2 for shape in shapes):
        return None
    for pairs in ([(b, a) for a, b in shapes], list(shapes)):
        if all(left[1] == right[0] for left, right in pairwise(pairs)):
            widths = [pairs[0][0], *(out for _, out in pairs)]
            shown = " → ".join(map(str, widths[:20])) + (" → ..." if len(widths) > 20 else "")
            what = "linear model" if len(pairs) == 1 else f"perceptron of {len(pairs)} matrices"
            return what, f"{shown}: each takes what the one before gives" if len(pairs) > 1 else f"one matrix, {shown}"
    return None


def _sizes(weights: Weights, said: Mapping[str, str]) -> dict[str, Any]:
    """How many layers, how wide, how many words: as far as names and shapes tell."""
    stacks: dict[str, set[str]] = {}
    widths: dict[int, int] = {}
    words: Spec | None = None
    for name, item in weights.items():
        stack, number = layer(name)
        if stack != OUTSIDE:
            stacks.setdefault(stack, set()).add(number)
        if said[name] == "norm" and len(item.spec.shape) == 1:
            widths[item.spec.size] = widths.get(item.spec.size, 0) + 1
        if said[name] == "embedding" and len(item.spec.shape) == 2 and (words is None or item.spec.size > words.size):
            words = item.spec
    layers = max(map(len, stacks.values()), default=None)
    if words is None:
        return {"layers": layers, "width": None, "vocabulary": None}
    rows, columns = words.shape
    turned = rows in widths and columns not in widths  # a row for each number of a token, not for each token
    usual = columns if not widths else max(widths, key=lambda n: widths[n])
    return {"layers": layers, "width": usual, "vocabulary": columns if turned else rows}
