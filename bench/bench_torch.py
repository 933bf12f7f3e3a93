"""Whole call of the torch backend, selection included, against PyTorch's dense attention: medians of alternating runs, as ratios.

Run with `make bench-torch`, or `python bench/bench_torch.py --tokens 16384 --heads 2 --dim 128 --runs 5`.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time

import sparge_kernels
import torch
import torch.nn.functional as F

TARGETS = {0.5: 1.3, 0.25: 2.4, 0.1: 5.0}


def machine() -> str:
    """One line: processor, cores, threads, torch."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}"


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("tokens", 16384), ("heads", 2), ("dim", 128), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    print(f"{machine()}; B=1 H={options.heads} N={options.tokens} D={options.dim}, median of {options.runs} alternating runs")
    print("| dtype | topk | dense ms | sparse ms | selection ms | speed-up | aim |\n|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, options.heads, options.tokens, options.dim, generator=generator).to(dtype) for _ in range(3))
        calls = {"dense": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)}
        for topk in TARGETS:
            calls[topk] = lambda q=q, k=k, v=v, topk=topk: sparge_kernels.sparse_attention(q, k, v, topk=topk)
        calls["select"] = lambda q=q, k=k: sparge_kernels.select_blocks(q, k, topk=0.5)
        times = {name: [] for name in calls}
        for run in range(options.runs + 1):
            for name, call in calls.items():
                elapsed = seconds(call)
                if run:  # the first round warms up
                    times[name].append(elapsed * 1e3)
        median = {name: statistics.median(values) for name, values in times.items()}
        for topk, aim in TARGETS.items():
            speedup = statistics.median(d / s for d, s in zip(times["dense"], times[topk], strict=True))
            print(
                f"| {str(dtype)[6:]} | {topk} | {median['dense']:.0f} | {median[topk]:.0f} | {median['select']:.1f} | {speedup:.2f} | {aim} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
