"""What SpargeMonitor costs: the demo model sampled with and without it in turns, and the time spent in the monitor's own code.

Run with `make bench-monitor`, or `python bench/bench_monitor.py --frames 16 --steps 12 --runs 5`. The monitor does not time dense attention
here: what that takes is shown on the node.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import bench_torch

ROOT = Path(__file__).resolve().parents[1]
AIM = 0.01  # of the time of a step
NAME = "sparge_pack_in_bench"


class Browser:
    """ComfyUI's server as far as the sampler's thread is concerned: it only hands the message over."""

    def __init__(self):
        self.messages = 0

    def send_sync(self, event, data, sid=None):
        self.messages += 1


class Meter:
    """Seconds spent in functions that it has wrapped."""

    def __init__(self):
        self.seconds = 0.0

    def wrap(self, owner, name: str) -> None:
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


def load_pack():
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [importlib.import_module(f"{NAME}.nodes.{name}") for name in ("_comfy", "_kernels", "monitor", "patch", "telemetry", "transport")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default, text in (("frames", 8, "latent frames of 520 tokens"), ("steps", 4, "a run"), ("runs", 3, "of each kind")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    options = parser.parse_args()
    sys.path.append(str(ROOT / "tools/comfyui"))
    import comfy_launch
    import install

    comfy_launch.enter(install.comfyui_tree())
    import comfy.sample
    import comfy.sd
    import demo_model
    import torch

    own_comfy, kernels, monitor, patch, telemetry, transport = load_pack()
    own_comfy.user_folder = lambda: None  # else what was measured there could leave calls dense
    with tempfile.TemporaryDirectory() as folder:
        model = comfy.sd.load_diffusion_model(str(demo_model.write_demo_model(Path(folder) / "demo.safetensors")))
    latent = torch.zeros(1, 16, options.frames, 40, 52)
    text = [[torch.randn(1, 16, 4096, generator=torch.Generator().manual_seed(3)), {}]]
    plain = patch.install(model, patch.Settings(topk=0.3))
    kinds = {"without": plain, "with": monitor.watched(plain, "1", measures=False)}
    browser, own, ends = Browser(), Meter(), Meter()
    sys.modules["server"] = type("server", (), {"PromptServer": type("PromptServer", (), {"instance": browser})})
    own.wrap(kernels.AttentionInfo, "pooled")
    own.wrap(transport, "publish")
    ends.wrap(telemetry.Run, "end_step")
    print(f"{bench_torch.machine()}; {options.frames * 520:,} tokens, {len(demo_model.BLOCKS)} layers x 2 heads, {options.steps} steps")
    step_ms, spent_ms = {name: [] for name in kinds}, {name: [] for name in kinds}
    for run in range(options.runs + 1):
        for name, patcher in kinds.items():
            own.seconds = ends.seconds = 0.0
            start = time.perf_counter()
            with torch.inference_mode():
                comfy.sample.sample(patcher, torch.randn(latent.shape, generator=torch.Generator().manual_seed(1)), options.steps, 1.0, "euler",
                                    "simple", text, text, latent, disable_pbar=True, seed=1)  # fmt: skip
            if run:  # the first round warms up
                step_ms[name].append((time.perf_counter() - start) / options.steps * 1e3)
                spent_ms[name].append((own.seconds + ends.seconds) / options.steps * 1e3)
    step, spent = ({name: statistics.median(values) for name, values in table.items()} for table in (step_ms, spent_ms))
    share = (spent["with"] - spent["without"]) / step["without"]
    print(f"a step takes {step['without']:.1f} ms, with a monitor {step['with']:.1f} ms (medians of {options.runs} alternating runs)")
    print(f"of it the monitor's own code {spent['with'] - spent['without']:.2f} ms = {share:.2%} (aim: below {AIM:.0%}), {browser.messages} messages")
    sys.exit(share >= AIM)


if __name__ == "__main__":
    main()
