"""The tiny models are what `comfy_models` says: their layers, their token order, and an output that attention decides."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace

import comfy_models
import pytest
import torch

# Where the families that never reach the hook take their attention function from.
UNHOOKED = {"pixart": "comfy.ldm.pixart.blocks", "hunyuan_dit": "comfy.ldm.hydit.attn_layers"}
# First row of the prompt in the text segment: byT5 (6) and register tokens (8) stand in front of it; behind HiDream's T5 stands LLaMA.
PROMPT_AT = {"hunyuan_video_1_5": 6, "auraflow": 8}
CONVOLUTIONS_FIRST = ("sd15", "sdxl")


@pytest.fixture(scope="module", params=comfy_models.FAMILIES)
def model(comfy, request):
    if missing := comfy_models.available(request.param):
        pytest.skip(missing)
    return comfy_models.build(request.param)


@pytest.fixture(scope="module")
def recorded(model):
    """What a run of two steps was seen to do, and its output."""
    recorder = comfy_models.Recorder()
    return recorder, comfy_models.sample(model, recorder.install(model.patcher))


def test_layers_and_lengths(model, recorded):
    recorder, out = recorded
    assert torch.isfinite(out).all() and out.shape == model.latent.shape
    assert sum(comfy_models.length(segment) for segment in model.segments) == model.tokens >= 1024
    assert len(recorder.model_calls) == 2
    if model.intercepted:
        assert recorder.calls
        assert len(recorder.main(model)) == model.layers * len(recorder.model_calls)
    else:
        assert not recorder.calls


def test_output_depends_on_attention(model, recorded, monkeypatch):
    def nothing(func, *args, **kwargs):
        out = func(*args, **kwargs)
        axis = 2 if kwargs.get("skip_reshape") else 1
        self_attention = (args[0].shape[axis], args[1].shape[axis]) == (model.tokens, model.tokens)
        return torch.zeros_like(out) if self_attention else out

    _, with_attention = recorded
    patcher = model.patcher.clone()
    if model.intercepted:
        patcher.model_options["transformer_options"]["optimized_attention_override"] = nothing
    else:
        module = importlib.import_module(UNHOOKED[model.name])
        func = module.optimized_attention
        monkeypatch.setattr(module, "optimized_attention", lambda *args, **kwargs: nothing(func, *args, **kwargs))
    change = (comfy_models.sample(model, patcher) - with_attention).norm() / with_attention.norm()
    assert change > 0.01, f"without attention the output of {model.name} changes by {change:.3%} only"


def keys_of(model, noise, inputs):
    """The first main layer's keys, (B, tokens, channels)."""
    recorder = comfy_models.Recorder(keep=True)
    comfy_models.sample(inputs, recorder.install(model.patcher), steps=1, noise=noise)
    call = recorder.main(model)[0]
    return call.tensors[1].transpose(1, 2).flatten(2) if call.skip_reshape else call.tensors[1]


@pytest.fixture(scope="module")
def plain(model):
    """A noise, and the keys under it."""
    if not model.intercepted:
        pytest.skip(f"no override sees {model.name}")
    noise = torch.randn(model.latent.shape, generator=torch.Generator().manual_seed(3))
    return noise, keys_of(model, noise, model)


def changed_rows(model, plain, other_noise=None, **other_inputs):
    """By how much each row of the keys changes, relative to the largest change: [tokens]."""
    noise, keys = plain
    change = (keys_of(model, noise if other_noise is None else other_noise, replace(model, **other_inputs)) - keys).abs().amax(dim=(0, 2))
    return change / change.max()


def spans(model, *kinds):
    """(first, last + 1) of each segment of these kinds."""
    ends = torch.tensor([comfy_models.length(segment) for segment in model.segments]).cumsum(0).tolist()
    return [(first, last) for (kind, _), first, last in zip(model.segments, [0, *ends], ends, strict=False) if kind in kinds]


def test_grid_stands_where_the_segments_say(model, plain):
    """One latent pixel changes, and the token that changes most is the one that row-major order over (T, H, W) gives."""
    ((first, _),) = spans(model, "grid")
    ((_, grid),) = [segment for segment in model.segments if segment[0] == "grid"]
    size = (1, *model.latent.shape[2:]) if model.latent.ndim == 4 else model.latent.shape[2:]
    step = [math.ceil(n / tokens) for n, tokens in zip(size, grid, strict=True)]
    place = [max(tokens - 3, 0) for tokens in grid]
    token = first + (place[0] * grid[1] + place[1]) * grid[2] + place[2]
    other = plain[0].clone()
    pixel = [slice(p * s, (p + 1) * s) for p, s in zip(place, step, strict=True)]
    other[(..., *pixel[1:]) if model.latent.ndim == 4 else (..., *pixel)] += 4.0
    change = changed_rows(model, plain, other)
    found = change.argmax().item()
    if model.name in CONVOLUTIONS_FIRST:
        assert found in [token + row * grid[2] + column for row in (-1, 0, 1) for column in (-1, 0, 1)]
    else:
        assert found == token
    for start, end in spans(model, "text", "reference"):
        assert change[start:end].max() == 0


def test_text_and_references_stand_where_the_segments_say(model, plain):
    ((embedding, options),) = model.positive
    for start, end in spans(model, "text"):
        other = embedding.clone()
        other[:, 4] += 3.0 * torch.randn(embedding.shape[2], generator=torch.Generator().manual_seed(5))
        change = changed_rows(model, plain, positive=[[other, options]])
        assert change.argmax() == start + PROMPT_AT.get(model.name, 0) + 4 < end
        if model.name != "mochi":  # its pooled prompt modulates every row
            assert all(change[first:last].max() == 0 for first, last in spans(model, "grid", "reference"))
    for i, (start, end) in enumerate(spans(model, "reference")):
        references = list(options["reference_latents"])
        references[i] = references[i] + 1.0
        change = changed_rows(model, plain, positive=[[embedding, {**options, "reference_latents": references}]])
        assert change[start:end].min() > 0
        assert all(change[first:last].max() == 0 for first, last in spans(model, "text", "grid"))


def test_changes_reach_the_model(comfy):
    model = comfy_models.build("flux", latent=(1, 16, 64, 66), prompt=11, depth=1)
    assert model.segments == (("text", 11), ("grid", (1, 32, 33))) and model.layers == 4
    assert comfy_models.build("z_image", prompt=32).segments[1][0] == "grid"  # 32 needs no padding


def test_seeded(comfy):
    first, second = comfy_models.build("wan_t2v"), comfy_models.build("wan_t2v")
    assert torch.equal(comfy_models.sample(first), comfy_models.sample(second))
