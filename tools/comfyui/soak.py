"""`make soak`: two clients queue mixed graphs of tiny models in a real ComfyUI on the CPU for ten minutes, and every number is checked.

Families, sizes, batches, guidance, one or two Sparge Attention nodes with all kinds of settings, monitor and report, other nodes' overrides before
and behind, torch.compile, interruptions, errors inside the model, `/free`. Held all the time: a run counts every attention call that the model made,
which is known from a count that the pack has no part in; nothing goes wrong in the server's log; every message of a run reaches the client that
queued it; memory, threads and open files do not grow. The exit status is 0 only if all of that held. The seed is printed and can be given again: the
graphs are the same then, not the moments at which they meet.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import time
import uuid
from collections import Counter, deque
from dataclasses import dataclass
from unittest import mock

import aiohttp
import comfy_server
from soak_checks import ADDRESSED, Broken, Ended, Log, check
from soak_graphs import Mix, Plan, again, counting_graph, first_plans, graph, new_plan

GROWTH = 1.01  # of memory, from the end of the warm-up on
PASSING = 2  # threads, and files, that come and go: a connection that is kept for the next question
WARM_UP = 0.4  # of the time, and until the first plans are done: sizes and compiled graphs are drawn by chance, and caches fill with each new one
# glibc returns large blocks when they are freed; else the last ones of every thread stay, by chance some tens of MB, and look like growth.
RETURNED = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
ROUND_S = 20.0  # between two looks at memory
JUDGED = 6  # looks after the warm-up that a judgement about memory takes
END_EVENTS = {"execution_success": "done", "execution_error": "error", "execution_interrupted": "interrupted"}


class Client:
    """A client of its own with one prompt at a time, as a browser tab: it queues, follows, interrupts, and checks what came back."""

    def __init__(self, soak: Soak, name: str):
        self.soak, self.name = soak, name
        self.id = f"{name}-{uuid.uuid4().hex[:8]}"
        self.chance = random.Random(f"{soak.seed} {name}")
        self.made = 0
        self.last: Plan | None = None

    async def connect(self, session: aiohttp.ClientSession) -> None:
        self.session = session
        self.socket = await session.ws_connect(f"/ws?clientId={self.id}", max_msg_size=0)

    async def work(self, until: float) -> None:
        """Prompt after prompt until `until` or the first thing that is broken."""
        while time.monotonic() < until and not self.soak.broken:
            if self.soak.first:
                plan = self.soak.first.popleft()
            elif self.last and self.chance.random() < 0.25:
                plan = again(self.last, self.chance)
            else:
                self.made += 1
                plan = new_plan(self.chance, f"{self.name}{self.made}", self.soak.mix)
            self.last = None if plan.behind == "fail" else plan
            try:
                await self.one(plan)
            except Broken as error:
                self.soak.broken.append(f"{error} ({plan})")
            if self.chance.randrange(20) == 0:
                await self.session.post("/free", json={"unload_models": True, "free_memory": self.chance.random() < 0.5})

    async def one(self, plan: Plan) -> None:
        before = newest(await self.soak.counted(plan.tag))
        ended = await self.run(plan)
        ended.counted = await self.soak.counted(plan.tag)
        self.soak.log.check()
        check(plan, ended, self.soak.per_call[plan.family], is_new=newest(ended.counted) > before)
        self.soak.note(plan, ended)

    async def run(self, plan: Plan) -> Ended:
        async with self.session.post("/prompt", json={"prompt": graph(plan), "client_id": self.id}) as answer:
            body = await answer.json()
            if answer.status != 200:
                raise Broken(str(comfy_server.refused(body, graph(plan))))
        identity, ended, running = body["prompt_id"], Ended("", {}, [], 0), False
        while not ended.how:
            try:
                message = await self.socket.receive(timeout=120)
            except asyncio.TimeoutError:
                raise Broken("a prompt did not end within two minutes") from None
            if message.type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR):
                raise Broken("the server closed the connection")
            if message.type != aiohttp.WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            kind, data = event["type"], event.get("data") or {}
            if kind.startswith("sparge."):
                self.take(kind, data, ended, running)
            elif data.get("prompt_id") != identity:
                continue
            elif kind == "execution_start":
                running = True
            elif kind in END_EVENTS:
                ended.how, ended.error = END_EVENTS[kind], str(data.get("exception_message", ""))
            elif is_moment(plan, kind, data):
                await self.session.post("/interrupt", json={"prompt_id": identity})
        ended.entry = await self.history(identity)
        return ended

    def take(self, kind: str, data: dict, ended: Ended, running: bool) -> None:
        if not running and data.get("version", 0) >= ADDRESSED:
            raise Broken(f"a client got a {kind} of what another one queued: {str(data)[:200]}")
        if running and kind == "sparge.run":
            ended.messages.append(data)
        elif running:
            ended.lines += 1

    async def history(self, identity: str) -> dict:
        """The prompt's entry, taken out of the server's history: what is kept there is not to count as growth."""
        for _ in range(200):
            async with self.session.get(f"/history/{identity}") as answer:
                entry = (await answer.json()).get(identity)
            if entry is not None:
                await self.session.post("/history", json={"delete": [identity]})
                return entry
            await asyncio.sleep(0.05)  # it lags behind the last message
        raise Broken("a prompt that ended is not in ComfyUI's history")


def newest(counted: list[dict]) -> int:
    return counted[-1]["number"] if counted else 0


def is_moment(plan: Plan, kind: str, data: dict) -> bool:
    """Whether this event is the one to interrupt the plan at."""
    if plan.interrupt_at == 0:
        return kind == "executing" and data.get("node") == "sampler"
    return kind == "progress" and data.get("node") == "sampler" and data.get("value") == plan.interrupt_at


@dataclass
class Held:
    """What the server held at one moment, idle, after everything was freed."""

    seconds: float
    bytes: int
    tensors: int  # bytes of them
    threads: int
    files: int


class Soak:
    """A soak of `minutes` on a server that runs."""

    def __init__(self, server: comfy_server.ComfyServer, minutes: float, seed: int, mix: Mix):
        self.server, self.minutes, self.seed, self.mix = server, minutes, seed, mix
        self.first = deque(first_plans(mix))
        self.warm_s = WARM_UP * 60 * minutes
        self.log = Log(server)
        self.per_call: dict[str, int] = {}
        self.broken: list[str] = []
        self.held: list[Held] = []
        self.tally: dict[str, Counter] = {family: Counter() for family in mix.families}
        self.kinds: Counter = Counter()

    async def counted(self, tag: str) -> list[dict]:
        async with self.session.get("/sparge_fixture/runs", params={"tag": tag}) as answer:
            return (await answer.json())["runs"]

    def note(self, plan: Plan, ended: Ended) -> None:
        row = self.tally[plan.family]
        row.update({"prompts": 1, ended.how: 1})
        for run in ended.runs:
            row.update({"runs": 1, "sparse": run["totals"]["sparse_calls"], "dense": run["totals"]["dense_calls"]})
        more = {"two nodes": len(plan.sparge) > 1, "compiled": plan.compiled, "another override": plan.before or plan.behind, "guided": plan.cfg > 1}
        more |= {"batches": plan.batch > 1, "monitored": plan.monitor, "saved a report": ended.how == "done" and plan.formats != "none"}
        self.kinds.update(name for name, is_so in more.items() if is_so)

    def count_calls(self) -> None:
        """How many attention calls one model call of each family makes, without any node of the pack."""
        for family in self.mix.families:
            self.server.queue(counting_graph(family))
            (found,) = self.server.get(f"/sparge_fixture/runs?tag=count {family}")["runs"]
            calls, rest = divmod(found["attention_calls"], found["model_calls"])
            if rest or not calls:
                raise Broken(f"{family} made {found['attention_calls']} attention calls in {found['model_calls']} model calls; that tells nothing")
            self.per_call[family] = calls

    async def look(self, started: float) -> None:
        """Frees what can be freed and notes what the server still holds."""
        for _ in range(2):  # the worker frees when it is woken; the first look may come before
            await self.session.post("/free", json={"unload_models": True, "free_memory": True})
            await asyncio.sleep(0.3)
            async with self.session.get("/sparge_fixture/held") as answer:
                held = await answer.json()
        self.held.append(Held(time.monotonic() - started, **held))
        done = sum(row["prompts"] for row in self.tally.values())
        memory = f"{held['bytes'] / 1e6:,.1f} MB, {held['tensors'] / 1e6:,.1f} MB of it in tensors"
        print(f"  {self.held[-1].seconds:5.0f} s {done:6} prompts   {memory}, {held['threads']} threads, {held['files']} files", flush=True)

    async def run(self) -> None:
        await asyncio.to_thread(self.count_calls)
        started = time.monotonic()
        end, every = started + 60 * self.minutes, min(ROUND_S, 60 * self.minutes / 4)
        async with aiohttp.ClientSession(self.server.url) as self.session:
            clients = [Client(self, name) for name in "AB"]
            for client in clients:
                await client.connect(self.session)
            while time.monotonic() < end and not self.broken:
                await asyncio.gather(*(client.work(min(end, time.monotonic() + every)) for client in clients))
                await self.look(started)
                if self.first:
                    self.warm_s = time.monotonic() - started + every
        if not self.broken:
            self.judge()

    def judge(self) -> None:
        """What is known only at the end."""
        never = [family for family, row in self.tally.items() if row["done"] > 12 and not row["sparse"]]
        if never:
            self.broken.append(f"{', '.join(never)} ran and never made a sparse call")
        warm = [held for held in self.held if held.seconds >= self.warm_s]
        if len(warm) < JUDGED:
            print(f"  Memory is not judged: {len(warm)} looks after the warm-up, and {JUDGED} are needed.")
            return
        for what, factor, spare in (("bytes", GROWTH, 0), ("tensors", GROWTH, 0), ("threads", 1.0, PASSING), ("files", 1.0, PASSING)):
            first, last = (statistics.median(getattr(held, what) for held in part) for part in (warm[:3], warm[-3:]))
            if last > factor * first + spare:
                self.broken.append(f"the server's {what} grew by {100 * (last / first - 1):.1f} %, from {first:,.0f} to {last:,.0f}")

    def table(self) -> str:
        names = ("prompts", "done", "interrupted", "error", "runs", "sparse", "dense")
        total = sum(self.tally.values(), Counter())
        rows = [("family", *names), *((family, *(f"{row[name]:,}" for name in names)) for family, row in [*self.tally.items(), ("together", total)])]
        lines = [f"  {row[0]:<16}" + "".join(f"{cell:>13}" for cell in row[1:]) for row in rows]
        return "\n".join([*lines, "  of these: " + ", ".join(f"{count} {name}" for name, count in self.kinds.most_common())])


def soak(minutes: float, seed: int, mix: Mix) -> Soak:
    """Runs a soak in a server of its own; what is broken is in `.broken`, the first thing first."""
    with mock.patch.dict(os.environ, RETURNED), comfy_server.ComfyServer() as server:
        made = Soak(server, minutes, seed, mix)
        try:
            asyncio.run(made.run())
        except (Broken, aiohttp.ClientError) as error:
            made.broken.append(f"{type(error).__name__}: {error}" if isinstance(error, aiohttp.ClientError) else str(error))
        with contextlib.suppress(comfy_server.ServerError):
            server.check_alive()
            return made
        made.broken.insert(0, f"the server died with exit status {server.process.returncode}\n{server.log_tail()}")
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description="Two clients queue mixed graphs of tiny models in a real ComfyUI; every count is checked.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10); memory is judged from about 3 on")
    parser.add_argument("--seed", type=int, default=None, help="the seed of an earlier soak (default: another one each time)")
    given = parser.parse_args()
    if not 0 < given.minutes <= 24 * 60:
        parser.error(f"--minutes must be above 0 and at most 1440, got {given.minutes:g}; 10 is usual")
    seed = random.randrange(1 << 31) if given.seed is None else given.seed
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the server is stopped then too
    print(f"Soak of {given.minutes:g} minutes with seed {seed}: two clients, {', '.join(Mix().families)}", flush=True)
    try:
        made = soak(given.minutes, seed, Mix())
    except comfy_server.ServerError as error:
        print(f"FAIL: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(f"\n{made.table()}\n")
    print(f"FAIL (seed {seed}): {made.broken[0]}" if made.broken else f"PASS (seed {seed})")
    return 1 if made.broken else 0


if __name__ == "__main__":
    sys.exit(main())
