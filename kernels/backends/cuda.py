"""The backend on NVIDIA GPUs: four launches a call (statistics, pre-pass, selection, attention), one workspace, nothing read back. A persistent
attention kernel takes a fifth, which puts the query blocks into order, where their lists may differ in length.

8-bit: INT8 Q and K, P and V as the machine's `pv` says. A call allocates what it returns and the workspace, which holds, in bytes per element with
head_dim rounded up to 64 or 128: 1.3 for q, 1.2 for k and 1 for v (fp16 V: 2) in their quantised and pooled forms, and the scores of 64 query pools
for every multiprocessor twice. What the kernels cannot read as it is given (a float key mask, a strided block map) has its copy there. `compensate`
adds 4 bytes per element of q, and two buffers for fp32 heads, each of 256 MB at most or of one kv head with its queries.

Nothing is kept on the device between calls, so that a call can be captured into a CUDA graph: its memory is then the graph's. What a kind of call
(dtype, head_dim up to 64 or 128, with a key mask or without) needs is loaded by the first one; during a capture that one is declined instead.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import config, environment
from ..block_mask import BLOCK_K, BLOCK_Q, KeptBlocks, num_blocks
from ..call import Availability, Call, Form, Kind, Result, Rule, SelfTest
from ..cuda import driver, loader, prepare, workspace
from ..cuda.prepare import Inputs
from ..cuda.workspace import Binaries, Workspace

quantised = True
skips_pv = True
logger = logging.getLogger("sparge_kernels")

_NOTHING = nullcontext()
_DTYPES = {getattr(torch, name): name for name in config.DTYPES}

TOLERANCE = {"int8": 0.03, "fp8": 0.05, "fp16": 0.03}
"""Relative L2 error against exact attention over the same blocks that independent normal q, k and v may show, by the form of P and V."""


def why_not(kind: Kind) -> str | None:
    """None, or why this backend cannot take calls of a kind: the machine, the kernels, the binaries."""
    width = next((dim for dim in config.DIMS if kind.dim <= dim), None)
    reason = _declined(kind.device, kind.dtype, width, kind.masked)
    if reason is None and width is None:
        return f"head_dim {kind.dim} is beyond the 1 to {config.DIMS[-1]} of its kernels; backend='torch' takes up to 256"
    if reason is None and num_blocks(kind.s_k, BLOCK_K) > workspace.MOST_BLOCKS:
        return f"{kind.s_k} keys are beyond the {workspace.MOST_BLOCKS * BLOCK_K} that its lists can name; split the keys"
    return reason


def _declined(device: torch.device, dtype: torch.dtype, width: int | None, masked: bool) -> str | None:
    """Why calls of one head size of the kernels are declined; with None, why calls of all are."""
    machine, reason = machine_of(device)
    if machine is None:
        return reason
    if dtype not in _DTYPES:
        return f"{dtype} is none of the types that its kernels read (float16, bfloat16, float32)"
    return None if width is None else machine.missing(_binaries(machine.arch, machine.pv, width, dtype, masked).variants)


# What a machine has does not change while a compiled function lives: torch.compile takes the answer as it is, as with
# torch.compiler.assume_constant_result, which would load the compiler when this package is imported.
vars(_declined)["_dynamo_marked_constant"] = True


def status() -> Availability:
    """Whether some GPU of this machine runs the kernels, and for each on which binary it does or why not."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return Availability(False, machine_of(torch.device("cuda", 0)).why_not)
    available, told = False, []
    for index in range(count):
        machine, text = machine_of(torch.device("cuda", index))
        if machine is not None:
            usual = _binaries(machine.arch, machine.pv, config.DIMS[-1], torch.float16, False)
            text = machine.missing(usual.variants)
            if text is None:
                available, text = True, f"{machine.arch}, {machine.kernel(usual.attention, usual.attention.symbols[0]).origin}{machine.note}"
        told.append(f"{torch.cuda.get_device_name(index)}: {text}")
    return Availability(available, "; ".join(told))


def self_test_devices() -> list[SelfTest]:
    """Every GPU that the kernels run on."""
    machines = [(torch.device("cuda", i), machine_of(torch.device("cuda", i)).machine) for i in range(torch.cuda.device_count())]
    return [SelfTest(device, TOLERANCE[machine.pv]) for device, machine in machines if machine is not None]


def blocks_form(call: Call, rule: Rule) -> Form:
    """Lists of key block numbers."""
    return Form((call.batch, call.heads, num_blocks(call.s_q, BLOCK_Q), workspace.capacity(call, rule)), torch.int16)


def select(call: Call, rule: Rule, q: Tensor, k: Tensor) -> KeptBlocks:
    """The blocks that `rule` keeps."""
    machine, _ = machine_of(call.device)
    with machine.here():
        work = _Work(machine, call, rule, Inputs(q, k, None))
        work.select()
    return work.kept()


def run(call: Call, rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Attention over the blocks that `rule` keeps."""
    machine, _ = machine_of(call.device)
    with machine.here():
        work = _Work(machine, call, rule, Inputs(q, k, v))
        work.select()
        work.attend()
    results = work.results
    return Result(results["out"], results.get("lse"), work.kept() if call.want_info else None, results.get("pv_tiles"))


class Found(NamedTuple):
    """The machine that a device is, or why there is none for this backend."""

    machine: Machine | None
    why_not: str | None


def machine_of(device: torch.device) -> Found:
    """What this backend runs on where a tensor is on `device`."""
    if device.type != "cuda":
        return Found(None, f"the tensors are on {device.type}, it needs an NVIDIA GPU")
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    try:
        return _machine(index)
    except loader.NotNow as error:
        return Found(None, str(error))


@lru_cache(maxsize=16)
def _machine(index: int) -> Found:
    if torch.version.hip is not None:
        return Found(None, "this PyTorch is built for AMD GPUs, it needs an NVIDIA GPU")
    if not torch.cuda.is_available():
        return Found(None, "PyTorch finds no NVIDIA GPU")
    if driver.capturing(index):
        raise loader.NotNow  # and no answer, which the cache would keep
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        name = torch.cuda.get_device_name(index)
        return Found(None, f"it needs an RTX 30 series, A100 or newer GPU (compute capability 8.0), this {name} has {major}.{minor}")
    arch = f"sm_{major}{minor}"
    reason = driver.why_not(arch)
    if reason is None and environment.pv() not in (None, *config.forms(arch)):
        reason = (
            f"SPARGE_PV must be {' or '.join(config.forms(arch))} on {arch}, got {environment.pv()}, which is for sm_90 (H100, H200) alone: "
            "elsewhere it is less exact than int8 and not known to be faster; set one of these, or unset it"
        )
    if reason is not None:
        return Found(None, reason)
    form = _form(index, arch)
    return Found(Machine(index, arch, form.pv, form.note), None)


class _Form(NamedTuple):
    """How P and V are held on a GPU, and what the status adds to it: which better kernel cannot be had, and why."""

    pv: str
    note: str


def _form(index: int, arch: str) -> _Form:
    asked = environment.pv()
    if asked is not None:
        return _Form(asked, "")
    *better, last = config.attention_kernels(arch)
    reasons = []
    for kernel in better:
        pv = kernel.forms[0]
        reason = loader.why_not(index, tuple(kernel.variant(dim, pv, masked) for dim in config.DIMS for masked in (False, True)))
        if reason is None:
            return _Form(pv, "")
        reasons.append(f"of {pv} there is {reason}")
    pv = last.forms[0]
    return _Form(pv, f"; P and V are {pv}, because {' and '.join(reasons)}" if reasons else "")


@lru_cache(maxsize=256)
def _binaries(arch: str, pv: str, dim: int, dtype: torch.dtype, masked: bool) -> Binaries:
    dim = config.padded_dim(dim)
    found = {variant.name: variant for variant in config.variants(arch)}
    prepass, selection = found[config.prepass_name(dim, _DTYPES[dtype])], found[config.select_name(dim)]
    kernel = config.attention_kernel(arch, pv)
    return Binaries(pv, prepass, selection, kernel.variant(dim, pv, masked), kernel)


class Machine:
    """One GPU ("sm_86", and its multiprocessors) and what runs on it: P and V in the form `pv`; `note` is what the status adds to that."""

    def __init__(self, index: int, arch: str, pv: str, note: str = ""):
        self.index, self.arch, self.pv, self.note = index, arch, pv, note
        self.processors = torch.cuda.get_device_properties(index).multi_processor_count
        self._kernels: dict[tuple[str, str], driver.Kernel] = {}

    def missing(self, variants: Sequence[config.Variant]) -> str | None:
        """None, or why one of these binaries cannot be had."""
        if all((variant.name, symbol) in self._kernels for variant in variants for symbol in variant.symbols):
            return None
        return loader.why_not(self.index, variants)

    def kernel(self, variant: config.Variant, symbol: str) -> driver.Kernel:
        """A kernel on this GPU, where it stays loaded."""
        found = self._kernels.get((variant.name, symbol))
        if found is None:
            found = self._kernels[variant.name, symbol] = loader.kernel(self.index, variant, symbol)
        return found

    def launch(self, kernel: driver.Kernel, grid: int, threads: int, shared: int, params, stream: int) -> None:
        """Puts one kernel on a stream."""
        driver.launch(kernel, grid, threads, shared, params, stream)

    def here(self):
        """A context in which this GPU is the current one."""
        return _NOTHING if torch.cuda.current_device() == self.index else torch.cuda.device(self.index)

    def stream(self) -> int:
        """The stream that PyTorch works on now."""
        return driver.current_stream(self.index)


class _Work:
    """One call: its workspace and results, and its launches in order.

    The kernels may still run when it is gone: PyTorch hands freed memory out again in the order of the stream, and the driver has copied the structs.
    """

    def __init__(self, machine: Machine, call: Call, rule: Rule, inputs: Inputs):
        self.machine, self.call, self.inputs, self.stream = machine, call, inputs, machine.stream()
        carved = self.workspace = _carved(machine, call, rule, inputs)
        q, k, v = inputs
        self.space = _empty((carved.nbytes,), torch.uint8, q.device)
        self.results = {name: _empty(form.shape, form.dtype, q.device) for name, form in carved.results.items()}
        if v is not None:
            self.results["out"] = _empty_like(q)
        tensors: dict[str, Any] = {  # and numbers, which are none of `outside` and `copied`
            "q": q, "k": k, "v": k if v is None else v, "perm": call.perm, "key_valid": call.key_mask, "block_map": rule.block_map,
            "topk_heads": rule.topk, "cdf_heads": rule.cdf, "sim_heads": rule.sim, "pv_heads": call.pvthreshd, **self.results,
        }  # fmt: skip
        self.structs = carved.structs(self.space.data_ptr(), [tensors[name].data_ptr() for name in carved.outside])
        _, prepass, selection, *_ = self.structs
        prepass.scale = selection.scale = call.scale
        selection.topk, selection.cdf, selection.sim = _number(rule.topk), _number(rule.cdf), _number(rule.sim)
        if v is not None and not isinstance(call.pvthreshd, Tensor):
            self.structs[-1].pvthreshd = call.pvthreshd
        if carved.prepared:
            prepare.fill(call, {name: tensors[name] for name in carved.copied}, self.view)

    def view(self, name: str) -> Tensor:
        """A buffer of the workspace."""
        return self.workspace.view(self.space, name)

    def select(self) -> None:
        """The first three launches."""
        self._launch(slice(3))

    def attend(self) -> None:
        """The others."""
        if "row_shift" in self.workspace.buffers:
            prepare.row_shift(self.call, self.inputs, self.view)
        self._launch(slice(3, None))

    def kept(self) -> KeptBlocks:
        """What the selection left."""
        blocks, counts, visible = (self.results[name] for name in ("lists", "counts", "visible"))
        return KeptBlocks(blocks, counts, visible, num_blocks(self.call.s_k, BLOCK_K))

    def _launch(self, which: slice) -> None:
        machine, stream, launches = self.machine, self.stream, self.workspace.launches
        for launch, struct in zip(launches[which], self.structs[which], strict=True):
            symbol, variant, grid, shared = launch
            kernel = machine.kernel(variant, symbol)
            try:
                machine.launch(kernel, grid, variant.threads, shared, struct, stream)
            except RuntimeError as error:  # which may be the word of an earlier launch: a GPU tells late
                before = ", ".join(f"{x.symbol} (grid {x.grid})" for x in launches[: launches.index(launch)]) or "nothing"
                raise type(error)(f"{error}; launched before it in this call: {before}") from error


def _number(value: float | Tensor | None) -> float:
    """What a struct holds where there is no number for all heads: -1."""
    return -1.0 if value is None or isinstance(value, Tensor) else value


_CARVED: dict[tuple, Workspace] = {}
_MOST_CARVED = 256
"""Kinds of calls whose workspace stays known: a few kB of the host's memory each."""


def _carved(machine: Machine, call: Call, rule: Rule, inputs: Inputs) -> Workspace:
    key = (machine.arch, machine.pv, machine.processors, *workspace.key(call, rule, inputs))
    found = _CARVED.get(key)
    if found is None:
        binaries = _binaries(machine.arch, machine.pv, call.dim, call.dtype, call.key_mask is not None)
        found = workspace.carve(call, rule, inputs, binaries, machine.processors)
        if len(_CARVED) >= _MOST_CARVED:
            _CARVED.pop(next(iter(_CARVED)), None)
        _CARVED[key] = found
        level = logging.WARNING if environment.log() else logging.DEBUG
        if logger.isEnabledFor(level):
            logger.log(level, "%s", _described(machine, call, found))
    return found


def _described(machine: Machine, call: Call, found: Workspace) -> str:
    """A new kind of call in one line: its backend and shapes, what it launches from which binaries, and the bytes of its workspace."""
    shapes = f"B={call.batch} H={call.heads} H_kv={call.kv_heads} S_q={call.s_q} S_k={call.s_k} D={call.dim} {str(call.dtype).removeprefix('torch.')}"
    launches = (
        f"{launch.symbol} grid {launch.grid} x {launch.variant.threads}, {launch.shared} bytes of shared memory, "
        f"{machine.kernel(launch.variant, launch.symbol).origin}"
        for launch in found.launches
    )
    return f"new kind of call, backend cuda on {machine.arch}: {shapes}; workspace {found.nbytes} bytes; {'; '.join(launches)}"


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x)
