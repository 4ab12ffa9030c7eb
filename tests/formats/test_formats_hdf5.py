"""HDF5: h5py as oracle, the order of Keras, what is left out and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steelyard.errors import FormatError, MissingExtraError
from steelyard.formats import detect, locate, open

h5py = pytest.importorskip("h5py", reason="HDF5 needs h5py: pip install 'steelyard[formats]'")
LAYOUTS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "chunked": {"chunks": (7, 33)},
    "deflated": {"chunks": (16, 5), "compression": "gzip"},
    "all filters": {"chunks": (16, 5), "compression": 9, "shuffle": True, "fletcher32": True},
    "resizable": {"chunks": (64, 64), "maxshape": (None, None)},
}
TYPES = ["f2", "f4", "f8", ">f4", ">f8", "i1", "i2", ">i4", "i8", "u1", ">u2", "u4", "u8", "?"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_layout_and_type_is_what_h5py_reads(dtype: str, layout: str, tmp_path: Path) -> None:
    values = (np.random.default_rng(0).normal(size=(40, 33)) * 50).astype(dtype)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("a/b", data=values, **LAYOUTS[layout])
    item = open(tmp_path / "x.h5")["a/b"]
    expected = values.astype(values.dtype.newbyteorder("="))
    assert item.spec.dtype.numpy == expected.dtype
    assert item.array().tobytes() == expected.tobytes()
    assert (item.fill is not None) == (layout == "contiguous")
    assert np.concatenate([block.copy() for block in item.blocks(100)]).tobytes() == expected.tobytes()


def test_what_lies_in_the_header_or_nowhere_comes_from_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((3,))
        found = h5py.h5d.create(file.id, b"compact", h5py.h5t.IEEE_F32BE, space, dcpl=plist)
        found.write(h5py.h5s.ALL, h5py.h5s.ALL, np.float32([1, 2, 3]))
        file.create_dataset("filled", (2, 2), "f4", fillvalue=2)
        file.create_dataset("unwritten", (2,), "i8", chunks=(1,))
        file["scalar"] = np.float64(-0.0)
        file["none"] = np.zeros((0, 3), np.float16)
        brain = h5py.h5t.IEEE_F16LE.copy()
        brain.set_fields(15, 7, 8, 0, 7)
        brain.set_ebias(127)
        found = h5py.h5d.create(file.id, b"bfloat16", brain, space)
        found.write(h5py.h5s.ALL, h5py.h5s.ALL, np.float32([1, -2, 0.5]))
    arrays = open(path).arrays()
    assert {name: value.tolist() for name, value in arrays.items()} == {
        "bfloat16": [1, -2, 0.5],
        "compact": [1, 2, 3],
        "filled": [[2, 2], [2, 2]],
        "none": [],
        "scalar": -0.0,
        "unwritten": [0, 0],
    }
    assert arrays["bfloat16"].dtype.name == "bfloat16"
    assert np.signbit(arrays["scalar"])


def keras2(file: Any, base: str = "", *, cut: bool = False) -> None:
    """The weights of a Keras 2 model: two layers, in an order that is not that of their names."""
    group = file.require_group(base) if base else file
    group.attrs["layer_names"] = [b"zeta", b"flatten", b"alpha"]
    for layer in ("zeta", "flatten", "alpha"):
        below = group.create_group(layer)
        names = [] if layer == "flatten" else [f"{layer}/kernel:0".encode(), f"{layer}/bias:0".encode()]
        if cut:
            below.attrs["weight_names0"], below.attrs["weight_names1"] = names[:1], names[1:]
        else:
            below.attrs["weight_names"] = names
        for name in reversed(names):
            below[name] = np.zeros(3, np.float32)


@pytest.mark.parametrize("base", ["", "model_weights"])
@pytest.mark.parametrize("cut", [False, True])
def test_the_lists_of_keras_2_give_the_order(base: str, cut: bool, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        keras2(file, base, cut=cut)
        file.attrs["model_config"] = '{"class_name": "Lambda", "code": "import os"}'
        file.attrs["keras_version"] = np.bytes_("2.1.5")
        file["optimizer_weights/step"] = np.int64(3)
    prefix = f"{base}/" if base else ""
    weights = open(tmp_path / "x.h5")
    assert list(weights) == [
        *(f"{prefix}{name}" for name in ("zeta/zeta/kernel:0", "zeta/zeta/bias:0")),
        *(f"{prefix}{name}" for name in ("alpha/alpha/kernel:0", "alpha/alpha/bias:0")),
        "optimizer_weights/step",
    ]
    assert weights.meta == {"model_config": '{"class_name": "Lambda", "code": "import os"}', "keras_version": "2.1.5"}


def test_the_variables_of_keras_3_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "model.weights.h5"
    with h5py.File(path, "w") as file:
        for number in range(12):
            file[f"layers/dense/vars/{number}"] = np.float32(number)
    assert [item.array() for item in open(path).values()] == list(range(12))
    assert locate(tmp_path).path == path


def test_hard_links_are_ties_and_loops_end(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["embed"] = np.float32([1, 2])
        file["head"] = file["embed"]
        file["again"] = file["/"]
        file["deep/up"] = file["/"]
    weights = open(tmp_path / "x.h5")
    assert list(weights) == ["embed"]
    assert weights.ties == {"head": "embed"}


def test_what_is_no_number_is_named_and_left_out(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["kept"] = np.float32(1)
        file["text"] = "hello"
        file["record"] = np.zeros(3, [("a", "f4"), ("b", "i4")])
        file["nothing"] = h5py.Empty("f4")
        file["type"] = np.dtype("f4")
        file["soft"] = h5py.SoftLink("/kept")
        file["reference"] = file["kept"].ref
        file.create_dataset("lzf", data=np.zeros(9), compression="lzf")
    weights = open(tmp_path / "x.h5")
    assert list(weights) == ["kept", "lzf"]
    for name in ("text", "record", "nothing", "type", "soft", "reference"):
        assert f"'{name}': " in weights.meta["skipped"]
    with pytest.raises(FormatError, match=r"'lzf': the filter 32000 \(lzf\) is not undone here"):
        weights["lzf"].array()


def test_opening_reads_no_values(tmp_path: Path) -> None:
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("this system does not count the bytes that a process reads")
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        for number in range(4):
            file[f"layers/{number}"] = np.zeros(1 << 20, np.float32)
        file.create_dataset("deflated", data=np.ones(1 << 20), chunks=(999,))
    assert detect(path) == "hdf5"
    open(path)

    def read_so_far() -> int:
        return int(counter.read_text().split()[1])

    nothing = -read_so_far() + read_so_far()
    before = read_so_far()
    open(path)
    assert read_so_far() - before - nothing < 100_000


def test_without_h5py_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file["a"] = np.zeros(1)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'steelyard\[formats\]'"):
        open(path)
