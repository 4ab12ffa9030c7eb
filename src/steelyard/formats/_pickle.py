"""A reader of pickles that runs nothing: every object is plain data, or an inert record of what was wanted.

Decides what an opcode may make: numbers, text, bytes, lists, tuples, dicts and sets, and whatever the caller's
table of builders makes of a global that is on it. Any other global is remembered by its dotted name and the byte
where it stands; calling it, filling it or giving it a state only writes that down (`Foreign`), so that the data
inside still comes out. Nothing is imported, looked up or called by a name out of a file.

There is no recursion, and no more objects than opcodes; the opcodes are counted, and so is what builders copy.
Dicts are lists of pairs, because the hash of a key out of a file can be made to collide or to take for ever.
Knows nothing of tensors or files.

Opcodes: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from steelyard.errors import FormatError, printable, quoted

OPCODES = 4_000_000  # of one pickle: about 120,000 tensors
NAMES = 1000  # globals that are remembered
DIGITS = 1000  # of a decimal number
LARGEST = 2**63 - 1


class TooShortError(FormatError):
    """The pickle goes on after the bytes that were given."""


@dataclass(eq=False, slots=True)
class Dict:
    """A dict, as the pairs that were put into it; for a key that is there twice the last one holds."""

    pairs: list[tuple[object, object]] = field(default_factory=list)

    def get(self, key: str) -> object:
        """The value under a key that is text, or None."""
        return next((value for name, value in reversed(self.pairs) if isinstance(name, str) and name == key), None)


@dataclass(frozen=True, eq=False, slots=True)
class Global:
    """A name that the pickle wanted to import, and the byte where it stands."""

    name: str
    at: int


@dataclass(eq=False, slots=True)
class Foreign:
    """What would have been an object of a foreign class or the result of a foreign call: only its data."""

    name: str
    at: int
    args: object = ()
    state: list[object] = field(default_factory=list)  # what BUILD and SETITEM would have given it
    items: list[object] = field(default_factory=list)  # what APPEND would have


Builder = Callable[["Machine", int, tuple[Any, ...]], object]  # (machine, byte, arguments) -> what a call makes


class Machine:
    """Reads one pickle in `data` from `start` on.

    `builders` are the globals that may be called, `persistent` makes objects of persistent ids, and errors and
    positions count bytes from `base`, the place of ``data[0]`` in the file that `where` names.

    >>> machine = Machine(b"cposix\\nsystem\\n(Vrm -rf /\\ntR.", where="x")
    >>> machine.load().name, machine.wanted
    ('posix.system', {'posix.system': 0})
    """

    def __init__(
        self,
        data: bytes,
        *,
        where: object,
        start: int = 0,
        base: int = 0,
        builders: Mapping[str, Builder] | None = None,
        persistent: Callable[[Machine, object, int], object] | None = None,
        wanted: dict[str, int] | None = None,
    ):
        self.data, self.at, self.base, self.where = data, start, base, where
        self.builders = {} if builders is None else builders
        self.persistent = persistent
        self.wanted: dict[str, int] = {} if wanted is None else wanted  # name -> byte where it stands first
        self.more = 0  # names that were not remembered, because there are too many
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.spent = 0
        self.frame = 0  # where the current frame ends; 0 = none
        self.op = start  # the byte of the opcode that is being run

    def load(self) -> Any:
        """The object; `at` is then the byte after the pickle. Raises FormatError, TooShortError if data is missing."""
        data, table = self.data, _TABLE
        while True:
            self.op = at = self.at
            if at >= len(data):
                raise TooShortError("the pickle ends without STOP; fetch it again", path=self.where, offset=self.here)
            self.spent += 1
            if self.spent > OPCODES:
                raise self.wrong(f"more than {OPCODES} operations; save the weights without what is beside them")
            run = table[data[at]]
            self.at = at + 1
            if run is None:
                raise self.wrong(f"expected an opcode, found {data[at : at + 1]!r}; the pickle is damaged or hostile")
            try:
                run(self)
            except IndexError:
                if self.at >= len(data):  # a byte was to be read, or there is no STOP
                    raise TooShortError("the pickle is cut off", path=self.where, offset=self.here) from None
                raise self.wrong(f"{run.__name__.strip('_').upper()} needs more than the stack holds") from None
            if self.frame and self.at >= self.frame:
                if self.at > self.frame:
                    raise self.wrong("an opcode reaches over the end of its frame")
                self.frame = 0
            if run is _stop:
                if self.frame or self.marks or len(self.stack) != 1:
                    raise self.wrong("STOP with an open frame, an open mark, or not exactly one object")
                return self.stack.pop()

    @property
    def here(self) -> int:
        """The byte of the current opcode in the file."""
        return self.base + self.op

    def wrong(self, text: str) -> FormatError:
        """An error at the current opcode."""
        return FormatError(f"pickle: {text}", path=self.where, offset=self.here)

    def charge(self, count: int) -> None:
        """Count `count` items that are copied as work, so that small pickles cannot ask for endless work."""
        self.spent += count

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.at + count
        if end > len(self.data):
            text = f"{count} bytes are announced, {len(self.data) - self.at} follow; fetch it again"
            raise TooShortError(text, path=self.where, offset=self.here)
        found = self.data[self.at : end]
        self.at = end
        return found

    def number(self, count: int) -> int:
        """The next `count` bytes as an unsigned number."""
        at = self.at
        if at + count > len(self.data):
            self.take(count)  # which says what is missing
        self.at = at + count
        return int.from_bytes(self.data[at : at + count], "little")

    def line(self, limit: int = 1 << 20) -> str:
        """The text up to the next end of line."""
        end = self.data.find(b"\n", self.at, self.at + limit)
        if end < 0 and len(self.data) - self.at < limit:
            raise TooShortError("a line of the pickle has no end", path=self.where, offset=self.here)
        if end < 0:
            raise self.wrong(f"a line of more than {limit} bytes")
        text = self.data[self.at : end].decode("utf-8", "surrogateescape")
        self.at = end + 1
        return text

    def items(self) -> list[Any]:
        """What was pushed since the last mark, which goes."""
        if not self.marks:
            raise self.wrong("there is no mark on the stack")
        found, self.stack = self.stack, self.marks.pop()
        return found

    def remember(self, name: str) -> None:
        """Write down that the pickle wanted `name`."""
        if name in self.wanted:
            return
        if len(self.wanted) < NAMES:
            self.wanted[name] = self.here
        else:
            self.more += 1

    def imported(self, module: object, name: object) -> Global:
        """The inert record of a global."""
        texts = [text if isinstance(text, str) else "?" for text in (module, name)]
        dotted = printable(".".join(text[:200] for text in texts))
        if dotted not in self.builders:
            self.remember(dotted)
        return Global(dotted, self.here)

    def call(self, target: object, args: object) -> object:
        """What a call of `target` stands for: the work of a builder, or a record."""
        if isinstance(target, Global):
            build = self.builders.get(target.name)
            if build is not None and isinstance(args, tuple):
                return build(self, self.here, args)
        return Foreign(_called(target), self.here, args)

    def text(self, raw: bytes) -> str:
        """UTF-8 as pickles have it, with halves of surrogate pairs."""
        try:
            return raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise self.wrong("text that is not UTF-8") from None

    def decimal(self, text: str) -> int:
        """A number in decimal digits."""
        try:
            if len(text) <= DIGITS:
                return int(text)
        except ValueError:
            pass
        raise self.wrong(f"expected a number of up to {DIGITS} digits, found {quoted(text)}")


def _called(target: object) -> str:
    return target.name if isinstance(target, (Global, Foreign)) else type(target).__name__


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


def _stop(_: Machine) -> None:
    pass


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
        raise m.wrong(f"expected a list to append to, found {_kind(target)}")


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
        raise m.wrong(f"expected a dict to fill, found {_kind(target)}")


def _kind(value: object) -> str:
    return quoted(value.name) if isinstance(value, (Global, Foreign)) else type(value).__name__


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
    m.stack[-1] = Foreign(_called(m.stack[-1]), m.here, (args, named))


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


def _integer(_: Machine, data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


_OPS: dict[bytes, Callable[[Machine], None]] = {
    b"(": _mark, b".": _stop, b"0": _pop, b"1": _pop_mark, b"2": _dup,
    b"F": _float, b"I": _int, b"L": _long, b"S": _string, b"V": _unicode,
    b"J": _binint, b"K": _byte, b"M": _unsigned(2), b"G": _binfloat,
    b"T": _counted(4, _old_text), b"U": _counted(1, _old_text),
    b"X": _counted(4, Machine.text), b"\x8c": _counted(1, Machine.text), b"\x8d": _counted(8, Machine.text),
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
_TABLE: list[Callable[[Machine], None] | None] = [_OPS.get(bytes([code])) for code in range(256)]
