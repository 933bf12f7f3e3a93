"""What is said where a compiled model cannot run sparse, how a compiled model is told, and the state that keeps its code apart."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from attention_calls import KEY
from compiled_models import HAS_FILTERS, compiled

pytestmark = pytest.mark.usefixtures("no_gradients")
needs_filters = pytest.mark.skipif(not HAS_FILTERS, reason="this torch has no guard filters")


def no_guards(guards):
    """Not what compile nodes do: code runs whatever has changed."""
    return [False for _ in guards]


@pytest.mark.parametrize("way", ["blocks", "whole object"])
def test_fullgraph_is_refused_in_one_sentence(nodes, tiny, patched, sampled, dynamo, last_run, way):
    model = tiny("wan_t2v")
    plain = compiled(model.patcher, dynamo, way, fullgraph=True)
    dense, _ = sampled(model, plain)
    with pytest.raises(nodes.compiled.FullgraphError) as error:
        sampled(model, patched(plain))
    assert str(error.value) == nodes.reasons.FULLGRAPH and type(error.value.__cause__).__name__ == "Unsupported"
    with pytest.raises(nodes.compiled.FullgraphError):  # two nodes: once
        sampled(model, patched(patched(plain)))
    assert last_run()["note"] == "the run ended early (FullgraphError)"
    assert torch.is_autocast_cache_enabled() and torch.equal(sampled(model, plain)[0], dense)


def test_fullgraph_and_an_override_in_front(nodes, tiny, patched, passing, sampled, dynamo):
    patcher = patched(compiled(tiny("wan_t2v").patcher, dynamo, "blocks", fullgraph=True)).clone()
    options = patcher.model_options["transformer_options"]
    options[KEY] = passing(options[KEY])
    with pytest.raises(nodes.compiled.FullgraphError):
        sampled(tiny("wan_t2v"), patcher)


def test_other_errors_stay_what_they_are(nodes):
    class Unsupported(RuntimeError):
        pass

    for raised in (Unsupported("call to a builtin"), RuntimeError("function AttentionOverride.__call__"), ValueError("no")):
        with pytest.raises(type(raised)) as error, nodes.compiled.own_code():
            raise raised
        assert error.value is raised


@needs_filters
def test_code_that_never_asks(nodes, tiny, patched, passing, sampled, dynamo):
    """A filter that drops all guards, also those that keep the code of runs with the node apart: the node says so."""
    model = tiny("wan_t2v")
    plain = compiled(model.patcher, dynamo, "blocks", no_guards)
    dense, _ = sampled(model, plain)
    out, run = sampled(model, patched(plain))
    assert torch.equal(out, dense) and run["note"] == nodes.reasons.TRACED_WITHOUT and run["totals"]["sparse_calls"] == 0
    assert nodes.remarks.summary(nodes.telemetry.runs.closed[-1]) == nodes.reasons.TRACED_WITHOUT


def test_another_node_answers_for_a_compiled_model(nodes, tiny, patched, sampled, dynamo):
    """It leads to ours, and never calls it: then the compiled model is not the cause."""
    patcher = compiled(patched(tiny("wan_t2v")), dynamo, "blocks")
    options = patcher.model_options["transformer_options"]

    def answers(func, *args, ours=options[KEY], **kwargs):
        return func(*args, **kwargs)

    options[KEY] = answers
    assert sampled(tiny("wan_t2v"), patcher)[1]["note"] == nodes.reasons.NOTHING_SEEN


@needs_filters
def test_layers_that_never_ask(nodes, tiny, patched, sampled, dynamo):
    """One block of two runs code that was traced without the node. The number of layers is known from a run before."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def second_block(patcher):
        clone, options = patcher.clone(), {"guard_filter_fn": no_guards}
        set_torch_compile_wrapper(model=clone, keys=["diffusion_model.blocks.1"], backend=dynamo, options=options)
        return clone

    model = tiny("wan_t2v")
    sampled(model, second_block(model.patcher))
    sparse = patched(model)
    assert sampled(model, sparse)[1]["note"] is None
    run = sampled(model, second_block(sparse))[1]
    assert run["note"] == nodes.reasons.LAYERS_MISSING.format(seen=1, total=2)
    assert run["note"] in nodes.remarks.summary(nodes.telemetry.runs.closed[-1])
    assert sampled(model, sparse)[1]["note"] is None


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torch.nn.Sequential(torch.nn.Linear(2, 2))

    def forward(self, x):
        return self.block(x)


def compile_in_place(patcher):
    patcher.model.diffusion_model.block[0].compile(backend="eager")


def compile_forward(patcher):
    block = patcher.model.diffusion_model.block
    block.forward = torch.compile(block.forward, backend="eager")


def compile_block(patcher):
    patcher.model.diffusion_model.block = torch.compile(patcher.model.diffusion_model.block, backend="eager")


def patch_function(patcher):
    patcher.object_patches["diffusion_model.forward"] = torch.compile(patcher.model.diffusion_model.forward, backend="eager")


def patch_block(patcher):
    patcher.object_patches["diffusion_model.block"] = torch.compile(patcher.model.diffusion_model.block, backend="eager")


def wrap(patcher):
    patcher.wrappers["apply_model"] = {"torch.compile": [lambda executor, *args: executor(*args)]}


WAYS = [compile_in_place, compile_forward, compile_block, patch_function, patch_block, wrap]


@pytest.mark.parametrize("way", [None, *WAYS], ids=lambda way: getattr(way, "__name__", "not"))
def test_a_compiled_model_is_known(nodes, way):
    patcher = SimpleNamespace(model=SimpleNamespace(diffusion_model=Model()), object_patches={"model_sampling": object()}, wrappers={})
    if way is not None:
        way(patcher)
    assert nodes.compiled.Watch(patcher).is_compiled == (way is not None)


def test_a_model_that_is_not_compiled_keeps_its_hook(nodes, tiny, passing):
    watch, other = nodes.compiled.Watch(tiny("wan_t2v").patcher), passing()
    assert watch.on_top(other, nodes.override.AttentionOverride(None)) is other
    assert watch.note(SimpleNamespace(calls=0, answered_above=0), 2) is None


def test_containers_go_to_overrides_that_take_them(nodes):
    """ComfyUI asks an override whether it has a function for tensors in containers."""

    def override(func, *args, **kwargs):
        return func(*args, **kwargs)

    outside = nodes.compiled.Outside(override)
    assert not hasattr(outside, "container_function") and outside(max, 1, 2) == 2 and outside.calls == 1
    override.container_function = lambda *args, **kwargs: (args, kwargs)
    outside = nodes.compiled.Outside(override)
    assert outside.container_function(1, heads=2) == ((1,), {"heads": 2}) and outside.calls == 1


def test_the_state_is_of_the_thread_and_comes_back(nodes):
    """A second wrapper in the first changes nothing, another thread has a state of its own, an error leaves none behind."""
    own_code, usual = nodes.compiled.own_code, torch.is_autocast_cache_enabled()
    elsewhere = []
    with own_code():
        assert torch.is_autocast_cache_enabled() != usual
        with own_code():
            assert torch.is_autocast_cache_enabled() != usual
        assert torch.is_autocast_cache_enabled() != usual

        def other_thread():
            elsewhere.append(torch.is_autocast_cache_enabled())
            with own_code():
                elsewhere.append(torch.is_autocast_cache_enabled())

        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert elsewhere == [usual, not usual] and torch.is_autocast_cache_enabled() == usual
    with pytest.raises(ValueError), own_code():
        raise ValueError
    with own_code():
        assert torch.is_autocast_cache_enabled() != usual
    assert torch.is_autocast_cache_enabled() == usual


def test_open_calls(nodes):
    """Each patch finds its own; options that hold an outer model call's keep theirs."""
    outer: dict = {}
    nodes.compiled.open_call(outer, "a", "first")
    inner = dict(outer)
    nodes.compiled.open_call(inner, "b", "second")
    nodes.compiled.open_call(inner, "a", context := object())
    assert [nodes.compiled.call_of(inner, key) for key in "abc"] == [context, "second", None]
    assert [nodes.compiled.call_of(outer, key) for key in "ab"] == ["first", None] and nodes.compiled.call_of({}, "a") is None
    assert nodes.compiled.calls_in(inner) == [context, "second"] and nodes.compiled.calls_in({}) == []
