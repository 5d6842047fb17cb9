"""The config.json of published models, as on the hub (fields that matter), and their numbers of parameters.

The numbers are those that the hub shows for the checkpoints, tied embeddings counted once.
"""

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip


def llama(vocab, width, inner, layers, heads, kv_heads, **more):
    return {"vocab_size": vocab, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads} | more  # fmt: skip


def model(model_type, *sizes, **more):
    return {"model_type": model_type} | llama(*sizes, **more)


def gpt2(width, layers, heads):
    return {"model_type": "gpt2", "vocab_size": 50257, "n_embd": width, "n_layer": layers, "n_head": heads,
            "n_positions": 1024, "n_ctx": 1024, "activation_function": "gelu_new"}  # fmt: skip


def neox(vocab, width, layers, heads, **more):
    return {"model_type": "gpt_neox", "vocab_size": vocab, "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "rotary_pct": 0.25,
            "rotary_emb_base": 10000} | more  # fmt: skip


def opt(width, layers, heads, **more):
    return {"model_type": "opt", "vocab_size": 50272, "hidden_size": width, "ffn_dim": 4 * width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "word_embed_proj_dim": width,
            "max_position_embeddings": 2048, "do_layer_norm_before": True} | more  # fmt: skip


def neo(width, layers, heads):
    return {"model_type": "gpt_neo", "vocab_size": 50257, "hidden_size": width, "num_layers": layers,
            "num_heads": heads, "attention_types": [[["global", "local"], layers // 2]]}  # fmt: skip


def bloom(width, layers, heads):
    return {"model_type": "bloom", "vocab_size": 250880, "n_embed": width, "n_layer": layers,
            "num_attention_heads": heads, "seq_length": 2048}  # fmt: skip


WINDOWS_OFF = {"use_sliding_window": False, "sliding_window": 32768, "rope_theta": 1e6}
QWEN3 = {"head_dim": 128, "sliding_window": None, "use_sliding_window": False, "rope_theta": 1e6}
GEMMA3 = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6}
LONGROPE = {"type": "longrope", "short_factor": [1.0 + i / 48 for i in range(48)],
            "long_factor": [1.0 + i for i in range(48)]}  # fmt: skip

# Name on the hub: configuration, parameters (None where the checkpoint holds more than the text model).
PUBLISHED = {
    "llama-7b": (model("llama", 32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "Llama-2-70b": (model("llama", 32000, 8192, 28672, 80, 64, 8), 68_976_648_192),
    "Meta-Llama-3-8B": (model("llama", 128256, 4096, 14336, 32, 32, 8, rope_theta=5e5), 8_030_261_248),
    "Llama-3.1-70B": (model("llama", 128256, 8192, 28672, 80, 64, 8, rope_theta=5e5, rope_scaling=LLAMA3,
                            max_position_embeddings=131072), 70_553_706_496),
    "Llama-3.2-1B": (model("llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True,
                           rope_theta=5e5, rope_scaling=LLAMA3 | {"factor": 32.0}), 1_235_814_400),
    "Mistral-7B-v0.1": (model("mistral", 32000, 4096, 14336, 32, 32, 8, sliding_window=4096), 7_241_732_096),
    "Mistral-7B-v0.3": (model("mistral", 32768, 4096, 14336, 32, 32, 8, sliding_window=None, rope_theta=1e6),
                        7_248_023_552),
    "Qwen2.5-0.5B": (model("qwen2", 151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True, max_window_layers=24,
                           **WINDOWS_OFF), 494_032_768),
    "Qwen2.5-7B": (model("qwen2", 152064, 3584, 18944, 28, 28, 4, max_window_layers=28, **WINDOWS_OFF), 7_615_616_512),
    "Qwen2.5-72B": (model("qwen2", 152064, 8192, 29568, 80, 64, 8, max_window_layers=80, **WINDOWS_OFF),
                    72_706_203_648),
    "Qwen3-0.6B": (model("qwen3", 151936, 1024, 3072, 28, 16, 8, tie_word_embeddings=True, **QWEN3), 596_049_920),
    "Qwen3-8B": (model("qwen3", 151936, 4096, 12288, 36, 32, 8, **QWEN3), 8_190_735_360),
    "Qwen3-32B": (model("qwen3", 151936, 5120, 25600, 64, 64, 8, **QWEN3), 32_762_123_264),
    "Phi-3-mini-4k": (model("phi3", 32064, 3072, 8192, 32, 32, 32, sliding_window=2047), 3_821_079_552),
    "Phi-3-mini-128k": (model("phi3", 32064, 3072, 8192, 32, 32, 32, sliding_window=262144,
                              max_position_embeddings=131072, original_max_position_embeddings=4096,
                              rope_scaling=LONGROPE), 3_821_079_552),
    "Phi-3-medium-4k": (model("phi3", 32064, 5120, 17920, 40, 40, 10, sliding_window=2047), 13_960_238_080),
    "phi-4": (model("phi3", 100352, 5120, 17920, 40, 40, 10, rope_theta=250000), 14_659_507_200),
    "gemma-2b": (model("gemma", 256000, 2048, 16384, 18, 8, 1, head_dim=256, hidden_act="gelu"), 2_506_172_416),
    "gemma-7b": (model("gemma", 256000, 3072, 24576, 28, 16, 16, head_dim=256, hidden_activation=None), 8_537_680_896),
    "gemma-2-2b": (model("gemma2", 256000, 2304, 9216, 26, 8, 4, head_dim=256, sliding_window=4096), 2_614_341_888),
    "gemma-2-9b": (model("gemma2", 256000, 3584, 14336, 42, 16, 8, head_dim=256), 9_241_705_984),
    "gemma-2-27b": (model("gemma2", 256000, 4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144),
                    27_227_128_320),
    "gemma-3-1b": (model("gemma3_text", 262144, 1152, 6912, 26, 4, 1, head_dim=256, sliding_window=512, **GEMMA3),
                   999_885_952),
    "gemma-3-27b": (model("gemma3_text", 262208, 5376, 21504, 62, 32, 16, head_dim=128, sliding_window=1024,
                          query_pre_attn_scalar=168, rope_scaling={"rope_type": "linear", "factor": 8.0}, **GEMMA3),
                    None),
    "gpt2": (gpt2(768, 12, 12), 124_439_808),
    "gpt2-xl": (gpt2(1600, 48, 25), 1_557_611_200),
    "gpt-neo-125m": (neo(768, 12, 12), 125_198_592),
    "gpt-neo-1.3B": (neo(2048, 24, 16), 1_315_575_808),
    "gpt-neo-2.7B": (neo(2560, 32, 20), 2_651_307_520),
    "gpt-j-6b": ({"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28, "n_head": 16,
                  "rotary_dim": 64, "n_positions": 2048}, 6_050_882_784),
    "pythia-70m": (neox(50304, 512, 6, 8), 70_426_624),
    "pythia-1.4b": (neox(50304, 2048, 24, 16), 1_414_647_808),
    "pythia-12b": (neox(50688, 5120, 36, 40), 11_846_072_320),
    "gpt-neox-20b": (neox(50432, 6144, 44, 64, hidden_act="gelu_fast"), 20_554_567_680),
    "opt-125m": (opt(768, 12, 12), 125_239_296),
    "opt-350m": (opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False), 331_196_416),
    "opt-1.3b": (opt(2048, 24, 32), 1_315_758_080),
    "opt-6.7b": (opt(4096, 32, 32), 6_658_473_984),
    "bloom-560m": (bloom(1024, 24, 16), 559_214_592),
    "bloom-1b7": (bloom(2048, 24, 16), 1_722_408_960),
    "bloom-7b1": (bloom(4096, 30, 32), 7_069_016_064),
    "bloom": (bloom(14336, 70, 112), 176_247_271_424),
    "phi-1_5": (model("phi", 51200, 2048, 8192, 24, 32, None, partial_rotary_factor=0.5), 1_418_270_720),
    "phi-2": (model("phi", 51200, 2560, 10240, 32, 32, 32, partial_rotary_factor=0.4), 2_779_683_840),
}  # fmt: skip
