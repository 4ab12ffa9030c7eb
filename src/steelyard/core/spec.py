"""What a tensor is before a byte of it is read: a shape and a dtype, and the one table of dtypes.

Knows nothing of files or values. numpy and ml_dtypes are imported only when an array type is asked for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

from steelyard.errors import UnknownNameError, WeightsError

if TYPE_CHECKING:
    import numpy as np

Kind = Literal["float", "int", "uint", "bool", "complex"]


@dataclass(frozen=True)
class DType:
    """A number format: its name here (that of numpy and ml_dtypes), its width, its names elsewhere."""

    name: str
    kind: Kind
    bits: int  # per element, as stored in a file; in memory at least one byte
    safetensors: str | None = None  # its code in a safetensors header, where there is one
    torch: str | None = None  # its attribute of the torch module, where there is one

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype; types that numpy lacks come from ml_dtypes."""
        return _numpy_dtype(self.name)

    def __str__(self) -> str:
        return self.name


def _row(name: str, kind: Kind, bits: int, code: str | None, torch: str | None = "") -> tuple[str, DType]:
    return name, DType(name, kind, bits, code, name if torch == "" else torch)


DTYPES: dict[str, DType] = dict(
    (
        _row("float64", "float", 64, "F64"),
        _row("float32", "float", 32, "F32"),
        _row("float16", "float", 16, "F16"),
        _row("bfloat16", "float", 16, "BF16"),
        _row("float8_e4m3fn", "float", 8, "F8_E4M3"),
        _row("float8_e5m2", "float", 8, "F8_E5M2"),
        _row("float8_e8m0fnu", "float", 8, "F8_E8M0"),
        _row("float8_e4m3fnuz", "float", 8, "F8_E4M3FNUZ"),
        _row("float8_e5m2fnuz", "float", 8, "F8_E5M2FNUZ"),
        _row("float6_e2m3fn", "float", 6, "F6_E2M3", None),
        _row("float6_e3m2fn", "float", 6, "F6_E3M2", None),
        _row("float4_e2m1fn", "float", 4, "F4", None),
        _row("int64", "int", 64, "I64"),
        _row("int32", "int", 32, "I32"),
        _row("int16", "int", 16, "I16"),
        _row("int8", "int", 8, "I8"),
        _row("int4", "int", 4, None, None),
        _row("int2", "int", 2, None, None),
        _row("uint64", "uint", 64, "U64"),
        _row("uint32", "uint", 32, "U32"),
        _row("uint16", "uint", 16, "U16"),
        _row("uint8", "uint", 8, "U8"),
        _row("uint4", "uint", 4, None, None),
        _row("uint2", "uint", 2, None, None),
        _row("bool", "bool", 8, "BOOL"),
        _row("complex64", "complex", 64, "C64"),
        _row("complex128", "complex", 128, None),
    )
)

_ALIASES = {
    **dict.fromkeys(("f32", "fp32", "float"), "float32"),
    **dict.fromkeys(("f16", "fp16", "half"), "float16"),
    **dict.fromkeys(("fp8", "fp8_e4m3", "float8_e4m3"), "float8_e4m3fn"),
    **dict.fromkeys(("fp4", "float4"), "float4_e2m1fn"),
    "f64": "float64",
    "double": "float64",
    "bf16": "bfloat16",
    "fp8_e5m2": "float8_e5m2",
    "long": "int64",
    **{f"{k[0]}{n}": f"{k}{n}" for k in ("int", "uint") for n in (2, 4, 8, 16, 32, 64)},
}


@cache
def _numpy_dtype(name: str) -> np.dtype[Any]:
    import numpy as np

    if name == "bool":
        return np.dtype(np.bool_)
    if name in np.sctypeDict:
        return np.dtype(name)
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found


def dtype(of: DType | str | np.dtype[Any] | type) -> DType:
    """The DType of a name ('bfloat16', 'bf16', 'torch.float16'), a numpy dtype or a scalar type.

    >>> dtype("bf16").bits
    16

    Raises UnknownNameError for a type that no weights file holds.
    """
    if isinstance(of, DType):
        return of
    if isinstance(of, str):
        name = of.removeprefix("torch.").lower()
        name = _ALIASES.get(name, name)
    else:
        import numpy as np

        name = np.dtype(of).name
    if name not in DTYPES:
        raise UnknownNameError("dtype", str(of), DTYPES)
    return DTYPES[name]


@dataclass(frozen=True)
class Spec:
    """The shape and dtype of a tensor.

    >>> spec = Spec.of((64, 3, 3, 3), "float16")
    >>> spec.size, spec.nbytes
    (1728, 3456)
    """

    shape: tuple[int, ...]
    dtype: DType

    @staticmethod
    def of(shape: tuple[int, ...], of: DType | str) -> Spec:
        """A Spec from a shape and anything that `dtype` understands; raises WeightsError for a bad dimension."""
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in shape):
            raise WeightsError(f"a shape is a sequence of non-negative integers, not {shape!r}")
        return Spec(tuple(shape), dtype(of))

    @staticmethod
    def like(array: np.ndarray) -> Spec:
        """The Spec of an array; raises UnknownNameError for object, string and date arrays."""
        return Spec(array.shape, dtype(array.dtype))

    @cached_property
    def size(self) -> int:
        """The number of elements."""
        return 0 if 0 in self.shape else math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """The bytes of the plain values in a file; elements narrower than a byte lie packed."""
        return (self.size * self.dtype.bits + 7) // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"
