"""The override: which call runs sparse, under which reason another stays dense, and how it lives with other nodes' attention patches."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import comfy_models
import pytest
import torch

KEY = "optimized_attention_override"
B, H, S, D = 2, 2, 200, 64  # four blocks of keys, the last one short; two of queries


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def qkv(s_q=S, s_k=None, heads=H, heads_kv=None, batch=B, dim=D, dtype=torch.float32, skip_reshape=True):
    """q, k, v as ComfyUI passes them: (B, H, S, D), or (B, S, H * D)."""
    generator = torch.Generator().manual_seed(s_q + heads)
    shapes = [(batch, heads, s_q, dim)] + 2 * [(batch, heads_kv or heads, s_k or s_q, dim)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return made if skip_reshape else [x.transpose(1, 2).flatten(2) for x in made]


def answer(func, *args, **kwargs):
    """An earlier override that answers calls which ComfyUI's own function could not."""
    return "answered"


def quantised(nodes, monkeypatch):
    """The torch backend works on 8-bit values, it says."""
    choice = nodes._kernels.BackendChoice("torch", None, True, True)
    monkeypatch.setattr(nodes._kernels, "backend_for", lambda *kind: choice)


# Reasons, one at a time, by a direct call.

NAMED = {"q": "float64", "mixed": "float16, float32"}
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
        del ours.options[ours.patch.key]
        q, k, v = qkv()
        assert torch.equal(ours(q, k, v, H, skip_reshape=True), ours.options[KEY].previous(plain(), q, k, v, H, skip_reshape=True)
                           if previous else plain()(q, k, v, H, skip_reshape=True))  # fmt: skip
        assert ours.run.calls == 0
    assert len(earlier.seen) == 2
    assert torch.equal(ours.patch.override(plain(), q, k, v, H, skip_reshape=True), plain()(q, k, v, H, skip_reshape=True))  # no options


def plain():
    from comfy.ldm.modules.attention import attention_pytorch

    return attention_pytorch.__wrapped__


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
        return None if layer == 0 else 1.0

    ours = direct(policy=SimpleNamespace(topk=topk))
    for _ in range(2):
        ours(*qkv(), H, skip_reshape=True)
    assert asked == [(0, 0), (0, 1)] and ours.reasons() == ["the policy asks for dense attention here"]
    cells = {c["layer"]: c for c in ours.closed()["cells"]}
    assert cells[0]["dense_calls"] == 1 and cells[1]["density"] == 1.0


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


def test_all_reasons_are_provoked_here(nodes):
    """A reason that is added to the table needs a test here; those of monitors have theirs in test_monitor.py."""
    names = {name for name in vars(nodes.reasons) if name.isupper()}
    assert names - {"NO_NODE", "NOTHING_SPARSE", "REPLACED", "NOT_TIMED", "NO_MAP", "FEW_STEPS", "LISTS_NONE"} == {
        "OPTED_OUT", "GRADIENTS", "DTYPE", "HEAD_DIM", "NO_BACKEND", "WINDOW", "DENSE_LAYER", "COUNTING_LAYERS", "CROSS_ATTENTION", "TOO_SHORT",
        "NOT_A_LAYER", "ONE_BLOCK", "MASK_PER_QUERY", "MASK_PER_HEAD", "MASK_SHAPE", "POLICY_DENSE", "NEVER_ROUTED", "NOTHING_SEEN", "ENDED_EARLY",
    }  # fmt: skip


# Reasons that hang on the run, by sampling.


def counts(run: dict) -> dict:
    """{(step, layer): (sparse calls, reasons)}"""
    return {(c["step"], c["layer"]): (c["sparse_calls"], c["reasons"]) for c in run["cells"]}


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


# Masks.


def key_only(kind: str):
    """Key-only masks, (B or 1, S_k): the second half of the keys is seen less, or not at all; different in each batch row."""
    keep = torch.arange(S)[None] < torch.tensor([[130], [171]])
    bias = torch.randn(B, S, generator=torch.Generator().manual_seed(5))
    return {"bool": keep, "additive": torch.where(keep, bias, -10000.0), "inf": torch.where(keep, bias, float("-inf")), "bias": bias}[kind]


FORMS = {
    "2d-one-row": lambda m: m[:1],  # [1, S_k]
    "2d-expanded": lambda m: m[:1].expand(S, S),  # [S_q, S_k], stride 0
    "3d": lambda m: m[:, None],  # [B, 1, S_k]
    "3d-shared": lambda m: m[:1, None],
    "3d-expanded": lambda m: m[:, None].expand(B, S, S),
    "4d": lambda m: m[:, None, None],  # [B, 1, 1, S_k]
    "4d-shared": lambda m: m[:1, None, None],
    "4d-queries": lambda m: m[:, None, None].expand(B, 1, S, S),
    "4d-heads": lambda m: m[:, None, None].expand(B, H, 1, S),
    "4d-all": lambda m: m[:, None, None].expand(B, H, S, S),
}
LAYOUTS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("kind", ["bool", "additive", "inf", "bias"])
@pytest.mark.parametrize("form", FORMS)
def test_key_masks_run_sparse_and_are_right(direct, form, kind):
    """With everything kept the output is ComfyUI's own; with little kept, masked keys have no part in it."""
    mask = FORMS[form](key_only(kind))
    for skip_reshape, skip_output in LAYOUTS:
        q, k, v = qkv(skip_reshape=skip_reshape)
        how = dict(skip_reshape=skip_reshape, skip_output_reshape=skip_output)
        exact = direct(topk=1.0)
        expected = plain()(q, k, v, H, mask=mask, **how)
        for out in (exact(q, k, v, H, mask=mask, **how), exact(q, k, v, H, mask, **how)):  # by name and by position
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert exact.reasons() == [] and exact.closed()["totals"]["sparse_calls"] == 2
    if kind != "bias":
        ours = direct(topk=0.3)
        poisoned = [x.clone() for x in (k, v)]
        masked = (~key_only("bool")).expand(B, S).clone() if form not in ("2d-one-row", "2d-expanded", "3d-shared", "4d-shared") else None
        masked = masked if masked is not None else ~key_only("bool")[:1].expand(B, S)
        for x in poisoned:
            x[masked] = 1e4
        outs = [ours(q, *pair, H, mask=mask) for pair in ((k, v), poisoned)]
        assert ours.reasons() == [] and torch.equal(*outs)


DECLINED = {
    "per-query-2d": (lambda: torch.ones(S, S, dtype=torch.bool).tril(), "mask differs per query"),
    "per-query-3d": (lambda: torch.randn(B, S, S), "mask differs per query"),
    "per-query-4d": (lambda: torch.randn(B, 1, S, S), "mask differs per query"),
    "per-head": (lambda: torch.randn(1, H, 1, S), "mask differs per head"),
    "per-head-and-query": (lambda: torch.randn(B, H, S, S), "mask differs per head"),
}


@pytest.mark.parametrize("form", DECLINED)
@pytest.mark.parametrize(("skip_reshape", "skip_output"), LAYOUTS)
def test_other_masks_stay_dense_and_are_right(direct, reference, form, skip_reshape, skip_output):
    make, reason = DECLINED[form]
    mask, (q, k, v) = make(), qkv(skip_reshape=skip_reshape)
    ours = direct()
    how = dict(mask=mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output)
    out = ours(q, k, v, H, **how)
    assert ours.reasons() == [reason] and ours.run.sparse_calls == 0
    torch.testing.assert_close(out, reference(q, k, v, H, **how), rtol=1e-4, atol=1e-5)


UNKNOWN = {
    "int64": (torch.ones(B, 1, 1, S, dtype=torch.int64), "mask of shape [2, 1, 1, 200] (int64) is not understood"),
    "batch": (torch.ones(3, 1, S, dtype=torch.bool), "mask of shape [3, 1, 200] for a batch of 2 is not understood"),
    "keys": (torch.ones(1, 1, S + 1, dtype=torch.bool), "mask of shape [1, 1, 201] (bool) is not understood"),
    "1d": (torch.ones(S, dtype=torch.bool), "mask of shape [200] (bool) is not understood"),
    "5d": (torch.ones(1, 1, 1, 1, S, dtype=torch.bool), "mask of shape [1, 1, 1, 1, 200] (bool) is not understood"),
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_masks_that_are_not_understood(direct, form):
    mask, reason = UNKNOWN[form]
    ours = direct(answer)
    assert ours(*qkv(), H, mask=mask, skip_reshape=True) == "answered"
    assert ours.reasons() == [reason]


# Forms of the call.


@pytest.mark.parametrize("topk", [1.0, 0.5])
@pytest.mark.parametrize(("skip_reshape", "skip_output"), LAYOUTS)
def test_forms(direct, reference, skip_reshape, skip_output, topk):
    """One call in every layout has one result; with everything kept it is dense attention."""
    how = dict(skip_reshape=skip_reshape, skip_output_reshape=skip_output)
    q, k, v = qkv(skip_reshape=skip_reshape)
    out = direct(topk=topk)(q, k, v, heads=H, **how)
    assert out.shape == ((B, H, S, D) if skip_output else (B, S, H * D))
    expected = reference(q, k, v, H, **how) if topk == 1 else direct(topk=topk)(*qkv(), H, skip_reshape=True, skip_output_reshape=skip_output)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert topk == 1 or not torch.allclose(out, reference(q, k, v, H, **how), atol=1e-3)


@pytest.mark.parametrize("skip_reshape", [True, False])
def test_grouped_heads(direct, reference, skip_reshape):
    ours = direct(topk=1.0)
    q, k, v = qkv(heads=4, heads_kv=2, skip_reshape=skip_reshape)
    out = ours(q, k, v, 4, skip_reshape=skip_reshape, enable_gqa=True)
    torch.testing.assert_close(out, reference(q, k, v, 4, skip_reshape=skip_reshape), rtol=1e-4, atol=1e-5)
    assert ours.reasons() == [] and ours.closed()["heads"] == 4


@pytest.mark.parametrize("skip_reshape", [True, False])
def test_scale(direct, reference, skip_reshape):
    ours = direct(topk=1.0)
    q, k, v = qkv(skip_reshape=skip_reshape)
    out = ours(q, k, v, H, skip_reshape=skip_reshape, scale=0.4)
    torch.testing.assert_close(out, reference(q, k, v, H, skip_reshape=skip_reshape, scale=0.4), rtol=1e-4, atol=1e-5)
    assert ours.reasons() == [] and not torch.allclose(out, reference(q, k, v, H, skip_reshape=skip_reshape), atol=1e-2)


def test_strided_inputs(direct, reference):
    """Views of one projection, of a longer sequence, and with a last dimension that is not contiguous."""
    fused = torch.randn(B, S, 3, H, D, generator=torch.Generator().manual_seed(1))
    views = {
        "fused": ([fused[:, :, i].transpose(1, 2) for i in range(3)], True),
        "offset": ([torch.nn.functional.pad(x, (0, 0, 3, 5))[:, :, 3:-5] for x in qkv()], True),
        "moved": ([x.mT.contiguous().mT for x in qkv()], True),
        "moved-flat": ([x.mT.contiguous().mT for x in qkv(skip_reshape=False)], False),
    }
    for name, (tensors, skip_reshape) in views.items():
        ours = direct(topk=1.0)
        before = [x.clone() for x in tensors]
        out = ours(*tensors, H, skip_reshape=skip_reshape)
        torch.testing.assert_close(out, reference(*tensors, H, skip_reshape=skip_reshape), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True)), f"{name}: an input was written to"
        assert ours.reasons() == []


def test_v_with_heads_apart(direct):
    """SD3 passes q and k as (B, S, H * D), but v as (B, S, H, D)."""
    q, k, v = qkv(skip_reshape=False)
    ours = direct(topk=1.0)
    out = ours(q, k, v.unflatten(-1, (H, D)), heads=H)
    torch.testing.assert_close(out, plain()(q, k, v, H), rtol=1e-4, atol=1e-5)
    assert out.shape == (B, S, H * D) and ours.reasons() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(direct, reference, dtype):
    q, k, v = qkv(dtype=dtype)
    out = direct(topk=1.0)(q, k, v, H, skip_reshape=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), reference(q, k, v, H, skip_reshape=True).float(), rtol=2e-2, atol=2e-2)


def test_long_cross_attention_runs_sparse(direct, reference):
    """Keys beyond 1,024 tokens are worth skipping; nothing is protected or reordered there."""
    ours, exact = direct(context_tokens=7), direct(topk=1.0, context_tokens=7)
    q, k, v = qkv(300, 1100)
    torch.testing.assert_close(exact(q, k, v, H, skip_reshape=True), reference(q, k, v, H, skip_reshape=True), rtol=1e-4, atol=1e-5)
    ours(q, k, v, H, skip_reshape=True)
    assert ours.closed()["totals"]["density"] == pytest.approx(5 / 18)


def test_unknown_family_protects_both_ends(direct, reference):
    """A family that no row knows: text stands at one end, so as many rows as there is text are exact at either."""
    q, k, v = qkv(500)
    out = direct(topk=0.2, context_tokens=7)(q, k, v, H, skip_reshape=True)
    dense = reference(q, k, v, H, skip_reshape=True)
    torch.testing.assert_close(out[:, :7], dense[:, :7], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out[:, -7:], dense[:, -7:], rtol=1e-4, atol=1e-5)
    assert (out - dense)[:, 130:380].norm() > 0.1 * dense[:, 130:380].norm()


def test_override_takes_no_containers(direct):
    """Newer trees call `container_function` without `func` where an override has one."""
    assert not hasattr(direct().patch.override, "container_function")


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


def test_later_override_that_forgets_ours_is_put_below(tiny, patched, passing, last_run, computed):
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


# torch.compile.


@pytest.fixture(scope="module")
def counted():
    """A backend of torch.compile whose `.ran` counts the compiled graphs that run. Compiling takes long: the cases below share what is compiled."""
    from torch._dynamo.backends.registry import lookup_backend

    def backend(graph, inputs):
        compiled = lookup_backend("aot_eager")(graph, inputs)

        def run(*arguments):
            backend.ran += 1
            return compiled(*arguments)

        return run

    torch._dynamo.reset()
    yield backend
    torch._dynamo.reset()


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("way", ["wrapper", "object"])
def test_compiled_model(tiny, patched, last_run, counted, way, place):
    """ComfyUI's TorchCompileModel (a wrapper around each model call), and a compiled model as an object patch; our node on either side."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = tiny("qwen_image")
    expected = comfy_models.sample(model, patched(model))
    plain_run = last_run()

    def compiled(patcher):
        clone = patcher.clone()
        if way == "wrapper":
            set_torch_compile_wrapper(model=clone, backend=counted)
        else:
            clone.add_object_patch("diffusion_model", torch.compile(clone.get_model_object("diffusion_model"), backend=counted))
        return clone

    counted.ran = 0
    patcher = patched(compiled(model.patcher)) if place == "before" else compiled(patched(model))
    out = comfy_models.sample(model, patcher)
    assert counted.ran >= 4, "the model's blocks did not run compiled"  # each of two in two steps
    run = last_run()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert run["family"] == "Qwen-Image" and run["model"] == plain_run["model"]
    assert run["reasons"] == plain_run["reasons"] and run["totals"]["sparse_calls"] == plain_run["totals"]["sparse_calls"] == 4
    assert [c["head_density"] for c in run["cells"]] == [c["head_density"] for c in plain_run["cells"]]
