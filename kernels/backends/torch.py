"""Block-sparse attention out of PyTorch's own operators, on any device: it gathers the kept blocks and attends to nothing else.

For one head at a time the kept key and value blocks of a few query blocks are copied into a reused buffer and go through PyTorch's dense
attention. Exact: nothing is quantised, and with every block kept the call is dense attention itself.

Memory beyond the output, with S_q = S_k: three contiguous heads and two gathered ones, fp32 copies of a few heads during selection, and the block
maps. That is at most 8 times the bytes of q for a single head; for 16 heads or more, the bytes of q and 32 MB;
`compensate` adds up to 6 fp32 copies of one head. Nothing of the size S_q x S_k.
"""

from __future__ import annotations

import math
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import compensation, selection
from ..block_mask import BLOCK_K, BLOCK_Q, KeptBlocks, num_blocks
from ..call import Availability, Call, Form, Kind, Result, Rule, SelfTest
from ..centring import key_centre

quantised = False
skips_pv = False
_KEYS_A_CALL = 4096  # short rows are batched until a call attends to about this many gathered keys
_ROWS_A_THREAD = 32  # PyTorch's CPU attention gives each thread this many query rows at this size


def why_not(kind: Kind) -> str | None:
    """None, or why the automatic choice passes this backend by."""
    if kind.device.type != "cpu" and kind.asked == "auto":
        return f"not chosen by itself on {kind.device.type} (a GPU gains nothing from it); backend='torch' runs it there"
    return None


def status() -> Availability:
    """Available everywhere."""
    return Availability(True, "any device; chosen by itself on the CPU only")


def self_test_devices() -> list[SelfTest]:
    """The CPU; nothing is quantised."""
    return [SelfTest(torch.device("cpu"), 0.0)]


def blocks_form(call: Call, rule: Rule) -> Form:
    """A block map, whatever the rule."""
    return Form((call.batch, call.heads, num_blocks(call.s_q, BLOCK_Q), num_blocks(call.s_k, BLOCK_K)), torch.bool)


def select(call: Call, rule: Rule, q: Tensor, k: Tensor) -> KeptBlocks:
    """The blocks that `rule` keeps; see `selection.select`."""
    return selection.select(call, rule, q, k) if rule.block_map is None else _visible_part(call, rule.block_map)


def run(call: Call, rule: Rule, q: Tensor, k: Tensor, v: Tensor) -> Result:
    """Attention over the blocks that `rule` keeps; of tiles this backend knows nothing."""
    kept = select(call, rule, q, k)
    out, lse = _attend(call, kept.blocks, q, k, v)
    return Result(out, lse, kept, torch.zeros(call.batch, call.heads, 2, dtype=torch.int32, device=q.device) if call.want_info else None)


def _visible_part(call: Call, block_map: Tensor) -> KeptBlocks:
    """A caller's block map (B|1, H|1, N_q, N_k) cut down to what is visible, for every head."""
    keys = selection.Keys.from_mask(call.key_mask)
    visible, _ = selection.visibility(call, None if keys is None else keys.on_plan(call.perm))
    visible = visible.expand(call.batch, *block_map.shape[2:])[:, None]
    kept = (block_map & visible).expand(call.batch, call.heads, -1, -1).contiguous()
    return KeptBlocks(kept, kept.sum(-1, dtype=torch.int32), visible.sum(-1, dtype=torch.int32), block_map.shape[3])


def _attend(call: Call, kept: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """Attention over the block map `kept`, and its log-sum-exp where it is wanted."""
    batch, heads, s_q, _ = q.shape
    group, key_mask, perm = heads // k.shape[1], call.key_mask, call.perm
    want_lse = call.want_lse or call.compensate
    keys = selection.Keys.from_mask(key_mask)
    plan_keys = bias = None
    if keys is not None:
        plan_keys = keys.on_plan(perm)
        bias = torch.where(keys.valid, 0.0 if key_mask.dtype == torch.bool else key_mask.float() - keys.top[:, None], -math.inf).float()
    if call.compensate:
        visible, partial = selection.visibility(call, plan_keys)
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, s_q, dtype=torch.float32, device=q.device) if call.want_lse else None
    buffers: dict[str, Tensor] = {}
    centre = key_centre(k, None if keys is None else keys.valid) if call.compensate and call.smooth_k else None
    for b in range(batch):
        head_bias = None if bias is None else _in_order(bias[b], perm)
        for h in range(heads):
            if h % group == 0:
                k_head, v_head = (_in_order(x[b, h // group], perm).contiguous() for x in (k, v))
                if keys is not None:  # whatever masked rows hold (NaN too) must not leak through 0 * NaN
                    k_head, v_head = (torch.where(plan_keys.valid[b, :, None], x, 0) for x in (k_head, v_head))
                blocks = _Gathered(k_head, v_head, head_bias, buffers)
            q_head = _in_order(q[b, h], perm).contiguous()
            o, l = _attend_head(q_head, blocks, kept[b, h], call, want_lse)
            if call.compensate:
                pooled = visible[b % visible.shape[0]] & ~kept[b, h]
                if partial is not None:
                    pooled = pooled & ~partial
                weight = None if plan_keys is None else plan_keys.weight[b]
                head = compensation.Heads(q_head[None], k_head[None], v_head[None], weight, pooled[None])
                o, l = _compensate(call, head, None if centre is None else centre[b, h // group], o, l)
            if keys is not None and want_lse:
                l = l + keys.top[b]
            if perm is None:
                out[b, h] = o
                if call.want_lse:
                    lse[b, h] = l
            else:
                out[b, h].index_copy_(0, perm, o.to(out.dtype))
                if call.want_lse:
                    lse[b, h].index_copy_(0, perm, l)
    return out, lse


def _in_order(x: Tensor, perm: Tensor | None) -> Tensor:
    return x if perm is None else x.index_select(0, perm)


class _Gathered:
    """One kv head in blocks, and the buffers that kept blocks are copied into; the buffers grow to the largest request and are reused."""

    def __init__(self, k: Tensor, v: Tensor, bias: Tensor | None, buffers: dict[str, Tensor]):
        self.k, self.v, self.bias, self.length = k, v, bias, k.shape[0]
        self._buffers = buffers

    def take(self, blocks: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The rows of `blocks` (R, n), `length` of each: k, v (R, 1, length, D) and the bias (R, 1, 1, length)."""
        rows = None
        if self.bias is not None:
            rows = self._rows("bias", self.bias[:, None], blocks)[:, :length, 0][:, None, None]
        return self._rows("k", self.k, blocks)[:, None, :length], self._rows("v", self.v, blocks)[:, None, :length], rows

    def _rows(self, name: str, x: Tensor, blocks: Tensor) -> Tensor:
        whole, width = self.length // BLOCK_K, x.shape[1]
        n = blocks.numel()
        if name not in self._buffers or self._buffers[name].shape[0] < n:
            self._buffers[name] = x.new_empty(n, BLOCK_K * width)
        target = self._buffers[name][:n]
        if whole * BLOCK_K == self.length:
            torch.index_select(x.view(whole, -1), 0, blocks.flatten(), out=target)
        else:
            # The last block is short: it is always the last of its list, and the caller cuts what lies past the end.
            if whole:
                torch.index_select(x[: whole * BLOCK_K].view(whole, -1), 0, blocks.flatten().clamp_max(whole - 1), out=target)
            tail = F.pad(x[whole * BLOCK_K :], (0, 0, 0, (whole + 1) * BLOCK_K - self.length))
            target[blocks.flatten() == whole] = tail.reshape(1, -1)
        return target.view(blocks.shape[0], -1, width)


def _attend_head(q: Tensor, blocks: _Gathered, kept: Tensor, call: Call, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """One head: q (S_q, D) in plan order, kept bool (N_q, N_k). Rows that keep nothing give zeros and lse = -inf."""
    s_q, s_k = q.shape[0], blocks.length
    n_q, n_k = kept.shape
    out = torch.zeros_like(q)
    lse = torch.full((s_q,), -math.inf, dtype=torch.float32, device=q.device) if want_lse else None
    indptr = kept.sum(-1).tolist()
    lists = kept.nonzero()[:, 1].split(indptr)
    has_tail = kept[:, -1].tolist()

    def put(first: int, count: int, result) -> None:
        rows = slice(first * BLOCK_Q, min((first + count) * BLOCK_Q, s_q))
        out[rows] = result[0].reshape(-1, q.shape[1])[: rows.stop - rows.start]
        if want_lse:
            lse[rows] = result[1].reshape(-1)[: rows.stop - rows.start]

    def kind(i: int) -> tuple:
        """Neighbouring query blocks of one kind go through one call."""
        if indptr[i] == n_k and not call.causal:
            return ("dense",)
        return (indptr[i], has_tail[i], (i + 1) * BLOCK_Q <= s_q)

    threads = torch.get_num_threads() if q.device.type == "cpu" else 1
    for key, neighbours in groupby(range(n_q), kind):
        members = list(neighbours)
        if key == ("dense",):
            rows = q[members[0] * BLOCK_Q : (members[-1] + 1) * BLOCK_Q]
            bias = None if blocks.bias is None else blocks.bias[None, None, None]
            put(members[0], len(members), dense(rows[None, None], blocks.k[None, None], blocks.v[None, None], bias, call.scale, want_lse))
            continue
        count, tail, whole = key
        if count == 0:
            continue
        length = count * BLOCK_K - (n_k * BLOCK_K - s_k if tail else 0)
        at_once = max(1, _KEYS_A_CALL // length, min(threads * _ROWS_A_THREAD // BLOCK_Q, s_k // length)) if whole else 1
        for start in range(0, len(members), at_once):
            part = members[start : start + at_once]
            index = torch.stack([lists[i] for i in part])
            k, v, bias = blocks.take(index, length)
            rows = q[part[0] * BLOCK_Q : (part[-1] + 1) * BLOCK_Q].view(len(part), 1, -1, q.shape[1])
            if call.causal:
                bias = _causal_bias(index, part, rows.shape[2], length, call.causal_offset, bias)
            put(part[0], len(part), dense(rows, k, v, bias, call.scale, want_lse))
    return out, lse


def _causal_bias(index: Tensor, members: list[int], rows: int, length: int, offset: int, bias: Tensor | None) -> Tensor | None:
    """Additive (R, 1, rows, length): -inf where a gathered key lies after the causal edge of a row."""
    device = index.device
    key = (index[:, :, None] * BLOCK_K + torch.arange(BLOCK_K, device=device)).flatten(1)[:, None, None, :length]
    row = (torch.tensor(members, device=device)[:, None] * BLOCK_Q + torch.arange(rows, device=device))[:, None, :, None]
    edge = torch.where(key <= row + offset, 0.0, -math.inf).float()
    return edge if bias is None else edge + bias


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, want_lse: bool) -> tuple[Tensor, Tensor | None]:
    """PyTorch's dense attention on (R, 1, rows, D) with an additive bias, and its natural-log log-sum-exp (R, 1, rows) where asked for.

    Rows that see nothing (bias -inf throughout) give zeros and -inf.
    """
    blind = None
    if bias is not None:
        blind = (bias == -math.inf).all(-1, keepdim=True).expand(-1, -1, q.shape[2], -1)
        bias = bias.to(q.dtype)
    lse = None
    if not want_lse:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    elif q.device.type == "cpu":
        mask = None if bias is None else bias.expand(q.shape[0], 1, q.shape[2], k.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    else:
        scores = q.float() @ k.float().mT * scale
        scores = scores if bias is None else scores + bias
        lse = scores.logsumexp(-1)
        out = ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype)
    if blind is not None:
        out = torch.where(blind, 0, out)
        lse = None if lse is None else torch.where(blind[..., 0], -math.inf, lse)
    return out, lse


def _compensate(call: Call, head: compensation.Heads, centre: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges the pooled state of one head, whose K is not centred yet, with lse of the true scores; both are relative to the largest key bias."""
    centred = head.k.float() if centre is None else head.k.float() - centre
    frame = 0.0 if centre is None else call.scale * (head.q[0].float() @ centre[0])
    state = compensation.pooled_state(head._replace(k=centred), call.scale, shift=not call.causal)
    o, l = compensation.merge(out[None].float(), (lse - frame)[None], head.q, state, call.scale)
    return o[0].to(out.dtype), l[0] + frame
