"""kernels/cuda/driver.py against a stand-in for the driver's library.

`python tests/kernels/test_cuda_driver.py` prints what a launch costs in Python.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from sparge_kernels.cuda import driver as driver_module
from sparge_kernels.cuda.driver import Driver, Refused, current_stream, launch, open_driver
from sparge_kernels.cuda.params import SelectParams

NAMES = {
    code: b"CUDA_ERROR_" + name
    for code, name in (
        (1, b"INVALID_VALUE"), (2, b"OUT_OF_MEMORY"), (100, b"NO_DEVICE"), (200, b"INVALID_IMAGE"), (201, b"INVALID_CONTEXT"),
        (209, b"NO_BINARY_FOR_GPU"), (500, b"NOT_FOUND"),
        (700, b"ILLEGAL_ADDRESS"),
    )
}  # fmt: skip


class Function:
    """One function of the stand-in: records its plain arguments, gives the chosen status, fills what its first argument points to."""

    def __init__(self, library, name, fill=None):
        self.library, self.name, self.fill = library, name, fill
        self.argtypes = None

    def __call__(self, *args):
        self.library.calls.append((self.name, args))
        status = self.library.status.get(self.name, 0)
        if not status and self.fill is not None:
            self.fill(*args)
        return status


class Library:
    """A driver with `version`; GPUs of one compute capability with 101376 bytes of shared memory per block; every kernel has 512 of its own."""

    def __init__(self, version=12080, capability=(8, 6), **status):
        self.calls, self.status, self.depth = [], status, 0
        attributes = {75: capability[0], 76: capability[1], 97: 101376}

        def put(value):
            def fill(out, *_):
                out._obj.value = value

            return fill

        def attribute(out, which, device):
            assert device in (40, 41)
            out._obj.value = attributes[which]

        def text(table):
            def fill(status, out):
                out._obj.value = table.get(status)

            return fill

        def push(context):
            assert context.value == 7
            self.depth += 1

        def pop(out):
            self.depth -= 1

        def inside(fill):
            def checked(*args):
                assert self.depth == 1, "no context is current"
                fill(*args)

            return checked

        self.symbols = {b"sparge_one": 0x11, b"sparge_two": 0x12}
        fills = {
            "cuInit": None,
            "cuDriverGetVersion": put(version),
            "cuGetErrorName": text(NAMES),
            "cuGetErrorString": text({k: v.lower().removeprefix(b"cuda_error_").replace(b"_", b" ") for k, v in NAMES.items()}),
            "cuDeviceGet": lambda out, index: put(40 + index)(out),
            "cuDeviceGetAttribute": attribute,
            "cuDevicePrimaryCtxRetain": put(7),
            "cuCtxPushCurrent_v2": push,
            "cuCtxPopCurrent_v2": pop,
            "cuCtxSetCurrent": None,
            "cuLibraryLoadData": inside(put(0x10)),
            "cuLibraryUnload": None,
            "cuLibraryGetKernel": inside(lambda out, module, symbol: put(self.symbols[symbol])(out)),
            "cuKernelGetFunction": inside(lambda out, kernel: put(kernel.value + 0x1000)(out)),
            "cuFuncGetAttribute": inside(put(512)),
            "cuFuncSetAttribute": None,
            "cuLaunchKernel": None,
        }
        for name, fill in fills.items():
            setattr(self, name, Function(self, name, fill))

    def of(self, name):
        return [args for called, args in self.calls if called == name]


BOTH = ("sparge_one", "sparge_two")


def test_load_leaves_kernels_ready_with_all_the_shared_memory():
    library = Library()
    kernels = Driver(library).load(b"\x7fELF\0code", 1, BOTH, "some_variant, packaged for sm_86")
    assert {k: (v.name, v.device, v.handle, v.shared_limit, v.origin) for k, v in kernels.items()} == {
        "sparge_one": ("sparge_one", 1, 0x1011, 101376 - 512, "some_variant, packaged for sm_86"),
        "sparge_two": ("sparge_two", 1, 0x1012, 101376 - 512, "some_variant, packaged for sm_86"),
    }
    ((_, code, *rest),) = library.of("cuLibraryLoadData")
    assert code == b"\x7fELF\0code" and rest == [None, None, 0, None, None, 0]
    assert [(f.value, which, value) for f, which, value in library.of("cuFuncSetAttribute")] == [(0x1011, 8, 100864), (0x1012, 8, 100864)]
    assert [device for _, device in library.of("cuDevicePrimaryCtxRetain")] == [41]
    assert library.depth == 0 and not library.of("cuLibraryUnload")


def test_a_thread_without_a_context_gets_torchs_and_tries_again():
    """PyTorch's memory may come from its cache and its current device may not change: then nothing before a launch makes a context current."""
    library = Library(cuLaunchKernel=201)
    library.cuCtxSetCurrent.fill = lambda context: library.status.pop("cuLaunchKernel") if context.value == 7 else None
    kernel = Driver(library).load(b"code", 1, ("sparge_one",), "some_variant")["sparge_one"]
    launch(kernel, 3, 256, 64, SelectParams(), 5)
    assert len(library.of("cuCtxSetCurrent")) == 1 and len(library.of("cuLaunchKernel")) == 2
    assert [device for _, device in library.of("cuDevicePrimaryCtxRetain")] == [41, 41]
    library.status["cuLaunchKernel"] = 201
    library.cuCtxSetCurrent.fill = None
    with pytest.raises(RuntimeError, match="INVALID_CONTEXT"):
        launch(kernel, 3, 256, 64, SelectParams(), 5)


@pytest.mark.parametrize("call, status", [("cuLibraryLoadData", 200), ("cuLibraryGetKernel", 500), ("cuKernelGetFunction", 209)])
def test_a_binary_that_the_driver_does_not_take_is_refused(call, status):
    library = Library(**{call: status})
    with pytest.raises(Refused, match=rf"{call} \(.*some_variant\) failed: {NAMES[status].decode()}: "):
        Driver(library).load(b"code", 0, BOTH, "some_variant")
    assert library.depth == 0
    assert len(library.of("cuLibraryUnload")) == (call != "cuLibraryLoadData")


@pytest.mark.parametrize(
    "call", ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuLibraryLoadData", "cuKernelGetFunction", "cuFuncSetAttribute"]
)
def test_a_fault_of_earlier_work_is_no_refusal(call):
    library = Library(**{call: 700})
    with pytest.raises(RuntimeError, match="CUDA_ERROR_ILLEGAL_ADDRESS: illegal address") as raised:
        Driver(library).load(b"code", 0, BOTH, "some_variant")
    assert not isinstance(raised.value, Refused) and library.depth == 0


def loaded(library):
    return Driver(library).load(b"code", 0, BOTH, "select_d64, packaged for sm_86")["sparge_one"]


def test_launch_hands_over_the_struct():
    library = Library()
    params = SelectParams(scale=0.5, batch=3)
    launch(loaded(library), 2**31 - 1, 256, 1000, params, 0xABC)
    ((handle, *numbers, arguments, extra),) = library.of("cuLaunchKernel")
    assert handle == 0x1011 and numbers == [2**31 - 1, 1, 1, 256, 1, 1, 1000, 0xABC] and extra is None
    assert len(arguments) == 1 and arguments[0] == ctypes.addressof(params)
    assert SelectParams.from_address(arguments[0]).batch == 3
    assert library.cuLaunchKernel.argtypes == [ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3]  # 64-bit handles must not be cut


def test_launch_error_names_everything():
    library = Library(cuLaunchKernel=1)
    with pytest.raises(RuntimeError) as raised:
        launch(loaded(library), 12, 256, 200000, SelectParams(), 0)
    assert str(raised.value) == (
        "cuLaunchKernel (sparge_one, select_d64, packaged for sm_86, grid 12, 256 threads, 200000 bytes of shared memory (at most 100864)) failed: "
        "CUDA_ERROR_INVALID_VALUE: invalid value"
    )
    assert type(raised.value) is RuntimeError


def test_error_without_a_name_tells_its_number():
    library = Library(cuLaunchKernel=4711)
    with pytest.raises(RuntimeError, match="CUDA error 4711: unknown to this driver"):
        launch(loaded(library), 1, 256, 0, SelectParams(), 0)


@pytest.mark.parametrize("call", ["cuLibraryLoadData", "cuKernelGetFunction", "cuLaunchKernel"])
def test_out_of_memory_is_torchs_own(call):
    library = Library(**{call: 2})
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        launch(loaded(library), 1, 256, 0, SelectParams(), 0)


@pytest.mark.parametrize(
    "version, arch, needed",
    [(11080, "sm_86", "12.0"), (12000, "sm_86", None), (12000, "sm_90", None), (12070, "sm_120", "12.8"), (12070, "sm_100", "12.8"),
     (12080, "sm_120", None), (13010, "sm_121", None), (11080, "sm_90a", "12.0")],
)  # fmt: skip
def test_an_old_driver_is_told_in_one_sentence(version, arch, needed):
    reason = Driver(Library(version)).why_not(arch)
    if needed is None:
        assert reason is None
    else:
        found = f"{version // 1000}.{version % 1000 // 10}"
        assert reason == f"an NVIDIA driver for CUDA {needed} or newer is needed for {arch}, found one for CUDA {found}; update the driver"


def test_arch_of_a_device():
    assert Driver(Library()).arch(1) == "sm_86"


@pytest.mark.parametrize("platform, name", [("linux", "libcuda.so.1"), ("win32", "nvcuda.dll")])
def test_library_name(platform, name):
    asked = []

    def load(path):
        asked.append(path)
        return Library()

    assert isinstance(open_driver(load, platform), Driver) and asked == [name]


def unloadable(path):
    raise OSError(f"{path}: cannot open shared object file")


@pytest.mark.parametrize(
    "load, platform, reason",
    [
        (unloadable, "linux", "no NVIDIA driver: libcuda.so.1 could not be loaded"),
        (unloadable, "win32", "no NVIDIA driver: nvcuda.dll could not be loaded"),
        (unloadable, "darwin", "there is no NVIDIA driver for this platform (darwin)"),
        (lambda _: Library(cuInit=100), "linux", "the NVIDIA driver found no usable GPU (CUDA_ERROR_NO_DEVICE: no device)"),
        (lambda _: Library(cuDriverGetVersion=1), "linux", "cuDriverGetVersion failed: CUDA_ERROR_INVALID_VALUE: invalid value"),
    ],
    ids=["no driver", "no driver, Windows", "macOS", "no GPU", "broken"],
)
def test_no_driver_is_a_sentence(load, platform, reason):
    assert open_driver(load, platform) == reason


def test_the_driver_is_asked_for_once(monkeypatch):
    opened = []
    monkeypatch.setattr(driver_module, "open_driver", lambda: opened.append(1) or "no NVIDIA driver")
    driver_module.driver.cache_clear()
    try:
        assert [driver_module.why_not("sm_86") for _ in range(3)] == ["no NVIDIA driver"] * 3 and opened == [1]
        driver_module.driver.cache_clear()
        monkeypatch.setattr(driver_module, "open_driver", lambda: Driver(Library(12000)))
        assert driver_module.why_not("sm_86") is None and "12.8" in driver_module.why_not("sm_120")
    finally:
        driver_module.driver.cache_clear()


def test_importing_opens_nothing():
    code = (
        "import ctypes, torch\n"
        "def refuse(*args, **kwargs): raise SystemExit(f'opened {args}')\n"
        "ctypes.CDLL.__init__ = refuse\n"
        "import sparge_kernels.cuda.driver, sparge_kernels.cuda.loader, sparge_kernels.cuda.nvrtc\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_stream_is_torchs_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1000 + device))
    assert current_stream(3) == 1003


def print_launch_cost(count: int = 200_000) -> None:
    """Time of `launch` with a C function that does nothing in the driver's place: `abs`, which takes the handle, 0, for its argument."""
    kernel = loaded(Library())
    function = ctypes.CDLL(None).abs
    function.argtypes = kernel.driver.launch_function.argtypes
    kernel.driver.launch_function = function
    object.__setattr__(kernel, "handle", 0)
    params = SelectParams()
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(count):
            launch(kernel, 100, 256, 1000, params, 0)
        print(f"launch: {(time.perf_counter() - start) / count * 1e6:.2f} us")


if __name__ == "__main__":
    print_launch_cost()
