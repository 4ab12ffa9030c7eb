"""What a file says of its packed tensors has a sum: a header in which a bit has flipped is refused, not believed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import steelyard as sy
from steelyard.errors import FormatError, SteelyardError
from steelyard.formats.sharded import Sharded

JOINED = "joined by steelyard"
META = {"format": "pt", "note": 'an "é"'}


def weights() -> sy.Weights:
    """Two packed tensors that are joined, one with two parts, a plain one and a tie; so large that nothing is folded."""
    short = [sy.pack(np.arange(20 + i, dtype=np.int8), sy.Entropy()) for i in range(2)]
    wide = sy.pack(np.linspace(-1, 1, 1 << 18, dtype=np.float32).reshape(512, -1), sy.Affine(4))
    values = {"a.bias": short[0], "w": wide, "b.bias": short[1], "plain": np.ones(9, np.float32)}
    return sy.Weights.of(values, ties={"tied": "a.bias"}, meta=META)


def same(found: sy.Weights, want: sy.Weights) -> bool:
    """Whether the names, their order, the ties, codecs and values are those of `want`."""
    if list(found) != list(want) or dict(found.ties) != dict(want.ties):
        return False
    pairs = [(item, want[name]) for name, item in found.items()]
    return all(a.scheme == b.scheme and np.array_equal(a.array(), b.array()) for a, b in pairs)


def verdicts(path: Path, bits: range | list[int]) -> Counter[str]:
    """What becomes of a file, or of the set that an index names, when each of these bits flips alone."""
    raw, found = path.read_bytes(), Counter[str]()
    want = sy.open(path)
    want = sy.Weights.of({name: item.read() for name, item in want.items()}, ties=want.ties, meta=want.meta)
    with path.open("r+b", buffering=0) as file:
        for bit in bits:
            at, mask = bit >> 3, 1 << (bit & 7)
            file.seek(at)
            file.write(bytes([raw[at] ^ mask]))
            try:
                opened = sy.open(path)
                meta = "" if dict(opened.meta) == META else ", in the user's metadata"
                found[f"opened{meta}" if same(opened, want) else f"wrong at bit {bit}"] += 1
            except SteelyardError as error:
                found["refused" if path.name in str(error) else f"no file is named: {error}"] += 1
            file.seek(at)
            file.write(raw[at : at + 1])
    return found


def split(path: Path) -> tuple[bytes, dict[str, str], bytes]:
    """The header, its metadata and the data."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    return raw[8:start], json.loads(raw[8:start])["__metadata__"], raw[start:]


def test_every_bit_of_the_header_counts_but_those_of_the_users_own_texts(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sy.write(weights(), path)
    header, told, _ = split(path)
    assert json.loads(told["steelyard"])["sum"]
    found = verdicts(path, range(8 * (8 + len(header))))
    own = len("format" + "pt" + "note" + 'an \\"é\\"'.encode().decode("latin1"))
    assert set(found) == {"refused", "opened, in the user's metadata"}
    assert 0.5 * 8 * own < found["opened, in the user's metadata"] <= 8 * own
    assert same(sy.open(path), weights())


def test_an_index_is_as_safe(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors.index.json"
    sy.write(weights(), path, Sharded(1 << 17))
    raw = path.read_bytes()
    keys = [8 * at + i for key in (b"metadata", b"steelyard", b"total_size") for at in range(raw.index(key), raw.index(key) + len(key)) for i in range(8)]  # fmt: skip
    found = verdicts(path, sorted({*keys, *range(0, 8 * len(raw), 7)}))
    assert set(found) == {"refused", "opened, in the user's metadata"}


def test_other_programs_may_write_the_header_in_their_own_way(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other.safetensors"
    sy.write(weights(), path)
    header, told, data = split(path)
    save_file(load_file(path), other, {**told, "more": "a note"})  # the reference library: another order of everything
    assert split(other)[0].split(b"}}")[-1] != header.split(b"}}")[-1]
    assert set(sy.open(other)) == set(weights())
    assert dict(sy.open(other).meta) == {**META, "more": "a note"}
    again = sy.open(other).arrays()
    assert all(np.array_equal(item.array(), again[name]) for name, item in weights().items())
    text = json.dumps(json.loads(header), indent=3, ensure_ascii=True).encode()
    own = json.loads(told["steelyard"])
    for spelt in (text, text.replace(json.dumps(told["steelyard"]).encode(), json.dumps(json.dumps(own)).encode())):
        other.write_bytes(len(spelt).to_bytes(8, "little") + spelt + data)
        assert same(sy.open(other), weights())


def test_what_was_changed_on_purpose_says_so_by_having_no_sum(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other.safetensors"
    sy.write(weights(), path)
    told, arrays = split(path)[1], {**load_file(path), "new": np.zeros(3, np.float32)}
    save_file(arrays, other, told)
    with pytest.raises(FormatError, match=r"other.safetensors: what it says .* its CRC-32 is .*take 'sum' out of the"):
        sy.open(other)
    own = json.loads(told["steelyard"])
    del own["sum"], own["order"]
    save_file(arrays, other, told | {"steelyard": json.dumps(own)})
    assert set(sy.open(other)) == {*weights(), "new"}
    for bad in (-1, 1 << 32, "1", None, 1.0, [1]):
        save_file(arrays, other, told | {"steelyard": json.dumps({**own, "sum": bad})})
        with pytest.raises(FormatError, match="sum: expected a CRC-32 from 0 to"):
            sy.open(other)


def test_an_infinity_in_the_text_is_no_defect(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    sy.write(weights(), path)
    _, told, _ = split(path)
    save_file(
        load_file(path), path, told | {"steelyard": told["steelyard"].replace('"sum":', '"order":[1e999],"sum":')}
    )
    with pytest.raises(FormatError):
        sy.open(path)
    save_file(load_file(path), path, {"mine": '{"version":1,"x":1e999,"sum":7}'})
    with pytest.raises(FormatError, match="lost"):
        sy.open(path)


def test_joined_tensors_without_their_metadata_are_told(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other.safetensors"
    sy.write(weights(), path)
    assert JOINED in load_file(path)
    save_file(load_file(path), other)  # which keeps no metadata
    with pytest.raises(FormatError, match=r"other.*its array 'joined by steelyard' is several packed tensors, .* lost"):
        sy.open(other)


def test_a_user_may_have_an_array_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    bytes_of_his = np.arange(5, dtype=np.uint8)
    for values in ({JOINED: bytes_of_his}, {**weights(), JOINED: sy.Weight.of(JOINED, bytes_of_his)}):
        whole = sy.Weights.of({n: v.read() if isinstance(v, sy.Weight) else v for n, v in values.items()})
        sy.write(whole, path)
        assert same(sy.open(path), whole)
        sy.write(whole, tmp_path / "x.safetensors.index.json", Sharded(1 << 17))
        assert same(sy.open(tmp_path / "x.safetensors.index.json"), whole)
    save_file({JOINED: np.ones(3, np.float32)}, path)
    assert list(sy.open(path)) == [JOINED]
