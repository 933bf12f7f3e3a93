"""The override: which call runs sparse, and under which reason another stays dense."""

from __future__ import annotations

from types import SimpleNamespace

import comfy_models
import pytest
import torch
from attention_calls import KEY, B, H, S, answer, counts, plain, qkv, quantised

pytestmark = pytest.mark.usefixtures("no_gradients")


# Reasons, one at a time, by a direct call.


DIRECT = {
    "opted-out": (dict(low_precision_attention=False), {}, "the model asked for full precision in this call"),
    "wants-fp32": (dict(attn_precision=torch.float32), dict(dtype=torch.float16), "the model asked for full precision in this call"),
    "dtype": ({}, dict(dtype=torch.float64), "dtype float64 (float16, bfloat16 and float32 are supported)"),
    "head-dim": ({}, dict(dim=264), "head_dim 264 (up to 256 is supported)"),
    "cross": ({}, dict(s_k=1024), "cross-attention to 1,024 tokens"),
    "one-block": ({}, dict(s_q=64), "64 tokens are too few to choose from"),
}


@pytest.mark.parametrize("name", DIRECT)
def test_reason(nodes, direct, monkeypatch, passing, name):
    arguments, shape, reason = DIRECT[name]
    if "precision" in reason:
        quantised(nodes, monkeypatch)
    earlier = passing()
    ours = direct(earlier)
    q, k, v = qkv(**shape)
    out = ours(q, k, v, H, skip_reshape=True, **arguments)
    assert ours.reasons() == [reason] and len(earlier.seen) == 1 and ours.run.sparse_calls == 0
    func, args, kwargs = earlier.seen[0]
    assert args == (q, k, v, H) and func.__name__ == "attention_pytorch" and not hasattr(func, "__wrapped__")
    assert kwargs == {"skip_reshape": True, "transformer_options": ours.options, "_inside_attn_wrapper": True, **arguments}
    assert torch.equal(out, func(q, k, v, H, skip_reshape=True))


def test_exact_backends_keep_calls_that_ask_for_full_precision(direct):
    ours = direct()
    ours(*qkv(), H, skip_reshape=True, low_precision_attention=False)
    ours(*qkv(dtype=torch.float16), H, skip_reshape=True, attn_precision=torch.float32)
    assert ours.reasons() == [] and ours.closed()["totals"]["sparse_calls"] == 2


def test_low_precision_is_nothing_to_a_quantised_backend_without_the_flag(nodes, direct, monkeypatch):
    quantised(nodes, monkeypatch)
    ours = direct()
    ours(*qkv(), H, skip_reshape=True, low_precision_attention=True, attn_precision=torch.float32)  # fp32 inputs: nothing is lost in reading
    assert ours.reasons() == []


def test_mixed_dtypes(direct):
    q, k, v = qkv()
    ours = direct(answer)
    assert ours(q, k.half(), v, H, skip_reshape=True) == "answered"
    assert ours.reasons() == ["dtype float16, float32 (float16, bfloat16 and float32 are supported)"]


def test_gradients(direct):
    q, k, v = qkv()
    ours = direct()
    with torch.enable_grad():
        out = ours(q, k.requires_grad_(), v, H, skip_reshape=True)
    assert ours.reasons() == ["inputs need gradients (there is no backward)"] and out.requires_grad
    with torch.no_grad():
        ours(q, k, v, H, skip_reshape=True)
    assert len(ours.reasons()) == 1 and ours.closed()["totals"]["sparse_calls"] == 1


def test_a_mask_that_needs_gradients(direct, reference):
    q, k, v = qkv()
    mask = torch.zeros(B, 1, S, requires_grad=True)
    ours = direct()
    with torch.enable_grad():
        out = ours(q, k, v, H, mask=mask, skip_reshape=True)
    assert ours.reasons() == ["inputs need gradients (there is no backward)"] and out.requires_grad
    torch.testing.assert_close(out.detach(), reference(q, k, v, H, mask=mask.detach(), skip_reshape=True), rtol=1e-4, atol=1e-5)
    ours(q, k, v, H, mask=mask, skip_reshape=True)  # no gradients are wanted
    assert len(ours.reasons()) == 1 and ours.closed()["totals"]["sparse_calls"] == 1


def test_no_backend(nodes, direct):
    """On a device without a kernel: the real table's answer for a GPU, where the torch backend is never chosen by itself."""
    refused = nodes._kernels.backend_for("meta", "auto")
    assert refused.backend is None and refused.why_not
    assert nodes._kernels.backend_for("meta", "torch").backend == "torch"
    ours = direct(answer)
    assert ours(*(x.to("meta") for x in qkv()), H, skip_reshape=True) == "answered"
    assert ours.reasons() == [f"no fast kernel for this device ({refused.why_not})"]


def test_outside_a_run(nodes, direct, passing):
    """No run, nothing counted; the earlier override or ComfyUI's own function answers, as without the node."""
    earlier = passing()
    for previous in (earlier, None):
        ours = direct(previous)
        del ours.options[nodes.compiled.CALLS]
        q, k, v = qkv()
        assert torch.equal(ours(q, k, v, H, skip_reshape=True), ours.options[KEY].previous(plain(), q, k, v, H, skip_reshape=True)
                           if previous else plain()(q, k, v, H, skip_reshape=True))  # fmt: skip
        assert ours.run.calls == 0
    assert len(earlier.seen) == 2
    assert torch.equal(ours.patch.override(plain(), q, k, v, H, skip_reshape=True), plain()(q, k, v, H, skip_reshape=True))  # no options


def test_too_short_compares_the_shorter_side(direct):
    ours = direct(min_tokens=1500)
    ours(*qkv(2000, 1499), H, skip_reshape=True)
    ours(*qkv(1499), H, skip_reshape=True)
    ours(*qkv(1400, 2000), H, skip_reshape=True)
    assert ours.run.reasons == {"1,499 tokens < min_tokens 1,500": 2, "1,400 tokens < min_tokens 1,500": 1}
    ours(*qkv(1500), H, skip_reshape=True)
    ours(*qkv(1500, 1600), H, skip_reshape=True)
    assert ours.closed()["totals"]["sparse_calls"] == 2


def test_policy(nodes, direct):
    """A policy decides by run and block; None is a reason of its own, a number wins over the slider."""
    asked = []

    def topk(run, layer):
        asked.append((run.step, layer))
        return (None, 0.5, 1.0)[layer]

    ours = direct(policy=SimpleNamespace(topk=topk), topk=1.0)
    for _ in range(3):
        ours(*qkv(), H, skip_reshape=True)
    assert asked == [(0, 0), (0, 1), (0, 2)] and ours.run.reasons == {"the policy asks for dense attention here": 2}
    cells = {c["layer"]: c for c in ours.closed()["cells"]}
    assert [cells[layer]["dense_calls"] for layer in range(3)] == [1, 0, 1] and cells[1]["density"] < 1


def test_order_of_the_questions(nodes, direct, monkeypatch):
    """The call breaks every rule at first; each round mends the rule that was named, and the next one in the order is named."""
    quantised(nodes, monkeypatch)
    settings = dict(start_percent=0.9, dense_blocks="0", min_tokens=1000, policy=SimpleNamespace(topk=lambda run, layer: None))
    call = dict(low_precision_attention=False, mask=torch.zeros(1, 2, 1, 60))
    shape = dict(s_q=60, dim=264, dtype=torch.float64)

    def reason():
        ours = direct(answer, **settings)
        with torch.enable_grad():
            q, k, v = qkv(**shape)
            ours(q.requires_grad_(shape.get("dim") == 264), k, v, H, skip_reshape=True, **call)
        return ours.reasons()

    named = []
    for mend in (
        lambda: call.pop("low_precision_attention"),
        lambda: shape.pop("dtype"),
        lambda: shape.pop("dim"),
        lambda: settings.pop("start_percent"),
        lambda: settings.pop("dense_blocks"),
        lambda: settings.pop("min_tokens"),
        lambda: (shape.update(s_q=S), call.update(mask=torch.zeros(1, 2, 1, S))),
        lambda: call.pop("mask"),
        lambda: settings.pop("policy"),
    ):
        named += reason()
        mend()
    short = [sentence.split(" (")[0] for sentence in named]
    assert short == [
        "the model asked for full precision in this call",
        "dtype float64",
        "head_dim 264",
        "outside the step window",
        "layer is listed in dense_blocks",
        "60 tokens < min_tokens 1,000",
        "60 tokens are too few to choose from",
        "mask differs per head",
        "the policy asks for dense attention here",
    ]
    assert reason() == []


def test_gradients_come_before_the_window(direct):
    ours = direct(start_percent=0.9)
    with torch.enable_grad():
        q, k, v = qkv()
        ours(q.requires_grad_(), k, v, H, skip_reshape=True)
    assert ours.reasons() == ["inputs need gradients (there is no backward)"]


ELSEWHERE = {"CAPTURED", "RECORDED", "ANSWERED_ABOVE", "SECOND_MODEL", "STOPPED", "REFERENCE", "DENSE_HERE", "NUMBERS_LOST", "SLOWER",
             "SLOWER_FROM_NOW", "TRACED_WITHOUT", "LAYERS_MISSING", "FULLGRAPH"}  # fmt: skip
"""Of test_allocation_graph.py, test_compositions.py, test_threads.py, test_pace.py and test_compiled.py."""


def test_all_reasons_are_provoked_here(nodes):
    """A reason that is added to the table needs a test here; those of monitors, of measuring and of lost numbers have theirs elsewhere."""
    names = {name for name in vars(nodes.reasons) if name.isupper()}
    elsewhere = {"NO_NODE", "NOTHING_SPARSE", "REPLACED", "NOT_TIMED", "NO_MAP", "FEW_STEPS", "LISTS_NONE", *ELSEWHERE}
    assert names - elsewhere == {
        "OPTED_OUT", "GRADIENTS", "DTYPE", "HEAD_DIM", "NO_BACKEND", "WINDOW", "DENSE_LAYER", "COUNTING_LAYERS", "CROSS_ATTENTION", "TOO_SHORT",
        "NOT_A_LAYER", "ONE_BLOCK", "MASK_PER_QUERY", "MASK_PER_HEAD", "MASK_SHAPE", "POLICY_DENSE", "NEVER_ROUTED", "NOTHING_SEEN", "ENDED_EARLY",
    }  # fmt: skip


# Reasons that hang on the run, by sampling.


WINDOW = "outside the step window (start_percent, end_percent)"
LISTED = "layer is listed in dense_blocks"
COUNTING = "first model call: counting the layers for the negative numbers in dense_blocks"


def test_window(tiny, patched, last_run):
    model = tiny("qwen_image")
    comfy_models.sample(model, patched(model, start_percent=0.3, end_percent=0.7), steps=4)
    run = last_run()
    # Flow matching with shift: the schedule's sigmas are percent_to_sigma of 0, 1/4, 1/2 and 3/4, so the window holds the third alone.
    assert [step for (step, layer), (sparse, _) in counts(run).items() if sparse] == [2, 2]
    assert all(reasons == {WINDOW: 1} for (step, _), (_, reasons) in counts(run).items() if step != 2)
    assert run["reasons"] == {WINDOW: 6}


BLOCKS = {
    "none": ("", []),
    "one": ("1", [1]),
    "range": ("1-3", [1, 2, 3]),
    "list": ("0, 3-4", [0, 3, 4]),
    "last": ("-1", [4]),
    "last-two": ("-2--1", [3, 4]),
    "to-the-end": ("3--1", [3, 4]),
    "beyond": ("7, -9", []),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_dense_blocks(nodes, tiny, patched, last_run, name):
    """HunyuanVideo's five blocks, two double and three single; its text refiner takes no number."""
    text, dense = BLOCKS[name]
    model = tiny("hunyuan_video")
    patcher = patched(model, dense_blocks=text)
    comfy_models.sample(model, patcher)
    run = last_run()
    negative = "-" in text.replace("1-3", "").replace("3-4", "")
    assert run["layers"] == 5
    for (step, layer), (sparse, reasons) in counts(run).items():
        if negative and step == 0:
            assert (sparse, reasons) == (0, {COUNTING: 1})
        else:
            assert (sparse, reasons) == ((0, {LISTED: 1}) if layer in dense else (1, {}))
    comfy_models.sample(model, patcher, steps=1)  # the number of blocks is known now
    assert [layer for (_, layer), (sparse, _) in counts(last_run()).items() if not sparse] == dense
    assert COUNTING not in last_run()["reasons"]


def test_a_long_prompt_takes_no_layer_numbers(nodes, tiny, patched, last_run):
    """Cross-attention is known by its keys, the prompt's, whatever their number: dense_blocks lists the layers it does for a short prompt."""
    model = tiny("wan_t2v", latent=(1, 16, 1, 80, 80), prompt=1200)  # 1,600 tokens of picture
    for text, dense in (("1", [1]), ("-1", [1]), ("0", [0])):
        patcher = patched(model, dense_blocks=text, min_tokens=1500)
        for _ in range(2):  # negative numbers count in the first run
            comfy_models.sample(model, patcher, steps=1)
        run = last_run()
        assert run["layers"] == 2 and run["reasons"] == {"cross-attention to 1,200 tokens": 2, LISTED: 1}
        assert [layer for (_, layer), (sparse, _) in counts(run).items() if not sparse] == dense and run["totals"]["sparse_calls"] == 1


def test_a_block_listed_by_its_positive_number_needs_no_count(nodes, tiny, patched, last_run):
    model = tiny("hunyuan_video")
    comfy_models.sample(model, patched(model, dense_blocks="1, -1"), steps=1)
    assert [reasons for _, reasons in counts(last_run()).values()] == [{COUNTING: 1}, {LISTED: 1}, *3 * [{COUNTING: 1}]]


def test_nothing_seen(tiny, patched, last_run):
    """Another node's patch answers every call without ComfyUI's hook."""
    from comfy.patcher_extension import WrappersMP

    model = tiny("qwen_image")
    patcher = patched(model)

    def without_override(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
        options = {key: value for key, value in transformer_options.items() if key != KEY}
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)

    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "zz", without_override)
    comfy_models.sample(model, patcher, steps=1)
    assert last_run()["note"].startswith("no attention call reached this node")
