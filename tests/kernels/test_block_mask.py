"""BlockMask and its builders, against brute force over tokens."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from sparge_kernels import BlockMask, block_mask, order, select_blocks
from torch._subclasses import FakeTensor, FakeTensorMode


def random_mask(shape, seed=0, share=0.5):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def blocks_of(pairs: np.ndarray) -> torch.Tensor:
    """bool (S_q, S_k) over tokens -> bool (N_q, N_k): any pair inside."""
    s_q, s_k = pairs.shape
    kept = [[pairs[i : i + 128, j : j + 64].any() for j in range(0, s_k, 64)] for i in range(0, s_q, 128)]
    return torch.tensor(kept)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 4, 5), (1, 3, 1, 7), (2, 1, 8, 1)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_round_trip(shape, share):
    dense = random_mask(shape, share=share)
    mask = BlockMask.from_dense(dense)
    assert mask.shape == shape and torch.equal(mask.to_dense(), dense)
    torch.testing.assert_close(mask.density, dense.float().mean((-2, -1)))
    assert torch.equal(mask.to("cpu").to_dense(), dense)


def test_a_mask_shares_no_memory_with_what_it_came_from_or_gives():
    dense = random_mask((1, 2, 3, 4))
    before, mask = dense.clone(), BlockMask.from_dense(dense)
    dense.fill_(True)
    mask.to_dense().fill_(True)
    assert torch.equal(mask.to_dense(), before)


def test_two_dimensions_are_shared_by_all():
    dense = random_mask((3, 5))
    assert BlockMask.from_dense(dense).shape == (1, 1, 3, 5) and torch.equal(BlockMask.from_dense(dense).to_dense()[0, 0], dense)


def test_non_contiguous_maps():
    dense = random_mask((2, 3, 5, 4)).transpose(2, 3)
    assert torch.equal(BlockMask.from_dense(dense).to_dense(), dense)
    wide = random_mask((1, 1, 4, 5)).expand(2, 3, 4, 5)
    assert torch.equal(BlockMask.from_dense(wide).to_dense(), wide)


def test_frozen():
    mask = BlockMask.from_dense(random_mask((1, 1, 2, 2)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.visible = None


def test_density_with_visible():
    dense = torch.tensor([[[[1, 1, 0, 0], [1, 1, 1, 0]]]], dtype=torch.bool)
    assert BlockMask.from_dense(dense, torch.tensor([[[2, 4]]], dtype=torch.int32)).density.item() == pytest.approx(5 / 6)
    assert BlockMask.from_dense(dense & False, torch.tensor([[[0, 0]]], dtype=torch.int32)).density.item() == 0


@pytest.mark.parametrize("a, b", [((2, 3, 4, 5), (2, 3, 4, 5)), ((1, 1, 4, 5), (2, 3, 4, 5)), ((2, 1, 4, 5), (1, 3, 4, 5))], ids=str)
def test_or_and_and(a, b):
    x, y = random_mask(a, 1), random_mask(b, 2)
    assert torch.equal((BlockMask.from_dense(x) | BlockMask.from_dense(y)).to_dense(), x | y)
    assert torch.equal((BlockMask.from_dense(x) & BlockMask.from_dense(y)).to_dense(), x & y)


def test_or_keeps_visible():
    visible = torch.tensor([[[2, 4]]], dtype=torch.int32)
    x, y = random_mask((1, 2, 2, 4), 1), random_mask((1, 2, 2, 4), 2)
    x[:, :, 0, 2:] = y[:, :, 0, 2:] = False
    for m in (BlockMask.from_dense(x, visible) | BlockMask.from_dense(y), BlockMask.from_dense(x) | BlockMask.from_dense(y, visible)):
        torch.testing.assert_close(m.density, (x | y).sum((-2, -1)) / 6)


@pytest.mark.parametrize("key_mask", [False, True])
def test_the_density_of_joined_selections_is_a_share(key_mask):
    """Whatever each could have kept: causal beside a window that sees all, or keys that the other one masks."""
    q, k = (torch.randn(1, 2, 1000, 16, generator=torch.Generator().manual_seed(n)) for n in range(2))
    if key_mask:
        front = torch.arange(1000)[None] < 512
        x, y = (select_blocks(q, k, topk=1.0, key_mask=mask) for mask in (front, ~front))
    else:
        x, y = select_blocks(q, k, topk=1.0, causal=True), BlockMask.sliding_window(1000, 1000, 2000)
    for joined in (x | y, y | x, x & y, y & x):
        assert joined.density.max() <= 1
    assert (x | y).density.min() == (y | x).density.min() == 1 and torch.equal((x & y).density, (y & x).density)
    assert torch.equal((x | x).density, x.density) and torch.equal((x & x).density, x.density)


@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, 127, 128, 300, 5000])
@pytest.mark.parametrize("s_q, s_k", [(1, 1), (63, 63), (200, 200), (1000, 1000), (200, 1000), (1000, 200)])
def test_sliding_window(s_q, s_k, window):
    pairs = np.abs(np.arange(s_q)[:, None] - np.arange(s_k)[None]) <= window
    mask = BlockMask.sliding_window(s_q, s_k, window)
    assert torch.equal(mask.to_dense()[0, 0], blocks_of(pairs))


RANGES = ([], [(0, 1)], [(63, 65)], [(64, 128)], [(127, 128), (500, 700)], [(0, 1000)], [(190, 200)], [(210, 300)])


@pytest.mark.parametrize("ranges", RANGES, ids=str)
@pytest.mark.parametrize("s_q, s_k", [(1000, 1000), (200, 1000), (1000, 200)])
def test_global_tokens(s_q, s_k, ranges):
    pairs = np.zeros((s_q, s_k), bool)
    for start, end in ranges:
        pairs[start:end] = True
        pairs[:, start:end] = True
    assert torch.equal(BlockMask.global_tokens(s_q, s_k, ranges).to_dense()[0, 0], blocks_of(pairs))


PLANS = {
    "row_major": ("row_major", ((6, 9, 11),)),
    "row_major with text": ("row_major", (70, (6, 9, 11), 33)),
    "row_major two grids": ("row_major", ((4, 9, 11), 20, (2, 9, 11))),
    "row_major aligned": ("row_major", ((6, 16, 16),)),
    "tiles aligned": ("tiles", ((8, 16, 16),)),
    "tiles with text": ("tiles", (40, (6, 9, 11), 33)),
    "hilbert": ("hilbert", (40, (6, 9, 11))),
    "hilbert two grids": ("hilbert", ((4, 9, 11), 20, (2, 9, 11))),
}


def tokens(plan):
    """Per plan position, worked out here: grid number (-1 = protected), frame, place in the frame, frame size."""
    rows = []
    for number, segment in enumerate(plan.segments):
        if isinstance(segment, int):
            rows += [(-1, 0, 0, 0)] * segment
        else:
            rows += [(number, t, y * segment[2] + x, segment[1] * segment[2])
                     for t in range(segment[0]) for y in range(segment[1]) for x in range(segment[2])]  # fmt: skip
    return np.array(rows)[plan.perm.numpy()].T


def brute(plan, rule, first):
    grid, t, place, size = tokens(plan)
    text = grid < 0
    same = (grid[:, None] == grid[None]) & ~text[:, None]
    pairs = same & rule(np.abs(t[:, None] - t[None]), np.abs(place[:, None] - place[None]), size[None])
    pairs |= text[:, None] | text[None]
    if first:
        pairs |= (~text & (t == 0))[None]
    return blocks_of(pairs)


@pytest.mark.pairs(name=PLANS, window=[0, 1, 2, 10], first=[True, False])
def test_frames(name, window, first):
    plan = order.plan(*PLANS[name])
    got = BlockMask.frames(plan, window, first=first).to_dense()[0, 0]
    expected = brute(plan, lambda t, place, size: t <= window, first)
    assert bool((got | ~expected).all()), "a block that the rule keeps is missing"
    if "two" not in name and "hilbert" not in name:  # elsewhere the frames of a block are a hull
        assert torch.equal(got, expected)
    assert float(got.float().mean()) <= float(expected.float().mean()) + 0.1


@pytest.mark.parametrize("width", [0.05, 0.25, 1.0, 3.0])
@pytest.mark.parametrize("name", PLANS)
def test_radial(name, width):
    plan = order.plan(*PLANS[name])
    got = BlockMask.radial(plan, width=width).to_dense()[0, 0]

    def rule(t, place, size):
        return (t == 0) | (place <= width * size / 2.0 ** np.floor(np.log2(np.maximum(t, 1))))

    expected = brute(plan, rule, True)
    assert bool((got | ~expected).all()), "a block that the rule keeps is missing"
    if name == "row_major aligned":  # every block lies in one frame: the hull is the block
        assert torch.equal(got, expected)


def test_radial_thins_out_with_distance():
    kept = BlockMask.radial(order.plan("row_major", ((33, 32, 32),)), width=0.25).to_dense()[0, 0].view(33, 8, 33, 16)
    per_distance = [float(kept[16, :, 16 + d].float().mean()) for d in (0, 1, 4, 16)]
    assert per_distance[0] == 1 and per_distance == sorted(per_distance, reverse=True) and per_distance[-1] < 0.3
    assert kept[:, :, 0].all()


def test_builder_errors():
    plan = order.plan("row_major", ((2, 8, 8),))
    for call, parts in (
        (lambda: BlockMask.sliding_window(100, 100, -1), ["window", "-1"]),
        (lambda: BlockMask.global_tokens(100, 100, [(5, 5)]), ["ranges", "(5, 5)"]),
        (lambda: BlockMask.global_tokens(100, 100, [(-1, 5)]), ["ranges", "(-1, 5)"]),
        (lambda: BlockMask.frames(plan, -2), ["window", "-2"]),
        (lambda: BlockMask.radial(plan, width=0), ["width", "0"]),
        (lambda: BlockMask.radial(plan, width=float("nan")), ["width", "nan"]),
        (lambda: BlockMask.from_dense(torch.ones(2, 2, 2, dtype=torch.bool)), ["kept", "(2, 2, 2)"]),
        (lambda: BlockMask.from_dense(torch.ones(1, 1, 0, 2, dtype=torch.bool)), ["kept", "(1, 1, 0, 2)"]),
        (lambda: BlockMask.from_dense(random_mask((1, 1, 2, 2))) | BlockMask.from_dense(random_mask((1, 1, 2, 3))), ["(1, 1, 2, 2)", "(1, 1, 2, 3)"]),
        (lambda: BlockMask.from_dense(random_mask((2, 1, 2, 2))) & BlockMask.from_dense(random_mask((3, 1, 2, 2))), ["(2, 1, 2, 2)", "(3, 1, 2, 2)"]),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert all(part in str(caught.value) for part in parts), str(caught.value)
    for call in (lambda: BlockMask.from_dense(torch.ones(1, 1, 2, 2)), lambda: BlockMask.from_dense([[True]])):
        with pytest.raises(TypeError, match="kept must be a bool tensor"):
            call()
    with pytest.raises(TypeError):
        BlockMask.from_dense(random_mask((1, 1, 2, 2))) | random_mask((1, 1, 2, 2))


def test_block_sizes():
    assert (block_mask.BLOCK_Q, block_mask.BLOCK_K) == (128, 64)
    assert [block_mask.num_blocks(n, 64) for n in (1, 63, 64, 65, 128)] == [1, 1, 1, 2, 2]


def test_the_map_on_a_device_is_kept_with_the_mask_and_goes_nowhere_with_it():
    kept = random_mask((1, 2, 3, 4))
    mask = BlockMask.from_dense(kept)
    before = len(pickle.dumps(mask))
    assert torch.equal(mask.on(torch.device("cpu")), kept)
    elsewhere = torch.device("meta")
    assert mask.on(elsewhere, keep=False) is not mask.on(elsewhere, keep=False)
    first = mask.on(elsewhere)
    assert first.device == elsewhere and mask.on(elsewhere) is first and mask.on(elsewhere, keep=False) is first
    assert len(pickle.dumps(mask)) == before and torch.equal(pickle.loads(pickle.dumps(mask)).on(torch.device("cpu")), kept)


def test_builders_are_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        masks = BlockMask.sliding_window(300, 300, 9), BlockMask.global_tokens(300, 300, [(0, 5)])
    assert (masks[0] | masks[1]).to_dense().device.type == "cpu"


def test_a_map_that_only_stands_for_one_is_not_kept():
    mask = BlockMask.from_dense(random_mask((1, 2, 3, 4)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(mask.on(torch.device("meta")), FakeTensor)
    assert type(mask.on(torch.device("meta"))) is torch.Tensor
