"""The truth set of `diff`: pairs of small files with one planted difference each, and what must be said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from steelyard.core.packed import pack
from steelyard.core.weights import Weights

HELD = "the same values, held otherwise"
BF16 = ml_dtypes.bfloat16
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """What was planted, and for each tensor that is not identical the verdict (and a word of its notes)."""

    name: str
    a: Weights
    b: Weights
    truth: dict[str, tuple[str, str]]  # name in b (or a, if removed) -> verdict, part of the notes
    verdict: str = "different"  # of the whole
    was: dict[str, str] | None = None  # name in b -> name in a, where they differ


def base() -> Arrays:
    """A tiny language model in float32."""
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.02).astype(np.float32)

    arrays = {"model.embed.weight": normal(64, 24)}
    for i in range(2):
        arrays[f"model.layers.{i}.attn.q.weight"] = normal(24, 24)
        arrays[f"model.layers.{i}.mlp.up.weight"] = normal(48, 24)
        arrays[f"model.layers.{i}.norm.weight"] = np.ones(24, np.float32)
    return arrays | {
        "model.steps": np.array(7, np.int64),
        "model.mask": np.tri(8, dtype=bool),
        "head.weight": normal(64, 24),
    }


Q, UP, EMBED, HEAD = "model.layers.0.attn.q.weight", "model.layers.1.mlp.up.weight", "model.embed.weight", "head.weight"


def _edit(
    name: str, change: Callable[[np.ndarray], np.ndarray | None], verdict: str, note: str = "", key: str = UP
) -> Case:
    """One tensor changed in place, or replaced by what `change` returns."""
    a, b = base(), base()
    new = change(b[key])
    if new is not None:
        b[key] = new
    return Case(name, Weights.of(a), Weights.of(b), {key: (verdict, note)})


def _set(index: tuple[int, ...], value: float) -> Callable[[np.ndarray], None]:
    def change(x: np.ndarray) -> None:
        x[index] = value

    return change


def _bits(index: tuple[int, ...], bits: int) -> Callable[[np.ndarray], None]:
    def change(x: np.ndarray) -> None:
        x.view(np.uint32)[index] = bits

    return change


def _both(name: str, first: Callable[[np.ndarray], None], second: Callable[[np.ndarray], None], verdict: str) -> Case:
    """One tensor changed on both sides."""
    a, b = base(), base()
    first(a[UP])
    second(b[UP])
    return Case(
        name,
        Weights.of(a),
        Weights.of(b),
        {UP: (verdict, "")} if verdict else {},
        "different" if verdict else "identical",
    )


def _renamed(name: str, rule: Callable[[str], str], change: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Case:
    a = base()
    b = {rule(key): change(x) for key, x in a.items()}
    was = {rule(key): key for key in a if rule(key) != key}
    return Case(
        name, Weights.of(a), Weights.of(b), dict.fromkeys(was, ("renamed", "")), "identical under other names", was
    )


def _one_number(x: np.ndarray) -> None:
    x[:] = np.nan
    x[0, 0] = 1.0


def _one_ulp(x: np.ndarray) -> None:
    x.view(np.uint32)[3, 5] ^= 1


def _exact_in_bfloat16() -> Case:
    a = {k: x.astype(BF16) if x.dtype == np.float32 else x for k, x in base().items()}
    b = {k: x.astype(np.float32) if x.dtype == BF16 else x for k, x in a.items()}
    truth = {k: ("same values", "every value is the same") for k in a if a[k].dtype == BF16}
    return Case("dtype only, exact", Weights.of(a), Weights.of(b), truth, HELD)


def _rounded_to_bfloat16() -> Case:
    a = base()
    b = {k: x.astype(BF16) if x.dtype == np.float32 else x for k, x in a.items()}
    exact, lossy = ("same values", "every value is the same"), ("rounded", "the second is the first, rounded")
    truth = {
        k: exact if np.array_equal(x, b[k].astype(np.float32)) else lossy for k, x in a.items() if b[k].dtype == BF16
    }
    return Case("dtype only, rounded", Weights.of(a), Weights.of(b), truth, "the same but for rounding")


def _float8() -> Case:
    a = {k: x.astype(ml_dtypes.float8_e4m3fn) if x.dtype == np.float32 else x for k, x in base().items()}
    b = {k: x.copy() for k, x in a.items()}
    b[UP].view(np.uint8)[2, 3] ^= 0x80
    return Case("one sign in float8", Weights.of(a), Weights.of(b), {UP: ("sign flips", "1 element changed sign")})


def _swapped() -> Case:
    a = base()
    first, second = "model.layers.0.mlp.up.weight", UP
    b = {**a, first: a[second], second: a[first]}
    return Case("swapped", Weights.of(a), Weights.of(b), {first: ("moved", second), second: ("moved", first)})


def _resharded() -> Case:
    """The same tensors laid out in another order: what is left of a sharding when it is read."""
    a = base()
    return Case("resharded", Weights.of(a), Weights.of(dict(reversed(a.items()))), {}, "identical, laid out otherwise")


def _added_and_removed() -> Case:
    a, b = base(), base()
    del b["model.mask"]
    b["extra.bias"] = np.zeros(5, np.float32)
    return Case(
        "added and removed", Weights.of(a), Weights.of(b), {"model.mask": ("removed", ""), "extra.bias": ("added", "")}
    )


def _grown() -> Case:
    a, b = base(), base()
    for key in (EMBED, HEAD):
        b[key] = np.concatenate([a[key], np.zeros((16, 24), np.float32)])
    truth = dict.fromkeys(
        (EMBED, HEAD), ("grown", "the first 64 rows are the same bits; 16 rows more in the second, all zero")
    )
    return Case("grown vocabulary", Weights.of(a), Weights.of(b), truth)


def _low_rank(dtype: type = np.float32) -> Case:
    rng = np.random.default_rng(1)
    a = {"w": (rng.standard_normal((256, 320)) * 0.02).astype(dtype)}
    step = rng.standard_normal((256, 8)) @ rng.standard_normal((8, 320)) * 0.002
    b = {"w": (a["w"].astype(np.float64) + step).astype(dtype)}
    return Case(f"low rank, {np.dtype(dtype).name}", Weights.of(a), Weights.of(b), {"w": ("values", "rank 8")})


def _renumbered_filters() -> Case:
    """Filters and channels in other orders, some of them twice or zero, and the elements of each filter in place."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((12, 6, 3, 3)).astype(np.float32)
    x[3], x[5], x[:, 4] = x[2], 0, 0
    y, truth = x[rng.permutation(12)][:, rng.permutation(6)], {"conv": ("permuted rows and columns", "of 12 rows")}
    return Case("permuted filters and channels", Weights.of({"conv": x}), Weights.of({"conv": y}), truth)


def _renumbered_bits() -> Case:
    """A matrix of two values: many rows hold the same ones, and only the columns in which they lie tell them apart."""
    rng = np.random.default_rng(9)
    x = np.where(rng.random((40, 30)) < 0.5, np.float32(0.5), np.float32(2))
    y, truth = x[rng.permutation(40)][:, rng.permutation(30)], {"w": ("permuted rows and columns", "of 40 rows")}
    return Case("permuted rows and columns of two values", Weights.of({"w": x}), Weights.of({"w": y}), truth)


def noisy(x: np.ndarray) -> np.ndarray:
    """A hundredth of other values added."""
    return (x + np.random.default_rng(10).standard_normal(x.shape) * 2e-4).astype(x.dtype)


def _trained_on() -> Case:
    """Filters in another order, two of them dead, trained further, stored in bfloat16; and other filters."""
    rng = np.random.default_rng(11)
    x, other = rng.standard_normal((2, 24, 6, 3, 3)).astype(np.float32)
    x[[4, 9]] = 0
    y = x[rng.permutation(24)]
    y = np.where(y == 0, y, y + rng.standard_normal(y.shape).astype(np.float32) * np.float32(0.2)).astype(BF16)
    truth = {"conv": ("permuted and changed", "of 24 rows moved"), "other": ("values", "")}
    a, b = {"conv": x, "other": x[::-1].copy()}, {"conv": y, "other": other}
    return Case("permuted filters, trained on", Weights.of(a), Weights.of(b), truth)


def _attention(layers: int = 2) -> Arrays:
    """Queries, keys and values of some layers, with biases: those of the first layer are fresh, and all the same."""
    rng = np.random.default_rng(12)
    arrays = {}
    for i in range(layers):
        for part, rows in (("q", 24), ("k", 8), ("v", 8)):
            arrays[f"h.{i}.{part}_proj.weight"] = rng.standard_normal((rows, 20)).astype(np.float32)
            bias = rng.standard_normal(rows) * (i > 0)
            arrays[f"h.{i}.{part}_proj.bias"] = bias.astype(np.float32)
    return arrays | {"ln.weight": np.ones(20, np.float32), "o.weight": rng.standard_normal((20, 20)).astype(np.float32)}


def _fused(
    arrays: Arrays, join: Callable[[list[np.ndarray]], np.ndarray] = np.concatenate, biases: bool = True
) -> Arrays:
    """The same with q, k and v in one tensor."""
    whole = {key: x for key, x in arrays.items() if "_proj" not in key or (not biases and "bias" in key)}
    for i in range(2):
        for kind in ("weight", "bias")[: 1 + biases]:
            whole[f"h.{i}.qkv.{kind}"] = join([arrays[f"h.{i}.{part}_proj.{kind}"] for part in "qkv"])
    return whole


def _joined() -> Case:
    a = _attention()
    truth = {f"h.{i}.qkv.weight": ("joined", f"'h.{i}.q_proj.weight', 'h.{i}.k_proj.weight' and") for i in range(2)}
    truth |= {f"h.{i}.qkv.bias": ("joined", f"'h.{i}.q_proj.bias', ") for i in range(2)}
    return Case("fused q, k, v", Weights.of(a), Weights.of(_fused(a)), truth, HELD)


def _taken_apart() -> Case:
    b = _attention()
    truth = {}
    for i in range(2):
        for part, place in (("q", "rows 0 to 23"), ("k", "rows 24 to 31"), ("v", "rows 32 to 39")):
            truth[f"h.{i}.{part}_proj.weight"] = ("split", f"{place} of 'h.{i}.qkv.weight'")
            truth[f"h.{i}.{part}_proj.bias"] = ("split", f"{place.replace('rows', 'elements')} of 'h.{i}.qkv.bias'")
    return Case("split q, k, v", Weights.of(_fused(b)), Weights.of(b), truth, HELD)


def _head_by_head() -> Case:
    """As GPT-NeoX and BLOOM have it: q, k and v of a head, then those of the next."""
    a = _attention()

    def join(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([rows for head in zip(*(np.split(x, 4) for x in parts), strict=True) for rows in head])

    truth = {f"h.{i}.qkv.weight": ("joined", "in turn") for i in range(2)}
    return Case("fused head by head", Weights.of(a), Weights.of(_fused(a, join, biases=False)), truth, HELD)


def _on_the_columns() -> Case:
    """As GPT-2 has it: inputs first."""
    a = {key: np.ascontiguousarray(x.T) for key, x in _attention().items()}
    b = _fused(a, lambda parts: np.concatenate(parts, axis=-1))
    truth = {f"h.{i}.qkv.weight": ("joined", "their columns after each other") for i in range(2)}
    truth |= {f"h.{i}.qkv.bias": ("joined", "") for i in range(2)}
    return Case("fused on the columns", Weights.of(a), Weights.of(b), truth, HELD)


def _experts() -> Case:
    rng = np.random.default_rng(13)
    a = {f"experts.{i}.up.weight": rng.standard_normal((6, 5)).astype(np.float32) for i in range(8)}
    b = {"experts.up.weight": np.stack([a[f"experts.{i}.up.weight"] for i in range(8)])}
    truth = {"experts.up.weight": ("joined", "'experts.2.up.weight' and 5 others, as its slices")}
    return Case("stacked experts", Weights.of(a), Weights.of(b), truth, HELD)


def _one_value_off() -> Case:
    """Fused, and one number is another: nothing is said that is not so."""
    a = {key: x for key, x in _attention().items() if "bias" not in key}
    b = _fused(a, biases=False)
    b["h.1.qkv.weight"][30, 3] += 1
    truth = {"h.0.qkv.weight": ("joined", ""), "h.1.qkv.weight": ("added", "")}
    truth |= {f"h.1.{part}_proj.weight": ("removed", "") for part in "qkv"}
    return Case("fused, one number changed", Weights.of(a), Weights.of(b), truth)


def _tie_broken() -> Case:
    a, b = base(), base()
    del a[HEAD]
    b[HEAD] = b[EMBED].copy()
    truth = {HEAD: ("tie", "tensor of its own")}
    return Case("tie broken", Weights.of(a, ties={HEAD: EMBED}), Weights.of(b), truth, HELD)


def _metadata() -> Case:
    return Case(
        "metadata only",
        Weights.of(base(), meta={"step": "1"}),
        Weights.of(base(), meta={"step": "2"}),
        {},
        "identical, other metadata",
    )


def _packed() -> Case:
    from steelyard.codecs.entropy import Entropy

    a = base()
    b = {key: pack(x, Entropy()) if key == UP else x for key, x in a.items()}
    truth = {UP: ("same values", "held as plain and as entropy")}
    return Case("packed", Weights.of(a), Weights.of(b), truth, HELD)


def _zero_size() -> Case:
    a, b = base() | {"empty": np.zeros((0, 4), np.float32)}, base() | {"empty": np.zeros((4, 0), np.float32)}
    return Case("zero size, another shape", Weights.of(a), Weights.of(b), {"empty": ("shape", "0×4 became 4×0")})


def _constant_rows() -> Case:
    a, b = base(), base()
    a[UP][:] = 0.5
    b[UP][:] = 0.5
    b[UP][::2] = -0.5
    return Case(
        "constant rows flipped", Weights.of(a), Weights.of(b), {UP: ("sign flips", "576 elements changed sign")}
    )


def _prefix_and_tuned() -> Case:
    """Behind another prefix, in another dtype, and trained further: the values are compared all the same."""
    rng = np.random.default_rng(3)
    a = base()
    b = {
        f"module.{key}": (x * (1 + 0.1 * rng.standard_normal(x.shape))).astype(x.dtype)
        if x.ndim == 2 and x.dtype == np.float32
        else x
        for key, x in a.items()
    }
    truth = {f"module.{k}": ("values" if a[k].ndim == 2 and a[k].dtype == np.float32 else "renamed", "") for k in a}
    return Case("prefix and new values", Weights.of(a), Weights.of(b), truth, was={f"module.{k}": k for k in a})


def cases() -> list[Case]:
    """All of them."""
    order = np.random.default_rng(5).permutation
    rows, columns = order(48), order(24)
    everywhere = np.random.default_rng(6).permutation(48 * 24)
    nan, payload = 0x7FC00000, 0x7FC00123
    cut = {"attn.q": "self_attn.q_proj", "mlp.up": "mlp.up_proj", "norm": "input_layernorm"}

    def hugging(name: str) -> str:
        for old, new in cut.items():
            name = name.replace(f".{old}.", f".{new}.")
        return name

    return [
        _edit("NaN appeared", _set((3, 4), np.nan), "NaN appeared", "NaN appeared in 1 element"),
        _both("NaN vanished", _bits((3, 4), nan), _set((3, 4), 0.1), "NaN vanished"),
        _both("NaN stays", _bits((3, 4), nan), _bits((3, 4), nan), ""),
        _both("NaN payload", _bits((3, 4), nan), _bits((3, 4), payload), "NaN payload"),
        _both("all NaN, one number", _set((...,), np.nan), _one_number, "NaN vanished"),
        _edit("Inf appeared", _set((0, 0), -np.inf), "Inf appeared", "1 element"),
        _both("tiny sign flip", _set((9, 9), 1e-7), _set((9, 9), -1e-7), "sign flips"),
        _both("sign of zero", _set((9, 9), 0.0), _set((9, 9), -0.0), "zero signs"),
        _both("subnormal", _bits((9, 9), 1), _bits((9, 9), 3), "values"),
        _edit("one bit", _one_ulp, "values"),
        _exact_in_bfloat16(),
        _rounded_to_bfloat16(),
        _float8(),
        _renamed("renamed", hugging),
        _renamed("prefix", lambda name: f"module.{name}"),
        _prefix_and_tuned(),
        _edit("permuted rows", lambda x: x[rows], "permuted rows", "of 48 rows moved"),
        _edit("permuted columns", lambda x: x[:, columns], "permuted columns", "of 24 columns moved"),
        _edit("permuted rows and columns", lambda x: x[rows][:, columns], "permuted rows and columns", "of 24 columns moved"),
        _renumbered_filters(),
        _renumbered_bits(),
        _edit("permuted rows, changed", lambda x: noisy(x[rows]), "permuted and changed", "48 rows moved"),
        _edit("permuted columns, changed", lambda x: noisy(x[:, columns]), "permuted and changed", "24 columns moved"),
        _trained_on(),
        _edit("permuted elements", lambda x: x.reshape(-1)[everywhere].reshape(x.shape), "permuted elements"),
        _edit("transposed", lambda x: x.T.copy(), "transposed", "48×24 became 24×48"),
        _edit("transposed, square", lambda x: x.T.copy(), "transposed", "24×24", key=Q),
        _edit("reshaped", lambda x: x.reshape(24, 48), "reshaped", "the same values"),
        _edit("scaled", lambda x: x * np.float32(0.37), "scaled", "0.37 times"),
        _edit("zeroed", lambda x: np.where(np.abs(x) < 0.01, np.float32(0), x), "zeroed"),
        _resharded(),
        _swapped(),
        _added_and_removed(),
        _grown(),
        _low_rank(),
        _low_rank(BF16),
        *(_joined(), _taken_apart(), _head_by_head(), _on_the_columns(), _experts(), _one_value_off()),
        _tie_broken(),
        _edit("counter", _set((), 8), "values", key="model.steps"),
        _edit("truth value", _set((0, 5), True), "values", key="model.mask"),
        _metadata(),
        _packed(),
        _zero_size(),
        _constant_rows(),
    ]  # fmt: skip
