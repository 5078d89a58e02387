"""How loops over single numbers become machine code: by numba, to run beside other threads.

Many short calls of numpy would each give up the interpreter's lock and wait to have it back: two threads that do so at
once take up to twice as long as one after the other.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit, types

Kernel = TypeVar("Kernel", bound=Callable[..., None])


def read(dtype: Any, dimensions: int, layout: str = "C") -> Any:
    """The type of an array that a kernel reads, which may be read-only."""
    return types.Array(dtype, dimensions, layout, readonly=True)


def compiled(*arguments: Any, any_order: bool = False) -> Callable[[Kernel], Kernel]:
    """Compile a kernel for arguments of these types. Its sums are in any order where `any_order`: many terms at a time.

    The machine code is kept in `__pycache__`, or else in the user's cache folder. Numbers must be finite.
    """
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nnan", "nsz"} | ({"reassoc"} if any_order else set())}

    def compile(kernel: Kernel) -> Kernel:
        try:
            machine_code: Kernel = njit(types.void(*arguments), cache=True, **options)(kernel)
        except (RuntimeError, OSError):  # there is no folder, or no room, to keep it in
            machine_code = njit(types.void(*arguments), **options)(kernel)
        return machine_code

    return compile
