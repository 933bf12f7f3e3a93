"""Text encoders' and tokenizers' stand-ins for the tiny models: built here, with random weights, so that nothing is downloaded."""

from __future__ import annotations

TEXT_DIM = 32


def tokenizer(length: int):
    """One token a byte; pads to `length`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<end>", *letters])}
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", eos_token="<end>", model_max_length=length)


def t5(kind: str):
    """A T5 encoder of one layer; `kind` is "T5" or "UMT5"."""
    import transformers

    config = getattr(transformers, kind + "Config")(
        vocab_size=300, d_model=TEXT_DIM, d_kv=16, d_ff=64, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return getattr(transformers, kind + "EncoderModel")(config).eval()
