"""Whole models with random weights, without a GPU: small ones from end to end, and the real ones' shapes without their memory."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import weakref

import bench_models
import bench_timing
import pytest
import torch

CPU = torch.device("cpu")
TOPK = (0.5, 0.2)
ROW = {"model", "title", "tokens", "layers", "heads", "head_dim", "parameters", "clocks", "dense", "sparse"}
COMMON = {"seconds", "main_seconds", "memory_gib", "tflops"}
DENSE = COMMON | {"kernel", "attention_seconds", "attention_share"}
SPARSE = COMMON | {"topk", "ratio", "main_ratio", "density", "pv_skipped", "sparse_calls", "dense_calls", "reasons"}


# ---- small models, the whole program


@pytest.fixture(scope="module")
def tiny(comfy, tmp_path_factory):
    """(printed, JSON, its path) of a run in a process of its own: only there do the stand-ins take the place of what ComfyUI imports."""
    out = tmp_path_factory.mktemp("models") / "new" / "tiny.json"
    command = [sys.executable, bench_models.__file__, "--tiny", "--topk", ",".join(map(str, TOPK)), "--steps", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text(encoding="utf-8")), out


def test_every_model_has_a_row(tiny):
    _, result, _ = tiny
    assert [row["model"] for row in result["rows"]] == list(bench_models.KEYS) and result["skipped"] == []
    assert (result["program"], result["backend"], result["steps"], result["short"]) == ("models", "torch", 1, True)
    assert "flat" in result["data"] and {"host", "python", "torch", "commit"} <= set(result["machine"])
    for row in result["rows"]:
        assert set(row) == ROW and set(row["dense"]) == DENSE
        assert [part["topk"] for part in row["sparse"]] == list(TOPK)
        assert all(set(part) == SPARSE for part in row["sparse"])


def test_figures_fit_each_other(tiny):
    for row in tiny[1]["rows"]:
        dense = row["dense"]
        whole = dense["seconds"]["median"]
        assert dense["seconds"]["runs"] == 1
        assert 0 < dense["main_seconds"] <= dense["attention_seconds"] < whole
        assert (dense["main_seconds"] < dense["attention_seconds"]) == (row["model"] in ("wan14b", "hunyuan"))  # cross-attention, text refiner
        assert dense["attention_share"] == pytest.approx(dense["attention_seconds"] / whole)
        assert dense["kernel"].startswith("scaled_dot_product_flash")
        flop = 4 * row["tokens"] ** 2 * row["heads"] * row["head_dim"] * row["layers"]
        assert dense["tflops"] == pytest.approx(flop / dense["main_seconds"] / 1e12)
        for part in row["sparse"]:
            assert part["ratio"] == pytest.approx(whole / part["seconds"]["median"])
            assert part["main_ratio"] == pytest.approx(dense["main_seconds"] / part["main_seconds"])
            assert part["tflops"] == pytest.approx(flop * part["density"] / part["main_seconds"] / 1e12)
            assert 0 < part["main_seconds"] < part["seconds"]["median"]
        half, fifth = (part["density"] for part in row["sparse"])
        assert fifth < half < 1


def test_every_layer_runs_sparse_and_the_rest_has_reasons(tiny):
    expected = {"wan14b": {"cross-attention to 512 tokens": 2}, "hunyuan": {"256 tokens < min_tokens 512": 2}, "mochi": {}, "flux": {}}
    for row in tiny[1]["rows"]:
        for part in row["sparse"]:
            assert part["sparse_calls"] == row["layers"] == 2
            assert part["reasons"] == expected[row["model"]] and part["dense_calls"] == sum(part["reasons"].values())


def test_density_of_a_video_without_text_is_topk(tiny):
    (wan,) = (row for row in tiny[1]["rows"] if row["model"] == "wan14b")
    assert [part["density"] for part in wan["sparse"]] == pytest.approx([6 / 12, 2 / 12])  # of 12 blocks of 64 keys


def test_the_table_comes_last_and_prints_again(tiny, capsys):
    printed, result, path = tiny
    assert bench_models.main(["--table", str(path)]) == 0
    text = capsys.readouterr().out
    assert printed.endswith(text)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(bench_models.KEYS) * (1 + len(TOPK)) and len({line.count("|") for line in lines}) == 1
    flux = result["rows"][-1]
    assert lines[-1].startswith("| flux, tiny | 1,187 | 2 | topk 0.2 | ") and f"{flux['sparse'][-1]['ratio']:.2f} |" in lines[-1]


@pytest.fixture
def one_thread():
    """Small models gain nothing from more, and threads that wait for each other on a busy machine take long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_each_model_is_freed_before_the_next(comfy, one_thread, monkeypatch, capsys):
    built = []
    build = bench_models.build

    def noted(model, device):
        gc.collect()
        alive = [name for name, network in built if network() is not None]
        assert not alive, f"{model.title} is built while {alive} are there"
        network = build(model, device)
        if device != "meta":
            built.append((model.title, weakref.ref(network)))
        return network

    monkeypatch.setattr(bench_models, "build", noted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_models.main(["--tiny", "--models", "wan14b,flux", "--topk", ".5", "--steps", "1", "--layers", "1"]) == 0
    assert [name for name, _ in built] == ["wan14b, tiny, cut to 1 of 2 layers", "flux, tiny"]
    assert capsys.readouterr().out.count("| topk 0.5 |") == 2


# ---- the real models


@pytest.mark.parametrize("model", bench_models.MODELS, ids=lambda model: model.title)
def test_real_models_are_what_comfyui_would_detect(comfy, model):
    import comfy.model_detection

    network = bench_models.build(model, "meta").diffusion_model
    parameters = list(network.parameters())
    assert all(x.is_meta for x in [*parameters, *network.buffers()])
    assert bench_models.count(model) == sum(x.numel() for x in parameters) == pytest.approx(model.parameters, rel=0.02)
    assert sum(x.numel() for x in parameters if x.dtype == torch.bfloat16) > 0.99 * model.parameters * 0.98
    found, given = comfy.model_detection.detect_unet_config(network.state_dict(), ""), bench_models.entries(model)
    assert {key: found.get(key) for key in given} == given
    assert set(found) <= set(given)


def test_sequences_are_as_long_as_the_real_ones():
    assert [(model.tokens, model.layers) for model in bench_models.MODELS] == [(75_600, 40), (119_056, 60), (44_700, 48), (4_608, 57), (16_896, 57)]
    assert [(model.heads, model.head_dim) for model in bench_models.MODELS] == [(40, 128), (24, 128), (24, 128), (24, 128), (24, 128)]


def test_cut_models_say_so():
    flux = bench_models.MODELS[-1].cut(4)
    assert flux.cut(8) is flux
    assert flux.layers == 8 and flux.title == "Flux dev 2048 px, cut to 8 of 57 layers" and flux.tokens == 16_896


def test_a_model_that_does_not_fit_is_skipped(comfy, monkeypatch):
    options = bench_models.arguments([])
    monkeypatch.setattr(bench_models, "free_memory", lambda device: 24 * 2**30)
    assert bench_models.run(bench_models.MODELS[0], None, CPU, options) == "it takes about 56 GiB and 24 GiB are free"

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(bench_models, "measure", full)
    text = "it did not fit: CUDA out of memory. Tried to allocate 2 GiB."
    assert bench_models.run(bench_models.MODELS[0].small(), None, CPU, options) == text
    skipped = {"model": "wan14b", "title": "Wan", "reason": text}
    result = {"machine": {"host": "x", "torch": "2", "commit": "c"}, "date": "", "data": "", "rows": [], "skipped": [skipped]}
    assert bench_models.table(result).endswith(f"- Wan: not measured, {text}.")


# ---- parts


def test_what_is_not_all_sparse_has_no_figures_of_its_attention():
    model = bench_models.MODELS[0]
    dense = bench_models.Contender(None, None, seconds=[4.0, 6.0], main=[2.0, 2.0], attention=[2.5, 2.5])
    sparse = bench_models.Contender(0.5, None, seconds=[2.0, 3.0], main=[1.0, 1.0])
    totals = {"sparse_calls": model.layers - 1, "dense_calls": 1, "density": 0.5, "pv_skipped": 0.0}
    sparse.run = {"totals": totals, "reasons": {"why": 1}}
    found = bench_models.figures(model, "flash", dense, sparse)
    (part,) = found["sparse"]
    assert found["dense"]["attention_share"] == 0.5 and part["ratio"] == 2.0
    assert part["main_ratio"] is part["main_seconds"] is part["tflops"] is None
    totals["sparse_calls"] = model.layers
    (part,) = bench_models.figures(model, "flash", dense, sparse)["sparse"]
    assert part["main_ratio"] == 2.0 and part["tflops"] == pytest.approx(found["dense"]["tflops"])


def test_the_fastest_dense_backend_comes_first(monkeypatch):
    taken = {"sdpa cudnn": 3.0, "sdpa flash": 2.0}
    monkeypatch.setattr(bench_timing, "alternate", lambda clock, calls, rounds: {name: [9.0, taken[name]] for name in calls})
    monkeypatch.setattr(bench_models.bench_peers, "BASELINES", dict.fromkeys(taken, lambda inputs: bench_models.bench_peers.Contender("", None)))
    order = bench_models.dense_order(bench_models.MODELS[0].small(), CPU, bench_models.clock_of(CPU))
    assert [backend.name for backend in order] == ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    taken["sdpa cudnn"] = 1.0
    assert bench_models.dense_order(bench_models.MODELS[0].small(), CPU, bench_models.clock_of(CPU))[0].name == "CUDNN_ATTENTION"


def test_stand_ins_may_be_named_but_not_called():
    stand_ins = bench_models.StandIns()
    assert stand_ins.find_spec("torch") is None and stand_ins.find_spec("comfy.sample") is None
    module = importlib.util.module_from_spec(stand_ins.find_spec("transformers.models"))
    stand_ins.exec_module(module)

    class Inherits(module.Tokenizer.Inner):
        pass

    with pytest.raises(ImportError, match="transformers.models.Tokenizer.Inner|Inherits"):
        module.Tokenizer.Inner()
    with pytest.raises(AttributeError):
        _ = module.__version__


@pytest.mark.parametrize(
    "given, said",
    [
        (["--models", "wan14b,sdxl"], "--models takes wan14b, hunyuan, mochi, flux, got sdxl"),
        (["--topk", "half"], "--topk takes numbers of 0.05 to below 1"),
        (["--topk", ".5,1"], "--topk takes numbers of 0.05 to below 1"),
        (["--steps", "0"], "--steps must be 1 or more, got 0"),
        (["--layers", "-1"], "--layers must be 1 or more, got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(given, said, capsys):
    with pytest.raises(SystemExit):
        bench_models.arguments(given)
    assert said in capsys.readouterr().err


def test_full_size_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_models.main([]) == 0
    assert capsys.readouterr().out == "Nothing was measured, because there is no GPU that PyTorch can use; --tiny runs without one.\n"
