"""The benchmark for Hopper without one: its arguments, its candidates, and the whole of it on an emulated GPU."""

from __future__ import annotations

import json
from types import SimpleNamespace

import bench
import bench_ceilings
import bench_check
import bench_hopper
import bench_host
import bench_peers
import bench_report
import bench_shapes
import bench_timing
import emulator
import hopper_candidates
import pytest
import torch
from gpu_rehearsal import Event
from sparge_kernels import config
from sparge_kernels.backends import cuda as backend

CPU = torch.device("cpu")
CEILINGS = [{"name": "nothing", "unit": "TB/s", "rate": 2.0, "per_cycle": None, "ghz": None, "ms": None}]


def test_arguments(capsys):
    with pytest.raises(SystemExit):
        bench_hopper.main(["--only", "checks,speeds"])
    assert "--only takes ceilings, checks, candidates, peers, got speeds" in capsys.readouterr().err


@pytest.mark.parametrize("arch, why", [(None, "there is no GPU that PyTorch can use"), ("sm_120", "this GPU is sm_120, the kernel is for sm_90")])
def test_on_another_machine(monkeypatch, capsys, arch, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: arch is not None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backend, "machine_of", lambda device: (arch and SimpleNamespace(arch=arch), None if arch else "the tensors are on cpu"))
    assert bench_hopper.main([]) == 0
    assert capsys.readouterr().out == f"Nothing was measured, because {why}.\n"


def test_shapes():
    assert {(shape.s_q, shape.dim) for shape in bench_hopper.SHAPES} == {(n, d) for n in (16384, 32768, 119056) for d in config.DIMS}
    assert {shape.s_q for shape in bench_hopper.SHORT} == {32768} and {shape.dim for shape in bench_hopper.SHORT} == set(config.DIMS)
    assert [(shape.s_q, shape.dim) for shape in bench_hopper.PEERS_AT] == [(32768, 128), (119056, 128)]


# ---- candidates


def test_candidates_stand_in_for_the_shipped_kernel():
    stub = bench_host.StubMachine("sm_90", "fp8")
    launches = []
    stub.launch = lambda kernel, grid, threads, shared, params, stream: launches.append((kernel.origin, threads, shared))
    found = bench_hopper.candidates(stub, short=False)
    assert len(found) == 13 and [candidate.chosen[128] for candidate in found.values()] == list(hopper_candidates.candidates(128))
    assert set(bench_hopper.candidates(stub, short=True)) < set(found)
    q = torch.zeros(1, 1, 300, 64).half()
    for label, candidate in found.items():
        launches.clear()
        with bench_timing.using(candidate):
            bench_peers.whole_call(bench_peers.Inputs(q, q, q), 0.5)
        variant = hopper_candidates.variant(64, False, candidate.chosen[64])
        assert launches[-1] == (f"{variant.name}, a stub", 384, variant.shared) and [threads for _, threads, _ in launches[:-1]] == [256] * 3
        assert hopper_candidates.label(candidate.chosen[64]) in label and candidate.pv == "fp8"


def test_a_short_run_keeps_every_kind():
    kinds = [
        {(c.chosen[128].tile_blocks, c.chosen[128].ones, c.chosen[128].overlap, c.chosen[128].split) for c in found.values()}
        for found in (bench_hopper.candidates(bench_host.StubMachine("sm_90", "fp8"), short) for short in (True, False))
    ]
    assert kinds[0] == kinds[1] and len(kinds[0]) == 8


def test_the_rule_of_dropped_tiles_is_the_candidates():
    machine = bench_host.StubMachine("sm_90", "fp8")
    assert bench_check.tiles_of(bench_host.StubMachine("sm_90", "int8")) == bench_check.MMA_TILES == {64: (16, 128), 128: (16, 64)}
    assert bench_check.tiles_of(machine) == {64: (64, 128), 128: (64, 128)}
    wide = {dim: next(c for c in hopper_candidates.candidates(dim) if c.tile_blocks == 3) for dim in config.DIMS}
    assert bench_check.tiles_of(machine, wide) == {64: (64, 192), 128: (64, 192)}


class Emulated(bench_host.StubMachine):
    """A Hopper GPU of two multiprocessors that runs on the CPU; attention takes 8 ms there, everything else 1."""

    def __init__(self, now, pv="fp8", index=0):
        super().__init__("sm_90", pv)
        self.processors, self.now, self.index = 2, now, index

    def kernel(self, variant, symbol):
        return SimpleNamespace(variant=variant, name=symbol, origin=f"{variant.name}, emulated")

    def launch(self, kernel, grid, threads, shared, params, stream):
        emulator.library(kernel.variant).launch(kernel.name, grid, params, shared=shared, threads=threads, seed=2)
        self.now[0] += 8.0 if "attention" in kernel.name else 1.0


def test_only_the_attention_kernel_is_timed():
    now = [0.0]
    clock = bench_timing.Clock(lambda: Event(now), lambda: None)
    stub = bench_host.StubMachine("sm_90", "fp8")
    stub.launch = lambda kernel, *rest: now.__setitem__(0, now[0] + (8.0 if "attention" in kernel.name else 1.0))
    q = torch.zeros(1, 1, 300, 64).half()
    times = bench_hopper.timed({"x": stub, "y": stub}, clock, lambda: bench_peers.whole_call(bench_peers.Inputs(q, q, q), 0.5), 3)
    assert times == {"x": [8.0] * 3, "y": [8.0] * 3}


# ---- all of it


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """arguments -> exit status of the whole program on an emulated GPU, with one candidate and one small call."""
    now = [0.0]
    shape = bench_shapes.Shape("tiny", 300, 300, 1, 64)
    pair = {dim: config.HOPPER_CONFIG[dim] for dim in config.DIMS}
    properties = dict(name="Emulated Hopper", multi_processor_count=2, major=9, minor=0, total_memory=1 << 34)
    for owner, changes in {
        torch.cuda: dict(
            is_available=lambda: False, get_device_properties=lambda device: SimpleNamespace(**properties), mem_get_info=lambda device: (1 << 40, 1),
        ),
        backend: dict(machine_of=lambda device: (Emulated(now), None), Machine=lambda index, arch, pv: Emulated(now, pv, index)),
        bench_report: dict(smi=lambda device: {"clocks.sm": "1980 MHz"}),
        bench_timing: dict(cuda_clock=lambda device: bench_timing.Clock(lambda: Event(now), lambda: None)),
        bench_check: dict(CASES=bench_check.CASES[:1], LONG=(1, 300, 64)),
        bench_peers: dict(BASELINES={}),
        bench: dict(LEAST_ROUNDS=1, MOST_ROUNDS=1, WHOLE=bench.SHORT),
        bench_shapes: dict(TOPK=(0.5,)),
        bench_hopper: dict(
            candidates=lambda machine, short: {"usual": bench_hopper.Candidate(machine, pair)}, SHAPES=(shape,), SHORT=(shape,), PEERS_AT=(shape,),
            TOPK=(0.5,), ROUNDS=1, repeatable=lambda device: bench_check.Check("two runs", 0.0, 0.0),
            resources=lambda machine, dim, chosen: {"registers": 168, "local": 0, "shared": 1},
        ),
        bench_ceilings: dict(measure=lambda machine, device, clock: CEILINGS),
    }.items():  # fmt: skip
        for name, value in changes.items():
            monkeypatch.setattr(owner, name, value)
    options = lambda *more: SimpleNamespace(short=False, only=bench_hopper.PARTS, results=tmp_path, **dict(more))  # noqa: E731

    def run(**changes):
        given = options()
        vars(given).update(changes)
        return bench_hopper.on_gpu(given, CPU, Emulated(now))

    return run


def test_the_whole_program_on_an_emulated_gpu(gpu, tmp_path, monkeypatch, capsys):
    assert gpu() == 0
    file = tmp_path / "emulated-hopper-hopper.json"
    result = json.loads(file.read_text())
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(bench_hopper.table(result).rstrip())
    assert [row["what"] for row in result["rows"]] == ["usual", "mma int8"] and result["skipped"] == []
    row = result["rows"][0]
    assert row["ms"]["median"] == 8.0 and row["tflops"] == pytest.approx(4 * 300 * 300 * 64 * row["density"] / 0.008 / 1e12)
    assert 0 < row["error"] <= bench_check.flat_bound("fp8", torch.bfloat16)
    assert result["ceilings"] == CEILINGS and bench_ceilings.table(CEILINGS) in printed
    assert len(result["checks"]) == 7 and result["resources"]["usual"]["64"]["registers"] == 168
    assert [row["what"] for row in result["peers"]] == ["sparge fp8"]
    assert [clocks["after"] for clocks in result["clocks"]] == ["ceilings", "checks of usual", "tiny, topk 0.5", "peers, tiny"]
    assert all(clocks["clocks.sm"] == "1980 MHz" for clocks in result["clocks"])

    monkeypatch.setattr(bench_hopper, "built", None)  # ceilings need no candidates
    assert gpu(only=("ceilings",)) == 0
    again = json.loads(file.read_text())
    assert all(again[part] == result[part] for part in ("rows", "checks", "resources", "peers"))
    assert [clocks["after"] for clocks in again["clocks"]] == ["ceilings"]


def test_a_wrong_candidate_has_no_speed(gpu, tmp_path, monkeypatch, capsys):
    right = bench_peers.ours

    def spoiled(inputs, topk, machine):
        contender = right(inputs, topk, machine)
        return contender if machine.pv == "int8" else bench_peers.Contender("", lambda: contender.run() * 1.2, contender.density, kept=contender.kept)

    monkeypatch.setattr(bench_peers, "ours", spoiled)
    assert gpu(only=("candidates", "peers")) == 1
    result = json.loads((tmp_path / "emulated-hopper-hopper.json").read_text())
    assert [row["what"] for row in result["rows"]] == ["mma int8"] and result["peers"] == []
    assert result["skipped"][0]["reason"].startswith("WRONG: off by 0.2")
    assert capsys.readouterr().out.endswith("WRONG: usual, topk 0.5\n")


def test_a_candidate_that_does_not_compile_is_left_out(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(Emulated, "missing", lambda self, variants: "no binary" if any(v.exact for v in variants) else None)
    assert gpu(only=("candidates",)) == 0
    result = json.loads((tmp_path / "emulated-hopper-hopper.json").read_text())
    assert [row["what"] for row in result["rows"]] == ["mma int8"]
    assert result["skipped"] == [{"call": "every call", "what": "usual", "reason": "no binary"}] and result["resources"] == {}
