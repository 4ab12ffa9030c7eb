"""MNIST: 28x28 handwritten digits from a file, the user's cache folder, or the network with checksums.

Decides where the data is looked for and how it is split. Knows nothing of models but their names.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch

from steelyard.errors import FormatError, ModelError, printable
from steelyard.learn.data import Examples, stratified
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.models import model as build
from steelyard.learn.task import SPLITS, Interface, Split, Task

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")

# The four files as published by LeCun, Cortes and Burges (1998), and the SHA-256 of each.
FILES: Mapping[str, str] = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}


def mnist(
    *, path: str | None = None, seed: int = 0, batch_size: int = 128, model: str = "lenet-5", limit: int | None = None
) -> Task:
    """Handwritten digits, 1x28x28 in [0, 1] (LeCun et al. 1998).

    path: a folder with the four published IDX files (gzip or not), or an ``.npz`` with ``images`` and ``labels``;
    None: the user's cache folder, which is filled from the network, with checksums, when it is empty. The published
    test images are the test split, and a twelfth of the others is for validation; an ``.npz`` is divided 60-15-25.
    limit: the number of training images, None for all. Raises ModelError if there is no data, FormatError for a
    damaged file.
    """
    images, labels, rows = _from_npz(path, seed) if path and path.endswith(".npz") else _from_folder(path, seed)
    if limit is not None:
        if not 1 <= limit <= len(rows["train"]):
            raise ModelError(f"limit={limit}: expected 1 to {len(rows['train'])}, the images there are to train on")
        rows["train"] = np.sort(np.random.default_rng([seed, 0x6E]).permutation(rows["train"])[:limit])
    scaled = {split: torch.from_numpy(images[rows[split]][:, None]).float() / 255 for split in SPLITS}
    targets = {split: torch.from_numpy(labels[rows[split]].astype(np.int64)) for split in SPLITS}
    data = Examples(scaled, targets, batch_size, seed)
    interface = Interface((1, 28, 28), 10)
    return Task(
        name="mnist",
        build=partial(build, model, interface),
        batches=data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        interface=interface,
        classes=tuple(map(str, range(10))),
        features=tuple(f"pixel {row},{column}" for row in range(28) for column in range(28)),
        about={"seed": seed, "file": path, "examples": data.sizes},
    )


Found = tuple[np.ndarray, np.ndarray, dict[Split, np.ndarray]]


def _from_npz(path: str, seed: int) -> Found:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as found:
            images, labels = found["images"], found["labels"]
    except KeyError as error:
        raise FormatError("expected the arrays 'images' and 'labels'", path=path) from error
    except FileNotFoundError as error:
        raise ModelError(f"{printable(path)}: there is no such file") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"no readable npz file: {error}", path=path) from error
    _check(images, labels, path)
    return images, labels, stratified(labels, seed)


def _from_folder(path: str | None, seed: int) -> Found:
    folder = Path(path) if path else _cache()
    if path and not folder.is_dir():
        raise ModelError(f"{printable(path)}: expected a folder with the IDX files, or an .npz file")
    if not path:
        _download(folder)
    images, labels = ([_idx(_file(folder, name)) for name in FILES if kind in name] for kind in ("images", "labels"))
    for part in range(2):
        _check(images[part], labels[part], str(folder))
    published = stratified(labels[0], seed, valid=1 / 12, test=0.0)
    test = np.arange(len(labels[1])) + len(labels[0])
    rows: dict[Split, np.ndarray] = {"train": published["train"], "valid": published["valid"], "test": test}
    return np.concatenate(images), np.concatenate(labels), rows


def _cache() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("steelyard") / "mnist"


def _file(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / name.removesuffix(".gz")):
        if candidate.is_file():
            return candidate
    raise ModelError(f"{printable(str(folder))}: {name} is missing: put the four IDX files of MNIST there")


def _idx(path: Path) -> np.ndarray:
    """The array of an IDX file: a magic number 0, 0, 8 (unsigned bytes), axes; the size of each axis; the bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise FormatError(f"no readable gzip file: {error}", path=path) from error
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise FormatError(f"expected an IDX file of bytes, found {data[:4].hex()}", path=path, offset=0)
    shape = struct.unpack(f">{data[3]}I", data[4 : 4 + 4 * data[3]])
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if values.size != int(np.prod(shape, dtype=object)):
        raise FormatError(f"the header says {shape}, there are {values.size} bytes", path=path, offset=4)
    return values.reshape(shape)


def _check(images: np.ndarray, labels: np.ndarray, path: str) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
        raise FormatError(
            f"expected uint8 images (n, 28, 28) and n labels, found {images.dtype}{list(images.shape)} "
            f"and {list(labels.shape)}",
            path=path,
        )
    if not len(labels) or int(labels.max()) > 9 or int(labels.min()) < 0:
        raise FormatError("expected labels from 0 to 9", path=path)


def _download(folder: Path) -> None:
    """Fetch what is missing; a file appears under its name only when its checksum is right."""
    for name, checksum in FILES.items():
        if (folder / name).is_file() or (folder / name.removesuffix(".gz")).is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        data = _fetch(name, folder)
        found = hashlib.sha256(data).hexdigest()
        if found != checksum:
            raise FormatError(f"downloaded with SHA-256 {found}, published is {checksum}: try again later", path=name)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
        os.replace(file.name, folder / name)


def _fetch(name: str, folder: Path) -> bytes:
    reasons = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(mirror + name, timeout=30) as answer:  # both addresses are https
                data: bytes = answer.read(32 << 20)
                return data
        except (urllib.error.URLError, OSError) as error:
            reasons.append(str(error))
    raise ModelError(
        f"MNIST is not in {printable(str(folder))} and cannot be downloaded ({reasons[0]}): put the four IDX files "
        f"there, or give path= a folder or an .npz file"
    )
