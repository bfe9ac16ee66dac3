"""A block splits along the style that each parameter declares: widths and head counts come from shapes."""

from __future__ import annotations

import pytest
import torch

from jinn.models.config import hf_fields
from jinn.models.deepseek_v3 import DeepseekV3
from jinn.models.llama import Llama
from jinn.models.parameters import tree
from jinn.models.qwen2 import Qwen2
from jinn.models.qwen3 import Qwen3
from jinn.models.qwen3_next import Qwen3Next
from jinn.ops.protocol import Context
from jinn.ops.reference import ReferenceOps, tensor_batch
from native.programs import packed_sequences

from .transformers_models import HYBRID, MLA, SHARED_EXPERT, SMALL

OPS = ReferenceOps()
ALL_FULL = {**HYBRID, "layer_types": ["full_attention"] * 4}
CONTEXT = Context(tensor_batch(packed_sequences([(range(20), 20), (range(7), 7)])))


def split(parameters, specs, rank, num_ranks):
    """One rank's share: rows of "column" parameters, columns of "row" ones, and the rest whole."""
    shares = {}
    for name, values in parameters.items():
        style = specs[name].parallel
        if style == "column":
            shares[name] = values.chunk(num_ranks, dim=0)[rank]
        elif style == "row":
            shares[name] = values.chunk(num_ranks, dim=1)[rank]
        elif name.endswith(".bias"):  # of a row-parallel linear: added once to the sum
            shares[name] = values if rank == 0 else torch.zeros_like(values)
        else:
            shares[name] = values
    return shares


MODELS = {
    "llama": Llama.from_config(hf_fields(SMALL)),
    "llama biased": Llama.from_config(hf_fields({**SMALL, "attention_bias": True, "mlp_bias": True})),
    "qwen2": Qwen2.from_config(hf_fields(SMALL)),
    "qwen3": Qwen3.from_config(hf_fields(SMALL)),
}
GATED_AND_LATENT = {
    "qwen3_next": Qwen3Next.from_config(hf_fields({**SMALL, **SHARED_EXPERT, **ALL_FULL})),
    "deepseek_v3": DeepseekV3.from_config(hf_fields({**SMALL, **MLA})),
}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", GATED_AND_LATENT)
def test_the_shares_of_gated_and_latent_attention_add_up(num_ranks, name):
    model = GATED_AND_LATENT[name]
    specs = {name: spec for name, spec in model.parameters().items() if "layers.0.self_attn." in name}
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.randn(spec.shape, generator=generator) / 8 for name, spec in specs.items()}
    x = torch.randn(27, model.hidden_size, generator=generator)
    shares = [
        model.attention(
            OPS, tree(split(parameters, specs, rank, num_ranks)).model.layers[0].self_attn, x, CONTEXT
        )
        for rank in range(num_ranks)
    ]
    whole = model.attention(OPS, tree(parameters).model.layers[0].self_attn, x, CONTEXT)
    torch.testing.assert_close(sum(shares), whole, rtol=1e-4, atol=1e-5)
    assert num_ranks == 1 or (shares[0] - whole).abs().max() > 1e-2


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_the_shares_of_a_block_add_up(num_ranks, name):
    model = MODELS[name]
    specs = {name: spec for name, spec in model.parameters().items() if name.startswith("model.layers.0.")}
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.randn(spec.shape, generator=generator) / 8 for name, spec in specs.items()}
    x = torch.randn(27, model.hidden_size, generator=generator)

    def attention(params):
        return model.attention(OPS, tree(params).model.layers[0].self_attn, x, CONTEXT)

    def mlp(params):
        return model.mlp(OPS, tree(params).model.layers[0].mlp, x, CONTEXT)

    for part in (attention, mlp):
        whole = part(parameters)
        shares = [part(split(parameters, specs, rank, num_ranks)) for rank in range(num_ranks)]
        torch.testing.assert_close(sum(shares), whole, rtol=1e-5, atol=1e-5)
        if num_ranks > 1:
            assert (shares[0] - whole).abs().max() > 1e-2


def test_every_matrix_of_a_block_is_split():
    styles = {name.split(".")[-2]: spec.parallel for name, spec in MODELS["llama"].parameters().items()}
    assert styles == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "column"),
        **dict.fromkeys(("o_proj", "down_proj"), "row"),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm", "norm"), "replicated"),
        **dict.fromkeys(("embed_tokens", "lm_head"), "replicated"),
    }
