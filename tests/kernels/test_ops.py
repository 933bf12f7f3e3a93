"""The torch.library operators: torch.compile, fake tensors, namespaces, two copies of the package in one process."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import pytest
import sparge_kernels
import torch
from sparge_kernels import BlockMask, block_sparse_attention, ops, order, select_blocks, sparse_attention
from sparge_kernels.call import Call, Rule
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

OPTIONS = {
    "topk": dict(topk=0.3),
    "cdf, lse": dict(cdfthreshd=0.6, return_lse=True),
    "info": dict(topk=0.3, return_info=True),
    "lse and info": dict(topk=0.3, return_lse=True, return_info=True),
    "causal": dict(topk=0.3, causal=True, causal_offset=-3, return_lse=True),
    "NHD": dict(topk=0.3, layout="NHD", return_lse=True),
    "always_keep": dict(topk=0.1, always_keep=[(0, 5)]),
    "compensate": dict(topk=0.2, compensate=True),
}


def leaves(result):
    result = result if isinstance(result, tuple) else (result,)
    flat = []
    for r in result:
        flat += [r] if isinstance(r, torch.Tensor) else [r.density, r.pv_skipped, r.kept.to_map(), r.kept.visible, r.kept.counts, r.pv_tiles]
    return flat


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_sparse_attention(clustered, name):
    q, k, v = clustered(1, 2, 4, 333, 16), clustered(3, 2, 2, 333, 16), clustered(5, 2, 2, 333, 16)
    options = OPTIONS[name]
    if options.get("layout") == "NHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    result = compiled(lambda q, k, v: sparse_attention(q + 0, k, v, **options))(q, k, v)
    for a, b in zip(leaves(result), leaves(sparse_attention(q, k, v, **options)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.mark.parametrize("options", [dict(), dict(return_info=True), dict(return_lse=True, causal=True)], ids=str)
@pytest.mark.parametrize("form", ["tensor", "BlockMask"])
def test_compiled_block_sparse_attention(clustered, form, options):
    q, k, v = (clustered(n, 1, 2, 333, 16) for n in (1, 3, 5))
    dense = torch.rand(1, 2, 3, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    mask = dense if form == "tensor" else BlockMask.from_dense(dense)
    result = compiled(lambda q, k, v: block_sparse_attention(q, k, v, mask, **options))(q, k, v)
    for a, b in zip(leaves(result), leaves(block_sparse_attention(q, k, v, mask, **options)), strict=True):
        assert torch.equal(a, b)


def test_compiled_with_mask_order_and_per_head_values(clustered):
    plan = order.plan("tiles", ((4, 8, 8), 20))
    q, k, v = (clustered(n, 1, 2, plan.length, 16) for n in (1, 3, 5))
    mask = torch.arange(plan.length)[None] % 5 > 0
    topk = torch.tensor([0.2, 0.6])

    def run(q, k, v, mask, topk):
        return sparse_attention(q, k, v, topk=topk, key_mask=mask, order=plan)

    assert torch.equal(compiled(run)(q, k, v, mask, topk), run(q, k, v, mask, topk))


def test_compiled_with_changing_lengths(clustered):
    run = compiled(lambda q, k, v: sparse_attention(q, k, v, topk=0.3))
    for s in (200, 333, 63, 500):
        q, k, v = (clustered(n, 1, 2, s, 16) for n in (1, 3, 5))
        assert torch.equal(run(q, k, v), sparse_attention(q, k, v, topk=0.3))


def test_compiled_with_changing_head_sizes(clustered):
    run = compiled(lambda q, k, v: sparse_attention(q, k, v, topk=0.3))
    for d in (16, 24, 40, 72):
        q, k, v = (clustered(n, 1, 2, 300, d) for n in (1, 3, 5))
        assert torch.equal(run(q, k, v), sparse_attention(q, k, v, topk=0.3))


def test_compiled_with_changing_numbers(clustered):
    """A schedule changes topk from step to step: torch.compile turns a float that changes into a symbol."""
    q, k, v = (clustered(n, 1, 2, 333, 16) for n in (1, 3, 5))
    run = compiled(lambda topk: sparse_attention(q, k, v, topk=topk))
    for topk in (0.2, 0.35, 0.5, 0.75):
        assert torch.equal(run(topk), sparse_attention(q, k, v, topk=topk))


@pytest.mark.parametrize("name", ["pvthreshd", "simthreshd1", "scale", "cdfthreshd"])
def test_compiled_with_other_changing_numbers(clustered, name):
    q, k, v = (clustered(n, 1, 2, 333, 16) for n in (1, 3, 5))
    run = compiled(lambda value: sparse_attention(q, k, v, **{name: value}))
    for value in (0.2, 0.35, 0.5):
        assert torch.equal(run(value), sparse_attention(q, k, v, **{name: value}))


def attend_arguments(q, k, v, rule=None, **options):
    call = Call.of(q, k, "torch", 0.25, **{"want_lse": True, "want_info": True, **options})
    return (q, k, v, *ops.pack(call, rule or Rule(0.3, None, -0.1)))


@pytest.mark.parametrize("case", ["plain", "out alone", "no lse", "no info", "map", "mask", "causal", "order", "per head", "NHD", "fp16"])
def test_opcheck_attend(clustered, case):
    q, k, v = clustered(1, 2, 4, 200, 16), clustered(3, 2, 2, 200, 16), clustered(5, 2, 2, 200, 16)
    options = {
        "no lse": dict(want_lse=False), "no info": dict(want_info=False), "out alone": dict(want_lse=False, want_info=False),
        "map": dict(rule=Rule(block_map=torch.ones(1, 1, 2, 4, dtype=torch.bool))), "causal": dict(causal=True, compensate=True),
        "mask": dict(key_mask=torch.arange(200).expand(2, 200) % 3 > 0), "order": dict(perm=torch.arange(200).flip(0)),
        "per head": dict(rule=Rule(torch.tensor([0.2, 0.4, 0.6, 1.0])), pvthreshd=torch.tensor([15.0, 9.0, 8.0, 7.0])),
    }.get(case, {})  # fmt: skip
    if case == "NHD":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if case == "fp16":
        q, k, v = q.half(), k.half(), v.half()
    torch.library.opcheck(ops._attend_operator, attend_arguments(q, k, v, **options))


def test_opcheck_select(clustered):
    q, k = clustered(1, 2, 4, 333, 16), clustered(3, 2, 2, 200, 16)
    call = Call.of(q, k, "torch", 0.25, causal=True, causal_offset=5, keep_q=(0, 5))
    torch.library.opcheck(ops._select_operator, (q, k, *ops.pack(call, Rule(None, 0.5, 0.3, "mean"))))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
def test_whoever_watches_a_call_sees_the_operator_and_nobody_else_pays_for_it(clustered, monkeypatch):
    q, k, v = (clustered(n, 1, 2, 200, 16) for n in (1, 3, 5))
    plain, mask = sparse_attention(q, k, v, topk=0.3), select_blocks(q, k, topk=0.3)
    seen = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watching():
        assert torch.equal(sparse_attention(q, k, v, topk=0.3), plain)
        assert torch.equal(select_blocks(q, k, topk=0.3).block_map, mask.block_map)
    assert seen.count(ops._attend_operator) == seen.count(ops._select_operator) == 1
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert isinstance(sparse_attention(q, k, v, topk=0.3), FakeTensor)
        assert isinstance(sparse_attention(*(fake.from_tensor(x) for x in (q, k, v)), topk=0.3), FakeTensor)
    outside = [FakeTensorMode().from_tensor(x) for x in (q,)] * 3
    assert isinstance(sparse_attention(*outside, topk=0.3), FakeTensor)
    traced = torch.jit.trace(lambda q, k, v: sparse_attention(q, k, v, topk=0.3), (q, k, v), check_trace=False)
    assert f"{ops.NAMESPACE}::attend" in str(traced.graph)
    for name in ("_attend_operator", "_select_operator"):
        monkeypatch.setattr(ops, name, None)
    assert torch.equal(sparse_attention(q, k, v, topk=0.3), plain) and torch.equal(select_blocks(q, k, topk=0.3).block_map, mask.block_map)


class Tagged(torch.Tensor):
    """A kind of tensor of somebody's own."""


SEEN = {
    "a negated view of v": lambda q, k, v: sparse_attention(q, k, torch._neg_view(-v), topk=0.3),
    "functionalize": lambda q, k, v: torch.func.functionalize(lambda x: sparse_attention(q, k, x, topk=0.3))(v),
    "vmap": lambda q, k, v: torch.vmap(lambda x: sparse_attention(q, k, x, topk=0.3))(torch.stack([v, v]))[1],
    "vmap, with everything": lambda q, k, v: torch.vmap(lambda x: sparse_attention(q, k, x, topk=0.3, return_lse=True, return_info=True)[0])(
        torch.stack([v, v])
    )[1],
    "a subclass as k alone": lambda q, k, v: sparse_attention(q, k.as_subclass(Tagged), v, topk=0.3).as_subclass(torch.Tensor),
    "a subclass as v alone": lambda q, k, v: sparse_attention(q, k, v.as_subclass(Tagged), topk=0.3).as_subclass(torch.Tensor),
    "a negated view of topk": lambda q, k, v: sparse_attention(q, k, v, topk=torch._neg_view(torch.full((2,), -0.3))),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("case", SEEN)
def test_what_the_dispatcher_has_to_do_first_is_done(clustered, monkeypatch, case):
    """The backends read addresses: of a negated view they would get the wrong sign, of a transform's tensor nothing."""
    q, k, v = (clustered(n, 1, 2, 200, 16) for n in (1, 3, 5))
    plain, calls, real = sparse_attention(q, k, v, topk=0.3), [], ops._attend_operator
    monkeypatch.setattr(ops, "_attend_operator", lambda *given: calls.append(given) or real(*given))
    assert torch.equal(SEEN[case](q, k, v), plain) and len(calls) == 1


def test_tensors_without_memory_go_through_the_dispatcher(clustered):
    """Zeros that are nowhere, as derivatives are made of, and shapes alone."""
    q, k, v = (clustered(n, 1, 2, 200, 16) for n in (1, 3, 5))
    assert torch.equal(sparse_attention(torch._efficientzerotensor(q.shape), k, v, topk=0.3), sparse_attention(torch.zeros_like(q), k, v, topk=0.3))
    shapes = [x.to("meta") for x in (q, k, v)]
    out, lse = sparse_attention(*shapes, topk=0.3, return_lse=True, backend="torch")
    assert out.is_meta and out.shape == q.shape and lse.is_meta and lse.shape == q.shape[:3]
    assert select_blocks(*shapes[:2], topk=0.3, backend="torch").block_map.shape == (1, 2, 2, 4)


PER_HEAD = {
    "vmap": lambda run, q, topk: torch.vmap(lambda x: run(q, x))(topk[None])[0],
    "functionalize": lambda run, q, topk: torch.func.functionalize(run)(q, topk),
    "make_fx": lambda run, q, topk: make_fx(run)(q, topk)(q, topk),
    "make_fx with fake tensors": lambda run, q, topk: make_fx(run, tracing_mode="fake")(q, topk)(q, topk),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("way", PER_HEAD)
def test_a_number_per_head_need_not_be_readable(clustered, way):
    q, topk = clustered(1, 1, 2, 200, 16), torch.tensor([0.3, 0.6])

    def run(q, topk):
        return sparse_attention(q, q, q, topk=topk)

    assert torch.equal(PER_HEAD[way](run, q, topk), run(q, topk))


def test_a_graph_made_before_dispatch_has_the_operator(clustered):
    q, k, v = (clustered(n, 1, 2, 200, 16) for n in (1, 3, 5))
    graph = make_fx(lambda q, k, v: sparse_attention(q, k, v, topk=0.3), pre_dispatch=True)(q, k, v).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"].count(ops._attend_operator) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_changes_nothing(clustered, dtype):
    q, k, v = (clustered(n, 1, 2, 200, 16) for n in (1, 3, 5))
    mask = torch.rand(1, 200, generator=torch.Generator().manual_seed(0)) > 0.3
    calls = [dict(key_mask=mask), dict(key_mask=torch.where(mask, 0.5, -math.inf)), dict(compensate=True), dict(causal=True, cdfthreshd=0.7)]
    plain = [sparse_attention(q, k, v, topk=0.3, return_lse=True, **call) for call in calls]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        found = [sparse_attention(q, k, v, topk=0.3, return_lse=True, **call) for call in calls]
    finally:
        torch.set_default_dtype(default)
    for (out, lse), (true, true_lse) in zip(found, plain, strict=True):
        assert torch.equal(out, true) and torch.equal(lse, true_lse)


def lying(x):
    return (x.data_ptr(), x.shape, x.stride()) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("per_head", [False, True])
def test_what_is_packed_comes_out_again(per_head):
    """Every field of both, through an operator's own idea of its arguments: tuples arrive as lists."""
    q, k = torch.zeros(2, 4, 200, 16), torch.zeros(2, 2, 333, 16)
    heads = torch.tensor([0.2, 0.4, 0.6, 1.0])
    rule = Rule(heads, None, heads, "mean") if per_head else Rule(0.3, 0.5, 0.1, block_map=torch.ones(1, 1, 2, 6, dtype=torch.bool))
    others = dict(perm=torch.arange(200), key_mask=torch.ones(2, 333), pvthreshd=heads) if per_head else {}
    call = Call.of(q, k, "torch", 0.5, True, 7, False, compensate=True, want_lse=True, want_info=True, keep_q=(1, 2), keep_k=(3, 4, 5, 6), **others)
    flat = tuple(list(x) if isinstance(x, tuple) else x for x in ops.pack(call, rule))
    assert len(flat) == len(ops._attend_operator._schema.arguments) - 3 == len(ops._select_operator._schema.arguments) - 2
    for made, given in zip(ops.unpack(q, k, flat), (call, rule), strict=True):
        assert type(made) is type(given)
        assert {name: lying(x) for name, x in made._asdict().items()} == {name: lying(x) for name, x in given._asdict().items()}


def test_namespace_comes_from_the_package_name():
    assert ops.NAMESPACE == "sparge_" + hashlib.sha1(b"sparge_kernels").hexdigest()[:8]
    assert ops._attend_operator is getattr(torch.ops, ops.NAMESPACE).attend.default


def test_two_copies_in_one_process(clustered, load_copy):
    copy = load_copy("sparge_kernels_second_copy")
    assert copy is not sparge_kernels and copy.sparse_attention is not sparse_attention
    assert sys.modules["sparge_kernels_second_copy.ops"].NAMESPACE == "sparge_" + hashlib.sha1(b"sparge_kernels_second_copy").hexdigest()[:8]
    assert sys.modules["sparge_kernels_second_copy.ops"]._attend_operator is not ops._attend_operator
    q, k, v = (clustered(n, 1, 2, 333, 16) for n in (1, 3, 5))
    a, ia = sparse_attention(q, k, v, topk=0.3, return_info=True)
    b, ib = copy.sparse_attention(q, k, v, topk=0.3, return_info=True)
    assert torch.equal(a, b) and torch.equal(ia.kept.to_map(), ib.kept.to_map())


def test_a_plan_of_the_other_copy_is_refused_or_taken_but_never_misread(clustered, load_copy):
    copy = load_copy("sparge_kernels_third_copy")
    plan = copy.order.plan("tiles", ((4, 8, 8),))
    q = clustered(1, 1, 1, 256, 16)
    try:
        out = sparse_attention(q, q, q, topk=0.3, order=plan)
    except TypeError as refused:
        assert "order" in str(refused)
    else:
        assert torch.equal(out, sparse_attention(q, q, q, topk=0.3, order=order.plan("tiles", ((4, 8, 8),))))


def test_reimport_under_the_same_name():
    """In a process of its own: the second import neither raises nor warns, and the first one's functions go on working."""
    code = """
import importlib, sys, warnings
warnings.simplefilter("error", UserWarning)
import torch, sparge_kernels as first
q = torch.randn(1, 2, 300, 16)
a = first.sparse_attention(q, q, q, topk=0.3)
old = first.sparse_attention
for name in [n for n in sys.modules if n.split(".")[0] == "sparge_kernels"]:
    del sys.modules[name]
del first
import gc
gc.collect()
import sparge_kernels as second
assert second.sparse_attention is not old
b = second.sparse_attention(q, q, q, topk=0.3)
del second
gc.collect()
c = old(q, q, q, topk=0.3)
assert torch.equal(a, b) and torch.equal(a, c)
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "fine", done.stderr
