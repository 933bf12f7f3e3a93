"""The soak itself: a short one passes, and it fails where a count, a message, a line of the log or the memory is wrong."""

from __future__ import annotations

import json
import random

import comfy_server
import install
import pytest
import soak
import soak_checks
from fixture_pack.soak import PLANNED
from required import missing
from soak_graphs import FAMILIES, Mix, Plan, again, first_plans, graph, new_plan

SHORT = Mix(families=("wan_t2v", "sd15"), compiled=0)
OURS = f'  File "/base/custom_nodes/{comfy_server.PACK_FOLDER}/nodes/override.py", line 3, in __call__'


@pytest.fixture
def tree():
    if not (install.comfyui_tree() / "main.py").is_file():
        missing("a ComfyUI tree")


def test_a_short_soak_passes(tree):
    made = soak.soak(0.2, 5, SHORT)
    assert made.broken == []
    total = sum(made.tally.values(), start=type(made.kinds)())
    assert total["done"] >= 2 and total["runs"] >= total["done"] and total["dense"] > 0, made.table()
    assert made.held and all(held.bytes > 100e6 and held.threads > 1 for held in made.held)
    assert made.per_call == {"wan_t2v": 4, "sd15": 14}


def test_a_soak_notices_a_call_that_is_counted_twice(tree):
    made = soak.soak(1.0, 5, Mix(families=("wan_t2v",), compiled=0, faults=("twice",)))
    assert made.broken and "calls, and the model made" in made.broken[0] and "override twice behind" in made.broken[0]


# Without a server.

PLAN = Plan("A1", "wan_t2v", 1.0, 1, 2, 1.0, "euler", 1, ({},), True, False, "none")
TWO = Plan("A1", "wan_t2v", 1.0, 1, 2, 1.0, "euler", 1, ({}, {}), True, False, "none")


def run(number: int, node: str, sparse: int, dense: int) -> dict:
    cells = [{"sparse_calls": sparse, "dense_calls": dense}]
    return {"run": number, "node": node, "totals": {"sparse_calls": sparse, "dense_calls": dense}, "reasons": {"short": dense}, "cells": cells}


def messages(of: dict, state: str = "done", version: int = 2) -> list[dict]:
    """Those of a run: as it opens, after a step, at its end."""
    columns, row = [{"name": "sparse_calls"}, {"name": "dense_calls"}], list(of["totals"].values())
    made = {"version": version, "run": of["run"], "columns": columns, "totals": of["totals"]}
    told = (("running", 0, []), ("running", 1, [row]), (state, 2, []))
    return [{**made, "state": state, "step": step, "cells": cells} for state, step, cells in told]


def ended(runs: list[dict], counted: list[dict] | None = None, **changes) -> soak_checks.Ended:
    """A prompt that made two model calls of eight attention calls each, and what came of it."""
    entry = {"outputs": {"json": {"text": [json.dumps({"runs": runs})]}}}
    told = [message for of in runs for message in messages(of)]
    made = soak_checks.Ended("done", entry, told, 0, counted=counted or [{"number": 1, "model_calls": 2, "ended": True}])
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_what_is_right_passes():
    soak_checks.check(PLAN, ended([run(1, "sparge", 10, 6)]), 8, True)
    soak_checks.check(TWO, ended([run(1, "second", 10, 6), run(2, "sparge", 2, 4)]), 8, True)
    stopped = messages(run(1, "sparge", 3, 2), "failed")
    cut = [{"number": 1, "model_calls": 1, "ended": False}]
    interrupted = Plan("A1", "wan_t2v", 1.0, 1, 2, 1.0, "euler", 1, ({},), True, False, "none", interrupt_at=1)
    soak_checks.check(interrupted, ended([], cut, how="interrupted", messages=stopped), 8, True)
    failing = Plan("A1", "wan_t2v", 1.0, 1, 2, 1.0, "euler", 1, ({},), True, False, "none", behind="fail")
    soak_checks.check(failing, ended([], cut, how="error", error=f"{PLANNED}: attention call 5", messages=stopped), 8, True)
    both = [{"number": 1, "model_calls": 1, "ended": False}, {"number": 2, "model_calls": 2, "ended": True}]
    soak_checks.check(PLAN, ended([run(1, "sparge", 3, 2), run(2, "sparge", 10, 6)], both, messages=messages(run(2, "sparge", 10, 6))), 8, True)


ONE = run(1, "sparge", 10, 6)
WRONG = {
    "a call too few": (PLAN, ended([run(1, "sparge", 9, 6)]), "counted 9 sparse and 6 dense calls, and the model made 16"),
    "a call too many": (PLAN, ended([run(1, "sparge", 10, 7)]), "10 sparse and 7 dense"),
    "reasons that do not add up": (PLAN, ended([{**ONE, "reasons": {"short": 5}}]), "6 dense calls and reasons for 5"),
    "the lower node": (
        TWO,
        ended([run(1, "second", 10, 6), run(2, "sparge", 2, 3)]),
        "run 2 of node sparge counted 2 sparse and 3 dense calls, and 6 ",
    ),
    "no run of a node": (TWO, ended([run(1, "second", 10, 6)]), "1 runs of second"),
    "no run": (PLAN, ended([]), "0 runs of sparge"),
    "no message": (PLAN, ended([ONE], messages=[]), "messages of 0 runs, wanted 1"),
    "no first message": (PLAN, ended([ONE], messages=messages(ONE)[1:]), "wanted running from 0 on"),
    "no message between": (PLAN, ended([ONE], messages=messages(ONE)[::2]), "have cells of 0 calls, its report of 16"),
    "no last message": (PLAN, ended([ONE], messages=messages(ONE)[:2]), "at the end done"),
    "messages of another run": (PLAN, ended([ONE], messages=messages({**ONE, "run": 7})), "in the report, and the client got no message of it"),
    "other numbers in messages": (PLAN, ended([ONE], messages=messages(run(1, "sparge", 9, 6))), "its last message 9 and 6"),
    "no line": (PLAN, ended([ONE], messages=messages(ONE, version=3)), "0 lines"),
    "an error": (PLAN, ended([ONE], how="error", error="division by zero"), "a prompt failed: division by zero"),
    "an interruption": (PLAN, ended([ONE], how="interrupted"), "interrupted that nobody interrupted"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name):
    plan, found, words = WRONG[name]
    with pytest.raises(soak_checks.Broken) as error:
        soak_checks.check(plan, found, 8, True)
    assert words in str(error.value), str(error.value)


HEAD, LAST = "\x1b[31m[ERROR]\x1b[0m !!! Traceback (most recent call last):", "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("lines", "words", "left"),
    [
        (["got prompt", "100%"], "", 0),
        ([HEAD, OURS, "    out = 1 / 0", LAST], f"{LAST} (last in the pack's {OURS.strip()}", 0),
        ([HEAD, '  File "x.py", line 1', "", LAST], "(none of the pack's files in it)", 0),
        ([HEAD, OURS, f"RuntimeError: {PLANNED}: attention call 5"], "", 0),
        ([HEAD, OURS, "comfy.model_management.InterruptProcessingException"], "", 0),
        ([HEAD, '  File "x.py", line 1', "sqlite3.ProgrammingError: SQLite objects created in a thread can only be used in that one"], "", 0),
        ([HEAD, OURS, "sqlite3.ProgrammingError: SQLite objects created in a thread can only be used in that one"], "SQLite", 0),
        ([HEAD, OURS, f"RuntimeError: {PLANNED}", HEAD, OURS, LAST], LAST, 0),
        (["got prompt", HEAD, OURS], "", 2),
        (["Sparge Monitor, run 3: no message could be sent (TypeError: x)"], "no message could be sent", 0),
    ],
)
def test_trouble_in_the_log(lines, words, left):
    said, rest = soak_checks.trouble_in(lines)
    assert (words in said if words else said == "") and len(rest) == left


def test_a_log_that_grows_in_the_middle_of_a_traceback(tmp_path):
    class Server:
        log_file = tmp_path / "server.log"

    log = soak_checks.Log(Server)
    Server.log_file.write_text(f"{HEAD}\n{OURS}\nZeroDiv", encoding="utf-8")
    log.check()
    Server.log_file.write_text(f"{HEAD}\n{OURS}\n{LAST}\n", encoding="utf-8")
    with pytest.raises(soak_checks.Broken, match="division by zero"):
        log.check()


def judged(seconds: list[float], **held) -> list[str]:
    """What a soak of ten minutes says that held this when it looked."""
    made = soak.Soak(None, 10.0, 1, SHORT)
    rows = zip(seconds, *(held.get(name, [7] * len(seconds)) for name in ("bytes", "tensors", "threads", "files")), strict=True)
    made.held = [soak.Held(*row) for row in rows]
    made.judge()
    return made.broken


def test_growth_is_noticed(capsys):
    seconds, flat = [60.0 * at for at in range(1, 11)], [5] * 10
    full = [900, 950, 1000, 1001, 999, 1002, 1003, 1000, 1009, 1008]
    assert judged(seconds, bytes=full) == []
    assert judged(seconds, bytes=[*full[:7], 1019, 1019, 1019]) == ["the server's bytes grew by 1.8 %, from 1,001 to 1,019"]
    assert "tensors grew by 100.0 %" in judged(seconds, bytes=full, tensors=[*flat[:7], 10, 10, 10])[0]
    assert "threads grew by 60.0 %" in judged(seconds, bytes=full, threads=[*flat[:8], 8, 8])[0]
    assert "files grew by 80.0 %" in judged(seconds, bytes=full, files=[*flat[:8], 9, 9])[0]
    assert judged(seconds, bytes=full, files=[*flat[:8], 7, 7]) == [], "a connection that is kept is no leak"
    assert judged(seconds[:6], bytes=[1, 2, 3, 4, 5, 6]) == [] and "not judged" in capsys.readouterr().out


def test_a_family_that_is_never_sparse_is_noticed():
    made = soak.Soak(None, 10.0, 1, SHORT)
    made.tally["sd15"].update(done=13, dense=100)
    made.judge()
    assert made.broken == ["sd15 ran and never made a sparse call"]


def test_graphs_are_mixed_and_repeatable():
    def plans(seed: int) -> list[Plan]:
        chance = random.Random(seed)
        return [new_plan(chance, f"A{i}", Mix()) for i in range(400)]

    made = plans(1)
    assert made == plans(1) != plans(2)
    assert {plan.family for plan in made} == set(FAMILIES) and {len(plan.sparge) for plan in made} == {0, 1, 2}
    assert {plan.compiled for plan in made} == {"", "before", "behind"} and {plan.behind for plan in made} == {"", "chain", "replace", "fail"}
    assert {plan.interrupt_at for plan in made} == {None, 0, 1, 2, 3} and all((plan.interrupt_at or 0) < plan.steps for plan in made)
    assert all(plan.scale in (0.6, 1.0) and plan.batch == 1 for plan in made if plan.compiled)
    for plan in [*made, *first_plans(Mix())]:
        nodes = graph(plan)
        chain, at = [], "count"
        while "model" in nodes[at]["inputs"]:
            at = nodes[at]["inputs"]["model"][0]
            chain.append(at)
        assert at == "loader" and set(chain) == set(nodes) - {"count", "latent", "sampler", "report", "json"}
        other = again(plan, random.Random(3))
        assert other.tag == plan.tag and other.seed != plan.seed and other.interrupt_at is None
        assert {name for name in nodes if graph(other)[name] != nodes[name]} == {"sampler"}, "more than the seed changed: nothing would be cached"
