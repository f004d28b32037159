"""Linears of the DiTs that ComfyUI knows, by the names they have there: (to be rounded, to be kept)."""

NAMES = {
    "SD3": (
        (
            "joint_blocks.12.x_block.attn.qkv",
            "joint_blocks.6.x_block.attn2.proj",
            "joint_blocks.12.context_block.mlp.fc2",
        ),
        ("joint_blocks.12.x_block.adaLN_modulation.1", "context_embedder", "y_embedder.mlp.0"),
    ),
    "Flux": (
        ("double_blocks.9.txt_attn.proj", "double_blocks.9.img_mlp.2", "single_blocks.19.linear1"),
        ("double_blocks.9.img_mod.lin", "single_blocks.19.modulation.lin", "vector_in.in_layer"),
    ),
    "Ovis": (
        ("double_blocks.3.img_mlp.gate_proj", "double_blocks.3.txt_mlp.down_proj", "single_blocks.13.linear2"),
        ("double_blocks.3.txt_mod.lin", "single_blocks.13.modulation.lin", "txt_in"),
    ),
    "LongCat-Image": (
        ("double_blocks.5.img_attn.qkv", "single_blocks.10.linear2"),
        ("single_blocks.10.modulation.lin", "txt_in"),
    ),
    "Flux2": (
        ("double_blocks.4.img_mlp.0", "single_blocks.24.linear2"),
        ("double_stream_modulation_img.lin", "single_stream_modulation.lin", "guidance_in.in_layer"),
    ),
    "Chroma": (
        ("double_blocks.9.img_attn.qkv", "double_blocks.9.txt_mlp.0", "single_blocks.19.linear2"),
        (
            "distilled_guidance_layer.layers.2.in_layer",
            "distilled_guidance_layer.layers.2.out_layer",
            "distilled_guidance_layer.out_proj",
        ),
    ),
    "ChromaRadiance": (
        ("double_blocks.9.img_attn.qkv", "single_blocks.19.linear1"),
        (
            "distilled_guidance_layer.layers.2.in_layer",
            "nerf_blocks.2.param_generator",
            "nerf_image_embedder.embedder.0",
        ),
    ),
    "Wan": (
        ("blocks.20.self_attn.q", "blocks.20.cross_attn.o", "blocks.20.cross_attn.k_img", "blocks.20.ffn.2"),
        ("time_projection.1", "text_embedding.2", "img_emb.proj.3", "head.head"),
    ),
    "Wan-VACE": (
        ("vace_blocks.4.self_attn.q", "vace_blocks.0.before_proj", "vace_blocks.4.after_proj"),
        ("time_projection.1", "head.head"),
    ),
    "Wan-HuMo": (
        ("blocks.20.audio_cross_attn_wrapper.audio_cross_attn.k", "blocks.20.ffn.0"),
        ("audio_proj.audio_proj_glob_1.layer",),
    ),
    "Wan-S2V": (
        ("blocks.20.self_attn.o",),
        ("audio_injector.injector.6.q", "audio_injector.injector_adain_layers.6.linear"),
    ),
    "Wan-Animate": (
        ("blocks.20.cross_attn.v_img",),
        ("face_adapter.fuser_blocks.4.linear1_q", "face_encoder.out_proj"),
    ),
    "WanDancer": (("blocks.20.ffn.0",), ("music_injector.injector.4.o", "music_encoder.1.linear2")),
    "HunyuanVideo": (
        ("txt_in.individual_token_refiner.blocks.1.mlp.2", "double_blocks.10.txt_attn.qkv", "single_blocks.20.linear2"),
        (
            "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1",
            "double_blocks.10.img_mod.lin",
            "txt_in.c_embedder.in_layer",
        ),
    ),
    "HunyuanVideo1.5": (
        ("double_blocks.27.img_mlp.0", "double_blocks.27.txt_attn.proj"),
        ("double_blocks.27.txt_mod.lin", "byt5_in.fc1", "vision_in.proj.3"),
    ),
    "LTXV": (
        ("transformer_blocks.14.attn1.to_q", "transformer_blocks.14.attn2.to_k", "transformer_blocks.14.ff.net.0.proj"),
        ("adaln_single.linear", "caption_projection.linear_1", "proj_out"),
    ),
    "LTX-2.3": (
        (
            "transformer_blocks.24.audio_attn2.to_v",
            "transformer_blocks.24.video_to_audio_attn.to_out.0",
            "transformer_blocks.24.audio_ff.net.2",
        ),
        (
            "transformer_blocks.24.attn1.to_gate_logits",
            "video_embeddings_connector.transformer_1d_blocks.4.ff.net.2",
            "av_ca_a2v_gate_adaln_single.linear",
        ),
    ),
    "Lumina2": (
        ("layers.13.attention.qkv", "layers.13.feed_forward.w3", "context_refiner.1.attention.out"),
        ("layers.13.adaLN_modulation.1", "noise_refiner.1.adaLN_modulation.1", "cap_embedder.1"),
    ),
    "Z-Image": (
        ("layers.15.attention.out", "noise_refiner.1.feed_forward.w1"),
        ("layers.15.adaLN_modulation.0", "final_layer.adaLN_modulation.1"),
    ),
    "Z-Image-omni": (("siglip_refiner.1.attention.qkv", "layers.15.feed_forward.w2"), ("siglip_embedder.1",)),
    "Z-Image-pixel": (
        ("layers.15.attention.qkv",),
        ("dec_net.res_blocks.2.mlp.0", "dec_net.res_blocks.2.adaLN_modulation.1", "dec_net.cond_embed"),
    ),
    "PixArt": (
        ("blocks.14.attn.qkv", "blocks.14.cross_attn.kv_linear", "blocks.14.mlp.fc2"),
        ("t_block.1", "y_embedder.y_proj.fc1"),
    ),
    "AuraFlow": (
        ("double_layers.2.attn.w2o", "double_layers.2.mlpC.c_fc2", "single_layers.16.mlp.c_proj"),
        ("double_layers.2.modX.1", "single_layers.16.modCX.1", "modF.1"),
    ),
    "HunyuanDiT": (
        ("blocks.20.attn1.Wqkv", "blocks.20.attn2.kv_proj", "blocks.30.skip_linear"),
        ("blocks.20.default_modulation.1", "mlp_t5.0", "pooler.k_proj"),
    ),
    "Mochi": (
        ("blocks.24.attn.qkv_x", "blocks.24.attn.proj_y", "blocks.24.mlp_y.w2"),
        ("blocks.24.mod_x", "blocks.24.mod_y", "t5_y_embedder.to_kv"),
    ),
    "Cosmos1": (
        ("blocks.block14.blocks.0.block.attn.to_q.0", "blocks.block14.blocks.2.block.layer1"),
        ("blocks.block14.blocks.0.adaLN_modulation.2", "t_embedder.1.linear_1"),
    ),
    "CosmosPredict2": (
        ("blocks.14.cross_attn.output_proj", "blocks.14.mlp.layer2"),
        ("blocks.14.adaln_modulation_mlp.2", "t_embedder.1.linear_2"),
    ),
    "Anima": (
        ("blocks.14.self_attn.q_proj", "blocks.14.mlp.layer1"),
        (
            "llm_adapter.blocks.3.self_attn.q_proj",
            "llm_adapter.blocks.3.mlp.2",
            "blocks.14.adaln_modulation_self_attn.1",
        ),
    ),
    "HiDream-I1": (
        (
            "double_stream_blocks.8.block.attn1.to_k_t",
            "double_stream_blocks.8.block.ff_t.w1",
            "single_stream_blocks.16.block.ff_i.experts.3.w3",
            "single_stream_blocks.16.block.ff_i.shared_experts.w2",
        ),
        (
            "caption_projection.24.linear",
            "caption_projection.48.linear",
            "single_stream_blocks.16.block.adaLN_modulation.1",
        ),
    ),
    "HiDream-O1": (
        ("language_model.layers.18.self_attn.o_proj", "language_model.layers.18.mlp.gate_proj"),
        ("visual.blocks.13.attn.qkv", "visual.blocks.13.mlp.linear_fc2", "visual.merger.linear_fc1"),
    ),
    "OmniGen2": (
        ("layers.16.attn.to_out.0", "ref_image_refiner.1.feed_forward.linear_3"),
        ("layers.16.norm1.linear", "time_caption_embed.caption_embedder.1"),
    ),
    "Boogu": (
        (
            "double_stream_layers.4.img_instruct_attn.processor.instruct_out",
            "double_stream_layers.4.img_feed_forward.linear_1",
            "single_stream_layers.16.attn.to_q",
        ),
        (
            "double_stream_layers.4.img_norm1.linear",
            "double_stream_layers.4.instruct_norm2.linear",
            "single_stream_layers.16.norm1.linear",
        ),
    ),
    "Qwen-Image": (
        (
            "transformer_blocks.30.attn.add_k_proj",
            "transformer_blocks.30.attn.to_add_out",
            "transformer_blocks.30.txt_mlp.net.0.proj",
        ),
        ("transformer_blocks.30.img_mod.1", "norm_out.linear"),
    ),
    "Mage-Flow": (("transformer_blocks.6.img_mlp.net.2",), ("transformer_blocks.6.txt_mod.1",)),
    "JoyImage": (
        ("double_blocks.20.attn.img_attn_qkv", "double_blocks.20.txt_mlp.net.2"),
        ("condition_embedder.time_proj", "condition_embedder.text_embedder.linear_1"),
    ),
    "Ideogram4": (
        ("layers.17.attention.o", "layers.17.feed_forward.w1"),
        ("layers.17.adaln_modulation", "llm_cond_proj"),
    ),
    "Krea2": (
        ("blocks.14.attn.gate", "blocks.14.attn.wo", "blocks.14.mlp.gate"),
        ("txtfusion.layerwise_blocks.1.attn.wq", "txtfusion.refiner_blocks.1.mlp.down", "tproj.1"),
    ),
    "Kandinsky5": (
        ("visual_transformer_blocks.30.cross_attention.to_key", "text_transformer_blocks.1.feed_forward.in_layer"),
        (
            "visual_transformer_blocks.30.visual_modulation.out_layer",
            "text_transformer_blocks.1.text_modulation.out_layer",
        ),
    ),
    "ACE-Step-1": (
        ("transformer_blocks.12.attn.to_q", "transformer_blocks.12.cross_attn.to_v"),
        (
            "lyric_encoder.encoders.3.self_attn.linear_pos",
            "lyric_encoder.encoders.3.feed_forward.w_1",
            "projectors.1.2",
        ),
    ),
    "ACE-Step-1.5": (
        ("decoder.layers.12.cross_attn.k_proj", "decoder.layers.12.mlp.down_proj"),
        (
            "encoder.lyric_encoder.layers.4.self_attn.q_proj",
            "encoder.timbre_encoder.layers.2.mlp.up_proj",
            "tokenizer.attention_pooler.layers.1.self_attn.o_proj",
            "detokenizer.layers.1.mlp.down_proj",
        ),
    ),
    "StableAudio": (
        ("transformer.layers.12.self_attn.to_qkv", "transformer.layers.12.ff.ff.0.proj"),
        ("transformer.layers.12.to_scale_shift_gate.1", "to_cond_embed.0"),
    ),
    "StableAudio3": (
        ("transformer.layers.12.cross_attn.to_kv",),
        ("transformer.layers.12.to_local_embed.2", "transformer.global_cond_embedder.2"),
    ),
    "Hunyuan3D-2": (
        ("double_blocks.8.img_attn.qkv", "single_blocks.16.linear2"),
        ("single_blocks.16.modulation.lin", "cond_in"),
    ),
    "Hunyuan3D-2.1": (
        ("blocks.10.attn2.to_k", "blocks.18.moe.experts.5.net.0.proj", "blocks.18.skip_linear"),
        ("t_embedder.mlp.0", "final_layer.linear"),
    ),
    "MiniMax-H3": (
        ("blocks.25.attn.qkv_proj", "blocks.25.mlp.fc2"),
        (
            "token_refiner.blocks.1.attn.qkv_proj",
            "token_refiner.blocks.1.mlp.fc1",
            "blocks.25.adaln_proj.linear",
            "condition_proj",
        ),
    ),
    "MiniMax-Music3": (
        ("diffusion_transformer.transformer.layers.18.ff.ff.0.proj",),
        ("diffusion_transformer.to_timestep_embed.2",),
    ),
    "TripoSplat": (
        ("blocks.12.attn.qkv", "context_refiner.1.mlp.mlp.0"),
        ("repo_layers.12.gate_map", "noise_repo_layers.1.content_map", "context_repo_layers.1.final_map"),
    ),
    "Trellis2": (
        ("img2shape.blocks.15.self_attn.to_qkv", "structure_model.blocks.15.mlp.mlp.2"),
        ("img2shape.adaLN_modulation.1", "shape2txt.input_layer"),
    ),
    "Pixal3D": (("img2shape.blocks.15.cross_attn.cross_attn_block.to_q",), ("structure_model.t_embedder.mlp.0",)),
    "Ernie-Image": (("layers.18.self_attention.to_q", "layers.18.mlp.linear_fc2"), ("adaLN_modulation.1", "text_proj")),
    "Lens": (
        ("transformer_blocks.24.attn.txt_qkv", "transformer_blocks.24.img_mlp.w2"),
        ("transformer_blocks.24.txt_mod.1", "txt_in"),
    ),
    "PixelDiT": (
        ("patch_blocks.7.attn.qkv_y", "pixel_blocks.1.compress_to_attn"),
        ("patch_blocks.7.adaLN_modulation_img.0", "pixel_blocks.1.adaLN_modulation_msa"),
    ),
    "PiD": (("patch_blocks.7.mlp_x.w3",), ("lq_proj.gate_modules.3.content_proj", "lq_proj.output_heads.6")),
    "SeedVR2": (
        ("blocks.5.attn.proj_qkv.txt", "blocks.5.mlp.vid.proj_in_gate", "blocks.21.attn.proj_out.all"),
        ("emb_in.proj_out", "txt_in"),
    ),
    "CogVideoX": (
        ("blocks.21.attn_out", "blocks.21.ff_proj"),
        ("blocks.21.norm1.linear", "blocks.21.norm2.linear", "ofs_embedding_linear_1"),
    ),
}
