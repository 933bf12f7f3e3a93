"""The backend on NVIDIA GPUs: four launches a call (statistics, pre-pass, selection, attention), one workspace, nothing read back. Hopper's own
attention kernel takes a fifth, which puts the query blocks into order, where their lists may differ in length.

8-bit: INT8 Q and K, P and V as the machine's `pv` says. A call allocates what it returns and the workspace, which holds, in bytes per element with
head_dim rounded up to 64 or 128: 1.3 for q, 1.2 for k and 1 for v (fp16 V: 2) in their quantised and pooled forms, and the scores of 64 query pools
for every multiprocessor twice. What the kernels cannot read as it is given (a float key mask, a strided block map) has its copy there. `compensate`
adds 4 bytes per element of q, and two buffers for fp32 heads, each of 256 MB at most or of one kv head with its queries.

Nothing is kept on the device between calls, so that a call can be captured into a CUDA graph: its memory is then the graph's. What a kind of call
(dtype, head_dim up to 64 or 128, with a key mask or without) needs is loaded by the first one; during a capture that one is declined instead.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from .. import config, environment
from ..block_mask import BLOCK_K, BLOCK_Q, num_blocks
from ..cuda import driver, loader, prepare, workspace
from ..cuda.params import FIELDS
from ..selection import Rule

quantised = True
skips_pv = True

_LARGEST_DIM = config.DIMS[-1]
_MOST_BLOCKS = 1 << 16  # what 16 bits can name
_DTYPES = {getattr(torch, name): name for name in config.DTYPES}

TOLERANCE = {"int8": 0.03, "fp8": 0.05, "fp16": 0.03}
"""Relative L2 error against exact attention over the same blocks that independent normal q, k and v may show, by the form of P and V."""

LIMITS = (
    (lambda call: call.dtype not in _DTYPES, "{call.dtype} is none of the types that its kernels read (float16, bfloat16, float32)"),
    (lambda call: call.dim > _LARGEST_DIM, "head_dim {call.dim} is beyond the 1 to 128 of its kernels; backend='torch' takes up to 256"),
    (lambda call: num_blocks(call.s_k, BLOCK_K) > _MOST_BLOCKS, "{call.s_k} keys are beyond the 4194304 that its lists can name; split the keys"),
)
"""(whether a call lies beyond the kernels, why): what holds on every GPU."""


def why_not(call) -> str | None:
    """None, or why this backend cannot take the call: the machine, the call itself, the binaries."""
    reason = _no_machine(call.device)
    if reason is not None:
        return reason
    for beyond, sentence in LIMITS:
        if beyond(call):
            return sentence.format(call=call)
    return _no_binary(call.device, config.padded_dim(call.dim), _DTYPES[call.dtype], call.masked)


def status() -> tuple[bool, str]:
    """Whether some GPU of this machine runs the kernels, and for each on which binary it does or why not."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return False, _no_machine(torch.device("cuda", 0))
    available, told = False, []
    for index in range(count):
        machine, text = machine_of(torch.device("cuda", index))
        if machine is not None:
            usual = _variants(machine.arch, _LARGEST_DIM, "float16", machine.pv, False)
            text = machine.missing(usual)
            if text is None:
                available, text = True, f"{machine.arch}, {machine.kernel(usual[2], usual[2].symbols[0]).origin}{machine.note}"
        told.append(f"{torch.cuda.get_device_name(index)}: {text}")
    return available, "; ".join(told)


def self_test_devices() -> list[tuple[torch.device, float]]:
    """Where a self-test runs this backend, and the relative L2 error that quantisation may cost there."""
    machines = [(torch.device("cuda", i), machine_of(torch.device("cuda", i))[0]) for i in range(torch.cuda.device_count())]
    return [(device, TOLERANCE[machine.pv]) for device, machine in machines if machine is not None]


def _no_machine(device: torch.device) -> str | None:
    return machine_of(device)[1]


def _no_binary(device: torch.device, dim: int, dtype: str, masked: bool) -> str | None:
    machine, _ = machine_of(device)
    return machine.missing(_variants(machine.arch, dim, dtype, machine.pv, masked))


# What a machine has does not change while a compiled function lives: torch.compile takes the answers as they are, as with
# torch.compiler.assume_constant_result, which would load the compiler when this package is imported.
_no_machine._dynamo_marked_constant = _no_binary._dynamo_marked_constant = True


def blocks_form(call, rule: Rule | None) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the lists that `select` and `run` return."""
    topk = None if rule is None else rule.topk
    room = workspace.capacity(
        call.s_k, topk=topk, only_topk=rule is not None and not isinstance(topk, Tensor) and rule.cdf is None and not _judged(rule),
        causal=call.causal, keep_q=call.keep_q, keep_k=call.keep_k, ordered=call.perm is not None,
    )  # fmt: skip
    return (call.batch, call.heads, num_blocks(call.s_q, BLOCK_Q), room), torch.int16


def select(call, q: Tensor, k: Tensor, rule: Rule, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The kept blocks as ascending lists (B, H, N_q, capacity), how many those are (B, H, N_q), and the visible ones (B, 1, N_q)."""
    machine, _ = machine_of(call.device)
    with machine.here():
        work = _Work(machine, call, q, k, k, rule, None, key_mask, attend=False)
        work.select()
    return work.lists, work.counts, work.visible


def run(call, q: Tensor, k: Tensor, v: Tensor, rule: Rule | None, block_map: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, ...]:
    """Attention over the blocks that `rule` selects or `block_map` keeps; arguments and returns as the table of backends has them."""
    machine, _ = machine_of(call.device)
    with machine.here():
        work = _Work(machine, call, q, k, v, rule, block_map, key_mask, attend=True)
        work.select()
        out, lse = work.attend()
    return out, lse, work.lists, work.counts, work.visible, work.skips


def machine_of(device: torch.device) -> tuple[Machine | None, str | None]:
    """(the GPU, None), or (None, why there is none for this backend)."""
    if device.type != "cuda":
        return None, f"the tensors are on {device.type}, it needs an NVIDIA GPU"
    if torch.version.hip is not None:
        return None, "this PyTorch is built for AMD GPUs, it needs an NVIDIA GPU"
    if not torch.cuda.is_available():
        return None, "PyTorch finds no NVIDIA GPU"
    try:
        return _machine(torch.cuda.current_device() if device.index is None else device.index)
    except loader.NotNow as error:
        return None, str(error)


@lru_cache(maxsize=16)
def _machine(index: int) -> tuple[Machine | None, str | None]:
    if driver.capturing(index):
        raise loader.NotNow  # and no answer, which the cache would keep
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        name = torch.cuda.get_device_name(index)
        return None, f"it needs an RTX 30 series, A100 or newer GPU (compute capability 8.0), this {name} has {major}.{minor}"
    arch = f"sm_{major}{minor}"
    reason = driver.why_not(arch)
    if reason is None and environment.pv() not in (None, *config.forms(arch)):
        reason = (
            f"SPARGE_PV must be {' or '.join(config.forms(arch))} on {arch}, got {environment.pv()}, which is for sm_90 (H100, H200) alone: "
            "elsewhere it is less exact than int8 and not known to be faster; set one of these, or unset it"
        )
    return (None, reason) if reason is not None else (Machine(index, arch, *_form(index, arch)), None)


def _form(index: int, arch: str) -> tuple[str, str]:
    """How P and V are held on a GPU, and what the status adds to it: that the kernel of the best form cannot be had."""
    asked = environment.pv()
    best = asked or config.pv_for(arch)
    if asked is None and config.on_hopper_kernel(arch, best):
        reason = loader.why_not(index, tuple(config.attention_variant(arch, dim, best, masked) for dim in config.DIMS for masked in (False, True)))
        if reason is not None:
            return config.PV_EVERYWHERE, f"; P and V are {config.PV_EVERYWHERE}, because of {best} there is {reason}"
    return best, ""


class Machine:
    """One GPU and what runs on it.

    Attributes
    ----------
    arch : str
        "sm_86".
    pv : str
        How P and V are held, one of `config.PV`.
    note : str
        What a report adds to the attention kernel's origin.
    processors : int
        Multiprocessors.
    """

    def __init__(self, index: int, arch: str, pv: str, note: str = ""):
        self.index, self.arch, self.pv, self.note = index, arch, pv, note
        self.processors = torch.cuda.get_device_properties(index).multi_processor_count

    def missing(self, variants: tuple[config.Variant, ...]) -> str | None:
        """None, or why one of these binaries cannot be had."""
        return loader.why_not(self.index, variants)

    def kernel(self, variant: config.Variant, symbol: str) -> driver.Kernel:
        return loader.kernel(self.index, variant, symbol)

    def launch(self, kernel: driver.Kernel, grid: int, threads: int, shared: int, params, stream: int) -> None:
        """Puts one kernel on a stream."""
        driver.launch(kernel, grid, threads, shared, params, stream)

    def here(self):
        """A context in which this GPU is the current one."""
        return torch.cuda.device(self.index)

    def stream(self) -> int:
        """The stream that PyTorch works on now."""
        return driver.current_stream(self.index)


class _Work:
    """One call: its buffers, and its launches in order.

    The kernels may still run when it is gone: PyTorch hands freed memory out again in the order of the stream, and the driver has copied the structs.
    """

    def __init__(self, machine, call, q, k, v, rule, block_map, key_mask, *, attend: bool):
        self.machine, self.call, self.rule, self.block_map, self.stream = machine, call, rule, block_map, machine.stream()
        readable, unreadable = prepare.given(call, rule, block_map, key_mask)
        self.q, self.k, self.v, self.key_mask = q, k, v, key_mask
        self.read = {"q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(), **{name: x.data_ptr() for name, x in readable.items()}}
        if call.perm is not None:
            self.read["perm"] = call.perm.data_ptr()
        shape, dtype = blocks_form(call, rule)
        judged = rule is not None and _judged(rule)
        pv = machine.pv
        drawn = attend and config.on_hopper_kernel(machine.arch, pv)
        # A share of the blocks that is the same for all rows gives lists of one length, but for those of rows that keep everything.
        sequenced = drawn and 1 < shape[2] <= _MOST_BLOCKS and (rule is None or rule.cdf is not None or judged)
        self.variants = _variants(machine.arch, config.padded_dim(call.dim), _DTYPES[call.dtype], pv, call.masked)
        self.layout = workspace.plan(
            workspace.Problem(
                call.batch, call.heads, call.kv_heads, call.s_q, call.s_k, call.dim, _DTYPES[call.dtype], pv, shape[-1], q.stride(), k.stride(),
                v.stride(), call.causal, call.causal_offset, rule is not None and rule.score == "subblock", call.smooth_k, judged, call.compensate,
                call.want_lse, key_mask is not None, drawn, sequenced, machine.processors,
            ),
            prepare.buffers(call, unreadable, key_mask) + (() if attend else (("skips", (call.batch, call.heads, 2), "int32"),)),
        )  # fmt: skip
        device = q.device
        self.space = _empty((self.layout.nbytes,), torch.uint8, device)
        self.base = self.space.data_ptr()
        self.lists = _empty(shape, dtype, device)
        self.counts = _empty(shape[:3], torch.int32, device)
        self.visible = _empty((call.batch, 1, shape[2]), torch.int32, device)
        self.skips = _empty((call.batch, call.heads, 2), torch.int32, device) if attend else self._buffer("skips")
        prepare.fill(call, unreadable, key_mask, self._buffer)

    def select(self) -> None:
        prepass, selection, _ = self.variants
        self._launch(prepass, "sparge_statistics", self._params("sparge_statistics"), prepass.shared)

        p = self._params("sparge_prepass")
        p.scale = self.call.scale
        self._launch(prepass, "sparge_prepass", p, prepass.shared)

        p = self._params("sparge_select")
        p.lists, p.counts, p.visible, p.skips = self.lists.data_ptr(), self.counts.data_ptr(), self.visible.data_ptr(), self.skips.data_ptr()
        p.scale, p.topk, p.cdf, p.sim = self.call.scale, -1.0, -1.0, -1.0
        if self.block_map is not None:
            block_map = self.block_map if "block_map" in self.read else self._buffer("block_map")
            p.map_batch, p.map_head = (stride * (size > 1) for size, stride in zip(block_map.shape[:2], block_map.stride()[:2], strict=True))
        else:
            for name, value in (("topk", self.rule.topk), ("cdf", self.rule.cdf), ("sim", self.rule.sim)):
                if value is not None and not isinstance(value, Tensor):
                    setattr(p, name, value)
        self._launch(selection, "sparge_select", p, self.layout.select_shared)

    def attend(self) -> tuple[Tensor, Tensor]:
        call, q = self.call, self.q
        out = _empty_like(q)
        lse = _empty((call.batch, call.heads, call.s_q) if call.want_lse else (0,), torch.float32, q.device)
        if "row_shift" in self.layout.buffers:
            prepare.row_shift(call, q, self.k, self.v, self.key_mask, self._buffer)
        _, selection, attention = self.variants
        if "sequence" in self.layout.buffers:
            p = self._params("sparge_sequence")
            p.counts = self.counts.data_ptr()
            self._launch(selection, "sparge_sequence", p, 0)
        (symbol,) = attention.symbols
        p = self._params(symbol)
        p.lists, p.counts, p.skips, p.out = self.lists.data_ptr(), self.counts.data_ptr(), self.skips.data_ptr(), out.data_ptr()
        p.out_stride.batch, p.out_stride.head, p.out_stride.token = out.stride()[:3]
        if call.want_lse:
            p.lse = lse.data_ptr()
        if not isinstance(call.pvthreshd, Tensor):
            p.pvthreshd = call.pvthreshd
        self._launch(attention, symbol, p, attention.shared)
        return out, lse

    def _buffer(self, name: str) -> Tensor:
        offset, shape, dtype = self.layout.buffers[name]
        dtype = getattr(torch, dtype)
        return self.space[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def _params(self, symbol: str):
        """The struct of a kernel with all that `Layout.params` sets, and what it reads of the caller's."""
        params, fields = self.layout.params(symbol, self.base), FIELDS[symbol]
        for name, address in self.read.items():
            if name in fields:
                setattr(params, name, address)
        return params

    def _launch(self, variant: config.Variant, symbol: str, params, shared: int) -> None:
        self.machine.launch(self.machine.kernel(variant, symbol), self.layout.grids[symbol], variant.threads, shared, params, self.stream)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _judged(rule: Rule) -> bool:
    return isinstance(rule.sim, Tensor) or rule.sim > 0


@lru_cache(maxsize=256)
def _variants(arch: str, dim: int, dtype: str, pv: str, masked: bool) -> tuple[config.Variant, config.Variant, config.Variant]:
    """The binaries of a call: statistics and pre-pass, selection, attention."""
    found = {variant.name: variant for variant in config.variants(arch)}
    attention = config.attention_variant(arch, dim, pv, masked)
    return found[config.prepass_name(dim, dtype)], found[config.select_name(dim)], attention
