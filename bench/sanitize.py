"""Every kernel variant of this GPU once, a few thousand tokens each, for NVIDIA's compute-sanitizer (README.md has the commands).

Each tensor is an allocation of its own, so that an access beyond it is seen. The results are looked at for NaN only: whether they are right is the
benchmark's question.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator

if __name__ == "__main__":
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch is imported

import sparge_kernels
import torch
from bench_timing import using
from sparge_kernels import config, order
from sparge_kernels.backends import cuda as backend

GRID, TEXT = (4, 20, 25), 77
TOKENS = TEXT + GRID[0] * GRID[1] * GRID[2]


def calls(machines: dict, device: torch.device, dtypes: tuple[str, ...] = config.DTYPES) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """(name, call) for every variant, then for what the variants decide at run time."""
    for pv, machine in machines.items():
        for dim in config.DIMS:
            for dtype in dtypes:
                for masked in (False, True):
                    yield f"{pv}, D {dim}, {dtype}{', masked' if masked else ''}", _call(machine, device, dim, dtype, masked=masked)
    machine = next(iter(machines.values()))
    plan = order.plan("tiles", (TEXT, GRID))
    for name, how in {
        "causal": dict(causal=True), "causal, masked": dict(causal=True, masked=True), "order": dict(order=plan, always_keep=[(0, TEXT)]),
        "order, compensate": dict(order=plan, compensate=True), "compensate, masked": dict(compensate=True, masked=True),
        "judge": dict(simthreshd1=0.3), "cdf": dict(topk=None, cdfthreshd=0.7), "mean": dict(score="mean"), "no smooth_k": dict(smooth_k=False),
        "tiles skipped": dict(pvthreshd=1.0), "few queries": dict(queries=1), "narrow heads": dict(width=40),
    }.items():  # fmt: skip
        for dim in config.DIMS:
            yield f"{name}, D {dim}", _call(machine, device, dim, "bfloat16", **how)


def _call(machine, device, dim: int, dtype: str, *, masked: bool = False, queries: int = TOKENS, width: int = 0, topk=0.3, **how):
    def call() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size = width + dim - 64 if width else dim
        sizes = ((4, queries), (2, TOKENS), (2, TOKENS))
        q, k, v = (torch.randn(1, h, s, size, generator=generator).to(getattr(torch, dtype)).to(device) for h, s in sizes)
        mask = (torch.rand(1, TOKENS, generator=generator) > 0.3).to(device) if masked else None
        with using(machine):
            return sparge_kernels.sparse_attention(q, k, v, topk=topk, key_mask=mask, backend="cuda", return_lse=True, **how)[0]

    return call


def run(machines: dict, device: torch.device, dtypes: tuple[str, ...] = config.DTYPES) -> list[str]:
    """Makes every call, and returns the names of those whose result is not finite."""
    wrong = []
    for name, call in calls(machines, device, dtypes):
        finite = bool(call().isfinite().all())
        print(f"{name}: {'ok' if finite else 'NOT FINITE'}", flush=True)
        wrong += [] if finite else [name]
    return wrong


def read(output: str, status: int | None) -> dict:
    """What a run under compute-sanitizer printed, in numbers; `status` None: it was ended before it was through.

    Returns
    -------
    dict
        "errors": as the tool counts them, at least 1 where the run failed, made no call or told no number; of one that was ended, the reports so far.
        "calls": how many ran; "finished"; "lines": the first of its report.
    """
    counted = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    lines = [line[:200] for line in output.splitlines() if line.startswith("=========")]
    calls = len(re.findall(r": ok$", output, re.MULTILINE))
    if status is None:
        errors = len(re.findall(r"^========= (?:Invalid|Error|Warning: Race|Uninitialized|Barrier)", output, re.MULTILINE))
    else:
        errors = max(sum(map(int, counted)), int(status != 0 or not counted or calls == 0))
    return {"errors": errors, "calls": calls, "finished": status is not None, "lines": lines[:30]}


def main() -> int:
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    machine, reason = backend.machine_of(device)
    if machine is None:
        print(f"Nothing was run: {reason}.")
        return 0
    return int(bool(run({p: backend.Machine(device.index, machine.arch, p) for p in config.forms(machine.arch)}, device)))


if __name__ == "__main__":
    sys.exit(main())
