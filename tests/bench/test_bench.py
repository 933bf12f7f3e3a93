"""The benchmark without a GPU: what it measures and how, its checks, its files, and the whole of it on an emulated GPU with a clock of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench
import bench_check
import bench_host
import bench_peers
import bench_report
import bench_shapes
import bench_timing
import pytest
import sanitize
import sparge_kernels
import torch
from sparge_kernels import config
from sparge_kernels.backends import cuda as backend

PROGRAMS = Path(bench.__file__).resolve().parent
CPU = torch.device("cpu")


class Event:
    """An event of a device that is one hand: it shows the time at which it was recorded."""

    def __init__(self, now):
        self.now, self.at, self.waited = now, None, False

    def record(self):
        self.at = self.now[0]

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, later):
        return later.at - self.at


@pytest.fixture
def hand():
    """(clock, now): `now[0]` is the time in milliseconds, which calls move themselves; preparing a run takes 1000."""
    now = [0.0]
    return bench_timing.Clock(lambda: Event(now), lambda: now.__setitem__(0, now[0] + 1000)), now


# ---- timing


def test_calls_take_turns_and_the_warm_up_does_not_count(hand):
    clock, now = hand
    order, runs = [], {"slow": iter([90, 7, 8, 9]), "fast": iter([50, 1, 2, 3])}

    def call(name):
        order.append(name)
        now[0] += next(runs[name])

    times = bench_timing.alternate(clock, {name: lambda name=name: call(name) for name in runs}, rounds=3, warmup=1)
    assert times == {"slow": [7, 8, 9], "fast": [1, 2, 3]}
    assert order == ["slow", "fast"] * 4


def test_rounds_fit_the_budget():
    assert bench_timing.rounds_for(100, 2, 3, 50) == 20
    assert bench_timing.rounds_for(10_000, 2, 3, 50) == 3
    assert bench_timing.rounds_for(0, 2, 3, 50) == 50


def test_spread():
    assert bench_timing.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "min": 1.0, "max": 5.0, "runs": 5}
    assert bench_timing.spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0, "min": 2.0, "max": 2.0, "runs": 1}


LAUNCH_MS = {"sparge_statistics": 1.0, "sparge_prepass": 2.0, "sparge_select": 3.0, "sparge_attention_mma": 14.0}


class Ticking(bench_host.StubMachine):
    """A stub whose launches take LAUNCH_MS."""

    def __init__(self, now):
        super().__init__()
        self.now = now

    def launch(self, kernel, *arguments):
        self.now[0] += LAUNCH_MS[kernel.name]


def test_split_times_every_launch_of_a_call(hand):
    clock, now = hand
    q, k, v = torch.randn(3, 1, 2, 300, 64).bfloat16()

    def call():
        now[0] += 5.0  # what lies between launches
        sparge_kernels.sparse_attention(q, k, v, topk=0.5, backend="cuda")

    before = backend.machine_of
    found = bench_timing.split(clock, Ticking(now), call, rounds=3)
    assert found == {"kernels": LAUNCH_MS, "whole": 25.0, "outside": pytest.approx(11 / 25)}
    assert backend.machine_of is before


def test_split_passes_launches_on_as_they_are():
    got = []
    machine = SimpleNamespace(pv="fp16", launch=lambda *arguments: got.append(arguments))
    recorder = bench_timing.Split(machine, bench_timing.Clock(lambda: Event([0.0]), lambda: None))
    kernel, params = SimpleNamespace(name="sparge_select"), object()
    recorder.launch(kernel, 7, 9, params, 5)
    assert got == [(kernel, 7, 9, params, 5)] and recorder.pv == "fp16"


def test_the_machine_is_put_back_when_a_call_fails():
    before = backend.machine_of
    with pytest.raises(ZeroDivisionError), bench_timing.using(SimpleNamespace()):
        raise ZeroDivisionError
    assert backend.machine_of is before


# ---- shapes


def test_shapes():
    shapes = bench_shapes.shapes()
    tokens = {shape.name: shape.s_q for shape in shapes}
    assert tokens["Flux 1024 px"] == 4608 and tokens["Flux 2048 px"] == 16896 and tokens["Mochi 22k"] == 22440 and tokens["CogVideoX 17k"] == 17776
    assert tokens["Wan 14B 32k"] == 32760 and tokens["Wan 1.3B 75k"] == 75600 and tokens["HunyuanVideo 118k"] == 119056
    assert len({shape.name for shape in shapes}) == len(shapes)
    assert {shape.dim for shape in shapes} == set(config.DIMS)
    wide = [shape for shape in shapes if shape.dim == 128]
    assert [bench_shapes.twin(shape) for shape in wide] == [shape for shape in shapes if shape.name.endswith("D 64")]
    assert set(bench_shapes.shapes(short=True)) < set(shapes) and bench_shapes.MOCHI in bench_shapes.shapes(short=True)


def test_flop_and_memory():
    shape = bench_shapes.Shape("x", 1000, 2000, 4, 64, kv_heads=2, batch=3)
    assert shape.flop(0.5) == 2 * 2 * 1000 * 2000 * 64 * 4 * 3 * 0.5
    # q, k, v and their copies in the other layout, and an output: the least that is held at once.
    assert shape.memory() > 2 * 2 * 3 * 64 * (4 * 1000 + 2 * 2 * 2000) + 2 * 3 * 4 * 1000 * 64


def test_a_shape_that_does_not_fit_is_skipped(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 24 << 30))
    assert bench.room(bench_shapes.Shape("small", 64, 64, 1, 64), CPU) is None
    assert bench.room(bench_shapes.MODELS[-1], CPU).endswith("GiB, 3.0 GiB are free")


# ---- peers


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return bench_peers.Inputs(*(torch.randn(1, 2, 200, 64, generator=generator).bfloat16() for _ in range(3)))


def test_absent_peers_have_reasons(inputs, monkeypatch):
    for name in bench_peers.PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)  # what makes an import fail whether or not it is installed
    for build in bench_peers.DENSE.values():
        with pytest.raises(bench_peers.Refused, match="^not installed$"):
            build(inputs)
    for build in bench_peers.SPARSE.values():
        with pytest.raises(bench_peers.Refused, match="^not installed$"):
            build(inputs, 0.5)
    assert bench_peers.packages() == dict.fromkeys(bench_peers.PACKAGES, "not installed")


def test_a_package_that_is_not_there_and_one_that_breaks(tmp_path, monkeypatch):
    with pytest.raises(bench_peers.Refused, match="^not installed$"):
        bench_peers.module("no_such_package_as_this")
    (tmp_path / "broken_peer.py").write_text("raise OSError('libfoo.so.9 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(bench_peers.Refused, match="^import fails: OSError: libfoo.so.9 is missing$"):
        bench_peers.module("broken_peer")
    with pytest.raises(bench_peers.Refused, match="this version has no sageattn"):
        bench_peers.attribute("json", "sageattn")


def attention_nhd(q, k, v, **_):
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


PEERS = {
    "sageattention": ("sageattn", lambda q, k, v, tensor_layout, is_causal: torch.nn.functional.scaled_dot_product_attention(q, k, v)),
    "comfy_kitchen int8": ("int8_attention", lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v)),
    "flashinfer": ("single_prefill_with_kv_cache", lambda q, k, v, causal, kv_layout: attention_nhd(q[None], k[None], v[None])[0]),
    "flash_attn 2": ("flash_attn_func", lambda q, k, v, causal: attention_nhd(q, k, v)),
    "flash_attn 3": ("flash_attn_func", lambda q, k, v, causal: (attention_nhd(q, k, v), None)),
}


@pytest.mark.parametrize("name", PEERS)
def test_adapters_give_and_take_the_right_layout(inputs, name, monkeypatch):
    function, call = PEERS[name]
    package = "flash_attn_interface" if name == "flash_attn 3" else name.split(" ")[0]
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(**{function: call}))
    contender = bench_peers.DENSE[name](inputs)
    out = contender.hnd(contender.run())
    assert out.shape == inputs.q.shape and (contender.density, contender.topk) == (1.0, None)
    assert bench_check.relative_l2(out, bench_check.sampled(inputs.q, inputs.k, inputs.v)) < 0.01


def kept_by_torch(inputs, topk):
    return sparge_kernels.select_blocks(inputs.q, inputs.k, topk=topk, backend="torch").to_dense()


class Vsa:
    """flashinfer's wrapper as far as it is used, in plain PyTorch: 64-token blocks, (S, H, D)."""

    def __init__(self, workspace, backend):
        assert backend == "vsa_sm90_blk64"

    def plan(self, indptr, indices, s_q, s_k, rows, columns, heads, kv_heads, dim, q_data_type, o_data_type, block_mask):
        assert (indptr, indices, rows, columns, heads, kv_heads, dim) == (None, None, 64, 64, 2, 2, 64)
        assert block_mask.shape == (2, s_q // 64, s_k // 64) and block_mask.is_contiguous()
        self.allowed = block_mask.repeat_interleave(64, 1).repeat_interleave(64, 2)

    def run(self, q, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=self.allowed)
        return out.transpose(0, 1)


@pytest.mark.parametrize("tokens, note", [(320, "map given"), (350, "map given, without the last 30 tokens")])
def test_a_peer_that_takes_a_map_gets_ours(monkeypatch, tokens, note):
    generator = torch.Generator().manual_seed(0)
    inputs = bench_peers.Inputs(*(torch.randn(1, 2, tokens, 64, generator=generator).bfloat16() for _ in range(3)))
    monkeypatch.setattr(bench_peers.Inputs, "kept", kept_by_torch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BlockSparseAttentionWrapper=Vsa))
    contender = bench_peers.SPARSE["flashinfer vsa"](inputs, 0.5)
    out = contender.hnd(contender.run())
    assert contender.note == note and out.shape == (1, 2, 320, 64) and 0.4 < contender.density < 0.75
    if tokens == 320:
        assert bench_check.relative_l2(out, bench_check.sampled(inputs.q, inputs.k, inputs.v, inputs.kept(0.5))) < 0.01


def test_peers_that_select_by_themselves(inputs, monkeypatch):
    def topk_attention(q, k, v, topk, simthreshd1, pvthreshd, is_causal):
        assert (topk, is_causal) == (0.5, False)
        return q

    def sol(q, k, v, topk_ratio, tail):
        assert q.shape == (1, 200, 2, 64) and (topk_ratio, tail) == (0.5, False)
        return q

    monkeypatch.setitem(sys.modules, "spas_sage_attn", SimpleNamespace(spas_sage2_attn_meansim_topk_cuda=topk_attention))
    monkeypatch.setitem(sys.modules, "comfy_kitchen", SimpleNamespace(sol_attn=sol))
    for name in ("spas_sage_attn", "comfy_kitchen sol"):
        contender = bench_peers.SPARSE[name](inputs, 0.5)
        assert torch.equal(contender.hnd(contender.run()), inputs.q) and (contender.density, contender.topk) == (0.5, 0.5)


def test_grouped_heads_reach_pytorchs_attention(monkeypatch):
    seen = {}
    monkeypatch.setattr(bench_peers.F, "scaled_dot_product_attention", lambda q, k, v, **more: seen.update(more))
    bench_peers.sdpa_flash(bench_peers.Inputs(torch.zeros(1, 4, 8, 8), *[torch.zeros(1, 2, 8, 8)] * 2)).run()
    assert seen == {"enable_gqa": True}


# ---- checks


def by_torch(q, k, v, **how):
    out, lse, info = sparge_kernels.sparse_attention(q, k, v, **how, backend="torch", return_lse=True, return_info=True)
    return out, lse, info.kept.to_map()


@pytest.mark.parametrize("pv", config.PV)
def test_right_results_pass(pv, monkeypatch):
    monkeypatch.setattr(bench_check, "LONG", (2, 1000, 64))
    assert [str(check) for check in bench_check.small(pv, CPU, by_torch) if not check.good] == []
    assert bench_check.long(pv, CPU, by_torch).good


FAULTS = {
    "out": (lambda out, lse, kept: (out * 1.1, lse, kept), "L2"),
    "one value": (
        lambda out, lse, kept: (out.index_put((torch.tensor(0), torch.tensor(0), torch.tensor(0)), out[0, 0, 0] + 1), lse, kept),
        "largest",
    ),
    "NaN": (lambda out, lse, kept: (torch.full_like(out, torch.nan), lse, kept), "largest"),
    "lse": (lambda out, lse, kept: (out, lse + 0.5, kept), "lse"),
    "selection": (lambda out, lse, kept: (out, lse, kept.roll(1, -1)), "selection"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_results_do_not_pass(fault):
    spoil, part = FAULTS[fault]
    wrong = [check.name for check in bench_check.small("int8", CPU, lambda *qkv, **how: spoil(*by_torch(*qkv, **how))) if not check.good]
    assert len([name for name in wrong if part in name]) >= 5, wrong


def test_the_long_check_sees_a_wrong_block(monkeypatch):
    monkeypatch.setattr(bench_check, "LONG", (2, 1000, 64))

    def neighbour(q, k, v, **how):
        out, lse, kept = by_torch(q, k, v, **how)
        return out, lse, kept.roll(1, -1)

    assert not bench_check.long("int8", CPU, neighbour).good


def test_no_speeds_after_a_failed_check(monkeypatch, capsys):
    monkeypatch.setattr(bench_check, "small", lambda pv, device, tiles: [bench_check.Check("x", 2.0, 1.0)])
    monkeypatch.setattr(bench_check, "long", lambda pv, device: bench_check.Check("y", 0.0, 1.0))
    with pytest.raises(bench.Wrong, match="1 of 2 checks failed"):
        bench.checks({"int8": bench_host.StubMachine()}, CPU)
    assert "x: 2.00e+00 of 1.00e+00 WRONG" in capsys.readouterr().out


# ---- the host's part


def test_the_stub_is_a_machine():
    stub = bench_host.StubMachine()
    wanted = {name for name in vars(backend.Machine) if not name.startswith("_")} | {"arch", "pv", "processors"}
    assert {name for name in wanted if not hasattr(stub, name)} == set()


def test_host_cost():
    before = [getattr(owner, name) for part in bench_host._parts() for owner, name in part.functions], bench_host.ops._watched
    found = bench_host.cost(bench_host.StubMachine(), CPU)
    assert found["launches"] == 4 and 0 < 4 * found["launch_us"] < found["call_us"] <= found["call_median_us"]
    assert "us a call" in bench_host.sentence(found) and f"below {bench_host.AIM_US}" in bench_host.sentence(found)
    names = [part.name for part in bench_host._parts()]
    assert list(found["parts_us"]) == [*names, "the rest"] and all(found["parts_us"][name] > 0 for name in names)
    lines = bench_host.table(found)
    assert len(lines) == len(names) + 3 and lines[0].startswith("  checks, making of Call and Rule: ")
    assert before == ([getattr(owner, name) for part in bench_host._parts() for owner, name in part.functions], bench_host.ops._watched)


def test_parts_do_not_count_each_other(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench_host.time, "perf_counter", lambda: now[0])

    def takes(seconds, *inner):
        def run():
            now[0] += seconds
            for name in inner:
                getattr(owner, name)()

        return run

    owner = SimpleNamespace(a=takes(1.0, "b", "b"), b=takes(2.0, "c"), c=takes(4.0))
    parts = [bench_host.Part(name, ((owner, name),)) for name in "abc"]
    with bench_host._timed(parts):
        owner.a()
    assert [part.seconds for part in parts] == [1.0, 4.0, 8.0]


# ---- reports


def a_row(**changes):
    return {
        "call": "Mochi 22k", "s_q": 22440, "s_k": 22440, "heads": 24, "kv_heads": 24, "dim": 128, "batch": 1, "what": "sparge int8", "topk": 0.25,
        "density": 0.25, "note": "", "ms": {"median": 8.0, "low": 7.5, "high": 8.25, "min": 7.0, "max": 9.0, "runs": 9}, "tflops": 193.4,
        "error": 0.0123, "error_same_blocks": 0.01, "kernels": LAUNCH_MS, "outside": 0.125,
        "speedup": {"sdpa cudnn": 3.0, "sdpa flash": 4.5}, **changes,
    }  # fmt: skip


def a_result(rows, skipped=()):
    about = {"gpu": "NVIDIA H200 (x)", "multiprocessors": 132, "capability": "9.0", "torch": "2.13.0", "commit": "abc", "nvidia_smi": {}}
    return {
        "machine": about,
        "date": "2026-11-21",
        "data": "normal random data",
        "rows": rows,
        "skipped": list(skipped),
        "activations": None,
        "short": False,
    }


def test_table():
    dense = a_row(what="sdpa flash", topk=None, density=1.0, kernels={}, outside=None, speedup={"sdpa flash": 1.0}, note="map given", s_k=100)
    text = bench_report.table(a_result([a_row(), dense], [{"call": "Flux", "what": "flash_attn 2", "reason": "not installed"}]))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == [
        "Mochi 22k",
        "22,440",
        "24",
        "128",
        "sparge int8",
        "0.250",
        "8",
        "7.5 to 8.25",
        "193",
        "3.00",
        "4.50",
        "3",
        "3",
        "14",
        "12.5%",
        "0.0123",
    ]
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[1] == "22,440 x 100" and cells[4] == "sdpa flash (map given)" and cells[9:15] == ["", "1.00", "", "", "", ""]
    assert text.endswith("Not measured:\n\n- Flux, flash_attn 2: not installed")


def test_results_are_files_by_gpu_that_print_again(tmp_path, capsys):
    result = a_result([a_row()])
    path = bench_report.save(result, tmp_path / "results")
    assert path.name == "nvidia-h200-x.json" and json.loads(path.read_text()) == result
    assert bench_report.file_name({**result, "short": True}) == "nvidia-h200-x-short.json"
    assert bench_report.file_name({**result, "activations": "wan layer 3"}) == "nvidia-h200-x-wan-layer-3.json"
    assert bench.main(["--table", str(path)]) == 0
    assert capsys.readouterr().out == bench_report.table(result) + "\n"


# ---- all of it


def test_without_a_gpu():
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(PROGRAMS / "bench.py")], capture_output=True, text=True, timeout=120, env=hidden)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "Nothing else was measured, because there is no GPU that PyTorch can use."
    assert any(line.startswith("host, against a stub driver: ") for line in lines) and any(line.startswith("commit: ") for line in lines)


def test_activations_from_a_file(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"q": torch.randn(2, 4, 70, 64), "k": torch.randn(2, 2, 90, 64), "v": torch.randn(2, 2, 90, 64).half()}, tmp_path / "wan layer 3.safetensors"
    )
    shape, inputs = bench.from_file(tmp_path / "wan layer 3.safetensors", CPU)
    assert shape == bench_shapes.Shape("wan layer 3", 70, 90, 4, 64, 2, 2)
    assert inputs.q.dtype == torch.bfloat16 and inputs.v.dtype == torch.float16 and inputs.q.shape == (2, 4, 70, 64)
    save_file({"q": torch.randn(2, 4, 70, 64)}, tmp_path / "half.safetensors")
    with pytest.raises(SystemExit, match="must hold the tensors q, k and v"):
        bench.from_file(tmp_path / "half.safetensors", CPU)


def test_the_sanitizer_script_runs_every_variant():
    machines = {pv: bench_host.StubMachine("sm_89", pv) for pv in config.forms("sm_89")}
    names = [name for name, call in sanitize.calls(machines, CPU) if call().shape[1] == 4]
    assert len(set(names)) == len(names)
    used = {variant for machine in machines.values() for variant, _ in machine.kernels}
    assert used == {variant.name for variant in config.variants("sm_89")}


class Emulated(bench_host.StubMachine):
    """A GPU of two multiprocessors that runs on the CPU."""

    def __init__(self, now, pv="int8"):
        super().__init__(pv=pv)
        self.processors, self.now = 2, now

    def kernel(self, variant, symbol):
        return SimpleNamespace(variant=variant, name=symbol, origin=f"{variant.name}, emulated")

    def launch(self, kernel, grid, threads, shared, params, stream):
        import emulator

        emulator.library(kernel.variant).launch(kernel.name, grid, params, shared=shared, threads=threads)
        self.now[0] += LAUNCH_MS[kernel.name]


@pytest.fixture
def emulated(hand, monkeypatch):
    """(machine, clock) with PyTorch's dense attention, which takes 100 ms, as the one baseline that runs."""
    clock, now = hand

    def dense(inputs):
        def run():
            now[0] += 100.0
            return torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)

        return bench_peers.Contender("sdpa flash", run)

    monkeypatch.setattr(bench_peers, "BASELINES", {"sdpa cudnn": bench_peers.sdpa_cudnn, "sdpa flash": dense})
    monkeypatch.setattr(bench_shapes, "TOPK", (1.0, 0.5))
    monkeypatch.setattr(bench, "MOST_ROUNDS", 2)
    monkeypatch.setattr(bench, "LEAST_ROUNDS", 2)
    return Emulated(now), clock


SHAPE = bench_shapes.Shape("tiny", 300, 300, 1, 64)


def test_a_shape_from_checks_to_rows(emulated):
    machine, clock = emulated
    rows, skipped = bench.measure(SHAPE, bench.random_inputs(SHAPE, CPU), (machine,), clock, effort=bench.SHORT, flat=True)
    assert [(row["what"], row["topk"]) for row in rows] == [("sdpa flash", None), ("sparge int8", 1.0), ("sparge int8", 0.5)]
    dense, whole, half = rows
    assert dense["ms"]["median"] == 100 and whole["ms"]["median"] == 20 and whole["speedup"] == {"sdpa flash": 5.0}
    assert whole["density"] == 1 and 0.3 < half["density"] < 0.7
    assert half["kernels"] == LAUNCH_MS and half["outside"] == pytest.approx(6 / 20)
    assert half["tflops"] == pytest.approx(4 * 300 * 300 * 64 * half["density"] / 0.020 / 1e12)
    assert dense["error"] < 0.01 < half["error"] and whole["error"] < 0.03 and half["error_same_blocks"] < 0.03
    assert [(item["what"], item["reason"].split(":")[0]) for item in skipped] == [("sdpa cudnn", "RuntimeError")]


def spoil(monkeypatch):
    right = sparge_kernels.sparse_attention

    def spoiled(*arguments, **how):
        result = right(*arguments, **how)
        return (result[0] * 1.2, *result[1:]) if isinstance(result, tuple) else result * 1.2

    monkeypatch.setattr(sparge_kernels, "sparse_attention", spoiled)


def test_a_wrong_kernel_gets_no_row(emulated, monkeypatch):
    machine, clock = emulated
    spoil(monkeypatch)
    with pytest.raises(bench.Wrong, match="tiny, sparge int8, topk 1.0: off by 0.2"):
        bench.measure(SHAPE, bench.random_inputs(SHAPE, CPU), (machine,), clock, effort=bench.SHORT, flat=True)


def test_a_wrong_peer_gets_no_row(emulated, monkeypatch):
    machine, clock = emulated
    monkeypatch.setattr(bench_peers, "BASELINES", {"sdpa flash": lambda inputs: bench_peers.Contender("sdpa flash", lambda: inputs.v)})
    rows, skipped = bench.measure(SHAPE, bench.random_inputs(SHAPE, CPU), (machine,), clock, effort=bench.SHORT, flat=True)
    assert [row["what"] for row in rows] == ["sparge int8"] * 2 and "off by" in skipped[0]["reason"]


@pytest.fixture
def gpu(emulated, monkeypatch, tmp_path):
    """arguments -> exit status of the whole program, on a machine whose GPU is the emulated one."""
    machine, clock = emulated
    properties = dict(name="Emulated", multi_processor_count=2, major=8, minor=9, total_memory=1 << 34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the emulated one is the only one
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (SHAPE.memory(), 1 << 34))
    monkeypatch.setattr(bench_report, "smi", lambda device: {"driver_version": "580.1"})
    monkeypatch.setattr(bench_timing, "cuda_clock", lambda device: clock)
    monkeypatch.setattr(backend, "machine_of", lambda device: (machine, None))
    monkeypatch.setattr(backend, "Machine", lambda index, arch, pv: Emulated(machine.now, pv))
    monkeypatch.setattr(bench_shapes, "MOCHI", SHAPE)
    monkeypatch.setattr(bench_shapes, "shapes", lambda short: (SHAPE, bench_shapes.MODELS[-1]))
    monkeypatch.setattr(bench_check, "CASES", tuple(case for case in bench_check.CASES if case[0] in ("one token", "key mask")))
    monkeypatch.setattr(bench_check, "LONG", (1, 500, 64))
    monkeypatch.setattr(bench_host, "REPEATS", 1)
    monkeypatch.setattr(bench_host, "CALLS", 1)
    return lambda *arguments: bench.main([*arguments, "--results", str(tmp_path)])


def test_the_whole_program_on_an_emulated_gpu(gpu, tmp_path, capsys):
    assert gpu() == 0
    result = json.loads((tmp_path / "emulated.json").read_text())
    printed = capsys.readouterr().out
    assert printed.endswith("\n\n" + bench_report.table(result) + "\n") and "22 checks passed" in printed
    assert [row["what"] for row in result["rows"]] == ["sdpa flash"] + [f"sparge {pv}" for pv in config.forms("sm_89")] * 2
    assert result["binaries"]["attention_mma_d64_fp16_masked"] == "emulated" and len(result["binaries"]) == 12
    reasons = {(item["call"], item["what"]): item["reason"] for item in result["skipped"]}
    assert reasons["HunyuanVideo 118k", "everything"].endswith("GiB are free") and ("tiny", "spas_sage_attn, topk 0.5") in reasons


def test_the_whole_program_tells_no_speed_of_wrong_kernels(gpu, tmp_path, monkeypatch, capsys):
    spoil(monkeypatch)
    assert gpu() == 1
    assert capsys.readouterr().out.rstrip().endswith("checks failed. No speeds are told.") and list(tmp_path.iterdir()) == []


def test_the_whole_program_on_a_files_tensors(gpu, tmp_path):
    from safetensors.torch import save_file

    save_file(dict(zip("qkv", torch.randn(3, 1, 2, 200, 64), strict=True)), tmp_path / "layer.safetensors")
    assert gpu("--short", "--activations", str(tmp_path / "layer.safetensors")) == 0
    result = json.loads((tmp_path / "emulated-layer-short.json").read_text())
    assert {(row["call"], row["s_q"], row["heads"]) for row in result["rows"]} == {("layer", 200, 2)}
    assert result["data"] == "q, k, v from layer.safetensors"
