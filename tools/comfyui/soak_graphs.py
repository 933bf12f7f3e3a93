"""The soak's graphs: by chance, from tables of what people combine, as prompts in API format."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace

# Tiny models by family, and entries of their configuration: two layers where the family's own has more, for the soak lives on the number of runs.
FAMILIES = {
    "wan_t2v": {},
    "qwen_image": {},
    "flux": {"depth": 1, "depth_single_blocks": 1},
    "hunyuan_video": {"depth": 1, "depth_single_blocks": 1},
    "ltxv": {},
    "sd15": {},
}
SCALES = (0.4, 0.6, 0.8, 1.0)
SAMPLERS = ("euler", "heun", "dpmpp_2m", "euler_ancestral")
SETTINGS = {
    "preset": ("off", "off", "auto", "fast"),
    "topk": (0.1, 0.3, 0.5, 1.0),
    "start_percent": (0.0, 0.0, 0.3),
    "end_percent": (1.0, 1.0, 0.7),
    "dense_blocks": ("", "", "0", "-1"),
    "min_tokens": (0, 0, 600),
    "cdfthreshd": (0.0, 0.9),
    "token_order": ("auto", "tiles", "hilbert"),
    "compensate": (False, True),
}
COMPILED = {"family": ("wan_t2v", "qwen_image"), "scale": (0.6, 1.0)}  # few shapes: every new one is compiled, which takes most of a minute
FORMATS = ("none", "none", "none", "png, html", "json, csv", "webp")


@dataclass(frozen=True)
class Plan:
    """One prompt. `tag` names its graph: the same tag again is the same graph with another seed."""

    tag: str
    family: str
    scale: float
    batch: int
    steps: int
    cfg: float
    sampler: str
    seed: int
    sparge: tuple[dict, ...]  # the settings of one node or two; none: a run without the pack, as before somebody puts it in
    monitor: bool
    measure: bool
    formats: str
    before: str = ""  # mode of another node's override before our nodes, or none
    behind: str = ""
    fail_at: int = 1
    compiled: str = ""  # "before" or "behind" our nodes
    interrupt_at: int | None = None  # after so many steps; 0: as the sampler starts

    @property
    def top(self) -> str:
        """The Sparge Attention node that is asked first: the last one."""
        return NODES[len(self.sparge) - 1]

    def __str__(self) -> str:
        parts = [f"graph {self.tag}: {self.family} x {self.scale:g}, batch {self.batch}, {self.steps} steps of {self.sampler}, cfg {self.cfg:g}"]
        parts += [f"{name} {settings}" for name, settings in zip(NODES, self.sparge, strict=False)]
        parts += [f"override {mode} {where}" for where, mode in (("before", self.before), ("behind", self.behind)) if mode]
        parts += [f"compiled {self.compiled}"] if self.compiled else []
        parts += ["monitor"] if self.monitor else []
        return ", ".join(parts)


NODES = ("sparge", "second")


@dataclass(frozen=True)
class Mix:
    """What graphs are made of.

    compiled : one graph in so many is, none for 0. faults : modes of overrides that do what no node may do, so that tests see the soak fail.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    compiled: int = 6
    faults: tuple[str, ...] = ()


def new_plan(chance: random.Random, tag: str, mix: Mix) -> Plan:
    """A graph by chance."""

    def settings() -> dict:
        return {name: chance.choice(values) for name, values in SETTINGS.items()}

    def one_in(n: int) -> bool:
        return chance.randrange(n) == 0

    fails = one_in(12)
    plan = Plan(
        tag=tag,
        family=chance.choice(mix.families),
        scale=chance.choice(SCALES),
        batch=chance.choice((1, 1, 2)),
        steps=chance.choice((1, 2, 3, 4)),
        cfg=chance.choice((1.0, 4.0)),
        sampler=chance.choice(SAMPLERS),
        seed=chance.randrange(1 << 32),
        sparge=tuple(settings() for _ in range(chance.choice((0, 1, 1, 1, 1, 1, 2, 2)))),
        monitor=chance.random() < 0.7,
        measure=one_in(2),
        formats=chance.choice(FORMATS),
        before=chance.choice(("", "", "", "chain")),
        behind="fail" if fails else chance.choice(mix.faults or ("", "", "", "chain", "replace")),
        fail_at=chance.randrange(1, 12),
        compiled=chance.choice(("before", "behind")) if mix.compiled and not fails and one_in(mix.compiled) else "",
    )
    if not plan.sparge:
        plan = replace(plan, monitor=False)
    if plan.compiled:
        return replace(plan, batch=1, cfg=1.0, **{name: chance.choice(values) for name, values in COMPILED.items()})
    return plan if fails or not one_in(6) else replace(plan, interrupt_at=chance.randrange(plan.steps))


def first_plans(mix: Mix) -> list[Plan]:
    """Everything once that the server loads, compiles or caches when it is first needed: what memory is compared with comes after these."""
    settings = ({"preset": "off", "topk": 0.3, "min_tokens": 0},)
    first = Plan("first", mix.families[0], 1.0, 2, 3, 4.0, "heun", 1, settings, True, True, "all")
    plans = [replace(first, family=family, tag=f"first {family}") for family in mix.families]
    plans += [replace(first, tag="first stopped", interrupt_at=1), replace(first, tag="first failed", behind="fail", fail_at=5)]
    for scale in COMPILED["scale"] if mix.compiled else ():
        for family in COMPILED["family"]:
            bare = Plan(f"bare {family} {scale}", family, scale, 1, 2, 1.0, "euler", 1, (), False, False, "none", compiled="behind")
            plans += [bare, replace(bare, tag=f"compiled {family} {scale}", sparge=settings, monitor=True)]
    return plans


def again(plan: Plan, chance: random.Random) -> Plan:
    """The same graph with another seed and no interruption: what ComfyUI's cache keeps of it, patches included, is used again."""
    return replace(plan, seed=chance.randrange(1 << 32), interrupt_at=None)


def graph(plan: Plan) -> dict:
    """The prompt in API format. All prompts have the same node ids, as workflows of two browser tabs do."""
    nodes, model = {}, None
    changes = json.dumps(FAMILIES[plan.family])

    def add(name: str, kind: str, **inputs) -> None:
        nonlocal model
        nodes[name] = {"class_type": kind, "inputs": inputs if model is None else {"model": [model, 0], **inputs}}
        model = name

    add("loader", "SpargeSoakModel", family=plan.family, tag=plan.tag, changes=changes)
    if plan.compiled == "before":
        add("compiled", "SpargeSoakCompile", backend="eager", filters=True)
    if plan.before:
        add("before", "SpargeSoakOverride", tag=plan.tag, mode=plan.before, at=plan.fail_at)
    for name, settings in zip(NODES, plan.sparge, strict=False):
        add(name, "SpargeAttention", **settings)
    if plan.monitor:
        add("monitor", "SpargeMonitor", measure_dense=plan.measure)
    if plan.behind:
        add("behind", "SpargeSoakOverride", tag=plan.tag, mode=plan.behind, at=plan.fail_at)
    if plan.compiled == "behind":
        add("compiled", "SpargeSoakCompile", backend="eager", filters=True)
    add("count", "SpargeSoakCount", tag=plan.tag)
    sampler = {"seed": plan.seed, "steps": plan.steps, "cfg": plan.cfg, "sampler_name": plan.sampler, "scheduler": "simple", "denoise": 1.0}
    sampler |= {"model": ["count", 0], "positive": ["latent", 1], "negative": ["latent", 2], "latent_image": ["latent", 0]}
    more = {
        "latent": ("SpargeSoakLatent", {"family": plan.family, "changes": changes, "scale": plan.scale, "batch": plan.batch}),
        "sampler": ("KSampler", sampler),
        "report": ("SpargeReport", {"model": ["count", 0], "data": ["sampler", 0], "formats": plan.formats, "filename_prefix": "sparge/soak"}),
        "json": ("PreviewAny", {"source": ["report", 3]}),
    }
    return nodes | {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in more.items()}


def counting_graph(family: str) -> dict:
    """A prompt without the pack's nodes that counts how many attention calls one call of the model makes."""
    plan = Plan(f"count {family}", family, 0.4, 1, 2, 1.0, "euler", 1, (), False, False, "none", before="count")
    nodes = graph(plan)
    nodes.pop("report")
    nodes["json"]["inputs"]["source"] = ["sampler", 0]
    return nodes
