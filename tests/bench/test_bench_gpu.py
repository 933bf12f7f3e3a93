"""The first ten minutes on a GPU: which steps there are, what they run, what is handed over to them, and what they say of a result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bench_check
import bench_gpu
import bench_host
import bench_report
import bench_shapes
import bench_timing
import cubins
import gpu_carry
import gpu_machines
import gpu_rehearsal
import gpu_run
import gpu_steps
import pytest
import sanitize
import sanitizer_probe
import sparge_kernels
import torch
from required import missing
from sparge_kernels import config
from sparge_kernels.cuda import loader, nvrtc

PROGRAMS = Path(bench_gpu.__file__).resolve().parent
CPU = torch.device("cpu")


# ---- which steps there are


def machine(**changes) -> dict:
    return {"arch": "sm_90", "packaged": ["fp8", "int8"], "compiled": ["fp16"], "ptx": ["sm_80"], "speed": ["Flux 1024 px"],
            "candidates": ["a", "b"], "peers": ["p"],
            "models": {"flux": 30}, "build": True, **changes}  # fmt: skip


def test_the_most_valuable_first():
    names = [step.name for step in bench_gpu.steps(machine())]
    assert names == [
        "build", "packaged fp8", "packaged int8", "compiled fp16", "2^31", "ptx sm_80", "speed Flux 1024 px", "ceilings", "candidate a",
        "candidate b", "candidates",
        "sanitizer probe", *(f"sanitizer {tool}" for tool in bench_gpu.SANITIZERS), "peer p", "model flux",
    ]  # fmt: skip
    assert all(step.name.partition(" ")[0] in gpu_steps.STEPS for step in bench_gpu.steps(machine()))
    plain = [step.name for step in bench_gpu.steps(machine(candidates=[], ptx=[], peers=[], build=False))]
    assert "candidates" not in plain and "build" not in plain


def test_steps_by_their_first_words():
    every = bench_gpu.steps(machine())
    assert bench_gpu.selected(every, []) == every
    assert [step.name for step in bench_gpu.selected(every, ["speed", "ceilings"])] == ["speed Flux 1024 px", "ceilings"]
    assert [step.name for step in bench_gpu.selected(every, ["candidates"])] == ["build", "candidate a", "candidate b", "candidates"]
    with pytest.raises(ValueError, match="first words of build, packaged fp8, .*; got spead$"):
        bench_gpu.selected(every, ["speed", "spead"])


def test_what_times_is_alone():
    for step in bench_gpu.steps(machine()):
        assert step.beside == (not step.name.startswith(("speed", "candidates", "peer", "model", "ceilings", "sanitizer probe"))), step.name


@pytest.mark.parametrize("arch, packaged, ptx", [
    ("sm_80", ("sm_80",), ()), ("sm_86", ("sm_86", "sm_80"), ()), ("sm_89", ("sm_89", "sm_86", "sm_80"), ()),
    ("sm_90", ("sm_90",), ("sm_80", "sm_86", "sm_89")), ("sm_103", ("sm_100",), ("sm_80", "sm_86", "sm_89")),
    ("sm_121", ("sm_120",), ("sm_80", "sm_86", "sm_89", "sm_100")),
])  # fmt: skip
def test_what_a_gpu_can_run(arch, packaged, ptx):
    assert gpu_carry.loadable(arch) == packaged and gpu_carry.by_driver(arch) == ptx


def test_a_gpu_that_nothing_is_packaged_for_has_its_kernels_compiled(monkeypatch):
    monkeypatch.setattr(gpu_steps.bench_report, "machine", lambda device: {})
    found = {}
    for arch in ("sm_110", "sm_87"):
        here = gpu_steps.Here(CPU, bench_host.StubMachine(arch, "int8"), lambda: None, lambda result: None)
        found[arch] = gpu_steps.machine(here, "")
    assert found["sm_110"]["packaged"] == [] and found["sm_110"]["compiled"] == list(config.forms("sm_110"))
    assert found["sm_110"]["ptx"] == ["sm_80", "sm_86", "sm_89", "sm_100"]
    assert found["sm_87"]["packaged"] == ["int8", "sm_80 int8"] and found["sm_87"]["compiled"] == ["fp16"]
    names = [step.name for step in bench_gpu.steps(found["sm_110"])]
    assert {f"compiled {pv}" for pv in config.forms("sm_110")} <= set(names)


def test_packaged_kernels_are_those_of_the_package(monkeypatch):
    """Not what the loader would have compiled in their place."""
    asked = []
    monkeypatch.setattr(gpu_steps.gpu_carry, "packaged", lambda arch, variant: asked.append((arch, variant.name)) or (b"", "packaged"))
    monkeypatch.setattr(gpu_machines.driver, "driver", lambda: SimpleNamespace(load=lambda code, index, symbols, origin: dict.fromkeys(symbols)))
    monkeypatch.setattr(gpu_steps.bench_check, "nasty", lambda *given: iter(()))
    here = gpu_steps.Here(CPU, Base("sm_87", "int8"), lambda: None, lambda result: None)
    gpu_steps.packaged(here, "int8")
    assert {arch for arch, _ in asked} == {"sm_86"} and len(asked) == 6 + 2 + 4  # pre-pass, selection, attention


@pytest.mark.parametrize("arch", config.SHIPPED)
def test_all_forms_together_are_every_kernel(arch):
    every = {(v.name, symbol) for v in config.variants(arch) for symbol in v.symbols}
    persistent = arch == "sm_90"
    assert gpu_machines.expected(arch, config.forms(arch)) == {pair for pair in every if persistent or pair[1] != "sparge_sequence"}


@pytest.mark.parametrize("arch, pv", [("sm_89", "int8"), ("sm_120", "fp16"), ("sm_90", "fp8")])
def test_the_nasty_calls_launch_every_kernel_of_a_form(arch, pv, monkeypatch):
    watched = gpu_machines.Watched(bench_host.StubMachine(arch, pv))

    def attend(q, k, v, **how):  # a stub computes nothing: its lists are what was in memory
        call = sparge_kernels.block_sparse_attention if "block_mask" in how else sparge_kernels.sparse_attention
        call(q, k, v, **how, backend="cuda", return_lse=True)
        return q, q, torch.ones(*q.shape[:2], -(-q.shape[2] // 128), -(-k.shape[2] // 64), dtype=torch.bool)

    monkeypatch.setattr(bench_check, "attend", attend)
    monkeypatch.setattr(bench_check, "_compare", lambda *given: {})
    with bench_timing.using(watched):
        list(bench_check.nasty(pv, CPU))
    assert watched.ran == gpu_machines.expected(arch, (pv,))


# ---- binaries that are handed over


class Base(bench_host.StubMachine):
    index = 3


def test_a_held_binary_is_loaded_once_on_the_gpu_and_others_are_the_machines_own(monkeypatch):
    loads = []

    def load(code, device, symbols, origin):
        loads.append((code, device, origin))
        return {symbol: f"{symbol} held" for symbol in symbols}

    monkeypatch.setattr(gpu_machines.driver, "driver", lambda: SimpleNamespace(load=load))
    select, other = (next(v for v in config.variants("sm_80") if v.name == name) for name in ("select_d64", "select_d128"))
    code = lambda variant: (b"ptx", "PTX for compute_80") if variant == select else None  # noqa: E731
    held = gpu_machines.Held(Base(), "sm_80", "int8", code, own=False)
    assert held.missing((select, other)) is None and held.arch == "sm_80" and held.index == 3
    assert held.kernel(select, "sparge_select") == "sparge_select held"
    assert held.kernel(other, "sparge_select").origin == "select_d128, a stub"
    assert loads == [(b"ptx", 3, "select_d64, PTX for compute_80")]
    assert gpu_machines.Held(Base(), "sm_80", "int8", code, own=True).missing((select, other)) == "there is no binary of select_d128"


def test_what_a_held_machine_cannot_load_is_its_reason(monkeypatch):
    def refuse(*given):
        raise gpu_machines.driver.Refused("CUDA_ERROR_INVALID_PTX")

    monkeypatch.setattr(gpu_machines.driver, "driver", lambda: SimpleNamespace(load=refuse))
    (variant, *_) = config.variants("sm_80")
    held = gpu_machines.Held(Base(), "sm_80", "int8", lambda v: (b"", "x"), own=True)
    assert held.missing((variant,)) == held.missing((variant,)) == "CUDA_ERROR_INVALID_PTX"  # asked twice, as by the step
    with pytest.raises(gpu_machines.driver.Refused):
        held.kernel(variant, variant.symbols[0])
    shelf = gpu_carry.Shelf("ptx", "sm_80", Path("nowhere"))
    assert "run bench_gpu.py --carry" in gpu_machines.Held(Base(), "sm_80", "int8", shelf.code, own=True).missing((variant,))


@pytest.fixture(scope="module")
def carried(tmp_path_factory):
    """(folder, items): one kernel as PTX and one candidate, compiled."""
    if cubins.pinned_nvrtc() is None:
        missing("the pinned NVRTC")
    folder, work = tmp_path_factory.mktemp("carried"), tmp_path_factory.mktemp("work")
    every = gpu_carry.wanted("sm_90")
    items = (next(i for i in every if i.key == "ptx/sm_80/select_d64"), next(i for i in every if i.shelf == "candidates"))
    before, gpu_carry.WORK = gpu_carry.WORK, work
    try:
        done = gpu_carry.make(items, folder)
    finally:
        gpu_carry.WORK = before
    assert done["made"] == 2 and done["there"] == 0
    return folder, items


def test_what_is_carried_is_found_again_as_long_as_the_sources_are_the_same(carried, monkeypatch):
    folder, (ptx, candidate) = carried
    assert gpu_carry.outdated((ptx, candidate), folder) == [] and gpu_carry.make((ptx, candidate), folder)["there"] == 2
    (select,) = (v for v in config.variants("sm_80") if v.name == "select_d64")
    code, origin = gpu_carry.Shelf("ptx", "sm_80", folder).code(select)
    assert b".target sm_80" in code and origin.startswith("PTX for compute_80 by NVRTC 12.8")
    shelf = gpu_carry.Shelf("candidates", "sm_90", folder)
    assert shelf.code(candidate.variant)[0][:4] == b"\x7fELF" and shelf.remarks(candidate.variant) == []
    assert shelf.code(select) is None  # everything else is the machine's own
    monkeypatch.setattr(nvrtc.Program, "digest", "of other sources")
    assert gpu_carry.outdated((ptx,), folder) == [ptx]
    with pytest.raises(gpu_carry.Missing, match="of other sources"):
        gpu_carry.Shelf("ptx", "sm_80", folder).code(select)


def test_a_damaged_file_is_not_run(carried, tmp_path):
    folder, (ptx, _) = carried
    (tmp_path / "manifest.json").write_text((folder / "manifest.json").read_text())
    (tmp_path / f"{ptx.key}.z").parent.mkdir(parents=True)
    (tmp_path / f"{ptx.key}.z").write_bytes(gpu_carry.zlib.compress(b"something else"))
    (select,) = (v for v in config.variants("sm_80") if v.name == "select_d64")
    with pytest.raises(gpu_carry.Missing, match="is damaged"):
        gpu_carry.Shelf("ptx", "sm_80", tmp_path).code(select)


def test_everything_that_an_h200_is_asked_to_run_has_a_place():
    items = gpu_carry.wanted("sm_90")
    keys = [item.key for item in items]
    assert len(set(keys)) == len(keys)
    assert sum(item.shelf == "ptx" for item in items) == sum(len(config.variants(arch)) for arch in ("sm_80", "sm_86", "sm_89"))
    assert all(item.program.arch.startswith("compute_") == (item.shelf == "ptx") for item in items)
    assert gpu_carry.wanted("sm_86") == ()


def test_packaged_binaries_of_another_architecture():
    (select,) = (v for v in config.variants("sm_86") if v.name == "select_d64")
    code, origin = gpu_carry.packaged("sm_86", select)
    assert origin == "packaged for sm_86" and code == loader.default().find("sm_86", select).code


# ---- the sanitizer


REPORT = """========= COMPUTE-SANITIZER
int8, D 64, bfloat16: ok
causal, D 64: ok
========= ERROR SUMMARY: {} errors
"""


@pytest.mark.parametrize("output, status, errors, calls", [
    (REPORT.format(0), 0, 0, 2), (REPORT.format(3), 1, 3, 2), ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", 0, 2, 0),
    ("", 0, 1, 0), (REPORT.format(0), 1, 1, 2), ("========= ERROR SUMMARY: 0 errors\n", 0, 1, 0),
    (REPORT.format(0).rpartition("=====")[0], None, 0, 2),
    ("========= Invalid __global__ read of size 4 bytes\n", None, 1, 0),
])  # fmt: skip
def test_what_the_sanitizer_says(output, status, errors, calls):
    found = sanitize.read(output, status)
    assert (found["errors"], found["calls"]) == (errors, calls)


def test_the_probe_stops_at_the_first_refusal():
    class Cuda:
        def __getattr__(self, name):
            return lambda *given: 999 if name == "cuMemAlloc_v2" else 0

    assert sanitizer_probe.probe(Cuda()) == 999


def test_the_reduced_set_runs_every_kernel_of_one_form_and_type():
    machine = bench_host.StubMachine("sm_90", "fp8")
    for _, call in sanitize.calls({"fp8": machine}, CPU, ("bfloat16",)):
        call()
    used = {name for name, _ in machine.kernels}
    assert used == {name for name, _ in gpu_machines.expected("sm_90", ("fp8",)) if "prepass" not in name or "bfloat16" in name}


# ---- checks


def test_a_wrong_result_is_told():
    assert gpu_steps.wrong({"checks": [{"name": "x", "error": 0.1, "bound": 0.2}]}) is None
    assert gpu_steps.wrong({"checks": [{"name": "x", "error": float("nan"), "bound": 0.2}]}).startswith("1 of 1 checks failed, the first: x: nan")
    assert gpu_steps.wrong({"checks": [], "missing": ["select_d64, sparge_select"]}) == "these kernels ran in no check: select_d64, sparge_select"
    assert gpu_steps.wrong({"skipped": [{"call": "Mochi", "what": "usual", "reason": "WRONG: off by 0.2"}]}) == "Mochi, usual: WRONG: off by 0.2"
    assert gpu_steps.wrong({"errors": 2, "calls": 1}) == "2 errors"


def test_a_call_that_runs_out_of_memory_is_not_ok(monkeypatch):
    monkeypatch.setattr(gpu_steps.bench, "room", lambda shape, device: None)
    monkeypatch.setattr(gpu_steps.bench, "measured", lambda *given, **how: "out of memory")
    here = gpu_steps.Here(CPU, None, lambda: None, lambda found: None)
    with pytest.raises(torch.OutOfMemoryError, match="Flux 1024 px: out of memory"):
        gpu_steps.speed(here, "Flux 1024 px")


def test_q_passes_2_to_the_31():
    shape = bench_check.BEYOND
    assert shape.batch * shape.heads * shape.s_q * shape.dim > 2**31
    assert bench_check.beyond_bytes(shape) < 16e9  # an RTX 4080 has room for it


def test_offsets_that_wrap_are_noticed(monkeypatch):
    small = bench_shapes.Shape("small", 300, 200, 3, 64)
    right = lambda q, k, v, topk: torch.nn.functional.scaled_dot_product_attention(q, k, v)  # noqa: E731

    def run(spoil):
        def attend(q, k, v, topk):
            kept = torch.ones(1, 3, 3, 4, dtype=torch.bool)
            return spoil(right(q, k, v, topk)), torch.zeros(1, 3, 300), kept

        monkeypatch.setattr(bench_check, "attend", attend)
        return [check.good for check in bench_check.beyond("int8", CPU, small)]

    assert run(lambda out: out) == [True, True]
    assert run(lambda out: out.index_fill(1, torch.tensor(2), 0.5)) == [False, True]
    assert run(lambda out: out.index_fill(2, torch.tensor(78), torch.nan)) == [True, False]


def test_a_damaged_result_is_moved_aside(tmp_path, capsys):
    file = tmp_path / "x-gpu.json"
    assert bench_gpu.earlier(file, "abc") == {}
    for text in ("{", '{"steps": {}}', "[]"):
        file.write_text(text)
        assert bench_gpu.earlier(file, "abc") == {} and not file.exists() and (tmp_path / "x-gpu.damaged").read_text() == text
    file.write_text('{"steps": {"a": 1}, "sources": "abc"}')
    assert bench_gpu.earlier(file, "abc") == {"a": 1} and bench_gpu.earlier(file, "other") == {} and file.exists()


def test_a_copy_without_git_knows_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_report, "ROOT", tmp_path)
    monkeypatch.setattr(bench_report, "_output", lambda *command: None)
    assert bench_report.commit() == "unknown"
    (tmp_path / ".gpu").mkdir()
    (tmp_path / ".gpu" / "commit").write_text(f"abc123 {gpu_run.sources()}\n")
    assert bench_report.commit() == "abc123"
    (tmp_path / ".gpu" / "commit").write_text("abc123 of other sources\n")
    assert bench_report.commit() == "unknown"


def test_carrying_without_comfyui_keeps_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "none"))
    (tmp_path / "to").mkdir()
    with pytest.raises(gpu_carry.Missing, match="there is no ComfyUI tree"):
        gpu_carry.copy_comfyui(tmp_path / "to")
    assert (tmp_path / "to").is_dir()


def test_arguments(capsys, tmp_path):
    with pytest.raises(SystemExit):
        bench_gpu.main(["--minutes", "0"])
    assert "--minutes must be above 0, got 0" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        bench_gpu.main(["--results", str(tmp_path / "file")])
    assert "--results must be a folder that can be written" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="WHAT one of hang, crash, fault, memory, wrong, got explode"):
        gpu_rehearsal.accidents("speed=explode")


def test_the_package_is_found_where_it_is_not_installed():
    code = "import sys; sys.path.insert(0, sys.argv[1]); sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
    code += "import importlib.util as u; assert u.find_spec('sparge_kernels') is None; import gpu_steps; print(gpu_steps.config.__name__)"
    done = subprocess.run([sys.executable, "-c", code, str(PROGRAMS)], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "sparge_kernels.config", done.stderr
    assert sparge_kernels.__name__ == "sparge_kernels"
