"""Text to video with HunyuanVideo in diffusers, its joint attention sparse."""

from __future__ import annotations

from command_line import Example, main


def tiny():
    import torch
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
    from tiny_parts import TEXT_DIM, tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    torch.manual_seed(0)
    layers = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1}
    heads = {"num_attention_heads": 2, "attention_head_dim": 32, "rope_axes_dim": (8, 12, 12)}
    widths = {"in_channels": 4, "out_channels": 4, "text_embed_dim": TEXT_DIM, "pooled_projection_dim": TEXT_DIM}
    transformer = HunyuanVideoTransformer3DModel(**layers, **heads, **widths)
    sizes = {"vocab_size": 300, "hidden_size": TEXT_DIM, "intermediate_size": 64, "num_attention_heads": 2}
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(**sizes, num_hidden_layers=2)).eval(),
        tokenizer=tokenizer(256),
        transformer=transformer.eval(),
        vae=AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=1, bos_token_id=1, eos_token_id=1)).eval(),
        tokenizer_2=tokenizer(77),
    )


EXAMPLE = Example(
    pipeline="HunyuanVideoPipeline",
    model="hunyuanvideo-community/HunyuanVideo",
    size={"num_frames": 129, "height": 720, "width": 1280, "num_inference_steps": 50},
    fps=24,
    dense_layers=(0,),
    tiny=tiny,
    tiny_call={"max_sequence_length": 64, "prompt_template": {"template": "{}", "crop_start": 0}},
)

if __name__ == "__main__":
    main(EXAMPLE, __doc__)
