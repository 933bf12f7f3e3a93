"""The speed-up: which calls are also run densely, what they are compared with, and what is said of the comparison."""

from __future__ import annotations

import functools
from collections import Counter
from types import SimpleNamespace

import comfy_models
import pytest
import torch
from attention_calls import KEY

pytestmark = pytest.mark.usefixtures("no_gradients")


class Clock:
    def __init__(self, ms: float):
        self.ms = ms

    def milliseconds(self) -> float:
        return self.ms


@pytest.fixture
def kind(nodes):
    """`kind(shape="s", device="cpu", instead="dense")`"""
    return lambda shape="s", device="cpu", instead="dense": nodes.speedup.CallKind(shape, torch.float16, torch.device(device), instead)


# Names.


def sage_of(package, name="attention_override_sage"):
    def override(func, *args, **kwargs):
        return func(*args, **kwargs)

    override.__name__, override.__module__ = name, package
    return override


class Callable:
    def __call__(self, func, *args, **kwargs):
        return func(*args, **kwargs)

    def patch(self, func, *args, **kwargs):
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("override", "name"),
    [
        (None, "dense"),
        (sage_of("comfy_extras.nodes_attention"), "attention_override_sage of comfy_extras"),
        (sage_of("/home/me/Comfy_x_UI/custom_nodes/comfyui-kjnodes.nodes.model"), "attention_override_sage of comfyui-kjnodes"),
        (sage_of(r"C:\ComfyUI\custom_nodes\Pack_x_v2.nodes"), "attention_override_sage of Pack.v2"),
        (functools.partial(functools.partial(sage_of("pack.a"), 1), 2), "attention_override_sage of pack"),
        (Callable(), "Callable of tests"),
        (Callable().__call__, "Callable of tests"),
        (Callable().patch, "patch of tests"),
        (lambda func, *args, **kwargs: func(*args, **kwargs), "a function of tests"),
        (sage_of(None), "attention_override_sage"),
        (sage_of("pack", "x" * 200), "x" * 80),
    ],
    ids=["none", "core", "folder", "windows", "partial", "object", "call", "method", "lambda", "no_module", "long"],
)
def test_what_another_attention_is_called(nodes, override, name):
    assert nodes.speedup.name_of(override) == name


def in_mode(function, word="", times=1):
    """Another node's attention as KJNodes makes it: the same function around another one."""
    inner = torch.compiler.disable()(function)

    def attention_override_sage(func, *args, **kwargs):
        return (inner, word, times) and func(*args, **kwargs)

    return attention_override_sage


def first_mode(q):
    return q


def second_mode(q):
    return q


def test_modes_of_one_node_are_told_apart(nodes):
    """All of the same name; numbers may count calls and say nothing."""
    of = nodes.speedup.instead_of
    modes = [in_mode(first_mode), in_mode(second_mode), in_mode(first_mode, "per_block"), functools.partial(in_mode(first_mode), "word")]
    found = [of(mode) for mode in modes]
    assert len({instead.key for instead in found}) == 4 and {instead.name for instead in found} == {"attention_override_sage of tests"}
    assert of(in_mode(first_mode, times=2)) == found[0] == of(in_mode(first_mode)) and of(None) == ("dense", "")


def test_whatever_an_override_holds(nodes):
    """Itself, an empty cell, an object that is called: none of it stops a run."""

    def override(func, *args, **kwargs):
        return override, never

    assert len(nodes.speedup.instead_of(override).key) == 12
    assert len({nodes.speedup.instead_of(it).key for it in (Callable(), Callable().patch, Callable().__call__, len)}) == 4
    if override is None:
        never = 1


def test_each_attention_of_comfyui_is_a_kind_of_its_own(nodes, direct):
    ours = direct()
    ours.run.monitors, ours.run.measures, ours.run.plan = {"7": True}, True, nodes.speedup.Plan(range(1))
    q, k, v = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(1))

    def attention_pytorch(q, *args, **kwargs):
        return q

    def attention_sub_quad(q, *args, **kwargs):
        return q

    for attention in (attention_pytorch, attention_sub_quad, functools.partial(attention_pytorch)):
        ours.patch.override(attention, q, k, v, 2, skip_reshape=True, transformer_options=ours.options)
    ours.closed()
    kinds = ours.run.against_dense.kinds()
    assert [(kind.instead, kind.attention) for kind in kinds] == [("dense", name) for name in ("attention_pytorch", "attention_sub_quad", "partial")]


@pytest.mark.parametrize("mode", [first_mode, second_mode])
def test_a_mode_of_another_node_is_a_kind_of_its_own(nodes, tiny, patched, mode):
    model, override = tiny("wan_t2v"), in_mode(mode)
    comfy_models.sample(model, watched(nodes, patched(with_override(model.patcher, override))), steps=1)
    (kind,) = nodes.telemetry.runs.closed[-1].against_dense.kinds()
    assert kind.instead == "attention_override_sage of tests"
    assert kind.attention.startswith("attention_") and kind.attention.endswith(" " + nodes.speedup.instead_of(override).key)


# Which calls are timed.


def asked(plan, kind, steps, layers=30) -> dict[int, list[int]]:
    """The numbers of the calls that were wanted, by step."""
    wanted: dict[int, list[int]] = {}
    for step in steps:
        for number in range(layers):
            if plan.wants(kind, step):
                wanted.setdefault(step, []).append(number)
    return wanted


@pytest.mark.parametrize("layers", [2, 3, 30, 60])
def test_a_long_run_times_five_calls_over_its_steps(nodes, kind, layers):
    wanted = asked(nodes.speedup.Plan(range(4, 20)), kind(), range(4, 20), layers)
    assert list(wanted) == [4, 8, 12, 15, 19] and {len(numbers) for numbers in wanted.values()} == {1}
    numbers = [number for (number,) in wanted.values()]
    assert len(set(numbers)) == min(layers - (layers > 2), 5), "always the same layer"
    if layers > 2:
        assert 0 not in numbers, "the first call of a step may be cold"


@pytest.mark.parametrize(("steps", "each"), [(5, [1] * 5), (4, [1] * 4), (3, [1] * 3), (2, [2, 1]), (1, [3]), (0, [])])
def test_few_steps_time_one_in_each_or_several_layers(nodes, kind, steps, each):
    wanted = asked(nodes.speedup.Plan(range(1, 1 + steps)), kind(), range(1, 1 + steps))
    assert [len(wanted.get(step, [])) for step in range(1, 1 + steps)] == each
    assert all(len(set(numbers)) == len(numbers) and 0 not in numbers for numbers in wanted.values())


def test_every_kind_is_timed_by_itself(nodes, kind):
    plan = nodes.speedup.Plan(range(3))
    kinds, wanted = [kind("a"), kind("b"), kind("a", "meta"), kind("a", instead="sage")], Counter()
    for step in range(3):
        for _ in range(4):
            for one in kinds:
                wanted[one] += plan.wants(one, step)
    assert wanted == Counter({one: 3 for one in kinds})


def test_a_step_without_the_call_is_made_up_for(nodes, kind):
    """One call a step and kind: the first step cannot know that no second comes."""
    plan = nodes.speedup.Plan(range(20))
    assert sum(len(numbers) for numbers in asked(plan, kind(), range(20), layers=1).values()) >= 4
    late = asked(nodes.speedup.Plan(range(20)), kind(), range(10, 20))
    assert {len(numbers) for numbers in late.values()} == {1} and len(late) == 5  # a kind that comes late catches up, one a step


@pytest.mark.parametrize("warm", [True, False])
def test_the_first_dense_call_on_a_gpu_loads_its_kernel(nodes, kind, warm):
    """It is not counted, unless the run had dense calls of its own; long runs still make one a step."""
    plan, gpu = nodes.speedup.Plan(range(20)), kind(device="cuda:0")
    if warm:
        plan.saw_dense(gpu)
    seen = []
    for step in range(20):
        for _ in range(10):
            if plan.wants(gpu, step):
                seen.append((step, plan.warms_up(gpu)))
    assert [warms for _, warms in seen] == [not warm] * (not warm) + [False] * 5 and len({step for step, _ in seen}) == len(seen)
    short = nodes.speedup.Plan(range(3))
    assert [len(numbers) for numbers in asked(short, gpu, range(3)).values()] == [2, 1, 1]


# What comes of it.


def compared(nodes, kind, sparse, extra=(), dense=()):
    """A comparison of calls given as (step, ms)."""
    made = nodes.speedup.Comparison()
    for name, calls in (("sparse", sparse), ("extra", extra), ("dense", dense)):
        for step, ms in calls:
            getattr(made, name)(kind, step, ms)
    return made


def test_a_ratio_is_of_one_step(nodes, kind):
    """The machine is twice as slow in step 1, for both: the ratio is the same."""
    made = compared(nodes, kind(), [(0, 2.0)] * 3 + [(1, 4.0)] * 3 + [(2, 2.0)] * 3, [(0, 6.0), (1, 12.0), (2, 6.6)])
    found = made.speedup()
    assert found == pytest.approx((3.0, 3.0, 3.3, 3)) and found.is_clear and made.instead() == "dense"
    assert made.saved_ms() == pytest.approx(2 * 24.0)
    made.measuring_ms = 30.0
    assert made.saved_ms() == pytest.approx(18.0)


def test_the_first_sparse_call_of_a_run_may_be_cold(nodes, kind):
    made = compared(nodes, kind(), [(0, 500.0), (0, 2.0), (0, 2.0), (1, 2.0), (2, 2.0)], [(0, 6.0), (1, 6.0), (2, 6.0)])
    assert made.speedup() == (3.0, 3.0, 3.0, 3) and made.pairs(kind())[0] == (0, 2.0, 2.0, 6.0)
    assert compared(nodes, kind(), [(0, 4.0)], [(0, 6.0)]).pairs(kind()) == [(0, 4.0, 4.0, 6.0)]  # it is all there is
    assert made.saved_ms() == pytest.approx(5 * 2.0 * 2), "what loading took would not have been spared"


def test_one_sparse_call_that_was_held_up_says_nothing(nodes, kind):
    """All the extra calls of a run of one step fall in it."""
    sparse = [(0, 900.0), *((0, 25.0) for _ in range(5)), (0, 3000.0), (0, 24.0)]
    made = compared(nodes, kind(), sparse, [(0, 50.0), (0, 51.0), (0, 49.0)])
    assert made.pairs(kind())[0] == (0, 25.0, 24.0, 50.0)
    assert made.speedup() == pytest.approx((2.0, 1.96, 2.04, 3)) and made.saved_ms() == pytest.approx(8 * 25.0)
    assert compared(nodes, kind(), sparse, dense=[(step, 50.0) for step in range(1, 4)]).speedup().median == 2.0


def test_single_times_are_bounded(nodes, kind):
    """The fastest call is known of all of them."""
    made = compared(nodes, kind(), [(0, 2.0)] * 3000 + [(0, 1.0)], [(0, 6.0)] * 3)
    assert made.pairs(kind())[0] == (0, 2.0, 1.0, 6.0) and len(made._sparse[kind()][0].times) == nodes.speedup.MAX_TIMES
    assert made.saved_ms() == pytest.approx(3001 * 4.0)


@pytest.mark.parametrize(
    ("dense", "spread", "clear"),
    [
        ((4.0, 5.0, 3.0, 6.0, 4.4), (2.2, 1.5, 3.0, 5), True),
        ((1.0, 1.2, 1.9), (0.6, 0.5, 0.95, 3), True),
        ((1.8, 2.0, 2.6, 2.2), (1.05, 0.9, 1.3, 4), False),
        ((2.0, 2.0, 2.0), (1.0, 1.0, 1.0, 3), False),
        ((4.0, 4.0), (None, None, None, 2), False),
        ((), (None, None, None, 0), False),
    ],
    ids=["faster", "slower", "unclear", "equal", "too_few", "none"],
)
def test_median_and_spread(nodes, kind, dense, spread, clear):
    made = compared(nodes, kind(), [(step, 2.0) for step in range(6)], list(enumerate(dense)))
    assert tuple(made.speedup()) == pytest.approx(spread) and made.speedup().is_clear == clear
    assert (made.saved_ms() is not None) == clear


def test_kinds_weigh_by_what_they_took(nodes, kind):
    """Large calls gain, small ones lose; a kind of too few measured calls has no say."""
    made = nodes.speedup.Comparison()
    for step in range(3):
        for shape, sparse, dense in (("large", 9.0, 27.0), ("small", 1.0, 0.5), ("rare", 50.0, 5000.0)):
            made.sparse(kind(shape), step, sparse)
            if shape != "rare" or step == 0:
                made.extra(kind(shape), step, dense)
    assert made.speedup() == pytest.approx((0.9 * 3 + 0.1 * 0.5, 0.9 * 3 + 0.1 * 0.5, 0.9 * 3 + 0.1 * 0.5, 6))
    assert made.saved_ms() == pytest.approx(3 * (18.0 - 0.5))


def test_dense_steps_of_the_run_serve_where_nothing_was_measured(nodes, kind):
    """The middle call of each step; against the middle sparse call of that step where there are any, else of the whole run."""
    sparse = [(3, 9.0), (3, 2.0), (4, 4.0), (5, 5.0)]
    dense = [(0, 400.0), (0, 10.0), (0, 8.0), (1, 20.0), (4, 12.0)]
    found = compared(nodes, kind(), sparse, dense=dense).speedup()
    assert found == pytest.approx((3.0, 2.5, 5.0, 3))  # 10 / 4, 20 / 4, 12 / 4
    assert compared(nodes, kind(), sparse, extra=[(3, 4.0)], dense=dense).speedup().calls == 1
    other = nodes.speedup.Comparison()
    other.sparse(kind("a"), 0, 1.0)
    other.dense(kind("b"), 0, 1.0)
    other.dense(kind("a", instead="sage"), 0, 1.0)
    assert other.speedup().calls == 0 and other.instead() is None


@pytest.mark.parametrize(
    ("ratios", "instead", "said"),
    [
        ((2.1, 1.9, 2.4, 2.0, 2.2), "dense", "2.1x faster than dense (1.9 to 2.4, 5 measured calls)"),
        ((1.2, 1.04, 1.3), "f of pack", "1.20x faster than f of pack (1.04 to 1.30, 3 measured calls)"),
        ((0.625, 0.5, 0.8), "dense", "1.6x slower than dense (1.2 to 2.0, 3 measured calls): raise min_tokens"),
        ((0.9, 1.3, 1.1, 1.0, 1.2), "dense", "no clear difference from dense (0.9 to 1.3x, 5 measured calls)"),
        ((1.01, 0.98, 1.02), "dense", "no clear difference from dense (0.98 to 1.02x, 3 measured calls)"),
        ((0.04, 2.0, 1.3), "dense", "no clear difference from dense (0.04 to 2.00x, 3 measured calls)"),
        ((3.0, 3.0), "dense", "too few calls to compare with dense (2 measured)"),
        ((), "dense", ""),
    ],
    ids=["faster", "close", "slower", "unclear", "equal", "wide", "too_few", "none"],
)
def test_what_is_said(nodes, kind, ratios, instead, said):
    run = nodes.telemetry.runs.open(node="1", owner="o", metadata={}, sigmas=[1.0, 0.0], monitors={"7": True})
    made = kind(instead=instead)
    for step, ratio in enumerate(ratios or (1.0,)):
        call = nodes.recorder.Timed(step, 0, 256, Clock(10.0), made)
        run.sparse(call, {"density": torch.tensor([[0.5]]), "pv_skipped": torch.tensor([[0.0]])})
        if ratios:
            run.measured(nodes.recorder.Timed(step, 0, 256, Clock(10.0 * ratio), made), Clock(1.0))
    run.close()
    assert nodes.remarks.compared(run) == said
    assert nodes.remarks.summary(run).partition(" ms")[2] == (f", {said}" if said else "")
    totals, enough = run.to_dict()["totals"], len(ratios) >= 3
    assert totals["speedup_low"] == (pytest.approx(min(ratios)) if enough else None)
    assert totals["speedup_high"] == (pytest.approx(max(ratios)) if enough else None)
    assert (totals["speedup"] is not None) == ("x faster" in said or "x slower" in said) and totals["compared_calls"] == (len(ratios) or None)
    assert run.to_dict()["compared_with"] == (instead if ratios else None) == nodes.transport.message(run, {})["compared_with"]


# In a run.


def watched(nodes, patcher, measures=True):
    return nodes.monitor.watched(patcher, "7", measures)


def with_override(patcher, override):
    clone = patcher.clone()
    clone.model_options["transformer_options"][KEY] = override
    return clone


@pytest.mark.parametrize(("steps", "extra"), [(1, 1), (2, 2), (3, 3), (6, 5), (12, 5)])
def test_a_run_measures_and_keeps_its_picture(nodes, tiny, patched, computed, last_run, steps, extra):
    """Two layers: the first step can spare one of them, later ones either; no step makes more than one extra call, unless there are too few steps."""
    model = tiny("wan_t2v")
    plain = comfy_models.sample(model, patched(model), steps=steps)
    computed.clear()
    assert torch.equal(comfy_models.sample(model, watched(nodes, patched(model)), steps=steps), plain)
    run = last_run()
    totals = run["totals"]
    assert len(computed) == 2 * steps + extra  # cross-attention, and what was measured
    assert totals["compared_calls"] == extra and totals["measuring_ms"] > 0 and run["compared_with"] == "dense"
    assert (totals["sparse_calls"], totals["dense_calls"], totals["dense_ms"]) == (2 * steps, 2 * steps, 0)  # the extra calls are nobody's
    assert (totals["speedup_low"] is not None) == (extra >= 3)
    comfy_models.sample(model, watched(nodes, patched(model), measures=False), steps=steps)
    assert last_run()["totals"]["compared_calls"] is None and last_run()["totals"]["measuring_ms"] == 0


def test_it_is_spread_over_the_window_alone(nodes, tiny, patched, last_run, monkeypatch):
    model, seen = tiny("wan_t2v"), []
    real = nodes.recorder.Run.measured
    monkeypatch.setattr(nodes.recorder.Run, "measured", lambda run, call, cost: (seen.append(call), real(run, call, cost)))
    comfy_models.sample(model, watched(nodes, patched(model, start_percent=0.4, end_percent=0.9)), steps=20)
    assert [call.step for call in seen] == [8, 10, 12, 15, 17] and {call.layer for call in seen} == {0, 1}
    assert last_run()["totals"]["compared_calls"] == 5


@pytest.mark.parametrize("way", ["before", "behind"])
def test_compared_with_what_would_have_run_instead(nodes, tiny, patched, last_run, way):
    """Another node's attention, wherever it stands: it gets the extra calls, and is named."""
    model, seen = tiny("wan_t2v"), []

    def attention_override_sage(func, *args, **kwargs):
        seen.append((args[1].shape[1], kwargs["transformer_options"]))
        return func(*args, **kwargs)

    if way == "before":
        patcher = watched(nodes, patched(with_override(model.patcher, attention_override_sage)))
    else:
        patcher = with_override(watched(nodes, patched(model)), attention_override_sage)
    comfy_models.sample(model, patcher, steps=6)
    run = last_run()
    assert [keys for keys, _ in seen].count(256) == 5 and [keys for keys, _ in seen].count(7) == 12
    assert run["compared_with"] == "attention_override_sage of tests" and run["totals"]["compared_calls"] == 5
    assert "attention_override_sage of tests (" in nodes.remarks.summary(nodes.telemetry.runs.closed[-1])
    for keys, options in seen:
        assert bool(nodes.compiled.calls_in(options)) == (keys == 7)  # an extra call finds none of ours


def test_its_own_dense_calls_go_there_too(nodes, tiny, patched, passing, last_run):
    """Dense steps are answered by the other node: they are compared with under its name."""
    model = tiny("wan_t2v")
    comfy_models.sample(model, patched(with_override(model.patcher, passing()), end_percent=0.4), steps=6)
    run = last_run()
    assert run["compared_with"] == "override of tests" and run["totals"]["compared_calls"] == 3 and run["totals"]["dense_calls"] == 12 + 6


def test_two_nodes_of_ours_count_no_extra_call(nodes, tiny, patched):
    """The inner one neither counts what the outer measures nor numbers its layers by it; and it is not taken for dense attention."""
    model = tiny("wan_t2v")
    inner = patched(model, start_percent=0.5)
    comfy_models.sample(model, watched(nodes, patched(inner, end_percent=0.5)), steps=12)
    inner_run, outer_run = (run.to_dict() for run in nodes.telemetry.runs.closed)
    assert {run["totals"]["sparse_calls"] for run in (inner_run, outer_run)} == {12} and {run["layers"] for run in (inner_run, outer_run)} == {2}
    assert inner_run["totals"]["compared_calls"] == outer_run["totals"]["compared_calls"] == 5
    assert inner_run["compared_with"] == outer_run["compared_with"] == "dense"
    assert {cell["dense_calls"] for cell in inner_run["cells"] if cell["sparse_calls"]} == {0}


@pytest.mark.parametrize("precise", [True, False])
def test_a_call_in_full_precision_is_no_measure(nodes, direct, precise):
    ours = direct(dense_blocks="0")
    q, k, v = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(1))
    ours(q, k, v, 2, skip_reshape=True, **({"low_precision_attention": False} if precise else {}))
    ours(q, k, v, 2, skip_reshape=True)
    assert ours.closed()["totals"]["compared_calls"] == (None if precise else 1)


def test_what_fails_later_leaves_what_was_measured(nodes, direct):
    ours = direct()
    ours.run.monitors, ours.run.measures, ours.run.plan = {"7": True}, True, nodes.speedup.Plan(range(4))
    made, plain = [], SimpleNamespace(fails=False)

    def attention(q, *args, **kwargs):
        made.append(1)
        if plain.fails:
            raise torch.OutOfMemoryError("no room")
        return q

    q, k, v = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(1))
    for step in range(4):
        ours.context.step, plain.fails = step, step == 3
        for _ in range(3):
            ours.patch.override(attention, q, k, v, 2, skip_reshape=True, transformer_options=ours.options)
    run = ours.closed()
    assert len(made) == 4 and run["totals"]["sparse_calls"] == 12 and run["totals"]["compared_calls"] == 3
    assert run["note"] == "dense attention could not be timed (OutOfMemoryError), so the speed-up is missing or of fewer calls"
