"""Sparse attention in plain PyTorch: a call, a selection of its own, two key ranges merged, and code written for spas_sage_attn unchanged."""

from __future__ import annotations

import argparse
import sys
import time

from command_line import number


def made_up(tokens: int, heads: int, dim: int):
    """q, k, v (1, H, S, D) in which neighbours are alike, as in pictures: a walk through space, so that each query has places it attends to."""
    import torch

    torch.manual_seed(0)
    walk = torch.randn(1, heads, tokens, dim).cumsum(2)
    place = torch.nn.functional.normalize(walk - walk.mean(2, keepdim=True), dim=-1) * 2 * dim**0.5
    q, k = (place + 0.2 * torch.randn_like(place) for _ in range(2))
    return q, k, torch.randn_like(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=number(128, 1e9), default=16384)
    parser.add_argument("--heads", type=number(1, 1e9), default=4)
    parser.add_argument("--dim", type=number(1, 128), default=64)
    parser.add_argument("--topk", type=number(0, 1, float, open_below=True), default=0.25, help="share of the key blocks kept; 1 is dense")
    parser.add_argument("--tiny", action="store_true", help="2,048 tokens and 2 heads on the CPU")
    options = parser.parse_args()
    try:
        import torch
        from sparge_kernels import BlockMask, block_sparse_attention, compat, merge_lse, select_blocks, sparse_attention
    except ModuleNotFoundError as error:
        remedy = "pip install . in the folder above this one" if error.name == "sparge_kernels" else f"pip install {error.name}"
        sys.exit(f"The Python package {error.name} is missing, which this example needs; {remedy}")
    tokens, heads = (2048, 2) if options.tiny else (options.tokens, options.heads)
    gpu = torch.cuda.is_available() and not options.tiny
    q, k, v = (x.cuda().bfloat16() if gpu else x for x in made_up(tokens, heads, options.dim))

    def timed(call):
        """The result of the second call (the first one warms up), and its seconds."""
        for _ in range(2):
            if gpu:
                torch.cuda.synchronize()
            started = time.perf_counter()
            result = call()
            if gpu:
                torch.cuda.synchronize()
        return result, time.perf_counter() - started

    dense, dense_seconds = timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))

    def told(what: str, out) -> None:
        error = float((out.float() - dense.float()).norm() / dense.float().norm())
        print(f"{what}: relative L2 error against dense {error:.3g}")

    print(f"{tokens} tokens, {heads} heads of {options.dim}, made-up data, topk {options.topk:g}")

    # 1. One call. `info` says what it did.
    (out, info), seconds = timed(lambda: sparse_attention(q, k, v, topk=options.topk, return_info=True))
    told(f"sparse_attention ({info.backend} backend, density {float(info.density.mean()):.3f})", out)
    print(f"  dense took {dense_seconds / seconds:.2f} times as long, in this run on this machine")

    # 2. The selection by itself, joined with a pattern of one's own: here every query also keeps its neighbours.
    chosen = select_blocks(q, k, topk=options.topk)
    window = BlockMask.sliding_window(tokens, tokens, window=256).to(q.device)
    both = chosen | window
    told(f"select_blocks, or within 256 tokens (density {float(both.density.mean()):.3f})", block_sparse_attention(q, k, v, both))

    # 3. Two key ranges computed apart and merged, as on two devices that hold half of the keys each.
    half = tokens // 2
    parts = [sparse_attention(q, k[:, :, keys], v[:, :, keys], topk=options.topk, return_lse=True) for keys in (slice(half), slice(half, None))]
    merged, _ = merge_lse(*parts[0], *parts[1])
    told("two halves of the keys, merge_lse", merged)

    # 4. Code written for the package spas_sage_attn. `install` gives its name to sparge_kernels.compat where that package is absent.
    compat.install()
    from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda

    out, sparsity = spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=options.topk, return_sparsity=True)
    told(f"spas_sage2_attn_meansim_topk_cuda (sparsity {sparsity:.3f})", out)


if __name__ == "__main__":
    main()
