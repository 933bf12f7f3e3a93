"""tools/cubins.py: every variant compiles within its bounds, and what is packaged is what the sources give.

The compilations (about a hundred, on a machine of two cores a minute) are kept in build/cubins, where ninja finds what has not changed since.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import cubins
import hopper_candidates
import pytest
from cubins import BuildError, Built
from sparge_kernels import config
from sparge_kernels.config import Variant
from sparge_kernels.cuda import nvrtc
from sparge_kernels.cuda.loader import Binary, Loader, Places

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels" / "cuda"

SAMPLE = """
#include <sample.cuh>
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS) sample_large(float* p, int n) {
  __shared__ float s[100];
  volatile float local[40];
  for (int i = 0; i < 40; i++) local[(i * n) % 40] = p[i] * kFactor;
  s[threadIdx.x % 100] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = s[n] + local[n];
}
extern "C" __global__ void sample_small(float* p, int n) {
  extern __shared__ float d[];
  d[n] = p[n];
  __syncthreads();
  p[n] = d[n + 1];
}
"""
SYMBOLS = ("sample_large", "sample_small")


def sample_variant(declared: int = 256, **changes) -> Variant:
    return dataclasses.replace(Variant("sample", "sample.cu", SYMBOLS, (("SAMPLE_THREADS", declared),), 0, 160), **changes)


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "a folder with spaces" / "src"
    folder.mkdir(parents=True)
    (folder / "sample.cu").write_text(SAMPLE)
    (folder / "sample.cuh").write_text("#pragma once\nconstexpr float kFactor = 2.0f;\n")
    return folder


@pytest.fixture(scope="session")
def tool():
    try:
        return cubins.nvrtc_tool()
    except BuildError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{error}; with CI=true a missing compiler is a failure")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def binaries(tool):
    """Every variant of every checked architecture, by (arch, name)."""
    found = cubins.compile_all(config.CHECKED, ROOT / "build" / "cubins" / "nvrtc", tool=tool)
    return {(b.arch, b.variant.name): b for b in found}


def compile_sample(tool, sources, work, arch="sm_86", **changes) -> Built:
    (built,) = cubins.compile_all((arch,), work, tool=tool, sources=sources, variants=lambda _: (sample_variant(**changes),))
    return built


# ---- the real sources ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", config.CHECKED)
def test_every_variant_compiles_within_its_bounds(binaries, arch):
    found = [binaries[arch, variant.name] for variant in config.variants(arch)]
    assert len(found) >= 16
    assert [sentence for built in found for sentence in cubins.complaints(built)] == []


def manifest() -> dict:
    file = FOLDER / "manifest.json"
    assert file.is_file(), "there are no packaged binaries; run: python setup.py cubins"
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("arch", config.SHIPPED)
def test_packaged_binaries_are_of_the_current_sources(arch):
    """Needs no compiler: who changes a device source, or a variant, builds and commits the binaries with it."""
    told = manifest()["cubins"][arch]
    current = {v.name: nvrtc.program(v.source, v.target(arch), v.defines).digest for v in config.packaged(arch)}
    assert {name: entry["source_sha256"] for name, entry in told.items()} == current, "stale; run: python setup.py cubins"


@pytest.mark.skipif(os.name == "nt", reason="the packaged binaries are those of the compiler for Linux")
@pytest.mark.parametrize("arch", config.SHIPPED)
def test_packaged_binaries_are_what_the_compiler_gives(binaries, arch):
    """Byte for byte, and the manifest's figures with them."""
    told = manifest()["cubins"][arch]
    assert told == {v.name: cubins.describe(binaries[arch, v.name]) for v in config.packaged(arch)}, "run: python setup.py cubins"


def test_package_holds_what_the_manifest_names():
    told = manifest()
    assert told["compiler"]["package"] == f"{cubins.NVRTC_PACKAGE} {cubins.NVRTC_VERSION}" and list(told["cubins"]) == list(config.SHIPPED)
    named = {entry["file"]: entry for entries in told["cubins"].values() for entry in entries.values()}
    files = {p.relative_to(FOLDER / "cubins").as_posix(): p for p in (FOLDER / "cubins").rglob("*") if p.is_file()}
    assert set(files) == set(named)
    for name, path in files.items():
        code = zlib.decompress(path.read_bytes())
        assert hashlib.sha256(code).hexdigest() == named[name]["sha256"], name
        assert {k: dataclasses.asdict(r) for k, r in cubins.inspect(code).items()} == named[name]["symbols"], name
    assert len(files) <= 80 and sum(p.stat().st_size for p in files.values()) <= 2_300_000
    assert set(told["sources"]) == {"commit", "dirty"}


def test_the_pinned_compiler_is_the_one_that_is_installed_for_tests_and_builds():
    line = f"\"{cubins.NVRTC_PACKAGE}=={cubins.NVRTC_VERSION}; sys_platform != 'darwin'\""
    for file in ("pyproject.toml", "tools/comfyui/install.py"):
        assert line in (ROOT / file).read_text(encoding="utf-8"), file


def test_the_loader_compiles_the_same_bytes(binaries, tmp_path):
    variant = config.variants("sm_101")[0]
    loader = Loader(Places(tmp_path, tmp_path / "cache", lambda: iter([nvrtc.open_library(cubins.pinned_nvrtc())])))
    shutil.copytree(FOLDER / "src", tmp_path / "src")
    for origin in ("compiled by NVRTC 12.8 for sm_101", "cached, compiled by NVRTC 12.8 for sm_101"):
        assert loader.find("sm_101", variant) == Binary(binaries["sm_101", variant.name].code, "sm_101", origin)


def test_a_virtual_architecture_compiles_to_text(tool, sources):
    program = nvrtc.program("sample.cu", "compute_80", (("SAMPLE_THREADS", 96),), sources)
    compiled = nvrtc.open_library(cubins.pinned_nvrtc()).compile(program)
    text = compiled.code.decode("ascii")
    assert ".version" in text and ".target sm_80\n" in text and "\0" not in text and compiled.log == ""
    assert all(f".entry {name}(" in text for name in SYMBOLS)


# ---- inspect and complaints ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", config.CHECKED)
def test_inspect_reads_what_the_assembler_says(tool, sources, monkeypatch, arch):
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "--ptxas-options=-v"))
    compiled = nvrtc.open_library(cubins.pinned_nvrtc()).compile(nvrtc.program("sample.cu", arch, (("SAMPLE_THREADS", 96),), sources))
    found = cubins.inspect(compiled.code)
    for name, threads in (("sample_large", 96), ("sample_small", 1024)):
        (part,) = re.findall(rf"Function properties for {name}\n(.*?)Compile time", compiled.log, re.S)
        said = [re.search(pattern, part) for pattern in (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes stack frame")]
        assert dataclasses.astuple(found[name]) == (threads, *(int(m.group(1)) if m else 0 for m in said))
    assert (found["sample_large"].shared, found["sample_large"].local) == (400, 160)
    assert set(found) == set(SYMBOLS)


@pytest.mark.parametrize("data", [b"", b"MZ" + bytes(100), b"\x7fELF\x02\x01" + bytes(100)], ids=["empty", "no ELF", "not CUDA's"])
def test_inspect_refuses_what_is_no_binary(data):
    with pytest.raises(BuildError, match="not a CUDA binary"):
        cubins.inspect(data)


def test_complaints_are_sentences(tool, sources, tmp_path):
    good = compile_sample(tool, sources, tmp_path / "work")
    (small,) = cubins.complaints(good)
    assert small == "sample_small in sample for sm_86 is declared for 1024 threads, expected 256"
    stingy = dataclasses.replace(good, variant=sample_variant(spill_bound=159))
    assert "sample_large in sample for sm_86 uses 160 bytes of local memory per thread, at most 159 allowed" in cubins.complaints(stingy)
    renamed = dataclasses.replace(good, variant=sample_variant(symbols=("sample_large",)))
    assert "sample for sm_86 has the kernels ['sample_large', 'sample_small'], expected ['sample_large']" in cubins.complaints(renamed)


# ---- the graph -----------------------------------------------------------------------------------------------------------------------------------


def test_same_bytes_in_another_folder(tool, sources, tmp_path):
    here = compile_sample(tool, sources, tmp_path / "work")
    (tmp_path / "elsewhere").mkdir()
    there = Path(shutil.copytree(sources, tmp_path / "elsewhere" / "other"))
    for file in there.iterdir():  # as git on Windows may check them out
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    again = compile_sample(tool, there, tmp_path / "elsewhere" / "work")
    assert again.code == here.code and again.program.digest == here.program.digest


def test_only_what_changed_is_compiled_again(tool, sources, tmp_path):
    work, file = tmp_path / "work", tmp_path / "work" / "sm_86" / "sample.cubin"
    first = compile_sample(tool, sources, work)
    before = file.stat().st_mtime_ns
    assert compile_sample(tool, sources, work).code == first.code and file.stat().st_mtime_ns == before
    assert compile_sample(tool, sources, work, declared=64).code != first.code  # the command is another
    compile_sample(tool, sources, work)
    header = sources / "sample.cuh"
    header.write_text(header.read_text().replace("2.0f", "3.0f"))
    changed = compile_sample(tool, sources, work)
    assert changed.code != first.code and changed.program.digest != first.program.digest


def test_a_compiler_error_stops_the_build_with_file_and_line(tool, sources, tmp_path):
    (sources / "sample.cuh").write_text("constexpr float kFactor = nothing;\n")
    with pytest.raises(BuildError, match=r"(?s)refused sample.cu for sm_86: sample.cuh\(1\): error: identifier \"nothing\" is undefined"):
        compile_sample(tool, sources, tmp_path / "work")


def test_digest_sees_everything_that_decides_the_bytes(sources, monkeypatch):
    def digest(arch="sm_86", defines=(("A", 1), ("B", 2))):
        return nvrtc.program("sample.cu", arch, defines, sources).digest

    seen = {digest(), digest("sm_89"), digest(defines=(("A", 1), ("B", 3))), digest(defines=(("A", 1),)), digest(defines=(("A", 12), ("B", 2)))}
    seen.add(digest(defines=(("A=1-DB", 2),)))  # the same letters in other parts
    (sources / "sample.cu").write_text(SAMPLE + "int more;\n")
    seen.add(digest())
    (sources / "sample.cuh").write_text("int another_header;\n")
    seen.add(digest())
    monkeypatch.setattr(nvrtc, "FLAGS", nvrtc.FLAGS[:-1])
    seen.add(digest())
    assert len(seen) == 9
    (sources / "unrelated.cuh").write_text("\n")
    assert digest() in seen


TEXT = r"""
#pragma once
#define PAIR(a, b) \
  a, b
__device__ void f(int x) {
  asm volatile("mov.u32 %0, 1; // not  a comment" : "=r"(x));
  g("/* nor \" this */", '"', x / 2);
}
"""
SAME = {
    "a comment in a line of its own": ("#pragma once\n", '#pragma once\n// "one\n'),
    "a comment behind code": ("x / 2);\n", "x / 2);  // isn't it\n"),
    "a comment within a line": ("(int x)", '(int /* an "x */ x)'),
    "a comment of many lines": ("#pragma once\n", "/* one\n * two // three\n */\n#pragma once\n"),
    "a comment that a backslash continues": ("#pragma once\n", "// one \\\n two \\\n three\n#pragma once\n"),
    "a comment in a macro": ("b) \\\n", "b) /* c */ \\\n"),
    "blank lines": ("\n__device__", "\n\n \n__device__"),
    "indentation": ("  g(", "\tg("),
    "blanks at the end": ("once\n", "once  \n"),
    "a backslash further on": ("b) \\\n", "b)         \\\n"),
}
OTHER = {
    "a name": ("f(int", "h(int"),
    "a number": ("x / 2", "x / 3"),
    "an operator": ("x / 2", "x // 2"),
    "a comment that was code": ("  g(", "  // g("),
    "a definition": ("a, b)", "b, a)"),
    "a definition's end": ("b) \\\n", "b)\n"),
    "a blank in a string": ("mov.u32 %0", "mov.u32  %0"),
    "what a string says of comments": ("not  a comment", "not a comment"),
    "the other marks of a comment in a string": ("/* nor", "/ * nor"),
    "a quoted quote": ("'\"'", "'x'"),
    "a directive": ("#pragma once\n", ""),
    "a line's end": ("once\n", "once "),
    "a blank between two names": ("__device__ void", "__device__void"),
}


@pytest.mark.parametrize("change", [*SAME, *OTHER])
def test_digest_is_of_what_is_compiled(tmp_path, change):
    def digest(text: str) -> str:
        (tmp_path / "text.cu").write_text(text)
        return nvrtc.program("text.cu", "sm_86", (), tmp_path).digest

    old, new = (SAME | OTHER)[change]
    assert TEXT.count(old) == 1
    assert (digest(TEXT) == digest(TEXT.replace(old, new))) == (change in SAME)


def test_the_sources_hold_nothing_that_the_digest_would_misread():
    for file in sorted((FOLDER / "src").glob("*.cuh")):
        text = nvrtc.bare(file.read_text(encoding="utf-8"))
        assert not re.search(r"__(?:LINE|FILE|TIME|DATE|TIMESTAMP)__|\bassert\b|R\"|'", text), file.name
        assert "//" not in text and "/*" not in text and not re.search(r"(?m)^\s|\s$|\\$", text), file.name


# ---- attention kernels ---------------------------------------------------------------------------------------------------------------------------


def test_forms_of_p_and_v():
    assert {arch: config.packaged_forms(arch) for arch in config.CHECKED} == {a: ("int8", *["fp8"] * (a == "sm_90")) for a in config.CHECKED}
    by_form = {pv: [arch for arch in config.CHECKED if pv in config.forms(arch)] for pv in config.PV}
    assert by_form == {"int8": list(config.CHECKED), "fp8": ["sm_90"], "fp16": list(config.CHECKED)}
    used = {arch: config.attention_kernels(arch)[0].forms[0] for arch in config.CHECKED}
    assert used == {arch: "fp8" if arch == "sm_90" else "int8" for arch in config.CHECKED}
    sources = {pv: config.attention_kernel("sm_90", pv).variant(64, pv, True).source for pv in config.PV}
    assert sources == {"int8": "attention_mma.cuh", "fp8": "attention_sm90.cuh", "fp16": "attention_mma.cuh"}
    exact = {(arch, v.name) for arch in config.CHECKED for v in config.variants(arch) if v.exact}
    assert exact == {("sm_90", f"attention_sm90_d{dim}_fp8{masked}") for dim in config.DIMS for masked in ("", "_masked")}


MADE_UP = config.AttentionKernel(
    name="attention_sm100",
    forms=("fp8", "fp16"),
    arch="sm_100a",
    threads=192,
    persistent=True,
    shared=lambda dim, pv: 1000 * dim + len(pv),
    defines=lambda dim, pv: (("SPARGE_PV", config.PV.index(pv)), ("SPARGE_TILES", 2048 // dim)),
    spill_bound=8,
)


def test_another_architectures_kernel_is_one_row(monkeypatch):
    before = {arch: config.variants(arch) for arch in (*config.CHECKED, "sm_103")}
    monkeypatch.setattr(config, "ATTENTION", (MADE_UP, *config.ATTENTION))
    assert {arch for arch, variants in before.items() if config.variants(arch) != variants} == {"sm_100"}
    assert config.forms("sm_100") == config.PV and config.packaged_forms("sm_100") == ("int8", "fp8")
    assert config.attention_kernels("sm_100") == (MADE_UP, config.MMA) and config.attention_kernels("sm_103") == (config.MMA,)
    assert [config.attention_kernel("sm_100", pv) for pv in config.PV] == [config.MMA, MADE_UP, MADE_UP]
    names = {v.name for v in config.variants("sm_100")} - {v.name for v in before["sm_100"]}
    assert names == {f"attention_sm100_d{dim}_{pv}{masked}" for dim in config.DIMS for pv in ("fp8", "fp16") for masked in ("", "_masked")}
    assert {n for n in names if "fp8" in n} == {v.name for v in config.packaged("sm_100")} & names
    assert MADE_UP.variant(64, "fp16", True) == Variant(
        "attention_sm100_d64_fp16_masked",
        "attention_sm100.cuh",
        ("sparge_attention_sm100",),
        (("SPARGE_DIM", 64), ("SPARGE_MASKED", 1), ("SPARGE_PV", 2), ("SPARGE_TILES", 32)),
        shared=64004,
        spill_bound=8,
        threads=192,
        exact="sm_100a",
    )
    assert (MADE_UP.grid(40, 132), MADE_UP.grid(400, 132)) == (40, 132) and config.MMA.grid(400, 132) == 400


@pytest.mark.parametrize(
    "needs, runs_on", [("sm_89", ("sm_89", "sm_90", "sm_100", "sm_101")), ("sm_90a", ("sm_90",)), ("sm_100", ("sm_100", "sm_101"))]
)
def test_a_kernel_runs_on_what_it_needs_or_more_or_on_one_architecture_alone(needs, runs_on):
    row = dataclasses.replace(MADE_UP, arch=needs)
    assert tuple(arch for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_101") if row.runs_on(arch)) == runs_on


def test_the_portable_kernel_refuses_fp8(tool, tmp_path):
    with pytest.raises(BuildError, match="P and V in FP8 are for attention_sm90.cuh"):
        cubins.compile_all(("sm_120",), tmp_path, tool=tool, variants=lambda arch: (config.MMA.variant(64, "fp8", False),))


@pytest.mark.parametrize("dim, nbytes", [(64, 1024 + 2 * 8192 + 6 * 2 * (4096 + 4096 + 512) + 2048), (128, 1024 + 32768 + 8 * (16384 + 512) + 2048)])
def test_hoppers_configurations(dim, nbytes):
    chosen, candidates = config.HOPPER_CONFIG[dim], hopper_candidates.candidates(dim)
    variants = [hopper_candidates.variant(dim, False, c) for c in candidates]
    assert chosen in candidates and len({v.name for v in variants}) == len({v.defines for v in variants}) == len(candidates) == 13
    assert all(v.shared <= 227 << 10 for v in variants)
    assert config.SM90.shared(dim, "fp8") == nbytes
    assert {(c.tile_blocks, c.overlap, c.split) for c in candidates} == {(2, False, False), (3, False, False), (2, False, True), (2, True, True)}
    assert {(v.threads, v.exact, v.spill_bound) for v in variants} == {(384, "sm_90a", 0)}
    other = dataclasses.replace(chosen, ones=False, overlap=True, split=True, poly=8, stages=3)
    named = hopper_candidates.variant(dim, True, other)
    assert hopper_candidates.label(other) == "n128 s3 overlap split poly8"
    assert named.name == f"attention_sm90_d{dim}_fp8_masked_n128_s3_overlap_split_poly8"
    assert dict(named.defines) == dict(
        SPARGE_DIM=dim, SPARGE_MASKED=1, SPARGE_TILE_BLOCKS=2, SPARGE_ONES=0, SPARGE_OVERLAP=1, SPARGE_SPLIT=1, SPARGE_POLY=8, SPARGE_STAGES=3
    )
    assert hopper_candidates.variant(dim, True, chosen).name == f"attention_sm90_d{dim}_fp8_masked"


EXACT = """
extern "C" __global__ void __launch_bounds__(384) sample_large(int* p) { asm volatile("wgmma.fence.sync.aligned;"); *p = 1; }
extern "C" __global__ void __launch_bounds__(384) sample_small(int* p) { *p = 2; }
"""


def test_a_variant_of_one_exact_arch_is_built_for_it_and_stored_with_its_devices(tool, sources, tmp_path):
    (sources / "sample.cu").write_text(EXACT)
    built = compile_sample(tool, sources, tmp_path / "work", "sm_90", exact="sm_90a")
    assert (built.arch, built.program.arch) == ("sm_90", "sm_90a")
    complaints = {f"sample_{which} in sample for sm_90a is declared for 384 threads, expected 256" for which in ("large", "small")}
    assert set(cubins.complaints(built)) == complaints
    built = dataclasses.replace(built, variant=sample_variant(threads=384, exact="sm_90a"))
    told = cubins.write([built], tmp_path / "out", about=ABOUT)
    assert told["cubins"]["sm_90"]["sample"]["arch"] == "sm_90a" and (tmp_path / "out" / "cubins" / "sm_90" / "sample.cubin.z").is_file()
    with pytest.raises(BuildError, match="wgmma"):
        compile_sample(tool, sources, tmp_path / "work", "sm_90")


# A product whose second operand is written between the fence and it, as a compiler that knows of no connection may move a write.
LATE = """
#define C "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), \\
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
__device__ __forceinline__ void multiply(float (&c)[16], const unsigned (&a)[4], unsigned long long b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
               "{%16, %17, %18, %19}, %20, 1, 1, 1;" : C : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void write(unsigned& x) { asm volatile("xor.b32 %0, %0, 1;" : "+r"(x)); }
extern "C" __global__ void __launch_bounds__(256) sample_large(float* p, unsigned long long b) {
  float c[16] = {};
  unsigned a[2][4];
  for (int i = 0; i < 8; i++) a[i / 4][i % 4] = ((const unsigned*)p)[8 * threadIdx.x + i];
  if (!SAMPLE_LATE) write(a[1][0]);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  multiply(c, a[0], b);
  if (SAMPLE_LATE) write(a[1][0]);
  multiply(c, a[1], b);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 16; i++) p[256 * i + threadIdx.x] = c[i];
}
"""


def test_a_binary_whose_products_the_assembler_had_to_change_is_refused(tool, sources, tmp_path):
    (sources / "sample.cu").write_text(LATE)

    def compiled(late: int) -> Built:
        return compile_sample(tool, sources, tmp_path / "work", "sm_90", symbols=("sample_large",), exact="sm_90a", defines=(("SAMPLE_LATE", late),))

    right = compiled(0)
    assert cubins.remarks(right.log) == () and cubins.complaints(right) == []
    late = compiled(1)
    (remark,) = cubins.remarks(late.log)
    assert "(C7519) warpgroup.arrive is injected" in remark and remark in late.log
    sentence = "sample for sm_90a: the assembler has changed the matrix products, which no packaged binary may need ("
    assert [c for c in cubins.complaints(late) if c.startswith(sentence + remark + "); name every register")] == cubins.complaints(late) != []
    with pytest.raises(BuildError, match=r"sample for sm_90a: .*C7519"):
        cubins.write([late], tmp_path / "out", about=ABOUT)
    assert not (tmp_path / "out").exists()
    assert compiled(1).log == late.log, "a binary that was there before has its log"
    (tmp_path / "work" / "sm_90" / "sample.log").unlink()
    assert compiled(1).log == late.log, "a lost log is written again"


@pytest.mark.parametrize("dim", config.DIMS)
def test_the_assembler_leaves_the_products_of_every_candidate_as_they_are(tool, dim):
    """What is packaged is asked the same by its complaints. The number of stages decides addresses only."""
    forms = {dataclasses.replace(chosen, stages=0): chosen for chosen in hopper_candidates.candidates(dim)}.values()
    variants = tuple(hopper_candidates.variant(dim, masked, chosen) for chosen in forms for masked in (False, True))
    found = cubins.compile_all(("sm_90",), ROOT / "build" / "cubins" / f"candidates{dim}", tool=tool, variants=lambda _: variants)
    assert {b.variant.name: cubins.remarks(b.log) for b in found} == {variant.name: () for variant in variants} and len(found) == 18


# ---- what is written -----------------------------------------------------------------------------------------------------------------------------

ABOUT = (("name", "NVRTC"), ("version", "12.8"))


def small(tool, sources, work, arch="sm_86", name="sample") -> Built:
    """A sample that nothing can be said against."""
    (sources / "sample.cu").write_text(SAMPLE.replace("void sample_small", "void __launch_bounds__(256) sample_small"))
    return compile_sample(tool, sources, work, arch, name=name)


def test_write_is_deterministic_and_describes_each_file(tool, sources, tmp_path):
    built = [small(tool, sources, tmp_path / "work", arch) for arch in ("sm_120", "sm_86")]
    told = cubins.write(built, tmp_path / "one", about=ABOUT)
    assert cubins.write(built[::-1], tmp_path / "two", about=ABOUT) == told == json.loads((tmp_path / "one" / "manifest.json").read_text())
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert [f.as_posix() for f in files] == ["cubins/sm_120/sample.cubin.z", "cubins/sm_86/sample.cubin.z", "manifest.json"]
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    assert list(told["cubins"]) == ["sm_86", "sm_120"] and told["compiler"] == dict(ABOUT)
    entry = told["cubins"]["sm_86"]["sample"]
    assert zlib.decompress((tmp_path / "one" / "cubins" / entry["file"]).read_bytes()) == built[1].code
    assert entry["sha256"] == hashlib.sha256(built[1].code).hexdigest() and entry["source_sha256"] == built[1].program.digest
    assert entry["arch"] == "sm_86"
    assert {k: sorted(v) for k, v in entry["symbols"].items()} == {k: ["local", "registers", "shared", "threads"] for k in SYMBOLS}
    assert entry["symbols"]["sample_large"]["local"] == 160


def test_write_leaves_alone_what_another_zlib_packed_and_mends_what_is_damaged(tool, sources, tmp_path):
    built = small(tool, sources, tmp_path / "work")
    cubins.write([built], tmp_path, about=ABOUT)
    file = tmp_path / "cubins" / "sm_86" / "sample.cubin.z"
    good = file.read_bytes()
    other = zlib.compress(built.code, 1)
    file.write_bytes(other)
    cubins.write([built], tmp_path, about=ABOUT)
    assert file.read_bytes() == other != good
    file.write_bytes(good[:-5])
    cubins.write([built], tmp_path, about=ABOUT)
    assert file.read_bytes() == good


def test_write_keeps_other_archs_and_drops_what_is_named_no_more(tool, sources, tmp_path):
    built = [small(tool, sources, tmp_path / "work", arch) for arch in ("sm_80", "sm_86")]
    before = cubins.write(built, tmp_path, about=ABOUT)
    renamed = small(tool, sources, tmp_path / "work", "sm_86", "renamed")
    told = cubins.write([renamed], tmp_path, about=ABOUT, keep=("sm_80",))
    assert told["cubins"]["sm_80"] == before["cubins"]["sm_80"] and list(told["cubins"]["sm_86"]) == ["renamed"]
    files = sorted(p.relative_to(tmp_path / "cubins").as_posix() for p in (tmp_path / "cubins").rglob("*.z"))
    assert files == ["sm_80/sample.cubin.z", "sm_86/renamed.cubin.z"]
    cubins.write([renamed], tmp_path, about=ABOUT)
    assert not (tmp_path / "cubins" / "sm_80").exists()
    with pytest.raises(BuildError, match="the binaries that would stay were built by .*12.8.*, not by .*13.0.*; build all of them"):
        cubins.write([built[0]], tmp_path, about=(("name", "NVRTC"), ("version", "13.0")), keep=("sm_86",))


def test_write_refuses_broken_bounds_and_too_much(tool, sources, tmp_path, monkeypatch):
    good = small(tool, sources, tmp_path / "work")
    bad = dataclasses.replace(good, variant=sample_variant(spill_bound=0))
    with pytest.raises(BuildError, match="uses 160 bytes of local memory per thread, at most 0 allowed"):
        cubins.write([bad], tmp_path / "out", about=ABOUT)
    for limit in ("MOST_FILES", "MOST_BYTES"):
        with monkeypatch.context() as patch, pytest.raises(BuildError, match="1 files of [0-9]+ bytes in all are too much to package"):
            patch.setattr(cubins, limit, 0)
            cubins.write([good], tmp_path / "out", about=ABOUT)
    assert not (tmp_path / "out").exists()


def test_the_manifest_names_the_commit_that_changed_the_sources_last(tool, sources, tmp_path, monkeypatch):
    def git(*words: str) -> str:
        who = ("-c", "user.name=one", "-c", "user.email=one@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *words], cwd=repository, capture_output=True, text=True, check=True).stdout.strip()

    repository = sources.parent
    assert cubins.origin(sources) == {"commit": None, "dirty": True}, "there is no repository"
    for module in (config, nvrtc):
        shutil.copy(module.__file__, repository)
        monkeypatch.setattr(module, "__file__", str(repository / Path(module.__file__).name))
    git("init", "-q"), git("add", "."), git("commit", "-qm", "all")
    commit = git("rev-parse", "HEAD")
    assert cubins.origin(sources) == {"commit": commit, "dirty": False}
    (repository / "other.txt").write_text("unrelated")
    assert cubins.origin(sources) == {"commit": commit, "dirty": False}
    git("add", "."), git("commit", "-qm", "unrelated")
    assert cubins.origin(sources) == {"commit": commit, "dirty": False}
    for file in (sources / "sample.cuh", repository / "config.py", repository / "nvrtc.py"):
        text = file.read_text()
        file.write_text(text + "\n")
        assert cubins.origin(sources) == {"commit": commit, "dirty": True}, file.name
        file.write_text(text)
    (sources / "new.cuh").write_text("\n")
    assert cubins.origin(sources) == {"commit": commit, "dirty": True}
    git("add", "."), git("commit", "-qm", "new")
    assert cubins.origin(sources) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    told = cubins.write([small(tool, sources, tmp_path / "work")], tmp_path / "out", about=ABOUT, sources=cubins.origin(sources))
    assert told["sources"] == {"commit": git("rev-parse", "HEAD"), "dirty": True}


def test_check_names_what_differs_and_writes_nothing(tool, sources, tmp_path, monkeypatch):
    folder, name = tmp_path / "package", "sm_86/sample.cubin.z"
    file, manifest_file, header = folder / "cubins" / name, folder / "manifest.json", sources / "sample.cuh"
    monkeypatch.setattr(config, "packaged", lambda arch: (sample_variant(),))
    cubins.write([small(tool, sources, tmp_path / "work")], folder, about=tool.about)
    good, manifest_text, header_text = file.read_bytes(), manifest_file.read_text(), header.read_text()

    def differs() -> list[str]:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        found = cubins.check(("sm_86",), folder=folder, sources=sources)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return found

    header.write_text(f"// a comment\n{header_text}")
    manifest_file.write_text(manifest_text.replace('"commit": null', '"commit": "of another day"'))
    file.write_bytes(zlib.compress(zlib.decompress(good), 1))
    assert differs() == []
    header.write_text(header_text.replace("2.0f", "3.0f"))
    assert differs() == [f"{name} is not what the compiler gives for the sources", f"{name} is not as manifest.json describes it"]
    header.write_text(header_text)
    manifest_file.write_text(manifest_text.replace("12.8", "13.0").replace('"registers": ', '"registers": 1'))
    (file.parent / "other.cubin.z").write_bytes(good)
    file.write_bytes(good[:-5])
    wrong = differs()
    assert re.fullmatch("manifest.json names the compiler .*13.0.*, this one is .*12.8.*", wrong[0])
    assert re.fullmatch(rf"{name} cannot be read \(.*incomplete.*\)", wrong[1])
    assert wrong[2:] == [f"{name} is not as manifest.json describes it", "sm_86/other.cubin.z is there, but is not packaged"]
    manifest_file.write_text(manifest_text.replace('"sample"', '"renamed"'))
    file.unlink()
    wrong = differs()
    assert re.fullmatch(rf"{name} cannot be read \(.*No such file.*\)", wrong[0])
    assert wrong[1:3] == [f"{name} is not as manifest.json describes it", f"{name} is in manifest.json, but is not packaged"]
    manifest_file.unlink()
    (sentence,) = differs()
    assert re.fullmatch(r"manifest.json cannot be read \(.*\)", sentence)


# ---- the command ---------------------------------------------------------------------------------------------------------------------------------

TWO = ("sm_86", "sm_120")
STAND_IN = 'extern "C" __global__ void __launch_bounds__(256) {name}(int* p) {{ *p = SPARGE_DIM; }}\n'


def command(*arguments: str, cwd: Path, path: str = "") -> subprocess.CompletedProcess:
    """`python setup.py cubins ...` in a copy of the tree, where importing torch is an error."""
    (cwd / "no_torch").mkdir(exist_ok=True)
    (cwd / "no_torch" / "torch.py").write_text("raise SystemExit('the build imports torch')\n")
    env = {**os.environ, "PYTHONPATH": str(cwd / "no_torch"), "PATH": path + os.environ["PATH"], "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "setup.py", "cubins", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tree(tool, tmp_path_factory):
    """What the command needs of the repository, with small kernels of the real names and two architectures; built."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "tools").mkdir()
    for file in ("setup.py", "pyproject.toml", "README.md", "tools/cubins.py"):
        shutil.copy(ROOT / file, folder / file)
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("__pycache__", "src", "cubins", "manifest.json"))
    text = (folder / "kernels" / "config.py").read_text(encoding="utf-8")
    (folder / "kernels" / "config.py").write_text(text + f"\nSHIPPED = {TWO!r}\n", encoding="utf-8")
    (folder / "kernels" / "cuda" / "src").mkdir()
    for variant in config.variants("sm_120"):
        code = "".join(STAND_IN.format(name=name) for name in variant.symbols)
        (folder / "kernels" / "cuda" / "src" / variant.source).write_text(code)
    done = command(cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_setup_py_cubins_builds_without_torch(tree):
    file = tree / "kernels" / "cuda" / "manifest.json"
    told = json.loads(file.read_text())
    assert {arch: set(entries) for arch, entries in told["cubins"].items()} == {a: {v.name for v in config.packaged(a)} for a in TWO}
    assert told["compiler"] == {"name": "NVRTC", "version": "12.8", "package": f"{cubins.NVRTC_PACKAGE} {cubins.NVRTC_VERSION}"}

    source = tree / "kernels" / "cuda" / "src" / "select.cuh"
    source.write_text(source.read_text().replace("SPARGE_DIM", "SPARGE_DIM + 1"))
    assert command("--arch", "sm_120", cwd=tree).returncode == 0
    again = json.loads(file.read_text())["cubins"]
    changed = {(a, n) for a, entries in told["cubins"].items() for n, e in entries.items() if e != again[a][n]}
    assert changed == {("sm_120", config.select_name(dim)) for dim in config.DIMS}

    assert command("--check", "--arch", "sm_120", cwd=tree).returncode == 0
    before = {path: path.read_bytes() for path in (tree / "kernels").rglob("*") if path.is_file()}
    done = command("--check", cwd=tree)
    assert done.returncode == 1 and {path: path.read_bytes() for path in (tree / "kernels").rglob("*") if path.is_file()} == before
    stale = [f"sm_86/{config.select_name(dim)}.cubin.z" for dim in config.DIMS]
    assert {line.partition(" ")[0] for line in done.stderr.splitlines() if line.startswith("sm_")} == set(stale)

    done = command("--arch", "sm_75", cwd=tree)
    assert done.returncode == 1 and "no binaries are shipped for sm_75; choose from sm_86, sm_120" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvcc is a POSIX script")
def test_setup_py_cubins_with_nvcc(tree, tmp_path):
    """nvcc gets the same sources and definitions, and the manifest says that it was nvcc."""
    script = tmp_path / "nvcc"
    script.write_text(f"""#!{sys.executable}
import pathlib, shutil, sys
if "--version" in sys.argv:
    print("Cuda compilation tools, release 13.0, V13.0.48")
else:
    out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
    with open({str(tmp_path / "commands")!r}, "a") as log:
        print(*sys.argv[1:], file=log)
    shutil.copy(pathlib.Path({str(tree / "build" / "cubins" / "nvrtc")!r}, out.parent.name, out.name), out)
""")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    before = (tree / "kernels" / "cuda" / "manifest.json").read_bytes()
    done = command("--nvcc", "--source-dir", "kernels/cuda/src", "--out-dir", "out", cwd=tree, path=f"{tmp_path}:")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tree / "out" / "manifest.json").read_text())
    assert told["compiler"] == {"name": "nvcc", "version": "13.0"} and (tree / "kernels" / "cuda" / "manifest.json").read_bytes() == before
    lines = [line for line in (tmp_path / "commands").read_text().splitlines() if "sm_120/attention_mma_d64_int8_masked.cubin" in line]
    source = tree / "kernels" / "cuda" / "src"
    assert len(lines) == 1 and lines[0].startswith(
        f"-cubin -std=c++17 --expt-relaxed-constexpr -arch=sm_120 -I {source} -DSPARGE_DIM=64 -DSPARGE_MASKED=1 -DSPARGE_PV=0 "
        f"-x cu {source}/attention_mma.cuh -o "
    )


def test_missing_tools_are_sentences(monkeypatch):
    def nothing(name):
        raise cubins.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cubins.importlib.metadata, "distribution", nothing)
    monkeypatch.setattr(cubins.shutil, "which", lambda _: None)
    with pytest.raises(BuildError, match="nvidia-cuda-nvrtc-cu12 12.8.93 is not installed; run pip install nvidia-cuda-nvrtc-cu12==12.8.93 ninja"):
        cubins.nvrtc_tool()
    with pytest.raises(BuildError, match="there is no nvcc on PATH"):
        cubins.nvcc_tool()
    with pytest.raises(BuildError, match="ninja is not installed; run pip install ninja"):
        cubins._ninja()
    monkeypatch.setattr(cubins.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert cubins._ninja() == ["/usr/bin/ninja"]
