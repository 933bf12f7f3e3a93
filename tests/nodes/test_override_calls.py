"""The override on calls of every form: masks, layouts, grouped heads, strides, types, lengths of q and k."""

from __future__ import annotations

import pytest
import torch
from attention_calls import B, D, H, S, answer, plain, qkv

pytestmark = pytest.mark.usefixtures("no_gradients", "everything_kept")


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


@pytest.mark.parametrize("s_q", [300, 1500])
def test_long_cross_attention_to_the_prompt_stays_dense(direct, reference, s_q):
    ours = direct(context_tokens=1100)
    q, k, v = qkv(s_q, 1100)
    torch.testing.assert_close(ours(q, k, v, H, skip_reshape=True), reference(q, k, v, H, skip_reshape=True), rtol=1e-4, atol=1e-5)
    assert ours.reasons() == ["cross-attention to 1,100 tokens"] and ours.context.layers == 0 == ours.run.sparse_calls
    ours(*qkv(1100), H, skip_reshape=True)  # as many tokens of picture as the prompt has: a layer's own
    assert ours.context.layers == 1 == ours.run.sparse_calls


def test_long_keys_that_are_not_the_prompt_run_sparse(direct, reference):
    """Cached keys and those of references beyond 1,024 tokens are worth skipping; nothing is protected or reordered there."""
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
