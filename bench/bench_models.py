"""Whole video and image models at their real size with random weights: a model call with dense attention against one with SpargeAttention.

Run with `make bench-models`, or `python bench/bench_models.py --models wan14b,flux --topk .5,.2 --steps 3`. Nothing is downloaded:
ComfyUI's own classes are filled with noise on the GPU and called through ComfyUI's sampler. Noise has flat attention, so which blocks are kept
means nothing and there is no picture to judge; how many are kept is what topk says, and so is the work. `--tiny` runs the same program on small
models, on any machine. Needs torch, numpy, einops, psutil, tqdm, packaging, this project's kernels (`sparge_kernels`) and a ComfyUI tree; what
else ComfyUI imports is stood in for.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.abc
import importlib.machinery
import inspect
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import bench_peers
import bench_report
import bench_timing
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
TOPK = (0.5, 0.3, 0.2)
DATA = (
    "random weights: attention is flat and the choice of blocks means nothing, but topk fixes how many there are, so the work is that of real weights"
)
STAND_INS = ("PIL", "av", "safetensors", "scipy", "tokenizers", "torchaudio", "torchsde", "torchvision", "transformers")
"""Packages that ComfyUI imports beside these models and that these models never use."""
_GIB = 1 << 30


# ---- the models


@dataclass(frozen=True)
class Model:
    """One model, and one size of its picture or video.

    Attributes
    ----------
    key : its name for --models.
    title : the model and what it makes.
    config : what ComfyUI's detection reads from the model's file.
    latent : (1, C, H, W) or (1, C, T, H, W).
    text, channels : tokens and width of the prompt's embedding.
    joint : prompt tokens in the sequence of the picture.
    parameters : of the real model.
    width, blocks : entries of `config`: the hidden size, and the numbers of blocks.
    tiny : entries that make the small one.
    pooled : width of the prompt's pooled embedding; 0: none.
    params : "module:class" of the parameters where ComfyUI has one.
    """

    key: str
    title: str
    config: dict
    latent: tuple[int, ...]
    text: int
    channels: int
    joint: int
    parameters: float
    width: str
    blocks: tuple[str, ...]
    tiny: dict
    pooled: int = 0
    params: str | None = None

    @property
    def tokens(self) -> int:
        """Of the main sequence."""
        *frames, height, width = self.latent[2:]
        return math.prod(frames) * (height // 2) * (width // 2) + self.joint

    @property
    def heads(self) -> int:
        return self.config["num_heads"]

    @property
    def head_dim(self) -> int:
        return self.config[self.width] // self.heads

    @property
    def layers(self) -> int:
        return sum(self.config[entry] for entry in self.blocks)

    def small(self) -> Model:
        """The same architecture with two heads, two blocks and about 700 tokens of picture."""
        latent = (1, self.latent[1], 3, 32, 32) if len(self.latent) == 5 else (1, self.latent[1], 50, 54)
        return replace(self, title=f"{self.key}, tiny", config=self.config | self.tiny, latent=latent)

    def cut(self, layers: int) -> Model:
        """The same with at most `layers` blocks of each kind."""
        short = replace(self, config=self.config | {entry: min(layers, self.config[entry]) for entry in self.blocks})
        return replace(short, title=f"{self.title}, cut to {short.layers} of {self.layers} layers") if short.layers < self.layers else self

    def memory(self, parameters: int) -> int:
        """Bytes that a model call takes at most, estimated: bf16 weights, and forty activations of the hidden size."""
        return 2 * parameters + 40 * 2 * self.tokens * self.config[self.width] + _GIB


# fmt: off
_TINY = dict(hidden_size=256, mlp_ratio=2.0, num_heads=2, depth=1, depth_single_blocks=1)
_FLUX = Model(
    "flux", "Flux dev 1024 px",
    dict(image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24,
         depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True),
    (1, 16, 128, 128), text=512, channels=4096, joint=512, parameters=11.9e9, width="hidden_size", blocks=("depth", "depth_single_blocks"),
    tiny=_TINY, pooled=768, params="comfy.ldm.flux.model:FluxParams")

MODELS = (
    # The prompt is in cross-attention, padded to 512.
    Model("wan14b", "Wan 2.1 14B, 720p, 81 frames",
          dict(image_model="wan2.1", model_type="t2v", dim=5120, in_dim=16, out_dim=16, num_heads=40, ffn_dim=13824, num_layers=40,
               patch_size=(1, 2, 2), freq_dim=256, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6),
          (1, 16, 21, 90, 160), text=512, channels=4096, joint=0, parameters=14.3e9, width="dim", blocks=("num_layers",),
          tiny=dict(dim=256, num_heads=2, ffn_dim=256, num_layers=2)),
    Model("hunyuan", "HunyuanVideo, 720p, 129 frames",
          dict(image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=768, axes_dim=[16, 56, 56],
               meanflow=False, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=20, depth_single_blocks=40, theta=256,
               qkv_bias=True, byt5=False, guidance_embed=True, use_cond_type_embedding=False, vision_in_dim=None),
          (1, 16, 33, 90, 160), text=256, channels=4096, joint=256, parameters=13.0e9, width="hidden_size",
          blocks=("depth", "depth_single_blocks"), tiny=_TINY, pooled=768, params="comfy.ldm.hunyuan_video.model:HunyuanVideoParams"),
    # The longest video it was trained on; of 256 text tokens a long prompt fills 180, and the model drops the others.
    Model("mochi", "Mochi 1, 848 x 480, 163 frames",
          dict(image_model="mochi_preview", depth=48, patch_size=2, num_heads=24, hidden_size_x=3072, hidden_size_y=1536, mlp_ratio_x=4.0,
               mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False, out_bias=True, attn_drop=0.0,
               patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False, timestep_scale=1000.0,
               use_t5=True, t5_feat_dim=4096, t5_token_length=256, rope_theta=10000.0),
          (1, 12, 28, 60, 106), text=256, channels=4096, joint=180, parameters=10.0e9, width="hidden_size_x", blocks=("depth",),
          tiny=dict(hidden_size_x=256, hidden_size_y=128, mlp_ratio_x=48.0, mlp_ratio_y=2.0, num_heads=2, depth=2)),  # 256 * 48: it insists on 12288
    _FLUX,
    replace(_FLUX, title="Flux dev 2048 px", latent=(1, 16, 256, 256)),
)
# fmt: on
KEYS = tuple(dict.fromkeys(model.key for model in MODELS))

# Entries that newer classes of ComfyUI insist on.
_NEWER = {"txt_ids_dims": [], "yak_mlp": False, "txt_norm": False, "meanflow_sum": False}


def entries(model: Model) -> dict:
    """The model's config for this ComfyUI tree."""
    if model.params is None:
        return dict(model.config)
    module, _, name = model.params.partition(":")
    taken = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    return model.config | {entry: value for entry, value in _NEWER.items() if entry in taken}


def build(model: Model, device: torch.device | str):
    """ComfyUI's model in bf16 on the device, not filled."""
    import comfy.model_detection

    config = comfy.model_detection.model_config_from_unet_config(entries(model))
    config.set_inference_dtype(torch.bfloat16, None)
    return config.get_model({}, "", device=device)


def count(model: Model) -> int:
    """Parameters, without making them."""
    return sum(parameter.numel() for parameter in build(model, "meta").diffusion_model.parameters())


def fill(network: torch.nn.Module, device: torch.device) -> None:
    """Matrices N(0, 1 / fan_in), tables N(0, 0.3^2), norm weights 1, biases N(0, 0.02^2), so that activations keep their size."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5 if name.endswith("weight") else 0.3, generator=generator)
            elif name.endswith(("weight", "scale")):
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)


def conditioning(model: Model) -> list:
    """A random prompt, as ComfyUI's text encoders would hand it on."""
    generator = torch.Generator().manual_seed(1)
    more = {"pooled_output": torch.randn(1, model.pooled, generator=generator)} if model.pooled else {}
    if 0 < model.joint < model.text:
        more["attention_mask"] = (torch.arange(model.text) < model.joint)[None]
    return [[torch.randn(1, model.text, model.channels, generator=generator), more]]


# ---- ComfyUI


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in the place of `STAND_INS`, installed or not: their versions need not suit ComfyUI's, and the import is quicker."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in STAND_INS else None

    def create_module(self, spec):
        return None

    def exec_module(self, module) -> None:
        module.__getattr__ = lambda name: _unused(f"{module.__name__}.{name}", name)


class _Unused(type):
    """The type of what is found in a stand-in: it may be named, inherited from and annotated with, but not called."""

    def __getattr__(cls, name: str):
        return _unused(f"{cls.__module__}.{name}", name)

    def __call__(cls, *args, **kwargs):
        raise ImportError(f"{cls.__module__} is only stood in for by this program; take its package out of STAND_INS and install it")


def _unused(path: str, name: str) -> _Unused:
    if name.startswith("__"):
        raise AttributeError(name)
    return _Unused(name, (), {"__module__": path})


def enter(device: torch.device) -> None:
    """Makes `comfy` importable where it is not yet."""
    if "comfy" in sys.modules:
        return
    sys.path.append(str(ROOT / "tools/comfyui"))
    import comfy_launch
    import install

    tree = install.comfyui_tree()
    if not (tree / "comfy").is_dir():
        sys.exit(f"There is no ComfyUI tree in {tree}; run `make setup`, or name one with COMFYUI_PATH")
    sys.meta_path.insert(0, StandIns())
    comfy_launch.declare_torchvision_ops = lambda: None  # torchvision is a stand-in
    # highvram: the weights are on the device already and stay there.
    comfy_launch.enter(tree, ("--use-pytorch-cross-attention", "--highvram" if device.type == "cuda" else "--cpu"))


def load_pack() -> SimpleNamespace:
    """The pack's modules by name."""
    import bench_monitor

    bench_monitor.load_pack()
    return SimpleNamespace(
        **{name: sys.modules[f"{bench_monitor.NAME}.nodes.{name}"] for name in ("_comfy", "_kernels", "override", "patch", "telemetry")}
    )


# ---- measuring


class HostEvent:
    """An event of a device that works while the host waits: the time when it was recorded."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: HostEvent) -> float:
        return (later.at - self.at) * 1e3


def clock_of(device: torch.device) -> bench_timing.Clock:
    """Nothing happens before a run: a model call is longer than what the cache of the one before could save, and ComfyUI leaves none either."""
    return bench_timing.Clock((lambda: torch.cuda.Event(enable_timing=True)) if device.type == "cuda" else HostEvent, lambda: None)


@dataclass
class Spans:
    """Stretches of the device's time, each with a label."""

    clock: bench_timing.Clock
    open: list[tuple] = field(default_factory=list)

    @contextlib.contextmanager
    def span(self, label=None) -> Iterator[None]:
        start, end = self.clock.event(), self.clock.event()
        start.record()
        yield
        end.record()
        self.open.append((label, start, end))

    def take(self) -> list[tuple]:
        """(label, seconds) of every stretch since the last call of this."""
        taken, self.open = self.open, []
        for _, _, end in taken:
            end.synchronize()
        return [(label, start.elapsed_time(end) / 1e3) for label, start, end in taken]


class DenseAttention:
    """ComfyUI's own attention, timed; after the first call over the main sequence `kernel` is what PyTorch ran for it."""

    def __init__(self, model: Model, spans: Spans, bind: Callable):
        self.tokens, self.spans, self.bind = model.tokens, spans, bind
        self.kernel: str | None = None  # until then

    def override(self) -> Callable:
        """A function, for ComfyUI copies objects."""

        def attention(func, *args, **kwargs):
            request = self.bind(*args, **kwargs)
            main = request.s_q == request.s_k == self.tokens
            if main and self.kernel is None:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                    func(*args, **kwargs)
                names = {event.name.removeprefix("aten::_") for event in seen.events() if event.name.startswith("aten::_scaled_dot_product_")}
                self.kernel = ", ".join(sorted(names)) or "not PyTorch's"
            with self.spans.span(main):
                return func(*args, **kwargs)

        return attention


def dense_order(model: Model, device: torch.device, clock: bench_timing.Clock) -> list[SDPBackend]:
    """PyTorch's dense attention backends, the fastest over this sequence first."""
    q, k, v = (torch.randn(1, model.heads, model.tokens, model.head_dim, dtype=torch.bfloat16, device=device) for _ in range(3))
    inputs, taken = bench_peers.Inputs(q, k, v), {}
    for name, backend in (("sdpa cudnn", SDPBackend.CUDNN_ATTENTION), ("sdpa flash", SDPBackend.FLASH_ATTENTION)):
        try:
            taken[backend] = min(bench_timing.alternate(clock, {name: bench_peers.BASELINES[name](inputs).run}, rounds=2)[name])
        except RuntimeError:
            continue  # this GPU or this PyTorch has not got it
    return [*sorted(taken, key=taken.get), SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass
class Contender:
    """One way to run the model, and its figures of the rounds that count.

    Attributes
    ----------
    topk : None: dense.
    patcher : the model with that attention.
    seconds, main, attention : of a model call, of its attention over the main sequence, of all its attention.
    run : what the node reports of its last run; None for the dense one.
    """

    topk: float | None
    patcher: object
    seconds: list[float] = field(default_factory=list)
    main: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    memory_gib: float | None = None
    run: dict | None = None


def measure(model: Model, parameters: int, pack: SimpleNamespace, device: torch.device, options: argparse.Namespace) -> dict:
    """The row of a model: every contender has its turn in each of `steps` rounds, after one that does not count."""
    import comfy.model_patcher
    import comfy.patcher_extension

    clock = clock_of(device)
    calls, attention = Spans(clock), Spans(clock)
    network = build(model, device)
    fill(network.diffusion_model, device)
    base = comfy.model_patcher.ModelPatcher(network, load_device=device, offload_device=device)

    def timed(executor, *args, **kwargs):
        with calls.span():
            return executor(*args, **kwargs)

    base.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "bench", timed)  # before the pack's, whose work is in the time
    watched = DenseAttention(model, attention, pack.override.Request.bind)
    contenders = [Contender(None, base.clone())]
    pack._comfy.set_attention_override(contenders[0].patcher, watched.override())
    limits = {"min_tokens": 512} if options.tiny else {}
    for topk in options.topk:
        contenders.append(Contender(topk, pack.patch.install(base, pack.patch.Settings(topk=topk, backend=options.backend, **limits))))
    order = dense_order(model, device, clock)
    with torch.inference_mode(), sdpa_kernel(order, set_priority=True):
        for round_ in range(1 + options.steps):
            for one in contenders:
                name = "dense" if one.topk is None else f"topk {one.topk:g}"
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                if not sample(model, one.patcher).isfinite().all():
                    raise ArithmeticError(f"{model.title}, {name}: the result is not finite")
                ((_, seconds),) = calls.take()
                parts = attention.take()
                if one.topk is not None:
                    one.run = pack.telemetry.runs.closed[-1].to_dict()
                    parts = [(True, one.run["totals"]["sparse_ms"] / 1e3)]
                if round_ == 0:
                    continue
                one.seconds.append(seconds)
                one.main.append(sum(part for main, part in parts if main))
                one.attention.append(sum(part for _, part in parts))
                one.memory_gib = round(torch.cuda.max_memory_allocated(device) / _GIB, 1) if device.type == "cuda" else None
                say(f"  {name}: {seconds:.3f} s")
    return {
        "model": model.key, "title": model.title, "tokens": model.tokens, "layers": model.layers, "heads": model.heads,
        "head_dim": model.head_dim, "parameters": parameters, "clocks": bench_report.smi(device) if device.type == "cuda" else {},
        **figures(model, watched.kernel, *contenders),
    }  # fmt: skip


def figures(model: Model, kernel: str | None, dense: Contender, *sparse: Contender) -> dict:
    """{"dense": figures, "sparse": [figures]}; what is told of the main sequence's attention is None where not all of it ran sparse."""
    flop = 4.0 * model.tokens**2 * model.heads * model.head_dim * model.layers

    def common(one: Contender, density: float | None) -> dict:
        main = statistics.median(one.main) if density else None
        return {"seconds": bench_timing.spread(one.seconds), "main_seconds": main, "memory_gib": one.memory_gib,
                "tflops": flop * density / main / 1e12 if main else None}  # fmt: skip

    first = common(dense, 1.0)
    attention = statistics.median(dense.attention)
    first |= {"kernel": kernel, "attention_seconds": attention, "attention_share": attention / first["seconds"]["median"]}
    others = []
    for one in sparse:
        totals = one.run["totals"]
        found = common(one, totals["density"] if totals["sparse_calls"] == model.layers else None)
        found["ratio"] = first["seconds"]["median"] / found["seconds"]["median"]
        found["main_ratio"] = first["main_seconds"] / found["main_seconds"] if found["main_seconds"] else None
        told = {name: totals[name] for name in ("density", "pv_skipped", "sparse_calls", "dense_calls")}
        others.append({"topk": one.topk, **found, **told, "reasons": one.run["reasons"]})
    return {"dense": first, "sparse": others}


def sample(model: Model, patcher) -> torch.Tensor:
    """One step without guidance, which is one model call, through ComfyUI's sampler."""
    import comfy.sample

    latent, prompt = torch.zeros(model.latent), conditioning(model)
    noise = comfy.sample.prepare_noise(latent, 1)
    return comfy.sample.sample(patcher, noise, 1, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True, seed=1)


def free_memory(device: torch.device) -> float:
    """Bytes; on a CPU, where only the small ones run, no limit."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf


def free(device: torch.device) -> None:
    """Gives back what the last model took."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the report

_COLUMNS = ("model", "tokens", "layers", "attention", "density", "s a call", "x dense", "attention s", "x dense", "TFLOPS", "GiB", "dense calls")
LEGEND = (
    "s a call: median time of one model call, of which a sampler step takes one, or two with guidance. attention s: of it in the attention over the "
    "main sequence, selection included. TFLOPS: 4 S^2 H D density layers / that time. GiB: peak of PyTorch's memory, weights included. dense calls: "
    "how many of the model's attention calls stayed dense with the node."
)


def table(result: dict) -> str:
    """A result as Markdown: the machine, one line for each contender, and what is to be known about them."""
    about = result["machine"]
    lines = [
        f"{about.get('gpu', about['host'])}, torch {about['torch']}, commit {about['commit']}, {result['date']}; {result['data']}.",
        "",
        LEGEND,
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
    ]
    notes = []
    for row in result["rows"]:
        first = [row["title"], f"{row['tokens']:,}", str(row["layers"])]
        for part in (row["dense"], *row["sparse"]):
            sparse = "topk" in part
            cells = [*first, f"topk {part['topk']:g}" if sparse else "dense", _number(part["density"] if sparse else 1.0, ".3f"),
                     _number(part["seconds"]["median"]), _number(part.get("ratio"), ".2f"), _number(part["main_seconds"]),
                     _number(part.get("main_ratio"), ".2f"), _number(part["tflops"]), _number(part["memory_gib"]),
                     str(part["dense_calls"]) if sparse else ""]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        reasons = ", ".join(f"{calls} x {reason}" for reason, calls in row["sparse"][0]["reasons"].items()) or "none"
        notes.append(
            f"- {row['title']}: {row['parameters'] / 1e9:.3g}e9 parameters, {row['heads']} heads of {row['head_dim']}; all attention takes "
            f"{row['dense']['attention_share']:.0%} of the dense call ({row['dense']['kernel']}); dense calls: {reasons}."
        )
    notes += [f"- {item['title']}: not measured, {item['reason']}." for item in result["skipped"]]
    return "\n".join([*lines, "", *notes])


def _number(value: float | None, form: str = ".3g") -> str:
    return "" if value is None else format(value, form)


def say(text: str = "") -> None:
    print(text, flush=True)


# ---- the program


def chosen(options: argparse.Namespace) -> list[Model]:
    """The models of a run, as small or as short as asked for."""
    found = [model for model in MODELS if model.key in options.models]
    if options.tiny:
        found = list({model.key: model.small() for model in found}.values())
    return [model.cut(options.layers) if options.layers else model for model in found]


def run(model: Model, pack: SimpleNamespace, device: torch.device, options: argparse.Namespace) -> dict | str:
    """The model's row, or why there is none."""
    parameters = count(model)
    needed, room = model.memory(parameters), free_memory(device)
    if room < needed:
        return f"it takes about {needed / _GIB:.0f} GiB and {room / _GIB:.0f} GiB are free"
    try:
        return measure(model, parameters, pack, device, options)
    except torch.OutOfMemoryError as error:
        return f"it did not fit: {str(error).splitlines()[0]}"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(KEYS), help=f"some of {', '.join(KEYS)}, with commas")
    parser.add_argument("--topk", default=",".join(map(str, TOPK)), help="densities, with commas")
    parser.add_argument("--steps", type=int, default=2, help="model calls that count, of each kind; one more warms up")
    parser.add_argument("--layers", type=int, help="at most so many blocks of each kind (nothing is scaled up)")
    parser.add_argument("--tiny", action="store_true", help="two heads, two blocks, on any machine")
    parser.add_argument("--backend", choices=("cuda", "torch"), help="of SpargeAttention; cuda on a GPU and torch on a CPU unless told")
    parser.add_argument("--out", type=Path, help="the JSON's path, results/<gpu>-models.json unless told; without a GPU none unless told")
    parser.add_argument("--table", type=Path, help="print the table of this JSON, measure nothing")
    options = parser.parse_args(given)
    options.models = options.models.split(",")
    if unknown := [name for name in options.models if name not in KEYS]:
        parser.error(f"--models takes {', '.join(KEYS)}, got {', '.join(unknown)}")
    try:
        options.topk = [float(value) for value in options.topk.split(",")]
        if not all(0.05 <= value < 1 for value in options.topk):
            raise ValueError
    except ValueError:
        parser.error(f"--topk takes numbers of 0.05 to below 1 with commas, got {options.topk}")
    for name in ("steps", "layers"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be 1 or more, got {value}")
    return options


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.table:
        say(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return 0
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    options.backend = options.backend or ("cuda" if device.type == "cuda" else "torch")
    if device.type == "cpu" and not options.tiny:
        say("Nothing was measured, because there is no GPU that PyTorch can use; --tiny runs without one.")
        return 0
    enter(device)
    pack = load_pack()
    refusal = pack._kernels.backend_for(device, options.backend, 128, torch.bfloat16).why_not
    if refusal:
        say(f"Nothing was measured, because {refusal}.")
        return 0
    result = {"program": "models", "date": datetime.date.today().isoformat(), "data": DATA, "short": options.tiny, "activations": None,
              "machine": bench_report.machine(device if device.type == "cuda" else None), "backend": options.backend, "steps": options.steps,
              "layers": options.layers, "rows": [], "skipped": []}  # fmt: skip
    say(f"{result['machine'].get('gpu', result['machine']['host'])}; {DATA}")
    out = options.out or (RESULTS / bench_report.file_name(result) if device.type == "cuda" else None)
    for model in chosen(options):
        say(f"{model.title}: {model.tokens:,} tokens, {model.layers} layers")
        row = run(model, pack, device, options)
        free(device)
        if isinstance(row, str):
            say(f"  skipped: {row}")
            result["skipped"].append({"model": model.key, "title": model.title, "reason": row})
        else:
            result["rows"].append(row)
        if out:  # after every model: what a run has that is ended from outside is kept
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say()
    say(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
