"""The laws of formats, for every row of FORMATS: a new container is tested by existing."""

from __future__ import annotations

import os
import random
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from steelyard.core.packed import Codec, Packed, nest, pack
from steelyard.core.registry import Registry, Row
from steelyard.core.spec import DTYPES, DType, Spec
from steelyard.core.weights import Weight, Weights
from steelyard.errors import CodecError, FormatError, SteelyardError, printable
from steelyard.formats import FORMATS, WRITTEN, Writable, detect, manifest, open, write

ONE_TENSOR = {"npy"}  # formats whose file is one plain tensor and nothing else
FULL = [name for name in WRITTEN if name not in ONE_TENSOR]
PADDED = {"gguf"}  # formats whose file ends in zeros that fill it up, without which nothing is lost
SEVERAL = [name for name in WRITTEN if FORMATS[name].several]  # the path is that of an index beside the other files
LAW = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Planes(Codec):
    """A codec for these tests: the low and the high byte of uint16 values, and a key that must come back."""

    name: ClassVar[str] = "planes"
    lossless: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("low", "high")
    key: int = 0

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        mixed = x.astype(np.uint16) ^ np.uint16(self.key)
        return {"low": (mixed & 255).astype(np.uint16 if self.key else np.uint8), "high": (mixed >> 8).astype(np.uint8)}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        if set(parts) != {"low", "high"} or any(p.shape != spec.shape or p.dtype.kind != "u" for p in parts.values()):
            raise CodecError("planes: the parts do not fit")
        mixed = parts["low"].astype(np.uint16) | parts["high"].astype(np.uint16) << 8
        return (mixed ^ np.uint16(self.key)).astype(spec.dtype.numpy)


@dataclass(frozen=True)
class Nothing(Codec):
    """A codec without parts: all zeros."""

    name: ClassVar[str] = "nothing"
    lossless: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ()

    def encode(self, x: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def decode(self, parts: Mapping[str, np.ndarray], spec: Spec) -> np.ndarray:
        return np.zeros(spec.shape, spec.dtype.numpy)


@pytest.fixture(autouse=True)
def _codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"planes": Row(f"{__name__}:Planes"), "nothing": Row(f"{__name__}:Nothing")}
    monkeypatch.setattr(manifest, "CODECS", Registry("codec", "codecs-of-a-test", rows))
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Planes.__module__])


def bits(dtype: DType, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bits as `dtype`: every value that it has, NaN payloads and -0 included."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (*shape, dtype.numpy.itemsize), np.uint8)
    raw &= 1 if dtype.kind == "bool" else (1 << dtype.bits) - 1 if dtype.bits < 8 else 255
    if dtype.name in ("int4", "int2"):
        return (raw[..., 0].astype(np.int8) - (1 << dtype.bits - 1)).astype(dtype.numpy)
    return raw.view(dtype.numpy).reshape(shape)


def rich() -> Weights:
    """Plain and packed tensors, rank 0, zero size, a tie, metadata and names that need care."""
    codes = np.arange(12, dtype=np.uint16).reshape(3, 4) * 997
    return Weights.of(
        {
            "a.weight": bits(DTYPES["float32"], (2, 3)),
            "packed": pack(codes, nest(Planes(key=7), low=Planes())),
            "packed~/high": np.arange(3, dtype=np.uint8),
            "packed/high": bits(DTYPES["bfloat16"], (5,)),
            "empty": np.zeros((0, 3), np.float16),
            "zeros": pack(np.zeros((2, 2), np.int8), Nothing()),
            "scalar": np.array(-0.0),
            "näme\x1b[31m\n\u202e../": np.array([True, False]),
            "": np.int64([1]),
        },
        ties={"tied": "packed", "head": "a.weight"},
        meta={"format": "pt", "author": "É\n", "": ""},
    )


def sample(format: str) -> Weights:
    return Weights.of({"sample": bits(DTYPES["float32"], (3, 2))}) if format in ONE_TENSOR else rich()


def target(format: str, folder: Path) -> Path:
    return folder / f"sample{FORMATS[format].suffixes[0]}"


def files(format: str, path: Path) -> list[Path]:
    """The files that hold what was written to `path`, which is the last of them."""
    return [*sorted(other for other in path.parent.iterdir() if format in SEVERAL and other != path), path]


def bytes_of(paths: list[Path]) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in paths}


def same(found: Weights, expected: Weights) -> None:
    """Names, order, specs, values bit for bit, ties, metadata, and how each tensor is held."""
    assert list(found) == list(expected)
    assert dict(found.ties) == dict(expected.ties)
    assert dict(found.meta) == dict(expected.meta)
    for name, item in expected.items():
        assert found[name].spec == item.spec
        assert found[name].scheme == item.scheme
        a, b = found[name].array(), item.array()
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes()), name


def test_the_list_of_what_is_written_is_that_of_the_classes() -> None:
    assert set(WRITTEN) == {name for name, format in FORMATS.items() if issubclass(format, Writable)}


@pytest.mark.parametrize("format", WRITTEN)
def test_what_is_written_is_what_is_opened(format: str, tmp_path: Path) -> None:
    weights, path = sample(format), target(format, tmp_path)
    count = write(weights, path)
    assert count == sum(file.stat().st_size for file in files(format, path))
    assert detect(path) == format
    found = open(path)
    same(found, weights)
    same(open(path), found)
    for item in found.values():
        assert any(item.origin.startswith(f"{file} @") for file in files(format, path)) or item.name == "zeros"
        assert isinstance(item.read(), Packed) == (item.scheme is not None)


@pytest.mark.parametrize("format", WRITTEN)
def test_a_second_generation_is_the_same_file(format: str, tmp_path: Path) -> None:
    path = target(format, tmp_path)
    write(sample(format), path)
    first = bytes_of(files(format, path))
    write(open(path), path)  # onto the file that is being read
    assert bytes_of(files(format, path)) == first
    write(sample(format), path)
    assert bytes_of(files(format, path)) == first


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (4, 6)], ids=str)
def test_every_dtype_comes_back_or_is_refused(format: str, dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    path = target(format, tmp_path)
    weights = Weights.of({"sample": bits(DTYPES[dtype], shape)})
    odd = format in ("safetensors", "sharded") and weights["sample"].spec.size * DTYPES[dtype].bits % 8
    if dtype in FORMATS[format].dtypes and not odd:
        write(weights, path)
        same(open(path), weights)
    else:
        with pytest.raises(FormatError, match="sample"):
            write(weights, path)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", FULL)
def test_the_stored_bytes_are_those_in_the_file(format: str, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    small, large = target(format, tmp_path), target(format, tmp_path / "large")
    codes = np.arange(64, dtype=np.uint16)
    count = write(Weights.of({"w": pack(np.tile(codes, 500), Planes())}), small)
    more = write(Weights.of({"w": pack(np.tile(codes, 1500), Planes())}), large)
    grown = (open(large)["w"].stored or 0) - (open(small)["w"].stored or 0)
    assert abs((more - count) - grown) <= 64
    assert grown == 2 * 64 * 1000


@pytest.mark.parametrize("format", WRITTEN)
def test_opening_reads_the_header_only(format: str, tmp_path: Path) -> None:
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("this system does not count the bytes that a process reads")
    path = target(format, tmp_path)
    size = write(Weights.of({"sample": np.zeros(1 << 20, np.float32)}), path)
    open(path)

    def read_so_far() -> int:
        return int(counter.read_text().split()[1])

    nothing = -read_so_far() + read_so_far()
    before = read_so_far()
    open(path)
    assert read_so_far() - before - nothing < 10_000 < size // 100


@pytest.mark.parametrize("format", WRITTEN)
def test_nothing_is_read_before_it_is_needed_and_one_at_a_time(format: str, tmp_path: Path) -> None:
    reads: list[str] = []

    def lazy(item: Weight) -> Weight:
        return item.then(lambda x: (reads.append(item.name), x)[1])

    weights = Weights([lazy(item) for item in sample(format).values() if item.scheme is None])
    path = target(format, tmp_path)
    write(weights, path)
    assert sorted(reads) == sorted(weights)
    open(path)
    assert len(reads) == len(weights)


@pytest.mark.parametrize("format", WRITTEN)
def test_every_truncation_is_an_error_that_names_the_file(format: str, tmp_path: Path) -> None:
    path = target(format, tmp_path)
    write(Weights.of({"sample": np.float32([1, 2])}, meta={} if format in ONE_TENSOR else {"k": "v"}), path)
    for file, whole in bytes_of(files(format, path)).items():
        for count in range(len(whole.rstrip(b"\n"))):  # nobody misses the end of the last line of JSON
            file.write_bytes(whole[:count])
            if format in PADDED and not whole[count:].strip(b"\0"):
                assert open(path)["sample"].array().tolist() == [1, 2]
                continue
            with pytest.raises(SteelyardError) as caught:
                open(path).arrays()
            assert str(file) in str(caught.value), count
            assert "\n" not in str(caught.value)
        file.write_bytes(whole)


@pytest.mark.parametrize("format", WRITTEN)
def test_a_mutated_file_is_refused_or_valid(format: str, tmp_path: Path) -> None:
    path = target(format, tmp_path)
    write(sample(format), path)
    written = bytes_of(files(format, path))
    rng = random.Random(1)
    refused: list[str] = []
    for file in rng.choices(list(written), k=500):
        whole = written[file]
        at = rng.randrange(len(whole))
        file.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        try:
            open(path).arrays()
        except SteelyardError as error:
            refused.append(str(error))
        file.write_bytes(whole)
    assert len(refused) > 50
    assert not [text for text in refused if "\n" in text or len(text) > 1000]


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError, OSError])
def test_a_crash_while_writing_leaves_the_old_file_whole(
    format: str, error: type[BaseException], tmp_path: Path
) -> None:
    path = target(format, tmp_path)
    write(sample(format), path)
    before = bytes_of(files(format, path))

    def crash() -> np.ndarray:
        raise error("in the middle")

    for scheme in (None, pack(np.zeros(1, np.uint16), Planes()).scheme):
        items = [] if format in ONE_TENSOR else [*rich().values()]
        last = Weight("sample", Spec.of((2,), "int8"), crash, scheme=None if format in ONE_TENSOR else scheme)
        with pytest.raises(error, match="in the middle"):
            write(Weights([*items, last]), path)
        assert bytes_of(files(format, path)) == before
        assert sorted(tmp_path.iterdir()) == sorted(before)


@pytest.mark.parametrize("format", WRITTEN)
def test_a_full_disk_is_an_error_that_names_the_file(format: str, tmp_path: Path) -> None:
    path = target(format, tmp_path)
    plain = Weights.of({"sample": np.zeros(100_000, np.float32)})
    packed = Weights.of({"sample": pack(np.zeros(50_000, np.uint16), Planes(key=1))})
    write(sample(format), path)
    before = bytes_of(files(format, path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        for weights in (plain,) if format in ONE_TENSOR else (plain, packed):
            with pytest.raises(FormatError, match=r": cannot be written") as caught:
                write(weights, path)
            assert any(str(caught.value).startswith(f"{file}: ") for file in before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert bytes_of(files(format, path)) == before
    assert sorted(tmp_path.iterdir()) == sorted(before)


@pytest.mark.parametrize("format", WRITTEN)
def test_the_bytes_are_on_the_disk_before_the_old_file_goes(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = target(format, tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, os.fstat(fd).st_size)))
    count = write(sample(format), path)
    assert synced == [(file.stat().st_ino, file.stat().st_size) for file in files(format, path)]
    assert count == sum(size for _, size in synced)


@pytest.mark.parametrize("format", WRITTEN)
def test_values_that_are_not_as_announced_are_refused(format: str, tmp_path: Path) -> None:
    lie = Weight("sample", Spec.of((3,), "float32"), lambda: np.zeros(2, np.float32))
    with pytest.raises(SteelyardError, match="announced"):
        write(Weights([lie]), target(format, tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", FULL)
def test_a_packed_tensor_need_not_be_announced(format: str, tmp_path: Path) -> None:
    packed = pack(np.arange(5, dtype=np.uint16), Planes())
    assert isinstance(packed, Packed)
    surprise = Weight("w", packed.spec, lambda: packed)
    weights = Weights([Weight.of("a", np.float64([1, 2])), surprise, Weight.of("z", np.int8([3]))])
    path = target(format, tmp_path)
    write(weights, path)
    assert open(path)["w"].scheme == packed.scheme
    assert open(path)["w"].array().tolist() == [0, 1, 2, 3, 4]
    assert list(open(path)) == ["a", "w", "z"]


@pytest.mark.parametrize("format", WRITTEN)
def test_a_file_that_changed_after_it_was_opened_is_refused(format: str, tmp_path: Path) -> None:
    path = target(format, tmp_path)
    write(sample(format), path)
    weights = open(path)
    write(sample(format), path)
    with pytest.raises(FormatError, match="changed since it was opened"):
        next(iter(weights.values())).array()
    for file in files(format, path):
        file.unlink()
    with pytest.raises(FormatError, match="no such file"):
        next(iter(weights.values())).array()


@pytest.mark.parametrize("format", WRITTEN)
@pytest.mark.parametrize("suffix", ["", ".txt", ".safetensors", ".npz"])
def test_the_content_tells_the_format_not_the_suffix(format: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"sample{suffix}"
    write(sample(format), path, format)
    assert detect(path) == format
    same(open(path), sample(format))


@pytest.mark.parametrize("format", FULL)
def test_lone_surrogates_are_refused(format: str, tmp_path: Path) -> None:
    one = np.zeros(1, np.int8)
    for weights in (
        Weights.of({"\ud800": one}),
        Weights.of({"a": one}, meta={"k": "\udfff"}),
        Weights.of({"a": one}, ties={"\ud800": "a"}),
    ):
        with pytest.raises(FormatError, match="Unicode"):
            write(weights, target(format, tmp_path))
    assert os.listdir(tmp_path) == []


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = sorted(set.intersection(*(set(FORMATS[name].dtypes) for name in FULL)) - {"float4_e2m1fn"})


@st.composite
def collections(draw: Callable) -> Weights:
    names = draw(st.lists(NAMES, unique=True, max_size=6))
    values = {}
    for name in names:
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        array = bits(DTYPES[draw(st.sampled_from(PLAIN))], shape, draw(st.integers(0, 99)))
        plan = draw(st.sampled_from([None, Planes(), nest(Planes(3), low=Planes(), high=Planes(1))]))
        values[name] = pack(array, plan) if array.dtype == np.uint16 else array
    aliases = draw(st.dictionaries(NAMES, st.sampled_from(names), max_size=2)) if names else {}
    ties = {alias: name for alias, name in aliases.items() if alias not in names}
    return Weights.of(values, ties, draw(st.dictionaries(NAMES.filter(lambda t: t != "steelyard"), NAMES, max_size=3)))


@pytest.mark.parametrize("format", FULL)
@LAW
@given(weights=collections())
@example(weights=Weights([]))
@example(weights=Weights([], meta={"only": "metadata"}))
def test_any_collection_comes_back(format: str, weights: Weights, tmp_path: Path) -> None:
    path = target(format, tmp_path)
    if any("\0" in name for name in weights) and format == "npz":
        with pytest.raises(FormatError, match="zip"):
            write(weights, path)
        return
    if "__metadata__" in weights:
        return
    write(weights, path)
    same(open(path), weights)


@pytest.mark.parametrize("format", FULL)
@pytest.mark.parametrize(
    "change",
    [
        (b'"version":1', b'"version":2'),
        (b'"planes', b'"planet'),
        (b'"key', b'"kez'),
        (b'"packed~~/high', b'"packed~~/higi'),
        (b'"uint16', b'"uint17'),
        (b'"ties', b'"tied'),
        (b'"a.weight"}', b'"b.weight"}'),
        (b'"order":["a', b'"order":["b'),
        (b"[3,4]", b"[3,-]"),
        (b"[3,4]", b"{3,4]"),
        (b"[3,4]", b'"3,4"'),
    ],
    ids=lambda change: change[1].decode(),
)
def test_a_wrong_manifest_is_an_error_that_names_the_file(
    format: str, change: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = target(format, tmp_path)
    monkeypatch.setattr("steelyard.formats.safetensors.fold", lambda *_: None)  # so that the text stands in the file
    write(rich(), path)
    whole = path.read_bytes()
    old, new = (text.replace(b'"', b'\\"') if format in ("safetensors", "sharded") else text for text in change)
    assert old in whole
    path.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(FormatError, match=str(path)):
        open(path)


@pytest.mark.parametrize(
    "text", ["", "[", "1", "{}", "[" * 100_000, '{"version":1,"packed":' + "[" * 900 + "]" * 900 + "}"]
)
def test_a_hostile_manifest_is_a_format_error(text: str) -> None:
    with pytest.raises(FormatError, match=r"file\.x"):
        manifest.Manifest.parse(text, "file.x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "no file of weights"),
        (lambda path: path.write_bytes(b""), "empty"),
        (os.mkfifo, "regular file"),
        (lambda path: path.write_bytes(b"GIF89a, not weights at all"), "unknown format"),
        (lambda path: path.symlink_to(path), "symbolic links"),
    ],
    ids=["missing", "directory", "empty", "fifo", "unknown", "loop"],
)
def test_what_is_no_file_of_weights_is_named(make: Callable, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x\x1b[31m.weights"
    make(path)
    with pytest.raises(FormatError, match=message) as caught:
        open(path)
    assert printable(str(path)) in str(caught.value)


def test_where_it_cannot_be_written_it_says_so(tmp_path: Path) -> None:
    weights = Weights.of({"a": np.zeros(1)})
    for path, message in [
        (tmp_path / "a.unknown", "name ending in .safetensors"),
        (tmp_path / "no" / "a.npz", "create it first"),
        (tmp_path / ("x" * 300 + ".npz"), "cannot be written"),
        (Path("/dev/null"), "device"),
        (tmp_path, "directory"),
    ]:
        with pytest.raises(FormatError, match=message):
            write(weights, path, None if path.suffix else "safetensors")
    with pytest.raises(SteelyardError, match="did you mean 'safetensors'"):
        write(weights, tmp_path / "a", "safetensor")
    assert os.listdir(tmp_path) == []


def test_the_mode_of_a_file_and_a_link_to_it_are_kept(tmp_path: Path) -> None:
    path, link = tmp_path / "a.npz", tmp_path / "link.npz"
    write(Weights.of({"a": np.zeros(1)}), path)
    path.chmod(0o640)
    link.symlink_to(path)
    write(Weights.of({"b": np.zeros(1)}), link)
    assert link.is_symlink()
    assert list(open(path)) == ["b"]
    assert path.stat().st_mode & 0o777 == 0o640


def test_importing_and_opening_need_no_numpy(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write(Weights.of({"a": np.zeros(3, np.float32)}, ties={"b": "a"}), path)
    code = (
        "import sys; from steelyard.formats import open\n"
        f"w = open({str(path)!r}); print(w, list(w), dict(w.ties))\n"
        "print(sorted({'numpy', 'torch', 'ml_dtypes', 'numba', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "[]"


def test_a_header_length_of_the_size_of_the_file_is_no_safetensors_by_content(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(FormatError, match="unknown format"):
        open(path)
