"""MNIST and Fashion-MNIST: 28x28 images of ten classes from a file, the user's cache folder, or the network.

Decides where the data is looked for, what its checksums are and how it is split. Knows nothing of models but their
names.
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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from steelyard.errors import FormatError, ModelError, printable
from steelyard.learn.data import Examples, stratified
from steelyard.learn.measures import accuracy, cross_entropy
from steelyard.learn.models import model as build
from steelyard.learn.task import SPLITS, Interface, Split, Task


@dataclass(frozen=True)
class Published:
    """A set of four IDX files: where they are, and the SHA-256 of each (or of what is inside, where gzip varies)."""

    name: str
    mirrors: tuple[str, ...]
    files: Mapping[str, str]
    classes: tuple[str, ...]
    inside: bool = False


# The four files as published by LeCun, Cortes and Burges (1998).
MNIST = Published(
    "mnist",
    ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    {
        "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    tuple(map(str, range(10))),
)
FASHION = Published(
    "fashion-mnist",
    ("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",),
    {
        "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
    inside=True,
)


def mnist(
    *,
    path: str | None = None,
    seed: int = 0,
    batch_size: int = 128,
    model: str = "lenet-5",
    limit: int | None = None,
    shift: int = 0,
) -> Task:
    """Handwritten digits, 1x28x28 in [0, 1] (LeCun et al. 1998).

    path: a folder with the four published IDX files (gzip or not), or an ``.npz`` with ``images`` and ``labels``;
    None: the user's cache folder, which is filled from the network, with checksums, when it is empty. The published
    test images are the test split, and a twelfth of the others is for validation; an ``.npz`` is divided 60-15-25.
    limit: the number of training images, None for all. shift: each training image is moved by up to so many pixels
    along each axis, anew in each epoch, zeros moving in (0: none). Raises ModelError if there is no data, FormatError
    for a damaged file.
    """
    return _task(MNIST, path, seed, batch_size, model, limit, shift)


def fashion_mnist(
    *,
    path: str | None = None,
    seed: int = 0,
    batch_size: int = 128,
    model: str = "lenet-5",
    limit: int | None = None,
    shift: int = 0,
) -> Task:
    """Pictures of ten kinds of clothing, 1x28x28 in [0, 1] (Xiao, Rasul, Vollgraf 2017); the options of `mnist`."""
    return _task(FASHION, path, seed, batch_size, model, limit, shift)


def _task(
    published: Published, path: str | None, seed: int, batch_size: int, model: str, limit: int | None, shift: int
) -> Task:
    if not 0 <= shift < 28:
        raise ModelError(f"shift={shift}: expected 0 to 27 pixels")
    if path and path.endswith(".npz"):
        images, labels, rows = _from_npz(path, seed)
    else:
        images, labels, rows = _from_folder(published, path, seed)
    if limit is not None:
        if not 1 <= limit <= len(rows["train"]):
            raise ModelError(f"limit={limit}: expected 1 to {len(rows['train'])}, the images there are to train on")
        rows["train"] = np.sort(np.random.default_rng([seed, 0x6E]).permutation(rows["train"])[:limit])
    scaled = {split: torch.from_numpy(images[rows[split]][:, None]).float() / 255 for split in SPLITS}
    targets = {split: torch.from_numpy(labels[rows[split]].astype(np.int64)) for split in SPLITS}
    data = Examples(scaled, targets, batch_size, seed, partial(shifted, most=shift) if shift else None)
    interface = Interface((1, 28, 28), 10)
    return Task(
        name=published.name,
        build=partial(build, model, interface),
        batches=data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        interface=interface,
        classes=published.classes,
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


def _from_folder(published: Published, path: str | None, seed: int) -> Found:
    folder = Path(path) if path else _cache() / published.name
    if path and not folder.is_dir():
        raise ModelError(f"{printable(path)}: expected a folder with the IDX files, or an .npz file")
    if not path:
        _download(published, folder)
    images, labels = (
        [_idx(_file(folder, name)) for name in published.files if kind in name] for kind in ("images", "labels")
    )
    for part in range(2):
        _check(images[part], labels[part], str(folder))
    parts = stratified(labels[0], seed, valid=1 / 12, test=0.0)
    test = np.arange(len(labels[1])) + len(labels[0])
    rows: dict[Split, np.ndarray] = {"train": parts["train"], "valid": parts["valid"], "test": test}
    return np.concatenate(images), np.concatenate(labels), rows


def _cache() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("steelyard")


def _file(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / name.removesuffix(".gz")):
        if candidate.is_file():
            return candidate
    raise ModelError(f"{printable(str(folder))}: {name} is missing: put the four IDX files there")


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


def _download(published: Published, folder: Path) -> None:
    """Fetch what is missing; a file appears under its name only when its checksum is right."""
    for name, checksum in published.files.items():
        if (folder / name).is_file() or (folder / name.removesuffix(".gz")).is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        data = _fetch(published, name, folder)
        found = hashlib.sha256(gzip.decompress(data) if published.inside else data).hexdigest()
        if found != checksum:
            raise FormatError(f"downloaded with SHA-256 {found}, published is {checksum}: try again later", path=name)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(data)
        os.replace(file.name, folder / name)


def _fetch(published: Published, name: str, folder: Path) -> bytes:
    reasons = []
    for mirror in published.mirrors:
        try:
            with urllib.request.urlopen(mirror + name, timeout=30) as answer:  # every address is https
                data: bytes = answer.read(32 << 20)
                return data
        except (urllib.error.URLError, OSError) as error:
            reasons.append(str(error))
    raise ModelError(
        f"{published.name} is not in {printable(str(folder))} and cannot be downloaded ({reasons[0]}): put the four "
        f"IDX files there, or give path= a folder or an .npz file, on a command line as "
        f"\"{published.name}(path='/data')\""
    )


def shifted(
    images: torch.Tensor,  # (n, channels, height, width)
    random: torch.Generator,
    most: int,
) -> torch.Tensor:
    """Each image moved by a whole number of pixels from -most to most along each axis; zeros move in."""
    height, width = images.shape[-2:]
    wide = torch.nn.functional.pad(images, (most, most, most, most))
    moved = torch.randint(0, (2 * most + 1) ** 2, (len(images),), generator=random)
    out = torch.empty_like(images)
    for place in moved.unique().tolist():
        down, right = divmod(place, 2 * most + 1)
        these = moved == place
        out[these] = wide[these, :, down : down + height, right : right + width]
    return out
