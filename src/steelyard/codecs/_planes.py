"""One plane of symbols of at most eight bits as bytes, by whichever coder takes the fewest: see `Entropy`.

Decides the layout of a plane and which coders are worth trying. Knows nothing of dtypes and shapes.
"""

from __future__ import annotations

import numpy as np

from steelyard.errors import CodecError

RAW, CONSTANT, ADAPTIVE, CONTEXTS, STATIC = range(5)
FADING = ((1023, 1023), (255, 255), (255, 31), (60, 20))  # observations after which probabilities fade, by variant
MIXING = ((1023, 14), (1023, 30), (255, 14), (1023, 3))  # fading and speed of learning, by variant
THOROUGH = 1 << 20  # bits of symbols up to which every coder is tried
COUNTED = 1 << 20  # symbols that are counted at a time
SAMPLE = 1 << 17  # symbols by which the coder of a longer plane is chosen


def encode(symbols: np.ndarray, width: int, mode: str) -> bytes:
    """The plane of uint8 `symbols` (at least one), which lie in rows of `width`."""
    counts = _counts(symbols)
    top = counts.size - 1
    if counts[top] == symbols.size:
        return bytes([CONSTANT, top]) if top else bytes([CONSTANT])
    depth = top.bit_length()
    best = _raw(symbols, depth)
    if mode in ("auto", "static"):
        best = _static(symbols, counts, depth, len(best) - 1) or best
    slow = {"auto": (ADAPTIVE, CONTEXTS), "adaptive": (ADAPTIVE,), "contexts": (CONTEXTS,), "static": ()}[mode]
    if symbols.size * depth <= THOROUGH:
        return _smallest(symbols, depth, width, slow, len(best) - 1) or best
    start = symbols.size // width // 2 * width if width < symbols.size else 0
    some = np.ascontiguousarray(symbols[start : start + SAMPLE])
    bar = len(best) * some.size / symbols.size * (1 - 1 / 200) if mode == "auto" else 2 * some.size
    chosen = _smallest(some, depth, width, slow, int(bar))
    return (chosen and _coded(symbols, depth, width, chosen[0], len(best) - 1)) or best


def decode(stream: np.ndarray, size: int, width: int) -> np.ndarray:
    """`size` symbols from the bytes of a plane; raises CodecError for bytes that cannot be one."""
    coder, depth, variant = int(stream[0]) & 7, (int(stream[0]) >> 3 & 7) + 1, int(stream[0]) >> 6
    symbols, body = np.zeros(size, np.uint8), np.ascontiguousarray(stream[1:])
    if coder == CONSTANT:
        if body.size > 1:
            raise CodecError(f"entropy: {body.size} bytes for one symbol")
        symbols[:] = body[0] if body.size else 0
        return symbols
    if coder == RAW:
        return _from_raw(body, depth, symbols)
    if coder == STATIC:
        return _from_static(body, depth, variant, symbols)
    if coder not in (ADAPTIVE, CONTEXTS):
        raise CodecError(f"entropy: there is no coder {coder}; the stream is damaged or from a later version")
    if _run(symbols, body, depth, width, coder, variant, decoding=True) < 0:
        raise CodecError(f"entropy: {body.size} bytes are too few or too many for {size} symbols")
    return symbols


def varint(value: int) -> bytes:
    """7 bits a byte, the least first; the last byte has no top bit."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_varint(stream: np.ndarray, at: int) -> tuple[int, int]:
    """A varint and the place behind it; raises CodecError where the stream ends within it."""
    value = 0
    for i in range(9):
        if at + i >= stream.size:
            break
        value |= (int(stream[at + i]) & 127) << 7 * i
        if stream[at + i] < 128:
            return value, at + i + 1
    raise CodecError("entropy: the stream ends within a length")


def _counts(symbols: np.ndarray) -> np.ndarray:
    """How often each symbol occurs, up to the largest; in parts, because numpy widens what it counts."""
    counts = sum(np.bincount(symbols[at : at + COUNTED], minlength=256) for at in range(0, symbols.size, COUNTED))
    return np.trim_zeros(np.asarray(counts), "b")


def _smallest(symbols: np.ndarray, depth: int, width: int, coders: tuple[int, ...], room: int) -> bytes | None:
    """The shortest plane of at most `room` bytes by the given coders; of one coder, variants until one is no gain."""
    best = None
    for coder in coders:
        for variant in range(4):
            found = _coded(symbols, depth, width, coder + 8 * (depth - 1) + 64 * variant, room)
            if found is None:
                break
            best, room = found, len(found) - 1
    return best


def _coded(symbols: np.ndarray, depth: int, width: int, head: int, room: int) -> bytes | None:
    """A plane by the adaptive coder and variant that its first byte `head` names, or None if `room` is too small."""
    buffer = np.zeros(max(room - 1, 0), np.uint8)
    used = _run(symbols, buffer, depth, width, head & 7, head >> 6, decoding=False)
    return None if used < 0 else bytes([head]) + buffer[:used].tobytes()


def _run(
    symbols: np.ndarray, buffer: np.ndarray, depth: int, width: int, coder: int, variant: int, *, decoding: bool
) -> int:
    """Code `symbols` into `buffer` or decode them from it; the bytes used, or -1."""
    from steelyard.kernels import coder as kernels

    squash, stretch, rates = kernels.tables()
    if coder == ADAPTIVE:
        return int(kernels.code_adaptive(symbols, buffer, depth, *FADING[variant], rates, decoding))
    limit, rate = MIXING[variant]
    if depth == 1:  # of a mask, zeros are the usual; else a byte says what is
        return int(kernels.code_contexts(symbols, width, buffer, 1, 0, limit, rate, squash, stretch, rates, decoding))
    if not buffer.size:
        return -1
    if not decoding:
        buffer[0] = _counts(symbols).argmax()
    rest, usual = buffer[1:], int(buffer[0])
    used = int(kernels.code_contexts(symbols, width, rest, depth, usual, limit, rate, squash, stretch, rates, decoding))
    return used if used < 0 else used + 1


def _raw(symbols: np.ndarray, depth: int) -> bytes:
    from steelyard.kernels.bits import pack_bits

    packed = symbols if depth == 8 else pack_bits(symbols, depth)
    return bytes([RAW + 8 * (depth - 1)]) + packed.tobytes()


def _from_raw(body: np.ndarray, depth: int, symbols: np.ndarray) -> np.ndarray:
    from steelyard.kernels.bits import unpack_bits

    if body.size != (symbols.size * depth + 7) // 8:
        raise CodecError(f"entropy: {body.size} bytes do not hold {symbols.size} symbols of {depth} bits")
    unpack_bits(body, depth, symbols)
    return symbols


def _frequencies(counts: np.ndarray, total: int) -> np.ndarray:
    """`counts` scaled to a sum of `total`, with at least 1 for each symbol that occurs."""
    scaled = counts * (total / counts.sum())
    kept = np.where(counts > 0, np.maximum(1, np.rint(scaled)), 0).astype(np.int64)
    while (rest := total - int(kept.sum())) != 0:  # one by one, where it gains the most bits or costs the fewest
        step = 1 if rest > 0 else -1
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where((counts > 0) & (kept + step > 0), counts * np.log2((kept + step) / kept), -np.inf)
        kept[int(gain.argmax())] += step
    return kept


def _static(symbols: np.ndarray, counts: np.ndarray, depth: int, room: int) -> bytes | None:
    """The static plane with the sum of frequencies that suits best, or None if it does not fit in `room` bytes."""
    used, best = counts > 0, (float(room), -1, counts)
    for variant in range(4):
        bits = 8 + 2 * variant
        if np.count_nonzero(used) <= 1 << bits:
            kept = _frequencies(counts, 1 << bits)
            size = (counts[used] * (bits - np.log2(kept[used]))).sum() / 8 + len(_table(kept)) + 17
            best = min(best, (float(size), variant, kept), key=lambda b: b[0])
    _, variant, kept = best
    if variant < 0:
        return None
    from steelyard.kernels import rans

    words: np.ndarray = rans.encode(symbols, kept, 8 + 2 * variant)
    plane = bytes([STATIC + 8 * (depth - 1) + 64 * variant]) + _table(kept) + words.tobytes()
    return plane if len(plane) <= room else None


def _from_static(body: np.ndarray, depth: int, variant: int, symbols: np.ndarray) -> np.ndarray:
    from steelyard.kernels import rans

    kept, at = _read_table(body, depth, 1 << 8 + 2 * variant)
    if (body.size - at) % 2:
        raise CodecError("entropy: the words of a static plane are cut off")
    words = np.frombuffer(body[at:].tobytes(), np.uint16)
    if not rans.decode(words, kept, 8 + 2 * variant, symbols):
        raise CodecError(f"entropy: {words.size} words do not hold {symbols.size} symbols")
    return symbols


def _table(kept: np.ndarray) -> bytes:
    """Frequencies as bits, least significant first: 4 for the length of each and those below its top one.

    A length of 0 is followed by 8 bits, how many more zeros come. The table ends where the sum is complete.
    """
    bits, at, i = 0, 0, 0
    while i < kept.size:
        f = int(kept[i])
        length = f.bit_length()
        bits |= length << at
        at += 4
        if f:
            bits |= (f ^ 1 << length - 1) << at
            at += length - 1
            i += 1
        else:
            run = int(np.argmax(kept[i:] > 0))
            bits |= run - 1 << at
            at += 8
            i += run
    return bits.to_bytes((at + 7) // 8, "little")


def _read_table(body: np.ndarray, depth: int, total: int) -> tuple[np.ndarray, int]:
    """Frequencies that sum to `total`, and where the words begin; raises CodecError if they do not."""
    bits = int.from_bytes(body[:1024].tobytes(), "little")  # a table is shorter: 256 x (4 + 14) bits
    kept = np.zeros(1 << depth, np.int64)
    at, i, left = 0, 0, total
    while left > 0 and i < kept.size:
        length = bits >> at & 15
        at += 4
        if length:
            kept[i] = 1 << length - 1 | bits >> at & (1 << length - 1) - 1
            left -= int(kept[i])
            at += length - 1
            i += 1
        else:
            i += (bits >> at & 255) + 1
            at += 8
    if left or (at + 7) // 8 > body.size:
        raise CodecError("entropy: the frequencies of a static plane do not add up")
    return kept, (at + 7) // 8
