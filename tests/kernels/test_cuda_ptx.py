"""PTX of the device code: a rule of Hopper's memory that neither a compiler nor the emulator, where plain loads cannot be seen, checks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from required import missing
from sparge_kernels import config
from sparge_kernels.cuda import build, nvrtc

KERNEL = "attention_sm90.cuh"
LOADS, RELEASE = "item_facts.q_scale[", "barrier_arrive(q_empty("
"""In the source: where consumers load an item's scales, and where they give its slot back."""
FENCE = "    fence_async();\n    sync_warp();  // all lanes have read the item's facts"


@pytest.fixture(scope="module")
def compiler() -> nvrtc.Compiler:
    library = build.pinned_nvrtc()
    if library is None:
        missing(f"the compiler {build.NVRTC_PACKAGE} {build.NVRTC_VERSION}")
    return nvrtc.open_library(library)


def test_a_virtual_architecture_compiles_to_text(compiler, tmp_path):
    (tmp_path / "sample.cu").write_text('extern "C" __global__ void sample(int* p) { *p = 1; }\n')
    compiled = compiler.compile(nvrtc.program("sample.cu", "compute_80", (), tmp_path))
    text = compiled.code.decode("ascii")
    assert ".version" in text and ".target sm_80\n" in text and ".entry sample(" in text and "\0" not in text and compiled.log == ""


# ---- the scales of an item are loaded plainly and later written by a bulk copy -------------------------------------------------------------------


def line_of(source: str, words: str) -> int:
    """The number of the one line of code that holds `words`."""
    (number,) = (i for i, line in enumerate(source.splitlines(), 1) if words in line.split("//")[0])
    return number


def instructions(ptx: str) -> list[tuple[str, tuple[str, int], tuple[str, int]]]:
    """(text, its place in the source, the place that its function was inlined at) of every instruction and label."""
    files = {number: Path(path).name for number, path in re.findall(r'\.file\s+(\d+) "([^"]+)"', ptx)}
    found, place, caller = [], ("", 0), ("", 0)
    for line in map(str.strip, ptx.splitlines()):
        if told := re.match(r"\.loc\s+(\d+) (\d+) \d+(?:.*inlined_at (\d+) (\d+))?", line):
            place = (files[told[1]], int(told[2]))
            caller = (files[told[3]], int(told[4])) if told[3] else ("", 0)
        elif line and not line.startswith(("//", ".")):
            found.append((line, place, caller))
    return found


def unfenced(ptx: str, source: str) -> list[tuple[str, str]]:
    """(load, arrival): loads of an item's scales after which the kernel may give the slot back without a fence of the proxies in between."""
    code = instructions(ptx)
    labels = {text.removesuffix(":"): i for i, (text, _, _) in enumerate(code) if re.fullmatch(r"\$\w+:", text)}
    loads = [i for i, (text, place, _) in enumerate(code) if text.startswith("ld.shared") and place == (KERNEL, line_of(source, LOADS))]
    releases = {i for i, (text, _, at) in enumerate(code) if text.startswith("mbarrier.arrive") and at == (KERNEL, line_of(source, RELEASE))}
    assert loads and len(releases) == 1, "the places of the source are not found in the PTX"
    assert not any("brx." in text for text, _, _ in code), "branches through a table are not followed here"
    found = []
    for load in loads:
        seen, ahead = set(), [load + 1]
        while ahead:
            at = ahead.pop()
            text = code[at][0] if at < len(code) else "ret;"
            if at in seen or text.startswith("fence.proxy.async"):
                continue
            seen.add(at)
            if at in releases:
                found.append((code[load][0], text))
            jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", text)
            if jump:
                ahead.append(labels[jump[1]])
            if text.startswith("@") or not (jump or re.match(r"(ret|exit|trap)\b", text)):
                ahead.append(at + 1)
    return found


def ptx_of(compiler: nvrtc.Compiler, folder: Path, dim: int, masked: bool) -> str:
    variant = config.hopper_variant(dim, masked, config.hopper_config(dim))
    return compiler.compile(nvrtc.program(variant.source, variant.exact.replace("sm_", "compute_"), variant.defines, folder)).code.decode()


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dim", config.DIMS, ids=lambda d: f"d{d}")
def test_scales_are_fenced_before_their_slot_is_given_back(compiler, monkeypatch, tmp_path, dim, masked):
    """Each thread, on every way through the shipped kernel; and this test sees where it is left out, or comes too late."""
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "--generate-line-info"))  # which changes no instruction
    source = (nvrtc.SOURCES / KERNEL).read_text(encoding="utf-8")
    assert unfenced(ptx_of(compiler, nvrtc.SOURCES, dim, masked), source) == []
    for file in nvrtc.SOURCES.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert source.count(FENCE) == 1
    release = f"    if (is_first_lane()) {RELEASE}slot_of(turn)));\n"
    without = source.replace(FENCE, FENCE.split("\n")[1])
    assert without.count(release) == 1
    for changed in (without, without.replace(release, release + "    fence_async();\n")):
        (tmp_path / KERNEL).write_text(changed, encoding="utf-8")
        assert unfenced(ptx_of(compiler, tmp_path, dim, masked), changed) != []
