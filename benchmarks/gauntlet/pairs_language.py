"""Language models of transformers against each other and against re-writings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gauntlet.pair import Pair, Sample, input_of, pick, tokens
from benchmarks.gauntlet.rewrites.encoders import T5, FusedBert, TorchBert, Whisper
from benchmarks.gauntlet.rewrites.gpt import GroupedGPT, NanoGPT, SplitNeoX, TorchGPT
from benchmarks.gauntlet.rewrites.llama import FusedLlama, MetaLlama
from benchmarks.gauntlet.truth import (
    Rule,
    add_leading_axis,
    concat,
    drop,
    permute_axes,
    rename,
    split,
    stack,
    transpose,
)

VOCAB = 96
UPCAST = 1e-5  # these models compute norms, softmax or rotations in float32 whatever their dtype
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = tokens(VOCAB, key="input_ids")


def _tags(*names: str) -> frozenset[str]:
    return frozenset(names)


def _hf(model: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**{**SPECIAL, **options}))


# Llama, Phi-3, Mixtral ------------------------------------------------------------------------------------------------
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}
hf_llama = partial(_hf, "LlamaForCausalLM", "LlamaConfig", **LLAMA)
hf_llama_base = partial(_hf, "LlamaModel", "LlamaConfig", **LLAMA)
hf_phi3 = partial(_hf, "Phi3ForCausalLM", "Phi3Config", **LLAMA)
hf_mixtral = partial(
    _hf,
    "MixtralForCausalLM",
    "MixtralConfig",
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    num_local_experts=4,
    experts_implementation="eager",
    **LLAMA,
)
hf_llama_classifier = partial(_hf, "LlamaForSequenceClassification", "LlamaConfig", num_labels=5, **LLAMA)

LLAMA_TO_META = rename(
    (r"^model\.embed_tokens\.", "tok_embeddings."),
    (r"^model\.layers\.", "layers."),
    (r"\.self_attn\.([qkvo])_proj\.", r".attention.w\1."),
    (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
    (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
    (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"^model\.norm\.", "norm."),
    (r"^lm_head\.", "output."),
)
QKV = [r"(.*)\.self_attn\.q_proj\.weight", r"\1.self_attn.k_proj.weight", r"\1.self_attn.v_proj.weight"]
LLAMA_TO_FUSED = (
    concat(QKV, r"\1.attn.attn.weight"),
    rename(
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.layers\.", "transformer.h."),
        (r"\.self_attn\.o_proj\.", ".attn.proj."),
        (r"\.mlp\.gate_proj\.", ".mlp.fc_1."),
        (r"\.mlp\.up_proj\.", ".mlp.fc_2."),
        (r"\.mlp\.down_proj\.", ".mlp.proj."),
        (r"\.input_layernorm\.", ".norm_1."),
        (r"\.post_attention_layernorm\.", ".norm_2."),
        (r"^model\.norm\.", "transformer.ln_f."),
    ),
)
GATE_UP = concat([r"(.*)\.mlp\.fc_1\.weight", r"\1.mlp.fc_2.weight"], r"\1.mlp.gate_up.weight")


def _group_llama() -> Rule:
    """Rows of q, k, v -> for each key head: its two query heads, the key, the value."""

    def operation(value: torch.Tensor) -> torch.Tensor:
        q, k, v = value.split([32, 16, 16])
        parts = [q.reshape(2, 2, 8, 32), k.reshape(2, 1, 8, 32), v.reshape(2, 1, 8, 32)]
        return torch.cat(parts, 1).reshape(64, 32)

    from benchmarks.gauntlet.truth import change

    return change(r"attn\.attn\.weight$", operation)


def llamas() -> list[Pair]:
    logits = {"sample": tokens(VOCAB), "source_sample": IDS, "source_call": pick("logits"), "tolerance": UPCAST}
    meta = Pair(
        "llama/transformers-to-meta",
        hf_llama,
        MetaLlama,
        (LLAMA_TO_META,),
        **logits,
        tags=_tags("llama", "rename"),
    )
    fused = Pair(
        "llama/transformers-to-fused",
        hf_llama,
        FusedLlama,
        LLAMA_TO_FUSED,
        **logits,
        tags=_tags("llama", "concat", "reordered"),
    )
    gated = Pair(
        "llama/transformers-to-fused_gate",
        hf_llama,
        partial(FusedLlama, fused=True),
        (*LLAMA_TO_FUSED, GATE_UP),
        **logits,
        tags=_tags("llama", "concat", "reordered"),
    )
    phi = Pair(
        "llama/llama-to-phi3",
        hf_llama,
        hf_phi3,
        (
            concat(QKV, r"\1.self_attn.qkv_proj.weight"),
            concat([r"(.*)\.mlp\.gate_proj\.weight", r"\1.mlp.up_proj.weight"], r"\1.mlp.gate_up_proj.weight"),
        ),
        IDS,
        source_call=pick("logits"),
        target_call=pick("logits"),
        tolerance=UPCAST,
        tags=_tags("llama", "concat"),
    )
    interleaved = Pair(
        "llama/transformers-to-meta_interleaved",
        hf_llama,
        partial(MetaLlama, interleaved=True),
        (
            LLAMA_TO_META,
            permute_axes(r"\.wq\.", (4, 2, 4), (0, 2, 1)),
            permute_axes(r"\.wk\.", (2, 2, 4), (0, 2, 1)),
        ),
        **logits,
        permute=True,
        tags=_tags("llama", "permute"),
    )
    grouped = Pair(
        "llama/transformers-to-fused_grouped",
        hf_llama,
        partial(FusedLlama, grouped=True),
        (*LLAMA_TO_FUSED, _group_llama()),
        **logits,
        permute=True,
        tags=_tags("llama", "permute", "concat"),
    )
    out = [both for pair in (meta, fused, gated, phi, interleaved, grouped) for both in (pair, pair.reverse())]
    out.append(
        Pair(
            "llama/meta-to-transformers_encoder_only",
            MetaLlama,
            hf_llama_base,
            (_Back(meta), drop(r"^lm_head\."), rename((r"^model\.", ""))),
            IDS,
            source_sample=tokens(VOCAB),
            source_call=input_of("output"),
            target_call=pick("last_hidden_state"),
            tolerance=UPCAST,
            tags=_tags("llama", "rename", "partial"),
        )
    )
    out.append(
        Pair(
            "llama/fused-to-transformers_classifier",
            FusedLlama,
            hf_llama_classifier,
            (_Back(fused), drop(r"^lm_head\.")),
            IDS,
            source_sample=tokens(VOCAB),
            source_call=input_of("lm_head"),
            target_call=input_of("score"),
            new=r"^score\.",
            tolerance=UPCAST,
            tags=_tags("llama", "split", "partial", "reordered"),
        )
    )
    return out


class _Back:
    """A pair's rules backwards, to build further rules on."""

    def __init__(self, pair: Pair):
        self.rule = pair.reverse().rules[0]

    def __call__(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.rule(state)


def mixtrals() -> list[Pair]:
    meta_moe = partial(MetaLlama, experts=4)
    stacked = Pair(
        "mixtral/meta-to-transformers",
        meta_moe,
        hf_mixtral,
        (
            concat(
                [r"(.*)\.experts\.(\d+)\.w1\.weight", r"\1.experts.\2.w3.weight"],
                r"\1.experts.\2.gate_up_proj",
            ),
            stack(r"(.*)\.experts\.(?P<i>\d+)\.gate_up_proj", r"\1.experts.gate_up_proj"),
            stack(r"(.*)\.experts\.(?P<i>\d+)\.w2\.weight", r"\1.experts.down_proj"),
            rename(
                (r"^tok_embeddings\.", "model.embed_tokens."),
                (r"^layers\.", "model.layers."),
                (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
                (r"\.block_sparse_moe\.", ".mlp."),
                (r"\.attention_norm\.", ".input_layernorm."),
                (r"\.ffn_norm\.", ".post_attention_layernorm."),
                (r"^norm\.", "model.norm."),
                (r"^output\.", "lm_head."),
            ),
        ),
        IDS,
        source_sample=tokens(VOCAB),
        target_call=pick("logits"),
        tolerance=UPCAST,
        tags=_tags("mixtral", "stack", "concat"),
    )
    return [stacked, stacked.reverse()]


# GPT-2, GPT-NeoX ------------------------------------------------------------------------------------------------------
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 24}
hf_gpt2 = partial(_hf, "GPT2LMHeadModel", "GPT2Config", **GPT2)
CONV1D = transpose(r"\.c_(attn|proj|fc)\.weight$")
NEOX = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
hf_neox = partial(_hf, "GPTNeoXForCausalLM", "GPTNeoXConfig", **NEOX)


def gpts() -> list[Pair]:
    logits = {"sample": tokens(VOCAB), "source_sample": IDS, "source_call": pick("logits"), "tolerance": UPCAST}
    nano = Pair(
        "gpt2/transformers-to-nano",
        hf_gpt2,
        NanoGPT,
        (CONV1D,),
        **logits,
        tags=_tags("gpt2", "transpose", "tied"),
    )
    blocks = r"transformer\.h\.(\d+)\."
    grouped = Pair(
        "gpt2/transformers-to-grouped",
        hf_gpt2,
        GroupedGPT,
        (
            CONV1D,
            split(
                blocks + r"attn\.c_attn\.(weight|bias)",
                [rf"attentions.\1.{part}.\2" for part in ("queries", "keys", "values")],
            ),
            rename(
                (blocks + r"attn\.c_proj\.", r"attentions.\1.out."),
                (blocks + r"mlp\.c_fc\.", r"feed_forwards.\1.0."),
                (blocks + r"mlp\.c_proj\.", r"feed_forwards.\1.2."),
                (blocks + r"ln_1\.", r"attention_norms.\1."),
                (blocks + r"ln_2\.", r"feed_forward_norms.\1."),
                (r"^transformer\.wte\.", "token_emb."),
                (r"^transformer\.wpe\.weight$", "position_emb"),
                (r"^transformer\.ln_f\.", "final_norm."),
                (r"^lm_head\.", "to_logits."),
            ),
            add_leading_axis(r"^position_emb$"),
        ),
        **logits,
        insensitive=r"keys\.bias$",
        tags=_tags("gpt2", "transpose", "split", "grouped by kind"),
    )
    torch_layers = Pair(
        "gpt2/transformers-to-torch",
        hf_gpt2,
        TorchGPT,
        (
            CONV1D,
            rename(
                (blocks, r"decoder.layers.\1."),
                (r"\.attn\.c_attn\.", ".self_attn.in_proj_"),
                (r"\.attn\.c_proj\.", ".self_attn.out_proj."),
                (r"\.mlp\.c_fc\.", ".linear1."),
                (r"\.mlp\.c_proj\.", ".linear2."),
                (r"\.ln_(\d)\.", r".norm\1."),
                (r"^transformer\.wte\.", "embed."),
                (r"^transformer\.wpe\.", "pos."),
                (r"^transformer\.ln_f\.", "decoder.norm."),
                (r"^lm_head\.", "head."),
            ),
        ),
        **logits,
        tags=_tags("gpt2", "transpose"),
    )
    headless = Pair(
        "gpt2/nano-to-transformers_base",
        NanoGPT,
        partial(_hf, "GPT2Model", "GPT2Config", **GPT2),
        (CONV1D, drop(r"^lm_head\."), rename((r"^transformer\.", ""))),
        IDS,
        source_sample=tokens(VOCAB),
        source_call=input_of("lm_head"),
        target_call=pick("last_hidden_state"),
        tolerance=UPCAST,
        tags=_tags("gpt2", "transpose", "partial"),
    )
    neox = Pair(
        "gpt_neox/transformers-to-split",
        hf_neox,
        SplitNeoX,
        (
            permute_axes(r"query_key_value\.", (4, 3, 8), (1, 0, 2)),
            split(
                r"gpt_neox\.layers\.(\d+)\.attention\.query_key_value\.(weight|bias)",
                [rf"blocks.\1.attn.{part}_proj.\2" for part in "qkv"],
            ),
            rename(
                (r"^gpt_neox\.embed_in\.", "embed."),
                (r"^gpt_neox\.layers\.", "blocks."),
                (r"\.attention\.dense\.", ".attn.out_proj."),
                (r"\.input_layernorm\.", ".attn_norm."),
                (r"\.post_attention_layernorm\.", ".mlp_norm."),
                (r"\.mlp\.dense_h_to_4h\.", ".mlp.0."),
                (r"\.mlp\.dense_4h_to_h\.", ".mlp.2."),
                (r"^gpt_neox\.final_layer_norm\.", "norm."),
                (r"^(embed_out|lm_head)\.", "unembed."),
            ),
        ),
        **logits,
        permute=True,
        tags=_tags("gpt_neox", "permute", "split"),
    )
    return [nano, nano.reverse(), grouped, torch_layers, headless, neox, neox.reverse()]


# BERT -----------------------------------------------------------------------------------------------------------------
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
hf_bert = partial(_hf, "BertModel", "BertConfig", **BERT)
hf_bert_mlm = partial(_hf, "BertForMaskedLM", "BertConfig", **BERT)
hf_bert_classifier = partial(_hf, "BertForSequenceClassification", "BertConfig", num_labels=5, **BERT)
hf_electra = partial(_hf, "ElectraModel", "ElectraConfig", embedding_size=32, **BERT)
LAYER = r"encoder\.layer\.(\d+)\."
SELF = LAYER + r"attention\.self\.query\.(weight|bias)"
BERT_TO_TORCH = (
    concat(
        [SELF, *(rf"encoder.layer.\1.attention.self.{part}.\2" for part in ("key", "value"))],
        r"encoder.layers.\1.self_attn.in_proj_\2",
    ),
    rename(
        (LAYER + r"attention\.output\.dense\.", r"encoder.layers.\1.self_attn.out_proj."),
        (LAYER + r"attention\.output\.LayerNorm\.", r"encoder.layers.\1.norm1."),
        (LAYER + r"intermediate\.dense\.", r"encoder.layers.\1.linear1."),
        (LAYER + r"output\.dense\.", r"encoder.layers.\1.linear2."),
        (LAYER + r"output\.LayerNorm\.", r"encoder.layers.\1.norm2."),
        (r"^embeddings\.word_embeddings\.", "tok."),
        (r"^embeddings\.token_type_embeddings\.", "seg."),
        (r"^embeddings\.position_embeddings\.", "pos."),
        (r"^embeddings\.LayerNorm\.", "norm."),
        (r"^pooler\.dense\.", "pool.0."),
    ),
)
BERT_TO_FUSED = (
    drop(r"^pooler\."),
    concat(
        [SELF, *(rf"encoder.layer.\1.attention.self.{part}.\2" for part in ("key", "value"))],
        r"layers.\1.qkv.\2",
    ),
    rename(
        (LAYER + r"attention\.output\.dense\.", r"layers.\1.attention_out."),
        (LAYER + r"attention\.output\.LayerNorm\.", r"layers.\1.norm_after_attention."),
        (LAYER + r"intermediate\.dense\.", r"layers.\1.ffn_in."),
        (LAYER + r"output\.dense\.", r"layers.\1.ffn_out."),
        (LAYER + r"output\.LayerNorm\.", r"layers.\1.norm_after_ffn."),
        (r"^embeddings\.word_embeddings\.weight$", "word_table"),
        (r"^embeddings\.token_type_embeddings\.weight$", "segment_table"),
        (r"^embeddings\.position_embeddings\.weight$", "position_table"),
        (r"^embeddings\.LayerNorm\.", "embedding_norm."),
    ),
)
UNUSED_SEGMENT_IS_FINE = r"(key\.bias)$"


def berts() -> list[Pair]:
    ours = {"sample": tokens(VOCAB), "source_sample": IDS, "tolerance": UPCAST}
    to_torch = Pair(
        "bert/transformers-to-torch",
        hf_bert,
        TorchBert,
        BERT_TO_TORCH,
        **ours,
        tags=_tags("bert", "concat"),
    )
    to_fused = Pair(
        "bert/transformers-to-fused_reordered",
        hf_bert,
        FusedBert,
        BERT_TO_FUSED,
        **ours,
        source_call=pick("last_hidden_state"),
        tags=_tags("bert", "concat", "reordered", "partial"),
    )
    electra = Pair(
        "bert/electra-to-bert",
        hf_electra,
        hf_bert,
        (),
        IDS,
        source_call=pick("last_hidden_state"),
        target_call=pick("last_hidden_state"),
        new=r"^pooler\.",
        insensitive=UNUSED_SEGMENT_IS_FINE,
        tags=_tags("bert", "identity", "partial"),
    )
    classifier = Pair(
        "bert/masked_lm-to-classifier",
        hf_bert_mlm,
        hf_bert_classifier,
        (drop(r"^cls\."),),
        IDS,
        source_call=input_of("cls"),
        target_call=_bert_states,
        new=r"^(classifier|bert\.pooler)\.",
        insensitive=UNUSED_SEGMENT_IS_FINE,
        tags=_tags("bert", "identity", "partial"),
    )
    torch_classifier = Pair(
        "bert/torch-to-classifier",
        TorchBert,
        hf_bert_classifier,
        (_Back(to_torch), rename((r"^", "bert."))),
        IDS,
        source_sample=tokens(VOCAB),
        source_call=pick(1),
        target_call=input_of("classifier"),
        new=r"^classifier\.",
        insensitive=UNUSED_SEGMENT_IS_FINE,
        tolerance=UPCAST,
        tags=_tags("bert", "split", "partial"),
    )
    return [
        to_torch,
        to_torch.reverse(insensitive=UNUSED_SEGMENT_IS_FINE),
        to_fused,
        to_fused.reverse(new=r"^pooler\.", insensitive=UNUSED_SEGMENT_IS_FINE),
        electra,
        classifier,
        torch_classifier,
    ]


def _bert_states(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return module.bert(*args, **kwargs).last_hidden_state


# T5, Whisper ----------------------------------------------------------------------------------------------------------
hf_t5 = partial(
    _hf,
    "T5ForConditionalGeneration",
    "T5Config",
    vocab_size=VOCAB,
    d_model=32,
    d_kv=8,
    d_ff=80,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,  # here: don't scale what goes into the head; the weights are tied all the same
)
hf_whisper = partial(
    _hf,
    "WhisperForConditionalGeneration",
    "WhisperConfig",
    vocab_size=VOCAB,
    num_mel_bins=20,
    d_model=32,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=72,
    decoder_ffn_dim=72,
    max_source_positions=16,
    max_target_positions=12,
    decoder_start_token_id=1,
)


def _t5_rules() -> tuple[Rule, ...]:
    return (
        drop(r"^(encoder|decoder)\.embed_tokens\."),
        rename(
            (r"^shared\.", "embedding."),
            (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"enc.\1.self_norm."),
            (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.", r"enc.\1.self_attn."),
            (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"enc.\1.mlp_norm."),
            (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.", r"enc.\1.mlp."),
            (r"^decoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"dec.\1.self_norm."),
            (r"^decoder\.block\.(\d+)\.layer\.0\.SelfAttention\.", r"dec.\1.self_attn."),
            (r"^decoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"dec.\1.cross_norm."),
            (r"^decoder\.block\.(\d+)\.layer\.1\.EncDecAttention\.", r"dec.\1.cross_attn."),
            (r"^decoder\.block\.(\d+)\.layer\.2\.layer_norm\.", r"dec.\1.mlp_norm."),
            (r"^decoder\.block\.(\d+)\.layer\.2\.DenseReluDense\.", r"dec.\1.mlp."),
            (r"\.relative_attention_bias\.", ".rel_pos."),
            (r"\.wi_0\.", ".w_gate."),
            (r"\.wi_1\.", ".w_up."),
            (r"\.wo\.", ".w_down."),
            (r"_attn\.q\.", "_attn.to_q."),
            (r"_attn\.o\.", "_attn.to_out."),
            (r"^encoder\.final_layer_norm\.", "enc_norm."),
            (r"^decoder\.final_layer_norm\.", "dec_norm."),
            (r"^lm_head\.", "unembed."),
        ),
        concat([r"(.*)_attn\.k\.weight", r"\1_attn.v.weight"], r"\1_attn.to_kv.weight"),
    )


def _two_ids() -> Sample:
    ids, decoder = torch.randint(3, VOCAB, (2, 13)), torch.randint(3, VOCAB, (2, 7))
    return (), {"input_ids": ids, "decoder_input_ids": decoder}


def _audio_hf() -> Sample:
    return (), {"input_features": torch.randn(2, 20, 32), "decoder_input_ids": torch.randint(3, VOCAB, (2, 9))}


def _audio() -> Sample:
    return (torch.randn(2, 20, 32), torch.randint(3, VOCAB, (2, 9))), {}


WHISPER_TO_OPENAI = (
    drop(r"^proj_out\."),
    rename(
        (r"^model\.", ""),
        (r"\.layers\.", ".blocks."),
        (r"\.self_attn_layer_norm\.", ".attn_ln."),
        (r"\.encoder_attn_layer_norm\.", ".cross_attn_ln."),
        (r"\.final_layer_norm\.", ".mlp_ln."),
        (r"\.self_attn\.", ".attn."),
        (r"\.encoder_attn\.", ".cross_attn."),
        (r"\.q_proj\.", ".query."),
        (r"\.k_proj\.", ".key."),
        (r"\.v_proj\.", ".value."),
        (r"\.out_proj\.", ".out."),
        (r"\.fc1\.", ".mlp.0."),
        (r"\.fc2\.", ".mlp.2."),
        (r"\.embed_positions\.weight$", ".positional_embedding"),
        (r"\.embed_tokens\.", ".token_embedding."),
        (r"^encoder\.layer_norm\.", "encoder.ln_post."),
        (r"^decoder\.layer_norm\.", "decoder.ln."),
    ),
)


def encoder_decoders() -> list[Pair]:
    t5 = Pair(
        "t5/transformers-to-one_file",
        hf_t5,
        T5,
        _t5_rules(),
        _two_ids,
        source_call=pick("logits"),
        tolerance=UPCAST,
        tags=_tags("t5", "concat", "reordered"),
    )
    t5_encoder = Pair(
        "t5/one_file-to-transformers_encoder",
        T5,
        partial(
            _hf,
            "T5EncoderModel",
            "T5Config",
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=80,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        ),
        (_Back(t5), drop(r"^(decoder|lm_head)\.")),
        IDS,
        source_sample=_encoder_ids,
        source_call=_t5_memory,
        target_call=pick("last_hidden_state"),
        tolerance=UPCAST,
        tags=_tags("t5", "split", "partial"),
    )
    whisper = Pair(
        "whisper/transformers-to-openai",
        hf_whisper,
        Whisper,
        WHISPER_TO_OPENAI,
        _audio,
        source_sample=_audio_hf,
        source_call=pick("logits"),
        tolerance=UPCAST,
        tags=_tags("whisper", "rename", "reordered"),
    )
    untied = replace(t5, name="t5/transformers-to-one_file_untied", target=partial(T5, tied=False))
    return [t5, t5.reverse(), untied, t5_encoder, whisper, whisper.reverse()]


def _encoder_ids() -> Sample:
    args, kwargs = IDS()
    return args, kwargs | {"decoder_input_ids": kwargs["input_ids"]}


def _t5_memory(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    seen = []
    handle = module.enc_norm.register_forward_hook(lambda _, __, result: seen.append(result))
    try:
        module(*args, **kwargs)
    finally:
        handle.remove()
    return seen[0]


def pairs() -> list[Pair]:
    """All pairs of this module, in a fixed order."""
    return [*llamas(), *mixtrals(), *gpts(), *berts(), *encoder_decoders()]
