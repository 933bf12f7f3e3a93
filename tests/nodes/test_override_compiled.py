"""The override in a model that torch.compile has compiled, whichever node came first."""

from __future__ import annotations

import comfy_models
import pytest
import torch

pytestmark = pytest.mark.usefixtures("no_gradients")


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
