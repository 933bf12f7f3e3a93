"""From a source file to a run: the compiler's PTX, the cache, the machine that takes the place of a GPU."""

from __future__ import annotations

import ctypes
import re

import cubins
import executor
import pytest
import torch
import translate
from executor import PtxMachine, Schedule, altered, ptx_of
from forms import FORMS
from sparge_kernels import config

SOURCE = executor.HERE / "reversed.cu"
VARIANT = config.Variant("reversed", str(SOURCE), ("reversed",), (), 256, 0, 64)


class Params(ctypes.Structure):
    _fields_ = [("given", ctypes.c_void_p), ("out", ctypes.c_void_p), ("count", ctypes.c_int32)]


def run(machine: PtxMachine, shared: int = 256) -> torch.Tensor:
    given, out = torch.arange(192, dtype=torch.int32), torch.full((192,), -1, dtype=torch.int32)
    machine.launch(machine.kernel(VARIANT, "reversed"), 3, 64, shared, Params(given.data_ptr(), out.data_ptr(), 190), machine.stream())
    return out


EXPECTED = torch.arange(192, dtype=torch.int32).view(3, 64).flip(1).reshape(-1) + 1000
EXPECTED[190:] = -1


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("schedule", [Schedule(), Schedule(2, "random", 2, 3), Schedule(3, "at once", 5, 1)], ids=["plain", "random", "one block"])
def test_a_compiled_kernel_runs(arch, schedule):
    machine = PtxMachine(arch, "int8", schedule)
    assert torch.equal(run(machine), EXPECTED) and machine.launched == ["reversed"]
    assert f".target {arch}\n" in ptx_of(VARIANT, arch)


def test_within_an_alteration_the_ptx_is_another_one():
    machine = PtxMachine("sm_80", "int8")

    def more(given: config.Variant, text: str) -> str:
        assert given is VARIANT and text.count(", 1000;") == 1
        return text.replace(", 1000;", ", 2000;")

    with altered(more):
        assert torch.equal(run(machine)[:190], EXPECTED[:190] + 1000)
        with altered(lambda given, text: text.replace(", 2000;", ", 3000;")):
            assert torch.equal(run(machine)[:190], EXPECTED[:190] + 2000)
    assert torch.equal(run(machine), EXPECTED)


def test_without_its_barrier_the_kernel_is_wrong_under_some_schedule():
    with altered(lambda given, text: text.replace("bar.sync \t0;", "")):
        assert any(not torch.equal(run(PtxMachine("sm_80", "int8", Schedule(seed))), EXPECTED) for seed in range(5))


def test_an_error_names_kernel_architecture_and_line():
    with pytest.raises(RuntimeError, match="^reversed for sm_86: reversed, [0-9]+ errors?:\nline [0-9]+, block") as told:
        run(PtxMachine("sm_86", "int8"), shared=128)
    line, statement = re.search(r"line ([0-9]+), .* \| (.*)", str(told.value)).groups()
    assert ptx_of(VARIANT, "sm_86").split("\n")[int(line) - 1].strip() == statement and statement.startswith(("st.shared", "ld.shared"))


def test_a_launch_with_another_number_of_threads_is_refused():
    machine = PtxMachine("sm_80", "int8")
    with pytest.raises(RuntimeError, match="reversed of reversed is for 64 threads, got 32"):
        machine.launch(machine.kernel(VARIANT, "reversed"), 1, 32, 256, Params(), 0)


def test_equal_bodies_for_two_architectures_are_built_once():
    assert ptx_of(VARIANT, "sm_80") != ptx_of(VARIANT, "sm_86")
    first, second = (PtxMachine(arch, "int8").kernel(VARIANT, "reversed").library for arch in ("sm_80", "sm_86"))
    assert first is second


def test_what_is_in_the_cache_needs_neither_compiler_nor_translator(monkeypatch):
    run(PtxMachine("sm_80", "int8"))
    for cached in (ptx_of, executor._library):
        cached.cache_clear()
    monkeypatch.setattr(executor, "_compiler", None)
    monkeypatch.setattr(translate, "translate", None)
    assert torch.equal(run(PtxMachine("sm_80", "int8")), EXPECTED)


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)], ids=["at home", "CI"])
def test_without_the_pinned_compiler_there_is_no_ptx(tmp_path, monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(cubins, "pinned_nvrtc", lambda: None)
    executor._compiler.cache_clear()
    (tmp_path / "other.cu").write_text(f"// {tmp_path}\n{SOURCE.read_text()}")
    with pytest.raises(outcome, match="nvidia-cuda-nvrtc-cu12 12.8.93"):
        ptx_of(config.Variant("other", str(tmp_path / "other.cu"), ("reversed",), (), 0, 0), "sm_80")


def test_a_kernel_has_the_registers_of_its_binary():
    hopper = config.attention_kernel("sm_90", "fp8").variant(64, "fp8", False)
    assert executor.registers_of("sm_90", hopper, "sparge_attention_sm90") == 168  # 384 threads of them fill a multiprocessor
    assert executor.registers_of("sm_80", VARIANT, "reversed") == 248


def shipped() -> list:
    return [pytest.param(arch, variant, id=f"{arch} {variant.name}") for arch in config.SHIPPED for variant in config.variants(arch)]


@pytest.mark.ptx_all
@pytest.mark.parametrize(("arch", "variant"), shipped())
def test_packaged_kernels_use_no_other_instructions(arch, variant):
    assert translate.opcodes(ptx_of(variant, arch)) <= FORMS.keys()


def test_a_text_that_cannot_be_kept_leaves_no_file_behind(monkeypatch, tmp_path):
    def fails(*paths):
        raise OSError("no room")

    monkeypatch.setattr(executor.emulator, "CACHE", tmp_path)
    with monkeypatch.context() as broken, pytest.raises(OSError, match="no room"):
        broken.setattr(executor.os, "replace", fails)
        executor._kept("some.ptx", lambda: "text")
    assert not list(tmp_path.iterdir())
    assert executor._kept("some.ptx", lambda: "text") == executor._kept("some.ptx", lambda: "other") == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["some.ptx"]
