"""What each tensor is for, told by its name and shape alone: embedding, query, norm, convolution, ... or other.

Decides from how libraries name things (Hugging Face, llama.cpp, torch, Keras, timm, PEFT, the quantisers); the table is
RULES, and the first that fits counts. A name can lie: a role is what the name says, never what the values do. The bias
of a norm is a norm, every other bias is a bias. Reads no value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from steelyard.core.table import Column, Table
from steelyard.core.weights import Weights
from steelyard.explain.inventory import COUNTS, Sums
from steelyard.explain.repeats import spans

KINDS = 20_000  # of names whose roles are remembered
LONGEST = 500  # characters of a name that is looked at: what is longer means nothing to anybody
ROWS = 100  # runs of layers with a row each
OUTSIDE = "(outside of layers)"
_NUMBER = re.compile(r"(?<![^./])\d+(?![^./])")  # a component that is a number
_LAYER = re.compile(r"^(.*?)(?:^|(?<=[./]))(\d+)(?=[./])")  # up to the first component that is a number
_ANY = (0, 99)


@dataclass(frozen=True)
class Rule:
    """A role for names in which `pattern` is found and whose tensors have a rank within `ranks`."""

    role: str
    pattern: re.Pattern[str]
    ranks: tuple[int, int] = _ANY


def _rule(role: str, words: str, ranks: tuple[int, int] = _ANY, before: str = "") -> Rule:
    """A rule for whole words of a name, before which something may have to stand."""
    return Rule(role, re.compile(rf"{before}(?:^|[.])(?:{words})(?=[.]|$)"), ranks)


_IN_ATTENTION = r"(?:^|[._])(?:[a-z]*attn|[a-z]*attention|self|cross)[a-z0-9_]*(?:[.].*)?"
_IN_MLP = (
    r"(?:^|[._])(?:mlp|ffn|feed_?forward|ff|densereludense|experts?|layers?[.]\d+|blocks?[.]\d+|h[.]\d+)(?:[._].*)?"
)

RULES = (
    Rule(
        "LoRA pair", re.compile(r"(?:^|[._])lora_?(?:a|b|down|up|embedding_a|embedding_b|magnitude_vector)(?:[._]|$)")
    ),
    _rule("packed part", "qweight|qzeros|g_idx|scb|absmax|nested_absmax|quant_map|nested_quant_map|scales"),
    _rule("packed part", r"quant_state[a-z0-9_.]*|weight_(?:packed|scale|zero_point|shape|g_idx|scale_inv|format)"),
    _rule("packed part", "input_scale|weight_global_scale|_packed_params|zero_points?|e_score_correction_bias"),
    _rule("norm", r"[a-z0-9_]*(?:norm|layernorm|batch_normalization|batchnorm)[0-9a-z_]*(?:[.].*)?", (0, 1)),
    _rule(
        "norm", r"(?:ln|bn|gn)_?[0-9a-z]*[.](?:weight|bias|gamma|beta|scale|running_[a-z]+|moving_[a-z]+|num_[a-z_]+)"
    ),
    _rule("norm", "gamma|beta|running_mean|running_var|moving_mean|moving_variance|num_batches_tracked", (0, 1)),
    _rule(
        "recurrent",
        r"weight_(?:ih|hh|hr)_l\d+(?:_reverse)?|weight_(?:ih|hh)|recurrent_kernel|a_log|dt_proj|ssm_[a-z0-9_.]+",
    ),
    _rule("recurrent", r"[a-z0-9_]*(?:lstm|gru|rnn)[a-z0-9_]*[.](?:.*[.])?kernel", (2, 2)),
    _rule("recurrent", r"(?:[a-z0-9_]+_)?w_(?:ih|hh)", (2, 2)),
    _rule("bias", r"bias|in_proj_bias|bias_(?:ih|hh)(?:_l\d+)?(?:_reverse)?|[a-z0-9_]*_bias|b", (0, 1)),
    _rule("bias", r"(?:[a-z0-9_]+_)?b_(?:ih|hh)|[a-z0-9_]+_b", (1, 1)),
    _rule("attention qkv", "c_attn|qkv|qkv_proj|query_key_value|in_proj_weight|in_proj|wqkv|attn_qkv|to_qkv|kv_proj"),
    _rule("attention qkv", "kv_a_proj_with_mqa|kv_b_proj|attn_kv_a_mqa|attn_kv_b|to_kv|wkv"),
    _rule(
        "attention query",
        "q_proj|query|wq|attn_q|to_q|q_lin|q_a_proj|q_b_proj|attn_q_a|attn_q_b|query_proj|query_dense",
    ),
    _rule("attention key", "k_proj|key|wk|attn_k|to_k|k_lin|key_proj|key_dense"),
    _rule("attention value", "v_proj|value|wv|attn_v|to_v|v_lin|value_proj|value_dense"),
    _rule("attention query", "q", before=_IN_ATTENTION),
    _rule("attention key", "k", before=_IN_ATTENTION),
    _rule("attention value", "v", before=_IN_ATTENTION),
    _rule("attention output", "o_proj|attn_output|attention_output|to_out|out_lin|output_dense"),
    _rule("attention output", "out_proj|proj|c_proj|o|wo|output[.]dense|dense|proj_out", before=_IN_ATTENTION),
    _rule("MLP router", "router|ffn_gate_inp|gate[.](?:weight|kernel)|router[.].*", before=r"(?:mlp|moe|ffn)[a-z_]*"),
    _rule("MLP router", "ffn_gate_inp|router|gate_inp|shared_expert_gate"),
    _rule("MLP gate and up", "gate_up_proj|gate_and_up_proj|w13"),
    _rule("MLP gate", "gate_proj|ffn_gate|ffn_gate_exps|ffn_gate_shexp|wi_0|linear_fc1_gate"),
    _rule(
        "MLP up", "up_proj|c_fc|ffn_up|ffn_up_exps|ffn_up_shexp|wi_1|wi|dense_h_to_4h|intermediate[.]dense|lin1|linear1"
    ),
    _rule("MLP down", "down_proj|ffn_down|ffn_down_exps|ffn_down_shexp|dense_4h_to_h|lin2|linear2"),
    _rule("MLP gate", "w1", before=_IN_MLP),
    _rule("MLP up", "w3|fc1|fc_in", before=_IN_MLP),
    _rule("MLP down", "w2|fc2|fc_out|c_proj|wo|output[.]dense", before=_IN_MLP),
    _rule("MLP down", "output[.]dense"),
    Rule("convolution", re.compile(r"(?:conv|patch_embed|downsample|stem|features).*(?:weight|kernel)$"), (3, 5)),
    _rule("head", "embed_out|lm_head"),
    _rule(
        "embedding",
        r"[a-z0-9_]*embed[a-z0-9_]*(?:[.].*)?|wte|wpe|token_embd|position_embd|token_types|shared|class_token|(?:[a-z0-9_]+_)?emb",
    ),
    _rule(
        "embedding",
        r"cls_token|mask_token|dist_token|pos_embed|relative_attention_bias|relative_position_bias_table|attn_rel_b",
    ),
    _rule(
        "head",
        r"lm_head|classifier|score|heads?|embed_out|cls[.]predictions|qa_outputs|classification_head|predictions",
    ),
    Rule("head", re.compile(r"^(?:(?:model|module)[.])?(?:output|fc|logits?)[.](?:weight|kernel)$"), (2, 2)),
    _rule("convolution", r"weight|kernel|depthwise_kernel|pointwise_kernel", (3, 5)),
    _rule("other", "rope_freqs[.]weight|rope_factors_(?:long|short)[.]weight"),
    _rule("norm", "weight|scale", (1, 1)),  # a vector that multiplies: hardly anything else is one
    _rule("linear", "weight|kernel|w|[a-z0-9_]+_w", (2, 2)),
)


def role(name: str, rank: int) -> str:
    """The role that a name and a number of axes tell.

    >>> role("model.layers.3.self_attn.q_proj.weight", 2), role("blk.0.ffn_down.weight", 2), role("mystery", 2)
    ('attention query', 'MLP down', 'other')
    """
    said = name.lower().replace("/", ".").removesuffix(":0")
    fitting = (rule.role for rule in RULES if rule.ranks[0] <= rank <= rule.ranks[1] and rule.pattern.search(said))
    return "other" if len(name) > LONGEST else next(fitting, "other")


def kind_of(name: str) -> str:
    """A name without the numbers of its layers and experts: what repeats has one kind.

    >>> kind_of("h.3.mlp.experts.17.w1")
    'h.0.mlp.experts.0.w1'
    """
    return _NUMBER.sub("0", name)


def roles_of(weights: Weights) -> Mapping[str, str]:
    """The role of every name, ties included."""
    known: dict[tuple[str, int], str] = {}
    found: dict[str, str] = {}
    for item in weights.values():
        kind = kind_of(item.name), len(item.spec.shape)
        if kind not in known:
            if len(known) >= KINDS:
                known.clear()
            known[kind] = role(item.name, len(item.spec.shape))
        found[item.name] = known[kind]
    return found | {alias: role(alias, len(weights[name].spec.shape)) for alias, name in weights.ties.items()}


def roles(weights: Weights, of: Mapping[str, str] | None = None) -> Table:
    """One row for each role that occurs, in order of appearance: how many tensors, how large, and how many ties.

    >>> import numpy as np
    >>> table = roles(Weights.of({"wte.weight": np.zeros((9, 4), np.float32), "ln_f.bias": np.zeros(4, np.float32)}))
    >>> [(row["role"], row["tensors"], row["elements"]) for row in table.rows]
    [('embedding', 1, 36), ('norm', 1, 4)]

    ``of`` is what `roles_of` found, where it is known already.
    """
    said = roles_of(weights) if of is None else of
    groups: dict[str, Sums] = {}
    for item in weights.values():
        groups.setdefault(said[item.name], Sums()).add(item)
    tied: dict[str, int] = {}
    for alias in weights.ties:
        tied[said[alias]] = tied.get(said[alias], 0) + 1
    total = sum(group.elements for group in groups.values())
    rows = [
        {"role": name, **_counted(groups.get(name, Sums()), tied.get(name, 0), total)}
        for name in dict.fromkeys([*groups, *tied])
    ]
    columns = [Column("role", "", "as names and shapes tell it"), *_COLUMNS]
    return Table.of("roles", columns, rows)


_COLUMNS = (
    Column("tensors"),
    Column("tied", "", "further names of a tensor that is counted elsewhere"),
    *COUNTS,
    Column("share", "%", "of all elements"),
)


def _counted(sums: Sums, tied: int, total: int) -> dict[str, Any]:
    share = sums.elements / total if total else None
    return {"tensors": sums.tensors, "tied": tied, **sums.sizes(), "share": share}


@dataclass
class _Layers:
    """Neighbouring layers that are alike."""

    stack: str
    numbers: list[str]
    one: tuple[int, ...]  # tensors, elements, bytes and ties of each
    sums: Sums
    tied: int


def layers(weights: Weights) -> Table:
    """One row for each run of layers that are alike in number and size of their tensors, and one for the rest.

    >>> import numpy as np
    >>> w = Weights.of({f"h.{i}.w": np.zeros((2, 3), np.float32) for i in range(12)} | {"wte": np.zeros(4, np.float32)})
    >>> [(row["layers"], row["tensors"], row["elements"]) for row in layers(w).rows]
    [('h.{0..11}', 12, 72), ('(outside of layers)', 1, 4)]
    """
    found: dict[tuple[str, str], Sums] = {}
    for item in weights.values():
        found.setdefault(layer(item.name), Sums()).add(item)
    tied: dict[tuple[str, str], int] = {}
    for alias in weights.ties:
        tied[layer(alias)] = tied.get(layer(alias), 0) + 1
    runs: list[_Layers] = []
    for (stack, number), sums in found.items():
        ties = tied.get((stack, number), 0)
        one = (sums.tensors, sums.elements, sums.bytes, ties)
        if runs and (runs[-1].stack, runs[-1].one) == (stack, one):
            runs[-1].numbers.append(number)
            runs[-1].sums.join(sums)
            runs[-1].tied += ties
        else:
            runs.append(_Layers(stack, [number], one, sums, ties))
    total = sum(run.sums.elements for run in runs)
    runs.sort(key=lambda run: run.stack == OUTSIDE)  # stable: the rest goes to the end
    rows = [
        {"layers": f"{run.stack}{spans(run.numbers)}", "count": _count(run), **_counted(run.sums, run.tied, total)}
        for run in runs[:ROWS]
    ]
    if len(runs) > ROWS:
        rest, tied_rest = Sums(), sum(run.tied for run in runs[ROWS:])
        for run in runs[ROWS:]:
            rest.join(run.sums)
        rows.append({"layers": f"({len(runs) - ROWS} others)", "count": None, **_counted(rest, tied_rest, total)})
    return Table.of("layers", [Column("layers"), Column("count", "", "of layers"), *_COLUMNS], rows)


def _count(run: _Layers) -> int | None:
    return None if run.stack == OUTSIDE else len(run.numbers)


def layer(name: str) -> tuple[str, str]:
    """The stack and the number of the layer that a tensor belongs to.

    >>> layer("model.layers.3.mlp.experts.7.up_proj.weight"), layer("lm_head.weight")
    (('model.layers.', '3'), ('(outside of layers)', ''))
    """
    found = _LAYER.match(name)
    return (OUTSIDE, "") if found is None else (found[1], found[2])
