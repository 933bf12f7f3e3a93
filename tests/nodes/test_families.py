"""Every model family of ComfyUI with a tiny model of its own: what is patched, what is counted, and which rows stay exact."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import comfy_models
import pytest
import torch

STEPS = 2
# Self-attention calls of one model call beside `TinyModel.layers`, which are the blocks over the main sequence.
MORE_LAYERS = {
    "lumina2": 2,  # two noise refiner blocks over the image alone
    "z_image": 2,  # the same
    "omnigen2": 1,  # one noise refiner block over the image alone
    "sd3": 1,  # the first block attends within the image as well (attn2)
    "sd15": 4,  # the blocks of the lower level
    "sdxl": 4,  # the same
}
# Calls of one model call that are no block's own self-attention, by what they attend to.
PROMPT, TEXT_REFINER = "cross-attention to {} tokens", "{} tokens, fewer than the picture has (a refiner, or another node merges tokens)"
UNNUMBERED = {
    "wan_t2v": {PROMPT.format(7): 2},
    "wan_2_2_5b": {PROMPT.format(7): 2},
    "wan_i2v": {PROMPT.format(7): 2, PROMPT.format(257): 2},  # the picture's CLIP tokens as well
    "wan_vace": {PROMPT.format(7): 3},  # two blocks and a side block
    "ltxv": {PROMPT.format(16): 2},  # with its padding, which is masked
    "cosmos1": {PROMPT.format(7): 2},
    "cosmos_predict2": {PROMPT.format(7): 2},
    "kandinsky5": {PROMPT.format(7): 2, TEXT_REFINER.format(7): 1},
    "sd15": {PROMPT.format(77): 7},
    "sdxl": {PROMPT.format(77): 7},
    "hunyuan_video": {TEXT_REFINER.format(7): 2},
    "hunyuan_video_1_5": {TEXT_REFINER.format(7): 2},
    "lumina2": {TEXT_REFINER.format(7): 2},  # context refiner
    "z_image": {TEXT_REFINER.format(32): 2},  # the same, padded
    "omnigen2": {TEXT_REFINER.format(7): 1, TEXT_REFINER.format(255): 1},  # context refiner; refiner of the reference of 255 tokens
}
VARIANTS = {
    "row_major": dict(token_order="row_major"),
    "tiles": dict(token_order="tiles"),
    "hilbert": dict(token_order="hilbert"),
    "references": dict(token_order="row_major", protect_references=True),
    "references_tiles": dict(token_order="tiles", protect_references=True),
}


@dataclass
class Case:
    model: comfy_models.TinyModel
    dense: torch.Tensor
    exact: torch.Tensor  # topk 1
    sparse: torch.Tensor  # topk 0.3
    exact_run: dict
    run: dict
    model_calls: int
    # Of each main call in one step: dense output and the output of each variant, as (B, S, H * D); and the spans that geometry found.
    outputs: list[dict] = field(default_factory=list)
    spans: list = field(default_factory=list)


def spy_on(patcher, patches, reference, keep, length):
    """A clone whose self-attention calls over `length` tokens are answered densely, after each of `patches` was asked too."""
    from comfy.patcher_extension import WrappersMP

    clone = patcher.clone()

    def spy(func, *args, **kwargs):
        given = bind(*args, **kwargs)
        axis = 2 if given["skip_reshape"] else 1
        if given["q"].shape[axis] != given["k"].shape[axis] or (length is not None and given["q"].shape[axis] != length):
            return func(*args, **kwargs)
        rows = (lambda out: out.transpose(1, 2).flatten(2)) if given["skip_output_reshape"] else (lambda out: out)
        outputs = {"dense": rows(reference(**given))}
        for name, patch in patches.items():
            outputs[name] = rows(patch.override(func, *args, **kwargs))
        first = next(iter(patches.values()))
        options = kwargs["transformer_options"]
        keep(outputs, options["sparge_calls"].contexts[first.key].spans(given["q"].shape[axis], options), options)
        return func(*args, **kwargs)

    def put_on_top(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **conds):
        options = {**transformer_options, "optimized_attention_override": spy}
        return executor(x, t, c_concat, c_crossattn, control, options, **conds)

    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "zz_spy", put_on_top)
    return clone


def bind(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **_):
    return locals() | {}


NEVER_INTERCEPTED = {"pixart": "PixArt", "hunyuan_dit": "HunyuanDiT"}
INTERCEPTED = [name for name in comfy_models.FAMILIES if name not in NEVER_INTERCEPTED]
every_family = pytest.mark.parametrize("case", comfy_models.FAMILIES, indirect=True, scope="module")
intercepted = pytest.mark.parametrize("case", INTERCEPTED, indirect=True, scope="module")
never_intercepted = pytest.mark.parametrize("case", NEVER_INTERCEPTED, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(comfy, node_modules, reference, request):
    name = request.param
    if missing := comfy_models.available(name):
        pytest.skip(missing)
    patch, runs = node_modules.patch, node_modules.telemetry.runs
    model = comfy_models.build(name)
    assert model.intercepted == (name in INTERCEPTED)

    def sampled(**settings):
        out = comfy_models.sample(model, patch.install(model.patcher, node_modules.settings.Settings(min_tokens=0, **settings)), steps=STEPS)
        return out, runs.closed[-1].to_dict()

    recorder = comfy_models.Recorder()
    dense = comfy_models.sample(model, recorder.install(model.patcher), steps=STEPS)
    with pytest.MonkeyPatch.context() as patching:  # topk 1 is a dense run to users; here everything kept goes through the kernels
        patching.setattr(node_modules.settings, "DENSE_AT_TOPK_1", False)
        exact, exact_run = sampled(topk=1.0)
    sparse, run = sampled(topk=0.3)
    found = Case(model, dense, exact, sparse, exact_run, run, len(recorder.model_calls))
    if model.intercepted:
        patcher = model.patcher
        has_references = any(kind == "reference" for kind, _ in model.segments)
        names = [variant for variant in VARIANTS if has_references or not variant.startswith("references")]
        for variant in names:
            patcher = patch.install(patcher, node_modules.settings.Settings(topk=0.3, min_tokens=0, **VARIANTS[variant]))
        patches = dict(zip(names, patch.patches_of(patcher), strict=True))

        def keep(outputs, spans, options):
            found.outputs.append(outputs)
            found.spans.append(spans)

        comfy_models.sample(model, spy_on(patcher, patches, reference, keep, model.tokens), steps=1)
    return found


def spans(segments, *kinds) -> list[slice]:
    ends = torch.tensor([comfy_models.length(segment) for segment in segments]).cumsum(0).tolist()
    return [slice(a, b) for (kind, _), a, b in zip(segments, [0, *ends], ends, strict=False) if kind in kinds]


@every_family
def test_everything_kept_is_the_unpatched_model(case):
    torch.testing.assert_close(case.exact, case.dense, rtol=1e-5, atol=1e-5)
    if case.model.intercepted:
        assert case.exact_run["totals"]["density"] == 1.0
        assert case.exact_run["totals"]["sparse_calls"] == case.run["totals"]["sparse_calls"] > 0


@intercepted
def test_sparse_run_is_sparse_and_counted(case, node_modules):
    model, run = case.model, case.run
    # Where ComfyUI numbers the blocks, VACE's side block has the number of the block that it belongs to.
    shared = int(model.name == "wan_vace" and node_modules.geometry.numbered_blocks(model.patcher.model.diffusion_model) > 0)
    layers = model.layers + MORE_LAYERS.get(model.name, 0) - shared
    assert run["steps"] == STEPS and run["layers"] == layers
    assert [(c["step"], c["layer"]) for c in run["cells"]] == [(s, n) for s in range(STEPS) for n in range(layers)]
    a_step = case.model_calls // STEPS
    assert case.model_calls == a_step * STEPS
    for cell in run["cells"]:
        calls = a_step * (1 + (shared if cell["layer"] == 0 else 0))
        assert (cell["sparse_calls"], cell["dense_calls"], cell["reasons"]) == (calls, 0, {}), cell
        assert cell["density"] < 1
    assert run["reasons"] == {reason: count * case.model_calls for reason, count in UNNUMBERED.get(model.name, {}).items()}
    assert run["totals"]["dense_calls"] == sum(run["reasons"].values())
    assert run["totals"]["sparse_calls"] == (layers + shared) * case.model_calls
    assert run["totals"]["density"] < 0.6
    assert run["note"] is None and run["tokens"] == model.tokens
    change = (case.sparse - case.dense).norm() / case.dense.norm()
    assert 1e-3 < change < 1, f"the output changed by {change:.3%}"


@never_intercepted
def test_families_that_never_reach_the_hook_say_so(case):
    for run in (case.run, case.exact_run):
        assert run["family"] in run["note"] and "does not route" in run["note"]
        assert run["totals"]["sparse_calls"] == run["totals"]["dense_calls"] == 0 and run["cells"] == []
        assert NEVER_INTERCEPTED[case.model.name] == run["family"]
    assert torch.equal(case.sparse, case.dense)


@intercepted
def test_spans_are_the_models(case):
    model = case.model
    expected = []
    for kind, size in model.segments:
        if kind == "pad" and expected and expected[-1][0] == "text":
            expected[-1] = ("text", expected[-1][1] + size)
        else:
            expected.append(("rest" if kind == "pad" else kind, size))
    assert case.spans
    for spans in case.spans:
        assert spans is not None
        assert [(part.kind, part.size) for part in spans.parts] == expected


@intercepted
def test_protected_rows_are_exact(case):
    """Text rows in every token order, and reference rows where those are protected, equal dense attention; the picture's rows do not."""
    model = case.model
    assert len(case.outputs) == model.layers
    for outputs in case.outputs:
        dense = outputs["dense"]
        for variant in outputs.keys() - {"dense"}:
            exact = ("text", "reference") if variant.startswith("references") else ("text",)
            for rows in spans(model.segments, *exact):
                torch.testing.assert_close(outputs[variant][:, rows], dense[:, rows], rtol=1e-5, atol=1e-5, msg=lambda m, v=variant: f"{v}: {m}")
            for rows in spans(model.segments, "grid", *({"reference"} - set(exact))):
                error = (outputs[variant][:, rows] - dense[:, rows]).norm() / dense[:, rows].norm()
                assert error > 1e-3, f"{variant}: rows {rows} are as good as dense ({error:.1e})"
    if len(case.outputs[0]) > 2:
        assert not torch.equal(case.outputs[0]["tiles"], case.outputs[0]["row_major"])


# Conditional and unconditional, in one model call or in two.


def two_prompts(tiny, negative_tokens: int, batch: int = 1):
    """The small Qwen-Image with classifier-free guidance, a prompt of 7 tokens and one of `negative_tokens`."""
    model, other = tiny("qwen_image", latent=(batch, 16, 1, 32, 32)), tiny("qwen_image", latent=(batch, 16, 1, 32, 32), prompt=negative_tokens)
    return replace(model, negative=other.negative)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("negative", "calls_a_step"), [(7, 1), (31, 2)], ids=["batched", "apart"])
def test_guidance(nodes, tiny, patched, last_run, reference, everything_kept, negative, calls_a_step, batch):
    model = two_prompts(tiny, negative, batch)
    recorder = comfy_models.Recorder()
    dense = comfy_models.sample(model, recorder.install(model.patcher))
    assert len(recorder.model_calls) == STEPS * calls_a_step, "the conditions are not run as this test needs them"
    torch.testing.assert_close(comfy_models.sample(model, patched(model, topk=1.0)), dense, rtol=1e-5, atol=1e-5)
    assert last_run()["totals"]["sparse_calls"] == STEPS * calls_a_step * 2 and last_run()["reasons"] == {}
    sparse = comfy_models.sample(model, patched(model))
    run = last_run()
    assert [(c["step"], c["layer"], c["sparse_calls"]) for c in run["cells"]] == [(s, n, calls_a_step) for s in range(2) for n in range(2)]
    assert run["reasons"] == {} and run["totals"]["density"] < 0.9
    assert sparse.shape[0] == batch and (sparse - dense).norm() > 1e-3 * dense.norm()

    texts = []

    def keep(outputs, spans, options):
        text = outputs["dense"].shape[1] - 256
        assert [(p.kind, p.size) for p in spans.parts] == [("text", text), ("grid", (1, 16, 16))]
        torch.testing.assert_close(outputs["ours"][:, :text], outputs["dense"][:, :text], rtol=1e-5, atol=1e-5)
        assert outputs["dense"].shape[0] == batch * len(options["cond_or_uncond"])
        texts.append(text)

    patcher = patched(model)
    (patch,) = nodes.patch.patches_of(patcher)
    comfy_models.sample(model, spy_on(patcher, {"ours": patch}, reference, keep, None), steps=1)
    assert sorted(set(texts)) == sorted({7, negative}) and len(texts) == 2 * calls_a_step
