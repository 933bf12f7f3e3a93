"""Block-sparse attention chosen on the fly, for any model: `sparse_attention(q, k, v, topk=0.5)`.

Shape letters, here and everywhere in the package:
B batch, H query heads, H_kv key/value heads, S_q and S_k query and key tokens, D head_dim, N_q = ceil(S_q / 128) and N_k = ceil(S_k / 64) blocks.
Density = kept / visible blocks, 0..1; visible: not excluded by causal or a fully masked block.
"""

from . import compat, order
from .attention import AttentionInfo, block_sparse_attention, can_run, merge_lse, select_blocks, sparse_attention
from .backends import NAMES as BACKEND_NAMES
from .backends import BackendChoice
from .backends import report as backends
from .block_mask import BlockMask
from .errors import UnsupportedCall

__version__ = "0.1.0"

__all__ = [
    "BACKEND_NAMES",
    "AttentionInfo",
    "BackendChoice",
    "BlockMask",
    "UnsupportedCall",
    "backends",
    "block_sparse_attention",
    "can_run",
    "compat",
    "merge_lse",
    "order",
    "select_blocks",
    "sparse_attention",
]
