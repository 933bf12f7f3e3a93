"""Sparse attention in the video transformers of diffusers: HunyuanVideo, Mochi and Wan. Written for diffusers 0.42.

    sparse = SparseAttention(topk=0.3, dense_steps=5)
    sparse.install(pipe.transformer)
    video = pipe(prompt, callback_on_step_end=sparse.step_done)
    print(sparse.report())

Every attention layer gets a processor that computes queries, keys and values as the layer's own processor does and hands them to
`sparge_kernels.sparse_attention`. A call that stays dense goes to the layer's own processor and is counted by its reason. This file is meant to be
copied: it needs nothing but torch, diffusers and sparge_kernels.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial

import torch
from sparge_kernels import UnsupportedCall, order, sparse_attention
from torch import Tensor

TILES_UP_TO = 0.15
"""topk up to which blocks of neighbours in space and time beat rows of the picture."""


class SparseAttention:
    """Runs the self-attention of a diffusers video transformer sparse, and counts what it did.

    Parameters
    ----------
    topk : in (0, 1]
        Share of the key blocks that each block of queries keeps; 1 is dense attention.
    dense_steps : int
        So many sampling steps at the start stay dense. Needs `callback_on_step_end=sparse.step_done`.
    dense_layers : ints
        Layers that stay dense, in the order of the model from 0 (HunyuanVideo: double blocks, then single blocks); -1 is the last one.
    token_order : "auto" | "row_major" | "tiles" | "hilbert"
        See `sparge_kernels.order.plan`; auto is tiles up to topk 0.15, row_major above.
    backend : "auto" | "cuda" | "torch"
    """

    def __init__(self, *, topk: float = 0.5, dense_steps: int = 0, dense_layers=(), token_order: str = "auto", backend: str = "auto"):
        self.topk, self.dense_steps, self.dense_layers, self.backend = topk, dense_steps, dense_layers, backend
        self.token_order = token_order if token_order != "auto" else "tiles" if topk <= TILES_UP_TO else "row_major"
        self.step = 0
        self.grid = (1, 1, 1)
        self.densities: dict[str, list[Tensor]] = defaultdict(list)
        """Layer -> mean density of each of its sparse calls, left on the device until `report` reads them."""
        self.dense: Counter[str] = Counter()
        """Reason -> calls that stayed dense."""
        self._undo: list = []

    def install(self, transformer: torch.nn.Module, name: str = "") -> None:
        """Puts the processors into `transformer`; `name` stands before its layers in the report, for pipelines with two transformers."""
        kind = type(transformer).__name__
        if kind not in FAMILIES:
            raise ValueError(f"transformer must be one of {', '.join(FAMILIES)}, got {kind}; write a processor for it after the ones in this file")
        processor, lists = FAMILIES[kind]
        layers = layers_of(transformer, lists)
        listed = {layer % len(layers) for layer in self.dense_layers if -len(layers) <= layer < len(layers)}
        if len(listed) < len(set(self.dense_layers)):
            raise ValueError(f"dense_layers must lie in {-len(layers)} to {len(layers) - 1}, each once, got {list(self.dense_layers)}")
        for number, modules in enumerate(layers):
            for module in modules:
                self._undo.append(partial(setattr, module, "processor", module.processor))
                module.processor = processor(self, f"{name}{number}", number in listed, module.processor)
        self._undo.append(transformer.register_forward_pre_hook(self._see_grid, with_kwargs=True).remove)

    def remove(self) -> None:
        """Gives every layer its own processor back."""
        while self._undo:
            self._undo.pop()()

    def step_done(self, pipe, step: int, timestep, values: dict) -> dict:
        """For the pipeline's `callback_on_step_end`."""
        self.step = (step + 1) % pipe.num_timesteps  # after the last one it is the next run's first
        return values

    def attend(self, layer: str, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, text: int) -> Tensor:
        """Sparse attention over the latent's grid with `text` tokens after it: (B, S, H, D) -> (B, S, H * D)."""
        plan = order.plan(self.token_order, (self.grid, text) if text else (self.grid,))
        given = dict(topk=self.topk, key_mask=key_mask, always_keep=plan.protected, order=plan, layout="NHD", backend=self.backend)
        out, info = sparse_attention(q.to(v.dtype), k.to(v.dtype), v, **given, return_info=True)
        self.densities[layer].append(info.density.mean())
        return out.flatten(2)

    def report(self) -> str:
        """What ran sparse and at which density, layer by layer, and what stayed dense and why."""
        calls = sum(map(len, self.densities.values()))
        if calls:
            means = {layer: float(torch.stack([d.float().cpu() for d in found]).mean()) for layer, found in self.densities.items()}
            total = sum(means[layer] * len(found) for layer, found in self.densities.items()) / calls
            lines = [f"{calls} attention calls sparse, mean density {total:.3f} (1 is dense); by layer:"]
            cells = [f"{layer}: {density:.3f}" for layer, density in means.items()]
            lines += ["  " + "  ".join(cells[i : i + 8]) for i in range(0, len(cells), 8)]
        else:
            lines = ["no attention call ran sparse"]
        lines += [f"{count} attention calls dense: {reason}" for reason, count in self.dense.items()]
        return "\n".join(lines)

    def _see_grid(self, transformer, args, kwargs) -> None:
        latent = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        config = transformer.config
        patch = config.patch_size
        if isinstance(patch, int):
            patch = (getattr(config, "patch_size_t", 1), patch, patch)
        self.grid = tuple(size // p for size, p in zip(latent.shape[2:], patch, strict=True))


class SparseProcessor:
    """What the three families share: who answers a call. A subclass names the call's arguments as the layer's own processor does, and computes."""

    def __init__(self, sparse: SparseAttention, layer: str, listed: bool, own):
        self.sparse, self.layer, self.listed, self.own = sparse, layer, listed, own

    def answer(self, *call):
        """The result of the sparse computation, or of the layer's own processor with the reason counted."""
        reason = self.why_dense(*call)
        if reason is None:
            try:
                return self.compute(*call)
            except UnsupportedCall as refusal:
                reason = str(refusal)
        self.sparse.dense[reason] += 1
        return self.own(*call)

    def why_dense(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary) -> str | None:
        if self.sparse.step < self.sparse.dense_steps:
            return "the first step" if self.sparse.dense_steps == 1 else f"the first {self.sparse.dense_steps} steps"
        return "in dense_layers" if self.listed else None


class WanProcessor(SparseProcessor):
    """Wan: self-attention over the video alone; the cross-attention to text or image is a layer of its own and stays as it is."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return self.answer(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    def why_dense(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary) -> str | None:
        if encoder_hidden_states is not None:
            return f"cross-attention to {encoder_hidden_states.shape[1]} tokens"
        if attention_mask is not None:
            return "a mask on the self-attention"
        return super().why_dense(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)

    def compute(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary):
        # Wan normalises over all heads together, before they are told apart.
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        cos, sin = (table[..., ::2] for table in rotary)  # every angle stands there twice
        out = self.sparse.attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v, None, 0)
        return attn.to_out[1](attn.to_out[0](out))


class HunyuanVideoProcessor(SparseProcessor):
    """HunyuanVideo: video and, after it, the text with its padding masked. Double blocks have weights for each, single blocks one set for both."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        return self.answer(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def why_dense(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary) -> str | None:
        if attention_mask is not None and (attention_mask.dim() != 4 or attention_mask.shape[1:3] != (1, 1)):
            return "the mask differs from query to query"
        return super().why_dense(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)

    def compute(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary):
        cos, sin = (table[:, None, ::2] for table in rotary)  # every angle stands there twice
        video = heads(attn, hidden_states, VIDEO, cos, sin)
        text = heads(attn, encoder_hidden_states, VIDEO if attn.add_q_proj is None else TEXT)
        mask = None if attention_mask is None else attention_mask[:, 0, 0]
        video, text = joint_attention(self, video, text, mask)
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return video, text


class MochiProcessor(SparseProcessor):
    """Mochi: video and, after it, the text; the mask is the text's alone. The last block computes its text for nothing (context_pre_only)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb=None):
        return self.answer(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def compute(self, attn, hidden_states, encoder_hidden_states, attention_mask, rotary):
        video = heads(attn, hidden_states, VIDEO, *rotary)
        text = heads(attn, encoder_hidden_states, TEXT)
        seen = attention_mask.bool()
        mask = torch.cat([seen.new_ones(seen.shape[0], hidden_states.shape[1]), seen], dim=1)
        video, text = joint_attention(self, video, text, mask)
        text = text * seen[..., None]  # what stands in the padding is zero in this model
        video = attn.to_out[1](attn.to_out[0](video))
        return video, text if attn.context_pre_only else attn.to_add_out(text)


VIDEO = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")


def heads(attn, x: Tensor, names: tuple[str, ...], cos: Tensor | None = None, sin: Tensor | None = None) -> list[Tensor]:
    """q, k, v (B, S, H, D) by the layers of `attn` with these names, rotated where angles are given."""
    q, k, v = (getattr(attn, name)(x).unflatten(2, (attn.heads, -1)) for name in names[:3])
    norm_q, norm_k = (getattr(attn, name) for name in names[3:])
    q, k = (x if norm is None else norm(x) for x, norm in ((q, norm_q), (k, norm_k)))
    return [q, k, v] if cos is None else [rotate(q, cos, sin), rotate(k, cos, sin), v]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of neighbouring channels of x (B, S, H, D) by its angle (..., D / 2)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def joint_attention(processor: SparseProcessor, video: list[Tensor], text: list[Tensor], key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention over the video with the text after it, taken apart again."""
    lengths = video[0].shape[1], text[0].shape[1]
    q, k, v = (torch.cat([a, b], dim=1) for a, b in zip(video, text, strict=True))
    return processor.sparse.attend(processor.layer, q, k, v, key_mask, lengths[1]).split(lengths, dim=1)


def layers_of(transformer: torch.nn.Module, lists: tuple[str, ...]) -> list[list]:
    """The layers of a transformer in order, each the list of its attention modules that get a processor."""
    blocks = [block for name in lists for block in getattr(transformer, name)]
    return [[getattr(block, name) for name in ("attn", "attn1", "attn2") if getattr(block, name, None) is not None] for block in blocks]


FAMILIES = {
    "HunyuanVideoTransformer3DModel": (HunyuanVideoProcessor, ("transformer_blocks", "single_transformer_blocks")),
    "MochiTransformer3DModel": (MochiProcessor, ("transformer_blocks",)),
    "WanTransformer3DModel": (WanProcessor, ("blocks",)),
}
"""Class of the transformer -> its processor, and the names of its lists of layers."""
