"""Public models of ``transformers``, tiny and trained here, against the hostile spelling of the same function."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gauntlet.truth import Tensors
from benchmarks.proof.text import FAMILIES, Family, hostile_state

_ATTENTION = r"self_attn\.([qkvo]_(?:proj|norm))"
_NAMES: dict[str, list[tuple[str, str]]] = {  # from the public names to those of the usual spelling
    "gpt2": [
        (r"^net\.transformer\.wte", "embed_tokens"),
        (r"^net\.transformer\.wpe", "embed_positions"),
        (r"^net\.transformer\.ln_f", "final_norm"),
        (r"^net\.transformer\.h", "layers"),
        (r"\.ln_1\.", ".input_norm."),
        (r"\.ln_2\.", ".pre_mlp_norm."),
        (r"\.attn\.c_proj", ".attention.o_proj"),
        (r"\.mlp\.c_fc", ".mlp.fc1"),
        (r"\.mlp\.c_proj", ".mlp.fc2"),
    ],
    "llama": [
        (r"input_layernorm", "input_norm"),
        (r"post_attention_layernorm", "pre_mlp_norm"),
        (_ATTENTION, r"attention.\1"),
    ],
    "olmo2": [
        (r"post_attention_layernorm", "post_attention_norm"),
        (r"post_feedforward_layernorm", "post_mlp_norm"),
        (_ATTENTION, r"attention.\1"),
    ],
    "mixtral": [
        (r"input_layernorm", "input_norm"),
        (r"post_attention_layernorm", "pre_mlp_norm"),
        (_ATTENTION, r"attention.\1"),
        (r"mlp\.gate\.", "mlp.router."),
    ],
}
KINDS = tuple(_NAMES)


class Public(nn.Module):
    """A causal language model of ``transformers`` that takes ids and gives scores."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net = _build(kind, FAMILIES[kind])

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(input_ids=ids, use_cache=False).logits


def _build(kind: str, family: Family) -> nn.Module:
    import transformers

    f = family
    if kind == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=f.vocabulary,
            n_positions=f.context,
            n_embd=f.width,
            n_layer=f.blocks,
            n_head=f.heads,
            n_inner=f.inner,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
        )
        return transformers.GPT2LMHeadModel(config)
    name = {"llama": "Llama", "olmo2": "Olmo2", "mixtral": "Mixtral"}[kind]
    more = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "mixtral" else {}
    config = getattr(transformers, f"{name}Config")(
        vocab_size=f.vocabulary,
        hidden_size=f.width,
        intermediate_size=f.inner,
        num_hidden_layers=f.blocks,
        num_attention_heads=f.heads,
        num_key_value_heads=f.keys,
        max_position_embeddings=f.context,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=False,
        pad_token_id=None,
        **more,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config)


def public_state(kind: str, state: Tensors) -> Tensors:
    """The truth: the public tensors in the hostile spelling."""
    usual: Tensors = {}
    for public, value in state.items():
        name = public
        for pattern, ours in _NAMES[kind]:
            name = re.sub(pattern, ours, name)
        name = name.removeprefix("net.").removeprefix("model.")
        name = f"final_{name}" if name.startswith("norm.") else name
        if kind == "gpt2" and value.dim() == 2 and ".attn.c_attn" not in name and "layers." in name:
            value = value.T
        if ".attn.c_attn." in name:
            stem, _, leaf = name.partition(".attn.c_attn.")
            parts = (value.T if value.dim() == 2 else value).chunk(3)
            usual |= {f"{stem}.attention.{n}_proj.{leaf}": part for n, part in zip("qkv", parts)}
        elif name.endswith("experts.gate_up_proj"):
            for k, both in enumerate(value):
                gate, up = both.chunk(2)
                stem = name.removesuffix("gate_up_proj")
                usual |= {f"{stem}{k}.gate_proj.weight": gate, f"{stem}{k}.up_proj.weight": up}
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            usual |= {f"{stem}{k}.down_proj.weight": one for k, one in enumerate(value)}
        else:
            usual[name] = value
    return hostile_state(FAMILIES[kind], {name: torch.as_tensor(value) for name, value in usual.items()})
