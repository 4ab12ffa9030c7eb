"""Machine code of an ELF object put into memory: what a linker does, for objects that need nothing from outside.

LLVM can do that as well, and its library takes 45 MB of memory. Decides which objects are simple enough: x86-64 on
Linux, no data that is written to, no symbol that is not in the object, absolute and relative addresses only. All others
are left to LLVM. Knows nothing of who made an object: it is given whole and trusted ones.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from typing import Any, NamedTuple

_HEADER = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_RELOCATABLE, _X86_64 = 1, 62
_SYMBOLS, _RELOCATIONS, _UNWINDING, _NO_BYTES = 2, 4, 0x70000001, 8
_WRITTEN, _IN_MEMORY = 1, 2
_ABSOLUTE_64, _RELATIVE_32, _CALL_32 = 1, 2, 4
_KEPT: list[Any] = []  # the pages: machine code lives as long as the process


class _Section(NamedTuple):
    name: int
    type: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    alignment: int
    entry: int


class _Symbol(NamedTuple):
    name: int
    info: int
    other: int
    section: int
    value: int
    size: int


def load(code: bytes, symbol: str) -> int | None:
    """The address of a function after its object was put into memory; None where that is left to LLVM.

    >>> load(b"another format", "f") is None
    True
    """
    if not sys.platform.startswith("linux") or code[:6] != _HEADER:
        return None
    if struct.unpack_from("<2H", code, 16) != (_RELOCATABLE, _X86_64):
        return None
    sections = _sections(code)
    places, size = _placed(sections)
    tables = [s for s in sections if s.type == _SYMBOLS]
    if len(tables) != 1 or any(sections[k].flags & _WRITTEN or sections[k].type == _NO_BYTES for k in places):
        return None
    symbols = [_Symbol(*s) for s in struct.iter_unpack("<IBBHQQ", _bytes(code, tables[0]))]
    names = _bytes(code, sections[tables[0].link])
    wanted = [s for s in symbols if s.section in places and _name(names, s.name) == symbol.encode()]
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for k, place in places.items():
        pages[place : place + sections[k].size] = _bytes(code, sections[k])
    if len(wanted) != 1 or not _linked(code, sections, symbols, places, pages, base):
        return None
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(base), ctypes.c_size_t(size), mmap.PROT_READ | mmap.PROT_EXEC):
        return None
    _KEPT.append(pages)
    return base + places[wanted[0].section] + wanted[0].value


def _sections(code: bytes) -> list[_Section]:
    (start,) = struct.unpack_from("<Q", code, 40)
    each, count = struct.unpack_from("<2H", code, 58)
    return [_Section(*struct.unpack_from("<2I4Q2I2Q", code, start + each * k)) for k in range(count)]


def _bytes(code: bytes, section: _Section) -> bytes:
    return code[section.offset : section.offset + section.size]


def _name(names: bytes, at: int) -> bytes:
    return names[at : names.index(b"\0", at)]


def _placed(sections: list[_Section]) -> tuple[dict[int, int], int]:
    """Where each section begins that is needed in memory, and the size of the whole."""
    places, end = {}, 0
    for k, section in enumerate(sections):
        if section.flags & _IN_MEMORY and section.size and section.type != _UNWINDING:
            places[k] = -(-end // section.alignment) * section.alignment if section.alignment else end
            end = places[k] + section.size
    return places, max(end, 1)


def _linked(
    code: bytes,
    sections: list[_Section],
    symbols: list[_Symbol],
    places: dict[int, int],
    pages: mmap.mmap,
    base: int,
) -> bool:
    """Write the addresses that the code asks for; False where one of them is not known here."""
    for section in sections:
        if section.type != _RELOCATIONS or section.info not in places:
            continue
        for offset, info, addend in struct.iter_unpack("<QQq", _bytes(code, section)):
            symbol, kind, at = symbols[info >> 32], info & 0xFFFFFFFF, places[section.info] + offset
            if symbol.section not in places:
                return False
            target = base + places[symbol.section] + symbol.value + addend
            if kind == _ABSOLUTE_64:
                struct.pack_into("<Q", pages, at, target)
            elif kind in (_RELATIVE_32, _CALL_32):
                struct.pack_into("<i", pages, at, target - base - at)
            else:
                return False
    return True
