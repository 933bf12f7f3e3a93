"""ComfyUI records what a model's block allocates; what is made meanwhile and outlives its block ends the process. Here a stand-in follows it."""

from __future__ import annotations

import sys
import threading
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import comfy_models
import pytest
import torch
from attention_calls import H, answer, qkv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytestmark = pytest.mark.usefixtures("no_gradients")
CAPTURED = "recorded as a CUDA graph, whose repeats no node sees"
RECORDED = "ComfyUI records the allocations of this block and did not pause for the node"


class Recording(TorchDispatchMode):
    """ComfyUI's `comfy.model_prefetch` with a graph that records every block of a model.

    `blocks` counts those that were recorded, `outliving` has what was made in a block and was there after it: all but the block's own output.
    """

    def __init__(self):
        super().__init__()
        self.blocks, self.paused, self.pauses, self.active = 0, 0, 0, False
        self.made, self.outliving = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if self.active and not self.paused:
            given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            for made in tree_leaves(out):
                if isinstance(made, torch.Tensor) and storage(made) not in given:
                    self.made.append((str(func), tuple(made.shape), weakref.ref(made.untyped_storage())))
        return out

    def record(self, block):
        """Makes `block`, a module, do its work while the graph records."""

        def forward(*args, **kwargs):
            self.active, self.made = True, []
            self.blocks += 1
            try:
                out = run(*args, **kwargs)
            finally:
                self.active = False
            own = {storage(x) for x in tree_leaves(out)}
            self.outliving += [(name, shape) for name, shape, ref in self.made if ref() is not None and ref()._cdata not in own]
            return out

        run, block.forward = block.forward, forward

    @contextmanager
    def pause_malloc_graph(self, sync=False):
        self.paused += 1
        self.pauses += 1
        try:
            yield
        finally:
            self.paused -= 1

    def module(self, **changes):
        return SimpleNamespace(**{"pause_malloc_graph": self.pause_malloc_graph, **changes})


def storage(tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def recording(monkeypatch):
    recording = Recording()
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", recording.module())
    with recording:
        yield recording


@pytest.fixture
def recorded_model(recording):
    model = comfy_models.build("wan_t2v", latent=(1, 16, 2, 32, 32))
    for block in model.patcher.model.diffusion_model.blocks:
        recording.record(block)
    return model


EVERY_PATH = {
    "plain": {},
    "tiles": dict(token_order="tiles"),
    "hilbert": dict(token_order="hilbert", protect_references=True),
    "compensate": dict(compensate=True, cdfthreshd=0.9, simthreshd1=0.5),
    "window": dict(start_percent=0.3, dense_blocks="-1"),
}


@pytest.mark.parametrize("monitored", [False, True], ids=["", "monitor"])
@pytest.mark.parametrize("settings", EVERY_PATH.values(), ids=EVERY_PATH)
def test_nothing_that_a_block_allocates_outlives_it(nodes, recording, recorded_model, patched, last_run, settings, monitored):
    patcher = patched(recorded_model, **settings)
    patcher = nodes.monitor.watched(patcher, "m") if monitored else patcher
    comfy_models.sample(recorded_model, patcher, steps=3)
    assert last_run()["totals"]["sparse_calls"] > 0 and recording.blocks == 3 * recorded_model.layers
    assert recording.outliving == [] and recording.paused == 0 and recording.pauses > 0


def test_the_stand_in_sees_what_outlives_a_block(recording, recorded_model, passing):
    """Without which the test above could not fail: an override that keeps a tensor."""
    kept = []

    def keeps(func, *args, **kwargs):
        kept.append(args[0].clone())
        return func(*args, **kwargs)

    source = recorded_model.patcher.clone()
    source.model_options["transformer_options"]["optimized_attention_override"] = keeps
    comfy_models.sample(recorded_model, source, steps=1)
    assert len(recording.outliving) == len(kept) > 0


def test_a_dense_call_is_recorded_as_without_the_node(recording, direct):
    paused = []

    def earlier(func, *args, **kwargs):
        paused.append(recording.paused)
        return answer(func, *args, **kwargs)

    ours = direct(earlier, min_tokens=1000)
    assert ours(*qkv(), H, skip_reshape=True) == "answered" and paused == [0]


def graph(active):
    return SimpleNamespace(_comfy_active=active)


@pytest.mark.parametrize(
    ("table", "dense"),
    [
        ({"ACTIVE_MALLOC_GRAPHS": {threading.get_ident(): object()}}, True),
        ({"ACTIVE_MALLOC_GRAPHS": {}}, False),
        ({"ACTIVE_MALLOC_GRAPHS": {-1: object()}}, False),
        ({"MALLOC_GRAPHS": {threading.get_ident(): graph(True)}}, True),
        ({"MALLOC_GRAPHS": {threading.get_ident(): graph(False)}}, False),
        ({}, False),
    ],
    ids=["records", "no_graph", "another_thread", "active", "at_rest", "before_graphs"],
)
def test_a_version_that_records_and_cannot_pause(direct, monkeypatch, table, dense):
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", SimpleNamespace(**table))
    ours = direct(answer)
    out = ours(*qkv(), H, skip_reshape=True)
    assert isinstance(out, str) == dense
    assert ours.reasons() == ([f"{RECORDED} (this version cannot)"] if dense else [])


def test_a_pause_that_fails(direct, monkeypatch):
    """The call stays dense, keeps its layer's number, and the next one is asked again."""

    def fails(sync=False):
        raise RuntimeError("aimdo memory compile error")

    module = SimpleNamespace(pause_malloc_graph=fails)
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", module)
    ours = direct(answer)
    assert ours(*qkv(), H, skip_reshape=True) == "answered"
    module.pause_malloc_graph = Recording().pause_malloc_graph
    assert ours(*qkv(), H, skip_reshape=True) != "answered"
    assert [(c["layer"], c["sparse_calls"], list(c["reasons"])) for c in ours.closed()["cells"]] == [
        (0, 0, [f"{RECORDED} (RuntimeError)"]),
        (1, 1, []),
    ]


def test_what_fails_in_the_sparse_path_resumes_the_recording(nodes, recording, direct, monkeypatch):
    monkeypatch.setattr(nodes._kernels, "attend", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        direct()(*qkv(), H, skip_reshape=True)
    assert recording.paused == 0 and recording.pauses == 1


class OnAGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def test_a_block_that_becomes_a_cuda_graph_stays_dense(nodes, direct, monkeypatch):
    """Nothing is allocated, timed or read back while it is captured; afterwards calls run as before."""
    ours = direct(answer)
    q, k, v = (x.as_subclass(OnAGpu) for x in qkv())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(nodes.override, "Timer", lambda device: pytest.fail("an event was recorded"))
    assert ours(q, k, v, H, skip_reshape=True) == "answered"
    assert ours.reasons() == [CAPTURED]
    monkeypatch.undo()
    assert ours(*qkv(), H, skip_reshape=True) != "answered"
    assert [(c["layer"], c["sparse_calls"]) for c in ours.closed()["cells"]] == [(1, 1)]
