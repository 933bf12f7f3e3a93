"""A run that several threads fill from several devices at once, as ComfyUI's split of CFG over GPUs does: exact counts, and no copy that ends it."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import comfy_models
import pytest
import torch

pytestmark = pytest.mark.usefixtures("no_gradients")


class Clock:
    def __init__(self, ms: float = 1.0):
        self.ms = ms

    def milliseconds(self) -> float:
        return self.ms


@pytest.fixture
def run(nodes):
    sigmas = [1 - step / 50 for step in range(51)]
    return nodes.telemetry.runs.open(node="1", owner="o", metadata={}, sigmas=sigmas, monitors={"7": False})


@pytest.fixture
def call(nodes):
    """`call(run, step, layer, density=0.5, device="cpu")`: a sparse call with a map of its one head."""

    def make(run, step, layer, density=0.5, device="cpu"):
        heads = torch.full((1, 2, 2), int(255 * density), dtype=torch.uint8, device=device)
        numbers = {"density": torch.full((1, 1), density, device=device), "pv_skipped": torch.zeros(1, 1, device=device)}
        run.sparse(nodes.recorder.Timed(step, layer, 256, Clock()), numbers, nodes.maps.Pooled(heads, 2, 2, None))

    return make


class Torn(int):
    """A number that takes its time to be added to, so that another thread may come between reading and writing."""

    def __add__(self, other):
        for _ in range(2000):
            pass
        return Torn(int(self) + other)


@pytest.fixture
def restless():
    """Threads take turns after a few instructions instead of every 5 ms, so that what is not locked comes apart."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def together(*jobs) -> None:
    """Runs the jobs in a thread each; what one raises is raised here."""
    failed = []

    def guarded(job):
        try:
            job()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if failed:
        raise failed[0]


# Counts.


def test_many_threads_count_exactly(nodes, run, call, restless):
    """Each ends every step by itself, and a reader asks all the while."""
    threads, steps, layers, over = 4, 30, 5, threading.Event()
    run.calls = run.sparse_calls = Torn()

    def sample(number):
        for step in range(steps):
            for layer in range(layers):
                call(run, step, layer, density=(number + 1) / 8)
            run.dense(nodes.recorder.Timed(step, layers, 256, Clock()), f"reason {step % 3}")
            run.end_step()

    def read():
        while not over.is_set():
            nodes.transport.message(run, run.news())
            nodes.transport.message(run, run.numbers())

    reader = threading.Thread(target=read)
    reader.start()
    together(*[lambda number=number: sample(number) for number in range(threads)])
    over.set()
    reader.join(60)
    run.close()
    told = run.to_dict()
    assert (run.calls, run.sparse_calls) == (threads * steps * (layers + 1), threads * steps * layers)
    assert (told["totals"]["sparse_calls"], told["totals"]["dense_calls"]) == (threads * steps * layers, threads * steps)
    assert {(cell["sparse_calls"], cell["dense_calls"]) for cell in told["cells"]} == {(threads, 0), (0, threads)}
    assert sum(told["reasons"].values()) == threads * steps and sum(cell["sparse_ms"] for cell in told["cells"]) == threads * steps * layers
    assert all(cell["density"] == pytest.approx((1 + 2 + 3 + 4) / 8 / 4) for cell in told["cells"] if cell["sparse_calls"])
    assert {found.calls for found in run.maps.kept.values()} == {threads}


def test_two_threads_end_a_step_once(direct, nodes, monkeypatch, restless):
    """Both come to the next step together, many times; each pass ends one step, and every call is booked once."""
    ended, real = [], nodes.recorder.Run.end_step
    state, barrier = direct().state, threading.Barrier(2)
    state.sigmas = state.telemetry.sigmas = [1 - step / 200 for step in range(201)]
    monkeypatch.setattr(nodes.recorder.Run, "end_step", lambda run: (ended.append(1), real(run)))

    def sample():
        for step in range(200):
            barrier.wait(60)
            moment = state.at(torch.tensor([state.sigmas[step]]))
            assert moment.step == step
            state.telemetry.dense(nodes.recorder.Timed(moment.step, 0, 256, Clock()), "window")

    together(sample, sample)
    assert len(ended) == 199 and state.telemetry.finished == 199
    state.telemetry.close()
    assert {cell.of["dense_calls"] for cell in state.telemetry.cells.values()} == {2} and len(state.telemetry.cells) == 200


def test_a_run_closes_behind_a_thread_that_ends_a_step(run, call, nodes, monkeypatch):
    """The copy of the one is on its way when the other closes the run: the numbers that come are in it."""
    real, sending, go = nodes.recorder._to_host, threading.Event(), threading.Event()

    def to_host(tensors):
        sending.set()
        assert go.wait(60)
        return real(tensors)

    monkeypatch.setattr(nodes.recorder, "_to_host", to_host)
    call(run, 0, 0)
    ender, closer = threading.Thread(target=run.end_step), threading.Thread(target=run.close)
    ender.start()
    assert sending.wait(60)
    run.dense(nodes.recorder.Timed(0, None, 77), "cross")  # nobody who records waits for a copy
    closer.start()
    closer.join(0.2)
    assert closer.is_alive() and run.state == "running"
    go.set()
    ender.join(60)
    closer.join(60)
    totals = run.to_dict()["totals"]
    assert run.state == "done" and (totals["sparse_calls"], totals["dense_calls"], totals["density"]) == (1, 1, 0.5)


def test_a_thread_that_is_a_step_behind_is_booked_right(direct, nodes):
    """The other one has come to the next step, and out of the window, when this one's model call begins its layers."""
    ours = direct(end_percent=0.5)
    ours.state.sigmas = ours.run.sigmas = [1.0, 0.5, 0.25, 0.0]
    behind = ours.context
    moment = ours.state.at(torch.tensor([0.25]))
    assert (behind.step, behind.sigma) == (0, 1.0) and moment == (2, 0.25)
    q, k, v = torch.randn(3, 1, 2, 300, 16, generator=torch.Generator().manual_seed(1))
    ours(q, k, v, 2, skip_reshape=True)
    ahead = nodes.run_state.CallContext(ours.state, behind.model_call, moment)
    nodes.compiled.open_call(ours.options, ours.patch.key, ahead)
    ours(q, k, v, 2, skip_reshape=True)
    cells = {(cell["step"], cell["layer"]): (cell["sparse_calls"], cell["reasons"]) for cell in ours.closed()["cells"]}
    assert cells == {(0, 0): (1, {}), (2, 0): (0, {"outside the step window (start_percent, end_percent)": 1})}


def test_the_halves_of_cfg_in_two_threads(nodes, tiny, patched, browser, last_run, restless):
    """Two threads make the model calls of one sampler run through the same patch, step by step, as ComfyUI does with two devices."""
    model = tiny("wan_t2v")
    patcher = nodes.monitor.watched(patched(model), "7", False)
    (patch,) = nodes.patch.patches_of(patcher)
    steps, sigmas = 12, torch.linspace(1, 0, 13)
    base, (text, _) = patcher.model, model.positive[0]

    def sampler(noise, latent, chosen, schedule):
        barrier = threading.Barrier(2)

        def half():
            with torch.inference_mode():
                for step in range(steps):
                    barrier.wait(60)
                    options = {**patcher.model_options["transformer_options"], "sigmas": schedule[step : step + 1]}
                    patch.apply_model(SimpleExecutor(base), noise, schedule[step : step + 1], c_crossattn=text, transformer_options=options)

        together(half, half)

    class SimpleExecutor:
        """The model call itself, as ComfyUI's wrapper executor passes it."""

        def __init__(self, owner):
            self.class_obj = owner

        def __call__(self, x, t, c_concat, c_crossattn, control, options, **conds):
            return self.class_obj._apply_model(x, t, c_concat, c_crossattn, control, options, **conds)

    outer = type("Executor", (), {"class_obj": SimpleNamespace(model_patcher=patcher), "__call__": lambda self, *args: sampler(*args)})()
    patch.outer_sample(outer, torch.randn(model.latent.shape), model.latent, None, sigmas)
    run = last_run()
    assert run["totals"]["sparse_calls"] == 2 * 2 * steps and run["reasons"] == {"cross-attention to 7 tokens": 2 * 2 * steps}
    assert {(cell["step"], cell["layer"]): cell["sparse_calls"] for cell in run["cells"]} == {(s, i): 2 for s in range(steps) for i in range(2)}
    last = browser.sent[-1]
    assert last["totals"]["sparse_calls"] == 4 * steps and [m["step"] for m in browser.sent] == sorted(m["step"] for m in browser.sent)


# Devices.


def test_devices_do_not_meet(run, call):
    """A second device beside the CPU, whose tensors hold no data: its numbers are left out, the others are whole, and all are counted."""
    for step in range(3):
        for layer in range(4):
            call(run, step, layer, density=0.25, device="cpu" if layer % 2 else "meta")
        run.end_step()
    run.close()
    told = run.to_dict()
    assert told["totals"]["sparse_calls"] == 12 == run.sparse_calls and told["totals"]["density"] == 0.25 and run.state == "done"
    assert [cell["density"] for cell in told["cells"]] == [None, 0.25, None, 0.25] * 3 and {c["sparse_calls"] for c in told["cells"]} == {1}
    assert told["note"] == "the numbers of 6 sparse calls could not be copied from the device and are left out (NotImplementedError)"
    assert sorted(run.maps.kept) == [(step, layer) for step in range(3) for layer in (1, 3)] and sorted(run.maps.heads.layers) == [1, 3]


def test_a_batch_for_each_device(run, call, monkeypatch, nodes):
    """What is sent together was made on one device; numbers that are a step late on both arrive at the next end."""
    sent = []

    def to_host(tensors):
        sent.append({x.device.type for x in tensors})
        return [torch.zeros(x.shape, dtype=x.dtype) + 0.5 for x in tensors], SimpleNamespace(synchronize=lambda: None)

    monkeypatch.setattr(nodes.recorder, "_to_host", to_host)
    for device in ("cpu", "meta", "cpu", "meta"):
        call(run, 0, len(device), device=device)
    run.end_step()
    assert sent == [{"cpu"}, {"meta"}] and not run.maps.heads.layers
    run.end_step()
    assert run.to_dict()["totals"]["density"] == 0.5 and {layer: len(calls) for layer, calls in run.maps.heads.layers.items()} == {3: 2, 4: 2}
    assert run.notes is None


@pytest.mark.parametrize("at", ["sending", "arriving"])
def test_a_copy_that_fails_costs_its_numbers_alone(run, call, nodes, monkeypatch, at):
    """In the second of three steps; the first and the third are whole."""
    real, steps = nodes.recorder._to_host, []

    class Late:
        def cpu(self):
            raise torch.OutOfMemoryError("no room")

    def to_host(tensors):
        steps.append(1)
        if len(steps) != 2:
            return real(tensors)
        if at == "sending":
            raise torch.OutOfMemoryError("no room")
        return [Late()], None

    monkeypatch.setattr(nodes.recorder, "_to_host", to_host)
    for step in range(3):
        call(run, step, 0, density=0.25)
        run.dense(nodes.recorder.Timed(step, 0, 256, Clock(7.0)), "window")  # a time needs no copy
        run.end_step()
    run.close()
    told = run.to_dict()
    assert [cell["dense_ms"] for cell in told["cells"]] == [7.0] * 3
    assert [cell["density"] for cell in told["cells"]] == [0.25, None, 0.25]
    assert [cell["head_density"] for cell in told["cells"]] == [[0.25], None, [0.25]]
    assert told["totals"]["sparse_calls"] == 3 and told["totals"]["density"] == 0.25
    assert told["note"] == "the numbers of 1 sparse call could not be copied from the device and are left out (OutOfMemoryError)"
    assert nodes.remarks.warning_and_note(run) == (None, told["note"]) and told["note"] in nodes.remarks.summary(run)


def test_a_cell_knows_the_mean_of_what_arrived(run, call, nodes, monkeypatch):
    """Of three calls of a cell the middle one's numbers are lost."""
    real = nodes.recorder._to_host
    for density, fails in ((0.25, False), (0.5, True), (0.75, False)):
        monkeypatch.setattr(nodes.recorder, "_to_host", (lambda tensors: 1 / 0) if fails else real)
        call(run, 0, 0, density=density)
        run.end_step()
    run.close()
    (cell,) = run.to_dict()["cells"]
    assert (cell["sparse_calls"], cell["density"], cell["head_density"]) == (3, 0.5, [0.5])


def test_a_kernel_that_failed_is_told(run, call, nodes, monkeypatch):
    """The copy shows it; the device says so again when it is waited for. What was made stays counted, on the other device too."""

    def broken(device):
        if device.type == "meta":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(nodes.recorder, "check_device", broken)
    for device in ("meta", "cpu"):
        call(run, 0, 0, device=device)
    run.end_step()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.close()
    run.abandon("the run ended early (RuntimeError)")
    assert run.to_dict()["totals"]["sparse_calls"] == 2 == run.sparse_calls and run.to_dict()["note"] == "the run ended early (RuntimeError)"


def test_a_kernel_that_failed_is_told_while_it_is_sent(run, call, nodes, monkeypatch):
    """The batches behind the broken one are counted as well."""

    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(nodes.recorder, "_to_host", broken)
    monkeypatch.setattr(nodes.recorder, "check_device", broken)
    for device in ("cpu", "meta", "meta"):
        call(run, 0, 0, device=device)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.end_step()
    run.abandon("the run ended early (RuntimeError)")
    assert run.to_dict()["totals"]["sparse_calls"] == 3


def test_maps_of_heads_that_stay_on_their_device(run, call, nodes, monkeypatch):
    """Closing brings them to the host; where that fails the run is whole but for them."""
    call(run, 0, 0)
    run.end_step()
    run.maps.heads = nodes.maps.HeadMaps(0, {0: [torch.zeros(1, 2, 2, device="meta")]})
    run.close()
    assert run.state == "done" and not run.maps.heads.layers and run.to_dict()["totals"]["density"] == 0.5
    assert run.notes == "a block map could not be made for the monitor (NotImplementedError)"


def test_heads_of_the_last_step_come_from_every_device(run, call, nodes):
    """A thread that is a step behind brings its own later; its calls do not take the newer step's place, those of the same step join it."""
    for step, layer in ((0, 0), (1, 0), (0, 1), (1, 0), (1, 1)):
        call(run, step, layer)
        run.end_step()
    assert run.maps.heads.step == 1 and {layer: len(calls) for layer, calls in run.maps.heads.layers.items()} == {0: 2, 1: 1}


def test_a_sampler_goes_on_without_its_numbers(nodes, tiny, patched, last_run, monkeypatch):
    model = tiny("wan_t2v")
    whole = comfy_models.sample(model, patched(model), steps=3)
    monkeypatch.setattr(nodes.recorder, "_to_host", lambda tensors: 1 / 0)
    assert torch.equal(comfy_models.sample(model, patched(model), steps=3), whole)
    run = last_run()
    assert run["totals"]["sparse_calls"] == 6 and run["totals"]["density"] is None
    assert run["note"] == "the numbers of 6 sparse calls could not be copied from the device and are left out (ZeroDivisionError)"
    nodes.heat_map.heat_map(run), nodes.heat_map.step_frame(run, 0), nodes.export.to_html([run], [[]], "now")  # all can be drawn


# Streams.


def test_a_gpu_copies_on_the_stream_that_made_the_numbers(nodes, monkeypatch):
    """Each device and each stream of it is a batch of its own; what has timers alone travels with the first."""
    device, other = torch.device("cuda", 0), torch.device("cuda", 1)

    def pending(device, stream):
        numbers = None if device is None else {"density": SimpleNamespace(device=device)}
        return nodes.recorder._Pending(nodes.recorder.Timed(0, 0, 256, SimpleNamespace(stream=stream)), numbers)

    calls = [pending(device, "a"), pending(None, None), pending(other, "b"), pending(device, "c"), pending(device, "a")]
    assert [[calls.index(p) for p in batch] for batch in nodes.recorder._batches(calls)] == [[0, 4, 1], [2], [3]]
    assert nodes.recorder._batches([calls[1]]) == [[calls[1]]] and nodes.recorder._batches([]) == []
    entered = []
    monkeypatch.setattr(torch.cuda, "stream", entered.append)
    nodes.recorder._on_its_stream([calls[2]])
    assert entered == ["b"]
    with nodes.recorder._on_its_stream([pending(torch.device("cpu"), None)]):
        assert entered == ["b"]


def test_a_timer_stays_on_its_devices_stream(nodes, monkeypatch):
    """The thread's current device may be another one."""
    noted = []
    event = type("Event", (), {"__init__": lambda self, enable_timing: None, "record": lambda self, stream: noted.append(stream)})
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"of {device}")
    assert nodes.recorder.Timer(torch.device("cuda", 1)).stop().stream == "of cuda:1" and noted == ["of cuda:1"] * 2
