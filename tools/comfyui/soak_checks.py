"""What the soak holds true of every prompt: the counts of its runs, the messages about them, the server's log. All of it raises `Broken`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import comfy_server
from fixture_pack.soak import PLANNED
from soak_graphs import NODES, Plan

ADDRESSED = 3
"""The version of the messages from which they go to the client that queued the run, and to no other. Lines of text are messages since then."""


class Broken(Exception):
    """Something that must hold did not; the message is a sentence."""


@dataclass
class Ended:
    """What came of a prompt: how it ended, what ComfyUI's history says, the messages while it ran, and what the server counted of it by itself."""

    how: str
    entry: dict
    messages: list[dict]
    lines: int
    error: str = ""
    counted: list[dict] = field(default_factory=list)

    @property
    def runs(self) -> list[dict]:
        """The runs that the report shows."""
        return json.loads(self.entry["outputs"]["json"]["text"][0])["runs"] if self.how == "done" else []


def calls_of(totals: dict) -> int:
    return totals["sparse_calls"] + totals["dense_calls"]


def check(plan: Plan, ended: Ended, per_call: int, is_new: bool) -> None:
    """Raises `Broken` where a number is wrong or a message missing. `per_call`: attention calls of a model call; `is_new`: something was sampled."""
    if ended.how == "error" and not (plan.behind == "fail" and PLANNED in ended.error):
        raise Broken(f"a prompt failed: {ended.error}")
    if ended.how == "interrupted" and plan.interrupt_at is None:
        raise Broken("a prompt was interrupted that nobody interrupted")
    if not plan.sparge:
        return
    by_node = {name: [run for run in ended.runs if run["node"] == name] for name in NODES[: len(plan.sparge)]}
    if ended.how == "done":
        check_counts(plan, by_node, ended.counted, per_call)
    if plan.monitor and is_new:
        check_messages(plan, ended, by_node, per_call)


def check_counts(plan: Plan, by_node: dict[str, list[dict]], counted: list[dict], per_call: int) -> None:
    """The report's runs against what the server counted by itself, newest with newest."""
    top = by_node[plan.top]
    if not top or any(len(runs) != len(top) for runs in by_node.values()):
        found = ", ".join(f"{len(runs)} runs of {name}" for name, runs in by_node.items())
        raise Broken(f"the report shows {found}; wanted as many of each, and at least one")
    for back in range(1, min(len(top), len(counted)) + 1):
        run, most = top[-back], counted[-back]["model_calls"] * per_call
        least = most if counted[-back]["ended"] else max(0, most - per_call)
        if not least <= calls_of(run["totals"]) <= most:
            raise Broken(f"run {run['run']} counted {said(run)} calls, and the model made {least if least == most else f'{least} to {most}'}")
        below = most
        for name in reversed(by_node):  # each node gets what the one above it leaves
            run = by_node[name][-back]
            if least == most and calls_of(run["totals"]) != below:
                raise Broken(f"run {run['run']} of node {name} counted {said(run)} calls, and {below} came to it")
            below = run["totals"]["dense_calls"]
            if sum(run["reasons"].values()) != below:
                raise Broken(f"run {run['run']} has {below} dense calls and reasons for {sum(run['reasons'].values())}")


def said(run: dict) -> str:
    return f"{run['totals']['sparse_calls']} sparse and {run['totals']['dense_calls']} dense"


def check_messages(plan: Plan, ended: Ended, by_node: dict[str, list[dict]], per_call: int) -> None:
    """Every run of this prompt was told from its first message to its last, with the report's numbers."""
    told: dict[int, list[dict]] = {}
    for message in ended.messages:
        told.setdefault(message["run"], []).append(message)
    if len(told) != len(plan.sparge):
        raise Broken(f"the client got messages of {len(told)} runs, wanted {len(plan.sparge)}")
    state = "done" if ended.counted[-1]["ended"] else "failed"
    if any(message["version"] >= ADDRESSED for message in ended.messages) and ended.lines < len(plan.sparge):
        raise Broken(f"the client got {ended.lines} lines of what the nodes say, wanted one of each run at least")
    for number, messages in told.items():
        states, steps = [message["state"] for message in messages], [message["step"] for message in messages]
        if states[:-1] != ["running"] * (len(states) - 1) or states[-1] != state or steps != sorted(steps) or steps[0] != 0:
            raise Broken(f"messages of run {number} have states {states} and steps {steps}; wanted running from 0 on, and at the end {state}")
        if calls_of(messages[-1]["totals"]) > ended.counted[-1]["model_calls"] * per_call:
            raise Broken(f"the last message of run {number} has {calls_of(messages[-1]['totals'])} calls, more than the model made")
    for run in [runs[-1] for runs in by_node.values() if runs]:
        if run["run"] not in told:
            raise Broken(f"run {run['run']} is in the report, and the client got no message of it")
        last = told[run["run"]][-1]["totals"]
        if [last[name] for name in ("sparse_calls", "dense_calls")] != [run["totals"][name] for name in ("sparse_calls", "dense_calls")]:
            raise Broken(f"run {run['run']} has {said(run)} calls, and its last message {last['sparse_calls']} and {last['dense_calls']}")
        names = [column["name"] for column in told[run["run"]][-1]["columns"]]
        cells = [dict(zip(names, row, strict=True)) for message in told[run["run"]] for row in message["cells"]]
        of_cells, wanted = (sum(calls_of(cell) for cell in found) for found in (cells, run["cells"]))
        if of_cells != wanted:
            raise Broken(f"the messages of run {run['run']} have cells of {of_cells} calls, its report of {wanted}")


ANSI = re.compile(r"\x1b\[[0-9;]*m")
COMFYUIS = ("SQLite objects created in a thread",)
"""Errors of ComfyUI's own: a connection to its database that the garbage collector happens to close on another thread."""
UNSENT = re.compile(r"Sparge \w+.*no (message|line) could be sent")


class Log:
    """The server's log, read as it grows."""

    def __init__(self, server: comfy_server.ComfyServer):
        self.server, self.read, self.open = server, 0, []

    def check(self) -> None:
        """Raises `Broken` for a traceback that nobody planned, once all of it is there."""
        with open(self.server.log_file, "rb") as file:
            file.seek(self.read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self.read += len(text)
        trouble, self.open = trouble_in([*self.open, *ANSI.sub("", text.decode("utf-8", "replace")).splitlines()])
        if trouble:
            raise Broken(trouble)


def trouble_in(lines: list[str]) -> tuple[str, list[str]]:
    """What is wrong, as a sentence, and the lines of a traceback that has not ended.

    Wrong is a traceback that ends with no planned error and no interruption, and a message that could not be sent; "" for neither.
    """
    begun = None
    for at, line in enumerate(lines):
        if "Traceback (most recent call last)" in line:
            begun = at
        elif begun is not None and line.strip() and not line.startswith((" ", "\t")):
            ours = [frame.strip() for frame in lines[begun:at] if f"/{comfy_server.PACK_FOLDER}/" in frame.replace("\\", "/")]
            begun = None
            if PLANNED not in line and "InterruptProcessing" not in line and (ours or not any(words in line for words in COMFYUIS)):
                where = f"last in the pack's {ours[-1]}" if ours else "none of the pack's files in it"
                return f"the server's log has an error that nobody planned: {line.strip()} ({where})", []
        if UNSENT.search(line):
            return f"the server's log says: {line.strip()}", []
    return "", [] if begun is None else lines[begun:]
