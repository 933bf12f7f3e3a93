"""kernels/cuda/loader.py: the order of places, what each refusal says, the table of kernels."""

from __future__ import annotations

import re
import threading
import zlib

import pytest
import torch
from sparge_kernels.config import Variant
from sparge_kernels.cuda import driver as driver_module
from sparge_kernels.cuda import loader as loader_module
from sparge_kernels.cuda.loader import Binary, NoBinary, compatible
from toy_package import OTHER, VARIANT, Compiler, FakeDriver, damage, make, refusals

# ---- which architectures run what ----------------------------------------------------------------------------------------------------------------

BUILT = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")


@pytest.mark.parametrize(
    "device, built, expected",
    [
        ("sm_80", BUILT, ("sm_80",)),
        ("sm_86", BUILT, ("sm_86", "sm_80")),
        ("sm_87", BUILT, ("sm_86", "sm_80")),
        ("sm_87", ("sm_80", "sm_89"), ("sm_80",)),
        ("sm_88", BUILT, ("sm_86", "sm_80")),
        ("sm_89", BUILT, ("sm_89", "sm_86", "sm_80")),
        ("sm_90", BUILT, ("sm_90a", "sm_90")),
        ("sm_91", BUILT, ("sm_90",)),
        ("sm_100", BUILT, ("sm_100",)),
        ("sm_103", BUILT, ("sm_100",)),
        ("sm_103", ("sm_100", "sm_101"), ("sm_100",)),
        ("sm_101", ("sm_100", "sm_101"), ("sm_101", "sm_100")),
        ("sm_88", ("sm_86", "sm_87"), ("sm_86",)),
        ("sm_110", BUILT, ()),
        ("sm_120", BUILT, ("sm_120",)),
        ("sm_121", BUILT, ("sm_120",)),
        ("sm_75", BUILT, ()),
        ("sm_130", BUILT, ()),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_compatible(device, built, expected):
    assert compatible(device, built) == expected


# ---- packaged ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, taken", [("sm_86", "sm_86"), ("sm_87", "sm_86"), ("sm_89", "sm_86"), ("sm_121", "sm_120")])
def test_packaged_binary_comes_first(package, device, taken):
    for arch in ("sm_80", "sm_86", "sm_120"):
        package.add(arch)
    compiler = Compiler()
    assert make(package, compiler).find(device, VARIANT) == Binary(f"toy for {taken}".encode(), taken, f"packaged for {taken}")
    assert compiler.compiled == []


def test_a_variant_that_the_exact_arch_lacks_is_taken_from_a_lower_one(package):
    package.add("sm_80")
    package.add("sm_86", OTHER)
    assert make(package).find("sm_86", VARIANT).arch == "sm_80"


def test_what_is_not_packaged_is_compiled_and_where_nothing_compiles_that_is_said(package):
    package.add("sm_86", OTHER)
    assert make(package, Compiler()).find("sm_87", VARIANT).origin == "compiled by NVRTC 12.8 for sm_87"
    with pytest.raises(NoBinary) as raised:
        make(package).find("sm_86", VARIANT)
    assert str(raised.value) == (
        "no binary of toy for sm_86: none is packaged, it is compiled where it is asked for; "
        "there is no NVRTC to compile one; install a torch built for CUDA, which brings it, or the package nvidia-cuda-nvrtc"
    )


EXACT = Variant("toy", "toy.cuh", ("toy_one", "toy_two"), (("SIZE", 64),), 0, 0, exact="sm_90a")


def test_a_variant_of_one_exact_arch_is_packaged_with_its_devices(package):
    package.add("sm_90", EXACT)
    assert make(package).find("sm_90", EXACT) == Binary(b"toy for sm_90", "sm_90a", "packaged for sm_90a")
    package.add("sm_90", VARIANT)  # the same file, for any device of the major version: stale for the exact one, which has another target
    with pytest.raises(NoBinary, match="it was built from other sources than those beside it"):
        make(package).find("sm_90", EXACT)


@pytest.mark.parametrize("device", ["sm_89", "sm_91", "sm_100", "sm_103", "sm_120"])
def test_a_variant_of_one_exact_arch_is_offered_to_no_other(package, device):
    package.add("sm_90", EXACT)
    compiler = Compiler(archs=("sm_89", "sm_90", "sm_91", "sm_100", "sm_103", "sm_120"))
    with pytest.raises(NoBinary) as raised:
        make(package, compiler).find(device, EXACT)
    assert raised.value.reasons == (
        f"no packaged binary runs on {device} (there are some for sm_90a)",
        f"it cannot be compiled for {device}, because its code is for sm_90a alone",
    )
    assert compiler.compiled == []


def test_a_variant_of_one_exact_arch_is_compiled_for_it(package):
    old, new = Compiler("11.0", archs=("sm_80",)), Compiler(archs=("sm_89", "sm_90", "sm_100"))
    found = make(package, old, new).find("sm_90", EXACT)
    assert (found.arch, found.origin) == ("sm_90a", "compiled by NVRTC 12.8 for sm_90a")
    assert new.compiled == [("toy.cuh", "sm_90a", (("SIZE", 64),))]
    assert make(package, Compiler()).find("sm_90", EXACT).origin == "cached, compiled by NVRTC 12.8 for sm_90a"


@pytest.mark.parametrize(
    "harm, word",
    [
        (damage, ""),
        (lambda f: f.write_bytes(f.read_bytes()[:-6]), "incomplete or truncated"),
        (lambda f: f.write_bytes(zlib.compress(b"something else")), "its checksum is wrong"),
        (lambda f: f.unlink(), "No such file"),
        (lambda f: (f.parents[2] / "src" / "toy_part.cuh").write_text("int newer;\n"), "it was built from other sources than those beside it"),
    ],
    ids=["bit flipped", "cut short", "another binary", "missing", "stale"],
)
def test_an_unusable_packaged_binary_is_passed_by_with_a_reason(package, harm, word):
    harm(package.add("sm_103"))
    compiler = Compiler()
    loader, driver = make(package, compiler), FakeDriver("sm_103")
    assert loader.find("sm_103", VARIANT).origin == "compiled by NVRTC 12.8 for sm_103"
    assert loader.kernel(driver, 0, VARIANT, "toy_one").origin == "toy, cached, compiled by NVRTC 12.8 for sm_103"
    (reason,) = refusals(loader, "sm_103")
    assert re.fullmatch(r"the packaged binary for sm_103 cannot be used \(.+\); reinstall the pack", reason) and word in reason
    with pytest.raises(NoBinary) as raised:
        make(package, cache=None).find("sm_103", VARIANT)
    assert raised.value.reasons[0] == reason


def test_a_damaged_binary_gives_way_to_a_lower_arch(package):
    package.add("sm_80")
    damage(package.add("sm_86"))
    assert make(package).find("sm_86", VARIANT).arch == "sm_80"


@pytest.mark.parametrize(
    "text", [None, "", "[1, 2]", '{"compiler": {}}', '{"cubins": 3', "\x00"], ids=["missing", "empty", "list", "no entry", "cut", "zero"]
)
def test_an_unreadable_manifest_is_a_reason(package, text):
    if text is not None:
        (package.folder / "manifest.json").write_text(text)
    with pytest.raises(NoBinary, match=r"there are no packaged binaries, manifest.json cannot be read \(.*\); reinstall the pack"):
        make(package).find("sm_86", VARIANT)


def test_missing_sources_are_a_reason(package):
    (package.folder / "src" / "toy_part.cuh").unlink()
    with pytest.raises(NoBinary, match=r"the device sources cannot be read \(.*toy_part.cuh.*\); reinstall the pack"):
        make(package, Compiler()).find("sm_100", VARIANT)


# ---- kernels -------------------------------------------------------------------------------------------------------------------------------------


def test_kernels_are_loaded_once_per_device_and_variant(package):
    package.add("sm_86"), package.add("sm_86", OTHER)
    loader, driver = make(package), FakeDriver()
    kernels = [loader.kernel(driver, device, VARIANT, symbol) for device in (0, 1) for symbol in ("toy_one", "toy_two") for _ in range(2)]
    assert len(driver.loads) == 2 and len({id(k) for k in kernels}) == 4
    assert [k.name for k in kernels[::2]] == ["toy_one", "toy_two"] * 2 and {k.origin for k in kernels} == {"toy, packaged for sm_86"}
    assert loader.kernel(driver, 0, OTHER, "toy_one") not in kernels and len(driver.loads) == 3
    assert refusals(loader, "sm_86") == ()


def test_a_binary_that_the_driver_refuses_gives_way_to_the_next(package):
    package.add("sm_80"), package.add("sm_86")
    loader, driver = make(package, Compiler()), FakeDriver("sm_87", refuses=(b"for sm_86", b"for sm_80"))
    assert loader.kernel(driver, 0, VARIANT, "toy_one").origin == "toy, compiled by NVRTC 12.8 for sm_87"
    with pytest.raises(NoBinary) as raised:
        make(package).kernel(driver, 0, VARIANT, "toy_one")
    assert raised.value.reasons[:2] == tuple(
        f"the driver refused the binary packaged for {arch} (CUDA_ERROR_NO_BINARY_FOR_GPU)" for arch in ("sm_86", "sm_80")
    )


def test_a_refusal_is_remembered(package):
    package.add("sm_86")
    loader, driver = make(package), FakeDriver(refuses=(b"toy",))
    for _ in range(3):
        with pytest.raises(NoBinary, match=r"the driver refused the binary packaged for sm_86 \(CUDA_ERROR_NO_BINARY_FOR_GPU\); there is no"):
            loader.kernel(driver, 0, VARIANT, "toy_one")
    assert len(driver.loads) == 1


def test_an_old_driver_is_the_only_reason(package):
    package.add("sm_86")
    driver = FakeDriver(old="an NVIDIA driver for CUDA 12.0 or newer is needed")
    with pytest.raises(NoBinary) as raised:
        make(package).kernel(driver, 0, VARIANT, "toy_one")
    assert raised.value.reasons == (driver.old,) and driver.loads == []


@pytest.mark.parametrize(
    "fault", [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")], ids=["memory", "fault"]
)
def test_what_is_not_about_the_binary_passes_and_is_not_remembered(package, fault):
    package.add("sm_86")
    loader, driver = make(package), FakeDriver(fault=fault)
    with pytest.raises(type(fault)) as raised:
        loader.kernel(driver, 0, VARIANT, "toy_one")
    assert raised.value is fault
    driver.fault = None
    assert loader.kernel(driver, 0, VARIANT, "toy_one").name == "toy_one"


def test_threads_load_once(package):
    package.add("sm_86")
    loader, driver, found = make(package), FakeDriver(), []
    threads = [threading.Thread(target=lambda: found.append(loader.kernel(driver, 0, VARIANT, "toy_one"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(driver.loads) == 1 and len(found) == 8 and len({id(k) for k in found}) == 1


def test_tables_are_bounded(package, monkeypatch):
    package.add("sm_86")
    monkeypatch.setattr(loader_module, "LIMIT", 6)
    loader, driver = make(package), FakeDriver()
    for device in range(10):
        loader.kernel(driver, device, VARIANT, "toy_one")
    assert len(loader._kernels) == 6 and len(driver.loads) == 10
    assert loader.kernel(driver, 9, VARIANT, "toy_two").device == 9 and len(driver.loads) == 10
    assert loader.kernel(driver, 0, VARIANT, "toy_one").device == 0 and len(driver.loads) == 11


# ---- the loader of this process ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def process(package, monkeypatch):
    """The default loader over the test's package, and the driver that it gets."""
    loader_module.default.cache_clear()
    monkeypatch.setattr(loader_module, "FOLDER", package.folder)
    monkeypatch.setenv("SPARGE_CACHE_DIR", str(package.folder.parent / "cache"))
    compilers = []
    monkeypatch.setattr(loader_module, "_compilers", lambda: iter(compilers))

    def use(driver, *given):
        compilers[:] = given
        monkeypatch.setattr(driver_module, "driver", lambda: driver)

    yield use
    loader_module.default.cache_clear()


def test_why_not_loads_everything_or_tells(process, package):
    package.add("sm_86"), package.add("sm_86", OTHER)
    driver = FakeDriver()
    process(driver)
    assert loader_module.why_not(0, (VARIANT, OTHER)) is None and len(driver.loads) == 2
    assert loader_module.kernel(0, OTHER, "toy_one").name == "toy_one" and len(driver.loads) == 2
    assert loader_module.default().find("sm_86", OTHER).code == b"other for sm_86"


def test_why_not_without_a_driver_or_a_binary(process, package):
    process("no NVIDIA driver: libcuda.so.1 could not be loaded")
    assert loader_module.why_not(0, (VARIANT,)) == "no binary of toy for device 0: no NVIDIA driver: libcuda.so.1 could not be loaded"
    process(FakeDriver("sm_100"))
    assert "there is no NVRTC" in loader_module.why_not(1, (VARIANT,))


def test_cache_folder_of_the_default_loader(process, package):
    process(FakeDriver("sm_100"), Compiler())
    assert loader_module.why_not(0, (VARIANT,)) is None
    assert len(list((package.folder.parent / "cache").iterdir())) == 1
