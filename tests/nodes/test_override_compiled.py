"""The override in a model that torch.compile has compiled, in any order, and after runs of the same code without it."""

from __future__ import annotations

from dataclasses import replace

import comfy_models
import pytest
import torch
from attention_calls import KEY
from compiled_models import HAS_FILTERS, compiled

pytestmark = pytest.mark.usefixtures("no_gradients")


def cells(run: dict) -> list:
    """What is known of every step and layer, but for the time it took."""
    return [{name: value for name, value in cell.items() if not name.endswith("_ms")} for cell in run["cells"]]


def assert_same(run: dict, expected: dict) -> None:
    assert cells(run) == cells(expected)
    assert (run["reasons"], run["note"], run["model"], run["family"]) == (expected["reasons"], None, expected["model"], expected["family"])


@pytest.mark.parametrize(
    ("family", "way", "place", "dynamo"),
    [
        ("wan_t2v", "whole", "behind", "eager"),
        ("wan_t2v", "blocks", "before", "aot_eager"),
        ("flux", "blocks", "behind", "eager"),
        ("flux", "whole object", "before", "eager"),
        ("qwen_image", "blocks object", "behind", "aot_eager"),
    ],
    indirect=["dynamo"],
)
def test_on_and_off(tiny, patched, sampled, dynamo, family, way, place):
    """Compiled and run without the node, then with it, off and on again and with other settings: sparse, every layer of every step counted as in the
    model that is not compiled. Steps differ: the window opens in the run. Only the first run of either kind compiles."""
    model = tiny(family, latent=(1, 16, 1, 32, 32)) if family != "flux" else tiny(family, latent=(1, 16, 32, 32))
    settings = [{"start_percent": 0.3}, {"start_percent": 0.3, "topk": 0.5, "dense_blocks": "1"}, {"end_percent": 0.6}]
    dense, _ = sampled(model)
    expected = [sampled(model, patched(model, **each)) for each in settings]
    assert len({str(run["cells"]) for _, run in expected}) == 3

    def on(each):
        return compiled(patched(model, **each), dynamo, way) if place == "before" else patched(plain, **each)

    plain = compiled(model.patcher, dynamo, way)
    torch.testing.assert_close(sampled(model, plain)[0], dense, rtol=1e-4, atol=1e-4)
    assert dynamo.ran >= 3
    seen = []
    for turn in range(2):
        for each, (wanted, wanted_run) in zip(settings, expected, strict=True):
            out, run = sampled(model, on(each))
            torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
            assert_same(run, wanted_run)
            seen.append(dynamo.graphs)
        torch.testing.assert_close(sampled(model, plain)[0], dense, rtol=1e-4, atol=1e-4)
        if turn == 0:
            compiled_once = dynamo.graphs
    if HAS_FILTERS:  # else Dynamo guards on everything in transformer_options, the wrappers of a new clone included
        assert dynamo.graphs == compiled_once, "a second turn compiled something"
        assert seen[0] == seen[1] == seen[2], "other settings compiled something"


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_two_models_of_one_class(nodes, tiny, patched, sampled, dynamo, way):
    """Both are compiled, the second has no node, and takes every new size first."""
    first, second = tiny("wan_t2v"), comfy_models.build("wan_t2v", latent=(1, 16, 1, 32, 32))
    how = {} if way == "blocks" else {"dynamic": False}
    plain, sparse = compiled(second.patcher, dynamo, way, **how), patched(compiled(first.patcher, dynamo, way, **how))
    sizes = [(32, 32), (40, 24), (28, 36), (32, 32)] if way == "blocks" else [(32, 32), (40, 24)]
    for height, width in sizes:
        one, two = (replace(model, latent=torch.zeros(1, 16, 1, height, width)) for model in (first, second))
        dense, _ = sampled(two)
        wanted, wanted_run = sampled(one, patched(first))
        assert torch.equal(sampled(two, plain)[0], dense)
        out, run = sampled(one, sparse)
        assert torch.equal(out, wanted)
        assert_same(run, wanted_run)
        graphs = dynamo.graphs
        assert torch.equal(sampled(one, sparse)[0], wanted) and torch.equal(sampled(two, plain)[0], dense)
        assert way == "whole" or dynamo.graphs == graphs


def test_two_nodes_on_a_compiled_model(nodes, tiny, patched, sampled, dynamo):
    """The wrapper of the second runs in that of the first: there is one set of code for both."""
    model = tiny("wan_t2v")
    plain = compiled(model.patcher, dynamo, "blocks")
    sampled(model, plain)
    alone, alone_run = sampled(model, patched(plain))
    graphs = dynamo.graphs
    both = patched(patched(plain, end_percent=0.4), start_percent=0.4)
    out, _ = sampled(model, both)
    assert torch.equal(out, alone)
    calls = {run.owner: run.sparse_calls for run in list(nodes.telemetry.runs.closed)[-2:]}
    assert [calls[patch.key] for patch in nodes.patch.patches_of(both)] == [4, 2] and alone_run["totals"]["sparse_calls"] == 6
    assert dynamo.graphs <= graphs + 2  # the model call's options are longer by a wrapper
    graphs = dynamo.graphs
    sampled(model, both), sampled(model, patched(plain))
    assert dynamo.graphs == graphs


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_other_overrides_come_and_go(tiny, patched, sampled, dynamo, way):
    """One in front of ours answers cross-attention and passes the rest on; then it is below ours, or another is there, or none: compiled code holds
    none of them."""
    model = tiny("wan_t2v")
    expected, expected_run = sampled(model, patched(model))
    crossing = sum(expected_run["reasons"].values())
    plain = compiled(model.patcher, dynamo, way)
    sampled(model, plain)

    def with_override(patcher):
        clone, answered = patcher.clone(), []
        options = clone.model_options["transformer_options"]
        previous = options.get(KEY)

        def override(func, q, k, *args, **kwargs):
            if q.shape[1] != k.shape[1]:
                answered.append(func)
                return func(q, k, *args, **kwargs)
            return previous(func, q, k, *args, **kwargs) if previous is not None else func(q, k, *args, **kwargs)

        options[KEY] = override
        return clone, answered

    front, in_front = with_override(patched(plain))
    below, from_below = with_override(plain)
    another, in_another = with_override(patched(plain))
    for patcher, asked in ((front, False), (patched(plain), True), (another, False), (patched(below), True), (front, False)):
        out, run = sampled(model, patcher)
        assert torch.equal(out, expected)
        assert_same(run, {**expected_run, "reasons": expected_run["reasons"] if asked else {}})
    assert (len(in_front), len(in_another), len(from_below)) == (2 * crossing, crossing, crossing)


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_when_dynamo_compiles_no_more(tiny, patched, sampled, dynamo, way):
    """At its limit of traces for one function Dynamo leaves it uncompiled: slower, and counted all the same."""
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    model = tiny("wan_t2v")
    expected, expected_run = sampled(model, patched(model))
    plain = compiled(model.patcher, dynamo, way)
    with torch._dynamo.config.patch({limit: 1}):
        sampled(model, plain)
        for _ in range(2):
            out, run = sampled(model, patched(plain))
            assert torch.equal(out, expected)
            assert_same(run, expected_run)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_without_a_filter(tiny, patched, sampled, dynamo, place):
    """ComfyUI's compile node up to 0.3.75: every guard holds."""
    model = tiny("qwen_image")
    expected, expected_run = sampled(model, patched(model))
    plain = compiled(model.patcher, dynamo, "blocks", guard_filter=None)
    if place == "behind":
        sampled(model, plain)
    patcher = patched(plain) if place == "behind" else compiled(patched(model), dynamo, "blocks", guard_filter=None)
    out, run = sampled(model, patcher)
    assert dynamo.ran >= 6, "the model's blocks did not run compiled"  # each of two in three steps
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert_same(run, expected_run)
