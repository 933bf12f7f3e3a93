"""Which GPUs, binaries and forms of P and V the CUDA backend takes, what it declines and why, and what it says of launches."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from recording import KERNELS, ON_HOPPER, RecordingMachine, call_of, tensors
from sparge_kernels import BACKEND_NAMES, BackendChoice, UnsupportedCall, __main__, backends, can_run, config, sparse_attention
from sparge_kernels.backends import choose
from sparge_kernels.backends import cuda as backend
from sparge_kernels.call import Kind, Rule
from sparge_kernels.cuda import loader
from sparge_kernels.cuda.params import FIELDS, SYMBOLS


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, driver): a machine whose PyTorch sees one GPU; nothing may touch it."""

    def pretend(capability=(8, 6), driver=None, available=True, hip=None):
        backend._machine.cache_clear()
        for name, value in dict(
            is_available=lambda: available, device_count=lambda: int(available), current_device=lambda: 0, get_device_capability=lambda i: capability,
            get_device_name=lambda i: "Some GPU", get_device_properties=lambda i: SimpleNamespace(multi_processor_count=84),
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(backend.driver, "why_not", lambda arch: driver)

    yield pretend
    backend._machine.cache_clear()


GPU = torch.device("cuda", 0)
REFUSALS = {
    "on the CPU": (dict(), dict(device=torch.device("cpu")), "tensors are on cpu"),
    "ROCm": (dict(hip="6.2"), dict(), "AMD"),
    "no GPU": (dict(available=False), dict(), "no NVIDIA GPU"),
    "compute capability 7.5": (dict(capability=(7, 5)), dict(), "RTX 30 series, A100 or newer"),
    "driver": (dict(driver="the driver is too old; update it"), dict(), "the driver is too old; update it"),
    "head_dim": (dict(), dict(dim=129), "head_dim 129"),
    "keys": (dict(), dict(s_k=(1 << 22) + 1), "4194305 keys"),
    "dtype": (dict(), dict(dtype=torch.float64), "torch.float64"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_every_refusal_has_its_reason(gpu, monkeypatch, name):
    machine, call, words = REFUSALS[name]
    gpu(**machine)
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    reason = backend.why_not(Kind(**{"device": GPU, **call}))
    assert words in reason and "{" not in reason
    if name not in ("on the CPU",):
        with pytest.raises(UnsupportedCall) as caught:
            choose(Kind(**{"device": GPU, **call}))
        assert caught.value.reasons["cuda"] == reason and "torch" in caught.value.reasons


def test_limits_are_exact(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    assert backend.why_not(Kind(GPU, dim=128, s_k=1 << 22, dtype=torch.bfloat16)) is None
    assert choose(Kind(GPU)) == "cuda" and choose(Kind(GPU, "torch")) == "torch"


def test_missing_binaries(gpu, monkeypatch):
    gpu((10, 3))
    asked = []
    monkeypatch.setattr(loader, "why_not", lambda device, variants: asked.append((device, [v.name for v in variants])) or "no binary for sm_103")
    assert backend.why_not(Kind(GPU, dim=96, dtype=torch.bfloat16, masked=True)) == "no binary for sm_103"
    assert asked == [(0, ["prepass_d128_bfloat16", "select_d128", "attention_mma_d128_int8_masked"])]


def test_can_run_without_tensors(gpu, monkeypatch):
    """The head size, dtype and mask of the calls decide too; on a GPU nothing falls to the torch backend unless it was asked for."""
    gpu()
    asked = []
    monkeypatch.setattr(loader, "why_not", lambda device, variants: asked.append([v.name for v in variants]))
    assert can_run("cuda") == can_run(GPU, backend="cuda", head_dim=128, dtype=torch.bfloat16, masked=True) == BackendChoice("cuda", None, True, True)
    assert asked == [
        ["prepass_d64_float16", "select_d64", "attention_mma_d64_int8"],
        ["prepass_d128_bfloat16", "select_d128", "attention_mma_d128_int8_masked"],
    ]
    assert can_run("cuda", backend="cuda", head_dim=192) == BackendChoice(
        None, "cuda: head_dim 192 is beyond the 1 to 128 of its kernels; backend='torch' takes up to 256", False, False
    )
    assert can_run("cuda", backend="torch", head_dim=192) == can_run("cpu") == BackendChoice("torch", None, False, False)
    with pytest.raises(ValueError, match="backend must be one of auto, cuda, torch, got 'triton'"):
        can_run("cpu", backend="triton")


def test_a_refusal_of_can_run_that_ends_is_not_remembered(gpu, monkeypatch):
    """Kernels cannot be loaded while a CUDA graph is captured; after it they are."""
    gpu()
    missing = ["a CUDA graph is being captured"]
    monkeypatch.setattr(loader, "why_not", lambda device, variants: missing[0])
    refused = can_run("cuda")
    assert refused.backend is None and refused.why_not.startswith("cuda: a CUDA graph is being captured; torch: not chosen by itself on cuda")
    missing[0] = None
    assert can_run("cuda").backend == "cuda"


@pytest.mark.parametrize(
    "value, capability, pv",
    [
        ("fp16", (8, 6), "fp16"), ("fp8", (8, 9), None), (None, (8, 6), "int8"), ("fp8", (8, 6), None), (None, (9, 0), "fp8"),
        ("int8", (9, 0), "int8"), ("fp16", (9, 0), "fp16"), ("fp8", (9, 0), "fp8"), ("fp8", (12, 0), None), (None, (12, 0), "int8"),
        ("fp8", (10, 0), None), (None, (10, 0), "int8"),
    ],
)  # fmt: skip
def test_the_environment_chooses_the_form_of_p_and_v(gpu, monkeypatch, value, capability, pv):
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    monkeypatch.delenv("SPARGE_PV", raising=False)
    if value is not None:
        monkeypatch.setenv("SPARGE_PV", value)
    gpu(capability)
    machine, reason = backend.machine_of(GPU)
    if pv is None:
        assert machine is None and reason == (
            f"SPARGE_PV must be int8 or fp16 on sm_{capability[0]}{capability[1]}, got fp8, which is for sm_90 (H100, H200) alone: "
            "elsewhere it is less exact than int8 and not known to be faster; set one of these, or unset it"
        )
    else:
        assert machine.pv == pv and machine.arch == f"sm_{capability[0]}{capability[1]}" and machine.note == ""


def test_the_environment_has_three_words(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setenv("SPARGE_PV", "fp4")
    with pytest.raises(ValueError, match="SPARGE_PV must be one of int8, fp8, fp16, got 'fp4'"):
        backend.machine_of(GPU)


def without_hoppers_kernel(device, variants):
    lacking = [variant.name for variant in variants if variant.exact]
    return f"no binary of {lacking[0]} for sm_90: nothing compiles it" if lacking else None


def test_without_its_own_kernel_hopper_takes_the_common_one_and_says_so(gpu, monkeypatch, rand):
    gpu((9, 0))
    monkeypatch.delenv("SPARGE_PV", raising=False)
    monkeypatch.setattr(loader, "why_not", without_hoppers_kernel)
    monkeypatch.setattr(loader, "kernel", lambda device, variant, symbol: SimpleNamespace(origin=f"{variant.name}, packaged for sm_90"))
    machine, _ = backend.machine_of(GPU)
    assert machine.pv == "int8" and backend.why_not(Kind(GPU, dtype=torch.float16)) is None
    status = backends()["cuda"]
    assert status.available and status.reason == (
        "Some GPU: sm_90, attention_mma_d128_int8, packaged for sm_90; P and V are int8, because of fp8 there is "
        "no binary of attention_sm90_d64_fp8 for sm_90: nothing compiles it"
    )


@pytest.fixture
def another_row(monkeypatch):
    """An attention kernel more, of sm_100 alone."""
    row = config.AttentionKernel(
        name="attention_sm100",
        forms=("fp16",),
        arch="sm_100a",
        threads=192,
        persistent=True,
        shared=lambda dim, pv: 1000 * dim,
        defines=lambda dim, pv: (),
        spill_bound=0,
    )
    monkeypatch.setattr(config, "ATTENTION", (row, *config.ATTENTION))
    monkeypatch.setitem(SYMBOLS, row.symbol, SYMBOLS["sparge_attention_mma"])  # which is made of the rows, when it is imported
    monkeypatch.setitem(FIELDS, row.symbol, FIELDS["sparge_attention_mma"])
    monkeypatch.setattr(backend, "_binaries", backend._binaries.__wrapped__)
    monkeypatch.setattr(backend, "_CARVED", {})
    return row


def test_a_kernel_of_another_architecture_is_launched_as_its_row_says(another_row, monkeypatch, rand):
    made = RecordingMachine("fp16", 20, "sm_100")
    monkeypatch.setattr(backend, "machine_of", lambda device: (made, None))
    q, k, v = tensors(rand, d=128, s_q=1000)
    backend.run(call_of(q, k), Rule(None, 0.5), q, k, v)
    assert [launch[0] for launch in made.launched] == [*KERNELS[:3], "sparge_sequence", "sparge_attention_sm100"]
    name, variant, grid, shared, params, threads = made.launched[-1]
    assert (variant, grid, shared, threads) == ("attention_sm100_d128_fp16", 20, 128000, 192)
    assert params.counter and params.sequence
    assert {struct.pv for symbol, _, _, _, struct, _ in made.launched if symbol == "sparge_prepass"} == {config.PV.index("fp16")}


@pytest.mark.parametrize("capability, pv", [((10, 0), "fp16"), ((10, 3), "int8"), ((9, 0), "fp8"), ((12, 0), "int8")])
def test_its_form_is_used_where_it_runs_and_can_be_had(another_row, gpu, monkeypatch, capability, pv):
    gpu(capability)
    monkeypatch.delenv("SPARGE_PV", raising=False)
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    assert backend.machine_of(GPU).machine.pv == pv
    backend._machine.cache_clear()
    monkeypatch.setattr(loader, "why_not", without_hoppers_kernel)
    machine = backend.machine_of(GPU).machine
    assert machine.pv == "int8" and ("because of" in machine.note) == (pv != "int8")


def test_what_was_asked_for_is_not_replaced(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setenv("SPARGE_PV", "fp8")
    monkeypatch.setattr(loader, "why_not", without_hoppers_kernel)
    assert backend.machine_of(GPU)[0].pv == "fp8"
    assert "attention_sm90_d128_fp8" in backend.why_not(Kind(GPU, dim=128, dtype=torch.float16))
    assert not backends()["cuda"].available


@pytest.mark.parametrize("current, entered", [(1, [0]), (0, [])], ids=["another GPU is current", "it is current"])
@pytest.mark.parametrize("capability, kernels", [((8, 6), KERNELS), ((9, 0), ON_HOPPER)])
def test_launches_go_through_the_loader_and_the_driver(gpu, monkeypatch, rand, capability, kernels, current, entered):
    """The real machine: kernels of its device, on its current stream, with its device the current one."""
    gpu(capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.delenv("SPARGE_PV", raising=False)
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    inside, launches = [], []

    @contextlib.contextmanager
    def device(index):
        inside.append(index)
        yield
        inside.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(backend.driver, "current_stream", lambda index: 50 + index)
    monkeypatch.setattr(loader, "kernel", lambda device, variant, symbol: (device, variant.name, symbol))
    monkeypatch.setattr(backend.driver, "launch", lambda kernel, *rest: launches.append((kernel, *rest[:3], rest[4], list(inside))))
    q, k, v = tensors(rand)
    call = call_of(q, k)._replace(device=GPU)
    backend.run(call, Rule(0.3, None, -1.0), q, k, v)
    assert [kernel[2] for kernel, *_ in launches] == kernels and {kernel[0] for kernel, *_ in launches} == {0}
    assert [threads for _, _, threads, *_ in launches] == [256] * 3 + [384 if capability == (9, 0) else 256]
    assert all(stream == 50 and within == entered for *_, stream, within in launches) and inside == []
    assert all(grid > 0 and shared > 0 for _, grid, _, shared, _, _ in launches)


def test_a_machine_asks_the_loader_once(gpu, monkeypatch):
    gpu()
    asked = []
    monkeypatch.setattr(loader, "why_not", lambda device, variants: asked.append("why_not"))
    monkeypatch.setattr(loader, "kernel", lambda device, variant, symbol: asked.append((variant.name, symbol)) or (variant.name, symbol))
    machine, _ = backend.machine_of(GPU)
    (variant,) = [variant for variant in config.variants("sm_86") if variant.name == "prepass_d64_float16"]
    assert machine.missing((variant,)) is None and asked == ["why_not"]
    for _ in range(2):
        assert [machine.kernel(variant, symbol) for symbol in variant.symbols] == [(variant.name, symbol) for symbol in variant.symbols]
    assert machine.missing((variant,)) is None and asked == ["why_not", *((variant.name, symbol) for symbol in variant.symbols)]


@pytest.mark.parametrize("kind", [RuntimeError, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("number, before", [(0, "nothing"), (2, "sparge_statistics (grid 32), sparge_prepass (grid 12)")])
def test_a_launch_error_tells_what_was_launched_before(machine, monkeypatch, number, before, kind):
    launch = machine.launch

    def fail(kernel, *rest):
        if len(machine.launched) == number:
            raise kind("cuLaunchKernel failed: CUDA_ERROR_ILLEGAL_ADDRESS")
        launch(kernel, *rest)

    monkeypatch.setattr(machine, "launch", fail)
    q = torch.zeros(1, 4, 128, 16).half()
    with pytest.raises(kind) as caught:
        backend.run(call_of(q, q), Rule(0.3), q, q, q)
    assert str(caught.value) == f"cuLaunchKernel failed: CUDA_ERROR_ILLEGAL_ADDRESS; launched before it in this call: {before}"


@pytest.mark.parametrize("value, level, shown", [(None, "WARNING", 0), (None, "DEBUG", 1), ("0", "WARNING", 0), ("1", "WARNING", 1)])
def test_every_new_kind_of_call_is_told_in_a_line_where_asked(machine, monkeypatch, rand, caplog, value, level, shown):
    monkeypatch.delenv("SPARGE_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("SPARGE_LOG", value)
    monkeypatch.setattr(backend, "_CARVED", {})
    monkeypatch.setattr(machine, "kernel", lambda variant, symbol: SimpleNamespace(variant="", name=symbol, origin=f"{variant.name}, packaged"))
    q, k, v = tensors(rand, d=72)
    with caplog.at_level(level, "sparge_kernels"):
        for topk in (0.3, 0.3, 0.301):
            backend.run(call_of(q, k), Rule(topk), q, k, v)
    lines = [record.getMessage() for record in caplog.records if record.name == "sparge_kernels"]
    assert len(lines) == shown
    if shown:
        (carved,) = backend._CARVED.values()
        found = {launch.symbol: launch for launch in carved.launches}
        assert lines[0].startswith(
            f"new kind of call, backend cuda on sm_89: B=2 H=4 H_kv=2 S_q=333 S_k=400 D=72 float16; workspace {carved.nbytes} bytes; "
            f"sparge_statistics grid {found['sparge_statistics'].grid} x 256, {found['sparge_statistics'].shared} bytes of shared memory, "
        )
        assert lines[0].count("packaged") == 4 and lines[0].endswith("attention_mma_d128_int8, packaged") and "\n" not in lines[0]


def test_report_without_a_gpu(gpu):
    gpu(available=False)
    status = backends()
    assert list(status) == ["cuda", "torch"] == list(BACKEND_NAMES[1:]) and not status["cuda"].available and "GPU" in status["cuda"].reason
    assert status["cuda"].quantised and status["cuda"].skips_pv


def test_report_with_gpus(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(loader, "why_not", lambda device, variants: None)
    monkeypatch.setattr(loader, "kernel", lambda device, variant, symbol: SimpleNamespace(origin=f"{variant.name}, packaged for sm_86"))
    status = backends()["cuda"]
    assert status.available and status.reason == "Some GPU: sm_86, attention_mma_d128_int8, packaged for sm_86"
    monkeypatch.setattr(loader, "why_not", lambda device, variants: "no binary")
    status = backends()["cuda"]
    assert not status.available and status.reason == "Some GPU: no binary"


@pytest.mark.parametrize("wrong", [False, True], ids=["", "a backend is wrong"])
def test_the_self_test_command(capsys, monkeypatch, wrong):
    if wrong:
        real = __main__.block_sparse_attention
        monkeypatch.setattr(__main__, "block_sparse_attention", lambda *args, **how: 1.1 * real(*args, **how))
    assert __main__.main() == int(wrong)
    printed = capsys.readouterr().out
    assert "backend cuda: not available" in printed or torch.cuda.is_available()
    assert "backend torch: available" in printed and ("WRONG" in printed) == wrong and "cpu, plain" in printed


def test_forced_on_tensors_of_the_cpu(rand):
    q, k, v = tensors(rand)
    with pytest.raises(UnsupportedCall, match="tensors are on cpu, it needs an NVIDIA GPU"):
        sparse_attention(q, k, v, backend="cuda")
