"""The CUDA backend's host side with launches recorded instead of run: what it launches and allocates, and what it hands to the kernels."""

from __future__ import annotations

import ctypes

import pytest
import torch
from recording import IN_SEQUENCE, KERNELS, ON_HOPPER, VIEWS, WAITING, RecordingMachine, call_of, tensors
from sparge_kernels import config
from sparge_kernels.backends import cuda as backend
from sparge_kernels.call import Rule
from sparge_kernels.cuda import workspace
from sparge_kernels.cuda.params import SYMBOLS, Strides
from torch.utils._python_dispatch import TorchDispatchMode

# What a call costs the host.


class Ops(TorchDispatchMode):
    """Every PyTorch operator that runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


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
