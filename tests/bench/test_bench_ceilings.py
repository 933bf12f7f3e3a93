"""The ceilings without a GPU: every kernel does on the emulator what it is counted for, compiles, and holds the instruction that it is named for."""

from __future__ import annotations

import collections
import struct
from types import SimpleNamespace

import bench_ceilings
import bench_host
import bench_timing
import cubins
import emulator
import numpy
import pytest
import torch
from gpu_rehearsal import Event
from required import missing
from samples import Source
from sparge_kernels import config
from sparge_kernels.backends import cuda as backend
from sparge_kernels.cuda import loader, nvrtc

CPU = torch.device("cpu")
THREADS, SUMS, REPEATS, CHAINS = 256, 8, 4, 8  # as in ceilings_sm80.cuh
SOURCES = {file: Source(file.removesuffix(".cuh"), str(bench_ceilings.HERE / file)) for file in (bench_ceilings.PORTABLE, bench_ceilings.HOPPER)}
BY_SYMBOL = {ceiling.symbol: ceiling for ceiling in bench_ceilings.CEILINGS}


def run(symbol: str, data: torch.Tensor, *, rounds: int, copy: int = 0, shared: int = 0, blocks: int = 2) -> torch.Tensor:
    """What each block of a kernel adds up."""
    ceiling = BY_SYMBOL[symbol]
    out, cycles = (emulator.guarded((blocks,), dtype) for dtype in (torch.int32, torch.int64))
    params = bench_ceilings.CeilingParams(data.data_ptr(), out.zero_().data_ptr(), cycles.data_ptr(), data.numel(), rounds, copy)
    emulator.library(SOURCES[ceiling.file]).launch(symbol, blocks, params, shared=shared or ceiling.shared, threads=ceiling.threads, seed=1)
    emulator.check_guards(out, cycles)
    assert (cycles > 0).all() and (cycles < 1000).all()  # every block wrote its own
    return out


# ---- the list


@pytest.mark.parametrize("arch", config.CHECKED)
def test_which_exist_where(arch):
    names = {ceiling.name for ceiling in bench_ceilings.ceilings_for(arch)}
    usual = {"mma s8 x s8", "mma u8 x s8", "mma fp16", "mma fp16, sums in fp16", "exponentials", "int32 to fp32", "16-byte copies from L2"}
    hopper = {"wgmma s8, operands in shared memory", "wgmma e4m3, one operand in registers", *(f"bulk copies of {n} KB from L2" for n in (8, 16))}
    expected = usual | (hopper if arch == "sm_90" else set())
    expected |= ({"fp32 to int8, values"} if arch != "sm_80" else set()) | ({"fp32 to e4m3, values"} if arch not in ("sm_80", "sm_86") else set())
    assert names == expected


def test_work_and_rates():
    work = {ceiling.name: ceiling.work for ceiling in bench_ceilings.CEILINGS}
    warp = SUMS * REPEATS * 2 * 16 * 8
    assert work["mma s8 x s8"] == work["mma u8 x s8"] == 8 * warp * 32
    assert work["mma fp16"] == work["mma fp16, sums in fp16"] == 8 * warp * 16
    assert work["wgmma s8, operands in shared memory"] == work["wgmma e4m3, one operand in registers"] == 8 * 2 * 64 * 128 * 32
    assert work["exponentials"] == work["int32 to fp32"] == THREADS * CHAINS * REPEATS
    assert work["fp32 to int8, values"] == work["fp32 to e4m3, values"] == 4 * work["exponentials"]
    assert work["16-byte copies from L2"] == 16384 and work["bulk copies of 8 KB from L2"] == 8192
    small = next(ceiling for ceiling in bench_ceilings.CEILINGS if ceiling.copy == 8192)
    assert small.rate(132, 10.0) == pytest.approx(132 * 40_000 * 8192 / 0.01 / 1e12)
    assert all(ceiling.shared <= 227 << 10 for ceiling in bench_ceilings.CEILINGS)
    assert all(ceiling.shared <= 99 << 10 for ceiling in bench_ceilings.CEILINGS if ceiling.file == bench_ceilings.PORTABLE)


# ---- what the kernels compute


def operands(kind: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Not negative, so that the sums are large beside what is cut off; small enough that fp16 holds them to a few parts in a thousand."""
    count = bench_ceilings._OPERANDS // kind.itemsize
    if kind == torch.int8:
        return torch.randint(-127, 128, (count,), generator=generator, dtype=kind)
    return torch.rand(count, generator=generator).to(kind).view(torch.int8)


def fragments(data: torch.Tensor, dtype: torch.dtype, a_dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each warp a (8, 16, K) and every b (8, SUMS, 8, K), in fp64, from the words that its threads read."""
    per, words = 4 // dtype.itemsize, data.view(torch.int32)[: (4 + 2 * SUMS) * THREADS].view(-1, 8, 8, 4, 1)  # word, warp, lane / 4, lane % 4
    values = words.contiguous().view(torch.int8).view(dtype).view(-1, 8, 8, 4, per)
    a = words.contiguous().view(torch.int8).view(a_dtype or dtype).view(-1, 8, 8, 4, per)[:4].double().view(2, 2, 8, 8, 4, per)  # half of k, of rows
    b = values[4:].double().view(SUMS, 2, 8, 8, 4, per)
    return a.permute(2, 1, 3, 0, 4, 5).reshape(8, 16, 8 * per), b.permute(2, 0, 3, 1, 4, 5).reshape(8, SUMS, 8, 8 * per)


PRODUCTS = {
    "ceiling_mma_s8s8": (torch.int8, torch.int8), "ceiling_mma_u8s8": (torch.int8, torch.uint8), "ceiling_mma_half": (torch.float16, None),
    "ceiling_mma_half_short": (torch.float16, None),
}  # fmt: skip


@pytest.mark.parametrize("symbol", PRODUCTS)
def test_products_multiply_what_they_are_given(symbol):
    dtype, a_dtype = PRODUCTS[symbol]
    data = operands(dtype, torch.Generator().manual_seed(0))
    a, b = fragments(data, dtype, a_dtype)
    total = float(torch.einsum("wik,wcjk->", a, b))
    for rounds in (1, 3):
        got = run(symbol, data, rounds=rounds)
        expected = REPEATS * rounds * total
        if dtype == torch.int8:
            assert got.tolist() == [(int(expected) + 2**31) % 2**32 - 2**31] * 2
        else:
            assert (got - expected).abs().max() <= THREADS + (4e-3 if "short" in symbol else 1e-5) * expected  # every thread is cut to a whole number


def chained(data: torch.Tensor, step, rounds: int) -> int:
    """The sum over all threads' words after a kernel's rounds of `step`, which takes words and the words of the constant operand."""
    words = data.view(torch.int32)[: (CHAINS + 1) * THREADS].view(-1, THREADS)
    x, y = words[:CHAINS].numpy().copy(), words[CHAINS:].numpy()
    for _ in range(rounds * REPEATS):
        x = step(x, numpy.broadcast_to(y, x.shape).copy())
    return (int(x.astype(numpy.int64).sum()) + 2**31) % 2**32 - 2**31


def four_of(x: numpy.ndarray, y: numpy.ndarray, convert) -> numpy.ndarray:
    """Words of the bytes of x, y, y, x."""
    values = torch.from_numpy(numpy.stack([x, y, y, x], -1)).view(torch.float32)
    return convert(values).contiguous().view(torch.int8).view(torch.int32)[..., 0].numpy()


CHAINED = {
    "ceiling_to_float": lambda x, y: x.astype(numpy.float32).view(numpy.int32),
    "ceiling_pack_int8": lambda x, y: four_of(x, y, lambda v: v.round().clamp(-128, 127).to(torch.int8)),
    "ceiling_pack_e4m3": lambda x, y: four_of(x, y, lambda v: v.clamp(-448, 448).to(torch.float8_e4m3fn)),
}


@pytest.mark.parametrize("symbol", CHAINED)
def test_conversions_convert_what_they_are_given(symbol):
    data = (300 * torch.rand(bench_ceilings._OPERANDS // 4, generator=torch.Generator().manual_seed(0)) - 150).view(torch.int8)
    if symbol == "ceiling_pack_e4m3":  # no word of four is a NaN
        data = data.view(torch.float32).clamp(0.02, 1.5).view(torch.int8)
    for rounds in (1, 2):
        assert run(symbol, data, rounds=rounds).tolist() == [chained(data, CHAINED[symbol], rounds)] * 2


def test_exponentials_are_taken():
    data = bench_ceilings.data("fp32", CPU)
    power = lambda x, y: numpy.exp2(-x.view(numpy.float32)).view(numpy.int32)  # noqa: E731
    for rounds in (1, 3):
        off = [(got - chained(data, power, rounds) + 2**31) % 2**32 - 2**31 for got in run("ceiling_exp2", data, rounds=rounds).tolist()]
        assert max(map(abs, off)) <= CHAINS * THREADS * 4  # units in the last place of every value
    assert abs(chained(data, power, 1) - chained(data, power, 2)) > 1 << 20


@pytest.mark.parametrize("rounds", [1, 3, 4, 9])
def test_loads_bring_the_last_pieces(rounds):
    data = torch.randint(-127, 128, (3 * 16384,), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    words = data.view(torch.int32)[::4].view(3, -1).long().sum(1)  # the first word of every 16 bytes
    got = run("ceiling_load", data, rounds=rounds)
    for block in (0, 1):
        expected = sum(int(words[(7 * block + i) % 3]) for i in range(max(0, rounds - 4), rounds))
        assert int(got[block]) == (expected + 2**31) % 2**32 - 2**31


def test_an_empty_launch_does_nothing():
    emulator.library(SOURCES[bench_ceilings.PORTABLE]).launch("ceiling_empty", 1, bench_ceilings.CeilingParams(), threads=32)


def unswizzled(rows: torch.Tensor) -> torch.Tensor:
    """Rows of 128 bytes with their 16-byte chunks in order."""
    chunk = torch.arange(8) ^ (torch.arange(len(rows)) % 8)[:, None]
    return rows.view(len(rows), 8, 16).gather(1, chunk[:, :, None].expand(-1, -1, 16)).flatten(1)


def test_hoppers_int8_products_multiply_what_they_are_given():
    data = bench_ceilings.data("s8", CPU)
    rows = unswizzled(data.view(256, 128)).long()
    assert run("ceiling_s8", data, rounds=3).tolist() == [3 * int((rows[:128] @ rows[128:].T).sum())] * 2


def test_hoppers_fp8_products_multiply_what_they_are_given():
    data = bench_ceilings.data("e4m3", CPU)
    side = unswizzled(data[16384:].view(128, 128)).view(torch.float8_e4m3fn).float()  # 128 columns of depth 128
    words = data.view(torch.int32)[: 16 * 256].view(4, 4, 8, 8, 4)  # k-step, register, warp, lane / 4, lane % 4
    a = words.contiguous().view(torch.float8_e4m3fn).view(4, 4, 8, 8, 4, 4).float()
    total = 0.0
    for step in range(4):
        b = side[:, 32 * step : 32 * step + 32].view(128, 2, 4, 4).sum(0)  # half, lane % 4, byte: the sums over all columns
        total += sum(float((a[step, r] * b[r // 2]).sum()) for r in range(4))
    got = run("ceiling_e4m3", data, rounds=2).double()
    assert (got - 2 * total).abs().max() <= 256 + 1e-3 * abs(total)  # every thread rounds its part


@pytest.mark.parametrize("rounds", [1, 8, 21])
def test_bulk_copies_end(rounds):
    got = run("ceiling_copy", torch.zeros(3 * 1024, dtype=torch.int8), rounds=rounds, copy=1024, shared=256 + 8 * 1024)
    assert got.tolist() == [rounds] * 2


# ---- compiled


@pytest.fixture(scope="module")
def compiler():
    library = cubins.pinned_nvrtc()
    if library is None:
        missing(f"the pinned compiler ({cubins.NVRTC_PACKAGE} {cubins.NVRTC_VERSION})")
    return nvrtc.open_library(library)


# The low 12 bits of a machine instruction, and how many a kernel has in its rounds: those of one round.
IMMA, HMMA, MUFU, I2F, I2FP, F2IP, F2FP = 0x237, 0x23C, 0x308, 0x306, 0x245, 0x243, 0x23E
HELD = {
    "ceiling_mma_s8s8": (IMMA, 32), "ceiling_mma_u8s8": (IMMA, 32), "ceiling_mma_half": (HMMA, 32), "ceiling_mma_half_short": (HMMA, 32),
    "ceiling_exp2": (MUFU, 32), "ceiling_to_float": (I2FP, 32), "ceiling_pack_int8": (F2IP, 64), "ceiling_pack_e4m3": (F2FP, 64),
}  # fmt: skip


def opcodes(code: bytes, symbol: str) -> list[int]:
    """Of the kernel's instructions, 16 bytes each, in order."""
    (table,) = struct.unpack_from("<Q", code, 40)
    size, count, names = struct.unpack_from("<HHH", code, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", code, table + i * size) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        if code[start : code.index(b"\0", start)] == f".text.{symbol}".encode():
            return [struct.unpack_from("<Q", code, at)[0] & 0xFFF for at in range(header[4], header[4] + header[5], 16)]
    raise KeyError(symbol)


@pytest.mark.parametrize("arch", config.CHECKED)
def test_the_portable_kernels_hold_their_instructions(compiler, arch):
    code = compiler.compile(bench_ceilings.program(bench_ceilings.PORTABLE, arch)).code
    found = cubins.inspect(code)
    here = {ceiling.symbol: ceiling for ceiling in bench_ceilings.ceilings_for(arch) if ceiling.file == bench_ceilings.PORTABLE}
    assert set(found) == {*here, "ceiling_empty"}
    assert all(needs.threads == (32 if name == "ceiling_empty" else 256) and needs.local == 0 for name, needs in found.items())
    for symbol in here.keys() & HELD.keys():
        opcode, count = (I2F, 32) if (symbol, arch) == ("ceiling_to_float", "sm_80") else HELD[symbol]
        seen = collections.Counter(opcodes(code, symbol))
        assert seen[opcode] == count, f"{symbol}: {seen.most_common(4)}"


def test_hoppers_kernels_compile(compiler):
    compiled = compiler.compile(bench_ceilings.program(bench_ceilings.HOPPER, config.SM90.arch))
    assert not cubins.remarks(compiled.log)
    found = cubins.inspect(compiled.code)
    here = {ceiling.symbol: ceiling.threads for ceiling in bench_ceilings.ceilings_for("sm_90") if ceiling.file == bench_ceilings.HOPPER}
    assert {name: needs.threads for name, needs in found.items()} == here
    assert not any(needs.local for needs in found.values())


def test_the_first_compiler_that_can_compiles(monkeypatch):
    def says(archs, answer):
        def compile(program):
            if isinstance(answer, str):
                raise nvrtc.CompilerError(answer)
            return nvrtc.Compiled(answer + program.arch.encode(), "")

        return SimpleNamespace(archs=lambda: archs, compile=compile)

    def with_compilers(*compilers):
        monkeypatch.setattr(loader, "default", lambda: SimpleNamespace(places=SimpleNamespace(compilers=lambda: iter(compilers))))

    with_compilers("no library", says(("sm_90",), "too old"), says(("sm_80", "sm_90"), b"for "))
    assert bench_ceilings.compile_ceilings("sm_90") == {bench_ceilings.PORTABLE: b"for sm_90", bench_ceilings.HOPPER: b"for sm_90a"}
    assert bench_ceilings.compile_ceilings("sm_86") == {bench_ceilings.PORTABLE: b"for sm_80"}  # whose binaries run there
    with_compilers("no library", says(("sm_90",), "too old"))
    assert bench_ceilings.compile_ceilings("sm_89") == {bench_ceilings.PORTABLE: "no library; too old"}
    with_compilers()
    assert bench_ceilings.compile_ceilings("sm_89") == {bench_ceilings.PORTABLE: "there is no NVRTC"}


# ---- measured


class Emulated(bench_host.StubMachine):
    """Two multiprocessors on which a launch takes 4 ms."""

    def __init__(self, arch, now):
        super().__init__(arch)
        self.processors, self.index, self.now = 2, 0, now

    def launch(self, kernel, grid, threads, shared, params, stream):
        emulator.library(kernel.variant).launch(kernel.name, grid, params, shared=shared, threads=threads, seed=2)
        self.now[0] += 4.0


@pytest.fixture
def measure(monkeypatch):
    """arch, files' binaries -> rows, measured on the emulator."""
    now = [0.0]

    def load(code, device, symbols, origin):
        if code != b"right":
            raise RuntimeError("CUDA_ERROR_INVALID_IMAGE: no\nmore")
        file = bench_ceilings.HOPPER if symbols[0] in ("ceiling_s8", "ceiling_e4m3", "ceiling_copy") else bench_ceilings.PORTABLE
        return {symbol: SimpleNamespace(variant=SOURCES[file], name=symbol) for symbol in symbols}

    few = tuple(bench_ceilings.Ceiling(**{**vars(ceiling), "rounds": 5}) for ceiling in bench_ceilings.CEILINGS)
    for owner, name, value in (
        (bench_ceilings, "CEILINGS", few), (bench_ceilings, "ROUNDS", 1), (bench_ceilings, "COPY_BYTES", 1 << 20), (bench_ceilings, "LAUNCHES", 5),
        (bench_ceilings.driver, "driver", lambda: SimpleNamespace(load=load)), (torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30)),
        (torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1 << 18)),
        (bench_host, "cost", lambda machine, device: {"call_us": 31.0, "launch_us": 3.0}),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, value)
    clock = bench_timing.Clock(lambda: Event(now), lambda: now.__setitem__(0, now[0] + 0.5))

    def copied(self, source):
        now[0] += 2.0
        return self

    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    return lambda arch, compiled, **more: bench_ceilings.measure(Emulated(arch, now), CPU, clock, compiled, **more)


def test_every_ceiling_is_measured(measure):
    rows = {row["name"]: row for row in measure("sm_90", {bench_ceilings.PORTABLE: b"right", bench_ceilings.HOPPER: b"right"})}
    kernels = bench_ceilings.ceilings_for("sm_90")
    others = [bench_ceilings.MEMORY, bench_ceilings.LAUNCH, bench_ceilings.CALL_ON_HOST, bench_ceilings.LAUNCH_ON_HOST]
    assert list(rows) == [ceiling.name for ceiling in kernels] + others
    for ceiling in kernels:
        row = rows[ceiling.name]
        assert row["ms"]["median"] == 4.0 and row["rate"] == pytest.approx(2 * 5 * ceiling.work / 4e9)
        cycles = 5 * ceiling.work / row["per_cycle"]
        assert cycles == pytest.approx(round(cycles)) and row["ghz"] == pytest.approx(cycles / 4e6)
    assert rows[bench_ceilings.MEMORY]["rate"] == pytest.approx(2 * (1 << 20) / 2e9)
    assert rows[bench_ceilings.LAUNCH]["rate"] == 4000.0 and rows[bench_ceilings.CALL_ON_HOST]["rate"] == 31.0
    told = bench_ceilings.table(list(rows.values()))
    assert len(told.splitlines()) == 2 + len(rows) and f"| {bench_ceilings.LAUNCH_ON_HOST} | 3 us |  |  |  |" in told


def test_rows_are_kept_on_the_way(measure):
    kept = []
    rows = measure("sm_80", {bench_ceilings.PORTABLE: b"right"}, keep=lambda found: kept.append([row["name"] for row in found]))
    names = [row["name"] for row in rows]
    assert kept[:2] == [names[:1], names[:2]] and kept[-1] == names


def test_what_fails_does_not_stop_the_others(measure):
    rows = {row["name"]: row for row in measure("sm_90", {bench_ceilings.PORTABLE: b"right", bench_ceilings.HOPPER: "refused: line 3"})}
    failed = [name for name, row in rows.items() if "reason" in row]
    assert failed == [ceiling.name for ceiling in bench_ceilings.ceilings_for("sm_90") if ceiling.file == bench_ceilings.HOPPER]
    assert all(rows[name] == {"name": name, "reason": "refused: line 3"} for name in failed)
    told = bench_ceilings.table(list(rows.values()))
    assert f"- not measured: {failed[0]}: refused: line 3" in told and "exponentials | " in told
    rows = measure("sm_80", {bench_ceilings.PORTABLE: b"wrong"})
    reasons = {row["name"]: row["reason"] for row in rows if "reason" in row}
    assert set(reasons.values()) == {"CUDA_ERROR_INVALID_IMAGE: no"} and bench_ceilings.LAUNCH in reasons and bench_ceilings.MEMORY not in reasons


def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_ceilings.main() == 0
    assert capsys.readouterr().out == "Nothing was measured, because there is no GPU that PyTorch can use.\n"
    for name, value in {"is_available": lambda: True, "current_device": lambda: 0}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(backend, "machine_of", lambda device: (None, "this GPU is too old"))
    assert bench_ceilings.main() == 0
    assert capsys.readouterr().out == "Nothing was measured, because this GPU is too old.\n"
