"""kernels/cuda/build.py: every variant compiles within its bounds, and what is packaged is what the sources give.

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

import pytest
from sparge_kernels import config
from sparge_kernels.config import Variant
from sparge_kernels.cuda import build, nvrtc
from sparge_kernels.cuda.build import BuildError, Built
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
        return build.nvrtc_tool()
    except BuildError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{error}; with CI=true a missing compiler is a failure")
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def binaries(tool):
    """Every variant of every checked architecture, by (arch, name)."""
    found = build.compile_all(config.CHECKED, ROOT / "build" / "cubins" / "nvrtc", tool=tool)
    return {(b.arch, b.variant.name): b for b in found}


def compile_sample(tool, sources, work, arch="sm_86", **changes) -> Built:
    (built,) = build.compile_all((arch,), work, tool=tool, sources=sources, variants=lambda _: (sample_variant(**changes),))
    return built


# ---- the real sources ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", config.CHECKED)
def test_every_variant_compiles_within_its_bounds(binaries, arch):
    found = [binaries[arch, variant.name] for variant in config.variants(arch)]
    assert len(found) >= 16
    assert [sentence for built in found for sentence in build.complaints(built)] == []


def manifest() -> dict:
    file = FOLDER / "manifest.json"
    assert file.is_file(), "there are no packaged binaries; run: python setup.py cubins"
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("arch", config.SHIPPED)
def test_packaged_binaries_are_of_the_current_sources(arch):
    """Needs no compiler: who changes a device source, or a variant, builds and commits the binaries with it."""
    told = manifest()["cubins"][arch]
    current = {v.name: nvrtc.program(v.source, v.target(arch), v.defines).digest for v in config.variants(arch)}
    assert {name: entry["source_sha256"] for name, entry in told.items()} == current, "stale; run: python setup.py cubins"


@pytest.mark.skipif(os.name == "nt", reason="the packaged binaries are those of the compiler for Linux")
@pytest.mark.parametrize("arch", config.SHIPPED)
def test_packaged_binaries_are_what_the_compiler_gives(binaries, arch):
    """Byte for byte, and the manifest's figures with them."""
    told = manifest()["cubins"][arch]
    assert told == {v.name: build.describe(binaries[arch, v.name]) for v in config.variants(arch)}, "run: python setup.py cubins"


def test_package_holds_what_the_manifest_names():
    told = manifest()
    assert told["compiler"]["package"] == f"{build.NVRTC_PACKAGE} {build.NVRTC_VERSION}" and list(told["cubins"]) == list(config.SHIPPED)
    named = {entry["file"]: entry for entries in told["cubins"].values() for entry in entries.values()}
    files = {p.relative_to(FOLDER / "cubins").as_posix(): p for p in (FOLDER / "cubins").rglob("*") if p.is_file()}
    assert set(files) == set(named)
    for name, path in files.items():
        code = zlib.decompress(path.read_bytes())
        assert hashlib.sha256(code).hexdigest() == named[name]["sha256"], name
        assert {k: dataclasses.asdict(r) for k, r in build.inspect(code).items()} == named[name]["symbols"], name
    assert len(files) <= 150 and sum(p.stat().st_size for p in files.values()) <= 3_000_000


def test_the_pinned_compiler_is_the_one_that_is_installed_for_tests_and_builds():
    line = f"\"{build.NVRTC_PACKAGE}=={build.NVRTC_VERSION}; sys_platform != 'darwin'\""
    for file in ("pyproject.toml", "tools/comfyui/install.py"):
        assert line in (ROOT / file).read_text(encoding="utf-8"), file


def test_the_loader_compiles_the_same_bytes(binaries, tmp_path):
    variant = config.variants("sm_101")[0]
    loader = Loader(Places(tmp_path, tmp_path / "cache", lambda: iter([nvrtc.open_library(build.pinned_nvrtc())])))
    shutil.copytree(FOLDER / "src", tmp_path / "src")
    for origin in ("compiled by NVRTC 12.8 for sm_101", "cached, compiled by NVRTC 12.8 for sm_101"):
        assert loader.find("sm_101", variant) == Binary(binaries["sm_101", variant.name].code, "sm_101", origin)


def test_a_virtual_architecture_compiles_to_text(tool, sources):
    program = nvrtc.program("sample.cu", "compute_80", (("SAMPLE_THREADS", 96),), sources)
    compiled = nvrtc.open_library(build.pinned_nvrtc()).compile(program)
    text = compiled.code.decode("ascii")
    assert ".version" in text and ".target sm_80\n" in text and "\0" not in text and compiled.log == ""
    assert all(f".entry {name}(" in text for name in SYMBOLS)


# ---- inspect and complaints ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", config.CHECKED)
def test_inspect_reads_what_the_assembler_says(tool, sources, monkeypatch, arch):
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "--ptxas-options=-v"))
    compiled = nvrtc.open_library(build.pinned_nvrtc()).compile(nvrtc.program("sample.cu", arch, (("SAMPLE_THREADS", 96),), sources))
    found = build.inspect(compiled.code)
    for name, threads in (("sample_large", 96), ("sample_small", 1024)):
        (part,) = re.findall(rf"Function properties for {name}\n(.*?)Compile time", compiled.log, re.S)
        said = [re.search(pattern, part) for pattern in (r"Used (\d+) registers", r"(\d+) bytes smem", r"(\d+) bytes stack frame")]
        assert dataclasses.astuple(found[name]) == (threads, *(int(m.group(1)) if m else 0 for m in said))
    assert (found["sample_large"].shared, found["sample_large"].local) == (400, 160)
    assert set(found) == set(SYMBOLS)


@pytest.mark.parametrize("data", [b"", b"MZ" + bytes(100), b"\x7fELF\x02\x01" + bytes(100)], ids=["empty", "no ELF", "not CUDA's"])
def test_inspect_refuses_what_is_no_binary(data):
    with pytest.raises(BuildError, match="not a CUDA binary"):
        build.inspect(data)


def test_complaints_are_sentences(tool, sources, tmp_path):
    good = compile_sample(tool, sources, tmp_path / "work")
    (small,) = build.complaints(good)
    assert small == "sample_small in sample for sm_86 is declared for 1024 threads, expected 256"
    stingy = dataclasses.replace(good, variant=sample_variant(spill_bound=159))
    assert "sample_large in sample for sm_86 uses 160 bytes of local memory per thread, at most 159 allowed" in build.complaints(stingy)
    renamed = dataclasses.replace(good, variant=sample_variant(symbols=("sample_large",)))
    assert "sample for sm_86 has the kernels ['sample_large', 'sample_small'], expected ['sample_large']" in build.complaints(renamed)


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
    (sources / "sample.cu").write_text(SAMPLE + "// more\n")
    seen.add(digest())
    (sources / "sample.cuh").write_text("// another header\n")
    seen.add(digest())
    monkeypatch.setattr(nvrtc, "FLAGS", nvrtc.FLAGS[:-1])
    seen.add(digest())
    assert len(seen) == 9
    (sources / "unrelated.cuh").write_text("\n")
    assert digest() in seen


# ---- Hopper's own kernel -------------------------------------------------------------------------------------------------------------------------


def test_forms_of_p_and_v():
    by_form = {pv: [arch for arch in config.CHECKED if pv in config.forms(arch)] for pv in config.PV}
    assert by_form == {"int8": list(config.CHECKED), "fp8": ["sm_90"], "fp16": list(config.CHECKED)}
    assert {arch: config.pv_for(arch) for arch in config.CHECKED if config.pv_for(arch) != "int8"} == {"sm_90": "fp8"}
    sources = {pv: config.attention_variant("sm_90", 64, pv, True).source for pv in config.PV}
    assert sources == {"int8": "attention_mma.cuh", "fp8": "attention_sm90.cuh", "fp16": "attention_mma.cuh"}
    exact = {(arch, v.name) for arch in config.CHECKED for v in config.variants(arch) if v.exact}
    assert exact == {("sm_90", f"attention_sm90_d{dim}_fp8{masked}") for dim in config.DIMS for masked in ("", "_masked")}


def test_the_portable_kernel_refuses_fp8(tool, tmp_path):
    with pytest.raises(BuildError, match="P and V in FP8 are for attention_sm90.cuh"):
        build.compile_all(("sm_120",), tmp_path, tool=tool, variants=lambda arch: (config.attention_variant(arch, 64, "fp8", False),))


@pytest.mark.parametrize("dim, nbytes", [(64, 1024 + 2 * 8192 + 6 * 2 * (4096 + 4096 + 512) + 2048), (128, 1024 + 32768 + 8 * (16384 + 512) + 2048)])
def test_hoppers_configurations(dim, nbytes):
    chosen, candidates = config.hopper_config(dim), config.hopper_candidates(dim)
    variants = [config.hopper_variant(dim, False, c) for c in candidates]
    assert chosen in candidates and len({v.name for v in variants}) == len({v.defines for v in variants}) == len(candidates) == 13
    assert all(config.hopper_shared(dim, c) == v.shared <= config.HOPPER_SHARED for c, v in zip(candidates, variants, strict=True))
    assert config.hopper_shared(dim, chosen) == nbytes
    assert {(c.tile_blocks, c.overlap, c.split) for c in candidates} == {(2, False, False), (3, False, False), (2, False, True), (2, True, True)}
    assert {(v.threads, v.exact, v.spill_bound) for v in variants} == {(384, "sm_90a", 0)}
    other = dataclasses.replace(chosen, ones=False, overlap=True, split=True, poly=8, stages=3)
    named = config.hopper_variant(dim, True, other)
    assert other.label == "n128 s3 overlap split poly8" and named.name == f"attention_sm90_d{dim}_fp8_masked_n128_s3_overlap_split_poly8"
    assert dict(named.defines) == dict(
        SPARGE_DIM=dim, SPARGE_MASKED=1, SPARGE_TILE_BLOCKS=2, SPARGE_ONES=0, SPARGE_OVERLAP=1, SPARGE_SPLIT=1, SPARGE_POLY=8, SPARGE_STAGES=3
    )
    assert config.hopper_variant(dim, True, chosen).name == f"attention_sm90_d{dim}_fp8_masked"


EXACT = """
extern "C" __global__ void __launch_bounds__(384) sample_large(int* p) { asm volatile("wgmma.fence.sync.aligned;"); *p = 1; }
extern "C" __global__ void __launch_bounds__(384) sample_small(int* p) { *p = 2; }
"""


def test_a_variant_of_one_exact_arch_is_built_for_it_and_stored_with_its_devices(tool, sources, tmp_path):
    (sources / "sample.cu").write_text(EXACT)
    built = compile_sample(tool, sources, tmp_path / "work", "sm_90", exact="sm_90a")
    assert (built.arch, built.program.arch) == ("sm_90", "sm_90a")
    complaints = {f"sample_{which} in sample for sm_90a is declared for 384 threads, expected 256" for which in ("large", "small")}
    assert set(build.complaints(built)) == complaints
    built = dataclasses.replace(built, variant=sample_variant(threads=384, exact="sm_90a"))
    told = build.write([built], tmp_path / "out", about=ABOUT)
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
    assert nvrtc.remarks(right.log) == () and build.complaints(right) == []
    late = compiled(1)
    (remark,) = nvrtc.remarks(late.log)
    assert "(C7519) warpgroup.arrive is injected" in remark and remark in late.log
    sentence = "sample for sm_90a: the assembler has changed the matrix products, which no packaged binary may need ("
    assert [c for c in build.complaints(late) if c.startswith(sentence + remark + "); name every register")] == build.complaints(late) != []
    with pytest.raises(BuildError, match=r"sample for sm_90a: .*C7519"):
        build.write([late], tmp_path / "out", about=ABOUT)
    assert not (tmp_path / "out").exists()
    assert compiled(1).log == late.log, "a binary that was there before has its log"
    (tmp_path / "work" / "sm_90" / "sample.log").unlink()
    assert compiled(1).log == late.log, "a lost log is written again"


@pytest.mark.parametrize("dim", config.DIMS)
def test_the_assembler_leaves_the_products_of_every_candidate_as_they_are(tool, dim):
    """What is packaged is asked the same by its complaints. The number of stages decides addresses only."""
    forms = {dataclasses.replace(chosen, stages=0): chosen for chosen in config.hopper_candidates(dim)}.values()
    variants = tuple(config.hopper_variant(dim, masked, chosen) for chosen in forms for masked in (False, True))
    found = build.compile_all((config.HOPPER,), ROOT / "build" / "cubins" / f"candidates{dim}", tool=tool, variants=lambda _: variants)
    assert {b.variant.name: nvrtc.remarks(b.log) for b in found} == {variant.name: () for variant in variants} and len(found) == 18


# ---- what is written -----------------------------------------------------------------------------------------------------------------------------

ABOUT = (("name", "NVRTC"), ("version", "12.8"))


def small(tool, sources, work, arch="sm_86", name="sample") -> Built:
    """A sample that nothing can be said against."""
    (sources / "sample.cu").write_text(SAMPLE.replace("void sample_small", "void __launch_bounds__(256) sample_small"))
    return compile_sample(tool, sources, work, arch, name=name)


def test_write_is_deterministic_and_describes_each_file(tool, sources, tmp_path):
    built = [small(tool, sources, tmp_path / "work", arch) for arch in ("sm_120", "sm_86")]
    told = build.write(built, tmp_path / "one", about=ABOUT)
    assert build.write(built[::-1], tmp_path / "two", about=ABOUT) == told == json.loads((tmp_path / "one" / "manifest.json").read_text())
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
    build.write([built], tmp_path, about=ABOUT)
    file = tmp_path / "cubins" / "sm_86" / "sample.cubin.z"
    good = file.read_bytes()
    other = zlib.compress(built.code, 1)
    file.write_bytes(other)
    build.write([built], tmp_path, about=ABOUT)
    assert file.read_bytes() == other != good
    file.write_bytes(good[:-5])
    build.write([built], tmp_path, about=ABOUT)
    assert file.read_bytes() == good


def test_write_keeps_other_archs_and_drops_what_is_named_no_more(tool, sources, tmp_path):
    built = [small(tool, sources, tmp_path / "work", arch) for arch in ("sm_80", "sm_86")]
    before = build.write(built, tmp_path, about=ABOUT)
    renamed = small(tool, sources, tmp_path / "work", "sm_86", "renamed")
    told = build.write([renamed], tmp_path, about=ABOUT, keep=("sm_80",))
    assert told["cubins"]["sm_80"] == before["cubins"]["sm_80"] and list(told["cubins"]["sm_86"]) == ["renamed"]
    files = sorted(p.relative_to(tmp_path / "cubins").as_posix() for p in (tmp_path / "cubins").rglob("*.z"))
    assert files == ["sm_80/sample.cubin.z", "sm_86/renamed.cubin.z"]
    build.write([renamed], tmp_path, about=ABOUT)
    assert not (tmp_path / "cubins" / "sm_80").exists()
    with pytest.raises(BuildError, match="the binaries that would stay were built by .*12.8.*, not by .*13.0.*; build all of them"):
        build.write([built[0]], tmp_path, about=(("name", "NVRTC"), ("version", "13.0")), keep=("sm_86",))


def test_write_refuses_broken_bounds_and_too_much(tool, sources, tmp_path, monkeypatch):
    good = small(tool, sources, tmp_path / "work")
    bad = dataclasses.replace(good, variant=sample_variant(spill_bound=0))
    with pytest.raises(BuildError, match="uses 160 bytes of local memory per thread, at most 0 allowed"):
        build.write([bad], tmp_path / "out", about=ABOUT)
    for limit in ("MOST_FILES", "MOST_BYTES"):
        with monkeypatch.context() as patch, pytest.raises(BuildError, match="1 files of [0-9]+ bytes in all are too much to package"):
            patch.setattr(build, limit, 0)
            build.write([good], tmp_path / "out", about=ABOUT)
    assert not (tmp_path / "out").exists()


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
    for file in ("setup.py", "pyproject.toml", "README.md"):
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
    assert {arch: set(entries) for arch, entries in told["cubins"].items()} == {a: {v.name for v in config.variants(a)} for a in TWO}
    assert told["compiler"] == {"name": "NVRTC", "version": "12.8", "package": f"{build.NVRTC_PACKAGE} {build.NVRTC_VERSION}"}

    source = tree / "kernels" / "cuda" / "src" / "select.cuh"
    source.write_text(source.read_text().replace("SPARGE_DIM", "SPARGE_DIM + 1"))
    assert command("--arch", "sm_120", cwd=tree).returncode == 0
    again = json.loads(file.read_text())["cubins"]
    changed = {(a, n) for a, entries in told["cubins"].items() for n, e in entries.items() if e != again[a][n]}
    assert changed == {("sm_120", config.select_name(dim)) for dim in config.DIMS}

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
    lines = [line for line in (tmp_path / "commands").read_text().splitlines() if "sm_120/attention_mma_d64_fp16_masked.cubin" in line]
    source = tree / "kernels" / "cuda" / "src"
    assert len(lines) == 1 and lines[0].startswith(
        f"-cubin -std=c++17 --expt-relaxed-constexpr -arch=sm_120 -I {source} -DSPARGE_DIM=64 -DSPARGE_PV=2 -DSPARGE_MASKED=1 "
        f"-x cu {source}/attention_mma.cuh -o "
    )


def test_missing_tools_are_sentences(monkeypatch):
    def nothing(name):
        raise build.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(build.importlib.metadata, "distribution", nothing)
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    with pytest.raises(BuildError, match="nvidia-cuda-nvrtc-cu12 12.8.93 is not installed; run pip install nvidia-cuda-nvrtc-cu12==12.8.93 ninja"):
        build.nvrtc_tool()
    with pytest.raises(BuildError, match="there is no nvcc on PATH"):
        build.nvcc_tool()
    with pytest.raises(BuildError, match="ninja is not installed; run pip install ninja"):
        build._ninja()
    monkeypatch.setattr(build.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert build._ninja() == ["/usr/bin/ninja"]
