"""The laws that every codec keeps, over every row of CODECS. A new row is tested by existing."""

from __future__ import annotations

import json
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.codecs import CODECS
from steelyard.codecs._blocks import Blocks
from steelyard.core.packed import Codec, Packed, Scheme, nest, pack, smallest
from steelyard.core.recipe import Reader, parse_call, to_data
from steelyard.core.spec import DTYPES, Spec
from steelyard.errors import CodecError
from steelyard.formats.layout import Layout, dismantle

READER = Reader(CODECS, {})

# Configurations beyond the default, as written in a recipe. A row without an entry is tested with its default.
CONFIGURATIONS = {
    "affine": [
        "affine(bits=1)",
        "affine(bits=2, axis=0)",
        "affine(bits=3, symmetric=False)",
        "affine(bits=4, group=3)",
        "affine(bits=5, axis=-1, symmetric=False)",
        "affine(bits=8, group=5, symmetric=False)",
        "affine(bits=1, symmetric=False)",
        "affine(bits=1, group=2)",
    ],
    "floatgrid": [
        "floatgrid(block=None)",
        "floatgrid(grid='e2m1', block=4, scales='e8m0')",
        "floatgrid(grid='e2m1', block=3, scales='e4m3')",
        "floatgrid(grid='e4m3', block=5)",
        "floatgrid(grid='e5m2', block=None, scales='e8m0')",
        "floatgrid(grid='e3m2', scales='e4m3')",
        "floatgrid(grid='e2m3', block=1)",
    ],
    "vectors": ["vectors(k=2, width=3)", "vectors(k=4, width=2, product=True)", "vectors(k=65536, width=1)"],
    "lowrank": ["lowrank(rank=1)", "lowrank(rank=3)"],
    "scaled": ["scaled(axis=0)"],
    "palette": ["palette(k=1)", "palette(k=3)", "palette(k=65536)"],
    "delta": ["delta(bits=1)", "delta(bits=8)", "delta(bits=16)"],
    "trellis": ["trellis(step=0.3)", "trellis(states=1, lagrangian=0.0)", "trellis(states=32, turn=False)"],
    "nm": ["nm(m=1)", "nm(m=8, axis=0)", "nm(m=16, axis=-1)"],
    "ggml": ["ggml(type='q8_1')", "ggml(type='nvfp4')"],
    "entropy": ["entropy(mode='static')", "entropy(mode='adaptive')", "entropy(mode='contexts')"],
}
TEXTS = [text for name in CODECS for text in (name, *CONFIGURATIONS.get(name, ()))]
DTYPE_NAMES = list(DTYPES)
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (5, 9), (2, 3, 4)]
BLOCKS = [(256,), (3, 2, 256)]  # whole rows of blocks, for the codecs that hold nothing else
CONTENTS = ["zeros", "constant", "few", "normal", "sparse", "bytes"]


def codec_of(text: str) -> Codec:
    return READER.codec(parse_call(text))


def tensor(dtype: str, shape: tuple[int, ...], content: str, seed: int = 0) -> np.ndarray:
    """A tensor of any dtype; 'bytes' are random bits: NaN, infinities, -0.0 and subnormals among them."""
    rng = np.random.default_rng([seed, len(dtype), len(content), *shape])
    spec = Spec.of(shape, dtype)
    size, to = spec.size, spec.dtype.numpy
    if content == "bytes" and spec.dtype.bits >= 8 and spec.dtype.kind != "bool":
        return rng.integers(0, 256, size * to.itemsize, np.uint8).view(to).reshape(shape)
    signed = spec.dtype.kind in ("float", "int", "complex") and dtype != "float8_e8m0fnu"
    values = {
        "zeros": lambda: np.zeros(size),
        "constant": lambda: np.ones(size),
        "few": lambda: rng.choice([0.0, 1.0, -1.0 if signed else 0.0], size),
        "normal": lambda: rng.standard_normal(size) * 3,
        "sparse": lambda: rng.standard_normal(size) * (rng.random(size) < 0.2) * 3,
        "bytes": lambda: rng.integers(0, 2, size).astype(np.float64),
    }[content]()
    if spec.dtype.kind in ("int", "uint"):
        values = np.rint(values).clip(
            -(2 ** (min(spec.dtype.bits, 32) - 1)) if signed else 0, 2 ** min(spec.dtype.bits - signed, 31) - 1
        )
    with np.errstate(all="ignore"):
        return (values if signed else np.abs(values)).astype(to).reshape(shape)


def fitting(codec: Codec, x: np.ndarray) -> np.ndarray:
    """`x`, rounded to whole numbers for the codec that holds small multiples of one step alone."""
    if codec.name != "multiples" or x.dtype.kind != "f":
        return x
    return (np.rint(x) + 0).astype(x.dtype).reshape(x.shape)  # + 0: no negative zeros


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def parse(packed: Packed) -> Packed:
    """Through the description and the plain arrays that a file holds."""
    description, leaves = dismantle("w", packed)
    layout = Layout.parse(json.loads(json.dumps(description)), "w", READER.codec, "w")
    assert sorted(layout.keys()) == sorted(leaves)
    return layout.assemble(leaves.__getitem__)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """The root of the sum of squares of differences."""
    with np.errstate(all="ignore"):
        return float(np.linalg.norm((x.astype(np.float64) - y.astype(np.float64)).reshape(-1)))


def parts_of(codec: Codec, x: np.ndarray) -> dict[str, np.ndarray]:
    """What holds `x`; of a codec that only decodes, whatever it might find in a file for a tensor of its shape."""
    if codec.encodes:
        return codec.encode(x)
    with pytest.raises(CodecError):
        codec.encode(x)
    assert isinstance(codec, Blocks)
    raw = np.random.default_rng(5).integers(0, 256, (codec.count(Spec.like(x)), codec.width), np.uint8)
    return {"blocks": raw}


def check(codec: Codec, x: np.ndarray) -> bool:
    """The laws for one codec and one tensor; whether the codec can hold it."""
    spec = Spec.like(x)
    before = x.tobytes()
    try:
        parts = codec.encode(x)
    except CodecError:
        return False
    assert codec.encodes, "a codec that says so encodes nothing"
    assert x.tobytes() == before, "encode must not change its argument"
    assert set(parts) <= set(codec.parts)
    y = codec.decode(parts, spec)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    if codec.lossless:
        assert same(x, y)
    if codec.settled:
        assert same(codec.decode(codec.encode(y), spec), y), "encoding what was decoded changes nothing"
    elif x.size:
        assert distance(x, y) <= 1.001 * distance(x, 0 * x), "zeros would be nearer"
        z = codec.decode(codec.encode(y), spec)
        slack = (
            2e-3 if x.size > 64 else 0.25
        )  # of few numbers one may be worth less than its bits, and go the second time
        assert distance(y, z) <= distance(x, y) + slack * distance(x, 0 * x), (
            "the second time loses less than the first"
        )
    held = pack(x, codec)
    assert isinstance(held, Packed)
    assert same(held.array(), y), "inner codecs do not change the result"
    assert same(parse(held).array(), y)
    return True


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_shape_dtype_and_values_survive(text: str, dtype: str) -> None:
    codec = codec_of(text)
    held = [check(codec, tensor(dtype, shape, content)) for shape in SHAPES + BLOCKS for content in CONTENTS]
    if codec.encodes:
        assert any(held) or dtype != ("int8" if text == "bits" else "float32"), "no tensor that it holds was tried"
    if codec.name == "entropy" or codec.name in ("bitmask", "delta"):
        assert all(held), f"{text} is for every dtype"
    if codec.name == "bits":
        assert all(held) == (DTYPES[dtype].kind in ("int", "uint", "bool"))


@pytest.mark.parametrize("text", TEXTS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_bits_of_any_shape(text: str, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=3)))
    name = data.draw(st.sampled_from([d for d in DTYPE_NAMES if DTYPES[d].bits >= 8 and d != "bool"]))
    spec = Spec.of(shape, name)
    raw = data.draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))
    check(codec_of(text), np.frombuffer(raw, np.uint8).view(spec.dtype.numpy).reshape(shape).copy())


@pytest.mark.parametrize("text", ["affine", *CONFIGURATIONS["affine"]])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_affine_is_idempotent_for_every_finite_tensor(text: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["float32", "float16", "bfloat16", "float64"]))
    unit = data.draw(st.sampled_from([0.0, 1e-320, 1e-43, 1e-39, 6e-8, 1.0, 3e4, 1e38, 1e308]))
    base = data.draw(st.sampled_from([0.0, 1.0, -3.0]))
    values = data.draw(st.lists(st.floats(-1, 1), min_size=1, max_size=12))
    with np.errstate(all="ignore"):
        x = (np.array(values) * unit + base).astype(DTYPES[name].numpy)
    if np.isfinite(x.astype(np.float64)).all() and (unit < 1e308 or "axis=-1" not in text):
        codec = codec_of(text)
        check(codec, x)
        check(codec, x.reshape(1, -1))


@pytest.mark.parametrize("text", TEXTS)
def test_the_configuration_is_data(text: str) -> None:
    codec = codec_of(text)
    data = json.loads(json.dumps(to_data(codec)))
    assert READER.plan(data) == codec
    assert type(codec) is CODECS[codec.name]
    assert READER.codec(codec.name) == type(codec)()
    if text != codec.name:
        assert any(getattr(codec, f.name) != f.default for f in fields(codec)), "an entry that says nothing new"


NESTINGS = [
    nest(
        CODECS["bitmask"](), mask=CODECS["entropy"](), values=nest(CODECS["palette"](k=16), codes=CODECS["entropy"]())
    ),
    nest(
        CODECS["delta"](),
        gaps=CODECS["entropy"](),
        values=nest(CODECS["palette"](k=65536), codebook=CODECS["entropy"]()),
    ),
    nest(CODECS["palette"](k=65536), codes=nest(CODECS["bitmask"](), values=CODECS["bits"]())),
    nest(CODECS["affine"](group=4), codes=CODECS["entropy"](), scale=CODECS["entropy"]()),
    smallest(None, CODECS["bitmask"](), CODECS["entropy"](), nest(CODECS["palette"](k=16), codes=CODECS["entropy"]())),
    nest(CODECS["bitmask"](), values=smallest(CODECS["entropy"](), CODECS["delta"]()), mask=None),
]


@pytest.mark.parametrize("plan", NESTINGS, ids=range(len(NESTINGS)))
@pytest.mark.parametrize("shape", SHAPES)
def test_nested_equals_unnested(plan: object, shape: tuple[int, ...]) -> None:
    x = tensor("float32", shape, "few")
    assert READER.plan(json.loads(json.dumps(to_data(plan)))) == plan
    held = pack(x, plan)
    if isinstance(held, Packed):
        flat = pack(x, Scheme(held.codec, dict.fromkeys(held.codec.parts)))
        assert same(held.array(), flat.array())
        assert same(parse(held).array(), held.array())
        leaves = dismantle("w", held)[1]
        assert held.nbytes == sum(a.nbytes for a in leaves.values())
    else:
        assert same(held, x)


def damaged(parts: dict[str, np.ndarray], rng: np.random.Generator) -> list[dict[str, np.ndarray]]:
    """Ways in which a file can be wrong about each part."""
    found: list[dict[str, np.ndarray]] = [{}]
    for name, value in parts.items():
        flat = value.reshape(-1)
        others: list[np.ndarray] = [
            flat[:-1],
            flat[: flat.size // 2],
            np.concatenate([flat, flat[-1:]]),
            value[None],
            np.zeros(0, value.dtype),
            value.astype(np.float64 if value.dtype != np.float64 else np.int8),
        ]
        for _ in range(12):
            noise = rng.integers(0, 256, value.nbytes, np.uint8)
            others.append((noise % 2 if value.dtype == np.bool_ else noise).view(value.dtype).reshape(value.shape))
            if value.nbytes and value.dtype != np.bool_:
                hit = np.ascontiguousarray(flat).copy()
                hit.view(np.uint8)[rng.integers(value.nbytes)] ^= 1 << rng.integers(8)
                others.append(hit.reshape(value.shape))
        found += [{k: v for k, v in parts.items() if k != name}]
        found += [{**parts, name: other} for other in others]
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dtype", ["float32", "uint8", "bool", "int64"])
def test_damage_is_an_error_or_an_array(text: str, dtype: str) -> None:
    codec, rng = codec_of(text), np.random.default_rng(7)
    messages: list[str] = []
    for shape in [(40, 30), (17,), (), (0,), (3, 256)]:
        x = fitting(codec, tensor(dtype, shape, "sparse"))
        try:
            parts = parts_of(codec, x)
        except CodecError:
            continue
        for wrong in damaged(parts, rng):
            try:
                y = codec.decode(wrong, Spec.like(x))
                assert (y.shape, y.dtype) == (x.shape, x.dtype)
            except CodecError as error:
                messages.append(str(error))
        for other in (Spec.of((3, 11), dtype), Spec.of((0,), dtype), Spec.of(shape, "float16"), Spec.of(shape, "int2")):
            try:
                y = codec.decode(parts, other)
                assert (y.shape, y.dtype) == (other.shape, other.dtype.numpy)
            except CodecError as error:
                messages.append(str(error))
    assert all("\n" not in message for message in messages)
    if DTYPES[dtype].kind == "float" and codec.name != "bits":
        assert len(messages) > 10


def test_a_shape_that_no_memory_holds_is_an_error() -> None:
    huge = Spec.of((1 << 40, 1 << 20), "float32")
    stream = np.frombuffer(b"\x01", np.uint8)  # one constant plane
    with pytest.raises(CodecError, match="memory"):
        CODECS["entropy"]().decode({"stream": stream}, huge)
    with pytest.raises(CodecError):
        CODECS["bits"]().decode({"stream": np.zeros(1, np.uint8)}, Spec.of(huge.shape, "int8"))
    with pytest.raises(CodecError, match="memory"):
        CODECS["delta"]().decode({"gaps": np.zeros(0, np.uint8), "values": np.zeros(0, np.float32)}, huge)


@pytest.mark.parametrize("name", [name for name in CODECS if CODECS[name].encodes])
def test_a_codec_that_is_broken_breaks_the_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = CODECS[name]
    shape = (2, 256) if issubclass(cls, Blocks) else (5, 9)
    x = fitting(cls(), tensor("int8" if name == "bits" else "float32", shape, "normal"))
    assert check(cls(), x)
    right = cls.decode

    def wrong(self: Codec, parts: dict[str, np.ndarray], spec: Spec) -> np.ndarray:
        y = right(self, parts, spec).copy()
        y.reshape(-1)[0] += 1 if self.settled else 1000
        return y

    monkeypatch.setattr(cls, "decode", wrong)
    with pytest.raises(AssertionError):
        check(cls(), x)
