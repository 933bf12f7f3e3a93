"""The workspace of a call: where its buffers lie, what it is remembered by, how much room lists get."""

from __future__ import annotations

import ctypes
import itertools
import math
import random

import pytest
import torch
from recording import call_of, carved, tensors
from sparge_kernels import config, select_blocks
from sparge_kernels.backends import cuda as backend
from sparge_kernels.call import Rule
from sparge_kernels.cuda import prepare, workspace
from sparge_kernels.cuda.params import SYMBOLS


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
