"""The mark `pairs` of conftest.py: its rows cover every pair of values, are few, and are the same in every run."""

from __future__ import annotations

import itertools

import pytest


@pytest.fixture
def pairs(request):
    return request.config.pluginmanager.get_plugin(str(request.config.rootpath / "tests" / "conftest.py")).pairs


@pytest.mark.parametrize(
    ("sizes", "most"), [((3, 2), 6), ((2, 2, 2), 4), ((7, 3, 2), 21), ((5, 3, 3, 2), 15), ((2, 2, 2, 2, 3), 8), ((1, 4, 1), 4)], ids=str
)
def test_every_pair_meets_in_few_rows(pairs, sizes, most):
    columns = [[f"{'abcde'[at]}{value}" for value in range(size)] for at, size in enumerate(sizes)]
    rows = pairs(*columns)
    met = {pair for row in rows for pair in itertools.combinations(row, 2)}
    assert met == {pair for row in itertools.product(*columns) for pair in itertools.combinations(row, 2)}
    assert len(rows) == len(set(rows)) <= most and rows == pairs(*columns)


@pytest.mark.pairs(length=[1, 200], kind=[len, "second"], third=[None, True])
def test_the_mark_gives_rows(request, length, kind, third):
    assert request.node.name == f"test_the_mark_gives_rows[{length}-{getattr(kind, '__name__', kind)}-{third}]"
