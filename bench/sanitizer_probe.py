"""Takes some memory of the first GPU and gives it back, without torch: what tells within seconds whether compute-sanitizer works on a machine."""

from __future__ import annotations

import ctypes
import sys


def probe(cuda: ctypes.CDLL) -> int:
    """The first status of the driver that is not success, or 0."""
    device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    calls = (
        lambda: cuda.cuInit(0), lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
        lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), lambda: cuda.cuCtxSetCurrent(context),
        lambda: cuda.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(1 << 20)), lambda: cuda.cuMemFree_v2(memory),
    )  # fmt: skip
    return next((status for status in (call() for call in calls) if status), 0)


if __name__ == "__main__":
    status = probe(ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))
    print("probe: ok" if status == 0 else f"the driver says {status}")
    sys.exit(int(status != 0))
