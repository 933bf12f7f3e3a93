"""What the CUDA backend is compared with: PyTorch's dense attention, and other packages where they are installed.

No package here is a dependency. Each has one function that takes the `Inputs` (and for sparse ones `topk`) and returns a `Contender`, or raises
`Refused` with the reason. What a package refuses when it runs is caught by the benchmark in the same way.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import sparge_kernels
import torch
import torch.nn.functional as F
from bench_timing import using
from torch import Tensor


class Refused(RuntimeError):
    """A contender that cannot take part, and why."""


def _same(out: Tensor) -> Tensor:
    return out


@dataclass(frozen=True)
class Contender:
    """One way to compute the call.

    Attributes
    ----------
    name : str
    run : callable
        Runs it and returns its own output.
    density : float
        Share of the work that it does, 0..1.
    topk : float or None
        What it was asked to keep; None: dense.
    hnd : callable
        Its output as (B, H, S_q, D).
    note : str
        What is different about this comparison.
    kept : callable or None
        The map (B, H, N_q, N_k) that it attended to, where it tells.
    """

    name: str
    run: Callable[[], Tensor]
    density: float = 1.0
    topk: float | None = None
    hnd: Callable[[Tensor], Tensor] = _same
    note: str = ""
    kept: Callable[[], Tensor] | None = None


class Inputs:
    """q (B, H, S_q, D), k and v (B, H_kv, S_k, D) of one call, and what contenders need of them beyond that, made once."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor):
        self.q, self.k, self.v = q, k, v

    @cached_property
    def nhd(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same as contiguous (B, S, H, D)."""
        return tuple(x.transpose(1, 2).contiguous() for x in (self.q, self.k, self.v))

    @property
    def grouped(self) -> bool:
        return self.q.shape[1] != self.k.shape[1]

    def kept(self, topk: float) -> Tensor:
        """The map (B, H, N_q, N_k) that the CUDA backend selects."""
        return sparge_kernels.select_blocks(self.q, self.k, topk=topk, backend="cuda").to_dense()


def module(name: str):
    """The imported package.

    Raises
    ------
    Refused
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refused("not installed" if isinstance(error, ModuleNotFoundError) and error.name == name else f"import fails: {error}") from error
    except Exception as error:  # what a package that was built for another torch or GPU does when it is imported is up to it
        raise Refused(f"import fails: {type(error).__name__}: {error}") from error


def attribute(name: str, function: str):
    """A function of a package.

    Raises
    ------
    Refused
    """
    found = getattr(module(name), function, None)
    if found is None:
        raise Refused(f"this version has no {function}")
    return found


def whole_call(inputs: Inputs, topk: float, **how):
    """The CUDA backend on the machine in use."""
    return sparge_kernels.sparse_attention(inputs.q, inputs.k, inputs.v, topk=topk, backend="cuda", **how)


def ours(inputs: Inputs, topk: float, machine) -> Contender:
    """`whole_call` on `machine`."""

    def run() -> Tensor:
        with using(machine):
            return whole_call(inputs, topk)

    with using(machine):
        _, info = whole_call(inputs, topk, return_info=True)
    return Contender(f"sparge {machine.pv}", run, float(info.density.mean()), topk, kept=lambda: info.kept.to_map())


# ---- dense


def _sdpa(inputs: Inputs, name: str) -> Callable[[], Tensor]:
    attention = module("torch.nn.attention")
    chosen = getattr(attention.SDPBackend, name, None)
    if chosen is None:
        raise Refused(f"this PyTorch has no {name}")
    q, k, v = inputs.q, inputs.k, inputs.v
    more = {"enable_gqa": True} if inputs.grouped else {}

    def run() -> Tensor:
        with attention.sdpa_kernel(chosen):
            return F.scaled_dot_product_attention(q, k, v, **more)

    return run


def sdpa_cudnn(inputs: Inputs) -> Contender:
    return Contender("sdpa cudnn", _sdpa(inputs, "CUDNN_ATTENTION"))


def sdpa_flash(inputs: Inputs) -> Contender:
    return Contender("sdpa flash", _sdpa(inputs, "FLASH_ATTENTION"))


def sageattention(inputs: Inputs) -> Contender:
    call = attribute("sageattention", "sageattn")
    return Contender("sageattention", lambda: call(inputs.q, inputs.k, inputs.v, tensor_layout="HND", is_causal=False))


def comfy_kitchen_int8(inputs: Inputs) -> Contender:
    call = attribute("comfy_kitchen", "int8_attention")
    return Contender("comfy_kitchen int8", lambda: call(inputs.q, inputs.k, inputs.v))


def flashinfer_dense(inputs: Inputs) -> Contender:
    call = attribute("flashinfer", "single_prefill_with_kv_cache")
    _one(inputs)
    q, k, v = (x[0] for x in inputs.nhd)
    return Contender("flashinfer", lambda: call(q, k, v, causal=False, kv_layout="NHD"), hnd=_from_shd)


def flash_attn_2(inputs: Inputs) -> Contender:
    call = attribute("flash_attn", "flash_attn_func")
    return Contender("flash_attn 2", lambda: call(*inputs.nhd, causal=False), hnd=_from_nhd)


def flash_attn_3(inputs: Inputs) -> Contender:
    call = attribute("flash_attn_interface", "flash_attn_func")
    return Contender("flash_attn 3", lambda: call(*inputs.nhd, causal=False), hnd=lambda out: _from_nhd(out[0] if isinstance(out, tuple) else out))


# ---- sparse


def spas_sage_attn(inputs: Inputs, topk: float) -> Contender:
    call = attribute("spas_sage_attn", "spas_sage2_attn_meansim_topk_cuda")
    q, k, v = inputs.q, inputs.k, inputs.v
    return Contender("spas_sage_attn", lambda: call(q, k, v, topk=topk, simthreshd1=-0.1, pvthreshd=15, is_causal=False), topk, topk)


def comfy_kitchen_sol(inputs: Inputs, topk: float) -> Contender:
    call = attribute("comfy_kitchen", "sol_attn")
    if inputs.grouped:
        raise Refused("it takes as many key heads as query heads")
    return Contender("comfy_kitchen sol", lambda: call(*inputs.nhd, topk_ratio=topk, tail=False), topk, topk, _from_nhd)


_VSA = {9: "vsa_sm90_blk64", 10: "vsa_sm100_blk64", 12: "vsa_sm120_blk64"}


def flashinfer_vsa(inputs: Inputs, topk: float) -> Contender:
    """The same map as the CUDA backend's, given; what it takes to find and to prepare it is not in the time."""
    wrapper_type = attribute("flashinfer", "BlockSparseAttentionWrapper")
    _one(inputs)
    major = torch.cuda.get_device_capability(inputs.q.device)[0]
    if major not in _VSA:
        raise Refused("it has no 64-token block-sparse kernel for this GPU")
    whole = min(inputs.q.shape[2], inputs.k.shape[2]) // 64 * 64
    if inputs.q.shape[2] != inputs.k.shape[2]:
        raise Refused("it is measured with as many queries as keys")
    kept = inputs.kept(topk)[0].repeat_interleave(2, 1)[:, : whole // 64, : whole // 64].contiguous()
    q, k, v = (x[0, :whole].contiguous() for x in inputs.nhd)
    heads, key_heads, dim = q.shape[1], k.shape[1], q.shape[2]
    wrapper = wrapper_type(torch.empty(128 << 20, dtype=torch.uint8, device=q.device), backend=_VSA[major])
    wrapper.plan(None, None, whole, whole, 64, 64, heads, key_heads, dim, q_data_type=q.dtype, o_data_type=q.dtype, block_mask=kept)
    left_out = inputs.q.shape[2] - whole
    note = "map given" + (f", without the last {left_out} tokens" if left_out else "")
    return Contender("flashinfer vsa", lambda: wrapper.run(q, k, v), float(kept.float().mean()), topk, _from_shd, note)


def _one(inputs: Inputs) -> None:
    if inputs.q.shape[0] != 1:
        raise Refused("it takes one sequence at a time")


def _from_nhd(out: Tensor) -> Tensor:
    return out.transpose(1, 2)


def _from_shd(out: Tensor) -> Tensor:
    return out.transpose(0, 1)[None]


BASELINES = {"sdpa cudnn": sdpa_cudnn, "sdpa flash": sdpa_flash}
"""Every speed-up is told against each of these."""

DENSE = {
    "sageattention": sageattention, "comfy_kitchen int8": comfy_kitchen_int8, "flashinfer": flashinfer_dense, "flash_attn 2": flash_attn_2,
    "flash_attn 3": flash_attn_3,
}  # fmt: skip
SPARSE = {"spas_sage_attn": spas_sage_attn, "comfy_kitchen sol": comfy_kitchen_sol, "flashinfer vsa": flashinfer_vsa}

PACKAGE_OF = {
    "sageattention": "sageattention", "comfy_kitchen int8": "comfy_kitchen", "flashinfer": "flashinfer", "flash_attn 2": "flash_attn",
    "flash_attn 3": "flash_attn_interface", "spas_sage_attn": "spas_sage_attn", "comfy_kitchen sol": "comfy_kitchen", "flashinfer vsa": "flashinfer",
}  # fmt: skip
"""Contender -> the package that has it."""
PACKAGES = tuple(dict.fromkeys(PACKAGE_OF.values()))


def packages() -> dict[str, str]:
    """Package -> its version, or why it cannot be compared with."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = str(getattr(module(name), "__version__", "version unknown"))
        except Refused as reason:
            found[name] = str(reason)
    return found
