"""One failing input per error message; every message names the argument, the rule, the value got, and what to do."""

from __future__ import annotations

import math
import re

import pytest
import torch
from sparge_kernels import BlockMask, UnsupportedCall, block_sparse_attention, merge_lse, order, select_blocks, sparse_attention
from torch.autograd import forward_ad


def x(*shape, dtype=torch.float32, **how):
    return torch.zeros(shape, dtype=dtype, **how)


Q = (1, 4, 200, 16)
K = (1, 2, 300, 16)


def call(q=None, k=None, v=None, **options):
    q = x(*Q) if q is None else q
    k = x(*K) if k is None else k
    v = x(*k.shape, dtype=k.dtype, device=k.device) if v is None and isinstance(k, torch.Tensor) else v
    if "block_mask" in options:
        return block_sparse_attention(q, k, v, options.pop("block_mask"), **options)
    return sparse_attention(q, k, v, **options)


GRAD = x(*Q).requires_grad_()
GRAD_K = x(*K).requires_grad_()
PLAN = order.plan("tiles", ((2, 8, 8), 72))  # 200 tokens
BIG = x(1, 2, 300, 32)[..., ::2]
ONES = torch.ones

# name -> (arguments, exception, what the message must hold: the argument, the rule, the value got)
CASES = {
    "q no tensor": (dict(q=[1.0]), TypeError, ["q", "torch.Tensor", "list"]),
    "v no tensor": (dict(v="v"), TypeError, ["v", "torch.Tensor", "str"]),
    "rank 3": (dict(q=x(4, 200, 16)), ValueError, ["q", "4 dimensions", "(4, 200, 16)"]),
    "rank 5": (dict(k=x(1, 1, 2, 300, 16)), ValueError, ["k", "4 dimensions", "(1, 1, 2, 300, 16)"]),
    "rank of v": (dict(v=x(2, 300, 16)), ValueError, ["v", "4 dimensions", "(2, 300, 16)"]),
    "float64": (dict(q=x(*Q, dtype=torch.float64)), TypeError, ["q", "float16, bfloat16 or float32", "float64"]),
    "int": (dict(k=x(*K, dtype=torch.int32)), TypeError, ["k", "float16, bfloat16 or float32", "int32"]),
    "dtype mix": (dict(k=x(*K, dtype=torch.float16)), TypeError, ["q, k and v", "share dtype", "float16", "float32"]),
    "dtype of v": (dict(v=x(*K, dtype=torch.bfloat16)), TypeError, ["v", "share dtype", "bfloat16", "float32"]),
    "device mix": (dict(k=x(*K, device="meta")), TypeError, ["q, k and v", "device", "meta", "cpu"]),
    "empty S_q": (dict(q=x(1, 4, 0, 16)), ValueError, ["q", "empty", "(1, 4, 0, 16)"]),
    "empty S_k": (dict(k=x(1, 2, 0, 16)), ValueError, ["k", "empty", "(1, 2, 0, 16)"]),
    "empty batch": (dict(q=x(0, 4, 5, 16)), ValueError, ["q", "empty", "(0, 4, 5, 16)"]),
    "D 0": (dict(q=x(1, 4, 200, 0)), ValueError, ["q", "empty", "(1, 4, 200, 0)"]),
    "D 300": (dict(q=x(1, 4, 200, 300), k=x(1, 2, 300, 300)), ValueError, ["head_dim", "1 to 256", "300"]),
    "last stride": (dict(k=BIG), ValueError, ["k", "contiguous in its last dimension", "2)", "contiguous()"]),
    "GQA": (dict(k=x(1, 3, 300, 16)), ValueError, ["heads", "multiple", "4", "3"]),
    "more kv heads": (dict(k=x(1, 8, 300, 16)), ValueError, ["heads", "multiple", "4", "8"]),
    "batch": (dict(k=x(2, 2, 300, 16)), ValueError, ["k", "batch", "B=1", "B=2"]),
    "head_dim of k": (dict(k=x(1, 2, 300, 8)), ValueError, ["k", "head_dim", "D=16", "D=8"]),
    "length of v": (dict(v=x(1, 2, 299, 16)), ValueError, ["v", "k's shape", "S=299", "S=300"]),
    "head_dim of v": (dict(v=x(1, 2, 300, 8)), ValueError, ["v", "k's shape", "D=8"]),
    "grad q": (dict(q=GRAD), ValueError, ["q", "require grad", "no_grad"]),
    "grad k": (dict(k=GRAD_K, v=x(*K)), ValueError, ["k", "require grad", "no_grad"]),
    "grad v": (dict(v=GRAD_K), ValueError, ["v", "require grad", "no_grad"]),
    "grad key_mask": (dict(key_mask=ONES(1, 300).requires_grad_()), ValueError, ["key_mask", "require grad", "no_grad"]),
    "grad topk": (dict(topk=ONES(4).requires_grad_()), ValueError, ["topk", "require grad", "no_grad"]),
    "grad pv": (dict(pvthreshd=ONES(4).requires_grad_()), ValueError, ["pvthreshd", "require grad", "no_grad"]),
    "layout": (dict(layout="BSHD"), ValueError, ["layout", "HND", "NHD", "'BSHD'"]),
    "backend": (dict(backend="cudnn"), ValueError, ["backend", "auto, cuda, torch", "'cudnn'"]),
    "score": (dict(score="max"), ValueError, ["score", "subblock, mean", "'max'"]),
    "topk 0": (dict(topk=0), ValueError, ["topk", "(0, 1]", "0", "1 for dense"]),
    "topk 2": (dict(topk=2), ValueError, ["topk", "(0, 1]", "2"]),
    "topk -0.5": (dict(topk=-0.5), ValueError, ["topk", "(0, 1]", "-0.5"]),
    "topk nan": (dict(topk=math.nan), ValueError, ["topk", "(0, 1]", "nan"]),
    "topk inf": (dict(topk=math.inf), ValueError, ["topk", "(0, 1]", "inf"]),
    "topk bool": (dict(topk=True), TypeError, ["topk", "number", "True"]),
    "topk string": (dict(topk="0.5"), TypeError, ["topk", "number", "'0.5'"]),
    "topk list": (dict(topk=[0.5] * 4), TypeError, ["topk", "tensor", "[0.5"]),
    "topk tensor length": (dict(topk=ONES(3)), ValueError, ["topk", "(4,)", "(3,)"]),
    "topk 0-d tensor": (dict(topk=torch.tensor(0.5)), ValueError, ["topk", "(4,)", "()"]),
    "topk tensor value": (dict(topk=torch.tensor([0.5, 1.0, 1.5, 0.5])), ValueError, ["topk", "(0, 1]", "1.5", "head 2"]),
    "topk tensor nan": (dict(topk=torch.tensor([0.5, 1.0, 1.0, math.nan])), ValueError, ["topk", "(0, 1]", "nan", "head 3"]),
    "topk Parameter value": (dict(topk=torch.nn.Parameter(ONES(4) * 2, requires_grad=False)), ValueError, ["topk", "(0, 1]", "2.0", "head 0"]),
    "cdf 0": (dict(cdfthreshd=0.0), ValueError, ["cdfthreshd", "(0, 1]", "0.0"]),
    "cdf 1.1": (dict(cdfthreshd=1.1), ValueError, ["cdfthreshd", "(0, 1]", "1.1"]),
    "cdf string": (dict(cdfthreshd="a"), TypeError, ["cdfthreshd", "number", "'a'"]),
    "sim -1.5": (dict(simthreshd1=-1.5), ValueError, ["simthreshd1", "[-1, 1]", "-1.5", "-0.1"]),
    "sim 1.01": (dict(simthreshd1=1.01), ValueError, ["simthreshd1", "[-1, 1]", "1.01"]),
    "sim nan": (dict(simthreshd1=math.nan), ValueError, ["simthreshd1", "[-1, 1]", "nan"]),
    "sim None": (dict(simthreshd1=None), TypeError, ["simthreshd1", "number", "None"]),
    "sim tensor": (dict(simthreshd1=torch.tensor([0.0, 0.0, -3.0, 0.0])), ValueError, ["simthreshd1", "[-1, 1]", "-3.0", "head 2"]),
    "pv 0": (dict(pvthreshd=0), ValueError, ["pvthreshd", "(0, inf)", "0"]),
    "pv -1": (dict(pvthreshd=-1.0), ValueError, ["pvthreshd", "(0, inf)", "-1.0", "15"]),
    "pv inf": (dict(pvthreshd=math.inf), ValueError, ["pvthreshd", "(0, inf)", "inf"]),
    "pv nan": (dict(pvthreshd=math.nan), ValueError, ["pvthreshd", "(0, inf)", "nan"]),
    "pv tensor": (dict(pvthreshd=torch.tensor([1.0, 0.0, 1.0, 1.0])), ValueError, ["pvthreshd", "(0, inf)", "0.0", "head 1"]),
    "causal int": (dict(causal=1), TypeError, ["causal", "True or False", "1"]),
    "compensate string": (dict(compensate="yes"), TypeError, ["compensate", "True or False", "'yes'"]),
    "smooth_k None": (dict(smooth_k=None), TypeError, ["smooth_k", "True or False", "None"]),
    "return_lse int": (dict(return_lse=1), TypeError, ["return_lse", "True or False", "1"]),
    "return_info int": (dict(return_info=0), TypeError, ["return_info", "True or False", "0"]),
    "offset without causal": (dict(causal_offset=5), ValueError, ["causal_offset", "causal=True", "5"]),
    "offset float": (dict(causal=True, causal_offset=1.0), TypeError, ["causal_offset", "int", "1.0"]),
    "offset bool": (dict(causal=True, causal_offset=True), TypeError, ["causal_offset", "int", "True"]),
    "scale 0": (dict(scale=0), ValueError, ["scale", "finite", "> 0", "got 0"]),
    "scale -1": (dict(scale=-1), ValueError, ["scale", "finite", "-1"]),
    "scale inf": (dict(scale=math.inf), ValueError, ["scale", "finite", "inf"]),
    "scale nan": (dict(scale=math.nan), ValueError, ["scale", "finite", "nan"]),
    "scale string": (dict(scale="1"), (ValueError, TypeError), ["scale", "number", "'1'"]),
    "scale bool": (dict(scale=True), (ValueError, TypeError), ["scale", "number", "True"]),
    "mask list": (dict(key_mask=[True] * 300), TypeError, ["key_mask", "(B, S_k)", "list"]),
    "mask length": (dict(key_mask=ONES(1, 200).bool()), ValueError, ["key_mask", "(1, 300)", "(1, 200)"]),
    "mask 1-d": (dict(key_mask=ONES(300).bool()), ValueError, ["key_mask", "(1, 300)", "(300,)"]),
    "mask batch": (dict(key_mask=ONES(2, 300).bool()), ValueError, ["key_mask", "(1, 300)", "(2, 300)"]),
    "mask per query": (dict(key_mask=ONES(1, 1, 200, 300).bool()), ValueError, ["key_mask", "differs per query", "(1, 1, 200, 300)"]),
    "mask S_q x S_k": (dict(key_mask=ONES(200, 300).bool()), ValueError, ["key_mask", "differs per query", "(200, 300)"]),
    "mask int": (dict(key_mask=ONES(1, 300).long()), TypeError, ["key_mask", "bool", "int64", ".bool()"]),
    "mask device": (dict(key_mask=ONES(1, 300, device="meta").bool()), ValueError, ["key_mask", "device", "meta"]),
    "order with causal": (dict(order=PLAN, causal=True, k=x(1, 2, 200, 16)), ValueError, ["order", "causal"]),
    "order of another length": (dict(order=PLAN), ValueError, ["order", "length", "200", "S_k=300"]),
    "order of another S_q": (dict(order=PLAN, q=x(1, 2, 300, 16), k=x(1, 2, 200, 16)), ValueError, ["order", "length", "200", "S_q=300"]),
    "order string": (dict(order="hilbert"), TypeError, ["order", "plan", "str"]),
    "row_major of another length": (dict(order=order.plan("row_major", (17,))), ValueError, ["order", "length", "17"]),
    "row_major with causal": (dict(order=order.plan("row_major", (200,)), k=x(1, 2, 200, 16), causal=True), ValueError, ["order", "causal"]),
    "keep out of range": (dict(always_keep=[(0, 201)]), ValueError, ["always_keep", "<= 200", "(0, 201)"]),
    "keep k out of range": (dict(always_keep={"k": [(0, 301)]}), ValueError, ["always_keep", "<= 300", "(0, 301)"]),
    "keep negative": (dict(always_keep=[(-1, 5)]), ValueError, ["always_keep", "0 <= start", "(-1, 5)"]),
    "keep reversed": (dict(always_keep=[(7, 5)]), ValueError, ["always_keep", "start <= end", "(7, 5)"]),
    "keep flat": (dict(always_keep=[0, 5]), TypeError, ["always_keep", "pairs", "0"]),
    "keep pair": (dict(always_keep=(0, 5)), TypeError, ["always_keep", "pairs", "0"]),
    "keep triple": (dict(always_keep=[(0, 5, 7)]), TypeError, ["always_keep", "pairs", "(0, 5, 7)"]),
    "keep float": (dict(always_keep=[(0.0, 5.0)]), TypeError, ["always_keep", "ints", "(0.0, 5.0)"]),
    "keep string": (dict(always_keep="text"), TypeError, ["always_keep", "'text'"]),
    "keep int": (dict(always_keep=5), TypeError, ["always_keep", "got 5"]),
    "keep dict key": (dict(always_keep={"v": [(0, 5)]}), ValueError, ["always_keep", "'q' and 'k'", "'v'"]),
    "keep dict int": (dict(always_keep={"q": 5}), TypeError, ["always_keep", "pairs", "5"]),
    "keep dict None": (dict(always_keep={"q": None}), TypeError, ["always_keep", "pairs", "None"]),
    "block_mask N_k": (dict(block_mask=ONES(1, 1, 2, 4).bool()), ValueError, ["block_mask", "2, 5)", "(1, 1, 2, 4)"]),
    "block_mask N_q": (dict(block_mask=ONES(1, 1, 4, 5).bool()), ValueError, ["block_mask", "2, 5)", "(1, 1, 4, 5)"]),
    "block_mask heads": (dict(block_mask=ONES(1, 2, 2, 5).bool()), ValueError, ["block_mask", "4|1", "(1, 2, 2, 5)"]),
    "block_mask batch": (dict(block_mask=ONES(3, 1, 2, 5).bool()), ValueError, ["block_mask", "1|1", "(3, 1, 2, 5)"]),
    "block_mask rank": (dict(block_mask=ONES(2, 5).bool()), ValueError, ["block_mask", "2, 5)", "(2, 5)"]),
    "block_mask int": (dict(block_mask=ONES(1, 1, 2, 5).int()), TypeError, ["block_mask", "bool", "int32"]),
    "block_mask float": (dict(block_mask=ONES(1, 1, 2, 5)), TypeError, ["block_mask", "bool", "float32"]),
    "block_mask list": (dict(block_mask=[[True]]), TypeError, ["block_mask", "bool", "list"]),
    "block_mask None": (dict(block_mask=None), TypeError, ["block_mask", "bool", "None"]),
    "BlockMask of floats": (dict(block_mask=BlockMask(ONES(1, 1, 2, 5))), TypeError, ["block_mask", "bool", "(1, 1, 2, 5)", "float32"]),
    "BlockMask shape": (dict(block_mask=BlockMask.from_dense(ONES(2, 4).bool())), ValueError, ["block_mask", "2, 5)", "(1, 1, 2, 4)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    options, error, parts = CASES[name]
    with pytest.raises(error) as caught:
        call(**options)
    message = str(caught.value)
    argument, *rest = parts
    assert re.search(rf"(?<!\w){re.escape(argument)}(?!\w)", message), f"does not name {argument}: {message}"
    for part in rest:
        assert part in message, f"lacks {part!r}: {message}"
    assert re.search(r"\bmust\b|\bno backend\b", message), f"states no rule: {message}"
    assert "got" in message or "grad" in message or "order must be None" in message, f"does not tell the value: {message}"


def test_every_message_holds_a_remedy():
    """A clause after the value says what to do, or the rule spells out the one form or the few values that are wanted."""
    spelt_out = r"one of|'HND'|be True or False|be a number|be (a|an) (int|tensor|list|plan|BlockMask|torch.Tensor)|\(start, end\)|HND: B, H, S, D"
    without = []
    for name, (options, error, _) in CASES.items():
        with pytest.raises(error) as caught:
            call(**options)
        message = str(caught.value)
        if not re.search(r"[;:] ?\w+", message.partition("got")[2] or message) and not re.search(spelt_out, message):
            without.append(f"{name}: {message}")
    assert not without, "\n".join(without)


@pytest.mark.parametrize("function", [sparse_attention, block_sparse_attention, select_blocks])
def test_unknown_arguments_and_positional_options_are_refused(function):
    tensors = [x(*Q), x(*K)] + [x(*K)] * (function is not select_blocks) + [ONES(1, 1, 2, 5).bool()] * (function is block_sparse_attention)
    function(*tensors)
    with pytest.raises(TypeError, match="top_k"):
        function(*tensors, top_k=0.5)
    with pytest.raises(TypeError):
        function(*tensors, 0.5)


def test_select_blocks_checks_as_well():
    for options, error, parts in CASES.values():
        if set(options) & {"v", "block_mask", "pvthreshd", "compensate", "return_lse", "return_info"}:
            continue
        options = dict(options)
        with pytest.raises(error) as caught:
            select_blocks(options.pop("q", x(*Q)), options.pop("k", x(*K)), **options)
        assert all(part in str(caught.value) for part in parts[1:]), str(caught.value)


def test_block_sparse_attention_checks_as_well():
    mask = ONES(1, 1, 2, 5).bool()
    for name, (options, error, parts) in CASES.items():
        if set(options) & {"block_mask", "topk", "cdfthreshd", "simthreshd1", "score", "always_keep"}:
            continue
        with pytest.raises(error) as caught:
            call(**options, block_mask=mask)
        assert all(part in str(caught.value) for part in parts[1:]) or "block_mask" in str(caught.value), f"{name}: {caught.value}"


def test_grad_is_fine_under_no_grad():
    with torch.no_grad():
        out = call(q=GRAD, k=GRAD_K, v=GRAD_K)
    assert not out.requires_grad
    with torch.inference_mode():
        call(q=GRAD, k=GRAD_K, v=GRAD_K)
    call(q=GRAD.detach())


GIVEN = {"q": x(*Q), "k": x(*K), "v": x(*K), "key_mask": x(1, 300), "topk": ONES(4)}


def in_dual_level(function, value):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(value, ONES(value.shape)))


FORWARD = {
    "dual numbers": in_dual_level,
    "jvp": lambda function, value: torch.func.jvp(function, (value,), (value,)),
    "jvp of vmap": lambda function, value: torch.func.jvp(torch.vmap(function), (value[None],), (value[None],)),
    "vmap of jvp": lambda function, value: torch.vmap(lambda one: torch.func.jvp(function, (one,), (one,)))(value[None]),
    "grad of jvp": lambda function, value: torch.func.grad(lambda one: torch.func.jvp(function, (value,), (one,))[1].sum())(value),
}


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("way", FORWARD)
def test_a_forward_derivative_is_refused(way, name):
    """There is none: without a word it would be zeros."""
    with pytest.raises(ValueError, match=f"^{name} must have no tangent, got one: there is no forward-mode derivative; detach it$"):
        FORWARD[way](lambda value: call(**{name: value}), GIVEN[name])
    FORWARD[way](lambda value: call(**{name: value.detach()}) + 0 * value.sum(), GIVEN[name])


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("name", GIVEN)
def test_a_derivative_through_vmap_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name} must not require grad: there is no backward"):
        torch.func.grad(lambda values: torch.vmap(lambda value: call(**{name: value}))(values).sum())(GIVEN[name][None])


def test_what_is_allowed_is_not_refused():
    for options in (
        dict(topk=1), dict(topk=1.0), dict(topk=1e-9), dict(cdfthreshd=1), dict(simthreshd1=-1), dict(simthreshd1=1), dict(pvthreshd=1e-6),
        dict(scale=3), dict(always_keep=[]), dict(always_keep={}), dict(always_keep=[[0, 5], (5, 5)]), dict(always_keep=((0, 200),)),
        dict(causal=True, causal_offset=0), dict(topk=ONES(4)), dict(topk=ONES(4).double()), dict(pvthreshd=ONES(4)),
        dict(key_mask=ONES(1, 300).half()), dict(backend="torch"),
        dict(q=x(1, 4, 200, 256), k=x(1, 2, 300, 256)), dict(key_mask=ONES(1, 300).double()),
    ):  # fmt: skip
        assert call(**options).shape[:3] == (1, 4, 200)


def test_no_backend_for_a_device():
    for function in (lambda: call(q=x(*Q, device="meta"), k=x(*K, device="meta")), lambda: select_blocks(x(*Q, device="meta"), x(*K, device="meta"))):
        with pytest.raises(UnsupportedCall) as caught:
            function()
        assert set(caught.value.reasons) == {"cuda", "torch"} and "meta" in caught.value.reasons["torch"]
        assert "torch: " + caught.value.reasons["torch"] in str(caught.value) and "backend='torch'" in str(caught.value)
    assert isinstance(caught.value, RuntimeError)


def test_merge_lse_errors():
    a, la = x(1, 2, 5, 4), x(1, 2, 5)
    for arguments, parts in (
        ((a, la, x(1, 2, 6, 4), la), ["out_a", "(1, 2, 5, 4)", "(1, 2, 6, 4)"]),
        ((a, la, a, x(1, 2, 6)), ["lse_b", "(1, 2, 5)", "(1, 2, 6)"]),
    ):
        with pytest.raises(ValueError) as caught:
            merge_lse(*arguments)
        assert all(part in str(caught.value) for part in parts)
    for layout in ("HND", "NHD"):
        with pytest.raises(ValueError, match=r"out_a and out_b must have one 4-D shape .*got \(5, 4\), \(5, 4\)"):
            merge_lse(x(5, 4), x(5), x(5, 4), x(5), layout=layout)
    with pytest.raises(ValueError, match="layout must be one of HND, NHD, got 'x'"):
        merge_lse(a, la, a, la, layout="x")


@pytest.mark.parametrize("lse", [x(1, 2, 6), x(1, 5, 2), x(1, 1, 5)], ids=lambda t: str(tuple(t.shape)))
def test_merge_lse_refuses_an_lse_of_another_shape_than_its_output(lse):
    with pytest.raises(ValueError, match="lse"):
        merge_lse(x(1, 2, 5, 4), lse, x(1, 2, 5, 4), lse)
