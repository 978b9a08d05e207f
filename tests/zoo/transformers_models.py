"""Tiny models of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo import prepare
from tests.zoo.measure import Inputs, Model

V, T = 19, 5


def tokens(b: int) -> Inputs:
    """Token ids (b, T)."""
    return {"input_ids": torch.randint(3, V, (b, T))}


def both(b: int) -> Inputs:
    """For an encoder and a decoder."""
    return {**tokens(b), "decoder_input_ids": torch.randint(3, V, (b, 4))}


def images(b: int) -> Inputs:
    """Images (b, 3, 32, 32)."""
    return {"pixel_values": torch.randn(b, 3, 32, 32)}


def of(family: str, kind: str, inputs: Any = tokens, output: str = "logits", limit: float = 1e-9,
       **options: Any) -> Model:
    """``transformers.<kind>`` with a configuration ``<family>Config``."""
    def make() -> nn.Module:
        prepare()
        import transformers

        transformers.logging.set_verbosity_error()
        config = getattr(transformers, f"{family}Config")(**options)
        return getattr(transformers, kind)(config)

    return Model(make, inputs, lambda out: getattr(out, output), limit=limit)


SINGLE = 1e-4  # norms, rotations or states in float32
NONE = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BERT: dict[str, Any] = {"vocab_size": V, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "intermediate_size": 12, "max_position_embeddings": 16, **NONE}
LLAMA: dict[str, Any] = {**BERT, "num_key_value_heads": 1, "use_cache": False}
GPT: dict[str, Any] = {"vocab_size": V, "n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2,
                       "use_cache": False, **NONE}
VISION: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "intermediate_size": 12, "image_size": 32, "patch_size": 8}

TRANSFORMERS: dict[str, Model] = {
    "BERT": of("Bert", "BertForSequenceClassification", **BERT),
    "RoBERTa": of("Roberta", "RobertaForSequenceClassification", **BERT),
    "ELECTRA": of("Electra", "ElectraForSequenceClassification", embedding_size=8, **BERT),
    "ALBERT": of("Albert", "AlbertForSequenceClassification", embedding_size=8, **BERT),
    "DeBERTa v2": of("DebertaV2", "DebertaV2ForSequenceClassification", **BERT),
    "DistilBERT": of("DistilBert", "DistilBertForSequenceClassification", vocab_size=V, dim=8, n_layers=2,
                     n_heads=2, hidden_dim=12, max_position_embeddings=16, pad_token_id=2),
    "GPT-2": of("GPT2", "GPT2LMHeadModel", **GPT),
    "GPT-2, untied": of("GPT2", "GPT2LMHeadModel", tie_word_embeddings=False, **GPT),
    "GPT-NeoX": of("GPTNeoX", "GPTNeoXForCausalLM", **{**BERT, "use_cache": False}),
    "OPT": of("OPT", "OPTForCausalLM", vocab_size=V, hidden_size=8, num_hidden_layers=2, ffn_dim=12,
              num_attention_heads=2, max_position_embeddings=16, word_embed_proj_dim=8, use_cache=False,
              **NONE),
    "BLOOM": of("Bloom", "BloomForCausalLM", vocab_size=V, hidden_size=8, n_layer=2, n_head=2,
                use_cache=False, **NONE),
    "Llama": of("Llama", "LlamaForCausalLM", limit=SINGLE, **LLAMA),
    "Mistral": of("Mistral", "MistralForCausalLM", limit=SINGLE, **LLAMA),
    "Gemma": of("Gemma", "GemmaForCausalLM", limit=SINGLE, head_dim=4, **LLAMA),
    "Qwen3": of("Qwen3", "Qwen3ForCausalLM", limit=SINGLE, head_dim=4, **LLAMA),
    "Phi": of("Phi", "PhiForCausalLM", **LLAMA),
    "Mixtral": of("Mixtral", "MixtralForCausalLM", limit=SINGLE, num_local_experts=3,
                  experts_implementation="eager", **LLAMA),
    "Mamba": of("Mamba", "MambaForCausalLM", limit=SINGLE, vocab_size=V, hidden_size=8, state_size=4,
                num_hidden_layers=2, use_cache=False, **NONE),
    "T5": of("T5", "T5ForConditionalGeneration", both, limit=SINGLE, vocab_size=V, d_model=8, d_kv=4, d_ff=12,
             num_layers=2, num_heads=2, use_cache=False, decoder_start_token_id=0),
    "BART": of("Bart", "BartForConditionalGeneration", both, vocab_size=V, d_model=8, encoder_layers=1,
               decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=12,
               decoder_ffn_dim=12, max_position_embeddings=16, use_cache=False, **NONE),
    "Whisper": of("Whisper", "WhisperForConditionalGeneration",
                  lambda b: {"input_features": torch.randn(b, 4, 12),
                             "decoder_input_ids": torch.randint(3, V, (b, 4))},
                  vocab_size=V, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                  decoder_attention_heads=2, encoder_ffn_dim=12, decoder_ffn_dim=12, num_mel_bins=4,
                  max_source_positions=6, max_target_positions=8, use_cache=False, decoder_start_token_id=0,
                  **NONE),
    "Wav2Vec2": of("Wav2Vec2", "Wav2Vec2ForSequenceClassification",
                   lambda b: {"input_values": torch.randn(b, 400)}, hidden_size=8, num_hidden_layers=1,
                   num_attention_heads=2, intermediate_size=12, conv_dim=(4, 4), conv_stride=(5, 4),
                   conv_kernel=(10, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
                   num_conv_pos_embedding_groups=2, classifier_proj_size=6, vocab_size=V),
    "ViT (transformers)": of("ViT", "ViTForImageClassification", images, **VISION),
    "DeiT (transformers)": of("DeiT", "DeiTForImageClassification", images, **VISION),
    "Swin (transformers)": of("Swin", "SwinForImageClassification", images, image_size=32, patch_size=2,
                              embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4),
    "ConvNeXt (transformers)": of("ConvNext", "ConvNextForImageClassification", images, image_size=32,
                                  hidden_sizes=[4, 8], depths=[1, 1], num_stages=2),
    "SegFormer": of("Segformer", "SegformerForImageClassification", images, hidden_sizes=[4, 8],
                    depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2],
                    num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8),
    "CLIP, images": of("CLIPVision", "CLIPVisionModel", images, "pooler_output", **VISION),
}
