"""The K types of GGML: 256 elements share a float16 scale, and each 16 or 32 of them a small whole one of their own.

Decides how the scales are searched for when encoding (GGML's search, for all blocks at once) and how a block is
laid out; decodes bit for bit as GGML does. Knows no file.
Source: ggml-quants.c and ggml-common.h of https://github.com/ggml-org/ggml, and gguf-py beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from steelyard.codecs._blocks import (
    NONLINEAR,
    Blocks,
    bit_planes,
    half,
    inverse,
    nibbles,
    to_bit_planes,
    to_half,
    to_nibbles,
)


@dataclass(frozen=True)
class Q2K(Blocks):
    """x = d s q - dmin m with s, m of 4 bits for 16 elements and q of 2 bits: 2.625 bits an element. Only decoded."""

    name: ClassVar[str] = "q2_k"
    encodes: ClassVar[bool] = False
    block: ClassVar[int] = 256
    width: ClassVar[int] = 84

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d s q - dmin m."""
        scales = raw[:, :16]
        s = half(raw, 80) * (scales & 15)  # (n, 16)
        m = half(raw, 82) * (scales >> 4)
        q = bit_planes(raw[:, 16:80], 32, 2).reshape(-1, 16, 16)
        return np.asarray(s[..., None] * q - m[..., None]).reshape(-1, 256)


@dataclass(frozen=True)
class Q3K(Blocks):
    """x = d (s - 32) (q - 4) with s of 6 bits for 16 elements and q of 3 bits: 3.4375 bits an element. Only decoded."""

    name: ClassVar[str] = "q3_k"
    encodes: ClassVar[bool] = False
    block: ClassVar[int] = 256
    width: ClassVar[int] = 110

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d (s - 32) (q - 4); a high bit that is set stands for no 4 to take away."""
        s = nibbles(raw[:, 96:104], 8) | bit_planes(raw[:, 104:108], 4, 2) << 4
        d = half(raw, 108) * (s.view(np.int8) - np.int8(32))  # (n, 16)
        q = bit_planes(raw[:, 32:96], 32, 2) | bit_planes(raw[:, :32], 32, 1) << 2
        return np.asarray(d[..., None] * (q.view(np.int8) - np.int8(4)).reshape(-1, 16, 16)).reshape(-1, 256)


@dataclass(frozen=True)
class Q4K(Blocks):
    """x = d s q - dmin m with s, m of 6 bits for 32 elements and q of 4 bits: 4.5 bits an element.

    >>> x = np.sin(np.arange(256, dtype=np.float32))
    >>> blocks = Q4K().encode(x)["blocks"]
    >>> blocks.shape
    (1, 144)
    """

    name: ClassVar[str] = "q4_k"
    block: ClassVar[int] = 256
    width: ClassVar[int] = 144

    def pack_blocks(self, x: np.ndarray, /) -> np.ndarray:
        """d, dmin, 12 bytes of scales, then 128 bytes of codes."""
        head, codes = _with_minimum(x, 15, self.name)
        return np.concatenate([head, to_nibbles(codes, 32)], axis=1)

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d s q - dmin m."""
        return _from_minimum(raw, nibbles(raw[:, 16:], 32))


@dataclass(frozen=True)
class Q5K(Blocks):
    """x = d s q - dmin m with s, m of 6 bits for 32 elements and q of 5 bits: 5.5 bits an element."""

    name: ClassVar[str] = "q5_k"
    block: ClassVar[int] = 256
    width: ClassVar[int] = 176

    def pack_blocks(self, x: np.ndarray, /) -> np.ndarray:
        """d, dmin, 12 bytes of scales, 32 bytes of fifth bits, then 128 of the other four."""
        head, codes = _with_minimum(x, 31, self.name)
        return np.concatenate([head, to_bit_planes(codes >> 4, 32, 1), to_nibbles(codes & 15, 32)], axis=1)

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d s q - dmin m."""
        return _from_minimum(raw, nibbles(raw[:, 48:], 32) | bit_planes(raw[:, 16:48], 32, 1) << 4)


@dataclass(frozen=True)
class Q6K(Blocks):
    """x = d s (q - 32) with s of 8 bits for 16 elements and q of 6 bits: 6.5625 bits an element."""

    name: ClassVar[str] = "q6_k"
    block: ClassVar[int] = 256
    width: ClassVar[int] = 210

    def pack_blocks(self, x: np.ndarray, /) -> np.ndarray:
        """128 bytes of low halves, 64 of the two high bits, 16 of scales, then d."""
        parts = x.reshape(len(x), 16, 16)
        scale = _symmetric(parts, 32)  # (n, 16)
        largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1, keepdims=True), axis=1)  # (n, 1)
        factor = np.float32(-128) * inverse(largest)
        d = to_half(inverse(factor), self.name)
        s = np.rint(factor * scale).clip(-128, 127).astype(np.int8)
        step = inverse(d.view("<f2").astype(np.float32) * s)[..., None]
        q = (np.rint(parts * step).clip(-32, 31).astype(np.int8) + np.int8(32)).view(np.uint8).reshape(len(x), 256)
        return np.concatenate([to_nibbles(q & 15, 64), to_bit_planes(q >> 4, 32, 2), s.view(np.uint8), d], axis=1)

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d s (q - 32)."""
        q = nibbles(raw[:, :128], 64) | bit_planes(raw[:, 128:192], 32, 2) << 4
        d = half(raw, 208) * raw[:, 192:208].view(np.int8)  # (n, 16)
        return np.asarray(d[..., None] * (q.view(np.int8) - np.int8(32)).reshape(-1, 16, 16)).reshape(-1, 256)


@dataclass(frozen=True)
class IQ4XS(Blocks):
    """x = d (s - 32) v(q) with s of 6 bits for 32 elements, q of 4 bits and v of iq4_nl: 4.25 bits. Only decoded."""

    name: ClassVar[str] = "iq4_xs"
    encodes: ClassVar[bool] = False
    block: ClassVar[int] = 256
    width: ClassVar[int] = 136

    def unpack_blocks(self, raw: np.ndarray, /) -> np.ndarray:
        """d (s - 32) v(q)."""
        low = np.stack((raw[:, 4:8] & 15, raw[:, 4:8] >> 4), axis=-1).reshape(-1, 8)  # the low half comes first
        s = low | bit_planes(raw[:, 2:4], 1, 2) << 4
        d = half(raw, 0) * (s.view(np.int8) - np.int8(32))  # (n, 8)
        levels = np.array(NONLINEAR, np.float32)
        q = nibbles(raw[:, 8:], 16)
        return np.asarray(d[..., None] * levels[q].reshape(-1, 8, 32)).reshape(-1, 256)


def _from_minimum(raw: np.ndarray, q: np.ndarray) -> np.ndarray:
    """d s q - dmin m, of codes (n, 256) and blocks that begin with d, dmin and the 12 bytes of s and m."""
    a, b, c = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    s = np.concatenate([a & 63, c & 15 | a >> 2 & 48], axis=1)  # (n, 8)
    m = np.concatenate([b & 63, c >> 4 | b >> 2 & 48], axis=1)
    scale, low = half(raw, 0) * s, half(raw, 2) * m
    out = scale[..., None] * q.reshape(-1, 8, 32)
    out -= low[..., None]
    return np.asarray(out).reshape(-1, 256)


def _with_minimum(x: np.ndarray, top: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """d, dmin and the scales as bytes (n, 16), and the codes (n, 256) from 0 to top."""
    parts = x.reshape(len(x), 8, 32)
    scale, low = _search(parts, top)  # (n, 8): x is about scale * q - low, and both are at least 0
    heads, sixes, steps = [], [], []
    for values in (scale, low):
        largest = values.max(axis=1, keepdims=True)  # (n, 1)
        heads.append(to_half(largest / np.float32(63), name))
        sixes.append(np.rint(values * (np.float32(63) * inverse(largest))).clip(0, 63).astype(np.uint8))
        steps.append(heads[-1].view("<f2").astype(np.float32) * sixes[-1])
    s, m = sixes
    first = s[:, :4] | (s[:, 4:] & 48) << 2
    second = m[:, :4] | (m[:, 4:] & 48) << 2
    third = s[:, 4:] & 15 | (m[:, 4:] & 15) << 4
    codes = np.rint((parts + steps[1][..., None]) * inverse(steps[0])[..., None]).clip(0, top).astype(np.uint8)
    return np.concatenate([*heads, first, second, third], axis=1), codes.reshape(len(x), 256)


def _search(parts: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The scale and the amount below zero of each (n, 8, 32) that suit best, elements weighing by their magnitude.

    For 22 ways to spread the codes, from that of the whole range on, both are fitted to the codes by least squares;
    the best of all is kept.
    """
    weight = np.sqrt(np.mean(parts * parts, axis=-1, keepdims=True)) + np.abs(parts)
    low = np.minimum(parts.min(axis=-1), np.float32(0))  # (n, 8), as all sums below
    span = parts.max(axis=-1) - low
    shifted, codes, weighted = parts - low[..., None], np.empty_like(parts), np.empty_like(parts)
    sum_w, sum_x = weight.sum(axis=-1), _dot(weight, parts)
    best_scale, best_low = span / np.float32(top), low
    best = np.full_like(low, np.inf)
    over_span = inverse(span)
    for way in (None, *range(21)):
        steps = np.float32(top if way is None else top - 1 + 0.1 * way)
        np.multiply(shifted, (steps * over_span)[..., None], out=codes)
        np.minimum(np.rint(codes, out=codes), np.float32(top), out=codes)
        np.multiply(weight, codes, out=weighted)
        sum_l, sum_ll, sum_xl = weighted.sum(axis=-1), _dot(weighted, codes), _dot(weighted, parts)
        if way is None:
            scale, at = best_scale, best_low
        else:
            over = inverse(sum_w * sum_ll - sum_l * sum_l)
            scale, at = (sum_w * sum_xl - sum_x * sum_l) * over, (sum_ll * sum_x - sum_l * sum_xl) * over
            scale = np.where(at > 0, sum_xl * inverse(sum_ll), scale)
            at = np.minimum(at, np.float32(0))
        # the weighted squares of what scale * codes + at misses, but for those of the elements, the same for all
        loss = scale * (scale * sum_ll + 2 * (at * sum_l - sum_xl)) + at * (at * sum_w - 2 * sum_x)
        better = (loss < best) & (scale > 0)
        best, best_scale, best_low = (
            np.where(better, new, old) for new, old in ((loss, best), (scale, best_scale), (at, best_low))
        )
    return best_scale, -best_low


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The sums over the last axis of products."""
    return np.asarray(np.einsum("...i,...i->...", a, b))


def _symmetric(parts: np.ndarray, zero: int) -> np.ndarray:
    """The scale of each (n, k, 16) by which codes from -zero to zero - 1 fit best, squares weighing by squares.

    19 scales around that which maps the element of the largest magnitude to -zero; each is fitted to its codes.
    """
    largest = np.take_along_axis(parts, np.abs(parts).argmax(axis=-1, keepdims=True), axis=-1)  # (n, k, 1)
    weight = parts * inverse(np.abs(largest))  # squares of what is not scaled could vanish in float32
    weight *= weight
    codes, weighted = np.empty_like(parts), np.empty_like(parts)
    best = np.zeros_like(largest[..., 0])
    best_scale = np.zeros_like(best)
    for i in (0, *range(-9, 0), *range(1, 10)):
        np.multiply(parts, np.float32(-(zero + 0.1 * i)) * inverse(largest), out=codes)
        np.clip(np.rint(codes, out=codes), np.float32(-zero), np.float32(zero - 1), out=codes)
        np.multiply(weight, codes, out=weighted)
        sum_lx, sum_ll = _dot(weighted, parts), _dot(weighted, codes)
        scale = sum_lx * inverse(sum_ll)
        gain = scale * sum_lx
        better = gain > best
        best, best_scale = np.where(better, gain, best), np.where(better, scale, best_scale)
    return best_scale
