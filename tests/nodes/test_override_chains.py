"""The override among those of other nodes, on either side of it, and in clones of the model."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import comfy_models
import pytest
import torch
from attention_calls import KEY, counts, plain

pytestmark = pytest.mark.usefixtures("no_gradients")


# Chains with other nodes' overrides.


def with_override(patcher, override):
    clone = patcher.clone()
    clone.model_options["transformer_options"][KEY] = override
    return clone


@pytest.mark.parametrize("cloned", [False, True], ids=["", "cloned-later"])
def test_earlier_override_gets_each_declined_call_once(tiny, patched, passing, last_run, computed, cloned):
    model = tiny("wan_t2v")
    earlier = passing()
    patcher = patched(with_override(model.patcher, earlier))
    dense = comfy_models.sample(model)
    computed.clear()
    out = comfy_models.sample(model, patcher.clone() if cloned else patcher)
    run = last_run()
    assert run["reasons"] == {"cross-attention to 7 tokens": 4} and run["totals"]["sparse_calls"] == 4
    assert len(earlier.seen) == len(computed) == 4
    for func, args, kwargs in earlier.seen:
        assert func is plain() and args[1].shape[1] == 7
        assert kwargs["_inside_attn_wrapper"] and "sample_sigmas" in kwargs["transformer_options"]
    assert (out - dense).norm() > 1e-4 * dense.norm()


def test_later_override_that_forgets_ours_is_put_below(nodes, tiny, patched, passing, last_run, computed):
    """KJNodes' way: the entry is overwritten, whatever stood there."""
    model = tiny("wan_t2v")
    alone = comfy_models.sample(model, patched(model))
    earlier, foreign = passing(), passing()
    patcher = with_override(patched(with_override(model.patcher, earlier)), foreign)
    for _ in range(2):  # and in the next run again
        foreign.seen.clear()
        computed.clear()
        assert torch.equal(comfy_models.sample(model, patcher), alone)
        assert last_run()["totals"]["sparse_calls"] == 4 and last_run()["totals"]["dense_calls"] == 4
        assert [args[1].shape[1] for _, args, _ in foreign.seen] == 4 * [7] and len(computed) == 4
        said = "another node replaced the attention hook; Sparge Attention put itself back on top"
        assert last_run()["warning"] == said and nodes.remarks.summary(nodes.telemetry.runs.closed[-1]).endswith(f"; {said}")
    assert earlier.seen == []  # the foreign node has cut it off


def chained_in_a_closure(previous, seen):
    def override(func, *args, **kwargs):
        seen.append(args[1].shape[1])
        return previous(func, *args, **kwargs)

    return override


def chained_in_a_default(previous, seen):
    def override(func, *args, previous=previous, **kwargs):
        seen.append(args[1].shape[1])
        return previous(func, *args, **kwargs)

    return override


def chained_in_a_partial(previous, seen):
    def override(previous, func, *args, **kwargs):
        seen.append(args[1].shape[1])
        return previous(func, *args, **kwargs)

    return functools.partial(override, previous)


class ChainedInAnAttribute:
    def __init__(self, previous, seen):
        self.previous, self.seen = previous, seen

    def __call__(self, func, *args, **kwargs):
        self.seen.append(args[1].shape[1])
        return self.previous(func, *args, **kwargs)

    def __deepcopy__(self, memo):
        return self


def chained_in_a_method(previous, seen):
    return ChainedInAnAttribute(previous, seen).__call__


def chained_in_a_dictionary(previous, seen):
    state = {"previous": previous}

    def override(func, *args, **kwargs):
        seen.append(args[1].shape[1])
        return state["previous"](func, *args, **kwargs)

    return override


CHAINED = (chained_in_a_closure, chained_in_a_default, chained_in_a_partial, ChainedInAnAttribute, chained_in_a_method, chained_in_a_dictionary)


@pytest.mark.parametrize("cloned", [False, True], ids=["", "cloned-later"])
@pytest.mark.parametrize("chained", CHAINED)
def test_later_override_that_chains_stays_on_top(tiny, patched, last_run, computed, chained, cloned):
    """It sees every call, once; ours sees what it passes on. A chain that ours cannot find may be put below, but nothing is computed twice.

    Every node clones the model first, which deep-copies what it finds in model_options.
    """
    model = tiny("wan_t2v")
    alone = comfy_models.sample(model, patched(model))
    seen = []
    patcher = patched(model).clone()
    patcher.model_options["transformer_options"][KEY] = chained(patcher.model_options["transformer_options"][KEY], seen)
    computed.clear()
    assert torch.equal(comfy_models.sample(model, patcher.clone() if cloned else patcher), alone)
    assert last_run()["totals"]["sparse_calls"] == 4 and last_run()["totals"]["dense_calls"] == 4
    assert len(computed) == 4
    if chained is not chained_in_a_dictionary:
        assert len(seen) == 8 and seen.count(7) == 4


def retopping(form: str, answers: int | None = None):
    """A node that puts its override back on top at every step and remembers what it found there, as core's BlockSparseAttention does.

    It answers calls to `answers` keys by itself.
    """
    seen, state = [], {"previous": None, "tops": 0}
    previous = None

    if form == "dictionary":

        def override(func, *args, **kwargs):
            seen.append(args[1].shape[1])
            earlier = state["previous"]
            return earlier(func, *args, **kwargs) if earlier is not None else func(*args, **kwargs)

    else:

        def override(func, *args, **kwargs):
            seen.append(args[1].shape[1])
            passes_on = previous is not None and args[1].shape[1] != answers
            return previous(func, *args, **kwargs) if passes_on else func(*args, **kwargs)

    def top(model_options):
        nonlocal previous
        options = model_options["transformer_options"]
        if options.get(KEY) is not override:
            previous = state["previous"] = options.get(KEY)
            state["tops"] += 1
            options[KEY] = override

    return SimpleNamespace(override=override, top=top, seen=seen, state=state)


def add_retopping(patcher, double, signature):
    """ON_PREPARE_STATE is called with (patcher, t) here, and with the run's own model_options in newer trees: there through a wrapper."""
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    clone = patcher.clone()
    double.top(clone.model_options)
    if signature == "patcher-t":
        clone.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "double", lambda patcher, t, *rest: double.top(patcher.model_options))
    else:

        def prepare(executor, model, conds, x, t, model_options):
            double.top(model_options)
            return executor(model, conds, x, t, model_options)

        clone.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "double", prepare)
    return clone


@pytest.mark.parametrize("form", ["closure", "dictionary"])
@pytest.mark.parametrize("signature", ["patcher-t", "patcher-t-options"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_override_that_puts_itself_back_on_top(tiny, patched, last_run, computed, place, signature, form):
    model = tiny("wan_t2v")
    alone = comfy_models.sample(model, patched(model))
    double = retopping(form)
    if place == "before":
        patcher = patched(add_retopping(model.patcher, double, signature))
    else:
        patcher = add_retopping(patched(model), double, signature)
    for _ in range(2):
        computed.clear()
        double.seen.clear()
        assert torch.equal(comfy_models.sample(model, patcher), alone)
        run = last_run()
        assert (run["totals"]["sparse_calls"], run["totals"]["dense_calls"]) == (4, 4)
        assert computed and len(computed) == 4, "ComfyUI's own attention computes each declined call once"
        assert double.seen.count(7) >= 4, "the other node is never asked about declined calls"
    assert double.state["tops"] >= 1


@pytest.mark.parametrize("place", ["before", "after"])
def test_override_that_puts_itself_back_and_answers(tiny, patched, last_run, computed, place):
    """Where the other node answers self-attention by itself, ours sees the rest and says so; each call has one answer."""
    model = tiny("wan_t2v")
    dense = comfy_models.sample(model)
    double = retopping("closure", answers=256)
    if place == "before":
        patcher = patched(add_retopping(model.patcher, double, "patcher-t-options"))
    else:
        patcher = add_retopping(patched(model), double, "patcher-t-options")
    computed.clear()
    assert torch.equal(comfy_models.sample(model, patcher), dense)
    assert last_run()["totals"]["sparse_calls"] == 0 and last_run()["reasons"] == {"cross-attention to 7 tokens": 4}
    assert sorted(computed) == 8 * [256]


@pytest.mark.parametrize("cloned", [False, True], ids=["", "cloned-later"])
def test_two_nodes_with_different_windows(nodes, tiny, patched, computed, cloned):
    """The last node decides first; what it declines the first node may take."""
    model = tiny("wan_t2v")
    patcher = patched(patched(model, end_percent=0.4), start_percent=0.4, topk=0.5)
    first, second = (patch.key for patch in nodes.patch.patches_of(patcher))
    computed.clear()
    comfy_models.sample(model, patcher.clone() if cloned else patcher, steps=4)
    runs = {run.owner: run.to_dict() for run in nodes.telemetry.runs.closed}
    assert len(nodes.telemetry.runs.closed) == 2
    steps = {patch: {s: sparse for (s, _), (sparse, _) in counts(runs[patch]).items()} for patch in (first, second)}
    assert steps[second] == {0: 0, 1: 0, 2: 1, 3: 1}
    assert {s for s, sparse in steps[first].items() if sparse} == {0, 1}
    densities = [runs[patch]["totals"]["density"] for patch in (first, second)]
    assert densities == [pytest.approx(0.25), pytest.approx(0.5)]  # one of four blocks, two of four
    assert runs[first]["totals"]["sparse_calls"] == runs[second]["totals"]["sparse_calls"] == 4
    assert len(computed) == 8  # the cross-attention calls alone
    for run in runs.values():
        assert run["layers"] == 2 and run["reasons"]["cross-attention to 7 tokens"] == 8


# Clones.


def test_unpatched_model_stays_as_it_was(nodes, tiny, patched):
    model = tiny("wan_t2v")
    before = comfy_models.sample(model)
    patcher = patched(model)
    assert not torch.equal(comfy_models.sample(model, patcher), before)
    assert torch.equal(comfy_models.sample(model), before)
    assert KEY not in model.patcher.model_options["transformer_options"] and nodes.patch.patches_of(model.patcher) == []
    assert not any(model.patcher.wrappers.values())


def test_later_clone_keeps_working(nodes, tiny, patched, last_run):
    """A LoRA behind our node clones the model, which deep-copies model_options: the override must come through as the same object."""
    model = tiny("wan_t2v")
    patcher = patched(model)
    alone = comfy_models.sample(model, patcher)
    clone = patcher.clone().clone()
    assert torch.equal(comfy_models.sample(model, clone), alone)
    assert last_run()["totals"]["sparse_calls"] == 4 and last_run()["totals"]["dense_calls"] == 4
    assert nodes.patch.patches_of(clone) == nodes.patch.patches_of(patcher)
    assert len(nodes.telemetry.runs.closed) == 2


def test_copies_of_model_options_hold_no_copies_of_ours(nodes, tiny, patched):
    """Everything of ours is shared between clones: nothing (a policy's tensors, least of all) is copied with each node behind ours."""
    policy = SimpleNamespace(topk=lambda run, layer: 0.5, table=torch.zeros(1000))
    patcher = patched(tiny("wan_t2v"), policy=policy)
    (patch,) = nodes.patch.patches_of(patcher)
    copied = copy.deepcopy(patcher.model_options)
    assert copied["transformer_options"][KEY] is patch.override
    found = tensors_in(copied, known=(patch,))
    assert found == [], f"the copy holds {len(found)} tensors"


def tensors_in(root, known=()):
    """Every tensor that can be reached from `root` by attributes, closures, items and methods, but not through `known` objects."""
    seen, front, found = {id(x) for x in known}, [root], []
    while front:
        item = front.pop()
        if id(item) in seen or isinstance(item, str | bytes | int | float | type(None) | type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict):
            front += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            front += list(item)
        else:
            front += list(getattr(item, "__dict__", {}).values())
            front += [cell.cell_contents for cell in getattr(item, "__closure__", None) or ()]
            front += [getattr(item, "__self__", None)]
    return found


def test_ours_is_found_six_links_deep_and_no_deeper(nodes):
    def held(links: int):
        return chained_in_a_closure(held(links - 1), []) if links else plain

    for links, found in ((1, True), (5, True), (6, True), (7, False)):
        assert nodes.chain.leads_to(held(links), plain) is found, links
