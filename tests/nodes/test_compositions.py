"""Two nodes of ours on one model, guiders of two models, and which block of the model a call belongs to: what is said must be true."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import comfy_models
import pytest
import torch
from attention_calls import H, counts, qkv

pytestmark = pytest.mark.usefixtures("no_gradients")
REFERENCE = "topk is 1: a dense reference run"


# topk 1.


def test_topk_1_is_a_dense_run(nodes, tiny, patched, last_run, caplog):
    """Bit for bit what the model gives without the node, and it says what it is: the run to compare others with."""
    model = tiny("hunyuan_video")
    with caplog.at_level("INFO", "sparge_attention"):
        out = comfy_models.sample(model, nodes.monitor.watched(patched(model, topk=1.0, cdfthreshd=0.9), "m"))
    assert torch.equal(out, comfy_models.sample(model))
    run = last_run()
    assert run["totals"]["sparse_calls"] == 0 and run["totals"]["dense_calls"] == sum(run["reasons"].values()) > 0
    assert run["reasons"] == {REFERENCE: 2 * (5 + 2)} and run["note"] == REFERENCE
    assert REFERENCE in caplog.messages[-1] and "nothing ran sparse" not in caplog.messages[-1]
    closed = nodes.telemetry.runs.closed[-1]
    assert nodes.remarks.warning_and_note(closed) == (None, REFERENCE)
    closed.state = "running"
    closed.finished = 1
    assert nodes.remarks.warning_and_note(closed) == (None, REFERENCE)


def test_a_policy_decides_in_place_of_topk_1(direct):
    ours = direct(topk=1.0, policy=SimpleNamespace(topk=lambda run, layer: 0.5))
    ours(*qkv(), H, skip_reshape=True)
    assert ours.closed()["totals"]["sparse_calls"] == 1 and ours.run.note is None


def test_what_the_node_says_of_topk_1_before_the_run(nodes):
    said = nodes.patch.describe(nodes.settings.Settings(topk=1.0), "cpu")
    assert said.startswith(REFERENCE) and "backend" not in said


# Two nodes of ours.


def test_two_nodes_on_the_same_steps(nodes, tiny, patched):
    """The later one answers; the earlier one says so, and nothing is counted twice."""
    model = tiny("wan_t2v")
    alone = comfy_models.sample(model, patched(model))
    assert torch.equal(comfy_models.sample(model, patched(patched(model, topk=0.6))), alone)
    later, earlier = list(nodes.telemetry.runs.closed)[-2:]  # the run of the later node closes first
    assert (later.sparse_calls, later.answered_above, later.note) == (4, 0, None)
    assert (earlier.sparse_calls, earlier.answered_above) == (0, 4)
    assert earlier.note == "another Sparge Attention node, after this one, ran 4 of its calls"
    assert nodes.remarks.summary(earlier) == earlier.note and "nothing ran sparse" not in nodes.remarks.summary(earlier)
    earlier.state, earlier.finished = "running", 1
    assert nodes.remarks.warning_and_note(earlier)[0] is None


@pytest.mark.parametrize("between", [False, True], ids=["", "another-between"])
def test_two_nodes_that_share_the_layers_number_them_alike(nodes, tiny, patched, passing, between):
    """The later one leaves layer 2 to the earlier one, where it is layer 2 as well, and listed."""
    model = tiny("hunyuan_video")
    source = patched(model, dense_blocks="2", topk=0.6)
    if between:
        options = source.model_options["transformer_options"]
        options["optimized_attention_override"] = passing(options["optimized_attention_override"])
    comfy_models.sample(model, patched(source, dense_blocks="2"), steps=1)
    later, earlier = (run.to_dict() for run in list(nodes.telemetry.runs.closed)[-2:])
    assert counts(earlier) == {(0, 2): (0, {"layer is listed in dense_blocks": 1})}
    assert counts(later) == {(0, n): (int(n != 2), {} if n != 2 else {"layer is listed in dense_blocks": 1}) for n in range(5)}
    assert (later["layers"], earlier["layers"]) == (5, 3)
    assert earlier["note"] == "another Sparge Attention node, after this one, ran 4 of its calls"


HERE = "topk is 1: dense as far as this node goes; another Sparge Attention node is on the model"


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_topk_1_beside_another_node_is_no_reference(nodes, tiny, patched, first):
    """What it leaves is the other one's, which runs it sparse: no run to compare with, and it does not say so."""
    model = tiny("wan_t2v")
    alone = comfy_models.sample(model, patched(model))
    source = patched(patched(model, topk=1.0)) if first else patched(patched(model), topk=1.0)
    assert torch.equal(comfy_models.sample(model, source), alone)
    later, earlier = list(nodes.telemetry.runs.closed)[-2:]
    dense, sparse = (earlier, later) if first else (later, earlier)
    assert sparse.sparse_calls == 4 and dense.sparse_calls == 0 and sparse.note is None
    assert HERE in nodes.remarks.summary(dense) and REFERENCE not in nodes.remarks.summary(dense)
    assert nodes.remarks.warning_and_note(dense)[0] is None
    settings = nodes.settings.Settings(topk=1.0)
    assert nodes.patch.describe(settings, "cpu", alone=False) == HERE != nodes.patch.describe(settings, "cpu")


def test_two_nodes_and_one_between_that_replaces_the_hook(nodes, tiny, patched, passing):
    """As KJNodes' Patch Sage: both of ours put themselves back on top, the later one last. It runs the calls, and the earlier one says so."""
    model = tiny("wan_t2v")
    alone = comfy_models.sample(model, patched(model))
    foreign = passing()
    source = patched(model, topk=0.6)
    source.model_options["transformer_options"]["optimized_attention_override"] = foreign
    assert torch.equal(comfy_models.sample(model, patched(source)), alone)
    later, earlier = list(nodes.telemetry.runs.closed)[-2:]
    assert (later.sparse_calls, later.answered_above) == (4, 0) and (earlier.sparse_calls, earlier.answered_above) == (0, 4)
    assert "ran 4 of its calls" in nodes.remarks.summary(earlier) and "nothing ran sparse" not in nodes.remarks.summary(earlier)
    assert [args[1].shape[1] for _, args, _ in foreign.seen] == 4 * [7]  # what stays dense goes there, once
    comfy_models.sample(model, nodes.monitor.watched(patched(source), "m"), steps=6)
    later = list(nodes.telemetry.runs.closed)[-2]
    assert later.sparse_calls and later.against_dense.instead() == "override of tests"  # and would run instead


@pytest.mark.parametrize("topk", ["0.3", [0.3], True])
def test_a_policy_that_answers_with_something_else(direct, topk):
    with pytest.raises(
        ValueError, match="the policy's topk must be a share, a tensor of shares or None, got .*; correct the node at the policy input"
    ):
        direct(policy=SimpleNamespace(topk=lambda run, layer: topk))(*qkv(), H, skip_reshape=True)


def test_a_sampler_without_steps_blames_nobody(nodes, tiny, patched, last_run):
    import comfy.samplers

    model = tiny("wan_t2v")
    guider = comfy.samplers.CFGGuider(patched(model))
    guider.set_conds(model.positive, model.negative)
    guider.sample(
        torch.zeros_like(model.latent), model.latent, comfy.samplers.sampler_object("euler"), torch.tensor([1.0]), disable_pbar=True, seed=1
    )
    assert last_run()["note"] is None


def test_two_nodes_with_two_windows(nodes, tiny, patched):
    model = tiny("wan_t2v")
    comfy_models.sample(model, patched(patched(model, end_percent=0.5), start_percent=0.5), steps=4)
    later, earlier = list(nodes.telemetry.runs.closed)[-2:]
    assert earlier.sparse_calls + later.sparse_calls == 4 * model.layers and earlier.answered_above == later.sparse_calls > 0 < earlier.sparse_calls
    assert "calls sparse" in nodes.remarks.summary(earlier) and earlier.note in nodes.remarks.summary(earlier)


# Guiders.


def shown(nodes, monkeypatch):
    texts = []
    monkeypatch.setattr(nodes.transport, "show", lambda node, text, clients: texts.append((node, text)))
    return texts


def test_a_guider_that_runs_the_model_second(nodes, tiny, patched, monkeypatch, caplog):
    """As core's DualModelGuider: the second model is loaded and run with the wrappers and the attention of the first."""
    import comfy.samplers

    texts = shown(nodes, monkeypatch)
    first, second = tiny("wan_t2v"), nodes.patch.install(tiny("wan_t2v").patcher, nodes.settings.Settings(topk=0.3, min_tokens=0), "7")

    class Guider(comfy.samplers.CFGGuider):
        def outer_sample(self, *args, **kwargs):
            second.pre_run()
            try:
                return super().outer_sample(*args, **kwargs)
            finally:
                second.cleanup()

    guider = Guider(first.patcher)
    guider.set_conds(first.positive, first.negative)
    sigmas = torch.tensor([1.0, 0.5, 0.0])
    with caplog.at_level("INFO", "sparge_attention"):
        guider.sample(torch.zeros_like(first.latent), first.latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)
    said = "not used: the guider runs this model second, with the nodes of its first model; put Sparge Attention on the first one"
    assert texts == [("7", said)] and caplog.messages == [f"Sparge Attention: {said}"]
    assert not nodes.telemetry.runs.closed


def test_a_model_that_is_sampled_alone_is_not_second(nodes, tiny, monkeypatch):
    texts, model = shown(nodes, monkeypatch), tiny("wan_t2v")
    comfy_models.sample(model, nodes.patch.install(model.patcher, nodes.settings.Settings(topk=0.3, min_tokens=0), "7"))
    assert len(texts) == 1 and texts[0][1].startswith("4 calls sparse")


# Stopped, and other nodes.


def test_a_stopped_run_says_who_stopped_it(nodes, tiny, patched, last_run):
    import comfy.model_management

    model, calls = tiny("wan_t2v"), []

    def stopping(func, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException()
        return func(*args, **kwargs)

    source = model.patcher.clone()
    source.model_options["transformer_options"]["optimized_attention_override"] = stopping
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        comfy_models.sample(model, patched(source))
    assert last_run()["note"] == "stopped by you"


def test_a_node_that_copies_the_options_deeply(tiny, patched, last_run):
    """The model is not copied with them, and the copy's calls are counted in the same run."""
    model = tiny("wan_t2v")
    patcher = patched(model)
    alone = comfy_models.sample(model, patcher)
    expected = last_run()["cells"]

    def copies(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
        return executor(x, t, c_concat, c_crossattn, control, copy.deepcopy(transformer_options), **conds)

    from comfy.patcher_extension import WrappersMP

    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "zz_copies", copies)
    assert torch.equal(comfy_models.sample(model, clone), alone)
    strip = [{k: v for k, v in cell.items() if not k.endswith("ms")} for cell in expected]
    assert [{k: v for k, v in cell.items() if not k.endswith("ms")} for cell in last_run()["cells"]] == strip


# Which block.


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"block_index": 3}, 3),
        ({"block_index": 3, "block_type": "double"}, 3),
        ({"block_index": 3, "block_type": "single"}, 5),
        ({"block_index": 3, "block": ("input", 4)}, None),  # a UNet: from 0 in each of its levels
        ({}, None),
        ({"block_index": None}, None),
        ({"block_index": "3"}, None),
        ({"block_index": True}, None),
    ],
)
def test_the_number_of_a_block(nodes, options, number):
    model = SimpleNamespace(double_blocks=[0, 0])
    assert nodes.geometry.block_number(model, options) == number
    assert nodes.geometry.block_number(SimpleNamespace(_orig_mod=model), options) == number


def test_what_has_no_number_comes_after_the_models_blocks(nodes, tiny):
    """Z-Image's refiners run before the blocks, which ComfyUI numbers in newer versions: "0" is the first block there, "-1" the last."""

    class Numbered(torch.nn.Module):
        def __init__(self, **lists):
            super().__init__()
            for name, length in lists.items():
                setattr(self, name, torch.nn.ModuleList(torch.nn.Identity() for _ in range(length)))

        def forward(self, x, transformer_options):
            transformer_options["block_index"] = 0

    count = nodes.geometry.numbered_blocks
    assert count(Numbered(refiner=2, layers=5)) == 5 and count(Numbered(double_blocks=2, single_blocks=3)) == 5
    assert count(torch.nn.Sequential(torch.nn.Identity())) == count(SimpleNamespace()) == 0

    model = Numbered(refiner=2, layers=5)
    patcher = nodes.patch.install(tiny("wan_t2v").patcher, nodes.settings.Settings(dense_blocks="-1"))
    (patch,) = nodes.patch.patches_of(patcher)
    state = nodes.run_state.RunState(patch, patcher, [1.0, 0.0])
    state.family = None
    call = nodes.run_state.CallContext(state, nodes.geometry.ModelCall(model, (1, 16, 1, 8, 8), 0, {}, {}), nodes.run_state.Moment(0, 1.0))
    assert [call.next_layer(64, {}) for _ in range(2)] == [5, 6]
    assert [call.next_layer(64, {"block_index": n}) for n in range(5)] == [0, 1, 2, 3, 4]
    call.finish()
    assert patch.total_layers == 5 and state.telemetry.total_layers == 7


def test_a_model_of_single_blocks_alone(nodes):
    assert nodes.geometry.block_number(SimpleNamespace(), {"block_index": 3, "block_type": "single"}) == 3


def says_blocks(patcher):
    """ComfyUI says of each Flux and HunyuanVideo block which it is, in 0.3.75 and newer; older trees do not."""
    import inspect

    return "block_index" in inspect.getsource(type(patcher.model.diffusion_model))


def test_dense_blocks_means_the_models_blocks_where_another_node_skips_some(tiny, patched, last_run):
    """Skip-layer guidance leaves the first block out in one of two model calls: "3" is the model's block 3 in both."""
    model = tiny("hunyuan_video")
    if not says_blocks(model.patcher):
        pytest.skip("this ComfyUI does not say which block a call belongs to")
    from comfy.model_patcher import set_model_options_patch_replace

    patcher = patched(model, dense_blocks="3")
    skipping = patcher.clone()
    skipping.model_options = set_model_options_patch_replace(skipping.model_options, lambda args, extra: args, "dit", "double_block", 0)
    comfy_models.sample(model, patcher, steps=1)
    whole = counts(last_run())
    comfy_models.sample(model, skipping, steps=1)
    assert counts(last_run()) == {at: cell for at, cell in whole.items() if at != (0, 0)}
    assert whole[(0, 3)] == (0, {"layer is listed in dense_blocks": 1}) and last_run()["layers"] == 5
