"""Every kernel compiles within its bounds, and what is packaged is what the sources give.

The compilations (about a hundred, on a machine of two cores a minute) are kept in build/cubins, where ninja finds what has not changed since.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path

import cubins
import hopper_candidates
import pytest
from cubins import BuildError, Built
from sample_kernels import ABOUT, SYMBOLS, compile_sample, sample_variant
from sparge_kernels import config
from sparge_kernels.config import Variant
from sparge_kernels.cuda import nvrtc
from sparge_kernels.cuda.loader import Binary, Loader, Places

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "kernels" / "cuda"


@pytest.fixture(scope="session")
def binaries(tool):
    """Every variant of every checked architecture, by (arch, name)."""
    found = cubins.compile_all(config.CHECKED, ROOT / "build" / "cubins" / "nvrtc", tool=tool)
    return {(b.arch, b.variant.name): b for b in found}


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
