"""The NVIDIA driver through ctypes: is it there, load a binary, launch a kernel.

Only calls that every driver since CUDA 12.0 has, so nothing is compiled against a driver's version. Importing this opens nothing; the first question
opens the driver's library, and only `Driver.load` touches a device, in the context that torch uses too (its primary one).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..config import number

LIBRARIES = {"linux": "libcuda.so.1", "win32": "nvcuda.dll"}
"""The driver's library by platform."""

OLDEST, OLDEST_BLACKWELL = 12000, 12080
"""CUDA versions of the oldest drivers that serve: in general, and for sm_100 and above, whose binaries older ones do not read."""

_OUT_OF_MEMORY = 2
_NO_CONTEXT = 201
# Answers to a binary, not to what the GPU was doing: no image, no code for this GPU, invalid source, symbol missing, not supported.
_REFUSALS = {200, 209, 300, 500, 801}
_MAJOR, _MINOR, _SHARED_OPT_IN = 75, 76, 97  # CUdevice_attribute
_STATIC_SHARED, _DYNAMIC_SHARED = 1, 8  # CUfunction_attribute

_POINTER, _UINT = ctypes.c_void_p, ctypes.c_uint
_LAUNCH = [_POINTER, *[_UINT] * 7, _POINTER, _POINTER, _POINTER]
_ONE_POINTER = _POINTER * 1


class Refused(RuntimeError):
    """The driver does not take this binary on this GPU; another one may do."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """One loaded kernel on one device."""

    name: str  # its symbol
    device: int
    handle: int  # CUfunction
    shared_limit: int  # bytes of dynamic shared memory that a launch may ask for
    origin: str  # where its binary came from, for reports
    driver: Driver


class Driver:
    """The opened driver, of a library object (ctypes.CDLL, or a test's with the same functions). Raises `Refused` when it cannot serve at all."""

    def __init__(self, library):
        self._library = library
        status = library.cuInit(0)
        if status:
            raise Refused(f"the NVIDIA driver found no usable GPU ({self._name(status)})")
        version = ctypes.c_int()
        self._check(library.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
        self.version = version.value
        """CUDA version of the driver, 12080 for 12.8."""
        self.launch_function = library.cuLaunchKernel
        self.launch_function.argtypes = _LAUNCH

    def why_not(self, arch: str) -> str | None:
        """None, or the sentence that tells why this driver is too old for `arch` ("sm_120")."""
        oldest = OLDEST_BLACKWELL if number(arch) >= 100 else OLDEST
        if self.version >= oldest:
            return None
        found = _version(self.version)
        return f"an NVIDIA driver for CUDA {_version(oldest)} or newer is needed for {arch}, found one for CUDA {found}; update the driver"

    def arch(self, device: int) -> str:
        """The architecture of a device: "sm_86"."""
        return f"sm_{self._attribute(device, _MAJOR)}{self._attribute(device, _MINOR)}"

    def load(self, code: bytes, device: int, symbols: tuple[str, ...], origin: str) -> dict[str, Kernel]:
        """The kernels `symbols` of the binary `code` on `device`, ready to launch with all the shared memory that the device has.

        They stay loaded until the process ends: a captured CUDA graph may hold them for as long.

        Raises
        ------
        Refused
            The driver cannot use this binary.
        torch.cuda.OutOfMemoryError, RuntimeError
            Anything else.
        """
        library = self._library
        self._check(library.cuCtxPushCurrent_v2(self._context(device)), "cuCtxPushCurrent")
        try:
            return self._load(code, device, symbols, origin)
        finally:
            library.cuCtxPopCurrent_v2(ctypes.byref(_POINTER()))

    def enter(self, device: int) -> None:
        """Makes torch's context of `device` the calling thread's own, as the CUDA runtime does at a thread's first use of it."""
        self._check(self._library.cuCtxSetCurrent(self._context(device)), "cuCtxSetCurrent")

    def _context(self, device: int) -> ctypes.c_void_p:
        context = _POINTER()
        self._check(self._library.cuDevicePrimaryCtxRetain(ctypes.byref(context), self._device(device)), "cuDevicePrimaryCtxRetain")
        return context

    def _load(self, code: bytes, device: int, symbols: tuple[str, ...], origin: str) -> dict[str, Kernel]:
        library, module = self._library, _POINTER()
        self._check(library.cuLibraryLoadData(ctypes.byref(module), code, None, None, 0, None, None, 0), "cuLibraryLoadData", origin)
        found = {}
        try:
            for symbol in symbols:
                kernel, function, static = _POINTER(), _POINTER(), ctypes.c_int()
                self._check(library.cuLibraryGetKernel(ctypes.byref(kernel), module, symbol.encode()), "cuLibraryGetKernel", f"{symbol} of {origin}")
                # Drivers load lazily: this is where they say that a binary is for another GPU, and it must be said before the launch.
                self._check(library.cuKernelGetFunction(ctypes.byref(function), kernel), "cuKernelGetFunction", f"{symbol} of {origin}")
                self._check(library.cuFuncGetAttribute(ctypes.byref(static), _STATIC_SHARED, function), "cuFuncGetAttribute", symbol)
                limit = self._attribute(device, _SHARED_OPT_IN) - static.value
                self._check(library.cuFuncSetAttribute(function, _DYNAMIC_SHARED, limit), "cuFuncSetAttribute", symbol)
                found[symbol] = Kernel(symbol, device, function.value, limit, origin, self)
        except Exception:
            library.cuLibraryUnload(module)
            raise
        return found

    def error(self, status: int, call: str, what: str = "") -> Exception:
        """The exception for a status that is not success."""
        text = f"{call}{f' ({what})' if what else ''} failed: {self._name(status)}"
        if status == _OUT_OF_MEMORY:
            import torch

            return torch.cuda.OutOfMemoryError(f"CUDA out of memory: {text}")
        return Refused(text) if status in _REFUSALS and call.startswith(("cuLibrary", "cuKernel")) else RuntimeError(text)

    def _check(self, status: int, call: str, what: str = "") -> None:
        if status:
            raise self.error(status, call, what)

    def _name(self, status: int) -> str:
        name, text = ctypes.c_char_p(), ctypes.c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(name))
        self._library.cuGetErrorString(status, ctypes.byref(text))
        return f"{(name.value or b'CUDA error ' + str(status).encode()).decode()}: {(text.value or b'unknown to this driver').decode()}"

    def _device(self, device: int) -> int:
        handle = ctypes.c_int()
        self._check(self._library.cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet", f"device {device}")
        return handle.value

    def _attribute(self, device: int, attribute: int) -> int:
        value = ctypes.c_int()
        self._check(self._library.cuDeviceGetAttribute(ctypes.byref(value), attribute, self._device(device)), "cuDeviceGetAttribute")
        return value.value


def launch(kernel: Kernel, grid: int, threads: int, shared: int, params: ctypes.Structure, stream: int) -> None:
    """Starts 1 to 2 ** 31 - 1 CTAs of `kernel`, each of `threads` threads with `shared` bytes of dynamic shared memory (at most its limit).

    Its device must be torch's current one, `stream` is a CUstream (see `current_stream`); `params`, its one argument, is copied before this returns.

    Raises
    ------
    RuntimeError
        With the driver's name for what went wrong, here or in an earlier launch on this device.
    torch.cuda.OutOfMemoryError
    """
    argument = _ONE_POINTER(ctypes.addressof(params))
    status = kernel.driver.launch_function(kernel.handle, grid, 1, 1, threads, 1, 1, shared, stream, argument, None)
    if status == _NO_CONTEXT:  # a thread in which the CUDA runtime has done nothing yet
        kernel.driver.enter(kernel.device)
        status = kernel.driver.launch_function(kernel.handle, grid, 1, 1, threads, 1, 1, shared, stream, argument, None)
    if status:
        what = f"{kernel.name}, {kernel.origin}, grid {grid}, {threads} threads, {shared} bytes of shared memory (at most {kernel.shared_limit})"
        raise kernel.driver.error(status, "cuLaunchKernel", what)


def current_stream(device: int) -> int:
    """The CUstream that torch works on now; 0 is torch's default stream."""
    import torch

    return torch.cuda.current_stream(device).cuda_stream


def capturing(device) -> bool:
    """Whether the stream that torch works on now, on a device or the GPU of that number, is being captured into a CUDA graph."""
    import torch

    if getattr(device, "type", "cuda") != "cuda" or not torch.cuda.is_initialized():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def open_driver(load: Callable[[str], Any] = ctypes.CDLL, platform: str = sys.platform) -> Driver | str:
    """The driver of this machine, or the sentence that tells why there is none."""
    name = LIBRARIES.get("linux" if platform.startswith("linux") else platform)
    if name is None:
        return f"there is no NVIDIA driver for this platform ({platform})"
    try:
        return Driver(load(name))
    except OSError:
        return f"no NVIDIA driver: {name} could not be loaded"
    except RuntimeError as error:
        return str(error)


@lru_cache(maxsize=1)
def driver() -> Driver | str:
    """`open_driver()`, asked once."""
    return open_driver()


def why_not(arch: str) -> str | None:
    """None, or the sentence that tells why this machine's driver cannot serve a GPU of `arch`."""
    found = driver()
    return found if isinstance(found, str) else found.why_not(arch)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
