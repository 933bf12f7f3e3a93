"""A run: opened and closed around each sampler call, its steps as the schedule counts them, whatever the sampler does."""

from __future__ import annotations

from collections import Counter

import comfy_models
import pytest
import torch

STEPS = 5
SAMPLERS = (
    "euler", "euler_ancestral", "heun", "heunpp2", "dpm_2", "dpm_2_ancestral", "lms", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde",
    "dpmpp_3m_sde", "ddpm", "lcm", "ipndm", "deis", "res_multistep", "gradient_estimation", "er_sde", "seeds_2", "seeds_3", "sa_solver",
    "sa_solver_pece", "ddim", "uni_pc", "uni_pc_bh2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def inference_mode():
    """As ComfyUI's server runs every node; some samplers (ipndm) leave gradients on by themselves."""
    with torch.inference_mode():
        yield


def step_of(sigma: float, schedule: list[float]) -> int:
    """The step that a model call belongs to: the last one that starts at this sigma or above."""
    near = 1e-3 * max(schedule)  # uni_pc and the samplers of the sde kind move the first and last sigma by a little
    return max((i for i, at in enumerate(schedule[:-1]) if at >= sigma - near), default=0)


def sparse_at(run: dict) -> Counter:
    """Sparse calls of the first block by step."""
    return Counter({c["step"]: c["sparse_calls"] for c in run["cells"] if c["layer"] == 0 and c["sparse_calls"]})


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("family", ["wan_t2v", "sd15"])
def test_step_of_each_model_call(nodes, tiny, patched, watch, last_run, sampler, family):
    """Telemetry has each model call at the step whose part of the schedule its sigma lies in (flow matching, and the sigmas of SD 1.5)."""
    import comfy.samplers

    if sampler not in comfy.samplers.KSampler.SAMPLERS:
        pytest.skip(f"this ComfyUI tree has no {sampler}")
    model = tiny(family) if family == "wan_t2v" else tiny("sd15", latent=(1, 4, 18, 18), model_channels=32)
    patcher, calls = watch(patched(model))
    comfy_models.sample(model, patcher, steps=STEPS, sampler=sampler, cfg=1.0)
    expected = Counter(step_of(sigma, schedule) for sigma, schedule, _ in calls)
    run = last_run()
    assert run["sigmas"] == pytest.approx(calls[0][1], abs=2e-3)  # uni_pc moves the last one by 1e-3
    assert sparse_at(run) == expected, [(round(s, 4), step_of(s, schedule)) for s, schedule, _ in calls]
    assert run["steps"] == STEPS == len(run["sigmas"]) - 1
    assert run["totals"]["sparse_calls"] == run["layers"] * len(calls)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "dpm_2", "dpmpp_sde"])
def test_window_is_gated_by_the_calls_own_sigma(tiny, patched, watch, nodes, sampler):
    """start_percent and end_percent mean what they mean in ComfyUI: percent_to_sigma, compared with the sigma of each model call."""
    model = tiny("wan_t2v")
    patcher, calls = watch(patched(model, start_percent=0.25, end_percent=0.65))
    comfy_models.sample(model, patcher, steps=6, sampler=sampler)
    sampling = model.patcher.get_model_object("model_sampling")
    high, low = (float(sampling.percent_to_sigma(p)) for p in (0.25, 0.65))
    expected = [low < sigma <= high for sigma, _, _ in calls]
    assert 0 < sum(expected) < len(expected)
    totals = nodes.telemetry.runs.closed[-1].to_dict()["totals"]
    assert totals["sparse_calls"] == 2 * sum(expected), [(round(s, 3), e) for (s, _, _), e in zip(calls, expected, strict=True)]


def sample_slice(model, patcher, steps, start, last, **others):
    """As KSamplerAdvanced samples."""
    import comfy.sample

    noise = comfy.sample.prepare_noise(model.latent, 1)
    return comfy.sample.sample(patcher, noise, steps, 1.0, "euler", "simple", model.positive, model.negative, model.latent, start_step=start,
                               last_step=last, disable_pbar=True, seed=1, **others)  # fmt: skip


@pytest.mark.parametrize(
    ("start", "end", "dense"),
    [
        (0.0, 1.0, ""),
        (0.25, 1.0, "step 1 of 4 stays dense"),  # the second begins where the window does
        (0.5, 1.0, "steps 1 to 2 of 4 stay dense"),
        (0.25, 0.5, "steps 1 and 3 to 4 of 4 stay dense"),
        (0.0, 0.75, "step 4 of 4 stays dense"),
        (0.9, 1.0, "steps 1 to 4 of 4 stay dense"),
    ],
)
def test_the_window_in_steps(nodes, start, end, dense):
    window = nodes.schedule.window(start, end, lambda percent: 1 - percent)
    assert window.dense_steps([1.0, 0.75, 0.5, 0.25, 0.0]) == dense
    assert window.dense_steps([]) == window.dense_steps([0.3]) == ""


def test_a_step_that_begins_where_the_window_ends_is_dense(nodes):
    """Its sigma is a float32, the window's end is not: rounding must not open the window for one step more."""
    rounded = float(torch.tensor(0.7, dtype=torch.float32))
    assert rounded < 0.7 < (above := 0.7 * (1 + 1e-7))
    window = nodes.schedule.window(0.0, 0.3, lambda percent: 1 - percent if percent < 1 else 0.0)
    assert [window.holds(sigma) for sigma in (rounded, 0.7, above, 0.7001)] == [False, False, False, True]
    starts = nodes.schedule.window(0.3, 1.0, lambda percent: 1 - percent)
    assert [starts.holds(sigma) for sigma in (rounded, 0.7, above, 0.7001)] == [True, True, True, False]


@pytest.mark.parametrize(("start", "last"), [(0, 3), (2, 5), (3, 8), (5, 10000)])
def test_window_of_a_slice_speaks_of_the_whole_schedule(tiny, patched, watch, last_run, start, last):
    model = tiny("wan_t2v")
    patcher, calls = watch(patched(model, start_percent=0.3, end_percent=0.8))
    sample_slice(model, patcher, 8, start, last)
    whole = model.patcher.get_model_object("model_sampling")
    high, low = (float(whole.percent_to_sigma(p)) for p in (0.3, 0.8))
    # The simple schedule's sigmas are those of 0, 1/8, ... 7/8.
    percents = [step / 8 for step in range(start, min(last, 8))]
    assert [round(sigma, 5) for sigma, _, _ in calls] == [round(float(whole.percent_to_sigma(p)) if p else 1.0, 5) for p in percents]
    expected = {i: 1 for i, (sigma, _, _) in enumerate(calls) if low < sigma <= high}
    assert set(expected) == {i for i, p in enumerate(percents) if 0.3 <= p < 0.8}
    run = last_run()
    assert sparse_at(run) == expected and run["steps"] == len(percents)


def test_img2img_starts_late(tiny, patched, watch, last_run):
    """denoise below 1 runs the end of a longer schedule; a window that closes before it opens nothing."""
    import comfy.sample

    model = tiny("wan_t2v")
    patcher, calls = watch(patched(model, end_percent=0.2))
    noise = comfy.sample.prepare_noise(model.latent, 1)
    comfy.sample.sample(patcher, noise, 3, 1.0, "euler", "simple", model.positive, model.negative, model.latent, denoise=0.5, disable_pbar=True)
    assert len(calls) == 3 and last_run()["totals"]["sparse_calls"] == 0


def test_two_runs(nodes, tiny, patched, last_run):
    model = tiny("wan_t2v")
    patcher = patched(model)
    latest = nodes.telemetry.runs.latest
    for number in (1, 2):
        comfy_models.sample(model, patcher)
        assert last_run()["run"] == nodes.telemetry.runs.latest == latest + number
        assert last_run()["totals"]["sparse_calls"] == 4 and sparse_at(last_run()) == {0: 1, 1: 1}
    assert len(nodes.telemetry.runs.closed) == 2
    (patch,) = nodes.patch.patches_of(patcher)
    assert patch.runs == [] and all(run.owner == patch.key for run in nodes.telemetry.runs.closed)


def test_the_last_eight_are_kept(nodes, tiny, patched):
    model = tiny("wan_t2v")
    patcher = patched(model)
    for _ in range(10):
        comfy_models.sample(model, patcher, steps=1)
    latest = nodes.telemetry.runs.latest
    assert [run.number for run in nodes.telemetry.runs.closed] == list(range(latest - 7, latest + 1))


class Stop(Exception):
    pass


@pytest.mark.parametrize("where", ["callback", "attention", "interrupt"])
def test_a_run_that_breaks_off_is_closed(nodes, tiny, patched, passing, last_run, where):
    import comfy.model_management
    import comfy.sample

    model = tiny("wan_t2v")
    whole = comfy_models.sample(model, patched(model), steps=4)
    declined = []

    def earlier(func, *args, **kwargs):
        declined.append(None)
        if where == "attention" and len(declined) == 6:  # two cross-attention calls in a step: the third step's second block
            raise Stop
        return func(*args, **kwargs)

    def callback(step, *rest):
        if step == 1 and where == "callback":
            raise Stop
        if step == 1 and where == "interrupt":
            comfy.model_management.interrupt_current_processing()

    base = model.patcher.clone()
    base.model_options["transformer_options"]["optimized_attention_override"] = earlier
    patcher = patched(base)
    noise = comfy.sample.prepare_noise(model.latent, 1)
    inputs = model.positive, model.negative, model.latent
    error = comfy.model_management.InterruptProcessingException if where == "interrupt" else Stop
    try:
        with pytest.raises(error):
            comfy.sample.sample(patcher, noise, 4, 5.0, "euler", "simple", *inputs, callback=_checked(callback), disable_pbar=True, seed=1)
    finally:
        comfy.model_management.interrupt_current_processing(False)
    (patch,) = nodes.patch.patches_of(patcher)
    assert patch.runs == [] and patch.run is None
    run = last_run()
    assert len(nodes.telemetry.runs.closed) == 2 and run["steps"] == 4
    assert sparse_at(run) == ({0: 1, 1: 1, 2: 1} if where == "attention" else {0: 1, 1: 1})
    assert run["totals"]["sparse_calls"] == (6 if where == "attention" else 4)
    declined.append(None)
    assert torch.equal(comfy_models.sample(model, patcher, steps=4), whole)
    assert sparse_at(last_run()) == {i: 1 for i in range(4)} and len(nodes.telemetry.runs.closed) == 3


def _checked(callback):
    """Looks at the interrupt flag as ComfyUI's own preview callback makes the server do."""
    import comfy.model_management

    def call(*args):
        callback(*args)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return call


def test_the_callers_callback_gets_every_step(tiny, patched):
    import comfy.sample

    model, seen = tiny("wan_t2v"), []
    noise = comfy.sample.prepare_noise(model.latent, 1)
    comfy.sample.sample(patched(model), noise, 3, 1.0, "euler", "simple", model.positive, model.negative, model.latent, disable_pbar=True,
                        callback=lambda step, x0, x, total: seen.append((step, tuple(x0.shape), tuple(x.shape), total)))  # fmt: skip
    assert seen == [(step, tuple(noise.shape), tuple(noise.shape), 3) for step in range(3)]


def test_an_empty_schedule_runs_nothing(nodes, tiny, patched):
    model = tiny("wan_t2v")
    sample_slice(model, patched(model), 4, 4, 4)
    assert all(run.to_dict()["totals"]["sparse_calls"] == 0 for run in nodes.telemetry.runs.closed)


def test_metadata_of_a_run(nodes, tiny, patched, last_run):
    model = tiny("wan_t2v")
    settings = nodes.settings.Settings(topk=0.3, min_tokens=0, dense_blocks="5-6, -9")
    comfy_models.sample(model, nodes.patch.install(model.patcher, settings, "17"))
    run = last_run()
    assert (run["node"], run["model"], run["family"], run["backend"], run["device"]) == ("17", "WanModel", "Wan", "torch", "cpu")
    assert run["settings"] == {
        "topk": 0.3, "pvthreshd": 15.0, "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "5-6, -9", "min_tokens": 0, "simthreshd1": -0.1,
        "cdfthreshd": 0.0, "token_order": "auto", "compensate": False, "protect_references": False, "backend": "auto",
        "preset": "none",
    }  # fmt: skip
    assert (run["heads"], run["tokens"]) == (2, 256)


@pytest.mark.parametrize(("total", "expected"), [(None, [True, False, None, None, None]), (5, [True, False, False, True, True])])
def test_layer_listed(nodes, total, expected):
    listed = nodes.settings.layer_listed
    cases = [(0, ((0, 0),)), (1, ((0, 0), (3, 4))), (2, ((-1, -1),)), (4, ((-1, -1),)), (3, ((3, 2), (-2, -1)))]
    assert [listed(layer, ranges, total) for layer, ranges in cases] == expected


def test_a_failure_inside_our_own_attention_blames_nobody(tiny, patched, nodes, last_run, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(nodes.override._kernels, "attend", out_of_memory)
    model = tiny("wan_t2v")
    with pytest.raises(torch.OutOfMemoryError):
        comfy_models.sample(model, patched(model))
    assert last_run()["note"] == "the run ended early (OutOfMemoryError)"


def test_steps_of_a_rising_schedule(nodes):
    """ "Unsampling" goes from clean to noise."""
    state = object.__new__(nodes.run_state.RunState)
    state.sigmas, state.step = [0.0, 0.3, 0.6, 1.0], 0
    state.telemetry = nodes.telemetry.Runs().open(node="n", owner="o", metadata={}, sigmas=state.sigmas)
    steps = []
    for sigma in (0.0, 0.3, 0.45, 0.6):
        state.at(torch.tensor([sigma]))
        steps.append(state.step)
    assert steps == [0, 1, 1, 2]


def test_finished_steps_do_not_come_back(direct):
    """Samplers that restart go back to an earlier step, which is not the one that they say is done."""
    state, seen = direct().state, []
    state.sigmas = state.telemetry.sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    for sigma in (1.0, 0.5, 0.75, 0.5, 0.25):
        state.at(torch.tensor([sigma]))
        seen.append((state.step, state.telemetry.finished))
    assert seen == [(0, 0), (2, 2), (1, 2), (2, 2), (3, 3)]


def test_a_shorter_model_call_counts_no_layers_away(nodes, direct):
    """Another node may leave layers out in some model calls; negative numbers in dense_blocks count from the end of the whole model."""
    ours = direct(dense_blocks="-1")
    for layers in (5, 3):
        ours.context.layers = layers
        ours.context.finish()
        assert ours.patch.total_layers == ours.run.total_layers == 5
    ours.context._unnumbered = 2
    q, k, v = (torch.randn(1, 2, 200, 64) for _ in range(3))
    for _ in (2, 3, 4):
        ours(q, k, v, 2, skip_reshape=True)
    cells = {cell["layer"]: cell["reasons"] for cell in ours.closed()["cells"]}
    assert cells == {2: {}, 3: {}, 4: {"layer is listed in dense_blocks": 1}}


@pytest.mark.parametrize(
    ("text", "entries"),
    [("7", "7"), ("0, 5-9, 3--4, -9, -2", "5-9, 3--4, -9"), ("5--10", "5--10"), ("0, 3-9, 2--3, -9--5", ""), ("", "")],
    ids=["one", "several", "two_ends", "all_list_some", "empty"],
)
def test_numbers_that_list_no_layer_are_named(nodes, tiny, patched, last_run, caplog, text, entries):
    """HunyuanVideo has five here. What of them is meant is known after the first model call only, and said after the run."""
    model = tiny("hunyuan_video")
    with caplog.at_level("INFO", "sparge_attention"):
        comfy_models.sample(model, patched(model, dense_blocks=text))
    said = f"dense_blocks: {entries} lists none of the model's 5 layers; correct it or leave it empty"
    assert last_run()["note"] == (said if entries else None) and last_run()["totals"]["sparse_calls"]
    assert (said in caplog.messages[-1]) == bool(entries) and "calls sparse" in caplog.messages[-1]
    assert nodes.remarks.warning_and_note(nodes.telemetry.runs.closed[-1]) == (None, last_run()["note"])


def test_a_model_call_that_fails_counts_no_layers(nodes, tiny, patched, passing):
    """The next run would take the layer it failed in for the model's last."""
    model = tiny("hunyuan_video")
    calls = passing()

    def failing(func, *args, **kwargs):
        if len(calls.seen) == 4:
            raise InterruptedError("stopped")
        return calls(func, *args, **kwargs)

    source = model.patcher.clone()
    source.model_options["transformer_options"]["optimized_attention_override"] = failing
    patcher = patched(source, dense_blocks="-1", start_percent=1.0)
    with pytest.raises(InterruptedError):
        comfy_models.sample(model, patcher)
    (patch,) = nodes.patch.patches_of(patcher)
    assert len(calls.seen) == 4 and patch.total_layers is None


def test_a_rising_schedule_is_sparse_from_its_first_call(tiny, patched, last_run):
    """With the window wide open nothing is outside of it, sigma 0 included."""
    import comfy.samplers

    model = tiny("wan_t2v")
    guider = comfy.samplers.CFGGuider(patched(model))
    guider.set_conds(model.positive, model.negative)
    guider.set_cfg(1.0)
    sigmas = torch.tensor([0.0, 0.5, 0.9])
    guider.sample(torch.zeros_like(model.latent), model.latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=1)
    run = last_run()
    assert not any("window" in reason for reason in run["reasons"])
    assert {c["step"] for c in run["cells"] if c["sparse_calls"]} == {0, 1}
