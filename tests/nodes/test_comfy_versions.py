"""ComfyUI's versions: where their interfaces differ, both sides work, whichever tree is at hand; what it does not have is stood in for.

Differences that other tests hold on both sides: the order of HunyuanVideo's tokens (test_geometry.py, test_families.py), the arguments of
ON_PREPARE_STATE (test_override_chains.py), keys and values with fewer heads (test_override_calls.py), calls that want full precision
(test_override.py).
"""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_calls import KEY

NODES = Path(__file__).resolve().parents[2] / "nodes"
# The modules at the top of a ComfyUI tree. `comfy_kitchen` and `comfy_aimdo` come with newer ones.
COMFYUI = {
    "app", "comfy", "comfy_aimdo", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "comfy_kitchen", "comfyui_version", "execution",
    "folder_paths", "latent_preview", "node_helpers", "protocol", "server", "utils",
}  # fmt: skip


# One place for ComfyUI's names.


def comfyui_names(text: str) -> list[str]:
    """ComfyUI's modules that a source names: in imports at any depth, in calls that import by name, and in sys.modules."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module)
        elif isinstance(node, ast.Call | ast.Subscript):
            place, given = (node.func, node.args) if isinstance(node, ast.Call) else (node.value, [node.slice])
            if any(word in ast.unparse(place) for word in ("import", "find_spec", "sys.modules")):
                found += [item.value for item in given if isinstance(item, ast.Constant) and isinstance(item.value, str)]
    return [name for name in found if name.split(".")[0] in COMFYUI]


@pytest.mark.parametrize("path", sorted(NODES.rglob("*.py")), ids=lambda path: path.relative_to(NODES).as_posix())
def test_comfyui_is_named_in_one_file_only(path):
    named = comfyui_names(path.read_text(encoding="utf-8"))
    if path.name == "_comfy.py":
        assert named, "nodes/_comfy.py names nothing of ComfyUI: this test looks for the wrong names"
    else:
        assert not named, f"{path.name} names {named}; what is ComfyUI's belongs in nodes/_comfy.py"


@pytest.mark.parametrize(
    "source",
    [
        "import comfy",
        "import numpy, comfy.samplers as s",
        "from comfy.ldm.modules import attention",
        "from comfy_api.latest import io",
        "def late():\n    import folder_paths",
        "import importlib\nimportlib.import_module('comfy.sd')",
        "__import__('server')",
        "import sys\nsys.modules['execution']",
        "import sys\nsys.modules.get('server')",
    ],
)
def test_the_search_for_names_finds_them(source):
    assert comfyui_names(source)


@pytest.mark.parametrize(
    "source", ["from . import _comfy", "from ._comfy import io", "import comfyless", "{}.get('server')", "import_module('json')"]
)
def test_the_search_for_names_takes_nothing_else(source):
    assert not comfyui_names(source)


# The hook itself.


def test_a_comfyui_without_the_hook_is_named(nodes, tiny, patched, monkeypatch):
    """Before 0.3.60 nothing would ever be called: the node says so instead of doing nothing."""
    import comfy.ldm.modules.attention as attention

    model = tiny("wan_t2v")
    patched(model)
    monkeypatch.delattr(attention, "wrap_attn")
    with pytest.raises(RuntimeError, match=r"ComfyUI must be 0\.3\.60 or newer, got .*; update it"):
        patched(model)


def real_attention():
    from comfy.ldm.modules import attention

    return attention


def container_class():
    """The tree's holder of one tensor (since 0.33), or one that behaves as it does."""

    class Container:
        def __init__(self, tensor):
            self.tensor = tensor

        def take(self):
            tensor, self.tensor = self.tensor, None
            return tensor

    return getattr(real_attention(), "AttentionTensorContainer", Container)


def decorated(func, container):
    """ComfyUI's decorator around its attention functions as both kinds of tree have it, containers included."""

    def call(*args, **kwargs):
        override = (kwargs.get("transformer_options") or {}).get(KEY)
        if "_inside_attn_wrapper" in kwargs or override is None:
            return func(*args, **kwargs)
        held = isinstance(args[0], container)
        if held and hasattr(override, "container_function"):
            return override.container_function(*args, **kwargs)
        if held:
            args = (*(holder.take() for holder in args[:3]), *args[3:])
        return override(func, *args, **kwargs, _inside_attn_wrapper=True)

    return call


def inputs(heads=2, tokens=200, dim=64):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("decorator", ["the tree's", "newer"])
def test_tensors_that_come_in_containers(direct, reference, everything_kept, decorator):
    """Where an override has no `container_function`, ComfyUI takes the tensors out; then the call is one like any other."""
    ours, container = direct(topk=1.0), container_class()
    attention = real_attention()
    if decorator == "newer":
        function = decorated(attention.attention_pytorch.__wrapped__, container)
        call = [container(x) for x in inputs()]
    else:
        function = attention.attention_pytorch
        call = [container(x) for x in inputs()] if hasattr(attention, "AttentionTensorContainer") else inputs()
    with torch.no_grad():
        out = function(*call, 2, skip_reshape=True, transformer_options=ours.options)
    torch.testing.assert_close(out, reference(*inputs(), 2, skip_reshape=True), rtol=1e-4, atol=1e-5)
    assert ours.reasons() == [] and ours.run.calls == 1


@pytest.mark.parametrize("extra", [{}, dict(low_precision_attention=True, enable_gqa=False), dict(something_new=1)], ids=["old", "new", "unknown"])
def test_what_a_version_adds_to_a_call_is_passed_on_untouched(direct, passing, extra):
    """A declined call reaches the earlier override and ComfyUI's own attention with exactly the arguments that the model gave it."""
    earlier = passing()
    ours = direct(previous=earlier, min_tokens=4096)
    q, k, v = inputs()
    seen = []

    def func(*args, **kwargs):
        seen.append((args, kwargs))
        return q

    ours.patch.override(func, q, k, v, 2, skip_reshape=True, transformer_options=ours.options, _inside_attn_wrapper=True, **extra)
    ((args, kwargs),) = seen
    assert args == (q, k, v, 2) and earlier.seen[0][2] == kwargs
    assert kwargs == dict(skip_reshape=True, transformer_options=ours.options, _inside_attn_wrapper=True, **extra)


def test_the_functions_that_a_tree_registers_all_reach_the_override(direct):
    """Trees differ in the list of attention functions; each that the tree at hand offers by name asks the override first."""
    attention = real_attention()
    names = [name for name, value in vars(attention).items() if name.startswith("attention_") and hasattr(value, "__wrapped__")]
    registered = getattr(attention, "REGISTERED_ATTENTION_FUNCTIONS", {})
    assert {"attention_pytorch", "attention_basic", "attention_split", "attention_sub_quad"} <= set(names) and "pytorch" in registered
    functions = {getattr(attention, name) for name in names} | {f for f in registered.values() if hasattr(f, "__wrapped__")}
    with torch.no_grad():
        for function in functions:
            ours = direct()
            function(*inputs(), 2, skip_reshape=True, transformer_options=ours.options)
            assert ours.run.calls == 1 and ours.reasons() == [], function.__name__


# The wrappers around a run and a model call.


@pytest.mark.parametrize("more", [{}, dict(latent_shapes=[(1, 16, 1, 8, 8)]), dict(something_new=1)], ids=["old", "0.4", "unknown"])
def test_a_run_takes_what_its_version_gives(nodes, direct, more):
    ours = direct()
    sigmas, seen = torch.tensor([1.0, 0.0]), []

    def executor(*args, **kwargs):
        seen.append((args, kwargs))
        assert ours.patch.run is not None
        return "sampled"

    executor = type("Executor", (), {"__call__": staticmethod(executor), "class_obj": SimpleNamespace(model_patcher=ours.patcher)})()
    out = ours.patch.outer_sample(executor, "noise", "latent", "sampler", sigmas, None, None, True, 7, **more)
    assert out == "sampled" and seen == [(("noise", "latent", "sampler", sigmas, None, None, True, 7), more)] and ours.patch.run is None


def test_the_callbacks_and_wrappers_that_the_pack_uses_exist(nodes):
    for kind in ("OUTER_SAMPLE", "APPLY_MODEL"):
        assert isinstance(getattr(nodes._comfy.WRAPPERS, kind), str)
    assert issubclass(nodes._comfy.Interrupted, BaseException)


# The schema.


@pytest.mark.parametrize("known", [True, False], ids=["since 0.10", "before"])
def test_rarely_changed_inputs_are_marked_where_the_schema_knows_the_mark(nodes, known):
    widget = SimpleNamespace(id="backend", **({"advanced": None} if known else {}))
    assert nodes._comfy.mark_advanced(widget) is widget
    assert vars(widget).get("advanced", "absent") == (True if known else "absent")


def test_marked_inputs_of_sparge_attention(nodes):
    """On the tree at hand: the mark reaches the browser, or nothing changes."""
    given = nodes.patch.SpargeAttention.INPUT_TYPES()
    marked = [name for group in ("required", "optional") for name, (_, options) in given[group].items() if options.get("advanced")]
    known = hasattr(nodes._comfy.io.Int.Input("n"), "advanced")
    experts = ["simthreshd1", "cdfthreshd", "token_order", "compensate", "protect_references", "backend"]
    assert marked == (experts if known else [])
    assert [name for name, row in nodes.settings.INPUTS.items() if row.advanced] == experts  # topk and pvthreshd are sliders in plain sight
