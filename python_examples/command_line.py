"""What the three diffusers examples share: arguments, a sparse run (and a dense one to compare with), numbers, the saved video."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

FORMATS = (".mp4", ".gif", ".webp")
FEW_STEPS = 8
TINY = {"height": 192, "width": 192, "num_inference_steps": 3}


@dataclass(frozen=True)
class Example:
    """One family: its pipeline class in diffusers, its published weights, the size of a run, and the tiny model.

    `dense_share` of the steps, at the start, and `dense_layers` stay dense where the command line does not say otherwise. `float32` names the parts
    of the pipeline that are loaded in fp32 (the rest: bf16). `tiny` builds the pipeline of the tiny model, whose run has so many frames of the size
    TINY and the further arguments `tiny_call`.
    """

    pipeline: str
    model: str
    size: dict
    fps: int
    tiny: Callable
    tiny_frames: int = 17
    tiny_call: dict = field(default_factory=lambda: {"max_sequence_length": 64})
    dense_share: float = 0.24
    dense_layers: tuple[int, ...] = ()
    float32: tuple[str, ...] = ()

    def dense_steps(self, steps: int) -> int:
        """So many of `steps` stay dense; a distilled model's few steps leave room for one."""
        return min(round(self.dense_share * steps), 1 if steps <= FEW_STEPS else steps)


@dataclass
class Run:
    """What a run left: frames (F, H, W, 3) of 0..1, the last latents, seconds from the first model call to the end of the last step."""

    frames: object = None
    latents: object = None
    seconds: float = 0.0
    _started: float | None = field(default=None, repr=False)


def number(least: float, most: float, kind: type = int, *, open_below: bool = False):
    """An argparse type: a number in this range, else a sentence."""
    rule = f"a{'n integer' if kind is int else ' number'} {'above' if open_below else 'from'} {least:g} {f'to {most:g}' if most < 1e9 else 'upwards'}"

    def convert(text: str):
        try:
            value = kind(text)
            good = (least < value if open_below else least <= value) and value <= most
        except ValueError:
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return value

    return convert


def layer_list(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be layer numbers with commas between them, such as 0,1,-1, got {text!r}") from None


def out_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"must be a file name that ends in one of {', '.join(FORMATS)}, got {text!r}")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"must lie in a folder that exists, got {text!r}; make the folder first")
    return path


def arguments(example: Example, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=example.model, help="Hugging Face id, or a folder, in the layout of diffusers")
    parser.add_argument("--prompt", default="a red fox runs through fresh snow, pine trees behind it")
    parser.add_argument("--frames", type=number(1, 1e9), help=f"frames of the video; {example.size['num_frames']} where not given")
    parser.add_argument("--height", type=number(16, 1e9), help=f"in pixels; {example.size['height']} where not given")
    parser.add_argument("--width", type=number(16, 1e9), help=f"in pixels; {example.size['width']} where not given")
    parser.add_argument("--steps", type=number(2, 1e9), help=f"sampling steps; {example.size['num_inference_steps']} where not given")
    parser.add_argument("--seed", type=number(0, 2**63 - 1), default=0)
    parser.add_argument("--topk", type=number(0, 1, float, open_below=True), default=0.5, help="share of the key blocks kept; 1 is dense")
    dense = example.dense_steps(example.size["num_inference_steps"])
    parser.add_argument("--dense-steps", type=number(0, 1e9), help=f"so many steps at the start stay dense; {dense} where nothing is given")
    parser.add_argument("--dense-layers", type=layer_list, default=example.dense_layers, help="layers that stay dense, such as 0,1,-1; '' for none")
    parser.add_argument("--order", choices=("auto", "row_major", "tiles", "hilbert"), default="auto", help="order of the tokens")
    parser.add_argument("--backend", choices=("auto", "cuda", "torch"), default="auto")
    parser.add_argument("--offload", action="store_true", help="keep on the GPU only the part of the pipeline that is at work")
    parser.add_argument("--out", type=out_file, help=f"save the video: {', '.join(FORMATS)}")
    parser.add_argument("--compare", action="store_true", help="run dense too and print the error and the ratio of the times")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with random weights, on the CPU, nothing downloaded; compares too")
    return parser.parse_args()


def main(example: Example, description: str) -> None:
    """The whole example: parses the command line, runs, prints, saves."""
    options = arguments(example, description)
    try:
        import diffusers
        import torch
        from sparge_diffusers import SparseAttention

        if not options.tiny:
            import accelerate  # noqa: F401  (diffusers loads models of bf16 with parts in fp32 through it, and does not say so)
    except ModuleNotFoundError as error:
        remedy = "pip install . in the folder above this one" if error.name == "sparge_kernels" else f"pip install {error.name}"
        sys.exit(f"The Python package {error.name} is missing, which this example needs; {remedy}")
    pipe = example.tiny() if options.tiny else load(example, options, getattr(diffusers, example.pipeline), torch)
    pipe.set_progress_bar_config(disable=options.tiny)
    size = {**TINY, "num_frames": example.tiny_frames} if options.tiny else dict(example.size)
    given = {"num_frames": options.frames, "height": options.height, "width": options.width, "num_inference_steps": options.steps}
    size.update({name: value for name, value in given.items() if value is not None})
    call = {"prompt": options.prompt, "output_type": "np", **size, **(example.tiny_call if options.tiny else {})}
    transformers = {name: module for name in ("transformer", "transformer_2") if (module := getattr(pipe, name, None)) is not None}

    dense = None
    if options.compare or options.tiny:
        # The first run of a process is slow: it is neither of the two that are compared.
        sample(pipe, transformers, {**call, "num_inference_steps": 2, "output_type": "latent"}, options.seed, torch)
        dense = sample(pipe, transformers, call, options.seed, torch)
    dense_steps = example.dense_steps(size["num_inference_steps"]) if options.dense_steps is None else options.dense_steps
    sparse = SparseAttention(
        topk=options.topk, dense_steps=dense_steps, dense_layers=options.dense_layers, token_order=options.order, backend=options.backend
    )
    try:
        for name, module in transformers.items():
            sparse.install(module, "" if len(transformers) == 1 else f"{name} ")
    except ValueError as error:
        sys.exit(str(error))
    run = sample(pipe, transformers, call, options.seed, torch, sparse.step_done)
    print(sparse.report())
    print(f"denoising took {run.seconds:.2f} s")
    if dense is not None:
        compare(run, dense)
    if options.out is not None:
        save(run.frames, options.out, example.fps)


def load(example: Example, options, pipeline, torch):
    """The published pipeline in bf16, on the GPU where there is one."""
    dtypes = {"default": torch.bfloat16, **dict.fromkeys(example.float32, torch.float32)}
    pipe = pipeline.from_pretrained(options.model, dtype=dtypes)
    pipe.vae.enable_tiling()
    if options.offload:
        pipe.enable_model_cpu_offload()
    elif torch.cuda.is_available():
        pipe.to("cuda")
    return pipe


def sample(pipe, transformers: dict, call: dict, seed: int, torch, step_done=None) -> Run:
    """One run of the pipeline with this seed."""
    run = Run()

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def first_call(module, args) -> None:
        run._started = now() if run._started is None else run._started

    def at_step_end(pipe, step, timestep, values):
        run.latents, run.seconds = values["latents"], now() - run._started
        return values if step_done is None else step_done(pipe, step, timestep, values)

    hooks = [module.register_forward_pre_hook(first_call) for module in transformers.values()]
    try:
        generator = torch.Generator("cpu").manual_seed(seed)
        run.frames = pipe(**call, generator=generator, callback_on_step_end=at_step_end).frames[0]
    finally:
        for hook in hooks:
            hook.remove()
    return run


def compare(run: Run, dense: Run) -> None:
    error = float((run.latents.float() - dense.latents.float()).norm() / dense.latents.float().norm())
    pixels = float(((run.frames - dense.frames) ** 2).mean() ** 0.5)
    print("against dense attention with the same seed:")
    print(f"  relative L2 error of the last latents {error:.3g}; root mean square error of the pixels (0 to 1) {pixels:.3g}")
    print(f"  dense denoising took {dense.seconds:.2f} s, {dense.seconds / run.seconds:.2f} times as long, in this run on this machine")


def save(frames, path: Path, fps: int) -> None:
    import imageio.v3 as imageio

    how = {"plugin": "pyav", "codec": "libx264", "fps": fps} if path.suffix == ".mp4" else {"duration": 1000 / fps, "loop": 0}
    try:
        imageio.imwrite(path, (frames * 255).round().astype("uint8"), **how)
    except ImportError as error:
        sys.exit(f"{path.name} was not saved: {error}; pip install av, or save a .gif")
    print(f"saved {path}")
