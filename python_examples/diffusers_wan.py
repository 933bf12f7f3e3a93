"""Text to video with Wan 2.1 or 2.2 in diffusers, its self-attention sparse; cross-attention to the text stays dense."""

from __future__ import annotations

from command_line import Example, main


def tiny():
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from tiny_parts import TEXT_DIM, t5, tokenizer

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(num_attention_heads=2, attention_head_dim=32, text_dim=TEXT_DIM, ffn_dim=128, num_layers=3)
    return WanPipeline(
        tokenizer=tokenizer(64),
        text_encoder=t5("UMT5"),
        vae=AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer.eval(),
    )


EXAMPLE = Example(
    pipeline="WanPipeline",
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    size={"num_frames": 81, "height": 480, "width": 832, "num_inference_steps": 50},
    fps=16,
    float32=("vae",),
    dense_layers=(0,),
    tiny=tiny,
)

if __name__ == "__main__":
    main(EXAMPLE, __doc__)
