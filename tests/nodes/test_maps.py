"""Pooled maps: the mean over calls, what is kept of a long run, and rows and columns laid back over the frames of the latent."""

from __future__ import annotations

import importlib

import numpy as np
import pytest


def test_the_mean_over_calls_is_rounded_to_the_nearest(nodes):
    """A half goes up; without rounding every mean would be too small by a half on average."""
    pooled = nodes.maps.PooledMap(np.array([[0, 10, 255, 7]], dtype=np.uint8), 1, 4, None)
    pooled.add(np.array([[1, 11, 254, 7]], dtype=np.uint8))
    assert pooled.values.tolist() == [[1, 11, 255, 7]] and pooled.values.dtype == np.uint8 and pooled.calls == 2
    pooled.add(np.array([[0, 12, 255, 8]], dtype=np.uint8))  # means 2/3, 34/3, 255, 22/3
    assert pooled.values.tolist() == [[1, 11, 255, 7]] and pooled.calls == 3


def test_a_head_is_the_mean_over_its_calls_rounded(nodes):
    kept = nodes.maps.RunMaps()
    calls = [np.array([[[0]], [[10]]], dtype=np.uint8), np.array([[[1]], [[12]]], dtype=np.uint8)]
    kept.heads = nodes.maps.HeadMaps(3, {5: calls})
    mean = nodes.maps.PooledMap(np.zeros((1, 1), dtype=np.uint8), 9, 8, None)
    assert [kept.of_head(mean, nodes.maps.At(3, 5), head).values.tolist() for head in (0, 1)] == [[[1]], [[11]]]
    assert (kept.of_head(mean, nodes.maps.At(3, 5), 0).n_q, kept.of_head(mean, nodes.maps.At(3, 5), 0).n_k) == (9, 8)
    for at, head, sentence in (((2, 5), 0, "last sparse step alone (3), got step 2"), ((3, 5), 2, "head must be below 2, got 2")):
        with pytest.raises(LookupError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
            kept.of_head(mean, nodes.maps.At(*at), head)


def test_a_map_of_another_shape_begins_anew(nodes):
    kept, pooled = nodes.maps.RunMaps(), nodes.maps.Pooled(None, 2, 4, None)
    kept.add((0, 0), pooled, np.zeros((1, 2), dtype=np.uint8))
    kept.add((0, 0), pooled, np.full((2, 2), 9, dtype=np.uint8))
    assert kept.kept[0, 0].values.tolist() == [[9, 9], [9, 9]] and kept.kept[0, 0].calls == 1 and kept.nbytes == 4


PLACES = {
    "rows": ("row_major", ((3, 20, 22),), 0),
    "tiles after text": ("tiles", (7, (5, 12, 14)), 1),
    "hilbert with a reference": ("hilbert", (9, (1, 30, 20), (1, 16, 10)), 1),
    "large": ("tiles", ((40, 70, 66),), 0),
    "one row": ("tiles", ((1, 1, 90),), 0),
}


@pytest.mark.parametrize("name", PLACES)
def test_frames(nodes, name):
    """Token by token, from the order plan's permutation: what its block of queries keeps, and how often its block of keys is kept."""
    kind, segments, number = PLACES[name]
    plan = nodes._kernels.order_plan(kind, segments)
    n_q, n_k = -(-plan.length // nodes.maps.BLOCK_Q), -(-plan.length // nodes.maps.BLOCK_K)
    values = np.random.default_rng(3).integers(0, 256, (min(64, n_q), min(64, n_k)), dtype=np.uint8)
    found = nodes.maps.frames(nodes.maps.PooledMap(values, n_q, n_k, nodes.maps.Place(*PLACES[name])))
    lengths = [s if isinstance(s, int) else s[0] * s[1] * s[2] for s in segments]
    start, (grid_t, grid_h, grid_w) = sum(lengths[:number]), segments[number]
    shape = (min(32, grid_t), min(64, grid_h), min(64, grid_w))
    assert found.queries.shape == found.keys.shape == shape and found.queries.dtype == np.uint8
    blocks = values.astype(float)  # of every block pair, as far as the map tells
    rows, columns = (np.repeat(np.arange(len(e) - 1), np.diff(e)) for e in (edges(n_q, values.shape[0]), edges(n_k, values.shape[1])))
    blocks = blocks[rows][:, columns]
    for key, shares, block in (("queries", blocks.mean(1), 128), ("keys", blocks.mean(0), 64)):
        tokens = np.zeros(plan.length)
        tokens[plan.perm.numpy()] = shares[np.arange(plan.length) // block]  # in the caller's order
        grid = tokens[start : start + lengths[number]].reshape(grid_t, grid_h, grid_w)
        for axis, cells in enumerate(shape):
            at = [np.flatnonzero(np.arange(grid.shape[axis]) * cells // grid.shape[axis] == c) for c in range(cells)]
            grid = np.stack([grid.take(i, axis).mean(axis) for i in at], axis)
        got = getattr(found, key)
        assert abs(got - grid).max() <= 0.51, key
        assert len(values) == 1 or got.std() > 1, "the map is flat: this test sees nothing"


def edges(n: int, cells: int):
    return [i * n // cells for i in range(cells + 1)]


def test_block_sizes_are_the_kernels(pack, nodes):
    sizes = importlib.import_module(f"{pack.__name__}.kernels.block_mask")
    assert (nodes.maps.BLOCK_Q, nodes.maps.BLOCK_K) == (sizes.BLOCK_Q, sizes.BLOCK_K)


def test_frames_lie_where_their_tokens_are(nodes):
    """Row-major blocks of 128 queries and 64 keys on a grid of 2 x 16 x 16: each block of queries is half a frame, of keys a quarter."""
    values = np.zeros((4, 8), dtype=np.uint8)
    values[3] = 255  # the last half frame keeps all
    place = nodes.maps.Place("row_major", ((2, 16, 16),), 0)
    queries, keys = nodes.maps.frames(nodes.maps.PooledMap(values, 4, 8, place))
    assert queries.shape == keys.shape == (2, 16, 16)
    assert (queries[1, 8:] == 255).all() and (queries[1, :8] == 0).all() and (queries[0] == 0).all() and set(keys.flat) == {64}
    assert nodes.maps.frames(nodes.maps.PooledMap(values, 4, 8, None)) is None


def test_thinning_ends_where_the_latest_map_alone_is_too_large(node_modules, monkeypatch):
    maps, asked = node_modules.maps, []
    nbytes = maps.RunMaps.nbytes.fget

    def counted(run_maps):
        asked.append(1)
        assert len(asked) < 100, "it looks for room without end"
        return nbytes(run_maps)

    monkeypatch.setattr(maps.RunMaps, "nbytes", property(counted))
    monkeypatch.setattr(maps, "MAX_BYTES", 0)
    run_maps = maps.RunMaps()
    for step in range(6):
        run_maps.add(maps.At(step, 0), maps.Pooled(None, 1, 1, None), np.zeros((4, 4), np.uint8))
    run_maps.thin()
    assert [step for step, _ in run_maps.kept] == [0, 5]
