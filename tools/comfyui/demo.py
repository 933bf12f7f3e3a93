"""`make demo`: the whole pack in a real ComfyUI on the CPU, the same video sampled with dense and with sparse attention, and one table.

Everything goes the way it goes for a user: a checkpoint file, the server as a process, prompts over HTTP. Results land in demo_output/.
The exit status is 0 only if both runs ended, the sparse one was sparse, and its video is finite and close to the dense one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import comfy_server
import demo_model
import install
import safetensors.torch
import torch

MODEL = demo_model.FILE
WIDTH, HEIGHT = 416, 320  # pixels; a token is 16 x 16 of them
FPS, FRAMES_PER_LATENT = 20, 4
SEED, PROMPT_SEED = 1, 3
# Cumulative mass over a small floor: each head keeps what it needs, so the heat map shows which heads are wide. Rows beat tiles on this model.
SPARSE = {"topk": 0.05, "cdfthreshd": 0.99, "token_order": "row_major"}
WORST_ERROR = 0.25  # relative L2 of the final latent; above, the demo has failed
NEEDED = ("SpargeAttention", "SpargeReport", "SpargeDemoConditioning", "SpargeDemoDecode", "SpargeDemoRecord")


class DemoError(Exception):
    """The demo failed; the message says how in one sentence."""


@dataclass
class Run:
    """One sampling: what was asked for, and what came back."""

    name: str
    settings: dict
    step_seconds: list[float] = field(default_factory=list)
    latent: torch.Tensor | None = None
    frames: torch.Tensor | None = None
    report: dict | None = None
    outputs: dict | None = None

    @property
    def totals(self) -> dict:
        return self.report["totals"]

    @property
    def attention_ms(self) -> float:
        """Milliseconds of attention in the median step: one disturbed step does not count."""
        return statistics.median(step["sparse_ms"] + step["dense_ms"] for step in self.report["step_totals"])


def latent_frames(seconds: float) -> int:
    return max(1, round(seconds * FPS / FRAMES_PER_LATENT)) + 1


def tokens(seconds: float) -> int:
    return latent_frames(seconds) * (HEIGHT // 16) * (WIDTH // 16)


def graph(run: Run, seconds: float, steps: int) -> dict:
    """The prompt in API format. Node ids are words, so that errors and progress can be read."""
    sampler = {"seed": SEED, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    sampler |= {"model": ["sparge", 0], "positive": ["text", 0], "negative": ["text", 0], "latent_image": ["latent", 0]}
    length = (latent_frames(seconds) - 1) * 4 + 1
    nodes = {
        "loader": ("UNETLoader", {"unet_name": MODEL, "weight_dtype": "default"}),
        "shift": ("ModelSamplingSD3", {"model": ["loader", 0], "shift": 1.0}),
        "sparge": ("SpargeAttention", {"model": ["shift", 0], **run.settings}),
        "text": ("SpargeDemoConditioning", {"tokens": 16, "dim": 4096, "seed": PROMPT_SEED}),
        "latent": ("EmptyHunyuanLatentVideo", {"width": WIDTH, "height": HEIGHT, "length": length, "batch_size": 1}),
        "sampler": ("KSampler", sampler),
        "report": ("SpargeReport", {"model": ["sparge", 0], "data": ["sampler", 0], "formats": "html, gif, webp, mp4"}),
        "decode": ("SpargeDemoDecode", {"samples": ["sampler", 0], "scale": 4, "between": FRAMES_PER_LATENT}),
        "record": ("SpargeDemoRecord", {"samples": ["sampler", 0], "images": ["decode", 0], "name": run.name}),
        "video": ("CreateVideo", {"images": ["decode", 0], "fps": FPS}),
        "save": ("SaveVideo", {"video": ["video", 0], "filename_prefix": run.name, "format": "mp4", "codec": "h264"}),
        "heat": ("SaveImage", {"images": ["report", 1], "filename_prefix": f"{run.name}_heat"}),
        "json": ("PreviewAny", {"source": ["report", 3]}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def sample(server: comfy_server.ComfyServer, run: Run, seconds: float, steps: int) -> None:
    """Runs one prompt, with a line a step, and fills in `run`."""
    started = last = time.monotonic()

    def show(node: str, value: int, maximum: int) -> None:
        nonlocal last
        if node != "sampler":
            return
        now = time.monotonic()
        run.step_seconds.append(now - last)
        last = now
        print(f"  {run.name:6}  step {value:2}/{maximum}  {run.step_seconds[-1]:6.2f} s", flush=True)

    entry = server.queue(graph(run, seconds, steps), show)
    print(f"  {run.name:6}  whole prompt {time.monotonic() - started:.1f} s", flush=True)
    run.outputs = entry["outputs"]
    record = safetensors.torch.load_file(server.output / run.outputs["record"]["record"][0])
    run.latent, run.frames = record["latent"], record["frames"]
    runs = json.loads(run.outputs["json"]["text"][0])["runs"]
    if len(runs) != 1 or not runs[0]["cells"]:
        raise DemoError(f"SpargeReport must hold one run of the {run.name} sampling, got {len(runs)}: {runs[0].get('note')}")
    run.report = runs[0]


def check(dense: Run, sparse: Run) -> tuple[float, float]:
    """(relative L2 of the latents, PSNR of the frames in dB), or the reason why the demo failed."""
    for run in (dense, sparse):
        if not torch.isfinite(run.latent).all():
            raise DemoError(f"the {run.name} latent holds values that are not finite")
        if run.frames.float().std() < 1:
            raise DemoError(f"the {run.name} video is one flat colour, so it shows nothing")
    if dense.totals["sparse_calls"]:
        raise DemoError(f"the dense run made {dense.totals['sparse_calls']} sparse calls; its settings were {dense.settings}")
    if not sparse.totals["sparse_calls"]:
        raise DemoError(f"the sparse run made no sparse call; the reasons counted were {sparse.report['reasons']}")
    if torch.equal(dense.latent, sparse.latent):
        raise DemoError("dense and sparse latents are equal to the last bit, so the sparse attention was not in the model's path")
    difference = (sparse.latent - dense.latent).double()
    error = float(difference.norm() / dense.latent.double().norm())
    if error > WORST_ERROR:
        raise DemoError(f"relative L2 of the sparse latent is {error:.3f}, above the bound of {WORST_ERROR}")
    noise = float((sparse.frames.double() - dense.frames.double()).square().mean())
    return error, 10 * math.log10(255**2 / noise) if noise else math.inf


def save(server: comfy_server.ComfyServer, dense: Run, sparse: Run, out: Path) -> dict[str, Path]:
    """Copies the results into `out` under plain names; what each is -> where."""
    out.mkdir(parents=True, exist_ok=True)
    results = {}

    def keep(what: str, entry: dict, name: str) -> None:
        results[what] = Path(shutil.copyfile(server.output / entry.get("subfolder", "") / entry["filename"], out / name))

    for run in (dense, sparse):
        keep(f"{run.name} video", run.outputs["save"]["images"][0], f"{run.name}.mp4")
    keep("heat map", sparse.outputs["heat"]["images"][0], "heat_map.png")
    for entry in sparse.outputs["report"]["sparge_files"]:
        suffix = Path(entry["filename"]).suffix
        if suffix in (".gif", ".webp", ".mp4"):
            keep(f"animation, {suffix[1:]}", entry, f"animation{suffix}")
        elif suffix == ".html":
            keep("page", entry, "report.html")
    results["numbers"] = out / "report.json"
    results["numbers"].write_text(json.dumps({"dense": dense.report, "sparse": sparse.report}, indent=1), encoding="utf-8")
    return results


def table(dense: Run, sparse: Run, error: float, psnr: float) -> str:
    step = [statistics.median(run.step_seconds) for run in (dense, sparse)]
    ms = [dense.attention_ms, sparse.attention_ms]
    rows = [
        ("", "dense", "sparse", "dense / sparse"),
        ("attention, ms a step", f"{ms[0]:,.0f}", f"{ms[1]:,.0f}", f"{ms[0] / ms[1]:.2f}x"),
        ("one step, s", f"{step[0]:.2f}", f"{step[1]:.2f}", f"{step[0] / step[1]:.2f}x"),
        ("density", "1.000", f"{sparse.totals['density']:.3f}", f"{1 / sparse.totals['density']:.2f}x"),
        ("relative L2", "", f"{error:.4f}", ""),
        ("PSNR, dB", "", f"{psnr:.1f}", ""),
    ]
    return "\n".join(f"  {row[0]:<22}{row[1]:>10}{row[2]:>10}{row[3]:>17}".rstrip() for row in rows)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def demo(seconds: float, steps: int, out: Path) -> None:
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    dense = Run("dense", {"topk": 1.0})
    sparse = Run("sparse", dict(SPARSE))
    server = comfy_server.ComfyServer()
    demo_model.write_demo_model(server.model_path(MODEL))
    with server:
        system = server.get("/system_stats")["system"]
        print(f"Machine: {cpu_name()}, {comfy_server.cores()} cores; torch {torch.__version__}, ComfyUI {system.get('comfyui_version', '?')}")
        if busy > 0.5 * comfy_server.cores():
            print(f"Note: other programs keep this machine busy (load average {busy:.1f}), so the times below will be off.")
        known = server.object_info()
        absent = [name for name in NEEDED if name not in known]
        if absent:
            raise DemoError(f"ComfyUI did not load {', '.join(absent)}\n{server.log_tail()}")
        fill_defaults(dense.settings, known["SpargeAttention"])
        fill_defaults(sparse.settings, known["SpargeAttention"])
        print(f"Video: {WIDTH} x {HEIGHT}, {tokens(seconds):,} tokens, {steps} steps, 2 heads x {len(demo_model.BLOCKS)} layers", flush=True)
        for run in (dense, sparse):
            sample(server, run, seconds, steps)
        error, psnr = check(dense, sparse)
        results = save(server, dense, sparse, out)
    print(f"\n{table(dense, sparse, error, psnr)}\n\n  Times are those of the median step; both runs have the same seed.\n")
    for what, path in results.items():
        print(f"  {what:<18}{path}")


def fill_defaults(settings: dict, info: dict) -> None:
    """Adds the default of every required input that `settings` does not name and that is not a link."""
    for name, (kind, *options) in info["input"]["required"].items():
        if name not in settings and kind != "MODEL":
            option = options[0] if options else {}
            choices = kind if isinstance(kind, list) else option.get("options")
            settings[name] = option["default"] if "default" in option else choices[0]


def main() -> int:
    parser = argparse.ArgumentParser(description="Samples the demo video with dense and with sparse attention in a real ComfyUI and compares.")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the video (default: 3, which is 8,320 tokens)")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps (default: 12)")
    parser.add_argument("--out", type=Path, default=install.ROOT / "demo_output", help="folder for the results (default: demo_output)")
    given = parser.parse_args()
    if given.steps < 2:
        parser.error(f"--steps must be at least 2, got {given.steps}")
    if not 4096 <= tokens(given.seconds) <= 65536:
        parser.error(f"--seconds must give 4,096 to 65,536 tokens, got {given.seconds:g} s = {tokens(given.seconds):,} tokens; 3 gives 8,320")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the server is stopped then too
    try:
        demo(given.seconds, given.steps, given.out.resolve())
    except (DemoError, comfy_server.ServerError, comfy_server.PromptError) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
