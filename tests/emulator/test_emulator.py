"""The emulator itself: what a right kernel computes, and that every kind of wrong one is noticed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import emulator
import numpy as np
import pytest
import torch
from samples import Source, launch
from sparge_kernels import config

SEEDS = range(8)


def random_bytes(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def ints(*shape: int) -> torch.Tensor:
    return emulator.guarded(shape, torch.int32)


# ---- threads meet


def right_under(check, seeds=SEEDS) -> list[bool]:
    return [check(seed) for seed in seeds]


def reverses(symbol: str, which: int):
    x = torch.arange(256, dtype=torch.int32) * 3

    def check(seed: int) -> bool:
        out = ints(256)
        launch(symbol, a=x, out=out, which=which, shared=1024, seed=seed)
        emulator.check_guards(out)
        return torch.equal(out, x.flip(0) if symbol == "reverse" else x.view(8, 32).flip(1).flatten())

    return check


@pytest.mark.parametrize("symbol", ["reverse", "reverse_warp"])
def test_a_barrier_and_its_absence(symbol):
    assert all(right_under(reverses(symbol, 0)))
    assert not all(right_under(reverses(symbol, 1)))


@pytest.mark.parametrize(
    "fault, missed_by",
    [
        pytest.param(0, "all", id="right"),
        pytest.param(1, "none", id="no-wait"),
        pytest.param(2, "none", id="waits-for-too-little"),
        pytest.param(3, "some", id="no-barrier-after-the-wait"),
        pytest.param(4, "some", id="no-barrier-before-the-refill"),
    ],
)
def test_asynchronous_copies(fault, missed_by):
    rounds = 7
    x = random_bytes(1, rounds, 256, 16)

    def check(seed: int) -> bool:
        out = emulator.guarded((rounds, 256, 16), torch.uint8)
        launch("pipeline", a=x, out=out, n=rounds, which=fault, shared=8192, seed=seed)
        emulator.check_guards(out)
        return torch.equal(out, x.flip(1))

    right = right_under(check)
    assert all(right) if missed_by == "all" else not any(right) if missed_by == "none" else not all(right), right


def test_the_same_seed_is_the_same_schedule():
    x = torch.arange(256, dtype=torch.int32)

    def outcome(seed: int) -> bytes:
        out = ints(256)
        launch("reverse_warp", a=x, out=out, which=1, shared=1024, seed=seed)
        return out.numpy().tobytes()

    outcomes = [outcome(seed) for seed in SEEDS]
    assert outcomes == [outcome(seed) for seed in SEEDS]
    assert len(set(outcomes)) > 1, "the seed changes nothing"


def test_lanes_tell_each_other():
    value = torch.randint(0, 1000, (64,), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    value[40] = 2000  # only in the second warp
    out = ints(64, 9)
    launch("lanes", a=value, out=out, n=2000, threads=64)
    emulator.check_guards(out)
    v, lane = value.view(2, 32).numpy(), np.arange(32)
    as_float = out.numpy().view(np.float32).reshape(2, 32, 9)
    got = out.numpy().reshape(2, 32, 9)
    assert (got[..., 0] == v[:, lane ^ 5]).all()
    assert (as_float[..., 1] == v[:, :1]).all()
    assert (got[..., 2] == v[:, ::-1]).all()
    assert (got[..., 3] == v[:, (lane * 7 + 3) % 32]).all()
    assert (as_float[..., 4] == v[:, 9:10]).all()
    assert (got[..., 5] == v[:, np.where(lane < 3, lane, lane - 3)]).all()
    votes = ((v % 3 == 0) * (1 << lane.astype(np.int64))).sum(1)
    assert (got[..., 6].view(np.uint32) == votes[:, None]).all()
    assert (got[0, :, 7] == 0).all() and (got[1, :, 7] == 1).all() and (got[..., 8] == 0).all()


def test_atomic_add_hands_out_every_number_once():
    out = torch.zeros(1 + 64 * 256, dtype=torch.int32)
    launch("count", out=out, grid=64, seed=5)
    assert out[0] == 64 * 256 and torch.equal(out[1:].sort().values, torch.arange(64 * 256, dtype=torch.int32))
    assert not torch.equal(out[1:].sort().values, out[1:]), "blocks and threads ran in their own order"


@pytest.mark.parametrize(
    "which, message",
    [
        pytest.param(0, r"lanes of one warp in different places.*wait in shuffle_xor at samples\.cuh:\d+.*wait in shuffle_xor", id="two-shuffles"),
        pytest.param(1, r"lanes of one warp in different places.*(vote.*shuffle_xor|shuffle_xor.*vote)", id="shuffle-and-vote"),
        pytest.param(2, "in (sync_cta while lanes of its warp wait|shuffle_xor while lanes of its warp wait in sync_cta)", id="shuffle-and-barrier"),
        pytest.param(3, "(ended while other threads wait in sync_cta|in sync_cta, which threads that have ended)", id="ended-before-barrier"),
        pytest.param(4, "(ended while lanes of its warp wait|in shuffle_xor, which lanes of its warp that have ended)", id="ended-before-shuffle"),
        pytest.param(5, "in another sync_cta than the threads before it", id="two-barriers"),
        pytest.param(6, r"no end after 0\.3 s.*run, last seen in sync_cta", id="hang"),
    ],
)
def test_threads_that_do_not_meet(which, message):
    for seed in range(2 if which == 6 else 6):
        with pytest.raises(RuntimeError, match=f"(?s)^strangers, block 0, thread \\d+: .*{message}"):
            launch("strangers", out=ints(256), which=which, shared=1024, seed=seed, limit=0.3 if which == 6 else 60)
    assert all(right_under(reverses("reverse", 0), range(2))), "a failed launch leaves nothing behind"


# ---- memory

SHARED = 1000


@pytest.mark.parametrize(
    "which, n, message",
    [
        pytest.param(0, 0, "shared address 8 is not aligned", id="copy-to-odd-address"),
        pytest.param(1, 0, "which is not aligned to 16 bytes", id="copy-from-odd-address"),
        pytest.param(2, 992, r"lies past the end of shared memory \(1000 bytes\)", id="copy-past-the-end"),
        pytest.param(3, 0, "shared address [0-9]+ is not aligned", id="matrix-at-odd-address"),
        pytest.param(4, 992, "lies past the end of shared memory", id="matrix-past-the-end"),
        pytest.param(5, SHARED, "wrote outside shared memory .1000 bytes., at offset 1000", id="write-past-the-end"),
        pytest.param(6, SHARED, "access [0-9]+ bytes past the end of shared memory", id="write-far-past-the-end"),
        pytest.param(6, SHARED + 200_000, "access 20[0-9]+ bytes past the end of shared memory", id="write-very-far-past-the-end"),
        pytest.param(7, 0, "wrote outside shared memory .1000 bytes., at offset -1", id="write-before-the-start"),
        pytest.param(8, 0, "shuffle with lane, mask or delta 32", id="shuffle-from-lane-32"),
        pytest.param(9, 0, r"to_float is exact below 2 \*\* 22 only, got 4194304", id="inexact-float"),
        pytest.param(10, 0, r"pack_uint8 takes values in \[0, 255\], got 255\.", id="too-large-for-a-byte"),
        pytest.param(15, 0, "shared_address of a pointer", id="not-shared"),
    ],
)
def test_what_the_device_would_not_accept(which, n, message):
    x, out = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"^trespass, block 0.*{message}"):
        launch("trespass", a=x, out=out, n=n, which=which, shared=SHARED)


def test_a_null_pointer_is_an_error():
    with pytest.raises(RuntimeError, match="access to memory that does not exist"):
        launch("reverse", a=torch.zeros(256, dtype=torch.int32), shared=1024)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"threads": 40}, "threads must be"),
        ({"threads": 512}, "threads must be"),
        ({"shared": 240_000}, "more shared memory"),
        ({"grid": 0}, "grid must be"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_launch_that_no_device_takes(how, message):
    with pytest.raises(RuntimeError, match=message):
        launch("reverse", **how)


def test_what_was_not_written_is_not_zero():
    out = ints(256, 2)
    launch("unwritten", out=out, shared=1024)
    assert (out[:, 0] == 0x7F7F7F7F).all() and (out[:, 1] != 0).all()


def test_sentinels():
    for n, message in ((48, "written 1 bytes past its end"), (-3, "written 3 bytes before its start")):
        out = emulator.guarded((48,), torch.uint8)
        emulator.check_guards(out)
        launch("trespass", out=out, n=n, which=11, shared=1024)
        with pytest.raises(AssertionError, match=message):
            emulator.check_guards(out[3:5])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert emulator.guarded((3, 5), dtype).isnan().all()
    assert emulator.guarded((0, 4), torch.float32).shape == (0, 4)


# ---- numbers


def convert(which: int, a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
    """uint32 words in, uint32 words out."""
    words = [None if x is None else torch.from_numpy(np.ascontiguousarray(x).view(np.uint32).view(np.int32).copy()) for x in (a, b)]
    out = ints(len(a))
    launch("convert", a=words[0], b=words[1], out=out, n=len(a), which=which)
    emulator.check_guards(out)
    return out.numpy().view(np.uint32)


def floats() -> np.ndarray:
    """Every half, bfloat and e4m3 value, the points half way between neighbours and what lies next to those, and random bits."""
    generator = np.random.default_rng(3)
    every = np.arange(65536, dtype=np.uint32)
    with np.errstate(all="ignore"):
        half = every.astype(np.uint16).view(np.float16).astype(np.float32)
        byte = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
        exact = np.concatenate([half, np.nextafter(half, np.float32(0)), np.sort(byte)])
        middle = np.concatenate([(np.sort(x)[1:] + np.sort(x)[:-1]) / 2 for x in (half, byte)]).astype(np.float32)
        near = np.concatenate([np.nextafter(middle, np.float32(s)) for s in (-np.inf, np.inf)])
    bfloat = np.concatenate([every << 16, (every << 16) + 0x7FFF, (every << 16) + 0x8000, (every << 16) + 0x8001])
    words = [x.view(np.uint32) for x in (exact, middle, near)] + [bfloat, generator.integers(0, 2**32, 200_000, dtype=np.uint32)]
    return np.concatenate(words).astype(np.uint32).view(np.float32)


def as_torch(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(dtype)


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, but for which NaN it is."""
    assert torch.equal(got.isnan(), expected.isnan())
    integer = {2: torch.int16, 4: torch.int32}[got.dtype.itemsize]
    different = (got.view(integer) != expected.view(integer)) & ~expected.isnan()
    assert not different.any(), f"{int(different.sum())} differ, first at {int(different.nonzero()[0])}"


def test_half_precision():
    every = np.arange(65536, dtype=np.uint32)
    same(as_torch(convert(0, every), torch.float32), as_torch(every.astype(np.uint16), torch.float16).float())
    x = floats()
    expected = torch.from_numpy(x).half()
    got = convert(1, x)
    same(as_torch(got.astype(np.uint16), torch.float16), expected)
    assert (got[np.isnan(x)] == 0x7FFF).all()
    pair = convert(2, x, x[::-1])
    same(as_torch((pair & 0xFFFF).astype(np.uint16), torch.float16), expected)
    same(as_torch((pair >> 16).astype(np.uint16), torch.float16), expected.flip(0))


def test_bfloat():
    every = np.arange(65536, dtype=np.uint32)
    same(as_torch(convert(3, every), torch.float32), as_torch(every.astype(np.uint16), torch.bfloat16).float())
    x = floats()
    expected = torch.from_numpy(x).bfloat16()
    pair = convert(4, x, x[::-1])
    same(as_torch((pair & 0xFFFF).astype(np.uint16), torch.bfloat16), expected)
    same(as_torch((pair >> 16).astype(np.uint16), torch.bfloat16), expected.flip(0))
    assert ((pair & 0xFFFF)[np.isnan(x)] == 0x7FFF).all()


def test_e4m3():
    """PyTorch's conversion up to the largest value; beyond it the device saturates where PyTorch gives NaN."""
    x = floats()
    with np.errstate(invalid="ignore"):
        clamped = torch.from_numpy(np.clip(x, -448, 448))
    expected = clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    expected = np.where(np.isnan(x), 0x7F, expected)
    word = convert(5, x, x[::-1])
    assert ((word & 255) == expected).all()
    assert ((word >> 8 & 255) == expected[::-1]).all()
    assert ((word >> 16 & 255) == np.where(np.isnan(x), 0x7F, expected ^ 0x80)).all()
    assert (word >> 24 == 0x38).all()


def test_bytes():
    x = np.concatenate([floats(), np.arange(-300, 300, 0.25, dtype=np.float32)])
    with np.errstate(invalid="ignore"):
        expected = np.where(np.isnan(x), 0, np.clip(np.rint(x), -128, 127)).astype(np.int8).view(np.uint8)
        negative = np.where(np.isnan(x), 0, np.clip(np.rint(-x), -128, 127)).astype(np.int8).view(np.uint8)
    word = convert(6, x, x[::-1])
    assert ((word & 255) == expected).all() and ((word >> 8 & 255) == expected[::-1]).all()
    assert ((word >> 16 & 255) == negative).all() and (word >> 24 == 1).all()
    x = np.arange(-0.5, 255.49, 0.125, dtype=np.float32)
    word = convert(7, x, x[::-1])
    assert ((word & 255) == np.rint(x)).all() and ((word >> 8 & 255) == np.rint(x[::-1])).all()
    assert (word >> 16 == 0x0200).all(), "0.5 and 1.5 go to the even neighbour"
    assert convert(7, np.array([np.nan], np.float32))[0] & 255 == 255


def test_arithmetic():
    x = floats()
    y = np.random.default_rng(4).permutation(x)
    f = lambda words: words.view(np.float32)  # noqa: E731
    with np.errstate(all="ignore"):
        for which, larger in ((10, True), (11, False)):
            first = np.isnan(y) | ((x > y) if larger else (x < y)) | ((x == y) & (np.signbit(x) != larger))
            same(torch.from_numpy(f(convert(which, x, y))), torch.from_numpy(np.where(first, x, y)))
        same(torch.from_numpy(f(convert(12, x, y))), torch.from_numpy(x / y))
        same(torch.from_numpy(f(convert(14, x))), torch.from_numpy(np.sqrt(x)))
        got, exact = f(convert(8, x)), np.exp2(x.astype(np.float64))
        normal = (exact >= 2.0**-126) & (exact < 2.0**128)
        assert np.abs(got[normal] / exact[normal] - 1).max() < 2**-22  # the device's own bound
        assert (got[exact < 2.0**-127] == 0).all() and not np.signbit(got[exact < 2.0**-127]).any()
        assert np.isnan(got[np.isnan(x)]).all() and (got[x >= 128] == np.inf).all()
    assert f(convert(9, np.array([0, 1, 8, np.inf], np.float32))).tolist() == [-np.inf, 0, 3, np.inf]
    assert f(convert(13, np.array([1 + 2**-12], np.float32), np.array([1 + 2**-12], np.float32)))[0] == np.float32(
        (1 + 2**-12) ** 2 - (1 + 2**-12)
    ), "rounded once"
    n = np.array([0, -1, 4194303, -4194304, 2072640], np.int32)
    assert f(convert(15, n)).tolist() == n.tolist()


# ---- what differs from device to device


def test_to_float_of_every_arch():
    n = np.concatenate([np.arange(-(1 << 22), 1 << 22, 1017, dtype=np.int32), np.array([-1, 0, 1, (1 << 22) - 1], np.int32)])
    for arch in config.CHECKED:
        with emulator.configured(emulator.Configuration(arch=arch)):
            assert (convert(15, n).view(np.float32) == n).all()


@pytest.mark.parametrize("arch", ["sm_80", "sm_86"])
def test_what_an_arch_does_not_have(arch):
    with emulator.configured(emulator.Configuration(arch=arch)):
        with pytest.raises(RuntimeError, match=rf"pack_e4m3 needs sm_89, got {arch[3:]} at samples\.cuh:\d+"):
            convert(5, np.zeros(4, np.float32))


def test_builds_that_come_out_the_same_are_one():
    source = Source("samples", str(emulator.HERE / "samples.cuh"))
    built = {arch: emulator.library(source, arch=arch).path for arch in config.CHECKED}
    assert built["sm_89"] == built["sm_90"] == built["sm_100"] == built["sm_120"]
    assert len(set(built.values())) == 3, "to_float of sm_80, and what sm_86 does not have"


def test_contraction():
    """a * b + c is rounded twice or, contracted, once. A processor without such an instruction has no contraction to try."""
    if os.uname().machine == "x86_64" and "-march=x86-64-v3" not in emulator._machine_flags():
        pytest.skip("this processor has no fused product")
    x = np.float32(1 + 2**-12)
    exact, product = float(x) * float(x) - float(x), np.float32(float(x) * float(x))
    for contract, expected in ((False, product - x), (True, np.float32(exact))):
        with emulator.configured(emulator.Configuration(contract=contract)):
            assert convert(17, np.array([x]), np.array([x])).view(np.float32)[0] == expected
    assert np.float32(exact) != product - x


APPROXIMATIONS = {8: np.exp2, 9: np.log2, 16: lambda x: 1 / np.sqrt(x)}


@pytest.mark.parametrize("which", APPROXIMATIONS, ids=["exp2", "log2", "inverse_root"])
def test_approximations(which):
    """With a salt they are off by up to twice what a device's may be, in both directions, always by the same; what is exact stays so."""
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan] + ([1] if which == 9 else []), np.float32)
    x = np.concatenate([np.random.default_rng(5).uniform(0.01, 20, 20_000), np.geomspace(1e-30, 1e30, 5000) if which != 8 else []]).astype(np.float32)
    with np.errstate(all="ignore"):
        y = APPROXIMATIONS[which](x.astype(np.float64))
    last_place = np.spacing(np.abs(y).astype(np.float32)).astype(np.float64)
    bound = 5.5 * last_place  # what is off by 4 is itself rounded, or rounded twice
    if which == 9:
        bound = np.where((x > 0.5) & (x < 2), 2.0**-21 + last_place, bound)
    found, specials = [], []
    for salt in (0, 1, 1, 2):
        with emulator.configured(emulator.Configuration(salt=salt)):
            found.append(convert(which, x).view(np.float32))
            specials.append(convert(which, special).view(np.float32))
        off = (found[-1] - y) / bound
        assert np.abs(off).max() <= (1 if salt else 0.5) and (not salt or (off.min() < -0.7 and off.max() > 0.7))
        assert np.array_equal(specials[-1], specials[0], equal_nan=True)
    assert (found[1] == found[2]).all() and (found[1] != found[0]).mean() > 0.8 and (found[1] != found[3]).mean() > 0.8


@pytest.mark.parametrize("form", ["s8s8", "u8s8", "half"])
@pytest.mark.parametrize("seed", range(3))
def test_matrix_products(form, seed):
    a, b = random_bytes(seed, 16, 32), random_bytes(seed + 50, 8, 32)
    generator = torch.Generator().manual_seed(seed)
    if form == "half":
        a, b = (torch.randn(n, 16, generator=generator).half().view(torch.uint8) for n in (16, 8))
        left, right = (x.view(torch.float16).double() for x in (a, b))
    else:
        left, right = a.view(torch.int8).double() if form == "s8s8" else a.double(), b.view(torch.int8).double()
    integer = form.endswith("s8")
    c = torch.randint(-(2**20), 2**20, (16, 8), generator=generator).int() if integer else torch.randn(16, 8, generator=generator)
    out = emulator.guarded((16, 8), c.dtype)
    launch("matrix_product", a=a, b=b, c=c, out=out, which=["s8s8", "u8s8", "half"].index(form), threads=32, seed=seed)
    emulator.check_guards(out)
    exact = c.double() + left @ right.T
    # fp32 sums of 32 terms: the order of the additions is free.
    bound = 0 if integer else 33 * 2.0**-24 * (left.abs() @ right.abs().T + c.double().abs())
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_matrix_loads(transposed):
    rows = torch.randint(0, 32767, (32, 8), dtype=torch.int16, generator=torch.Generator().manual_seed(1))
    named = torch.randperm(32, generator=torch.Generator().manual_seed(2)).int()
    out = emulator.guarded((32, 4, 2), torch.int16)
    launch("matrix_load", a=rows, b=named, out=out, which=int(transposed), threads=32, shared=512)
    matrices = rows[named.long()].view(4, 8, 8)
    for lane in range(32):
        for m in range(4):
            matrix = matrices[m].T if transposed else matrices[m]
            assert out[lane, m].tolist() == matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()


# ---- the build


def test_same_functions_as_the_device():
    """Both files of primitives define the same functions, macros and types."""

    def interface(path) -> tuple[set, set, set]:
        text = re.sub(r"namespace emulator \{.*?\n\}  // namespace emulator", "", path.read_text(), flags=re.DOTALL)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r",? ?\bSITE\b(?=\))", "", text)
        functions = set()
        for template, head, arguments in re.findall(
            r"(template <[^>]*>\s*)?^DEVICE ([\w*]+ \w+)\(((?:[^()]|\([^()]*\))*)\)\s*\{", text, re.MULTILINE
        ):
            functions.add((" ".join(template.split()), head, " ".join(arguments.split())))
        macros = set(re.findall(r"#define (\w+)", text)) - {"SITE"}
        return functions, macros, set(re.findall(r"struct alignas\(\d+\) \w+ \{[^}]*\};", text))

    device, host = interface(emulator.SOURCES / "prim.cuh"), interface(emulator.HERE / "prim.cuh")
    assert len(device[0]) > 50, "the pattern finds the functions"
    for here, there in zip(device, host, strict=True):
        assert here == there, f"only on the device: {here - there}, only in the emulator: {there - here}"


def test_replacements_must_match_once():
    x, out = torch.arange(256, dtype=torch.int32), ints(256)
    launch("reverse", a=x, out=out, shared=1024, replace=(("memory[255 - t];\n", "memory[t];\n"),))
    assert torch.equal(out, x)
    for old, n in (("memory[", "[0-9]+"), ("no such text", "0")):
        with pytest.raises(ValueError, match=f"exactly once, got {n}"):
            launch("reverse", replace=((old, ""),))


def test_a_source_that_does_not_compile():
    with pytest.raises(emulator.BuildError, match=r"(?s)g\+\+ refuses broken.*error"):
        emulator.library(Source("broken", str(emulator.HERE / "samples.cuh")), replace=(("struct SampleParams {", "struct SampleParams"),))


def test_the_struct_s_size_is_checked():
    lib = emulator.library(Source("samples", str(emulator.HERE / "samples.cuh")))
    with pytest.raises(RuntimeError, match="another size in Python"):
        lib.launch("reverse", 1, emulator._Field())


OTHER_PROCESSOR = """
import emulator, pytest, sys
emulator.FLAGS = (*emulator.FLAGS, "-DEMULATOR_UCONTEXT")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "tests/emulator/test_emulator.py", "-k", "barrier_and or copies or do_not_meet or lanes_tell"]))
"""


@pytest.mark.skipif(emulator.sanitised(), reason="starts a process of its own")
def test_fibers_of_other_processors():
    """The way to switch between threads that is not written for one processor."""
    env = {**os.environ, "PYTHONPATH": str(emulator.HERE)}
    done = subprocess.run([sys.executable, "-c", OTHER_PROCESSOR], cwd=emulator.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "15 passed" in done.stdout, done.stdout + done.stderr


def test_what_another_process_removes_from_the_cache_stops_no_build(monkeypatch, tmp_path):
    """What is listed and then gone is like a link to nowhere; what nobody has used for long is removed."""
    monkeypatch.setattr(emulator, "CACHE", tmp_path)
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "old").write_text("")
    os.utime(tmp_path / "old", (0, 0))
    for folder in (False, True):
        built = emulator.build("sample", ("-c",), {"unit.cpp": f"int sample = {int(folder)};"}, ("unit.cpp",), ".o")
        assert built.is_file() and not (tmp_path / "old").exists()
        (tmp_path / "old").mkdir()
        os.utime(tmp_path / "old", (0, 0))


def test_a_missing_compiler(monkeypatch):
    monkeypatch.setattr(emulator.shutil, "which", lambda name: None)
    for ci, outcome in (("true", pytest.fail.Exception), ("", pytest.skip.Exception)):
        monkeypatch.setenv("CI", ci)
        with pytest.raises(outcome, match=r"g\+\+ 12 on Linux is missing"):
            emulator.compiler.__wrapped__()


# ---- sanitisers


@pytest.fixture(scope="module")
def sanitised():
    """Every test of under_sanitizer.py: how its process ended, and what that wrote to stderr."""
    if emulator.sanitised():
        pytest.skip("runs such processes itself")
    done = emulator.run_sanitised("-s", "tests/emulator/under_sanitizer.py")
    ended = re.findall(r"(.*?)^(test_\w+) ended with (-?\d+)$", done.stderr, re.S | re.M)
    assert done.returncode == 0 and ended, done.stdout + done.stderr
    return {test: (int(status), report) for report, test, status in ended}


@pytest.mark.parametrize(
    "test, finding",
    [
        ("test_right_kernels", None),
        ("test_read_past_a_tensor", "heap-buffer-overflow"),
        ("test_write_past_a_guarded_tensor", "use-after-poison"),
        ("test_write_past_shared_memory", "heap-buffer-overflow"),
        ("test_write_before_shared_memory", "heap-buffer-overflow"),
        ("test_shift_too_far", "shift exponent 40 is too large"),
        ("test_misaligned_read", "misaligned address"),
    ],
)
def test_sanitised(sanitised, test, finding):
    status, report = sanitised[test]
    assert status == (emulator.SANITIZED_EXIT if finding else 0), report
    if finding:
        assert finding in report and "samples.cuh" in report, report
