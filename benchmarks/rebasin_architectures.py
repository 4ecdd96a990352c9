"""How many public architectures get a right permutation spec, how much of them it covers, and how long it takes.

    python benchmarks/rebasin_architectures.py --out benchmarks/results/rebasin_architectures.json
    python benchmarks/rebasin_architectures.py --only resnet50 llama

For every architecture, randomly initialised: infer the spec from one forward pass (timed, not verified), then apply
three random elements of the *whole* group to float64 weights whose biases, gains and statistics were perturbed, and
compare the outputs. ``kept`` means: all groups at once, nothing dropped, relative difference below 1e-5. ``coverage``
is the share of the elements of the parameters *that the forward pass uses* which some group moves; parameters that are
not used (auxiliary heads in evaluation mode) cannot be permuted meaningfully and are left out, all others count, also
those that no permutation could move (a class bias, a scalar).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import torchvision_guard  # noqa: F401, I001
import torch
from torch import nn

from lit_wsl.rebasin import PermutationSpec, infer_permutation_spec, verify_permutation_spec

TORCHVISION = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "vgg11",
    "vgg16",
    "vgg16_bn",
    "alexnet",
    "squeezenet1_0",
    "densenet121",
    "densenet169",
    "googlenet",
    "inception_v3:299",
    "shufflenet_v2_x0_5",
    "shufflenet_v2_x1_0",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "mnasnet0_5",
    "mnasnet1_0",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "regnet_x_400mf",
    "regnet_y_400mf",
    "convnext_tiny",
    "swin_t",
    "swin_v2_t",
    "maxvit_t",
    "vit_b_16",
    "vit_b_32",
]

TIMM = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_relpos_small_patch16_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "crossvit_9_240:240",
    "pit_xs_224",
    "convit_tiny",
    "levit_128s",
    "tiny_vit_5m_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256:256",
    "swinv2_cr_tiny_224",
    "twins_svt_small",
    "twins_pcpvt_small",
    "gcvit_xxtiny",
    "davit_tiny",
    "focalnet_tiny_srf",
    "hiera_tiny_224",
    "mvitv2_tiny",
    "nextvit_small",
    "volo_d1_224",
    "visformer_tiny",
    "tnt_s_patch16_224",
    "nest_tiny",
    "coatnet_nano_rw_224",
    "maxvit_nano_rw_256:256",
    "coat_lite_tiny",
    "pvt_v2_b0",
    "poolformer_s12",
    "caformer_s18",
    "convformer_s18",
    "mixer_s32_224",
    "gmixer_12_224",
    "gmlp_ti16_224",
    "resmlp_12_224",
    "sequencer2d_s",
    "convmixer_768_32",
    "convnextv2_atto",
    "convnext_atto",
    "inception_next_atto",
    "mambaout_femto",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "fastvit_t8:256",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "efficientvit_b0",
    "efficientvit_m0",
    "repvit_m0_9",
    "starnet_s1",
    "mobileone_s0",
    "mobilenetv4_conv_small",
    "hgnetv2_b0",
    "ghostnet_050",
    "ghostnetv2_100",
    "repghostnet_050",
    "lcnet_050",
    "tinynet_e",
    "mixnet_s",
    "fbnetc_100",
    "hardcorenas_a",
    "rexnet_100",
    "regnetz_005",
    "res2net50_26w_4s",
    "resnest14d",
    "skresnet18",
    "seresnet18",
    "dpn48b",
    "dla34",
    "hrnet_w18_small",
    "ese_vovnet19b_dw",
    "nf_regnet_b0",
    "eca_nfnet_l0",
    "dm_nfnet_f0",
    "resnetv2_50",
    "cspresnet50",
    "cspdarknet53",
    "selecsls42b",
    "xception41",
    "inception_v4:299",
    "inception_resnet_v2",
    "halonet26t:256",
    "botnet26t_256:256",
    "lambda_resnet26t:256",
    "vit_small_patch14_dinov2:518",
    "naflexvit_base_patch16_gap",
    "swiftformer_xs",
    "shvit_s1",
    "rdnet_tiny",
    "bat_resnext26ts:256",
]


@dataclass(frozen=True)
class Case:
    """One architecture with one sample call."""

    name: str
    library: str
    build: Callable[[], nn.Module]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    outputs: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of one architecture."""

    name: str
    library: str
    kept: bool
    coverage: float = 0.0
    groups: int = 0
    nested: int = 0
    infer_seconds: float = 0.0
    infer_cpu_seconds: float = 0.0  # of this process: what the wall clock shows on one quiet core
    verify_seconds: float = 0.0
    difference: float = float("nan")
    dropped: tuple[str, ...] = ()
    error: str = ""


def vision_cases() -> Iterator[Case]:
    import timm
    import torchvision.models as models

    for entry in TORCHVISION:
        name, _, size = entry.partition(":")
        image = torch.randn(1, 3, int(size or 224), int(size or 224))
        yield Case(name, "torchvision", lambda name=name: models.get_model(name, weights=None), (image,))
    for entry in TIMM:
        name, _, size = entry.partition(":")
        image = torch.randn(1, 3, int(size or 224), int(size or 224))
        yield Case(name, "timm", lambda name=name: timm.create_model(name), (image,))


def language_cases() -> Iterator[Case]:
    import transformers as hf

    tokens = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "vocab_size": 99,
        "max_position_embeddings": 64,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    grouped = {**small, "num_key_value_heads": 2}
    seq2seq = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "vocab_size": 99,
        "decoder_start_token_id": 1,
        **special,
    }
    vision = {"image_size": 32, "patch_size": 8}
    read = {"input_ids": tokens}
    write = {"input_ids": tokens, "use_cache": False}
    both = {"input_ids": tokens, "decoder_input_ids": tokens, "use_cache": False}
    pixels = {"pixel_values": torch.randn(1, 3, 32, 32)}
    speech = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": tokens, "use_cache": False}
    gpt2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 99, "n_positions": 64, **special}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 99, **special}
    t5["decoder_start_token_id"] = 0
    whisper = {**seq2seq, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 30}
    segformer = {
        "hidden_sizes": [8, 16, 24, 32],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 32,
    }
    phi = {**small, "partial_rotary_factor": 0.5}
    causal = [
        ("GPT-2", "GPT2", "GPT2LMHeadModel", gpt2),
        ("GPT-NeoX", "GPTNeoX", "GPTNeoXForCausalLM", small),
        ("Llama (grouped queries)", "Llama", "LlamaForCausalLM", grouped),
        ("Mistral (grouped queries)", "Mistral", "MistralForCausalLM", grouped),
        ("Qwen2", "Qwen2", "Qwen2ForCausalLM", grouped),
        ("Qwen3", "Qwen3", "Qwen3ForCausalLM", {**grouped, "head_dim": 8}),
        ("Gemma", "Gemma", "GemmaForCausalLM", {**grouped, "head_dim": 8}),
        ("Gemma 2", "Gemma2", "Gemma2ForCausalLM", {**grouped, "head_dim": 8}),
        ("Phi", "Phi", "PhiForCausalLM", phi),
        ("Phi-3", "Phi3", "Phi3ForCausalLM", {**grouped, **special}),
        ("OPT", "OPT", "OPTForCausalLM", {**small, "ffn_dim": 48, "word_embed_proj_dim": 32, **special}),
        ("Mixtral", "Mixtral", "MixtralForCausalLM", {**grouped, "num_local_experts": 4}),
        (
            "Qwen2-MoE",
            "Qwen2Moe",
            "Qwen2MoeForCausalLM",
            {**grouped, "num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
        ),
        ("OLMo 2", "Olmo2", "Olmo2ForCausalLM", {**grouped, **special}),
    ]
    masked = [
        ("BERT", "Bert", "BertForMaskedLM", small),
        ("RoBERTa", "Roberta", "RobertaForMaskedLM", small),
        (
            "DistilBERT",
            "DistilBert",
            "DistilBertForMaskedLM",
            {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2, "vocab_size": 99},
        ),
        ("ELECTRA", "Electra", "ElectraForMaskedLM", {**small, "embedding_size": 16}),
        (
            "DeBERTa v2",
            "DebertaV2",
            "DebertaV2ForMaskedLM",
            {**small, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        ),
        ("ModernBERT", "ModernBert", "ModernBertForMaskedLM", {**small, **special}),
    ]
    seq = [
        ("T5", "T5", "T5ForConditionalGeneration", t5, both),
        ("BART", "Bart", "BartForConditionalGeneration", {**seq2seq, "max_position_embeddings": 64}, both),
        ("Whisper", "Whisper", "WhisperForConditionalGeneration", whisper, speech),
    ]
    images = [
        ("ViT", "ViT", "ViTForImageClassification", {**small, **vision}, pixels),
        ("DINOv2", "Dinov2", "Dinov2ForImageClassification", {**small, **vision}, pixels),
        (
            "Segformer",
            "Segformer",
            "SegformerForSemanticSegmentation",
            segformer,
            {"pixel_values": torch.randn(1, 3, 64, 64)},
        ),
    ]

    def make(config: str, model: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
        return lambda: getattr(hf, model)(getattr(hf, f"{config}Config")(**options))

    def logits(output: Any) -> Any:
        return output.logits

    for name, config, model, options in causal:
        yield Case(name, "transformers", make(config, model, options), (), write, logits)
    for name, config, model, options in masked:
        yield Case(name, "transformers", make(config, model, options), (), read, logits)
    for name, config, model, options, call in [*seq, *images]:
        yield Case(name, "transformers", make(config, model, options), (), call, logits)
    tower = {k: small[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")}
    clip = {
        "text_config": {**small, **special, "projection_dim": 24},
        "vision_config": {**tower, **vision, "projection_dim": 24},
        "projection_dim": 24,
    }
    yield Case(
        "CLIP",
        "transformers",
        lambda: hf.CLIPModel(hf.CLIPConfig(**clip)),
        (),
        {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 32, 32)},
        lambda output: (output.logits_per_image, output.logits_per_text),
    )


def clip_cases() -> Iterator[Case]:
    import open_clip

    image = torch.randn(1, 3, 224, 224)
    text = torch.randint(0, 49408, (1, 77), generator=torch.Generator().manual_seed(0))
    for name in ("ViT-B-32", "ViT-L-14"):
        yield Case(f"{name} visual", "open_clip", lambda n=name: open_clip.create_model(n).visual, (image,))
        yield Case(f"{name} text", "open_clip", lambda n=name: TextTower(open_clip.create_model(n)), (text,))


class TextTower(nn.Module):
    """The text half of a CLIP model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.model.visual = None

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.model.encode_text(text)


def used_coverage(spec: PermutationSpec) -> float:
    """Share of the elements of the parameters that the forward pass uses which some group moves."""
    total = moved = 0.0
    for name in spec.parameters:
        if any(reason.startswith("not used") for reason in spec.frozen.get(name, {}).values()):
            continue
        size = float(torch.Size(spec.shapes[name]).numel())
        total, moved = total + size, moved + size * spec.touched_share(name)
    return moved / total if total else 0.0


def measure(case: Case) -> Row:
    torch.manual_seed(0)
    try:
        model = case.build()
        begin, cpu = time.perf_counter(), time.process_time()
        spec = infer_permutation_spec(model, case.args, case.kwargs, outputs=case.outputs, verify=False)
        middle, cpu = time.perf_counter(), time.process_time() - cpu
        found = verify_permutation_spec(spec, model, case.args, case.kwargs, outputs=case.outputs, risk=0.25)
        end = time.perf_counter()
    except Exception as error:
        return Row(case.name, case.library, kept=False, error=f"{type(error).__name__}: {error}"[:300])
    return Row(
        case.name,
        case.library,
        kept=found.ok and found.difference < 1e-5,
        coverage=used_coverage(found.spec),
        groups=len(found.spec.groups),
        nested=sum(group.parent is not None for group in found.spec.groups.values()),
        infer_seconds=middle - begin,
        infer_cpu_seconds=cpu,
        verify_seconds=end - middle,
        difference=found.difference,
        dropped=found.dropped,
    )


def measure_small(case: Case) -> Row:
    """The same on a smaller image, unless the model does not take it."""
    if case.args and case.args[0].ndim == 4:
        row = measure(replace(case, args=(case.args[0][..., :64, :64],)))
        if not row.error:
            return row
    return measure(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="parts of names; default: all")
    parser.add_argument("--library", nargs="*", help="torchvision, timm, transformers, open_clip; default: all")
    parser.add_argument("--out", type=Path, help="JSON file for the rows, written after each; replaced by name")
    parser.add_argument("--missing", action="store_true", help="only what --out has no kept row of")
    parser.add_argument("--fast", action="store_true", help="small images where a model takes them (for development)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    measure(Case("warm-up", "", lambda: nn.Linear(2, 2), (torch.randn(1, 2),)))
    known: list[Row] = []
    if options.out and options.out.exists():
        known = [Row(**row) for row in json.loads(options.out.read_text())["rows"]]
    rows: list[Row] = []
    for cases in (language_cases, vision_cases, clip_cases):
        for case in cases():
            if options.missing and any(key(row) == key(case) and row.kept for row in known):
                continue
            if options.library and case.library not in options.library:
                continue
            if options.only and not any(part.lower() in case.name.lower() for part in options.only):
                continue
            row = measure_small(case) if options.fast else measure(case)
            rows.append(row)
            state = "kept  " if row.kept else "FAILED" if row.error else "DROPPED"
            print(
                f"{state} {row.library:12} {row.name:32} {row.groups:4} groups ({row.nested} nested) "
                f"{row.coverage:7.2%} infer {row.infer_seconds:5.2f} s ({row.infer_cpu_seconds:5.2f} s cpu), "
                f"difference {row.difference:.1e} "
                f"{row.error}{' '.join(row.dropped[:3])}",
                flush=True,
            )
            known = [old for old in known if key(old) != key(row)] + [row]
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                data = {"torch": torch.__version__, "threads": options.threads, "rows": [asdict(row) for row in known]}
                options.out.write_text(json.dumps(data, indent=1) + "\n")
    report(known if options.missing else rows)


def key(one: Case | Row) -> tuple[str, str]:
    return one.library, one.name


def report(rows: list[Row]) -> None:
    for name, libraries in (
        ("torchvision + timm", {"torchvision", "timm"}),
        ("transformers", {"transformers"}),
        ("open_clip", {"open_clip"}),
    ):
        some = [row for row in rows if row.library in libraries]
        if not some:
            continue
        covered = sum(row.coverage >= 0.95 for row in some)
        times = [row.infer_seconds for row in some if not row.error]
        cpu = [row.infer_cpu_seconds for row in some if not row.error]
        print(
            f"{name}: function kept on {sum(row.kept for row in some)} of {len(some)}, at least 95 % covered on "
            f"{covered}, inference median {statistics.median(times or [0]):.2f} s, longest {max(times or [0]):.2f} s; "
            f"processor time median {statistics.median(cpu or [0]):.2f} s, longest {max(cpu or [0]):.2f} s"
        )


if __name__ == "__main__":
    main()
