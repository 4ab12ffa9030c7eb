"""The opcodes of pickles, each a function of the machine that reads: what it makes, and of what on the stack.

Decides nothing about names: what is imported, called or fetched by a key goes through the machine, which runs nothing.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from steelyard.errors import quoted
from steelyard.formats._inert import Dict, Foreign, TooShortError, called, kind

if TYPE_CHECKING:
    from steelyard.formats._pickle import Machine

DIGITS = 1000  # of a number in decimal digits


def _proto(m: Machine) -> None:
    version = m.take(1)[0]
    if version > 5:
        raise m.wrong(f"protocol {version} is not known; known are 0 to 5")


def _frame(m: Machine) -> None:
    count = m.number(8)
    if m.frame:
        raise m.wrong("a frame within a frame")
    if m.at + count > len(m.data):
        text = f"a frame of {count} bytes, {len(m.data) - m.at} follow; fetch it again"
        raise TooShortError(f"pickle: {text}", path=m.where, offset=m.here)
    m.frame = m.at + count if count else 0


def stop(_: Machine) -> None:
    """The end; the machine knows what to do."""


def _mark(m: Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.items()


def _pop_mark(m: Machine) -> None:
    m.items()


def _dup(m: Machine) -> None:
    m.stack.append(m.stack[-1])


def _int(m: Machine) -> None:
    text = m.line().strip()
    m.stack.append({"00": False, "01": True}[text] if text in ("00", "01") else m.decimal(text))


def _long(m: Machine) -> None:
    m.stack.append(m.decimal(m.line().strip().removesuffix("L")))


def _float(m: Machine) -> None:
    text = m.line(DIGITS)
    try:
        m.stack.append(float(text))
    except ValueError:
        raise m.wrong(f"expected a number, found {quoted(text)}") from None


def _binint(m: Machine) -> None:
    m.stack.append(int.from_bytes(m.take(4), "little", signed=True))


def _binfloat(m: Machine) -> None:
    m.stack.append(struct.unpack(">d", m.take(8))[0])


def _string(m: Machine) -> None:
    text = m.line().strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise m.wrong("expected a string in quotes")
    m.stack.append(text[1:-1].replace("\\n", "\n").replace("\\\\", "\\"))


def _unicode(m: Machine) -> None:
    raw = m.line().encode("utf-8", "surrogateescape")
    try:
        m.stack.append(raw.decode("raw-unicode-escape"))
    except UnicodeDecodeError:
        raise m.wrong("expected text with escapes") from None


def _append(m: Machine) -> None:
    value = m.stack.pop()
    _extend(m, m.stack[-1], [value])


def _appends(m: Machine) -> None:
    values = m.items()
    _extend(m, m.stack[-1], values)


def _extend(m: Machine, target: object, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif isinstance(target, Foreign):
        target.items.extend(values)
    elif isinstance(target, Dict):
        target.pairs.extend((value, None) for value in values)
    else:
        raise m.wrong(f"expected a list to append to, found {kind(target)}")


def _pairs(m: Machine, values: list[Any]) -> list[tuple[object, object]]:
    if len(values) % 2:
        raise m.wrong("a key without its value")
    return list(zip(values[::2], values[1::2], strict=True))


def _setitem(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _put(m, m.stack[-1], [key, value])


def _setitems(m: Machine) -> None:
    values = m.items()
    _put(m, m.stack[-1], values)


def _put(m: Machine, target: object, values: list[Any]) -> None:
    if isinstance(target, Dict):
        target.pairs.extend(_pairs(m, values))
    elif isinstance(target, Foreign):
        target.state.append(Dict(_pairs(m, values)))
    else:
        raise m.wrong(f"expected a dict to fill, found {kind(target)}")


def _frozenset(m: Machine) -> None:
    m.stack.append(Dict([(value, None) for value in m.items()]))


def _tuple1(m: Machine) -> None:
    m.stack[-1] = (m.stack[-1],)


def _tuple2(m: Machine) -> None:
    last = m.stack.pop()
    m.stack[-1] = (m.stack[-1], last)


def _tuple3(m: Machine) -> None:
    last, middle = m.stack.pop(), m.stack.pop()
    m.stack[-1] = (m.stack[-1], middle, last)


def _get(m: Machine) -> None:
    _recall(m, m.decimal(m.line(DIGITS)))


def _recall(m: Machine, index: int) -> None:
    if index not in m.memo:
        raise m.wrong(f"nothing was remembered as {index}")
    m.stack.append(m.memo[index])


def _put_memo(m: Machine) -> None:
    index = m.decimal(m.line(DIGITS))
    if not 0 <= index < 2**32:
        raise m.wrong("expected a memo index below 2^32")
    m.memo[index] = m.stack[-1]


def _binput(m: Machine) -> None:
    m.memo[m.data[m.at]] = m.stack[-1]
    m.at += 1


def _binget(m: Machine) -> None:
    index = m.data[m.at]
    m.at += 1
    if index not in m.memo:
        _recall(m, index)
    m.stack.append(m.memo[index])


def _memoize(m: Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _long_binput(m: Machine) -> None:
    index = m.number(4)
    m.memo[index] = m.stack[-1]


def _global(m: Machine) -> None:
    module = m.line()
    m.stack.append(m.imported(module, m.line()))


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.imported(module, name))


def _extension(width: int) -> Callable[[Machine], None]:
    def extension(m: Machine) -> None:
        m.stack.append(m.imported("extension", str(m.number(width))))

    return extension


def _reduce(m: Machine) -> None:
    args = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], args)


def _newobj(m: Machine) -> None:
    _reduce(m)


def _newobj_ex(m: Machine) -> None:
    named, args = m.stack.pop(), m.stack.pop()
    m.stack[-1] = Foreign(called(m.stack[-1]), m.here, (args, named))


def _inst(m: Machine) -> None:
    module = m.line()
    target = m.imported(module, m.line())
    args = tuple(m.items())
    m.stack.append(m.call(target, args))


def _obj(m: Machine) -> None:
    target, *args = m.items() or [None]
    m.stack.append(m.call(target, tuple(args)))


def _build(m: Machine) -> None:
    state = m.stack.pop()
    target = m.stack[-1]
    if isinstance(target, Foreign):
        target.state.append(state)
    # the attributes of a dict, a list or a tensor (such as _metadata of a state dict) are no weights


def _persid(m: Machine) -> None:
    _resolve(m, m.line())


def _binpersid(m: Machine) -> None:
    _resolve(m, m.stack.pop())


def _resolve(m: Machine, key: object) -> None:
    found = m.persistent(m, key, m.here) if m.persistent is not None else None
    if found is None:
        m.remember("persistent id")
        found = Foreign("persistent id", m.here, (key,))
    m.stack.append(found)


def _next_buffer(m: Machine) -> None:
    m.remember("out-of-band buffer")
    m.stack.append(Foreign("out-of-band buffer", m.here))


def _readonly_buffer(m: Machine) -> None:
    m.stack[-1] = m.stack[-1]


def _push(value: object) -> Callable[[Machine], None]:
    def push(m: Machine) -> None:
        m.stack.append(value)

    return push


def _fresh(make: Callable[[], object]) -> Callable[[Machine], None]:
    def fresh(m: Machine) -> None:
        m.stack.append(make())

    return fresh


def _collect(make: Callable[[Machine, list[Any]], object]) -> Callable[[Machine], None]:
    def collect(m: Machine) -> None:
        values = m.items()
        m.stack.append(make(m, values))

    return collect


def _counted(width: int, make: Callable[[Machine, bytes], object]) -> Callable[[Machine], None]:
    """An opcode with a length of `width` bytes and so many bytes after it."""

    def counted(m: Machine) -> None:
        count = m.number(width)
        m.stack.append(make(m, m.take(count)))

    return counted


def _unsigned(width: int) -> Callable[[Machine], None]:
    def unsigned(m: Machine) -> None:
        m.stack.append(m.number(width))

    return unsigned


def _byte(m: Machine) -> None:
    m.stack.append(m.data[m.at])
    m.at += 1


def _raw(_: Machine, data: bytes) -> bytes:
    return data


def _old_text(_: Machine, data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")  # what Python 2 called a string


def _text(m: Machine, data: bytes) -> str:
    return m.text(data)


def _integer(_: Machine, data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


_OPS: dict[bytes, Callable[[Machine], None]] = {
    b"(": _mark, b".": stop, b"0": _pop, b"1": _pop_mark, b"2": _dup,
    b"F": _float, b"I": _int, b"L": _long, b"S": _string, b"V": _unicode,
    b"J": _binint, b"K": _byte, b"M": _unsigned(2), b"G": _binfloat,
    b"T": _counted(4, _old_text), b"U": _counted(1, _old_text),
    b"X": _counted(4, _text), b"\x8c": _counted(1, _text), b"\x8d": _counted(8, _text),
    b"B": _counted(4, _raw), b"C": _counted(1, _raw), b"\x8e": _counted(8, _raw), b"\x96": _counted(8, _raw),
    b"\x8a": _counted(1, _integer), b"\x8b": _counted(4, _integer),
    b"N": _push(None), b"\x88": _push(True), b"\x89": _push(False), b")": _push(()),
    b"]": _fresh(list), b"}": _fresh(Dict), b"\x8f": _fresh(Dict),
    b"l": _collect(lambda _, values: values), b"t": _collect(lambda _, values: tuple(values)),
    b"d": _collect(lambda m, values: Dict(_pairs(m, values))),
    b"a": _append, b"e": _appends, b"\x90": _appends, b"s": _setitem, b"u": _setitems, b"\x91": _frozenset,
    b"\x85": _tuple1, b"\x86": _tuple2, b"\x87": _tuple3,
    b"g": _get, b"h": _binget, b"j": lambda m: _recall(m, m.number(4)),
    b"p": _put_memo, b"q": _binput, b"r": _long_binput, b"\x94": _memoize,
    b"c": _global, b"\x93": _stack_global,
    b"\x82": _extension(1), b"\x83": _extension(2), b"\x84": _extension(4),
    b"R": _reduce, b"\x81": _newobj, b"\x92": _newobj_ex, b"i": _inst, b"o": _obj, b"b": _build,
    b"P": _persid, b"Q": _binpersid, b"\x97": _next_buffer, b"\x98": _readonly_buffer,
    b"\x80": _proto, b"\x95": _frame,
}  # fmt: skip
TABLE: list[Callable[[Machine], None] | None] = [_OPS.get(bytes([code])) for code in range(256)]
