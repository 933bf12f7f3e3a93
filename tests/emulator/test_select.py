"""sparge_select on the CPU: its pools made by plain PyTorch as layout.cuh says, its lists held to the fp64 selection of tests/kernels/conftest.py and
to selection.py under the tie rule, its compensation state to compensation.py."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import emulator
import pytest
import torch
import torch.nn.functional as F
from sparge_kernels import compensation, config, selection
from sparge_kernels.block_mask import KeptBlocks
from sparge_kernels.call import Call, Rule
from sparge_kernels.cuda.params import SelectParams, SequenceParams

LOG2E = math.log2(math.e)

_spec = importlib.util.spec_from_file_location("selection_reference", Path(__file__).parents[1] / "kernels" / "conftest.py")
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
clustered, rand = reference._clustered, reference._rand


def library(dim: int, **how) -> emulator.Library:
    return emulator.library({v.name: v for v in config.variants("sm_86")}[config.select_name(dim)], **how)


def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp16 pairs (..., 2, E) and their scale (...), a power of two per row."""
    x = x.float()
    largest = x.abs().amax(-1)
    scale = torch.where((largest > 0) & largest.isfinite(), torch.exp2(largest.clamp(1e-30, 1e30).log2().floor() - 14), 1.0)
    x = x / scale[..., None]
    high = x.half()
    return torch.stack([high, (x - high.float()).half()], -2).contiguous(), scale


def moments(x: torch.Tensor, block: int, weight: torch.Tensor | None = None) -> SimpleNamespace:
    """Weighted mean, variance and squared norm of the mean unit row of every block of x (B, H, S, D); weight (B, S). fp64."""
    n = -(-x.shape[2] // block)
    pad = n * block - x.shape[2]
    w = torch.ones(x.shape[0], x.shape[2], dtype=torch.float64) if weight is None else weight.double()
    x = torch.where(w[:, None, :, None] > 0, x.double(), 0)
    rows, w = F.pad(x, (0, 0, 0, pad)).unflatten(2, (n, block)), F.pad(w, (0, pad)).unflatten(1, (n, block))[:, None, :, :, None]
    total = w.sum(3).clamp_min(1e-300)
    mean = (rows * w).sum(3) / total
    unit = (F.normalize(rows, dim=-1, eps=1e-300) * w).sum(3) / total
    variance = ((rows - mean[:, :, :, None]).square() * w).sum(3) / total
    return SimpleNamespace(mean=mean, variance=variance, sim=unit.square().sum(-1), weight=w.sum(3)[:, 0, :, 0])


class Problem:
    """One call's pools in the kernel's layouts, and its outputs. The options are those of the reference selection."""

    def __init__(
        self, q, k, *, topk=None, cdfthreshd=None, simthreshd1=-0.1, causal=False, causal_offset=0, scale=None, key_mask=None, always_keep=None,
        score="subblock", block_map=None, v=None, size=None,
    ):  # fmt: skip
        self.q, self.k, self.v, self.key_mask, self.block_map = q, k, v, key_mask, block_map
        self.options = dict(
            topk=topk, cdfthreshd=cdfthreshd, simthreshd1=simthreshd1, causal=causal, causal_offset=causal_offset, scale=scale, key_mask=key_mask,
            always_keep=always_keep, score=score,
        )  # fmt: skip
        self.batch, self.heads, self.s_q, dim = q.shape
        self.kv_heads, self.s_k = k.shape[1:3]
        self.n_q, self.n_k = -(-self.s_q // 128), -(-self.s_k // 64)
        self.size = config.padded_dim(dim) if size is None else size
        self.scale = dim**-0.5 if scale is None else scale
        if topk is None and cdfthreshd is None:
            self.options["topk"] = 0.5
        self.keys = selection.Keys.from_mask(key_mask)
        valid = torch.ones(self.batch, self.s_k, dtype=torch.bool) if key_mask is None else self.keys.valid
        bias = torch.where(valid, key_mask.double() if key_mask is not None and key_mask.is_floating_point() else 0.0, -math.inf)
        if key_mask is not None:
            bias = bias - self.keys.top[:, None]
        chosen = [t for t in (16 * g + (g * g * 1126333 >> 20) % 16 for g in range(-(-self.s_k // 16))) if t < self.s_k]
        sample = valid[:, None, chosen, None]
        centre = torch.where(sample, k[:, :, chosen].double(), 0).sum(2, keepdim=True) / sample.sum(2, keepdim=True).clamp_min(1)
        self.centred = k.double() - centre
        self.q_pools, self.k_pools = moments(q, 32), moments(self.centred, 64, bias.exp())
        blocks = moments(q, 128)

        wide = (0, self.size - dim)
        pools = -(-self.s_q // 32)
        q_mean = F.pad(self.q_pools.mean, (*wide, 0, self.n_q * 4 - pools))  # pools without rows are zero
        t = self.tensors = {}
        t["q_mean"], q_scale = split(q_mean)
        t["q_square"], square_scale = split(q_mean.square())
        t["q_pool_scale"] = torch.stack([q_scale, square_scale], -1)
        t["k_mean"], k_scale = split(F.pad(self.k_pools.mean, wide))
        t["k_variance"], variance_scale = split(F.pad(self.k_pools.variance, wide))
        t["k_pool_scale"] = torch.stack([k_scale, variance_scale], -1)
        t["k_weight"] = self.k_pools.weight.float()
        if key_mask is not None:
            t["bias2"] = F.pad(bias * LOG2E, (0, self.n_k * 64 - self.s_k), value=-math.inf).float()
        if isinstance(simthreshd1, torch.Tensor) or simthreshd1 > 0:
            t["q_sim"], t["k_sim"] = blocks.sim.float(), self.k_pools.sim.float()
        if v is not None:
            t["v_mean"] = F.pad(moments(v, 64, bias.exp()).mean, wide).float()
        keep = always_keep if isinstance(always_keep, dict) else {"q": always_keep or [], "k": always_keep or []}
        for name, n, block in (("q", self.n_q, 128), ("k", self.n_k, 64)):
            if keep.get(name):
                t[f"forced_{name}"] = forced = torch.zeros(n, dtype=torch.uint8)
                for start, end in keep[name]:
                    forced[start // block : (end - 1) // block + 1] = 1
        self.numbers = dict(topk=-1.0, cdf=-1.0, sim=-1.0)
        for name, value in (("topk", self.options["topk"]), ("cdf", cdfthreshd), ("sim", simthreshd1)):
            if isinstance(value, torch.Tensor):
                t[f"{name}_heads"] = value.float()
            elif value is not None:
                self.numbers[name] = value

    def run(
        self, *, grid=None, slots=64, row_in_shared=None, capacity=None, seed=0, stride=None, shared=None, counted=True, **how
    ) -> SimpleNamespace:
        """Launches; every buffer poisoned and guarded."""
        tasks = self.batch * self.heads * -(-self.n_q // 16)
        grid = min(tasks, slots) if grid is None else grid
        capacity = self.n_k if capacity is None else capacity
        stride = self.n_k if stride is None else stride
        if shared is None:
            shared, fits = config.select_shared(self.size, self.n_k)
            if row_in_shared is None:
                row_in_shared = fits
            assert fits or not row_in_shared
        head = (self.batch, self.heads, self.n_q)
        out = SimpleNamespace(
            lists=emulator.guarded((*head, capacity), torch.uint16), counts=emulator.guarded(head, torch.int32),
            visible=emulator.guarded((self.batch, self.n_q), torch.int32), pv_tiles=emulator.guarded((self.batch, self.heads, 2), torch.int32),
            scratch=emulator.guarded((grid, 64, stride), torch.float32), counter=emulator.guarded((1,), torch.int32),
        )  # fmt: skip
        if not counted:
            del out.counter
        if self.v is not None:
            out.state = emulator.guarded((*head, 4 + self.size), torch.float32)
        params = SelectParams(
            scale=self.scale, **self.numbers, batch=self.batch, heads=self.heads, kv_heads=self.kv_heads, s_q=self.s_q, s_k=self.s_k,
            capacity=capacity, subblock=int(self.options["score"] == "subblock"), causal=int(self.options["causal"]),
            causal_offset=self.options["causal_offset"], row_in_shared=int(row_in_shared), scratch_stride=stride,
            shift=int(self.v is not None and not self.options["causal"]),
        )  # fmt: skip
        block_map = None if self.block_map is None else self.block_map.to(torch.uint8).contiguous()
        for name, x in (*self.tensors.items(), *vars(out).items(), ("block_map", block_map)):
            if x is not None:
                setattr(params, name, x.data_ptr())
        if block_map is not None:
            size = self.n_q * self.n_k
            params.map_batch, params.map_head = (block_map.shape[0] > 1) * block_map.shape[1] * size, (block_map.shape[1] > 1) * size
        library(self.size, **how).launch("sparge_select", grid, params, shared=shared, seed=seed)
        emulator.check_guards(*vars(out).values())
        assert not out.pv_tiles.any() and not (counted and out.counter.any())
        return out

    def map_of(self, out) -> torch.Tensor:
        """The lists as bool (B, H, N_q, N_k); they must be ascending and in range, and unwritten past their end."""
        lists, counts = out.lists.to(torch.int64), out.counts
        used = torch.arange(lists.shape[-1]) < counts[..., None]
        assert (counts >= 0).all() and (counts <= lists.shape[-1]).all()
        assert (lists[used] < self.n_k).all() and (lists[~used] == 0x5A5A).all(), "ids out of range, or written past the count"
        assert ((lists[..., 1:] > lists[..., :-1]) | ~used[..., 1:]).all(), "not ascending"
        kept = torch.zeros(*counts.shape, self.n_k + 1, dtype=torch.bool)
        kept.scatter_(-1, torch.where(used, lists, self.n_k), True)
        return kept[..., :-1]

    def expected(self) -> SimpleNamespace:
        return reference._select(self.q, self.k, **self.options)

    def call(self) -> Call:
        o, keep = self.options, self.options["always_keep"]
        keep = keep if isinstance(keep, dict) else {"q": keep or [], "k": keep or []}
        ranges = {f"keep_{name}": tuple(x for pair in keep.get(name, []) for x in pair) for name in "qk"}
        causal = dict(causal=o["causal"], causal_offset=o["causal_offset"])
        return Call.of(self.q, self.k, "torch", self.scale, key_mask=self.key_mask, **causal, **ranges)

    def by_selection(self) -> KeptBlocks:
        o = self.options
        return selection.select(self.call(), Rule(o["topk"], o["cdfthreshd"], o["simthreshd1"], o["score"]), self.q, self.k)


def check(problem: Problem, **how) -> torch.Tensor:
    """Runs, compares with both references and returns the map."""
    out = problem.run(**how)
    got, truth = problem.map_of(out), problem.expected()
    reference._compare_maps(got, truth)
    by_torch = problem.by_selection()
    wrong = (got != by_torch.to_map()) & ~truth.close
    assert not wrong.any(), f"selection.py decides {int(wrong.sum())} blocks differently, first {wrong.nonzero()[0].tolist()}"
    assert torch.equal(out.visible, by_torch.visible[:, 0])
    return got


def per_head(*values: float) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("score", ["subblock", "mean"])
@pytest.mark.parametrize(
    "options",
    [
        dict(topk=0.05), dict(topk=0.3), dict(topk=1.0), dict(cdfthreshd=0.01), dict(cdfthreshd=0.5), dict(cdfthreshd=0.9), dict(cdfthreshd=1.0),
        dict(topk=0.2, cdfthreshd=0.7), dict(topk=0.6, cdfthreshd=0.2), dict(topk=0.1, simthreshd1=0.4), dict(topk=0.1, simthreshd1=1.0),
        dict(topk=0.1, simthreshd1=0.0), dict(cdfthreshd=0.5, simthreshd1=0.35), dict(topk=0.2, scale=0.02), dict(topk=0.2, scale=1.5),
        dict(cdfthreshd=0.5, scale=1.5), dict(topk=0.2, always_keep=[(0, 1), (500, 520)]), dict(topk=0.2, always_keep={"q": [(127, 129)]}),
        dict(cdfthreshd=0.6, always_keep={"k": [(63, 65)]}), dict(cdfthreshd=0.3, always_keep={"q": [(0, 10)], "k": [(990, 1000)]}),
        dict(topk=per_head(0.05, 0.5)), dict(cdfthreshd=per_head(0.3, 1.0)), dict(topk=per_head(0.1, 0.4), cdfthreshd=0.5),
        dict(topk=0.1, simthreshd1=per_head(-0.1, 0.45)),
        dict(topk=0.3, causal=True), dict(cdfthreshd=0.5, causal=True), dict(topk=0.5, causal=True, causal_offset=37),
        dict(topk=0.5, causal=True, causal_offset=-201), dict(cdfthreshd=0.5, causal=True, causal_offset=5000),
        # The last row of a query block sees one key of its last key block.
        dict(cdfthreshd=0.5, causal=True, causal_offset=-63), dict(cdfthreshd=0.3, causal=True, causal_offset=1),
        dict(topk=0.2, cdfthreshd=0.4, causal=True, always_keep={"k": [(0, 1)]}, simthreshd1=0.3),
    ],
    ids=str,
)  # fmt: skip
def test_rules(options, score):
    q, k = clustered(1, 1, 2, 1000, 16), clustered(3, 1, 1, 1000, 16)
    check(Problem(q, k, score=score, **options))


@pytest.mark.parametrize("score", ["subblock", "mean"])
@pytest.mark.parametrize("s_q, s_k", [(1, 1), (63, 63), (200, 1000), (1000, 63), (129, 65), (161, 385), (2200, 1200)])
def test_lengths(s_q, s_k, score):
    """Batch 2, two query heads to a kv head; 2200 rows are two tasks, 1200 keys more than a tile."""
    q, k = clustered(1, 2, 4, s_q, 16), clustered(3, 2, 2, s_k, 16)
    for options in (dict(topk=0.4), dict(cdfthreshd=0.6), dict(topk=0.2, simthreshd1=0.3)):
        check(Problem(q, k, score=score, **options))
    if s_q < 2000:
        check(Problem(q, k, score=score, topk=0.4, causal=True, causal_offset=3))


@pytest.mark.parametrize("score", ["subblock", "mean"])
@pytest.mark.parametrize("dim, size", [(64, 64), (80, 128), (128, 128)])
def test_head_sizes(dim, size, score):
    q, k = clustered(1, 1, 2, 700, dim), clustered(3, 1, 2, 1500, dim)
    for options in (dict(topk=0.3), dict(cdfthreshd=0.8), dict(topk=0.3, causal=True, causal_offset=100)):
        problem = Problem(q, k, score=score, **options)
        assert problem.size == size
        check(problem)


@pytest.mark.parametrize("score", ["subblock", "mean"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_key_masks(kind, causal, score):
    q, k = clustered(1, 3, 2, 500, 16), clustered(3, 3, 1, 500, 16)
    mask = torch.rand(3, 500, generator=torch.Generator().manual_seed(2)) > 0.5
    mask[0, 64:192] = False
    mask[1, 300:400] = False
    mask[2] = False
    if kind == "float":
        mask = torch.where(mask, rand(3, 3, 500), -math.inf)
    k = k.masked_fill(~(mask > -1e4 if kind == "float" else mask)[:, None, :, None], 0)
    for rule in (dict(topk=0.3), dict(cdfthreshd=0.6)):
        problem = Problem(q, k, score=score, causal=causal, causal_offset=-60 if causal else 0, key_mask=mask, **rule)
        out = problem.run()
        assert not out.counts[2].any() and not out.visible[2].any()
        check(problem)


@pytest.mark.parametrize("score", ["subblock", "mean"])
def test_a_block_whose_weight_underflows_is_visible(score):
    """exp(bias) is 0 for blocks 1 and 3; block 5 is masked."""
    q, k = clustered(1, 1, 1, 300, 16), clustered(3, 1, 1, 512, 16)
    mask = torch.zeros(1, 512)
    mask[:, 64:128] = mask[:, 192:256] = -500.0
    mask[:, 320:384] = -math.inf
    everything = [0, 1, 2, 3, 4, 6, 7]
    for rule, kept in ((dict(topk=1.0), everything), (dict(cdfthreshd=1.0), everything), (dict(topk=0.7), [0, 2, 4, 6, 7])):
        problem = Problem(q, k, score=score, key_mask=mask, **rule)
        out = problem.run()
        assert (problem.map_of(out) == F.one_hot(torch.tensor(kept), 8).sum(0).bool()).all() and (out.visible == 7).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 4), (2, 4)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_block_maps(shape, causal):
    """The visible part of the map, whatever else is set."""
    q, k = clustered(1, 2, 4, 1000, 16), clustered(3, 2, 2, 1300, 16)
    mask = torch.ones(2, 1300, dtype=torch.bool)
    mask[0, 128:256] = mask[1, 700:] = False
    kept = torch.rand(*shape, 8, 21, generator=torch.Generator().manual_seed(1)) > 0.6
    kept[..., 3, :] = False
    kept[..., 5, :] = True
    problem = Problem(q, k, key_mask=mask, block_map=kept, causal=causal, always_keep=[(0, 200)])
    for row_in_shared in (False, True):
        out = problem.run(row_in_shared=row_in_shared, seed=row_in_shared)
        visible = problem.expected().visible
        assert torch.equal(problem.map_of(out), kept & visible)
        assert torch.equal(out.visible, visible[:, 0].sum(-1).int())


def test_the_last_id_of_all():
    """65,536 key blocks, the most that the lists can name."""
    q, k = rand(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1).expand(1, 1, 65536 * 64, 1)
    kept = torch.rand(1, 1, 1, 65536, generator=torch.Generator().manual_seed(1)) > 0.5
    kept[..., -1] = True
    problem = Problem(q, k[:, :, :64], block_map=kept)
    problem.s_k, problem.n_k = 65536 * 64, 65536
    problem.tensors["k_weight"] = torch.full((1, 65536), 64.0)
    out = problem.run()
    assert torch.equal(problem.map_of(out), kept) and int(out.visible) == 65536


# ---- order, ties and values that are none ----


@pytest.mark.parametrize("score", ["subblock", "mean"])
@pytest.mark.parametrize("row_in_shared", [False, True], ids=["scratch", "shared"])
def test_ties_go_to_the_lowest_index(score, row_in_shared):
    """Keys that are equal bit by bit: the first ones are kept, across lanes and rounds of 32 blocks."""
    q = rand(1, 1, 1, 256, 16)
    k = rand(2, 1, 1, 1, 16).expand(1, 1, 80 * 64, 16)
    for rule, n in ((dict(topk=0.05), 4), (dict(topk=0.5), 40), (dict(topk=0.71), 57), (dict(cdfthreshd=0.505), 41), (dict(cdfthreshd=1e-6), 1)):
        problem = Problem(q, k, score=score, **rule)
        got = problem.map_of(problem.run(row_in_shared=row_in_shared))
        assert torch.equal(got[0, 0], (torch.arange(80) < n).expand(2, -1)), rule
    # Every third block is better than the rest, which tie.
    k = k.clone()
    better = torch.arange(80) % 3 == 1
    k.unflatten(2, (80, 64))[:, :, better] += 4 * q.mean(2, keepdim=True)[:, :, None]
    problem = Problem(q, k, score=score, topk=0.5, always_keep={"k": [(0, 1)]})
    got = problem.map_of(problem.run(row_in_shared=row_in_shared))[0, 0, 0]
    rest = (~better).nonzero()[1:, 0]
    wanted = better.clone()
    wanted[0] = True
    wanted[rest[: 40 - int(better.sum())]] = True  # 79 free blocks: 40
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("score", ["subblock", "mean"])
@pytest.mark.parametrize(
    "where, value",
    [(name, math.nan) for name in ("q_mean", "k_mean", "q_square", "k_variance", "q_pool_scale", "k_pool_scale", "q_sim", "k_sim", "everything")]
    + [(name, math.inf) for name in ("q_mean", "k_mean", "k_variance", "everything")]
    + [(name, -math.inf) for name in ("k_mean", "q_sim", "k_sim", "everything")],
)
def test_what_is_not_a_number_neither_hangs_nor_spreads(where, value, score):
    """Lists stay valid, of the size asked for, and those that see nothing of it stay as they were."""
    q, k = clustered(1, 1, 2, 640, 64), clustered(3, 1, 2, 1300, 64)
    plain = Problem(q, k, topk=0.3, simthreshd1=0.01, score=score)
    before = plain.map_of(plain.run())
    bad = Problem(q, k, topk=0.3, simthreshd1=0.01, score=score)
    for name in [n for n in bad.tensors if n != "k_weight"] if where == "everything" else [where]:
        x = bad.tensors[name] = bad.tensors[name].clone()
        if where == "everything":
            x[0, 1] = value
        else:
            x[0, 1, 9 if x.shape[2] == 20 else 2].view(-1)[0] = value  # the second pool of query block 2, query block 2 or key block 2
    judged = where in ("q_sim", "k_sim", "everything") and value == -math.inf  # forced: below any threshold
    for rule in (dict(topk=0.3, cdf=-1.0), dict(topk=-1.0, cdf=0.5), dict(topk=0.2, cdf=0.4)):
        bad.numbers.update(rule)
        out = bad.run(seed=1)
        got = bad.map_of(out)
        assert (out.counts >= 1).all()
        if rule["cdf"] > 0:
            if where == "everything" and math.isnan(value):
                assert (out.counts[0, 1] == 21).all(), "no probability is known: everything is kept"
            continue
        assert torch.equal(got[:, 0], before[:, 0]), "the other head"
        assert judged or (out.counts == 6).all()
        if where.startswith("q_"):
            rows = torch.arange(5) != 2
            assert torch.equal(got[0, 1, rows], before[0, 1, rows])
        if where == "k_mean" and math.isnan(value):
            assert not got[0, 1, :, 2].any() and before[0, 1, :, 2].any(), "NaN ranks below every number"


def test_capacity_is_never_passed():
    q, k = clustered(1, 1, 2, 640, 16), clustered(3, 1, 2, 2000, 16)
    whole = Problem(q, k, topk=0.5)
    lists = whole.run().lists.to(torch.int32)
    for capacity in (1, 7, 15):
        out = whole.run(capacity=capacity)
        assert (out.counts == capacity).all() and torch.equal(out.lists.to(torch.int32), lists[..., :capacity])


@pytest.mark.parametrize("score", ["subblock", "mean"])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_way_to_run_gives_the_same_bits(dim, score):
    """Rows in shared memory or in scratch, many tasks a slot, any order of threads."""
    q, k, v = clustered(1, 2, 4, 2100, dim), clustered(3, 2, 2, 1400, dim), rand(5, 2, 2, 1400, dim)
    problem = Problem(q, k, topk=0.1, cdfthreshd=0.5, causal=True, score=score, v=v)
    first = problem.run()
    names = ("lists", "counts", "visible", "state")
    for how in (dict(row_in_shared=False), dict(grid=1), dict(grid=3, seed=1), dict(seed=2, row_in_shared=False), dict(seed=3, stride=37)):
        again = problem.run(**how)
        for name in names:
            assert torch.equal(getattr(first, name).view(torch.uint8), getattr(again, name).view(torch.uint8)), (name, how)


@pytest.mark.parametrize("dim", [64, 128])
def test_shared_memory(dim):
    """The figures of config.py on both sides of the limit, with rows longer than the tiles; fewer bytes are an error."""
    most = max(n for n in range(1, 4000) if config.select_shared(dim, n)[1])
    assert most > 1200 and config.select_shared(dim, most)[0] <= config.SELECT_SHARED < config.select_shared(dim, 1)[0] + 32 * 1024
    for n_k in (most, most + 1):
        q, k = clustered(1, 1, 1, 1000, 4), clustered(3, 1, 1, n_k * 64 - 5, 4)
        problem = Problem(q, k, topk=0.1, size=dim)
        bytes_, fits = config.select_shared(dim, n_k)
        assert fits == (n_k == most)
        got, by_torch = problem.map_of(problem.run()), problem.by_selection().to_map()
        assert (got != by_torch).sum() <= 2 and got.sum() == by_torch.sum()  # of 1,200: a pair of blocks that nearly tie
        with pytest.raises(RuntimeError, match="shared memory"):
            problem.run(shared=bytes_ - 128, row_in_shared=fits)


# ---- scores ----


def scores_by_hand(problem: Problem) -> torch.Tensor:
    """log2 units, fp64 (N_q * 4, N_k) of batch 0, head 0 without a mask, from the means that the pairs were made of."""
    q, k = F.pad(problem.q_pools.mean[0, 0], (0, 0, 0, problem.n_q * 4 - problem.q_pools.mean.shape[2])), problem.k_pools
    s = problem.scale * (q @ k.mean[0, 0].T)
    s += (0.5 * problem.scale**2 * (q.square() @ k.variance[0, 0].T)).clamp_max(8)
    return (s + (k.weight[0] / 64).log()) * LOG2E


@pytest.mark.parametrize("dim, scale", [(64, 0.04), (128, 0.045)])
def test_scores_are_as_good_as_fp32(dim, scale):
    """Gaussian pools with a few channels that stand out, scores up to about 30 (natural units). Against PyTorch's fp32 product of the same means, as
    the style guide asks: twice its error, and a rounding of the largest score to fp32."""
    offset = torch.zeros(dim)
    offset[:: dim // 4] = 40.0
    q = (rand(1, 1, 1, 64, dim) * 2 + offset).repeat_interleave(32, 2) + 0.1 * rand(2, 1, 1, 2048, dim)
    k = (rand(3, 1, 1, 20, dim) * (1 + offset / 13)).repeat_interleave(64, 2) + 0.3 * rand(4, 1, 1, 1280, dim)
    problem = Problem(q, k, topk=0.5, scale=scale)
    truth = scores_by_hand(problem)
    largest = float(truth.abs().max()) / LOG2E
    assert 25 < largest < 35
    got = problem.run(row_in_shared=True).scratch[0]
    q32, k_mean, variance = (x.float() for x in (problem.q_pools.mean[0, 0], problem.k_pools.mean[0, 0], problem.k_pools.variance[0, 0]))
    peer = scale * (q32 @ k_mean.T) + (0.5 * scale**2 * (q32.square() @ variance.T)).clamp_max(8)
    peer_error = float((peer.double() - truth / LOG2E).abs().max())
    error = float((got.double() - truth).abs().max()) / LOG2E
    print(f"largest error {error:.3g}, of PyTorch in fp32 {peer_error:.3g}, largest score {largest:.3g}")
    assert error <= 2 * peer_error + 2.0**-23 * largest


# ---- compensation ----


def state_by_torch(problem: Problem, kept: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """m0 (log2 units), l0, shift weight and U of compensation.py for the map that was kept."""
    group = problem.heads // problem.kv_heads
    o = problem.options
    visible, partial = selection.visibility(problem.call(), problem.keys)
    found = []
    for b in range(problem.batch):
        pooled = visible[b % visible.shape[0]] & ~kept[b]
        if partial is not None:
            pooled = pooled & ~partial
        weight = None if problem.keys is None else problem.keys.weight[b]
        k, v = (x[b].float().repeat_interleave(group, 0) for x in (problem.centred, problem.v))
        state = compensation.pooled_state(compensation.Heads(problem.q[b], k, v, weight, pooled), problem.scale, shift=not o["causal"])
        found.append((state.m0, state.l0, state.shift_weight, state.u))
    return tuple(torch.stack(x) for x in zip(*found, strict=True))


@pytest.mark.parametrize(
    "case, dim",
    [
        (case, 64)
        for case in (
            "mean",
            "cdf",
            "judge",
            "spread",
            "causal",
            "causal mean",
            "offset",
            "bias",
            "bool mask",
            "map",
            "causal map",
            "dense",
            "one row",
        )
    ]
    + [(case, 96) for case in ("subblock", "spread", "causal", "bias", "map")],
)
def test_compensation_state(case, dim):
    s_q, s_k, batch = (1, 1111, 1) if case == "one row" else (2200, 1111, 1) if case == "subblock" else (430, 1111, 2)
    q, k, v = clustered(1, batch, 4, s_q, dim) * 0.8, clustered(3, batch, 2, s_k, dim) * 0.8, rand(5, batch, 2, s_k, dim)
    options = dict(topk=0.2)
    if "mean" in case:
        options["score"] = "mean"
    if case == "cdf":
        options = dict(cdfthreshd=0.6)
    if case == "judge":
        options["simthreshd1"] = 0.4
    if case == "spread":  # past the cap of the variance
        options["scale"] = 3 * dim**-0.5
    if "causal" in case or case == "offset":
        options["causal"] = True
        options["causal_offset"] = -77 if case == "offset" else 650
    if case == "bias":
        options["key_mask"] = rand(7, batch, s_k)
        options["key_mask"][:, ::5] = -math.inf
        options["key_mask"][:, 128:256] = -math.inf
    if case == "bool mask":
        options["key_mask"] = torch.rand(batch, s_k, generator=torch.Generator().manual_seed(1)) > 0.3
        options["key_mask"][0, 500:] = False
    if "map" in case:
        options["block_map"] = torch.rand(1, 4, -(-s_q // 128), -(-s_k // 64), generator=torch.Generator().manual_seed(1)) > 0.7
    if case == "dense":
        options["topk"] = 1.0
    problem = Problem(q, k, v=v, **options)
    for how in (dict(), dict(grid=2, seed=1, row_in_shared=False)):
        out = problem.run(**how)
        kept = problem.map_of(out)
        m0, l0, shift, u = state_by_torch(problem, kept)
        got = out.state
        nothing = m0 <= compensation.NOTHING_POOLED
        assert (nothing.all() if case == "dense" else not nothing.all()) and not got.isnan().any()
        assert (got[..., 0][nothing] == compensation.NOTHING_POOLED).all() and not got[..., 1:][nothing].any()
        some = ~nothing
        # Exponents up to about 40 differ by fp32 rounding on both sides, masses by as much relative to themselves.
        torch.testing.assert_close(got[..., 0][some] / LOG2E, m0[some], rtol=2e-6, atol=1e-5)
        torch.testing.assert_close(got[..., 1][some], l0[some], rtol=3e-5, atol=1e-6)
        torch.testing.assert_close(got[..., 2][some], shift[some], rtol=3e-5, atol=1e-6)
        torch.testing.assert_close(got[..., 4 : 4 + dim][some], u[some], rtol=3e-5, atol=3e-5 * float(l0.max()))
        assert not got[..., 3].any() and not got[..., 4 + dim :].any()


def test_a_skipped_block_without_numbers_stays_out_of_other_rows():
    """A NaN value mean reaches the state of the rows that skipped its block, and no other."""
    q, k, v = clustered(1, 1, 1, 640, 64), clustered(3, 1, 1, 1000, 64), rand(5, 1, 1, 1000, 64)
    problem = Problem(q, k, v=v, topk=0.3)
    problem.tensors["v_mean"][0, 0, 6] = math.nan
    out = problem.run()
    kept = problem.map_of(out)[0, 0, :, 6]
    assert torch.equal(out.state[0, 0, :, 4:].isnan().any(-1), ~kept) and kept.any() and not kept.all()


# What Hopper's attention kernel gets beyond the lists.


def test_without_a_counter():
    problem = Problem(clustered(1, 1, 2, 300, 64), clustered(2, 1, 2, 300, 64), topk=0.5)
    assert torch.equal(problem.run(counted=False).lists, problem.run(grid=1).lists)


def sequence(counts: torch.Tensor, s_q: int, **how) -> torch.Tensor:
    """sparge_sequence of counts (B, H, N_q)."""
    out = emulator.guarded(counts.shape, torch.uint16)
    params = SequenceParams(counts=counts.data_ptr(), sequence=out.data_ptr(), s_q=s_q)
    library(64, **how).launch("sparge_sequence", counts.shape[0] * counts.shape[1], params, seed=3)
    emulator.check_guards(out)
    return out.to(torch.int64)


def longest_first(counts: torch.Tensor) -> torch.Tensor:
    """Of equal ones the last comes first: a stable sort of the reversed row."""
    n_q = counts.shape[-1]
    return n_q - 1 - counts.flip(-1).sort(dim=-1, descending=True, stable=True).indices


@pytest.mark.parametrize("most", [0, 1, 3, 65536], ids=["all zero", "zero or one", "many ties", "hardly a tie"])
@pytest.mark.parametrize("n_q, s_q", [(1, 1), (1, 128), (7, 7 * 128 - 127), (256, 256 * 128), (300, 299 * 128 + 1)])
def test_sequence(n_q, s_q, most):
    counts = torch.randint(0, most + 1, (2, 3, n_q), generator=torch.Generator().manual_seed(n_q), dtype=torch.int32)
    got = sequence(counts, s_q)
    assert torch.equal(got, longest_first(counts))
    assert torch.equal(sequence(counts, s_q), got)


def test_sequence_of_equal_lists_is_the_order_without_one():
    assert sequence(torch.full((1, 1, 9), 5, dtype=torch.int32), 9 * 128).flatten().tolist() == list(range(8, -1, -1))


@pytest.mark.parametrize(
    "old, new",
    [
        ("counts[j] >= count + (j <= i)", "counts[j] >= count + (j < i)"), ("counts[j] >= count + (j <= i)", "counts[j] > count - (j < i)"),
        ("counts[j] >= count + (j <= i)", "counts[j] > count"), ("p.counts + cta_id() * n_q", "p.counts"),
        ("i < n_q; i += 256", "i < min_of(n_q, 256); i += 256"),
    ],
    ids=["counts itself", "first of equal ones first", "ties share a rank", "one head for all", "256 query blocks only"],
)  # fmt: skip
def test_faults_in_the_sequence_are_seen(old, new):
    counts = torch.randint(0, 4, (1, 2, 300), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    try:
        got = sequence(counts, 300 * 128, replace=((old, new),))
    except (RuntimeError, AssertionError):
        return
    assert not torch.equal(got, longest_first(counts))
