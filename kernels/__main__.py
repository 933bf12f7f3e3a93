"""`python -m sparge_kernels`: what this machine has, which backends run on it, and a self-test of each against dense attention in fp64.

In the pack's folder, without an installation: `python kernels`.
"""

from __future__ import annotations

import sys

if not __package__:  # started as a folder, which an embedded Python (ComfyUI's portable one), deaf to the current folder, can do too
    import runpy
    from pathlib import Path

    folder = Path(__file__).resolve().parent
    sys.path.insert(0, str(folder.parent))
    runpy.run_module(folder.name, run_name="__main__", alter_sys=True)

import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__
from .attention import block_sparse_attention, select_blocks
from .backends import TABLE, report
from .block_mask import BLOCK_K, BLOCK_Q
from .call import SelfTest

CASES = (
    # name, dtype, B, H, H_kv, S_q, S_k, D, causal, key mask, bound on the relative L2 error beyond what quantisation costs
    ("plain", torch.float32, 1, 2, 2, 1000, 1000, 64, False, False, 1e-5),
    ("odd lengths, GQA", torch.float32, 2, 4, 2, 200, 333, 40, False, False, 1e-5),
    ("causal", torch.float32, 1, 2, 2, 500, 500, 128, True, False, 1e-5),
    ("key mask, bfloat16", torch.bfloat16, 1, 2, 2, 700, 700, 128, False, True, 1e-2),
)


def main() -> int:
    """Prints the report; returns 1 when a backend that says it is available gives a wrong result."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    print(f"sparge_kernels {__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}, GPU: {', '.join(gpus) or 'none'}")
    failed = False
    for name, status in report().items():
        print(f"backend {name}: {'available' if status.available else 'not available'} ({status.reason})")
        for test in TABLE[name].self_test_devices() if status.available else ():
            failed |= not _self_test(name, test)
    return int(failed)


def _self_test(name: str, test: SelfTest) -> bool:
    """Independent normal values, in which nothing averages errors out; what it is compared with runs on the CPU, in fp64."""
    good, device = True, test.device
    for label, dtype, b, h, h_kv, s_q, s_k, d, causal, masked, bound in CASES:
        generator = torch.Generator().manual_seed(0)
        bound += test.error
        q = torch.randn(b, h, s_q, d, generator=generator).to(device, dtype)
        k, v = (torch.randn(b, h_kv, s_k, d, generator=generator).to(device, dtype) for _ in range(2))
        key_mask = (torch.rand(b, s_k, generator=generator) > 0.2).to(device) if masked else None
        mask = select_blocks(q, k, topk=0.4, causal=causal, key_mask=key_mask, backend=name)
        out = block_sparse_attention(q, k, v, mask, causal=causal, key_mask=key_mask, backend=name)
        exact_q, exact_k, exact_v = (x.cpu().double() for x in (q, k, v))
        true = _dense(exact_q, exact_k, exact_v, mask.to_dense().cpu(), causal, key_mask)
        error = float((out.cpu().double() - true).norm() / true.norm())
        good &= error <= bound
        print(f"  {device}, {label}: relative L2 error {error:.1e} (bound {bound:.0e}) {'ok' if error <= bound else 'WRONG'}")
    return good


def _dense(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, causal: bool, key_mask: Tensor | None) -> Tensor:
    """PyTorch's attention with everything that is not to be seen masked; rows that see nothing give zeros."""
    seen = kept.repeat_interleave(BLOCK_Q, 2).repeat_interleave(BLOCK_K, 3)[:, :, : q.shape[2], : k.shape[2]]
    seen = seen.tril() if causal else seen
    seen = seen if key_mask is None else seen & key_mask.cpu()[:, None, None]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).nan_to_num(0.0)


if __name__ == "__main__":
    sys.exit(main())
