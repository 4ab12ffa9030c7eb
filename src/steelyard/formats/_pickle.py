"""A reader of pickles that runs nothing: every object is plain data, or an inert record of what was wanted.

Decides what an opcode may make: numbers, text, bytes, lists, tuples, dicts and sets, and whatever the caller's
table of builders makes of a global that is on it. Any other global is remembered by its dotted name and the byte
where it stands; calling it, filling it or giving it a state only writes that down (`Foreign`), so that the data
inside still comes out. Nothing is imported, looked up or called by a name out of a file.

There is no recursion, and no more objects than opcodes; the opcodes are counted, and so is what builders copy.
Knows nothing of tensors or files; what each opcode does is in ``_opcodes``, what it may make in ``_inert``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from steelyard.errors import FormatError, printable, quoted
from steelyard.formats._inert import Foreign, Global, TooShortError, called
from steelyard.formats._opcodes import DIGITS, TABLE, stop

OPCODES = 4_000_000  # of one pickle: about 120,000 tensors
NAMES = 1000  # globals that are remembered

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
        data, table = self.data, TABLE
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
            if run is stop:
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
        return Foreign(called(target), self.here, args)

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
