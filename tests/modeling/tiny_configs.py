"""A tiny config of any architecture of transformers that has a causal language model."""

from transformers import AutoConfig

LAYERS, WIDTH, HEADS = 4, 32, 4
# Sizes, and the names of what is set to them wherever a config, or a config within it, has one of that name.
SIZES = {
    0: "num_kv_shared_layers num_nextn_predict_layers",
    1: (
        "n_shared_experts num_shared_experts moe_num_shared_experts num_dense_layers n_group topk_group "
        "num_expert_group first_k_dense_replace mamba_n_groups n_groups attn_layer_offset loop_layer_index_start "
        "n_input_layers n_output_layers make_ngram_vocab_size_divisible_by split_ngram_parts depth"
    ),
    2: (
        "num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k zero_expert_num max_window_layers sliding_window_pattern "
        "index_topk_blocks linear_num_key_heads mamba_expand layer_group_size attn_layer_period expert_layer_period "
        "no_rope_layer_interval global_attn_every_n_layers n_layers_per_attn_res_block num_layers_per_stack "
        "loop_num_passes n_recurrent_layers o_groups hc_mult hc_count centroid_intermediate_top_k ngram "
        "heads_per_ngram"
    ),
    3: "loop_layer_index_end moe_layer_end_index num_channels",
    4: (
        "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers num_encoder_layers "
        "num_decoder_layers num_attention_heads n_head n_heads num_heads swa_num_attention_heads "
        "decoder_attention_heads encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "qk_rope_head_dim qk_nope_head_dim rotary_dim laurel_rank num_experts num_local_experts n_routed_experts "
        "moe_num_experts index_block_size linear_num_value_heads linear_num_heads linear_conv_kernel_dim mamba_d_conv "
        "mamba_dt_rank time_step_rank loop_gate_rank gated_norm_rank d_rel number_of_conv_states adapter_rank "
        "prompt_types segment_types prompt_length"
    ),
    5: "sliding_window window_size sliding_window_size attention_window_size keep_window_size attention_chunk_size",
    6: "index_topk",
    8: (
        "head_dim kv_channels v_head_dim qk_head_dim swa_head_dim d_head dim_head q_lora_rank kv_lora_rank "
        "o_lora_rank query_pre_attn_scalar index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
        "linear_key_dim mamba_d_state mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim mamba_chunk_size "
        "ssm_state_size chunk_size state_size hidden_size_per_layer_input hc_lowrank block_size block_multiple_of "
        "ffn_round_up_to_multiple_of floor_scale log_scaling_n_floor num_centroids ple_embed_dim "
        "pronunciation_embed_dim shape_embed_dim"
    ),
    10: "local_attention",
    14: "patch_size",
    16: (
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
        "router_hidden_size index_n_heads rel_extent prompt_mid_dim num_mel_bins"
    ),
    28: "image_size",
    32: (
        "hidden_size d_model n_embd embedding_size embedding_dim emb_dim lru_width attention_hidden_size "
        "word_embed_proj_dim input_embedding_size output_embedding_size out_hidden_size"
    ),
    48: (
        "intermediate_size n_inner dff ffn_dim decoder_ffn_dim encoder_ffn_dim d_inner ffn_hidden_size "
        "dense_intermediate_size intermediate_size_mlp feed_forward_size dim_ff"
    ),
    50: "ngram_vocab_size_base",
    64: "original_max_position_embeddings mamba_d_ssm",
    90: "image_token_id",
    91: "image_token_index",
    92: "video_token_id",
    93: "audio_token_id",
    94: "boi_token_index",
    95: "eoi_token_index",
    97: (
        "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size pronunciation_vocab_size "
        "shape_vocab_size"
    ),
    128: (
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions model_max_length "
        "max_source_positions"
    ),
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
TOKENS = dict.fromkeys(("eos_token_id", "sep_token_id", "cls_token_id", "forced_eos_token_id"))
TOKENS |= {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What else an architecture wants.
EXTRA = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE | {"mrope_section": [1, 1, 2]}),
        "logit_scale": 0.5, "head_dim": 8,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": WIDTH, "moe_num_experts": 4, "moe_top_k": 2},
        "rope_parameters": ROPE,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling2_loop_text": {"num_hidden_layers": 6, "loop_layer_index_start": 2, "loop_layer_index_end": 4},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "modernbert-decoder": {"cls_token_id": 1, "sep_token_id": 2},
    "moshi": {"sliding_window": 3000},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ple_layer_ids": [1], "eos_token_id": 96,
    },
    "reformer": {
        "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8, "num_buckets": 4, "attention_head_size": 8,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16, "attention_hidden_size": 64,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16, "attention_hidden_size": 64,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
    **{key: {"head_dim": 4} for key in ("deepseek_v3", "axk1", "glm4_moe_lite", "youtu", "sarvam_mla")},
    **{key: {"head_dim": 8} for key in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
}  # fmt: skip
# Lists in which a config says of each layer what it is.
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types")


def tiny_config(model_type):
    """The architecture's default config with tiny sizes, and with every kind of layer that the default one has."""
    default = AutoConfig.for_model(model_type)
    options = shrunk(default.to_dict(), model_type)
    if model_type == "hrm_text":  # counts layers by stacks
        options = {**options, "num_hidden_layers": 2}
        del options["num_layers_per_stack"]
    config = AutoConfig.for_model(model_type, **options)
    large, small = (c.get_text_config(decoder=True) for c in (default, config))
    kinds = {}
    for name in KINDS:
        wanted, there = getattr(large, name, None), getattr(small, name, None)
        if name in EXTRA.get(model_type, ()) or not wanted or not there or set(wanted) <= set(there):
            continue
        each = list(dict.fromkeys(wanted))
        kinds[name] = (each * LAYERS)[: max(len(there), len(each))]
        kinds |= {"num_hidden_layers": len(each)} if len(each) > len(there) else {}
    if kinds and small is not config:
        kinds = {"text_config": options["text_config"] | kinds}
    return AutoConfig.for_model(model_type, **(options | kinds))


def shrunk(settings, model_type):
    """The options that make tiny what these settings of a config have large."""
    options = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name.endswith("config") and name != "quantization_config":
            options[name] = shrunk(value, value.get("model_type"))
            options[name] |= {"model_type": value["model_type"]} if value.get("model_type") else {}
        elif name in SMALL and value is not None and not isinstance(value, list | dict | bool):
            options[name] = SMALL[name]
        elif name in TOKENS:
            options[name] = TOKENS[name]
        elif name == "is_decoder":
            options[name] = True
    if "kv_lora_rank" in settings:  # of latent attention each head has its own keys
        options["num_key_value_heads"] = HEADS
    return options | EXTRA.get(model_type, {})
