"""The machine in words, and results as JSON and as a table."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import gpu_run
import torch
from bench_torch import machine as host
from sparge_kernels import __version__, config
from sparge_kernels.cuda import driver

ROOT = Path(__file__).resolve().parents[1]
_SMI = "driver_version,power.limit,power.draw,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu"


def commit() -> str:
    """What git says of the sources; of a copy without git what `bench_gpu.py --carry` noted of the same ones; or "unknown"."""
    noted = ROOT / ".gpu" / "commit"
    told = _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    if told or not noted.is_file():
        return told or "unknown"
    commit, _, digest = noted.read_text(encoding="utf-8").strip().partition(" ")
    return commit if digest == gpu_run.sources() else "unknown"


def smi(device: torch.device) -> dict[str, str]:
    """What nvidia-smi says of this GPU now; empty where there is no nvidia-smi."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    which = str(device.index or 0) if uuid is None else f"GPU-{uuid}"
    text = _output("nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader", "-i", which)
    return dict(zip(_SMI.split(","), (value.strip() for value in text.split(",")), strict=False)) if text else {}


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def machine(device: torch.device | None) -> dict:
    """GPU (with `device`), host, versions, commit."""
    found = {
        "host": host(), "python": platform.python_version(), "torch": str(torch.__version__), "torch_cuda": torch.version.cuda or "none",
        "sparge_kernels": __version__, "commit": commit(),
    }  # fmt: skip
    if device is None:
        return found
    properties = torch.cuda.get_device_properties(device)
    opened = driver.driver()
    return {
        "gpu": properties.name, "multiprocessors": properties.multi_processor_count, "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1), "driver_cuda": opened if isinstance(opened, str) else opened.version / 1000,
        "nvidia_smi": smi(device), **found,
    }  # fmt: skip


def binaries(machine, pvs: tuple[str, ...]) -> dict[str, str]:
    """Binary -> where it came from, or why there is none; of those that bf16 calls use."""
    names = {config.prepass_name(dim, "bfloat16") for dim in config.DIMS} | {config.select_name(dim) for dim in config.DIMS}
    kernels = [(config.attention_kernel(machine.arch, pv), pv) for pv in pvs]
    names |= {kernel.variant(dim, pv, masked).name for kernel, pv in kernels for dim in config.DIMS for masked in (False, True)}
    found = {}
    for variant in config.variants(machine.arch):
        if variant.name in names:
            reason = machine.missing((variant,))
            found[variant.name] = reason or machine.kernel(variant, variant.symbols[0]).origin.removeprefix(f"{variant.name}, ")
    return found


def file_name(result: dict) -> str:
    """<gpu>.json; other programs, short runs and runs on a file's tensors have a name of their own."""
    parts = (result["machine"]["gpu"], result.get("program", ""), result["activations"] or "", "short" if result["short"] else "")
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-") + ".json"


def save(result: dict, folder: Path) -> Path:
    """Writes the result, and returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(result)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


_COLUMNS = (
    "call", "tokens", "H", "D", "what", "density", "ms", "quartiles", "TFLOPS", "x cudnn", "x flash", "prepass", "select", "attention", "other", "L2",
)  # fmt: skip

LEGEND = (
    "ms: median of alternating runs, and their quartiles. TFLOPS: 4 S_q S_k D H density / time. x: times as fast as PyTorch's dense attention with "
    "that backend, median over rounds. prepass (statistics and pre-pass), select, attention: ms of the kernels; other: share of the whole call that "
    "is not the attention kernel. L2: relative error of sampled rows against dense attention."
)


def table(result: dict) -> str:
    """The rows of a result as Markdown, under the machine and above what was left out."""
    return f"{heading(result)}\n\n{speeds(result['rows'], result['skipped'])}"


def heading(result: dict) -> str:
    """The machine, commit, date and data of a result."""
    about = result["machine"]
    smi = about["nvidia_smi"]
    return (
        f"{about['gpu']} ({about['multiprocessors']} SMs, {about['capability']}), driver {smi.get('driver_version', 'unknown')}, power limit "
        f"{smi.get('power.limit', 'unknown')}, torch {about['torch']}, commit {about['commit']}, {result['date']}; {result['data']}."
    )


def speeds(rows: list[dict], skipped: list[dict]) -> str:
    """Rows of bench.measure as Markdown, above what was left out."""
    lines = [LEGEND, "", "| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    left_out = [f"- {item['call']}, {item['what']}: {item['reason']}" for item in skipped]
    return "\n".join(lines + (["", "Not measured:", ""] + left_out if left_out else []))


def _cells(row: dict) -> list[str]:
    ms, kernels = row["ms"], row["kernels"]
    tokens = f"{row['s_q']:,}" + ("" if row["s_q"] == row["s_k"] else f" x {row['s_k']:,}")
    ratios = [_number(row["speedup"].get(name), ".2f") for name in ("sdpa cudnn", "sdpa flash")]
    parts = ["", "", "", ""]
    if kernels:
        before = kernels["sparge_statistics"] + kernels["sparge_prepass"]
        select = kernels["sparge_select"] + kernels.get("sparge_sequence", 0.0)
        attention = sum(ms for name, ms in kernels.items() if name.startswith("sparge_attention"))
        parts = [_number(ms) for ms in (before, select, attention)] + [f"{row['outside']:.1%}"]
    return [row["call"], tokens, str(row["heads"]), str(row["dim"]), row["what"] + (f" ({row['note']})" if row["note"] else ""),
            f"{row['density']:.3f}", _number(ms["median"]), f"{_number(ms['low'])} to {_number(ms['high'])}", f"{row['tflops']:.0f}", *ratios,
            *parts, _number(row["error"])]  # fmt: skip


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form if abs(value) < 1000 or form != ".3g" else ".0f")
