"""The presets: the table itself, which model gets which row, and what the node makes of it in runs of every length."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import comfy_models
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
ROWS = {  # tiny model -> family; the others have no row
    "flux": "flux",
    "flux_kontext": "flux",
    "chroma": "chroma",
    "mochi": "mochi",
    "hunyuan_video": "hunyuan_video",
    "hunyuan_video_1_5": "hunyuan_video_1_5",
    "wan_t2v": "wan_t2v",
    "wan_i2v": "wan_i2v",
    "wan_vace": "wan_vace",
    "wan_2_2_5b": "wan_2_2_5b",
    "ltxv": "ltxv",
    "qwen_image": "qwen_image",
    "qwen_image_edit": "qwen_image",
    "cosmos1": "cosmos1",
    "cogvideox": "cogvideox",
}


@pytest.fixture(autouse=True)
def inference_mode():
    """As ComfyUI's server runs every node; some samplers leave gradients on by themselves."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def presets(pack):
    return importlib.import_module(f"{pack.__name__}.nodes.presets")


@pytest.mark.parametrize("name", comfy_models.FAMILIES)
def test_a_model_gets_its_familys_row_or_none(comfy, presets, tiny, name):
    if missing := comfy_models.available(name):
        pytest.skip(missing)
    found = presets.preset_for(tiny(name).patcher.model.diffusion_model)
    assert (found and found.family) == ROWS.get(name)


def test_wan_2_2_i2v_takes_its_picture_without_clip(comfy, presets, tiny):
    model = tiny("wan_t2v", latent=(1, 16, 3, 41, 37), in_dim=36)
    assert presets.preset_for(model.patcher.model.diffusion_model).family == "wan_2_2_i2v"


def test_a_compiled_model_is_recognised(comfy, presets, tiny):
    compiled = SimpleNamespace(_orig_mod=tiny("wan_t2v").patcher.model.diffusion_model)
    assert presets.preset_for(compiled).family == "wan_t2v"


def _stand_in(cls: str, base: type = object, **attributes):
    return type(cls, (base,), {})() if not attributes else type(cls, (base,), attributes)()


@pytest.mark.parametrize(
    "model",
    [
        _stand_in("Flux", params=SimpleNamespace(vec_in_dim=None)),  # Flux 2, LongCat
        _stand_in("HunyuanVideo", vision_in_dim=None, params=SimpleNamespace(vec_in_dim=None)),  # HunyuanImage
        _stand_in("AnimateWanModel", base=type("WanModel", (), {"model_type": "t2v", "in_dim": 16, "out_dim": 16})),
        _stand_in("Flux"),  # nothing that tells what it is
        None,
    ],
    ids=["flux2", "hunyuan_image", "derived_from_wan", "bare", "none"],
)
def test_what_only_looks_like_a_family_has_no_row(presets, model):
    assert presets.preset_for(model) is None


def test_every_row_is_legal_and_says_where_it_comes_from(nodes, presets):
    assert {row.family for row in presets.PRESETS.values()} == set(ROWS.values()) | {"wan_2_2_i2v"}
    assert len({row.label for row in presets.PRESETS.values()}) == len(presets.PRESETS)
    for family, row in presets.PRESETS.items():
        values = {name: getattr(row, name) for name in ("topk", "start_percent", "end_percent", "dense_blocks")}
        assert nodes.settings.check(values) is None, family
        # The widgets' steps: a workflow must be able to write the value as it is.
        assert all(abs(values[name] * 100 - round(values[name] * 100)) < 1e-9 for name in ("topk", "start_percent", "end_percent")), family
        assert row.family == family and row.label and "not yet measured here" in row.source and "\n" not in row.source
        assert row.topk == 0.5, "auto gives what saved prompts have: the default of the input"


def test_the_help_pages_have_the_table(presets):
    rows = [(row.label, f"{row.start_percent:g}", row.dense_blocks, row.source) for row in presets.PRESETS.values()]
    for page, empty, last in (("SpargeAttention.md", "empty", 4), ("SpargeAttention/zh.md", "空", 3)):
        text = (ROOT / "web" / "docs" / page).read_text(encoding="utf-8")
        told = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines() if re.match(r"\| [A-Z].* \| 0\.\d", line)]
        wanted = [(label, start, blocks or empty, source.removesuffix("; not yet measured here"))[:last] for label, start, blocks, source in rows]
        assert told == wanted, page


# The node.

EARLY = "(the preset's 0.24 is not before your end_percent)"
DEFAULTS = dict(start_percent=0.0, end_percent=1.0, dense_blocks="")
LEVELS = {"careful": 0.7, "balanced": 0.5, "fast": 0.3}


@pytest.fixture
def execute(nodes, tiny):
    """`execute(name, **values)`: the patched model that the node makes of a tiny one, and its settings; short sequences count."""

    def run(name: str = "wan_t2v", **values):
        (patcher,) = nodes.patch.SpargeAttention.execute(tiny(name).patcher, **{"topk": 0.3, "min_tokens": 0, **values}).args
        (patch,) = nodes.patch.patches_of(patcher)
        return patcher, patch.settings

    return run


def in_force(settings) -> tuple:
    shown = settings.shown()
    return shown["start_percent"], shown["end_percent"], shown["dense_blocks"], shown["preset"]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_auto_takes_the_row_where_nothing_was_changed(presets, execute, name):
    if missing := comfy_models.available(name):
        pytest.skip(missing)
    row = presets.PRESETS[ROWS[name]]
    settings = execute(name, preset="auto", **DEFAULTS)[1]
    assert in_force(settings) == (row.start_percent, row.end_percent, row.dense_blocks, row.label)
    assert settings.topk == 0.3  # the user's


@pytest.mark.parametrize("values", [{}, {"preset": "off"}], ids=["absent", "off"])
def test_without_a_preset_everything_is_as_it_was(nodes, execute, values):
    assert execute(**DEFAULTS, **values)[1] == nodes.settings.Settings(topk=0.3, min_tokens=0)


def test_auto_changes_nothing_for_other_models(nodes, execute):
    assert execute("auraflow", preset="auto", **DEFAULTS)[1] == nodes.settings.Settings(preset="auto", topk=0.3, min_tokens=0)


@pytest.mark.parametrize(
    ("values", "expected", "line"),
    [
        (dict(topk=0.3), (0.24, 1.0, "0"), "topk 0.3 (yours; preset: 0.5), start_percent 0.24, dense_blocks 0"),
        ({}, (0.24, 1.0, "0"), "start_percent 0.24, dense_blocks 0"),
        (dict(dense_blocks=" , "), (0.24, 1.0, "0"), "start_percent 0.24, dense_blocks 0"),  # empty
        (dict(start_percent=0.4), (0.4, 1.0, "0"), "start_percent 0.4 (yours; preset: 0.24), dense_blocks 0"),
        (dict(start_percent=0.24), (0.24, 1.0, "0"), "start_percent 0.24, dense_blocks 0"),
        (dict(end_percent=0.9), (0.24, 0.9, "0"), "start_percent 0.24, end_percent 0.9 (yours; preset: 1), dense_blocks 0"),
        (dict(dense_blocks="1, -1"), (0.24, 1.0, "1, -1"), "start_percent 0.24, dense_blocks 1, -1 (yours; preset: 0)"),
        # The preset's start would leave the user's window empty.
        (dict(end_percent=0.2), (0.0, 0.2, "0"), f"start_percent 0 {EARLY}, end_percent 0.2 (yours; preset: 1), dense_blocks 0"),
        (dict(end_percent=0.24), (0.0, 0.24, "0"), f"start_percent 0 {EARLY}, end_percent 0.24 (yours; preset: 1), dense_blocks 0"),
        (
            dict(start_percent=0.1, end_percent=0.2),
            (0.1, 0.2, "0"),
            "start_percent 0.1 (yours; preset: 0.24), end_percent 0.2 (yours; preset: 1), dense_blocks 0",
        ),
    ],
    ids=["topk", "none", "empty_blocks", "start", "same_start", "end", "blocks", "early_end", "end_at_the_start", "a_window_of_the_users"],
)
def test_what_the_user_changed_wins_and_the_line_says_so(execute, values, expected, line):
    settings = execute(preset="auto", **{"topk": 0.5, **DEFAULTS, **values})[1]
    assert in_force(settings) == (*expected, "Wan 2.1 / 2.2 t2v")
    assert settings.preset_line() == f"preset Wan 2.1 / 2.2 t2v: {line}"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["wan_i2v", "mochi", "auraflow"])
def test_a_named_preset_decides_alone(presets, execute, level, name):
    """Whatever stands in its inputs; steps and blocks are the family's, or careful values for a model that is in no row."""
    if missing := comfy_models.available(name):
        pytest.skip(missing)
    row = presets.PRESETS[ROWS[name]] if name in ROWS else presets.LEVELS[level]
    for values in ({}, dict(topk=0.9, start_percent=0.6, end_percent=0.8, dense_blocks="7")):
        settings = execute(name, preset=level, **values)[1]
        label = f"{level}, {row.label}" if name in ROWS else level
        assert (settings.topk, *in_force(settings)) == (LEVELS[level], row.start_percent, row.end_percent, row.dense_blocks, label)
        assert name in ROWS or in_force(settings)[:3] == (0.2, 1.0, "0")


def test_the_lines_of_named_presets(execute):
    line = execute(preset="fast", topk=0.5)[1].preset_line()
    assert line == "preset fast, Wan 2.1 / 2.2 t2v: topk 0.3, start_percent 0.24, dense_blocks 0 (the inputs' 0.5, 0, empty are not used)"
    line = execute(preset="balanced", topk=0.5, start_percent=0.24, dense_blocks="0")[1].preset_line()
    assert line == "preset balanced, Wan 2.1 / 2.2 t2v: start_percent 0.24, dense_blocks 0"  # the inputs say so, too
    assert execute(preset="fast", topk=1, start_percent=0, end_percent=1)[1].preset_line().endswith("(the inputs' 1, 0, empty are not used)")
    line = execute("auraflow", preset="careful", topk=0.5, end_percent=0.9)[1].preset_line()
    assert line == "preset careful: topk 0.7, start_percent 0.2, end_percent 1, dense_blocks 0 (the inputs' 0.5, 0, 0.9, empty are not used)"


@pytest.mark.parametrize(
    ("preset", "line"),
    [
        ("careful", "careful, Wan 2.1 / 2.2 t2v: topk by the policy (yours; preset: 0.7), start_percent 0.24, dense_blocks 0"),
        ("auto", "Wan 2.1 / 2.2 t2v: topk by the policy (yours; preset: 0.5), start_percent 0.24, dense_blocks 0"),
        ("off", ""),
    ],
)
def test_a_policy_decides_topk_whatever_the_preset_says(tiny, execute, last_run, preset, line):
    values = dict(preset=preset, topk=0.5, policy=SimpleNamespace(topk=lambda run, layer: 0.2))
    patcher, settings = execute(**values, **DEFAULTS)
    assert settings.preset_line().split(" (the inputs")[0] == (f"preset {line}" if line else "")
    with torch.no_grad():
        comfy_models.sample(tiny("wan_t2v"), patcher, steps=1)
    assert last_run()["settings"]["topk"] == settings.shown()["topk"] == "by the policy"


def test_named_presets_say_where_they_come_from(nodes, presets):
    assert {name: level.topk for name, level in presets.LEVELS.items()} == LEVELS
    assert nodes.settings.INPUTS["preset"].choices == ("auto", "off", *LEVELS)
    for level in presets.LEVELS.values():
        assert nodes.settings.check({"topk": level.topk}) is None and level.source.endswith("; not yet measured here")
    row = presets.chosen("fast", presets.PRESETS["mochi"])
    assert presets.LEVELS["fast"].source in row.source and presets.PRESETS["mochi"].source in row.source


def test_the_line_offers_a_preset_that_is_off(nodes, presets, execute):
    row, describe = presets.PRESETS["wan_i2v"], nodes.patch.describe
    plain = describe(nodes.settings.Settings(), "cpu")
    offer = "; preset for Wan 2.1 i2v: start_percent 0.35, dense_blocks 0 (choose auto)"
    assert describe(nodes.settings.Settings(), "cpu", row) == plain + offer
    assert describe(nodes.settings.Settings(start_percent=0.1), "cpu", row) == plain + offer
    # The same values by hand, as a shipped workflow has them: nothing to offer.
    assert describe(nodes.settings.Settings(start_percent=0.35, dense_blocks="0"), "cpu", row) == plain
    assert (
        describe(nodes.settings.Settings(preset="auto").for_model(row), "cpu", row)
        == f"{plain}; preset Wan 2.1 i2v: start_percent 0.35, dense_blocks 0"
    )


# Runs: how many steps stay dense.


def dense_steps(run: dict) -> list[int]:
    """The steps in which the last block, which no preset keeps dense here, ran dense."""
    return [c["step"] for c in run["cells"] if c["layer"] == run["layers"] - 1 and not c["sparse_calls"]]


def sample(model, patcher, steps: int, first: int = 0, last: int = 10000, **others):
    """As KSamplerAdvanced samples."""
    import comfy.sample

    noise = comfy.sample.prepare_noise(model.latent, 1)
    arguments = dict(start_step=first, last_step=last, disable_pbar=True, seed=1, sampler="euler", scheduler="simple") | others
    sampler, scheduler = arguments.pop("sampler"), arguments.pop("scheduler")
    comfy.sample.sample(patcher, noise, steps, 1.0, sampler, scheduler, model.positive, model.negative, model.latent, **arguments)


@pytest.mark.parametrize(("steps", "dense"), [(1, 0), (2, 1), (4, 1), (5, 1), (8, 1), (9, 3), (20, 5), (50, 12)])
@pytest.mark.parametrize("name", ["wan_t2v", "qwen_image"])
def test_few_steps_keep_at_most_their_first_dense(tiny, execute, last_run, name, steps, dense):
    few = (1, 5, 8)  # where the window alone would leave more
    if name == "qwen_image":  # 0.2 of the schedule
        dense, few = {9: 2, 20: 4, 50: 10}.get(steps, dense), (1, 8)
    patcher, settings = execute(name, preset="auto")
    sample(tiny(name), patcher, steps)
    run = last_run()
    assert dense_steps(run) == list(range(dense))
    told = settings.row.label + (" (few steps: at most the first stays dense)" if steps in few else "")
    assert run["settings"]["preset"] == told and run["settings"]["start_percent"] == settings.row.start_percent


@pytest.mark.parametrize(
    ("sampler", "scheduler"), [("heun", "simple"), ("dpm_2", "normal"), ("uni_pc", "karras"), ("dpmpp_sde", "beta"), ("euler", "sgm_uniform")]
)
def test_few_steps_of_other_samplers_and_schedules(tiny, execute, last_run, sampler, scheduler):
    sample(tiny("wan_t2v"), execute(preset="auto")[0], 8, sampler=sampler, scheduler=scheduler)
    assert len(dense_steps(last_run())) <= 1 and all(c["sparse_calls"] for c in last_run()["cells"] if c["step"] > 0 and c["layer"] == 1)


@pytest.mark.parametrize(
    ("steps", "stages"),
    [
        (20, {(0, 10): [0, 1, 2, 3, 4], (10, 20): []}),  # two experts of ten steps each: a schedule of 20
        (20, {(0, 3): [0, 1, 2], (3, 20): [0, 1]}),  # the window goes on in the second stage
        (20, {(0, 5): [0, 1, 2, 3, 4], (5, 20): []}),  # five steps, but a quarter of 20
        (8, {(0, 4): [0], (4, 8): []}),  # 4 + 4 of a distilled model
        (4, {(0, 2): [0], (2, 4): []}),
        (8, {(0, 1): [0], (1, 8): []}),  # its second step would be inside the window
        (6, {(0, 5): [0], (5, 6): []}),
    ],
    ids=["10+10", "3+17", "5+15", "4+4", "2+2", "1+7", "5+1"],
)
def test_two_stages_are_parts_of_one_schedule(tiny, execute, last_run, steps, stages):
    model = tiny("wan_t2v")
    for (first, last), dense in stages.items():
        patcher, _ = execute(preset="auto")  # each stage has a model, and a node, of its own
        sample(model, patcher, steps, first, last)
        assert dense_steps(last_run()) == dense, (first, last)


def test_the_end_of_a_few_step_schedule_has_no_first_step(tiny, execute, last_run):
    """denoise 0.9 of 8 steps begins inside the window."""
    sample(tiny("wan_t2v"), execute(preset="auto")[0], 7, denoise=0.87)
    assert dense_steps(last_run()) == []


def test_a_start_of_the_users_counts_in_few_steps_too(tiny, execute, last_run):
    patcher, _ = execute(preset="auto", start_percent=0.5)
    sample(tiny("wan_t2v"), patcher, 4)
    assert dense_steps(last_run()) == [0, 1] and last_run()["settings"]["preset"] == "Wan 2.1 / 2.2 t2v"


def test_an_unsampling_run_of_few_steps(nodes, tiny, execute, last_run):
    """Its sigmas rise: the first step of the schedule comes last."""
    import comfy.samplers

    model = tiny("wan_t2v")
    guider = comfy.samplers.CFGGuider(execute(preset="auto")[0])
    guider.set_conds(model.positive, model.negative)
    guider.set_cfg(1.0)
    sigmas = torch.tensor([0.0, 0.9, 0.95, 0.99, 0.999])
    guider.sample(torch.zeros_like(model.latent), model.latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)
    assert dense_steps(last_run()) == [3]


@pytest.mark.parametrize(("steps", "dense"), [(8, "step 1 of 8 stays dense"), (20, "steps 1 to 4 of 20 stay dense")])
def test_a_named_preset_in_a_run(tiny, execute, last_run, caplog, steps, dense):
    """Few steps count here too, and the line says the window in steps."""
    patcher, _ = execute("qwen_image", preset="fast", topk=0.5, start_percent=0.9)
    with caplog.at_level("INFO", "sparge_attention"):
        sample(tiny("qwen_image"), patcher, steps)
    run = last_run()
    assert len(dense_steps(run)) == (1 if steps == 8 else 4) and run["settings"]["topk"] == 0.3
    assert f"; {dense}; preset fast, Qwen-Image: topk 0.3, start_percent 0.2" in caplog.messages[-1]
    assert ("few steps" in run["settings"]["preset"]) == (steps == 8) and run["settings"]["preset"].startswith("fast, Qwen-Image")


def test_the_nodes_line_and_the_report_name_the_preset(nodes, tiny, execute, caplog):
    model, (patcher, _) = tiny("wan_t2v"), execute(preset="auto", topk=0.5)
    with caplog.at_level("INFO", "sparge_attention"):
        sample(model, patcher, 8)
    line = "preset Wan 2.1 / 2.2 t2v: start_percent 0.24 (few steps: at most the first stays dense), dense_blocks 0"
    assert caplog.messages[-1].endswith(f"; {line}")
    report = nodes.report.SpargeReport.execute(patcher, {"samples": model.latent}).args
    settings = json.loads(report[3])["runs"][-1]["settings"]
    assert settings["preset"] == "Wan 2.1 / 2.2 t2v (few steps: at most the first stays dense)"
    assert (settings["start_percent"], settings["dense_blocks"]) == (0.24, "0")


def test_a_preset_that_decides_the_window_is_not_stopped_by_the_inputs(nodes):
    swapped = {"start_percent": 0.5, "end_percent": 0.3}
    for preset in ("auto", "off"):
        assert "start_percent must not be above end_percent" in nodes.settings.check({"preset": preset, **swapped})
    for preset in ("careful", "balanced", "fast"):
        assert nodes.settings.check({"preset": preset, **swapped}) is None
