"""Text to video with Mochi 1 in diffusers, its joint attention sparse."""

from __future__ import annotations

from command_line import Example, main


def tiny():
    import torch
    from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel
    from tiny_parts import TEXT_DIM, t5, tokenizer

    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=3, pooled_projection_dim=32, text_embed_dim=TEXT_DIM, time_embed_dim=32
    )
    torch.nn.init.normal_(transformer.pos_frequencies)
    widths = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    vae = AutoencoderKLMochi(**widths, layers_per_block=(1,) * 5, add_attention_block=(False,) * 5)
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae.eval(), text_encoder=t5("T5"), tokenizer=tokenizer(64), transformer=transformer.eval()
    )


EXAMPLE = Example(
    pipeline="MochiPipeline",
    model="genmo/mochi-1-preview",
    size={"num_frames": 85, "height": 480, "width": 848, "num_inference_steps": 64},
    fps=30,
    tiny=tiny,
    tiny_frames=13,
)

if __name__ == "__main__":
    main(EXAMPLE, __doc__)
