"""Pairs of further families, kept apart: their score says how the mapper does on what it was not built with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gauntlet import pairs_vision as vision
from benchmarks.gauntlet.generated import _mixer
from benchmarks.gauntlet.pair import Pair, Sample, images, input_of, pick, tokens
from benchmarks.gauntlet.pairs_language import BERT, IDS, LLAMA, UPCAST, VOCAB, WHISPER_TO_OPENAI, _Back, _hf
from benchmarks.gauntlet.rewrites.classics import (
    Autoencoder,
    ConvMixer,
    Mamba,
    NamedAutoencoder,
    NamedMLP,
    NormedLlama,
    SequentialMLP,
    SplitBloom,
    TextbookTransformer,
    TorchBart,
    TorchDistilBert,
    TorchOPT,
    TorchSeq2Seq,
)
from benchmarks.gauntlet.rewrites.encoders import Whisper
from benchmarks.gauntlet.truth import (
    add_axes,
    change,
    concat,
    drop,
    keep,
    permute_axes,
    rename,
    split,
)

KEY_BIAS = r"(k_proj|k_lin|key|wk)\.bias$"


def _tags(*names: str) -> frozenset[str]:
    return frozenset({*names, "held out"})


# timm and transformers ------------------------------------------------------------------------------------------------
def _pvt(package: str) -> nn.Module:
    if package == "timm":
        from timm.models.pvt_v2 import PyramidVisionTransformerV2

        return PyramidVisionTransformerV2(
            depths=(1, 2, 3, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), num_classes=10
        )
    return _hf(
        "PvtV2ForImageClassification",
        "PvtV2Config",
        depths=[1, 2, 3, 1],
        hidden_sizes=[8, 16, 24, 32],
        num_attention_heads=[1, 2, 3, 4],
        mlp_ratios=[8, 8, 4, 4],
        num_labels=10,
    )


def _focal(package: str) -> nn.Module:
    if package == "timm":
        from timm.models.focalnet import FocalNet

        return FocalNet(depths=(1, 2, 3, 1), embed_dim=8, num_classes=10)
    return _hf(
        "FocalNetForImageClassification",
        "FocalNetConfig",
        embed_dim=8,
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 2, 3, 1],
        image_size=64,
        num_labels=10,
    )


def _unit(match: Any) -> str:
    return {"1_1x1": ".expand_1x1.", "2_kxk": ".conv_3x3.", "3_1x1": ".reduce_1x1."}[match[1]]


def library() -> list[Pair]:
    pvt = Pair(
        "pvt_v2/timm-to-transformers",
        partial(_pvt, "timm"),
        partial(_pvt, "transformers"),
        (
            split(
                r"stages\.(\d)\.blocks\.(\d)\.attn\.kv\.(weight|bias)",
                [rf"stages.\1.blocks.\2.attention.{part}.\3" for part in ("key", "value")],
            ),
            rename(
                (r"^patch_embed\.", "stages.0.downsample."),
                (r"^stages\.", "pvt_v2.encoder.layers."),
                (r"\.downsample\.norm\.", ".patch_embedding.layer_norm."),
                (r"\.downsample\.", ".patch_embedding."),
                (r"\.attn\.q\.", ".attention.query."),
                (r"\.attn\.sr\.", ".attention.spatial_reduction."),
                (r"\.attn\.norm\.", ".attention.layer_norm."),
                (r"\.attn\.proj\.", ".attention.proj."),
                (r"\.norm(\d)\.", r".layer_norm_\1."),
                (r"\.mlp\.fc(\d)\.", r".mlp.dense\1."),
                (r"\.mlp\.dwconv\.", ".mlp.dwconv.dwconv."),
                (r"^(pvt_v2\.encoder\.layers\.\d)\.norm\.", r"\1.layer_norm."),
                (r"^head\.", "classifier."),
            ),
        ),
        images(64),
        target_call=pick("logits"),
        insensitive=KEY_BIAS,
        tolerance=UPCAST,
        tags=_tags("pvt", "split"),
    )
    focal = Pair(
        "focalnet/timm-to-transformers",
        partial(_focal, "timm"),
        partial(_focal, "transformers"),
        (
            rename(
                (r"^stem\.proj\.", "focalnet.embeddings.patch_embeddings.projection."),
                (r"^stem\.norm\.", "focalnet.embeddings.norm."),
                (
                    r"^layers\.(\d)\.downsample\.",
                    lambda m: f"focalnet.encoder.stages.{int(m[1]) - 1}.downsample.",
                ),
                (r"downsample\.proj\.", "downsample.projection."),
                (r"^layers\.(\d)\.blocks\.", r"focalnet.encoder.stages.\1.layers."),
                (r"\.modulation\.f\.", ".modulation.projection_in."),
                (r"\.modulation\.h\.", ".modulation.projection_context."),
                (r"\.modulation\.proj\.", ".modulation.projection_out."),
                (r"^norm\.", "focalnet.layernorm."),
                (r"^head\.fc\.", "classifier."),
            ),
            change(r"(projection_in|projection_out|fc\d)\.weight$", lambda value: value.flatten(1)),
        ),
        images(64),
        target_call=pick("logits"),
        tags=_tags("focalnet", "reshape"),
    )
    mobilevit = Pair(
        "mobilevit/timm-to-transformers",
        partial(vision._timm, "mobilevit_xxs", num_classes=10),
        partial(
            _hf,
            "MobileViTForImageClassification",
            "MobileViTConfig",
            hidden_sizes=[64, 80, 96],
            neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320],
            expand_ratio=2.0,
            num_labels=10,
        ),
        (
            split(
                r"(.*)\.attn\.qkv\.(weight|bias)",
                [rf"\1.attention.attention.{part}.\2" for part in ("query", "key", "value")],
            ),
            rename(
                (r"^stages\.([234])\.0\.", r"mobilevit.encoder.layer.\1.downsampling_layer."),
                (r"^stages\.([234])\.1\.", r"mobilevit.encoder.layer.\1."),
                (r"^stages\.([01])\.(\d)\.", r"mobilevit.encoder.layer.\1.layer.\2."),
                (r"^stem\.", "mobilevit.conv_stem."),
                (r"^final_conv\.", "mobilevit.conv_1x1_exp."),
                (r"\.conv(1_1x1|2_kxk|3_1x1)\.", _unit),
                (r"\.conv_1x1\.weight$", ".conv_1x1.convolution.weight"),
                (r"\.conv_proj\.", ".conv_projection."),
                (r"\.conv_fusion\.", ".fusion."),
                (r"\.transformer\.", ".transformer.layer."),
                (r"\.norm1\.", ".layernorm_before."),
                (r"\.norm2\.", ".layernorm_after."),
                (r"\.attn\.proj\.", ".attention.output.dense."),
                (r"\.mlp\.fc1\.", ".intermediate.dense."),
                (r"\.mlp\.fc2\.", ".output.dense."),
                (r"^(mobilevit\.encoder\.layer\.\d)\.norm\.", r"\1.layernorm."),
                (r"\.conv\.", ".convolution."),
                (r"\.bn\.", ".normalization."),
                (r"^head\.fc\.", "classifier."),
            ),
        ),
        images(128),
        target_call=pick("logits"),
        insensitive=KEY_BIAS,
        tags=_tags("mobilevit", "split"),
    )
    mobilenet = Pair(
        "mobilenet_v3/torchvision-to-timm",
        partial(vision._tv, "mobilenet_v3_small", num_classes=10),
        partial(vision._timm, "mobilenetv3_small_100", num_classes=10, bn_eps=1e-3),
        (rename(*_mobilenet_v3()), add_axes(r"^conv_head\.weight$")),
        images(64),
        tags=_tags("mobilenet", "rename", "reshape"),
    )
    return [p for pair in (pvt, focal, mobilevit, mobilenet) for p in (pair, pair.reverse(insensitive=None))]


def _mobilenet_v3() -> list[tuple[str, str]]:
    """Names of the blocks, read off the configuration: stages, whether a block expands, whether it squeezes."""
    stages = [1, 2, 3, 2, 3]
    squeezes = [True, False, False] + [True] * 8
    out = [
        (r"^features\.0\.0\.", "conv_stem."),
        (r"^features\.0\.1\.", "bn1."),
        (r"^features\.12\.0\.", "blocks.5.0.conv."),
        (r"^features\.12\.1\.", "blocks.5.0.bn1."),
        (r"^classifier\.0\.", "conv_head."),
        (r"^classifier\.3\.", "classifier."),
    ]
    number = 1
    for stage, count in enumerate(stages):
        for block in range(count):
            old, new = rf"^features\.{number}\.block\.", f"blocks.{stage}.{block}."
            units = ["conv_dw", "conv_pw"] if number == 1 else ["conv_pw", "conv_dw", "conv_pwl"]
            place = 0
            for i, unit in enumerate(units):
                if i == len(units) - 1 and squeezes[number - 1]:
                    out.append((rf"{old}{place}\.fc1\.", f"{new}se.conv_reduce."))
                    out.append((rf"{old}{place}\.fc2\.", f"{new}se.conv_expand."))
                    place += 1
                out.append((rf"{old}{place}\.0\.", f"{new}{unit}."))
                out.append((rf"{old}{place}\.1\.", f"{new}bn{i + 1}."))
                place += 1
            number += 1
    return out


# Language and speech --------------------------------------------------------------------------------------------------
def language() -> list[Pair]:
    ours = {"sample": tokens(VOCAB), "source_sample": IDS, "tolerance": UPCAST}
    distil = Pair(
        "distilbert/transformers-to-torch",
        partial(
            _hf,
            "DistilBertModel",
            "DistilBertConfig",
            vocab_size=VOCAB,
            dim=32,
            hidden_dim=80,
            n_layers=3,
            n_heads=4,
            max_position_embeddings=24,
        ),
        TorchDistilBert,
        (
            concat(
                [r"(.*)\.attention\.q_lin\.(weight|bias)", *(rf"\1.attention.{p}_lin.\2" for p in "kv")],
                r"\1.self_attn.in_proj_\2",
            ),
            rename(
                (r"^embeddings\.word_embeddings\.", "embed.token."),
                (r"^embeddings\.position_embeddings\.", "embed.position."),
                (r"^embeddings\.LayerNorm\.", "embed_norm."),
                (r"^transformer\.layer\.", "layers."),
                (r"\.attention\.out_lin\.", ".self_attn.out_proj."),
                (r"\.sa_layer_norm\.", ".norm1."),
                (r"\.ffn\.lin(\d)\.", r".linear\1."),
                (r"\.output_layer_norm\.", ".norm2."),
            ),
        ),
        source_call=pick("last_hidden_state"),
        **ours,
        tags=_tags("distilbert", "concat"),
    )
    opt = Pair(
        "opt/transformers-to-torch",
        partial(
            _hf,
            "OPTForCausalLM",
            "OPTConfig",
            vocab_size=VOCAB,
            hidden_size=32,
            ffn_dim=80,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=24,
            word_embed_proj_dim=32,
        ),
        TorchOPT,
        (
            drop(r"^lm_head\."),
            concat(
                [r"(.*)\.self_attn\.q_proj\.(weight|bias)", *(rf"\1.self_attn.{p}_proj.\2" for p in "kv")],
                r"\1.self_attn.in_proj_\2",
            ),
            rename(
                (r"^model\.decoder\.embed_tokens\.", "words."),
                (r"^model\.decoder\.embed_positions\.", "places."),
                (r"^model\.decoder\.final_layer_norm\.", "ln_out."),
                (r"^model\.decoder\.layers\.", "blocks.layers."),
                (r"\.self_attn_layer_norm\.", ".norm1."),
                (r"\.final_layer_norm\.", ".norm2."),
                (r"\.fc(\d)\.", r".linear\1."),
            ),
        ),
        source_call=pick("logits"),
        **ours,
        tags=_tags("opt", "concat", "reordered"),
    )
    mamba = Pair(
        "mamba/transformers-to-plain",
        partial(
            _hf, "MambaForCausalLM", "MambaConfig", vocab_size=VOCAB, hidden_size=24, state_size=8, num_hidden_layers=3
        ),
        Mamba,
        (
            drop(r"^lm_head\."),
            rename(
                (r"^backbone\.embeddings\.", "embed."),
                (r"^backbone\.layers\.(\d+)\.norm\.", r"blocks.\1.norm."),
                (r"^backbone\.layers\.(\d+)\.mixer\.", r"blocks.\1."),
                (r"\.in_proj\.", ".to_x_and_gate."),
                (r"\.conv1d\.", ".depthwise."),
                (r"\.x_proj\.", ".to_dt_b_c."),
                (r"\.dt_proj\.", ".dt."),
                (r"\.A_log$", ".log_a"),
                (r"\.D$", ".skip"),
                (r"\.out_proj\.", ".out."),
                (r"^backbone\.norm_f\.", "norm."),
            ),
        ),
        source_call=pick("logits"),
        **ours,
        tags=_tags("mamba", "rename", "reordered"),
    )
    qwen = Pair(
        "qwen3/transformers-to-plain",
        partial(_hf, "Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **LLAMA),
        NormedLlama,
        (
            concat([r"(.*)\.self_attn\.k_proj\.weight", r"\1.self_attn.v_proj.weight"], r"\1.attn.to_kv.weight"),
            rename(
                (r"^model\.embed_tokens\.", "embedder."),
                (r"^model\.layers\.", "stack."),
                (r"\.self_attn\.q_proj\.", ".attn.to_q."),
                (r"\.self_attn\.o_proj\.", ".attn.to_out."),
                (r"\.self_attn\.([qk])_norm\.", r".attn.norm_\1."),
                (r"\.mlp\.gate_proj\.", ".mlp.w1."),
                (r"\.mlp\.down_proj\.", ".mlp.w2."),
                (r"\.mlp\.up_proj\.", ".mlp.w3."),
                (r"\.input_layernorm\.", ".ln_attn."),
                (r"\.post_attention_layernorm\.", ".ln_mlp."),
                (r"^model\.norm\.", "ln_out."),
                (r"^lm_head\.", "unembedder."),
            ),
        ),
        source_call=pick("logits"),
        **ours,
        tags=_tags("llama", "concat", "reordered"),
    )
    bloom = Pair(
        "bloom/transformers-to-split",
        partial(_hf, "BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
        SplitBloom,
        (
            drop(r"^lm_head\."),
            permute_axes(r"query_key_value\.", (4, 3, 8), (1, 0, 2)),
            split(
                r"transformer\.h\.(\d+)\.self_attention\.query_key_value\.(weight|bias)",
                [rf"blocks.\1.w{part}.\2" for part in "qkv"],
            ),
            rename(
                (r"^transformer\.word_embeddings\.", "emb."),
                (r"^transformer\.word_embeddings_layernorm\.", "emb_ln."),
                (r"^transformer\.h\.", "blocks."),
                (r"\.input_layernorm\.", ".ln1."),
                (r"\.post_attention_layernorm\.", ".ln2."),
                (r"\.self_attention\.dense\.", ".wo."),
                (r"\.mlp\.dense_h_to_4h\.", ".fc1."),
                (r"\.mlp\.dense_4h_to_h\.", ".fc2."),
                (r"^transformer\.ln_f\.", "ln."),
            ),
        ),
        source_call=pick("logits"),
        insensitive=KEY_BIAS,
        **ours,
        permute=True,
        tags=_tags("bloom", "permute", "split"),
    )
    back: list[Pair] = []
    for pair in (distil, opt, mamba, qwen, bloom):
        back += [pair, pair.reverse(insensitive=KEY_BIAS)]
    return [*back, *_seq2seq(), _bert_layers(), _whisper_classifier()]


def _two() -> Sample:
    return (torch.randint(3, VOCAB, (2, 13)), torch.randint(3, VOCAB, (2, 7))), {}


def _two_by_name() -> Sample:
    (ids, decoder), _ = _two()
    return (), {"input_ids": ids, "decoder_input_ids": decoder}


def _seq2seq() -> list[Pair]:
    bart = Pair(
        "bart/transformers-to-torch",
        partial(
            _hf,
            "BartModel",
            "BartConfig",
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=80,
            decoder_ffn_dim=80,
            max_position_embeddings=24,
        ),
        TorchBart,
        (
            drop(r"^(encoder|decoder)\.embed_tokens\."),
            concat(
                [r"(.*)_attn\.q_proj\.(weight|bias)", *(rf"\1_attn.{p}_proj.\2" for p in "kv")],
                r"\1_attn.in_proj_\2",
            ),
            rename(
                (r"^shared\.", "tokens."),
                (r"^encoder\.embed_positions\.", "source_positions."),
                (r"^decoder\.embed_positions\.", "target_positions."),
                (r"^encoder\.layernorm_embedding\.", "source_norm."),
                (r"^decoder\.layernorm_embedding\.", "target_norm."),
                (r"\.encoder_attn\.", ".multihead_attn."),
                (r"\.self_attn_layer_norm\.", ".norm1."),
                (r"\.encoder_attn_layer_norm\.", ".norm2."),
                (r"^encoder(.*)\.final_layer_norm\.", r"encoder\1.norm2."),
                (r"^decoder(.*)\.final_layer_norm\.", r"decoder\1.norm3."),
                (r"\.fc(\d)\.", r".linear\1."),
            ),
        ),
        _two,
        source_sample=_two_by_name,
        source_call=pick("last_hidden_state"),
        tolerance=UPCAST,
        tags=_tags("bart", "concat"),
    )
    textbook = Pair(
        "transformer/textbook-to-torch",
        TextbookTransformer,
        TorchSeq2Seq,
        (
            concat(
                [r"(.*)_attn\.linears\.0\.(weight|bias)", *(rf"\1_attn.linears.{i}.\2" for i in (1, 2))],
                r"\1_attn.in_proj_\2",
            ),
            rename(
                (r"^(encoder|decoder)\.", r"transformer.\1."),
                (r"_attn\.linears\.3\.", "_attn.out_proj."),
                (r"\.src_attn\.", ".multihead_attn."),
                (r"\.feed_forward\.w_(\d)\.", r".linear\1."),
                (r"\.sublayer\.(\d)\.norm\.", lambda m: f".norm{int(m[1]) + 1}."),
                (r"^src_embed\.", "source."),
                (r"^tgt_embed\.", "target."),
                (r"^generator\.", "out."),
            ),
        ),
        _two,
        tags=_tags("transformer", "concat"),
    )
    return [
        bart,
        bart.reverse(insensitive=KEY_BIAS),
        textbook,
        textbook.reverse(insensitive=r"_attn\.linears\.1\.bias$"),
    ]


def _bert_layers() -> Pair:
    """Two classes of one library that differ in the code of their embeddings only."""
    return Pair(
        "bert/bert-to-roberta",
        partial(_hf, "BertModel", "BertConfig", **BERT),
        partial(_hf, "RobertaModel", "RobertaConfig", type_vocab_size=2, **BERT),
        (),
        lambda: ((), {"input_ids": _ids(), "position_ids": torch.arange(11)[None].expand(2, -1)}),
        source_sample=lambda: ((), {"input_ids": _ids()}),
        insensitive=KEY_BIAS,
        tags=_tags("bert", "identity"),
    )


def _ids() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 11))


def _whisper_classifier() -> Pair:
    whisper = Pair("", partial(_hf_whisper, "WhisperForConditionalGeneration"), Whisper, WHISPER_TO_OPENAI, _two)
    return Pair(
        "whisper/openai-to-transformers_classifier",
        Whisper,
        partial(_hf_whisper, "WhisperForAudioClassification"),
        (_Back(whisper), keep(r"^model\.encoder\."), rename((r"^model\.", ""))),
        lambda: ((), {"input_features": torch.randn(2, 20, 32)}),
        source_sample=lambda: ((torch.randn(2, 20, 32), torch.randint(3, VOCAB, (2, 9))), {}),
        source_call=_whisper_memory,
        target_call=input_of("projector"),
        new=r"^(projector|classifier)\.",
        tolerance=UPCAST,
        tags=_tags("whisper", "rename", "partial"),
    )


def _whisper_memory(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return module.encoder(args[0])


def _hf_whisper(model: str) -> nn.Module:
    return _hf(
        model,
        "WhisperConfig",
        vocab_size=96,
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


# Small classics -------------------------------------------------------------------------------------------------------
def classics() -> list[Pair]:
    mlp = Pair(
        "mlp/named-to-sequential",
        NamedMLP,
        SequentialMLP,
        (
            rename(
                (r"^fc_in\.", "net.0."),
                (r"^fc_out\.", "net.12."),
                (r"^fc(\d)\.", lambda m: f"net.{2 * int(m[1])}."),
            ),
        ),
        lambda: ((torch.randn(5, 20),), {}),
        tags=_tags("mlp", "rename"),
    )
    autoencoder = Pair(
        "autoencoder/named-to-sequential",
        NamedAutoencoder,
        Autoencoder,
        (
            rename(
                (r"^enc(\d)\.", lambda m: f"encoder.{2 * (int(m[1]) - 1)}."),
                (r"^dec(\d)\.", lambda m: f"decoder.{2 * (int(m[1]) - 1)}."),
            ),
        ),
        lambda: ((torch.randn(5, 40),), {}),
        tags=_tags("autoencoder", "rename", "reordered"),
    )
    mixer = Pair(
        "mixer/timm-to-convolutions",
        _mixer,
        ConvMixer,
        (
            rename(
                (r"^stem\.proj\.", "embed."),
                (r"^blocks\.", "layers."),
                (r"\.norm([12])\.", lambda m: f".norms.{int(m[1]) - 1}."),
                (r"\.mlp_tokens\.fc([12])\.", lambda m: f".across_places.{int(m[1]) - 1}."),
                (r"\.mlp_channels\.fc([12])\.", lambda m: f".across_channels.{int(m[1]) - 1}."),
                (r"^head\.", "classify."),
            ),
            add_axes(r"\.across_places\.\d\.weight$", 1),
        ),
        images(32),
        insensitive=r"(across_places\.1|mlp_tokens\.fc2)\.bias$",
        tags=_tags("mixer", "rename", "reshape", "reordered"),
    )
    return [p for pair in (mlp, autoencoder, mixer) for p in (pair, pair.reverse())]


def pairs() -> list[Pair]:
    """All pairs of this module, in a fixed order."""
    return [*library(), *language(), *classics()]
