"""The CUDA backend's host side with launches recorded instead of run: what it declines and why, what it allocates, what it hands to the kernels."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from sparge_kernels import (
    BACKEND_NAMES,
    BackendChoice,
    UnsupportedCall,
    __main__,
    backends,
    can_run,
    config,
    select_blocks,
    sparse_attention,
)
from sparge_kernels.backends import choose
from sparge_kernels.backends import cuda as backend
from sparge_kernels.call import Call, Kind, Rule
from sparge_kernels.cuda import loader, prepare, workspace
from sparge_kernels.cuda.params import FIELDS, SYMBOLS, Strides
from torch.utils._python_dispatch import TorchDispatchMode

KERNELS = ["sparge_statistics", "sparge_prepass", "sparge_select", "sparge_attention_mma"]
ON_HOPPER = [*KERNELS[:3], "sparge_attention_sm90"]
IN_SEQUENCE = [*KERNELS[:3], "sparge_sequence", "sparge_attention_sm90"]


class RecordingMachine:
    """A GPU that notes its launches: (kernel, variant, grid, shared memory, a copy of the struct, threads)."""

    def __init__(self, pv="int8", processors=84, arch="sm_89"):
        self.arch, self.pv, self.processors, self.launched = arch, pv, processors, []

    def missing(self, variants):
        return None

    def kernel(self, variant, symbol):
        return SimpleNamespace(variant=variant.name, name=symbol)

    def launch(self, kernel, grid, threads, shared, params, stream):
        assert stream == 7
        self.launched.append((kernel.name, kernel.variant, grid, shared, type(params).from_buffer_copy(params), threads))

    def here(self):
        return contextlib.nullcontext()

    def stream(self):
        return 7


@pytest.fixture
def machine(monkeypatch):
    made = RecordingMachine()
    monkeypatch.setattr(backend, "machine_of", lambda device: (made, None))
    return made


def call_of(q, k, **options):
    return Call.of(q, k, "cuda", **{"scale": 0.25, "want_info": True, **options})


def tensors(rand, b=2, h=4, h_kv=2, s_q=333, s_k=400, d=40, dtype=torch.float16):
    return rand(1, b, h, s_q, d, dtype=dtype), rand(2, b, h_kv, s_k, d, dtype=dtype), rand(3, b, h_kv, s_k, d, dtype=dtype)


# What a call costs the host.


class Ops(TorchDispatchMode):
    """Every PyTorch operator that runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


VIEWS = {"slice", "view", "detach", "select", "unsqueeze", "split", "unbind", "transpose", "expand"}
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "repeat_interleave", "lift_fresh"}
"""Operators that wait for a device: they read something back (repeat_interleave: with repeats in a tensor) or copy a fresh host value to it."""

CASES = {
    "plain": dict(),
    "lse": dict(want_lse=True),
    "out alone": dict(want_info=False),
    "causal": dict(causal=True, causal_offset=3),
    "bool mask": dict(key_mask="bool"),
    "float mask": dict(key_mask="float"),
    "always_keep": dict(keep_q=(3, 9), keep_k=(0, 5, 100, 300)),
    "per head": dict(pvthreshd=torch.tensor([3.0, 4.0, 5.0, 6.0], dtype=torch.float64)),
    "compensate": dict(compensate=True, want_lse=True),
    "block map": dict(block_map=True),
}


def run_case(rand, name, **more):
    options = {**CASES[name], **more}
    q, k, v = tensors(rand)
    key_mask = options.pop("key_mask", None)
    if key_mask is not None:
        key_mask = torch.arange(400).expand(2, 400) % 3 > 0
        key_mask = key_mask if CASES[name]["key_mask"] == "bool" else torch.where(key_mask, 0.5, -1e4)
    rule = Rule(block_map=torch.ones(1, 1, 3, 7, dtype=torch.bool)) if options.pop("block_map", False) else Rule(0.3)
    call = call_of(q, k, key_mask=key_mask, **options)
    backend.run(call, rule, q, k, v)  # what is kept for later calls is there now
    with Ops() as seen:
        result = backend.run(call, rule, q, k, v)
    return seen.names, result


@pytest.mark.parametrize("name", CASES)
def test_four_launches_few_allocations_and_no_wait(machine, rand, name):
    torch.utils.deterministic.fill_uninitialized_memory = False  # it adds operators of its own
    names, _ = run_case(rand, name)
    assert [launch[0] for launch in machine.launched[4:]] == KERNELS
    assert not WAITING & set(names), names
    options = {"want_info": True, **CASES[name]}
    made = ["empty"] * (1 + options.get("want_lse", False) + 4 * options["want_info"]) + ["empty_like"]  # workspace, lse, what the info holds; out
    names = [n for n in names if n not in VIEWS]
    prepared = {
        "per head": ["copy_"], "float mask": ["copy_", "gt", "logical_not_", "masked_fill_", "amax", "nan_to_num_", "sub_"],
        "always_keep": ["zero_", "fill_", "zero_", "fill_", "fill_"],
    }  # fmt: skip
    if name == "compensate":
        assert names.count("bmm") == 3 and len(names) <= len(made) + 28, names
    else:
        assert names == [*made, *prepared.get(name, [])]


@pytest.fixture
def hopper(monkeypatch):
    made = RecordingMachine("fp8", 132, "sm_90")
    monkeypatch.setattr(backend, "machine_of", lambda device: (made, None))
    return made


@pytest.mark.parametrize("name", CASES)
def test_on_hopper_an_order_is_launched_where_lists_may_differ(hopper, rand, name):
    torch.utils.deterministic.fill_uninitialized_memory = False
    names, _ = run_case(rand, name)
    wanted = IN_SEQUENCE if name == "block map" else ON_HOPPER
    assert [launch[0] for launch in hopper.launched[len(wanted) :]] == wanted
    assert not WAITING & set(names), names


@pytest.mark.parametrize(
    "rule, s_q, sequence",
    [
        (Rule(0.3, None, -1.0), 333, False), (Rule(torch.full((4,), 0.3), None, -1.0), 333, False), (Rule(None, 0.5, -1.0), 333, True),
        (Rule(0.3, torch.full((4,), 0.5), -1.0), 333, True), (Rule(0.3, None, 0.4), 333, True),
        (Rule(0.3, None, torch.full((4,), 0.4)), 333, True), (Rule(None, 0.5, -1.0), 128, False), (Rule(None, 0.5, -1.0), 129, True),
    ],
    ids=["topk", "topk per head", "cdf", "cdf per head", "judge", "judge per head", "one query block", "two query blocks"],
)  # fmt: skip
def test_the_counter_and_the_sequence(hopper, rand, rule, s_q, sequence):
    q, k, v = tensors(rand, s_q=s_q)
    backend.run(call_of(q, k), rule, q, k, v)
    found = {name: struct_values(params) for name, _, _, _, params, _ in hopper.launched}
    assert list(found) == (IN_SEQUENCE if sequence else ON_HOPPER)
    select, attend = found["sparge_select"], found["sparge_attention_sm90"]
    assert select["counter"] is not None and select["counter"] == attend["counter"]
    assert (attend["sequence"] is not None) == sequence
    if sequence:
        assert found["sparge_sequence"] == {"counts": attend["counts"], "sequence": attend["sequence"], "s_q": s_q}


def test_no_sequence_of_more_blocks_than_16_bits_can_name(hopper, rand, monkeypatch):
    monkeypatch.setattr(workspace, "MOST_BLOCKS", 2)
    monkeypatch.setattr(backend, "_CARVED", {})
    q, k, v = tensors(rand, s_q=333)
    backend.run(call_of(q, k), Rule(None, 0.5, -1.0), q, k, v)
    assert [launch[0] for launch in hopper.launched] == ON_HOPPER


@pytest.mark.parametrize("b, h, s_q, grid", [(1, 1, 100, 1), (2, 4, 333, 24), (1, 4, 128 * 33, 132), (1, 4, 128 * 33 + 1, 132), (3, 24, 2000, 132)])
def test_hoppers_grid_is_the_device(hopper, rand, b, h, s_q, grid):
    q, k, v = torch.zeros(b, h, s_q, 8).half(), *torch.zeros(2, b, h, 64, 8).half()
    backend.run(call_of(q, k), Rule(None, 0.5, -1.0), q, k, v)
    found = {name: (variant, got, shared, threads) for name, variant, got, shared, _, threads in hopper.launched}
    variant = config.SM90.variant(64, "fp8", False)
    assert found["sparge_attention_sm90"] == (variant.name, grid, variant.shared, 384)
    if s_q > 128:
        assert found["sparge_sequence"] == ("select_d64", b * h, 0, 256)
    assert {threads for name, (*_, threads) in found.items() if name != "sparge_attention_sm90"} == {256}


@pytest.mark.parametrize("d, e", [(40, 64), (128, 128)])
@pytest.mark.parametrize("pv", config.PV)
def test_hoppers_kernel_is_for_fp8(monkeypatch, rand, pv, d, e):
    made = RecordingMachine(pv, 132, "sm_90")
    monkeypatch.setattr(backend, "machine_of", lambda device: (made, None))
    q, k, v = tensors(rand, d=d)
    for masked in (False, True):
        made.launched.clear()
        backend.run(call_of(q, k, key_mask=torch.ones(2, 400, dtype=torch.bool) if masked else None), Rule(None, 0.5), q, k, v)
        kernel = "sm90" if pv == "fp8" else "mma"
        name, variant, _, _, params, _ = made.launched[-1]
        assert (name, variant) == (f"sparge_attention_{kernel}", f"attention_{kernel}_d{e}_{pv}" + "_masked" * masked)
        assert len(made.launched) == (5 if pv == "fp8" else 4) and (params.counter is None) == (params.sequence is None) == (pv != "fp8")
        assert next(struct for symbol, _, _, _, struct, _ in made.launched if symbol == "sparge_prepass").pv == config.PV.index(pv)


def test_selection_alone_needs_no_counter_on_hopper(hopper, rand):
    q, k, _ = tensors(rand)
    backend.select(call_of(q, k), Rule(None, 0.5, -1.0), q, k)
    assert [launch[0] for launch in hopper.launched] == KERNELS[:3] and hopper.launched[-1][4].counter is None


def test_select_blocks_launches_three(machine, rand):
    q, k, _ = tensors(rand)
    kept = backend.select(call_of(q, k), Rule(0.3, None, -1.0), q, k)
    assert [launch[0] for launch in machine.launched] == KERNELS[:3]
    assert kept.blocks.shape == (2, 4, 3, kept.blocks.shape[3]) and kept.counts.shape == (2, 4, 3) and kept.visible.shape == (2, 1, 3)
    assert kept.key_blocks == 7


# What the kernels are told.


def struct_values(params):
    values = {name: getattr(params, name) for name, _ in params._fields_}
    return {name: (v.batch, v.head, v.token) if isinstance(v, Strides) else v for name, v in values.items()}


def launched(machine):
    return {symbol: struct_values(params) for symbol, _, _, _, params, _ in machine.launched[-4:]}


def test_sizes_strides_and_scalars(machine, rand):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(rand, d=72))
    heads = torch.tensor([0.1, 0.2, 0.3, 0.4])
    call = call_of(q, k, scale=0.3, causal=True, causal_offset=-(1 << 39), smooth_k=False, pvthreshd=9.0, want_lse=True)
    out, lse, kept, tiles = backend.run(call, Rule(heads, 0.7, 0.2, "mean"), q, k, v)
    got = launched(machine)
    for params in got.values():
        for name, value in dict(batch=2, heads=4, kv_heads=2, s_q=333, s_k=400, dim=72, smooth_k=0, pv=0, capacity=7).items():
            assert params.get(name, value) == value, name
    assert got["sparge_prepass"]["q_stride"] == q.stride()[:3] == got["sparge_attention_mma"]["out_stride"]
    assert got["sparge_statistics"]["k_stride"] == got["sparge_prepass"]["k_stride"] == k.stride()[:3]
    assert got["sparge_statistics"]["v_stride"] == got["sparge_prepass"]["v_stride"] == v.stride()[:3]
    assert got["sparge_prepass"]["scale"] == got["sparge_select"]["scale"] == pytest.approx(0.3)
    select, attend = got["sparge_select"], got["sparge_attention_mma"]
    assert (select["topk"], select["cdf"], select["sim"]) == pytest.approx((-1, 0.7, 0.2)) and select["subblock"] == 0
    assert select["topk_heads"] and not select["cdf_heads"] and not select["sim_heads"]
    assert select["causal"] == attend["causal"] == 1 and select["causal_offset"] == attend["causal_offset"] == -333
    assert attend["pvthreshd"] == 9 and not attend["pv_heads"] and attend["out_type"] == 0
    for name, tensor in dict(lists=kept.blocks, counts=kept.counts, visible=kept.visible, pv_tiles=tiles).items():
        assert select[name] == tensor.data_ptr() and attend.get(name, tensor.data_ptr()) == tensor.data_ptr()
    assert (attend["out"], attend["lse"]) == (out.data_ptr(), lse.data_ptr()) and attend["row_shift"] is None
    statistics = machine.launched[-4]
    assert statistics[2] == 2 * 2 * got["sparge_statistics"]["splits"] and got["sparge_statistics"]["split_length"] % 16 == 0
    assert machine.launched[-3][2] == 2 * (4 * 3 + 2 * 7) and machine.launched[-1][2] == 2 * 4 * 3


OUTSIDE = {
    "sparge_statistics": {"k", "v"}, "sparge_prepass": {"q", "k", "v"}, "sparge_select": {"lists", "counts", "visible", "pv_tiles"},
    "sparge_attention_mma": {"lists", "counts", "pv_tiles", "out"},
}  # fmt: skip
OPTIONAL = {
    "lse": {"lse", "lse_shift"}, "bool mask": {"key_valid", "bias2"}, "float mask": {"key_bias", "bias2", "top"},
    "always_keep": {"forced_q", "forced_k"}, "per head": {"pv_heads"}, "compensate": {"lse", "lse_shift", "v_mean", "state", "row_shift"},
    "block map": {"block_map"}, "judge": {"q_sim", "k_sim"}, "order": {"perm"}, "rule per head": {"topk_heads", "cdf_heads", "sim_heads"},
    "Hopper's kernel": {"counter", "sequence"},
}  # fmt: skip


@pytest.mark.parametrize("name", [*CASES, "judge", "order", "rule per head"])
def test_exactly_the_pointers_of_the_features_in_use_are_set(machine, rand, name):
    if name in CASES:
        run_case(rand, name)
    else:
        q, _, _ = tensors(rand)
        per_head = torch.full((4,), 0.5)
        rule = {"judge": Rule(0.3, None, 0.4), "rule per head": Rule(per_head, per_head, per_head)}.get(name, Rule(0.3, None, -1.0))
        perm = torch.arange(333).flip(0) if name == "order" else None
        backend.run(call_of(q, q, perm=perm), rule, q, q, q)
    optional = set().union(*OPTIONAL.values())
    wanted = OPTIONAL.get(name, set()) | ({"q_sim", "k_sim"} if name == "rule per head" else set())
    for symbol, values in launched(machine).items():
        pointers = {field for field, kind in SYMBOLS[symbol]._fields_ if kind is ctypes.c_void_p}
        unset = {field for field in pointers if values[field] is None}
        assert unset == (pointers & optional) - wanted, symbol


@pytest.mark.parametrize("d, e", [(1, 64), (64, 64), (65, 128), (128, 128)])
@pytest.mark.parametrize("dtype", config.DTYPES)
@pytest.mark.parametrize("pv", config.forms("sm_89"))
def test_the_binaries_of_a_call(monkeypatch, rand, pv, dtype, d, e):
    made = RecordingMachine(pv)
    monkeypatch.setattr(backend, "machine_of", lambda device: (made, None))
    q, k, v = tensors(rand, d=d, dtype=getattr(torch, dtype))
    for masked in (False, True):
        mask = torch.ones(2, 400, dtype=torch.bool) if masked else None
        backend.run(call_of(q, k, key_mask=mask), Rule(0.3, None, -1.0), q, k, v)
        names = [launch[1] for launch in made.launched[-4:]]
        assert names == [f"prepass_d{e}_{dtype}"] * 2 + [f"select_d{e}", f"attention_mma_d{e}_{pv}" + "_masked" * masked]
        found = {variant.name: variant for variant in config.variants("sm_89")}
        shared = [launch[3] for launch in made.launched[-4:]]
        assert shared[:2] == [found[names[0]].shared] * 2 and shared[3] == found[names[3]].shared and shared[2] > 0


# The workspace.


def carved(*, q_shape=(2, 4, 333, 40), k_shape=(2, 2, 1000, 40), rule=None, pv="int8", processors=84, masked=False, **options):
    """The workspace of a call without memory."""
    q, k = torch.empty(q_shape, dtype=torch.float16, device="meta"), torch.empty(k_shape, dtype=torch.float16, device="meta")
    mask = torch.empty(k_shape[0], k_shape[2], dtype=torch.bool, device="meta") if masked else None
    found = {variant.name: variant for variant in config.variants("sm_90")}
    dim = config.padded_dim(q_shape[3])
    kernel = config.attention_kernel("sm_90", pv)
    binaries = workspace.Binaries(pv, found[f"prepass_d{dim}_float16"], found[f"select_d{dim}"], kernel.variant(dim, pv, masked), kernel)
    return workspace.carve(call_of(q, k, key_mask=mask, **options), rule or Rule(0.3), prepare.Inputs(q, k, k), binaries, processors)


@pytest.mark.parametrize("want_info", [False, True], ids=["", "info"])
@pytest.mark.parametrize("pv", config.PV)
@pytest.mark.parametrize("features", list(itertools.product([False, True], repeat=4)), ids=lambda f: "".join("01"[x] for x in f))
def test_buffers_are_aligned_and_do_not_overlap(pv, features, want_info):
    judged, compensate, want_lse, masked = features
    how = dict(compensate=compensate, want_lse=want_lse, masked=masked, want_info=want_info)
    made = carved(pv=pv, rule=Rule(0.3, None, 0.4 if judged else -1.0), **how)
    end = 0
    for buffer in sorted(made.buffers.values(), key=lambda buffer: buffer.offset):
        assert buffer.offset % 256 == 0 and buffer.offset >= end
        end = buffer.offset + math.prod(buffer.shape) * buffer.dtype.itemsize
    assert end <= made.nbytes < end + 256
    assert set(made.results) == ({"lists", "counts", "visible", "pv_tiles"} if want_info else set()) | ({"lse"} if want_lse else set())
    elsewhere = {name: (1 << 50) + i for i, name in enumerate(made.outside)}
    structs = made.structs(1 << 40, list(elsewhere.values()))
    names = ["statistics", "prepass", "select", *(["sequence"] if judged and pv == "fp8" else []), f"attention_{'sm90' if pv == 'fp8' else 'mma'}"]
    assert [launch.symbol for launch in made.launches] == [f"sparge_{name}" for name in names]
    for launch, params in zip(made.launches, structs, strict=True):
        assert type(params) is SYMBOLS[launch.symbol]
        for name, kind in params._fields_:
            if kind is ctypes.c_void_p:
                inside = (1 << 40) + made.buffers[name].offset if name in made.buffers else None
                assert getattr(params, name) == elsewhere.get(name, inside), f"{name} of {launch.symbol}"
    assert not set(made.outside) & set(made.buffers)


def test_every_call_of_a_kind_has_structs_of_its_own():
    made = carved()
    first, second = (made.structs(base, [base] * len(made.outside)) for base in (1 << 40, 1 << 41))
    assert first[1].q == first[1].k_sum - made.buffers["k_sum"].offset == 1 << 40 and second[1].q == 1 << 41


def key_of(rand, rule=None, **options):
    q, k, v = tensors(rand)
    return workspace.key(call_of(q, k, **options), rule or Rule(0.3), prepare.Inputs(q, k, v))


def test_what_a_workspace_is_remembered_by(rand):
    """Numbers that are only handed on are not part of it; whatever changes a buffer, a size or a launch is."""
    per_head, mask = torch.full((4,), 0.5), torch.ones(2, 400, dtype=torch.bool)
    keys = {
        "plain": key_of(rand), "lse": key_of(rand, want_lse=True), "info": key_of(rand, want_info=False), "causal": key_of(rand, causal=True),
        "offset": key_of(rand, causal=True, causal_offset=5), "smooth": key_of(rand, smooth_k=False), "compensate": key_of(rand, compensate=True),
        "keep_k": key_of(rand, keep_k=(0, 5)), "keep_q": key_of(rand, keep_q=(0, 5)), "order": key_of(rand, perm=torch.arange(400)),
        "mask": key_of(rand, key_mask=mask), "bias": key_of(rand, key_mask=mask.float()), "pv": key_of(rand, pvthreshd=per_head),
        "strided mask": key_of(rand, key_mask=mask.repeat(1, 2)[:, ::2]), "pv fp64": key_of(rand, pvthreshd=per_head.double()),
        "cdf": key_of(rand, Rule(None, 0.3)), "both": key_of(rand, Rule(0.3, 0.3)), "judge": key_of(rand, Rule(0.3, None, 0.5)),
        "mean": key_of(rand, Rule(0.3, score="mean")), "per head": key_of(rand, Rule(per_head)), "room": key_of(rand, Rule(0.6)),
        "map": key_of(rand, Rule(block_map=torch.ones(2, 4, 3, 7, dtype=torch.bool))),
        "map of one head": key_of(rand, Rule(block_map=torch.ones(2, 1, 3, 7, dtype=torch.bool))),
        "strided map": key_of(rand, Rule(block_map=torch.ones(2, 4, 7, 3, dtype=torch.bool).transpose(2, 3))),
    }  # fmt: skip
    assert len(set(keys.values())) == len(keys)
    assert keys["plain"] == key_of(rand, Rule(0.301, None, -0.5), pvthreshd=9.0, scale=0.7)
    assert keys["both"] == key_of(rand, Rule(0.9, 0.1))


def test_a_workspace_is_carved_once_and_few_are_remembered(machine, rand, monkeypatch):
    monkeypatch.setattr(backend, "_CARVED", {})
    monkeypatch.setattr(backend, "_MOST_CARVED", 3)
    carve, count = workspace.carve, []
    monkeypatch.setattr(workspace, "carve", lambda *args: count.append(1) or carve(*args))
    q, k, v = tensors(rand)
    for topk in (0.3, 0.3, 0.301):
        backend.run(call_of(q, k), Rule(topk), q, k, v)
    assert len(count) == 1
    for s_k in (64, 128, 192, 256):
        backend.run(call_of(q, k[:, :, :s_k]), Rule(0.3), q, k[:, :, :s_k], v[:, :, :s_k])
    assert len(count) == 5 and len(backend._CARVED) == 3
    machine.processors = 3
    backend.run(call_of(q, k[:, :, :256]), Rule(0.3), q, k[:, :, :256], v[:, :, :256])
    assert len(count) == 6 and machine.launched[-2][2] == 6


@pytest.mark.pairs(s_k=[1, 16, 17, 63, 1000, 118000], heads=[1, 3, 24, 300], processors=[1, 16, 132, 170])
def test_splits_cover_the_keys_in_whole_strides(heads, s_k, processors):
    splits, length = workspace._splits(s_k, heads, processors)
    assert length % 16 == 0 and (splits - 1) * length < s_k <= splits * length and 1 <= splits <= 32
    if s_k >= 32 * 16 * 16:  # enough tokens for even parts
        assert heads * splits >= 2 * processors or splits >= 31


def test_a_row_that_does_not_fit_into_shared_memory_stays_in_scratch():
    fits, large = (carved(k_shape=(2, 2, 64 * n_k, 40)) for n_k in (1000, 60000))
    one, other = (made.structs(0, [0] * len(made.outside))[2] for made in (fits, large))
    of_fits, of_large = fits.launches[2].shared, large.launches[2].shared
    assert one.row_in_shared == 1 and of_fits >= 32 * 1000 and other.row_in_shared == 0 and other.scratch_stride == 60000
    assert max(of_fits, of_large) <= 99 << 10  # what a block may have on the RTX series


@pytest.mark.parametrize("want_info", [False, True], ids=["", "info"])
def test_memory_is_what_the_module_says(want_info):
    s, d = 8192, 128
    made = carved(q_shape=(1, 4, s, d), k_shape=(1, 4, s, d), processors=4, want_info=want_info)
    scratch = math.prod(made.buffers["scratch"].shape) * 4
    assert scratch == 2 * 4 * 64 * (s // 64) * 4
    assert made.nbytes - scratch <= (1.3 + 1.2 + 1.0) * 4 * s * d + 1e5


@pytest.mark.parametrize("seed", range(20))
def test_capacity_holds_what_the_rule_keeps(seed, clustered):
    chance = random.Random(seed)
    s_q, s_k = chance.choice([64, 333, 500]), chance.choice([1, 64, 333, 700])
    q, k = clustered(seed, 1, 2, s_q, 8), clustered(seed + 1, 1, 2, s_k, 8)
    options = {"topk": chance.choice([0.01, 0.3, 0.5, 0.77, 1.0])}
    if chance.random() < 0.5:
        start = chance.randrange(s_k)
        options["always_keep"] = {"k": [(start, chance.randrange(start, s_k) + 1), (0, 0)]}
    if chance.random() < 0.3:
        options["always_keep"] = {"q": [(0, 1)]}
    if chance.random() < 0.3:
        options["cdfthreshd"] = 0.9
    if chance.random() < 0.2:
        options["causal"] = True
    most = int(select_blocks(q, k, **options).to_dense().sum(-1).max())
    keep = options.get("always_keep", {})
    ranges = {f"keep_{name}": tuple(x for pair in keep.get(name, ()) for x in pair) for name in "qk"}
    call = call_of(q, k, causal=options.get("causal", False), **ranges)
    (_, _, _, room), dtype = backend.blocks_form(call, Rule(options["topk"], options.get("cdfthreshd"), -1.0))
    assert most <= room <= max(1, -(-s_k // 64)) and dtype == torch.int16


def test_capacity_saves_memory_where_topk_alone_decides(rand):
    q = torch.zeros(1, 1, 6400, 1)
    rooms = {
        name: backend.blocks_form(call_of(q, q, **call), rule)[0][3]
        for name, call, rule in (
            ("topk", {}, Rule(0.25, None, -1.0)), ("kept keys", dict(keep_k=(0, 64, 100, 130)), Rule(0.25, None, -1.0)),
            ("kept keys, ordered", dict(keep_k=(0, 10), perm=torch.arange(6400)), Rule(0.25, None, -1.0)),
            ("nothing kept", dict(keep_q=(5, 5)), Rule(0.25, None, -1.0)),
            ("cdf", {}, Rule(0.25, 0.5, -1.0)), ("judge", {}, Rule(0.25, None, 0.5)), ("per head", {}, Rule(torch.tensor([0.2]), None, -1.0)),
            ("causal", dict(causal=True), Rule(0.25, None, -1.0)), ("kept queries", dict(keep_q=(0, 1)), Rule(0.25, None, -1.0)),
            ("map", {}, Rule(block_map=torch.ones(1, 1, 50, 100, dtype=torch.bool))),
        )
    }  # fmt: skip
    assert rooms == {
        "topk": 27, "kept keys": 30, "kept keys, ordered": 37, "nothing kept": 27, "cdf": 100, "judge": 100, "per head": 100, "causal": 100,
        "kept queries": 100, "map": 100,
    }  # fmt: skip


# What it declines.


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, driver): a machine whose PyTorch sees one GPU; nothing may touch it."""

    def pretend(capability=(8, 6), driver=None, available=True, hip=None):
        backend._machine.cache_clear()
        for name, value in dict(
            is_available=lambda: available, device_count=lambda: int(available), current_device=lambda: 0, get_device_capability=lambda i: capability,
            get_device_name=lambda i: "Some GPU", get_device_properties=lambda i: SimpleNamespace(multi_processor_count=84),
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(backend.driver, "why_not", lambda arch: driver)

    yield pretend
    backend._machine.cache_clear()


GPU = torch.device("cuda", 0)
REFUSALS = {
    "on the CPU": (dict(), dict(device=torch.device("cpu")), "tensors are on cpu"),
    "ROCm": (dict(hip="6.2"), dict(), "AMD"),
    "no GPU": (dict(available=False), dict(), "no NVIDIA GPU"),
    "compute capability 7.5": (dict(capability=(7, 5)), dict(), "RTX 30 series, A100 or newer"),
    "driver": (dict(driver="the driver is too old; update it"), dict(), "the driver is too old; update it"),
    "head_dim": (dict(), dict(dim=129), "head_dim 129"),
    "keys": (dict(), dict(s_k=(1 << 22) + 1), "4194305 keys"),
    "dtype": (dict(), dict(dtype=torch.float64), "torch.float64"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_has_its_reason(gpu, monkeypatch, name):
    machine, call, words = REFUSALS[name]
    gpu(**machine)
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    reason = backend.why_not(Kind(**{"device": GPU, **call}))
    assert words in reason and "{" not in reason
    if name not in ("on the CPU",):
        with pytest.raises(UnsupportedCall) as caught:
            choose(Kind(**{"device": GPU, **call}))
        assert caught.value.reasons["cuda"] == reason and "torch" in caught.value.reasons


def test_limits_are_exact(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    assert backend.why_not(Kind(GPU, dim=128, s_k=1 << 22, dtype=torch.bfloat16)) is None
    assert choose(Kind(GPU)) == "cuda" and choose(Kind(GPU, "torch")) == "torch"


def test_missing_binaries(gpu, monkeypatch):
    gpu((10, 3))
    asked = []
    monkeypatch.setattr(loader, "why_not", lambda device, variants: asked.append((device, [v.name for v in variants])) or "no binary for sm_103")
    assert backend.why_not(Kind(GPU, dim=96, dtype=torch.bfloat16, masked=True)) == "no binary for sm_103"
    assert asked == [(0, ["prepass_d128_bfloat16", "select_d128", "attention_mma_d128_int8_masked"])]


def test_can_run_without_tensors(gpu, monkeypatch):
    """The head size, dtype and mask of the calls decide too; on a GPU nothing falls to the torch backend unless it was asked for."""
    gpu()
    asked = []
    monkeypatch.setattr(loader, "why_not", lambda device, variants: asked.append([v.name for v in variants]))
    assert can_run("cuda") == can_run(GPU, backend="cuda", head_dim=128, dtype=torch.bfloat16, masked=True) == BackendChoice("cuda", None, True, True)
    assert asked == [
        ["prepass_d64_float16", "select_d64", "attention_mma_d64_int8"],
        ["prepass_d128_bfloat16", "select_d128", "attention_mma_d128_int8_masked"],
    ]
    assert can_run("cuda", backend="cuda", head_dim=192) == BackendChoice(
        None, "cuda: head_dim 192 is beyond the 1 to 128 of its kernels; backend='torch' takes up to 256", False, False
    )
    assert can_run("cuda", backend="torch", head_dim=192) == can_run("cpu") == BackendChoice("torch", None, False, False)
    with pytest.raises(ValueError, match="backend must be one of auto, cuda, torch, got 'triton'"):
        can_run("cpu", backend="triton")


def test_a_refusal_of_can_run_that_ends_is_not_remembered(gpu, monkeypatch):
    """Kernels cannot be loaded while a CUDA graph is captured; after it they are."""
    gpu()
    missing = ["a CUDA graph is being captured"]
    monkeypatch.setattr(loader, "why_not", lambda device, variants: missing[0])
    refused = can_run("cuda")
    assert refused.backend is None and refused.why_not.startswith("cuda: a CUDA graph is being captured; torch: not chosen by itself on cuda")
    missing[0] = None
    assert can_run("cuda").backend == "cuda"


@pytest.mark.parametrize(
    "value, capability, pv",
    [
        ("fp16", (8, 6), "fp16"), ("fp8", (8, 9), None), (None, (8, 6), "int8"), ("fp8", (8, 6), None), (None, (9, 0), "fp8"),
        ("int8", (9, 0), "int8"), ("fp16", (9, 0), "fp16"), ("fp8", (9, 0), "fp8"), ("fp8", (12, 0), None), (None, (12, 0), "int8"),
        ("fp8", (10, 0), None), (None, (10, 0), "int8"),
    ],
)  # fmt: skip
def test_the_environment_chooses_the_form_of_p_and_v(gpu, monkeypatch, value, capability, pv):
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    monkeypatch.delenv("SPARGE_PV", raising=False)
    if value is not None:
        monkeypatch.setenv("SPARGE_PV", value)
    gpu(capability)
    machine, reason = backend.machine_of(GPU)
    if pv is None:
        assert machine is None and reason == (
            f"SPARGE_PV must be int8 or fp16 on sm_{capability[0]}{capability[1]}, got fp8, which is for sm_90 (H100, H200) alone: "
            "elsewhere it is less exact than int8 and not known to be faster; set one of these, or unset it"
        )
    else:
        assert machine.pv == pv and machine.arch == f"sm_{capability[0]}{capability[1]}" and machine.note == ""


def test_the_environment_has_three_words(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setenv("SPARGE_PV", "fp4")
    with pytest.raises(ValueError, match="SPARGE_PV must be one of int8, fp8, fp16, got 'fp4'"):
        backend.machine_of(GPU)


def without_hoppers_kernel(device, variants):
    lacking = [variant.name for variant in variants if variant.exact]
    return f"no binary of {lacking[0]} for sm_90: nothing compiles it" if lacking else None


def test_without_its_own_kernel_hopper_takes_the_common_one_and_says_so(gpu, monkeypatch, rand):
    gpu((9, 0))
    monkeypatch.delenv("SPARGE_PV", raising=False)
    monkeypatch.setattr(loader, "why_not", without_hoppers_kernel)
    monkeypatch.setattr(loader, "kernel", lambda device, variant, symbol: SimpleNamespace(origin=f"{variant.name}, packaged for sm_90"))
    machine, _ = backend.machine_of(GPU)
    assert machine.pv == "int8" and backend.why_not(Kind(GPU, dtype=torch.float16)) is None
    status = backends()["cuda"]
    assert status.available and status.reason == (
        "Some GPU: sm_90, attention_mma_d128_int8, packaged for sm_90; P and V are int8, because of fp8 there is "
        "no binary of attention_sm90_d64_fp8 for sm_90: nothing compiles it"
    )


@pytest.fixture
def another_row(monkeypatch):
    """An attention kernel more, of sm_100 alone."""
    row = config.AttentionKernel(
        name="attention_sm100",
        forms=("fp16",),
        arch="sm_100a",
        threads=192,
        persistent=True,
        shared=lambda dim, pv: 1000 * dim,
        defines=lambda dim, pv: (),
        spill_bound=0,
    )
    monkeypatch.setattr(config, "ATTENTION", (row, *config.ATTENTION))
    monkeypatch.setitem(SYMBOLS, row.symbol, SYMBOLS["sparge_attention_mma"])  # which is made of the rows, when it is imported
    monkeypatch.setitem(FIELDS, row.symbol, FIELDS["sparge_attention_mma"])
    monkeypatch.setattr(backend, "_binaries", backend._binaries.__wrapped__)
    monkeypatch.setattr(backend, "_CARVED", {})
    return row


def test_a_kernel_of_another_architecture_is_launched_as_its_row_says(another_row, monkeypatch, rand):
    made = RecordingMachine("fp16", 20, "sm_100")
    monkeypatch.setattr(backend, "machine_of", lambda device: (made, None))
    q, k, v = tensors(rand, d=128, s_q=1000)
    backend.run(call_of(q, k), Rule(None, 0.5), q, k, v)
    assert [launch[0] for launch in made.launched] == [*KERNELS[:3], "sparge_sequence", "sparge_attention_sm100"]
    name, variant, grid, shared, params, threads = made.launched[-1]
    assert (variant, grid, shared, threads) == ("attention_sm100_d128_fp16", 20, 128000, 192)
    assert params.counter and params.sequence
    assert {struct.pv for symbol, _, _, _, struct, _ in made.launched if symbol == "sparge_prepass"} == {config.PV.index("fp16")}


@pytest.mark.parametrize("capability, pv", [((10, 0), "fp16"), ((10, 3), "int8"), ((9, 0), "fp8"), ((12, 0), "int8")])
def test_its_form_is_used_where_it_runs_and_can_be_had(another_row, gpu, monkeypatch, capability, pv):
    gpu(capability)
    monkeypatch.delenv("SPARGE_PV", raising=False)
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    assert backend.machine_of(GPU).machine.pv == pv
    backend._machine.cache_clear()
    monkeypatch.setattr(loader, "why_not", without_hoppers_kernel)
    machine = backend.machine_of(GPU).machine
    assert machine.pv == "int8" and ("because of" in machine.note) == (pv != "int8")


def test_what_was_asked_for_is_not_replaced(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setenv("SPARGE_PV", "fp8")
    monkeypatch.setattr(loader, "why_not", without_hoppers_kernel)
    assert backend.machine_of(GPU)[0].pv == "fp8"
    assert "attention_sm90_d128_fp8" in backend.why_not(Kind(GPU, dim=128, dtype=torch.float16))
    assert not backends()["cuda"].available


@pytest.mark.parametrize("current, entered", [(1, [0]), (0, [])], ids=["another GPU is current", "it is current"])
@pytest.mark.parametrize("capability, kernels", [((8, 6), KERNELS), ((9, 0), ON_HOPPER)])
def test_launches_go_through_the_loader_and_the_driver(gpu, monkeypatch, rand, capability, kernels, current, entered):
    """The real machine: kernels of its device, on its current stream, with its device the current one."""
    gpu(capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.delenv("SPARGE_PV", raising=False)
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    inside, launches = [], []

    @contextlib.contextmanager
    def device(index):
        inside.append(index)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(backend.driver, "current_stream", lambda index: 50 + index)
    monkeypatch.setattr(loader, "kernel", lambda device, variant, symbol: (device, variant.name, symbol))
    monkeypatch.setattr(backend.driver, "launch", lambda kernel, *rest: launches.append((kernel, *rest[:3], rest[4], list(inside))))
    q, k, v = tensors(rand)
    call = call_of(q, k)._replace(device=GPU)
    backend.run(call, Rule(0.3, None, -1.0), q, k, v)
    assert [kernel[2] for kernel, *_ in launches] == kernels and {kernel[0] for kernel, *_ in launches} == {0}
    assert [threads for _, _, threads, *_ in launches] == [256] * 3 + [384 if capability == (9, 0) else 256]
    assert all(stream == 50 and within == entered for *_, stream, within in launches) and inside == []
    assert all(grid > 0 and shared > 0 for _, grid, _, shared, _, _ in launches)


def test_a_machine_asks_the_loader_once(gpu, monkeypatch):
    gpu()
    asked = []
    monkeypatch.setattr(loader, "why_not", lambda device, variants: asked.append("why_not"))
    monkeypatch.setattr(loader, "kernel", lambda device, variant, symbol: asked.append((variant.name, symbol)) or (variant.name, symbol))
    machine, _ = backend.machine_of(GPU)
    (variant,) = [variant for variant in config.variants("sm_86") if variant.name == "prepass_d64_float16"]
    assert machine.missing((variant,)) is None and asked == ["why_not"]
    for _ in range(2):
        assert [machine.kernel(variant, symbol) for symbol in variant.symbols] == [(variant.name, symbol) for symbol in variant.symbols]
    assert machine.missing((variant,)) is None and asked == ["why_not", *((variant.name, symbol) for symbol in variant.symbols)]


@pytest.mark.parametrize("kind", [RuntimeError, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("number, before", [(0, "nothing"), (2, "sparge_statistics (grid 32), sparge_prepass (grid 12)")])
def test_a_launch_error_tells_what_was_launched_before(machine, monkeypatch, number, before, kind):
    launch = machine.launch

    def fail(kernel, *rest):
        if len(machine.launched) == number:
            raise kind("cuLaunchKernel failed: CUDA_ERROR_ILLEGAL_ADDRESS")
        launch(kernel, *rest)

    monkeypatch.setattr(machine, "launch", fail)
    q = torch.zeros(1, 4, 128, 16).half()
    with pytest.raises(kind) as caught:
        backend.run(call_of(q, q), Rule(0.3), q, q, q)
    assert str(caught.value) == f"cuLaunchKernel failed: CUDA_ERROR_ILLEGAL_ADDRESS; launched before it in this call: {before}"


@pytest.mark.parametrize("value, level, shown", [(None, "WARNING", 0), (None, "DEBUG", 1), ("0", "WARNING", 0), ("1", "WARNING", 1)])
def test_every_new_kind_of_call_is_told_in_a_line_where_asked(machine, monkeypatch, rand, caplog, value, level, shown):
    monkeypatch.delenv("SPARGE_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("SPARGE_LOG", value)
    monkeypatch.setattr(backend, "_CARVED", {})
    monkeypatch.setattr(machine, "kernel", lambda variant, symbol: SimpleNamespace(variant="", name=symbol, origin=f"{variant.name}, packaged"))
    q, k, v = tensors(rand, d=72)
    with caplog.at_level(level, "sparge_kernels"):
        for topk in (0.3, 0.3, 0.301):
            backend.run(call_of(q, k), Rule(topk), q, k, v)
    lines = [record.getMessage() for record in caplog.records if record.name == "sparge_kernels"]
    assert len(lines) == shown
    if shown:
        (carved,) = backend._CARVED.values()
        found = {launch.symbol: launch for launch in carved.launches}
        assert lines[0].startswith(
            f"new kind of call, backend cuda on sm_89: B=2 H=4 H_kv=2 S_q=333 S_k=400 D=72 float16; workspace {carved.nbytes} bytes; "
            f"sparge_statistics grid {found['sparge_statistics'].grid} x 256, {found['sparge_statistics'].shared} bytes of shared memory, "
        )
        assert lines[0].count("packaged") == 4 and lines[0].endswith("attention_mma_d128_int8, packaged") and "\n" not in lines[0]


def test_report_without_a_gpu(gpu):
    gpu(available=False)
    status = backends()
    assert list(status) == ["cuda", "torch"] == list(BACKEND_NAMES[1:]) and not status["cuda"].available and "GPU" in status["cuda"].reason
    assert status["cuda"].quantised and status["cuda"].skips_pv


def test_report_with_gpus(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    monkeypatch.setattr(loader, "kernel", lambda device, variant, symbol: SimpleNamespace(origin=f"{variant.name}, packaged for sm_86"))
    status = backends()["cuda"]
    assert status.available and status.reason == "Some GPU: sm_86, attention_mma_d128_int8, packaged for sm_86"
    monkeypatch.setattr(loader, "why_not", lambda device, variants: "no binary")
    status = backends()["cuda"]
    assert not status.available and status.reason == "Some GPU: no binary"


@pytest.mark.parametrize("wrong", [False, True], ids=["", "a backend is wrong"])
def test_the_self_test_command(capsys, monkeypatch, wrong):
    if wrong:
        real = __main__.block_sparse_attention
        monkeypatch.setattr(__main__, "block_sparse_attention", lambda *args, **how: 1.1 * real(*args, **how))
    assert __main__.main() == int(wrong)
    printed = capsys.readouterr().out
    assert "backend cuda: not available" in printed or torch.cuda.is_available()
    assert "backend torch: available" in printed and ("WRONG" in printed) == wrong and "cpu, plain" in printed


def test_forced_on_tensors_of_the_cpu(rand):
    q, k, v = tensors(rand)
    with pytest.raises(UnsupportedCall, match="tensors are on cpu, it needs an NVIDIA GPU"):
        sparse_attention(q, k, v, backend="cuda")
