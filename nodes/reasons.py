"""Why a call stayed dense: every sentence that a user can meet in a report, in one place.

A sentence is a template; what it is filled with makes the counted reason, so that "2,048 tokens" and "1,024 tokens" count apart.
"""

from __future__ import annotations

OPTED_OUT = "the model asked for full precision in this call"
GRADIENTS = "inputs need gradients (there is no backward)"
DTYPE = "dtype {dtype} (float16, bfloat16 and float32 are supported)"
HEAD_DIM = "head_dim {dim} (up to 256 is supported)"
NO_BACKEND = "no fast kernel for this device ({why})"
WINDOW = "outside the step window (start_percent, end_percent)"
DENSE_LAYER = "layer is listed in dense_blocks"
COUNTING_LAYERS = "first model call: counting the layers for the negative numbers in dense_blocks"
CROSS_ATTENTION = "cross-attention to {keys:,} tokens"
TOO_SHORT = "{tokens:,} tokens < min_tokens {limit:,}"
NOT_A_LAYER = "{tokens:,} tokens, fewer than the picture has (a refiner, or another node merges tokens)"
ONE_BLOCK = "{tokens:,} tokens are too few to choose from"
MASK_PER_QUERY = "mask differs per query"
MASK_PER_HEAD = "mask differs per head"
MASK_SHAPE = "mask of shape {shape} is not understood"
POLICY_DENSE = "the policy asks for dense attention here"
SLOWER = "sparse was slower here when measured: {sparse} ms against {dense} ms for {instead}; delete {file} to measure again"
REFERENCE = "topk is 1: a dense reference run"
DENSE_HERE = "topk is 1: dense as far as this node goes; another Sparge Attention node is on the model"
CAPTURED = "recorded as a CUDA graph, whose repeats no node sees"
RECORDED = "ComfyUI records the allocations of this block and did not pause for the node ({why})"

# Warnings and notes of a run that are not about a single call.
NO_NODE = "no Sparge Attention node on this model"
NOTHING_SPARSE = "nothing ran sparse: {reason}"
REPLACED = "another node replaced the attention hook; Sparge Attention put itself back on top"
NOT_TIMED = "dense attention could not be timed ({error}), so the speed-up is missing or of fewer calls"
SLOWER_FROM_NOW = "sparse was slower ({what}), so later runs do not run such calls sparse"
NUMBERS_LOST = "the numbers of {calls} could not be copied from the device and are left out ({error})"
FEW_STEPS = "few steps: at most the first stays dense"
LISTS_NONE = "dense_blocks: {entries} lists none of the model's {total} layers; correct it or leave it empty"
FULLGRAPH = (
    "Sparge Attention works between the compiled parts of a model, and fullgraph leaves no between: "
    "switch fullgraph off in the node that compiles the model (torch.compile)"
)
LAYERS_MISSING = (
    "only {seen} of the model's {total} layers asked this node: unless another node leaves layers out, the compiled model (torch.compile) "
    "runs code that was traced without Sparge Attention; restart ComfyUI, or take the node out that compiles the model"
)
ANSWERED_ABOVE = "another Sparge Attention node, after this one, ran {n:,} of its calls"
NO_MAP = "a block map could not be made for the monitor ({error})"

# What is said when a whole run saw no call at all.
NEVER_ROUTED = "ComfyUI does not route the attention of {family} through its hook, so no node can speed it up"
STOPPED = "stopped by you"
ENDED_EARLY = "the run ended early ({error})"
NOTHING_SEEN = "no attention call reached this node: another node's attention patch answered them all, or the model has none"
TRACED_WITHOUT = (
    "no attention call reached this node: the compiled model (torch.compile) runs code that was traced without Sparge Attention; "
    "restart ComfyUI, or take the node out that compiles the model"
)
SECOND_MODEL = "not used: the guider runs this model second, with the nodes of its first model; put Sparge Attention on the first one"
