"""What a call of the CUDA backend allocates, and that it can be captured into a CUDA graph: on CPU tensors, over a stand-in for the driver.

The rule: a call makes its operator's results and one workspace, and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from recording import WAITING, carved
from sparge_kernels import AttentionInfo, BlockMask, UnsupportedCall, block_sparse_attention, config, ops, order, select_blocks, sparse_attention
from sparge_kernels.backends import choose
from sparge_kernels.backends import cuda as backend
from sparge_kernels.block_mask import KeptBlocks
from sparge_kernels.call import Kind
from sparge_kernels.cuda import driver as driver_module
from sparge_kernels.cuda import loader as loader_module
from sparge_kernels.cuda import workspace
from sparge_kernels.cuda.loader import Binary, Loader, Places
from sparge_kernels.cuda.params import SYMBOLS
from test_cuda_driver import Library
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
BOX = 8
"""Bytes that PyTorch takes on the host for a Python number that goes into an operator."""
NOT_NOW = (
    "its kernels are not loaded yet and a CUDA graph is being captured, which must not be interrupted; run the same call once before the capture"
)


class Stub(Library):
    """The driver's library with all kernels. While `capturing` it takes launches alone; of each it keeps what the driver copies."""

    def __init__(self, capability):
        super().__init__(capability=capability)
        self.capturing, self.launched, self.used = False, [], []
        self.symbols = {name.encode(): 0x20 + i for i, name in enumerate(SYMBOLS)}
        of_handle = {0x1020 + i: name for i, name in enumerate(SYMBOLS)}

        def launch(handle, *rest):
            name = of_handle[handle]
            self.launched.append((name, SYMBOLS[name].from_buffer_copy((ctypes.c_char * ctypes.sizeof(SYMBOLS[name])).from_address(rest[-2][0]))))

        self.cuLaunchKernel.fill = launch

    def __getattribute__(self, name):
        if name.startswith("cu"):
            self.used.append(name)
            assert not self.capturing or name == "cuLaunchKernel", f"{name} during the capture"
        return super().__getattribute__(name)


class Found(Loader):
    """A loader that finds every binary."""

    def __init__(self):
        super().__init__(Places(None, None, None))
        self.asked = []

    def _binaries(self, arch, variant, reasons):
        assert not reasons
        self.asked.append(variant.name)
        yield Binary(b"code", arch, f"packaged for {arch}")


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability): from then on CPU tensors lie on a GPU of that kind; with `capture()` inside which nothing but launches may happen."""
    plain = backend.machine_of

    def pretend(capability=(8, 9)):
        torch.utils.deterministic.fill_uninitialized_memory = False  # it adds operators of its own
        backend._machine.cache_clear()
        monkeypatch.delenv("SPARGE_PV", raising=False)
        library, loader = Stub(capability), Found()
        driver = driver_module.Driver(library)
        library.used.clear()

        def host(value):
            def ask(*args):
                assert not library.capturing, "PyTorch is asked for the machine during the capture"
                return value

            return ask

        for name, value in dict(
            is_available=lambda: True, is_initialized=lambda: True, is_current_stream_capturing=lambda: library.capturing,
            device=lambda index: contextlib.nullcontext(), current_device=lambda: 0, current_stream=lambda index: SimpleNamespace(cuda_stream=7),
            get_device_capability=host(capability), get_device_name=host("Some GPU"),
            get_device_properties=host(SimpleNamespace(multi_processor_count=84)), synchronize=host(None),
        ).items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(driver_module, "driver", lambda: driver)
        monkeypatch.setattr(loader_module, "default", lambda: loader)
        monkeypatch.setattr(backend, "machine_of", lambda device: plain(GPU))

        @contextlib.contextmanager
        def capture():
            library.capturing = True
            try:
                yield
            finally:
                library.capturing = False

        return SimpleNamespace(library=library, loader=loader, capture=capture)

    yield pretend
    backend._machine.cache_clear()


class Fresh(TorchDispatchMode):
    """The operators that run, also inside of the package's own; what those returned; and every storage that came up, in order."""

    INSIDE = {ops._attend_operator: ops._attend_real, ops._select_operator: ops._select_real}

    def __init__(self, *known):
        super().__init__()
        self.names, self.results, self.fresh = [], [], []
        self._seen = {}
        self._note(known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.INSIDE:
            with self:
                result = self.INSIDE[func](*args, **kwargs)
            self.results = list(result)
            return result
        self.names.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        self._note(args)
        result = func(*args, **kwargs)
        self.fresh += self._note(result)
        return result

    def _note(self, value):
        """The storages in a value that were not there before; they are held, so that none takes the place of another."""
        tensors = [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]
        found = []
        for storage in (x.untyped_storage() for x in tensors):
            if storage._cdata not in self._seen:
                self._seen[storage._cdata] = storage
                found.append(storage)
        return found


def span(x):
    """First and last byte of a tensor's memory."""
    start = x.untyped_storage().data_ptr()
    return start, start + x.untyped_storage().nbytes()


S, D, HEADS = 400, 40, 4
PLAN = order.plan("tiles", (37, (3, 11, 11)))
assert PLAN.length == S
MAP = torch.rand(2, HEADS, 4, 7, generator=torch.Generator().manual_seed(1)) > 0.5
SOME = torch.arange(S).expand(2, S) % 3 > 0
PER_HEAD = torch.tensor([0.1, 9.0, 0.2, 9.0, 0.3, 9.0, 0.4, 9.0], dtype=torch.float64)


def bias(dtype):
    return torch.where(SOME.contiguous(), 0.5, -1e4).to(dtype)


CASES = {
    "plain": dict(), "lse": dict(return_lse=True), "causal": dict(causal=True, causal_offset=3), "cdf": dict(cdfthreshd=0.5),
    "judge": dict(topk=0.3, simthreshd1=0.4), "NHD": dict(layout="NHD"), "expanded q": dict(q=lambda q: q[:, :1].expand(q.shape)),
    "bool mask": dict(key_mask=SOME.contiguous()), "bool mask, expanded": dict(key_mask=SOME[:1].expand(2, -1)),
    "bool mask, strided": dict(key_mask=SOME.contiguous().repeat_interleave(2, 1)[:, ::2]),
    "fp32 mask": dict(key_mask=bias(torch.float32)), "bf16 mask": dict(key_mask=bias(torch.bfloat16)),
    "fp16 mask": dict(key_mask=bias(torch.float16)),
    "fp64 mask, strided": dict(key_mask=bias(torch.float64).repeat_interleave(2, 1)[:, ::2], return_lse=True),
    "per head": dict(topk=PER_HEAD[::2].float().contiguous(), pvthreshd=PER_HEAD[::2].float().contiguous()),
    "per head, fp64": dict(topk=PER_HEAD[::2].contiguous(), cdfthreshd=PER_HEAD[::2].contiguous(), pvthreshd=PER_HEAD[::2].contiguous()),
    "per head, strided": dict(topk=PER_HEAD.float()[::2], cdfthreshd=PER_HEAD[::2], simthreshd1=PER_HEAD.half()[::2], pvthreshd=PER_HEAD[::2]),
    "always_keep": dict(always_keep={"q": [(3, 9)], "k": [(0, 5), (100, 300)]}),
    "always_keep, order": dict(always_keep={"q": [(3, 9)], "k": [(0, 5), (100, 300)]}, order=PLAN), "order": dict(order=PLAN),
    "compensate": dict(compensate=True, return_lse=True), "compensate, causal": dict(compensate=True, causal=True),
    "compensate, bool mask": dict(compensate=True, key_mask=SOME[:1].expand(2, -1)),
    "compensate, bias, order": dict(compensate=True, key_mask=bias(torch.bfloat16), order=PLAN, always_keep=[(0, 5)]),
    "compensate, no smooth_k, one head each": dict(compensate=True, smooth_k=False, kv_heads=HEADS),
    "map": dict(block_mask=MAP), "map, shared": dict(block_mask=MAP[:1, :1]), "map, expanded": dict(block_mask=MAP[:1].expand(2, -1, -1, -1)),
    "map, strided": dict(block_mask=MAP.transpose(2, 3).contiguous().transpose(2, 3)), "BlockMask": dict(block_mask=BlockMask.from_dense(MAP)),
    "BlockMask, compensate": dict(block_mask=BlockMask.from_dense(MAP[:1]), compensate=True, key_mask=bias(torch.float32), return_info=True),
    "all at once": dict(
        topk=PER_HEAD[::2], cdfthreshd=0.5, simthreshd1=PER_HEAD[::2], pvthreshd=PER_HEAD[::2], key_mask=bias(torch.float16), order=PLAN,
        always_keep=[(0, 5)], compensate=True, return_lse=True, return_info=True,
    ),
}  # fmt: skip


def call_of(name, rand, dtype=torch.float16):
    """A function that makes the call of a case through the public door, and the tensors that it reads."""
    options = dict(CASES[name])
    kv_heads, change = options.pop("kv_heads", 2), options.pop("q", lambda q: q)
    q, k, v = (rand(i, 2, heads, S, D, dtype=dtype) for i, heads in enumerate((HEADS, kv_heads, kv_heads)))
    q = change(q)
    if options.get("layout") == "NHD":
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    read = [q, k, v, PLAN.perm, *(x for x in options.values() if isinstance(x, torch.Tensor))]
    mask = options.pop("block_mask", None)
    if mask is not None:
        return lambda: block_sparse_attention(q, k, v, mask, **options), read, mask
    return lambda: sparse_attention(q, k, v, **options), read, None


def of_the_mask(mask):
    return [mask.on(torch.device("cpu"))] if isinstance(mask, BlockMask) else []


# ---- what a call allocates -----------------------------------------------------------------------------------------------------------------------


def results_of(options):
    """The output, the log-sum-exp, and what the info holds: blocks, counts, visible blocks and tiles."""
    return 1 + options.get("return_lse", False) + 4 * options.get("return_info", False)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)], ids=["sm_89", "Hopper"])
@pytest.mark.parametrize("name", CASES)
def test_a_call_makes_its_results_and_one_workspace(gpu, rand, name, capability):
    gpu(capability)
    call, read, mask = call_of(name, rand)
    call()  # what is kept over calls is there from now on
    with Fresh(*read, *of_the_mask(mask)) as seen:
        call()
    wanted = results_of(CASES[name])
    made = [x.untyped_storage() for x in seen.results if x.numel()]
    assert len(made) == wanted and not WAITING & set(seen.names), seen.names
    results = {storage._cdata for storage in made}
    fresh = [storage for storage in seen.fresh if storage.nbytes()]  # what a call was not asked for is empty, and takes no memory
    beside = [storage for storage in fresh if storage._cdata not in results]
    assert len(results) == wanted and len(fresh) == wanted + 1 and len(beside) == 1, seen.names


@pytest.mark.parametrize("name", CASES)
def test_operators_take_no_memory_of_their_own(gpu, rand, profile, name):
    """What PyTorch allocates inside an operator is seen by its profiler alone."""
    gpu()
    call, read, mask = call_of(name, rand)
    call()
    with Fresh(*read, *of_the_mask(mask)) as seen:
        call()
    taken = sorted(size for size in profile(call).allocations[:-1] if size > BOX)
    assert taken == sorted(storage.nbytes() for storage in seen.fresh if storage.nbytes())


@pytest.mark.parametrize("options", [dict(), dict(key_mask=bias(torch.bfloat16)), dict(always_keep=[(3, 9)], order=PLAN)], ids=["", "mask", "forced"])
def test_a_selection_makes_its_results_and_one_workspace(gpu, rand, monkeypatch, options):
    gpu()
    q, k = rand(1, 2, HEADS, S, D), rand(2, 2, 2, S, D)
    inside = []

    def select(*args):
        with Fresh(q, k, PLAN.perm, *(x for x in options.values() if isinstance(x, torch.Tensor))) as seen:
            result = real(*args)
        made = [result.blocks, result.counts, result.visible]
        inside.append((seen.fresh, made))
        for x in made:
            x.zero_()
        return result

    real = backend.select
    monkeypatch.setattr(backend, "select", select)
    for _ in range(2):
        select_blocks(q, k, topk=PER_HEAD[::2], **options)
    fresh, results = inside[-1]
    assert len(fresh) == 4 and {x.untyped_storage()._cdata for x in results} < {x._cdata for x in fresh}


@pytest.mark.parametrize("name", ["fp32 mask", "always_keep, order", "compensate, bias, order", "all at once", "BlockMask, compensate"])
def test_nothing_outlives_a_call_but_its_results(gpu, rand, monkeypatch, name):
    """What were kept over calls might lie in the memory of a CUDA graph, which each replay writes over."""
    gpu()
    call, *_ = call_of(name, rand)
    call()
    made = []

    def noting(make):
        def door(*args):
            made.append(weakref.ref(x := make(*args)))
            return x

        return door

    for door in ("_empty", "_empty_like"):
        monkeypatch.setattr(backend, door, noting(getattr(backend, door)))
    results = call()
    gc.collect()
    assert len(made) == results_of(CASES[name]) + 1 and made[0]() is None and any(reference() is not None for reference in made)
    del results
    gc.collect()
    assert not any(reference() is not None for reference in made)


@pytest.mark.parametrize("heads, kv_heads, batch", [(4, 2, 2), (6, 3, 3), (4, 4, 1), (8, 1, 2)])
@pytest.mark.parametrize("elements", [1, 3000, 100_000, workspace.CHUNK_ELEMENTS])
def test_the_chunk_of_compensation_is_bounded(monkeypatch, elements, heads, kv_heads, batch):
    monkeypatch.setattr(workspace, "CHUNK_ELEMENTS", elements)
    s_q, s_k, dim = 130, 200, 40
    buffers = carved(q_shape=(batch, heads, s_q, dim), k_shape=(batch, kv_heads, s_k, dim), compensate=True).buffers
    rows, values = (math.prod(buffers[name].shape) for name in ("shift_rows", "shift_values"))
    of_one = dim * max(s_k, s_q * heads // kv_heads)
    assert values <= rows <= max(elements, of_one) and rows % of_one == 0 and buffers["shift_values"].shape[0] <= batch * kv_heads
    assert rows == batch * kv_heads * of_one or rows + of_one > elements  # as many heads as may be


# ---- CUDA graphs ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)], ids=["sm_89", "Hopper"])
@pytest.mark.parametrize("name", CASES)
def test_after_one_call_the_same_one_can_be_captured(gpu, rand, name, capability):
    made = gpu(capability)
    call, read, mask = call_of(name, rand)
    call()
    warm = [symbol for symbol, _ in made.library.launched]
    assert len(warm) in (4, 5) and "cuLibraryLoadData" in made.library.used
    loads = len(made.loader.asked)
    kept = [*read, *of_the_mask(mask)]
    for _ in range(2):
        made.library.launched.clear()
        with made.capture(), Fresh(*kept) as seen:
            call()
        assert [symbol for symbol, _ in made.library.launched] == warm and not WAITING & set(seen.names)
        inside = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in seen.fresh] + [span(x) for x in kept]
        for symbol, params in made.library.launched:
            for field, kind in params._fields_:
                address = getattr(params, field) if kind is ctypes.c_void_p else None
                assert address is None or any(start <= address < end for start, end in inside), f"{field} of {symbol} points elsewhere"
    assert len(made.loader.asked) == loads


def test_hopper_is_captured_with_its_sequence(gpu, rand):
    made = gpu((9, 0))
    call, *_ = call_of("cdf", rand)
    call()
    made.library.launched.clear()
    with made.capture():
        call()
    assert [symbol for symbol, _ in made.library.launched][-2:] == ["sparge_sequence", "sparge_attention_sm90"]


@pytest.mark.parametrize("capability", [(8, 9), (9, 0)], ids=["sm_89", "Hopper"])
@pytest.mark.parametrize("set_up", [False, True], ids=["first call", "another kind"])
def test_during_a_capture_nothing_is_loaded(gpu, rand, capability, set_up):
    """The call is declined with the reason, the capture goes on, and after it the call runs as if it had never been refused."""
    made = gpu(capability)
    if set_up:
        call_of("plain", rand, torch.bfloat16)[0]()
    q = rand(1, 1, 1, 200, 64, dtype=torch.float16)
    made.library.used.clear()
    with made.capture():
        with pytest.raises(UnsupportedCall) as refused:
            sparse_attention(q, q, q, backend="cuda")
        assert refused.value.reasons == {"cuda": NOT_NOW}
        with pytest.raises(UnsupportedCall) as refused:
            choose(Kind(GPU))
        assert refused.value.reasons["cuda"] == NOT_NOW and "torch" in refused.value.reasons
    assert not made.library.used
    sparse_attention(q, q, q, backend="cuda")
    attention = {(8, 9): "attention_mma_d64_int8", (9, 0): "attention_sm90_d64_fp8"}[capability]
    assert attention in made.loader.asked and len(set(made.loader.asked)) == len(made.loader.asked)
    with made.capture():
        sparse_attention(q, q, q, backend="cuda")


def test_what_is_missing_for_good_is_told_during_a_capture_too(gpu, rand, monkeypatch):
    made = gpu()
    monkeypatch.setattr(Found, "_binaries", lambda self, arch, variant, reasons: iter([reasons.append("none was packaged")][:0]))
    reason = backend.why_not(Kind(GPU))
    assert reason == "no binary of prepass_d64_float16 for sm_89: none was packaged"
    with made.capture():
        assert backend.why_not(Kind(GPU)) == reason


@pytest.mark.parametrize("initialised, device, told", [(True, 0, True), (True, GPU, True), (True, torch.device("cpu"), False), (False, GPU, False)])
def test_whether_a_capture_is_under_way_is_torchs_answer_on_that_device(monkeypatch, initialised, device, told):
    entered = []

    @contextlib.contextmanager
    def current(index):
        entered.append(index)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialised)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: entered == [device])
    assert driver_module.capturing(device) is told and entered == ([device, "left"] if told else [])


def test_a_map_made_during_a_capture_is_not_kept(monkeypatch, rand):
    """It lies in memory of the graph."""
    q = rand(1, 2, HEADS, S, D)
    mask = BlockMask.from_dense(MAP)
    capturing, kept, on = [True], [], BlockMask.on
    monkeypatch.setattr(driver_module, "capturing", lambda device: capturing[0])
    monkeypatch.setattr(BlockMask, "on", lambda self, device, keep: kept.append((device, keep)) or on(self, device, keep))
    outs = [block_sparse_attention(q, q, q, mask)]
    capturing[0] = False
    outs += [block_sparse_attention(q, q, q, mask) for _ in range(2)]
    assert kept == [(q.device, False), (q.device, True), (q.device, True)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_nothing_that_an_info_tells_waits():
    counts, visible = torch.tensor([[[2, 1]]], dtype=torch.int32), torch.full((1, 1, 2), 5, dtype=torch.int32)
    blocks = torch.tensor([[[[0, 4, -1], [3, -1, -1]]]], dtype=torch.int16)
    for form in (blocks, torch.tensor([[[[1, 0, 0, 0, 1], [0, 0, 0, 1, 0]]]]).bool()):
        info = AttentionInfo("cuda", KeptBlocks(form, counts, visible, 5), torch.tensor([[[1, 3]]], dtype=torch.int32))
        with Fresh() as seen:
            info.density, info.pv_skipped, info.pooled(), BlockMask.from_dense(info.block_mask.to_dense(), info.kept.visible).density
        assert not WAITING & set(seen.names), seen.names
        assert info.block_mask.to_dense().int().tolist() == [[[[1, 0, 0, 0, 1], [0, 0, 0, 1, 0]]]]


def test_every_form_of_p_and_v_has_its_kernels_here():
    """The stand-in's symbols are those of all binaries."""
    names = {symbol for arch in config.SHIPPED for variant in config.variants(arch) for symbol in variant.symbols}
    assert names == set(SYMBOLS)
