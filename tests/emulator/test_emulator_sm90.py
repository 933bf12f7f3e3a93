"""The emulator's sm_90: what right uses of barriers, bulk copies and warpgroup products give, and that every wrong one is noticed."""

from __future__ import annotations

import re

import emulator
import pytest
import torch
from samples import SampleParams, Source

LINE = r"samples_sm90\.cuh:\d+"
watched = pytest.mark.skipif(emulator.sanitised(), reason="g++ watches accesses for one sanitiser at a time")


def launch(symbol: str, *, a=None, b=None, c=None, out=None, n: int = 0, which: int = 0, grid: int = 1, shared: int = 16384, threads: int = 256,
           seed: int = 0, replace: tuple = ()) -> None:  # fmt: skip
    lib = emulator.library(Source("samples_sm90", str(emulator.HERE / "samples_sm90.cuh")), replace=replace)
    pointers = (t.data_ptr() if t is not None else None for t in (a, b, c, out))
    lib.launch(symbol, grid, SampleParams(*pointers, n, which), shared=shared, threads=threads, seed=seed, limit=60)


def random_bytes(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def swizzled(x: torch.Tensor) -> torch.Tensor:
    """Rows (..., rows, 64 or 128 bytes) with their 16-byte chunks where a product of the device looks for them."""
    rows, row_bytes = x.shape[-2:]
    row, chunk = torch.arange(rows)[:, None], torch.arange(row_bytes // 16)
    place = chunk ^ (row & 7 if row_bytes == 128 else row >> 1 & 3)
    out = torch.empty_like(x).unflatten(-1, (-1, 16))
    out[..., row, place, :] = x.unflatten(-1, (-1, 16))
    return out.flatten(-2)


# ---- products


@pytest.mark.parametrize("row_bytes", [64, 128])
@pytest.mark.parametrize("n", [64, 128, 192])
def test_products_of_integers(n, row_bytes):
    for seed in range(4):
        a, b = random_bytes(seed, 64, row_bytes), random_bytes(seed + 50, n, row_bytes)
        c = torch.randint(-(2**24), 2**24, (64, n), dtype=torch.int32, generator=torch.Generator().manual_seed(seed)) if seed % 3 else None
        if seed == 0:
            a, b = torch.full_like(a, 128), torch.full_like(b, 128)  # -128: the largest sums
        out = emulator.guarded((64, n), torch.int32)
        launch("product_s8", a=swizzled(a), b=swizzled(b), c=c, out=out, n=n * 1000 + row_bytes, threads=128, shared=32768, seed=seed)
        emulator.check_guards(out)
        expected = a.view(torch.int8).double() @ b.view(torch.int8).double().T
        assert torch.equal(out, expected.int() + (0 if c is None else c))


@pytest.mark.parametrize("n", [32, 40, 64, 72, 128, 136])
def test_products_of_e4m3(n):
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(rows, 64, generator=generator).to(torch.float8_e4m3fn) for rows in (64, n))
        c = torch.randn(64, n, generator=generator) if seed % 2 else None
        out = emulator.guarded((64, n), torch.float32)
        launch("product_e4m3", a=a, b=swizzled(b.view(torch.uint8)), c=c, out=out, n=n, threads=128, seed=seed)
        emulator.check_guards(out)
        start = torch.zeros(64, n) if c is None else c
        exact = start.double() + a.double() @ b.double().T
        bound = 66 * 2.0**-24 * (a.double().abs() @ b.double().abs().T + start.double().abs())  # fp32 sums of 64 terms in any order
        assert ((out.double() - exact).abs() <= bound).all()


@watched
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("which", [1, 2, 3, 4], ids=["no-fence", "fence-of-another-thread", "fence-before", "one-byte-after"])
def test_products_do_not_see_what_its_writer_has_not_fenced(which, seed):
    a, b = random_bytes(1, 64, 64), random_bytes(2, 64, 64)
    writer = "50" if which == 4 else r"\d+"
    message = rf"the product of {LINE} meets byte \d+ of shared memory, which thread {writer} wrote without a fence_async since"
    with pytest.raises(RuntimeError, match=message):
        launch("product_s8", a=a, b=b, out=torch.zeros(64, 64, dtype=torch.int32), n=64064, which=which, threads=128, seed=seed)


def test_warps_of_a_warpgroup_go_on_by_themselves():
    """Some warp has done two products before another one has done any; all do their own in the end."""
    rounds, ahead = 6, False
    for seed in range(8):
        done, count = torch.full((4 * rounds,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        launch("apart", a=random_bytes(1, 8192), c=count, out=done, n=rounds, threads=128, seed=seed)
        order = done.tolist()
        assert sorted(order) == sorted([*range(4)] * rounds)
        ahead = ahead or any(order[: order.index(late)].count(early) > 1 for late in range(4) for early in range(4))
    assert ahead


def test_registers_go_from_one_warpgroup_to_the_others():
    for seed in range(4):
        for which in (0, 3):
            out = torch.full((384,), -1, dtype=torch.int32)
            launch("registers", out=out, which=which, threads=384, seed=seed)
            assert torch.equal(out, torch.arange(384, dtype=torch.int32) // 128)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("which, free", [(1, r"\d+"), (2, "0")], ids=["too-many", "given-away-later"])
def test_registers_that_nobody_gives_away_are_waited_for(which, free, seed):
    message = rf"(?s)no thread can go on.*take_registers: \d+ threads wait, and {free} registers are free.* wait in take_registers at {LINE}"
    with pytest.raises(RuntimeError, match=message):
        launch("registers", out=torch.zeros(384, dtype=torch.int32), which=which, threads=384, seed=seed)


# ---- barriers and bulk copies


def squares(which: int, seed: int, grid: int = 2) -> bool:
    rounds = 7
    a, b = random_bytes(1, 2, 64, 64), random_bytes(2, 2 * grid, rounds, 64, 64)
    counter, out = torch.zeros(1, dtype=torch.int32), emulator.guarded((2 * grid, 2, 64, 64), torch.int32)
    launch("squares", a=swizzled(a), b=swizzled(b), c=counter, out=out, n=rounds, which=which, grid=grid, threads=384, shared=24576, seed=seed)
    emulator.check_guards(out)
    product = torch.einsum("gmk,irnk->irgmn", a.view(torch.int8).double(), b.view(torch.int8).double())
    expected = (product**2).sum(1).long()
    return torch.equal(out.long() & 0xFFFFFFFF, expected & 0xFFFFFFFF)


def test_a_pipeline_of_producer_and_consumers():
    assert all(squares(0, seed) for seed in range(20))


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(1, id="used-before-landed"),
        pytest.param(2, id="replaced-before-used"),
        pytest.param(3, id="given-back-at-the-issue"),
        pytest.param(4, id="half-of-the-bytes"),
        pytest.param(5, id="item-read-twice"),
        pytest.param(6, id="waits-for-too-little"),
        pytest.param(7, id="no-barrier-after-the-init"),
        pytest.param(8, id="given-back-by-one-warp-for-all"),
    ],
)
def test_a_pipeline_with_a_fault(which):
    """An error or a wrong result, under some seed of the first few."""

    def right(seed: int) -> bool:
        try:
            return squares(which, seed)
        except RuntimeError:
            return False

    assert not all(right(seed) for seed in range(6))


@pytest.mark.parametrize("which", [0, 1], ids=["right", "no-turns"])
def test_turns(which):
    rounds, x = 6, torch.arange(128, dtype=torch.int32) * 5

    def right(seed: int) -> bool:
        out = emulator.guarded((640,), torch.int32)
        try:
            launch("turns", a=x, out=out, n=rounds, which=which, seed=seed)
        except RuntimeError:
            return False
        emulator.check_guards(out)
        assert (out[128:384] == 1).all() and (out[384:512] == 0).all() and (out[512:] == 2).all()
        return torch.equal(out[:128], x + 3 * rounds)

    assert all(map(right, range(8))) if which == 0 else not all(map(right, range(8)))


@watched
@pytest.mark.parametrize(
    "which, what",
    [
        pytest.param(0, None, id="right"),
        pytest.param(1, "read", id="no-fence"),
        pytest.param(2, "read", id="fence-before-the-read"),
        pytest.param(3, "read", id="fence-of-another-lane"),
        pytest.param(4, "wrote", id="written-after-the-fence"),
        pytest.param(5, None, id="written-before-the-fence"),
    ],
)
def test_bulk_copies_over_what_was_accessed_plainly(which, what):
    rounds = 5
    x = torch.randint(0, 1 << 20, (rounds, 128), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    for seed in range(8):
        out = emulator.guarded((128,), torch.int32)
        if what:
            verb = "meets" if what == "wrote" else "writes over"
            message = rf"the bulk copy of {LINE} {verb} byte \d+ of shared memory, which thread \d+ {what} without a fence_async since"
            with pytest.raises(RuntimeError, match=message):
                launch("rounds", a=x, out=out, n=rounds, which=which, threads=160, shared=1024, seed=seed)
        else:
            launch("rounds", a=x, out=out, n=rounds, which=which, threads=160, shared=1024, seed=seed)
            emulator.check_guards(out)
            assert torch.equal(out, x.sum(0).int())


# ---- errors


@pytest.mark.parametrize(
    "which, n, message",
    [
        pytest.param(0, 0, f"no barrier was initialised at shared address 8192, used at {LINE}", id="no-init"),
        pytest.param(1, 0, f"barrier 8192 is initialised at {LINE} and was before at {LINE}", id="init-twice"),
        pytest.param(2, 0, f"the barrier 8192 of {LINE} was overwritten", id="overwritten"),
        pytest.param(2, 1, f"the barrier 8192 of {LINE} was overwritten", id="overwritten-then-used"),
        pytest.param(3, 0, f"barrier 8192 at {LINE}: thread 0 has not published it", id="not-published"),
        pytest.param(4, 0, f"barrier 8192 at {LINE}: a bulk copy before barrier_publish", id="copy-before-published"),
        pytest.param(5, 0, f"barrier 8192 at {LINE}: more arrivals than the phase's 1", id="too-many-arrivals"),
        pytest.param(6, 0, f"the bulk copy of {LINE} to 0 is still under way|barrier 8192 of {LINE} expects 16 bytes more", id="too-few-bytes"),
        pytest.param(7, 0, f"the bulk copy of {LINE} to 0 is still under way|barrier 8192 of {LINE} expects -16 bytes more", id="copy-not-expected"),
        pytest.param(8, 0, f"barrier 8196 at {LINE} is not aligned", id="odd-barrier"),
        pytest.param(9, 0, "bulk_copy of 16 bytes from .* to 8, which are not multiples of 16", id="copy-to-odd-address"),
        pytest.param(10, 0, "bulk_copy of 16 bytes from .*8 to 0, which are not multiples of 16", id="copy-from-odd-address"),
        pytest.param(11, 0, "bulk_copy of 24 bytes .* which are not multiples of 16", id="copy-of-odd-size"),
        pytest.param(12, 0, r"bulk_copy of 32 bytes to 16368 goes past the end of shared memory \(16384 bytes\)", id="copy-past-the-end"),
        pytest.param(13, 0, f"bulk_copy at {LINE} to where that of {LINE} is still under way", id="two-copies-to-one-place"),
        pytest.param(14, 0, rf"no thread can go on\n  barrier 8192 of {LINE}, in phase 0: 0 arrivals and 64 bytes are missing"
                     rf".*threads 0-127 have ended.*threads 128-255 wait in barrier_wait at {LINE}", id="waits-for-ever"),
        pytest.param(15, 0, f"barrier_wait for parity 2 at {LINE}", id="parity-2"),
        pytest.param(16, 0, f"barrier_init with 0 arrivals at {LINE}", id="no-arrivals"),
        pytest.param(17, 0, f"barrier 8192 at {LINE} cannot expect -16 bytes", id="negative-bytes"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_misuse_of_barriers(which, n, message, seed):
    with pytest.raises(RuntimeError, match=f"(?s)^misuse_barriers, block 0.*({message})"):
        launch("misuse_barriers", a=torch.zeros(64, dtype=torch.int32), n=n, which=which, seed=seed)


@pytest.mark.parametrize(
    "which, message",
    [
        pytest.param(0, f"hardware barrier 0 at {LINE}: they are 1 to 15", id="barrier-0"),
        pytest.param(1, f"hardware barrier 16 at {LINE}: they are 1 to 15", id="barrier-16"),
        pytest.param(2, f"hardware barrier 1 of 40 threads at {LINE}", id="40-threads"),
        pytest.param(3, f"hardware barrier 1 of 512 threads at {LINE} in a block of 256", id="more-than-all"),
        pytest.param(4, f"hardware barrier 1 at {LINE} is for (256|128) threads here and for (256|128) where others wait", id="two-counts"),
        pytest.param(5, f"hardware barrier 1 at {LINE}: the thread is there already", id="arrives-twice"),
        pytest.param(6, f"hardware barrier 1 at {LINE}: any_thread here or where others wait, but not both", id="votes-and-sync"),
        pytest.param(7, f"hardware barrier 1 at {LINE}: only some lanes of a warp have come", id="half-a-warp"),
        pytest.param(8, r"no thread can go on\n  hardware barrier 1: 128 of 256 threads are there.*threads 128-255 have ended",
                     id="ended-before"),
        pytest.param(16, "128 threads have come to hardware barrier 1, of 256, in vain", id="nobody-waits"),
        pytest.param(9, f"20 registers at {LINE}: they are multiples of 8 from 24 to 256", id="20-registers"),
        pytest.param(10, f"36 registers at {LINE}", id="36-registers"),
        pytest.param(11, f"keeps registers at {LINE}: the threads have 248, not 256 or more", id="keeps-more"),
        pytest.param(12, f"takes registers at {LINE}: the threads have 248, not 24 or less", id="takes-less"),
        pytest.param(13, "take_registers: 256 threads wait, and 0 registers are free", id="more-than-there-are"),
        pytest.param(14, "ended while lanes of its warp wait for it|in keep_registers, which lanes .* that have ended", id="one-thread-stays-away"),
        pytest.param(15, "threads of one warpgroup in different places", id="two-places"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_misuse_of_hardware_barriers_and_registers(which, message, seed):
    with pytest.raises(RuntimeError, match=f"(?s)^misuse_hardware, block 0.*({message})"):
        launch("misuse_hardware", which=which, seed=seed)


@pytest.mark.parametrize(
    "which, message",
    [
        pytest.param(0, f"no wgmma_fence between the last wgmma_wait and the product at {LINE}", id="no-fence"),
        pytest.param(1, f"no wgmma_fence between the last wgmma_wait and the product at {LINE}", id="no-second-fence"),
        pytest.param(2, "threads of one warpgroup in different places", id="two-places"),
        pytest.param(3, f"threads of one warpgroup ask for different products in wgmma_s8 at {LINE}", id="two-descriptors"),
        pytest.param(4, f"threads of one warpgroup ask for different products in wgmma_s8 at {LINE}", id="only-some-accumulate"),
        pytest.param(5, f"the accumulator of the product of {LINE} was touched while it was under way", id="accumulator-touched"),
        pytest.param(6, f"the left operand of the product of {LINE} was changed while it was under way", id="operand-touched"),
        pytest.param(7, f"the product at {LINE} writes where one of another kind or width that is under way writes", id="overlapping-accumulators"),
        pytest.param(8, f"the product at {LINE} has a descriptor that is not of rows of 64 or 128 swizzled bytes", id="descriptor-without-swizzle"),
        pytest.param(9, "a matrix starts at 8 rows, or 32, 64 or 96 bytes into the first row, got 16", id="odd-start"),
        pytest.param(10, "a matrix starts at 8 rows, or 32, 64 or 96 bytes into the first row, got 512", id="start-at-row-4"),
        pytest.param(16, "a matrix starts at 8 rows, or 32, 64 or 96 bytes into the first row, got 4144", id="odd-step"),
        pytest.param(11, rf"the product of {LINE} reads past the end of shared memory \(16384 bytes\)", id="past-the-end"),
        pytest.param(17, f"wgmma_fence before the product at {LINE} does not name all of its registers", id="sums-not-named"),
        pytest.param(18, f"wgmma_fence before the product at {LINE} does not name all of its registers", id="operand-not-named"),
        pytest.param(19, f"wgmma_wait lets go of the product of {LINE} and does not name its sums", id="sums-not-named-at-the-wait"),
        pytest.param(20, f"wgmma_wait names the sums of the product of {LINE}, which it does not let go of", id="sums-named-under-way"),
        pytest.param(12, f"ended without waiting for the product of {LINE}", id="never-waited"),
        pytest.param(13, f"ended without waiting for the product of {LINE}", id="never-committed"),
        pytest.param(14, f"threads of one warpgroup in different places: (wgmma_commit|wgmma_s8 at {LINE}) here", id="one-warp-commits"),
        pytest.param(15, f"threads of one warpgroup in different places: (wgmma_commit|wgmma_s8 at {LINE}) here", id="one-thread-does-without"),
        pytest.param(21, f"the product at {LINE} has a leading dimension of 2, which must be 1", id="leading-dimension"),
        pytest.param(22, f"the product at {LINE} has a descriptor with reserved bits that are not 0", id="version-of-another-arch"),
        pytest.param(23, f"the product at {LINE} has a descriptor with reserved bits that are not 0", id="address-too-large"),
        pytest.param(24, f"the product at {LINE} has a base offset of 2, although", id="base-offset"),
        pytest.param(25, f"the product at {LINE} has a stride of 528 bytes between groups of 8 rows", id="stride"),
        pytest.param(26, "a matrix starts at 8 rows, or 32, 64 or 96 bytes into the first row, got 4112", id="odd-start-by-hand"),
        pytest.param(27, f"the product of {LINE} meets byte 4100 of shared memory, which thread 9 wrote", id="operand-written", marks=watched),
        pytest.param(31, f"the product of {LINE} meets byte 4100 of shared memory, which thread 9 wrote", id="fenced-too-late", marks=watched),
        pytest.param(28, "threads of one warpgroup give [01] and [01] to wgmma_wait", id="two-waits"),
        pytest.param(29, "32 threads of a warpgroup have not come to wgmma_fence", id="one-warp-without-a-fence"),
        pytest.param(30, "ended while lanes of its warp wait for it|in wgmma_s8, which lanes .* that have ended", id="one-thread-stays-away"),
    ],
)
def test_misuse_of_products(which, message):
    with pytest.raises(RuntimeError, match=f"(?s)^misuse_products, block 0.*({message})"):
        launch("misuse_products", a=random_bytes(3, 8192), out=torch.zeros(256, dtype=torch.int32), which=which)


# ---- the build


def test_descriptors_are_those_of_the_device():
    """The device's own two functions, which are plain C++, give the words that products are held to here."""
    text = (emulator.SOURCES / "prim_sm90.cuh").read_text()
    functions = re.search(r"template <int kRowBytes>\nDEVICE uint64_t matrix_descriptor.*?\nDEVICE uint64_t at_byte[^\n]*\n", text, re.DOTALL)
    there = [("struct SampleParams {", f"namespace device {{\n{functions[0]}}}\nstruct SampleParams {{")]
    there += [(f"#define {name} {function}\n", f"#define {name} device::{function}\n")
              for name, function in (("DESCRIPTOR", "matrix_descriptor"), ("INSIDE", "at_byte"))]  # fmt: skip
    n = 220  # up to 220 KB
    words = [emulator.guarded((n, 4), torch.int64) for _ in range(2)]
    for out, replace in zip(words, ((), tuple(there)), strict=True):
        launch("descriptors", out=out, n=n, threads=128, replace=replace)
        emulator.check_guards(out)
    assert torch.equal(*words) and len(words[0].unique()) == 3 * n


def test_same_functions_as_the_device():
    """Both files of primitives define the same functions; the device's products, which are written out for each width, by their general form."""

    def interface(path) -> set:
        text = re.sub(r"namespace (\w+) \{.*?\n\}  // namespace \1", "", path.read_text(), flags=re.DOTALL)
        text = re.sub(r"//[^\n]*", "", text)
        text = re.sub(r",? ?\bSITE\b(?=\))", "", text)
        found = re.findall(r"(template <[^<>]+>\s*)?^DEVICE ([\w*]+ \w+)\(((?:[^()]|\([^()]*\))*)\)\s*[{;]", text, re.MULTILINE)
        return {(" ".join(template.split()), head, " ".join(arguments.split())) for template, head, arguments in found}

    device, host = interface(emulator.SOURCES / "prim_sm90.cuh"), interface(emulator.HERE / "prim_sm90.cuh")
    assert len(device) > 15, "the pattern finds the functions"
    assert device == host, f"only on the device: {device - host}, only in the emulator: {host - device}"
