"""Token orders: permutations, Hilbert neighbours, tile boxes, protected spans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sparge_kernels import order, sparse_attention
from torch._subclasses import FakeTensor, FakeTensorMode

SEGMENTS = [
    ((1, 1, 1),), ((5,)), (5, (3, 5, 7)), ((2, 3, 5), 4), (3, (4, 4, 4), 2, (1, 9, 5), 1), ((1, 13, 17),), ((17, 1, 1),), ((9, 30, 52),),
    ((3, 3, 3), (3, 3, 3)),
]  # fmt: skip


def cells(plan):
    """(t, y, x) of each grid token in plan order, for an `OrderPlan` of one grid."""
    return np.stack(np.unravel_index(plan.perm.numpy(), plan.segments[0]), 1)


@pytest.mark.parametrize("kind", ["row_major", "tiles", "hilbert"])
@pytest.mark.parametrize("segments", SEGMENTS, ids=str)
def test_permutation_and_inverse(kind, segments):
    segments = segments if isinstance(segments, tuple) else (segments,)
    plan = order.plan(kind, segments)
    length = sum(s if isinstance(s, int) else s[0] * s[1] * s[2] for s in segments)
    assert plan.length == length and plan.perm.dtype == plan.inverse.dtype == torch.int64
    assert torch.equal(plan.perm.sort().values, torch.arange(length))
    assert torch.equal(plan.perm[plan.inverse], torch.arange(length)) and torch.equal(plan.inverse[plan.perm], torch.arange(length))
    assert plan.is_identity == (kind == "row_major")
    if kind == "row_major":
        assert torch.equal(plan.perm, torch.arange(length))
    start, spans, text = 0, [], []
    for s in segments:
        size = s if isinstance(s, int) else s[0] * s[1] * s[2]
        if isinstance(s, int):
            spans.append((start, start + size))
            text += range(start, start + size)
        elif kind != "row_major":
            place = plan.inverse[start : start + size]
            assert int(place.max() - place.min()) == size - 1, "a grid is torn apart"
        start += size
    assert plan.protected == tuple(spans)
    if kind != "row_major" and text:
        assert plan.inverse[torch.tensor(text)].min() == length - len(text), "protected spans lie before a grid"


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_hilbert_neighbours_on_cubes(n):
    steps = np.abs(np.diff(cells(order.plan("hilbert", ((n, n, n),))), axis=0))
    assert (steps.sum(1) == 1).all()


@pytest.mark.parametrize("n", [2, 4, 32])
def test_hilbert_neighbours_on_squares(n):
    steps = np.abs(np.diff(cells(order.plan("hilbert", ((1, n, n),))), axis=0))
    assert (steps.sum(1) == 1).all()


@pytest.mark.parametrize("grid", [(8, 16, 16), (5, 18, 22), (21, 12, 20), (1, 32, 48)], ids=str)
@pytest.mark.parametrize("kind", ["tiles", "hilbert"])
def test_blocks_are_compact(kind, grid):
    """The extent of a block in each axis, summed, is well below that of a strip of 64 row-major tokens."""

    def extent(plan):
        place = cells(plan)
        whole = len(place) // 64 * 64
        boxes = place[:whole].reshape(-1, 64, 3)
        return np.ptp(boxes, axis=1).sum(1).mean()

    assert extent(order.plan(kind, (grid,))) < 0.75 * extent(order.plan("row_major", (grid,)))


@pytest.mark.parametrize("grid, box", [((8, 16, 16), (4, 4, 4)), ((4, 8, 12), (4, 4, 4)), ((2, 8, 24), (2, 4, 8)), ((1, 24, 40), (1, 8, 8))], ids=str)
def test_tiles_are_boxes_and_follow_each_other(grid, box):
    place = cells(order.plan("tiles", (grid,))).reshape(-1, 64, 3)
    low, high = place.min(1), place.max(1)
    assert (high - low + 1 == np.array(box)).all() and all(len(np.unique(b, axis=0)) == 64 for b in place)
    step = np.abs(np.diff(low // np.array(box), axis=0)).sum(1)
    assert (step == 1).all(), "consecutive tiles do not touch"


def test_coordinates():
    plan = order.plan("hilbert", (3, (2, 3, 4), 2))
    segment, t, place, frame = plan.coordinates()
    caller = plan.perm.numpy()
    for p in range(plan.length):
        if caller[p] < 3 or caller[p] >= 27:
            assert segment[p] == -1
        else:
            cell = caller[p] - 3
            assert (segment[p], t[p], place[p], frame[p]) == (1, cell // 12, cell % 12, 12)


def test_plans_are_cached_and_bounded():
    assert order.plan("tiles", (3, (2, 3, 4))) is order.plan("tiles", [3, [2, 3, 4]])
    before = order.plan("tiles", (3, (2, 3, 4)))
    for n in range(1, 80):
        order.plan("tiles", (n, (2, 3, 4)))
    assert order.plan("tiles", (3, (2, 3, 4))) is not before, "the cache has no bound"
    assert before.on(torch.device("cpu")) is before.perm
    assert before.on("meta").device.type == "meta" and before.on("meta") is before.on("meta")


@pytest.mark.parametrize(
    "kind, segments, parts",
    [
        ("zigzag", ((2, 2, 2),), ["kind", "zigzag", "hilbert"]),
        ("tiles", (), ["segments", "none"]),
        ("tiles", (0,), ["segments", "0"]),
        ("tiles", (-4, (2, 2, 2)), ["segments", "-4"]),
        ("tiles", ((2, 0, 2),), ["segments", "(2, 0, 2)"]),
        ("tiles", ((2, 2),), ["segments", "(2, 2)"]),
        ("tiles", ((2, 2.0, 2),), ["segments", "(2, 2.0, 2)"]),
        ("tiles", (2.5,), ["segments", "2.5"]),
        ("tiles", ("ab",), ["segments", "ab"]),
        ("tiles", (True, (2, 2, 2)), ["segments", "True"]),
    ],
    ids=str,
)
def test_errors(kind, segments, parts):
    with pytest.raises(ValueError) as caught:
        order.plan(kind, segments)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_what_only_stands_for_a_tensor_is_not_kept():
    segments = [3, (2, 5, 23)]  # of no other test: plans are cached
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(order.plan("tiles", segments).perm, FakeTensor)
    plan = order.plan("tiles", segments)
    assert type(plan.perm) is type(plan.inverse) is torch.Tensor and order.plan("tiles", segments) is plan
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(plan.on(torch.device("meta")), FakeTensor)
    assert type(plan.on(torch.device("meta"))) is torch.Tensor


def test_a_plan_made_during_an_export_changes_no_later_call():
    class Model(torch.nn.Module):
        def forward(self, q):
            return sparse_attention(q, q, q, topk=0.3, order=order.plan("tiles", [(1, 10, 31)]))

    q = torch.randn(1, 2, 310, 32, generator=torch.Generator().manual_seed(1))
    exported = torch.export.export(Model(), (q,), strict=False)
    out = Model()(q)
    assert type(out) is torch.Tensor and torch.equal(exported.module()(q), out)
