"""The five names of thu-ml/SpargeAttn: their signatures, and that they do what their documentation says."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys

import pytest
import torch
from sparge_kernels import compat, select_blocks, sparse_attention

TAIL = "attention_sink=False, tensor_layout='HND', output_dtype=None, return_sparsity=False"
HEAD = "q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, smooth_k=True"
TOPK = f"{HEAD}, simthreshd1=-0.1, cdfthreshd=None, topk=0.5, pvthreshd=15, {TAIL}"
CDF = f"{HEAD}, simthreshd1=0.6, cdfthreshd=0.98, pvthreshd=50, {TAIL}"
BLOCK = f"q, k, v, mask_id=None, dropout_p=0.0, scale=None, smooth_k=True, pvthreshd=50, {TAIL}"
NAMES = {
    "spas_sage2_attn_meansim_topk_cuda": TOPK,
    "spas_sage_attn_meansim_topk_cuda": TOPK,
    "spas_sage2_attn_meansim_cuda": CDF,
    "spas_sage_attn_meansim_cuda": CDF,
    "block_sparse_sage2_attn_cuda": BLOCK,
}
MEANSIM = [name for name in NAMES if "meansim" in name]


@pytest.mark.parametrize("name", NAMES)
def test_signature(name):
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    got = ", ".join(p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default!r}" for p in parameters)
    assert got == NAMES[name]


@pytest.fixture
def qkv(clustered):
    return clustered(1, 2, 4, 700, 32), clustered(3, 2, 2, 700, 32), clustered(5, 2, 2, 700, 32)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", MEANSIM)
def test_meansim(rand, naive, name, causal):
    """Against the naive selection with the published score: GQA, judge, is_causal."""
    q, k, v = (
        3 * rand(n, 2, h, 6, 32).repeat_interleave(128, 2)[:, :, :700] + 0.3 * rand(n + 10, 2, h, 700, 32) for n, h in ((1, 4), (2, 2), (3, 2))
    )
    k[:, :, 200:300] += 3 * rand(20, 100, 32)  # two mixed blocks
    out, sparsity = getattr(compat, name)(q, k, v, is_causal=causal, return_sparsity=True)
    rule = dict(topk=0.5, simthreshd1=-0.1) if "topk" in name else dict(cdfthreshd=0.98, simthreshd1=0.6)
    expected = naive.select(q, k, **rule, causal=causal, score="mean")
    assert not expected.close.any() and not expected.kept.all()
    naive.check(out, q, k, v, blocks=expected.kept, causal=causal)
    density = expected.kept.sum((-2, -1)) / expected.visible.sum((-2, -1))
    assert type(sparsity) is float and sparsity == pytest.approx(1 - float(density.mean()), abs=1e-6)
    assert isinstance(getattr(compat, name)(q, k, v), torch.Tensor)


@pytest.mark.parametrize("name", MEANSIM)
def test_is_causal_sees_no_future(qkv, name):
    q, k, v = qkv
    call = getattr(compat, name)
    before = call(q, k, v, is_causal=True)
    k, v = k.clone(), v.clone()
    v[:, :, 300:] += 5
    after = call(q, k, v, is_causal=True)
    assert torch.equal(before[:, :, :300], after[:, :, :300]) and not torch.equal(before[:, :, 300:], after[:, :, 300:])


@pytest.mark.parametrize("name", NAMES)
def test_smooth_k_false_works(qkv, name):
    q, k, v = qkv
    options = {} if "block" in name else dict(simthreshd1=-0.1)
    torch.testing.assert_close(
        getattr(compat, name)(q, k, v, smooth_k=False, **options), getattr(compat, name)(q, k, v, **options), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", MEANSIM)
def test_scale_reaches_map_and_attention(qkv, naive, name):
    q, k, v = qkv
    rule = dict(cdfthreshd=0.7, simthreshd1=-0.1) | (dict(topk=0.1) if "topk" in name else {})
    out = getattr(compat, name)(q, k, v, scale=0.5, **rule)
    expected = naive.select(q, k, **rule, scale=0.5, score="mean")
    naive.check(out, q, k, v, blocks=expected.kept, scale=0.5)
    assert not torch.equal(expected.kept, naive.select(q, k, **rule, score="mean").kept)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32], ids=str)
def test_layout_and_output_dtype(qkv, name, layout, dtype):
    q, k, v = (x.half() for x in qkv)
    if layout == "NHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    call = getattr(compat, name)
    out, sparsity = call(q, k, v, tensor_layout=layout, output_dtype=dtype, return_sparsity=True)
    assert out.shape == q.shape and out.dtype == (dtype or torch.float16)
    reference = call(*qkv)
    out = out.transpose(1, 2) if layout == "NHD" else out
    assert (out.float() - reference).norm() / reference.norm() < 0.02


@pytest.mark.parametrize("form", ["(B,1,1,S) bool", "(B,S) bool", "(B,1,1,S) float", "(1,1,1,S) bool"])
def test_key_only_masks(qkv, naive, form):
    q, k, v = qkv
    mask = torch.rand(2, 700, generator=torch.Generator().manual_seed(1)) > 0.3
    if form.startswith("(1"):
        mask = mask[:1]
    if "float" in form:
        mask = torch.where(mask, 0.5, -math.inf)
    full = mask.expand(2, 700)
    out = compat.spas_sage2_attn_meansim_topk_cuda(q, k, v, attn_mask=mask if form.startswith("(B,S)") else mask[:, None, None], topk=1.0)
    naive.check(out, q, k, v, key_mask=full)


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 700, 700), (2, 1, 700, 700), (2, 4, 1, 700), (1, 1, 700, 700), (700, 700), (700,), (2, 1, 700), (3, 700), (2, 1, 1, 699)],
    ids=str,
)
@pytest.mark.parametrize("name", MEANSIM)
def test_other_masks_are_refused(qkv, name, shape):
    with pytest.raises(ValueError, match="attn_mask") as caught:
        getattr(compat, name)(*qkv, attn_mask=torch.ones(shape, dtype=torch.bool))
    assert str(shape) in str(caught.value), f"the message does not tell the shape it got: {caught.value}"


@pytest.mark.parametrize("name", MEANSIM)
def test_a_list_as_mask_is_refused(qkv, name):
    with pytest.raises(ValueError, match="attn_mask") as caught:
        getattr(compat, name)(*qkv, attn_mask=[True] * 700)
    assert "list" in str(caught.value), f"the message does not tell what it got: {caught.value}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("p", [0.1, -1, 1.0, math.nan])
def test_dropout_is_refused(qkv, name, p):
    with pytest.raises(ValueError, match="dropout_p must be 0") as caught:
        getattr(compat, name)(*qkv, dropout_p=p)
    assert repr(p) in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_attention_sink_keeps_the_first_block(qkv, name):
    q, k, v = qkv
    k = k.clone()
    k[:, :, :64] = -q.mean((0, 1, 2)) * 9  # nobody would choose it
    v = v.clone()
    options = dict(mask_id=torch.zeros(2, 4, 6, 11, dtype=torch.int32)) if "block" in name else dict(simthreshd1=-0.1)
    if "block" in name:
        options["mask_id"][..., 3] = 1
    elif "topk" in name:
        options["topk"] = 0.1
    else:
        options["cdfthreshd"] = 0.1

    def sensitive(sink):
        other = v.clone()
        other[:, :, :64] += 1e6
        return not torch.equal(
            getattr(compat, name)(q, k, v, attention_sink=sink, **options), getattr(compat, name)(q, k, other, attention_sink=sink, **options)
        )

    if "block" in name:
        assert not sensitive(False)
    assert sensitive(True)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int8, torch.float32], ids=str)
def test_block_mask_ids(qkv, naive, dtype):
    q, k, v = qkv
    blocks = torch.rand(2, 4, 6, 11, generator=torch.Generator().manual_seed(1)) > 0.5
    blocks[0, 1, 2] = False
    out, sparsity = compat.block_sparse_sage2_attn_cuda(q, k, v, mask_id=blocks.to(dtype), return_sparsity=True)
    naive.check(out, q, k, v, blocks=blocks)
    assert type(sparsity) is float and sparsity == pytest.approx(1 - float(blocks.float().mean()), abs=1e-6)
    naive.check(compat.block_sparse_sage2_attn_cuda(q, k, v), q, k, v)


@pytest.mark.parametrize("shape", [(2, 4, 6, 6), (2, 4, 11, 11), (2, 4, 6, 12), (2, 3, 6, 11), (2, 4, 12, 11)], ids=str)
def test_block_mask_of_another_shape_is_refused(qkv, shape):
    with pytest.raises(ValueError, match="mask") as caught:
        compat.block_sparse_sage2_attn_cuda(*qkv, mask_id=torch.ones(shape, dtype=torch.bool))
    assert str(shape) in str(caught.value)


def test_never_compensates_and_uses_the_mean_score(qkv):
    q, k, v = qkv
    out = compat.spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=0.2)
    assert torch.equal(out, sparse_attention(q, k, v, topk=0.2, score="mean"))
    assert not torch.equal(out, sparse_attention(q, k, v, topk=0.2, score="mean", compensate=True))
    assert not torch.equal(*(select_blocks(q, k, topk=0.2, score=s).to_dense() for s in ("mean", "subblock")))


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_install():
    """In a process of its own: by itself nothing is registered; install does; the real package is left alone."""
    out = run("""
import sys, types
import sparge_kernels
print("spas_sage_attn" in sys.modules)
sparge_kernels.compat.install()
import spas_sage_attn
print(spas_sage_attn is sparge_kernels.compat)
from spas_sage_attn import spas_sage2_attn_meansim_topk_cuda, block_sparse_sage2_attn_cuda
sparge_kernels.compat.install()
print(sys.modules["spas_sage_attn"] is sparge_kernels.compat)
real = types.ModuleType("spas_sage_attn")
sys.modules["spas_sage_attn"] = real
sparge_kernels.compat.install()
print(sys.modules["spas_sage_attn"] is real)
del sys.modules["spas_sage_attn"]
import importlib.machinery, importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, None) if name == "spas_sage_attn" else None
sys.meta_path.insert(0, Finder())
sparge_kernels.compat.install()
print("spas_sage_attn" in sys.modules)
""")
    assert out.split() == ["False", "True", "True", "True", "False"]
