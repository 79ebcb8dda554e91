"""The config.json of Hugging Face folders, as plain data: what it says, and which native config it means.

Two dialects. model_type "openxlstm" is ours and carries both architectures under our native names, with the common
names of transformers beside them. model_type "xlstm" is the in-tree model of transformers, the 7B architecture only;
its fields are listed in transformers 5.23, `models/xlstm/configuration_xlstm.py`.

Where a file says one thing twice (hidden_size and width, hidden_size and embedding_dim), both must agree. Fields about
a machine are not about a model, and are ignored: MACHINE_FIELDS. No transformers here: `openxlstm.hf` imports this.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any

from openxlstm.checkpoint.fields import checked
from openxlstm.models.checks import did_you_mean
from openxlstm.models.xlstm import xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig

Config = xLSTMConfig | xLSTMLargeConfig

OURS, IN_TREE = "openxlstm", "xlstm"  # values of model_type

ARCHITECTURES: dict[str, type[Config]] = {"xlstm": xLSTMConfig, "xlstm_large": xLSTMLargeConfig}

COMMUNITY_KEYS = ("xlstm_cfg", "mlstm_block", "slstm_block", "slstm_at")  # nested configs of custom code on the hub

MACHINE_FIELDS = (  # in-tree fields about how to run a model; reading them changes nothing
    "chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "chunk_size", "return_last_states",
    "autocast_kernel_dtype", "inference_state_dtype", "norm_reduction_force_float32", "max_inference_chunksize",
    "weight_mode", "use_cache",
)  # fmt: skip

IN_TREE_DEFAULTS: dict[str, Any] = {  # what the in-tree class assumes for a fact that a file leaves out
    "vocab_size": 50304, "num_heads": 8, "use_bias": False, "tie_word_embeddings": False, "add_out_norm": True,
    "norm_eps": 1e-6, "qk_dim_factor": 0.5, "v_dim_factor": 1.0, "eps": 1e-6, "ffn_proj_factor": 2.667,
    "ffn_round_up_to_multiple_of": 64, "gate_soft_cap": 15.0, "output_logit_soft_cap": 30.0,
}  # fmt: skip
SIZES = {"embedding_dim": 1, "num_blocks": 1}  # whole numbers without a default
ALIASES = {"hidden_size": "embedding_dim", "num_hidden_layers": "num_blocks"}  # two in-tree names for one fact

NATIVE_KERNELS = {  # the published 7B file names Triton kernels, which need a GPU; these run everywhere
    "chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native",
    "step_kernel": "native", "mode": "inference", "chunk_size": 64, "return_last_states": True,
    "autocast_kernel_dtype": "bfloat16", "inference_state_dtype": "float32", "norm_reduction_force_float32": True,
    "weight_mode": "single", "use_cache": True, "max_inference_chunksize": 16384,
}  # fmt: skip


def to_hf_config(
    config: Config,
    *,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
) -> dict[str, Any]:
    """config.json of model_type "openxlstm": every native field under its native name, then the common names."""
    blocks = len(config.pattern) if isinstance(config, xLSTMConfig) else config.blocks
    return {
        "model_type": OURS,
        "architecture": "xlstm" if isinstance(config, xLSTMConfig) else "xlstm_large",
        **config.to_dict(),
        "hidden_size": config.width,
        "num_hidden_layers": blocks,
        "num_heads": config.heads,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": pad_token_id,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
    }


def to_in_tree_config(
    config: xLSTMLargeConfig,
    *,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
) -> dict[str, Any]:
    """config.json of model_type "xlstm", which transformers' own xLSTM reads; runs without a GPU.

    Factors are chosen so that the peer's own formulas return our sizes.

    Raises:
        ValueError: the model has gates that the in-tree class does not know.
    """
    facts = large_facts(config)
    return {
        "architectures": ["xLSTMForCausalLM"],
        "model_type": IN_TREE,
        "hidden_size": config.width,
        "num_hidden_layers": config.blocks,
        **facts,
        **NATIVE_KERNELS,
        "tie_word_embeddings": config.tie_embeddings,
        "pad_token_id": pad_token_id,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
    }


def large_facts(config: xLSTMLargeConfig) -> dict[str, Any]:
    """The facts of a large model under the names that `xlstm_large` and transformers share.

    Raises:
        ValueError: gates that neither of them knows.
    """
    if (config.input_gate, config.forget_gate) != ("exp", "sigmoid"):
        raise ValueError(
            f"the peers know input_gate='exp' with forget_gate='sigmoid' only; this model has {config.input_gate!r} "
            f"and {config.forget_gate!r}. Keep it in our own layout"
        )
    multiple = 64 if config.U_f % 64 == 0 else 1
    return {
        "embedding_dim": config.width,
        "num_blocks": config.blocks,
        "num_heads": config.heads,
        "vocab_size": config.vocab_size,
        "use_bias": False,
        "norm_eps": config.norm_eps,
        "add_out_norm": True,
        "qk_dim_factor": _factor(config.QK, config.width, 0),
        "v_dim_factor": _factor(config.HV, config.width, 0),
        "ffn_proj_factor": _factor(config.U_f, config.width, multiple),
        "ffn_round_up_to_multiple_of": multiple,
        "gate_soft_cap": config.gate_soft_cap,
        "output_logit_soft_cap": config.logit_soft_cap,
        "eps": config.eps,
    }


def from_hf_config(data: Mapping[str, Any], *, ffn_width: int | None = None) -> Config:
    """The native config that a config.json means, of either dialect.

    Sizes of an in-tree file follow the in-tree formulas, as the in-tree class would build it; a converter that has the
    tensors checks them against these.

    Args:
        ffn_width: what the tensors of an in-tree file say, where they are known; see `large_from_facts`.

    Raises:
        ValueError: another model type, custom code's nested config, a missing fact, or two that contradict each other.
    """
    kind = data.get("model_type")
    if kind == OURS:
        return _from_ours(data)
    if kind != IN_TREE:
        raise ValueError(f"config.json has model_type {kind!r}; this library reads {OURS!r} and {IN_TREE!r}")
    if nested := [key for key in COMMUNITY_KEYS if key in data]:
        raise ValueError(
            f"config.json says model_type 'xlstm' but holds {', '.join(nested)}: a checkpoint of custom code from "
            f"before transformers had an xLSTM. Its keys are {', '.join(sorted(data))}"
        )
    return _from_in_tree(data, ffn_width)


def _from_ours(data: Mapping[str, Any]) -> Config:
    """Every native field must be there, so a misspelt one is noticed; what else transformers keeps is ignored."""
    architecture = data.get("architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(f"config.json must name its architecture, one of xlstm, xlstm_large; it says {architecture!r}")
    cls = ARCHITECTURES[architecture]
    fields = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in data:
            raise ValueError(f"config.json lacks {name!r}{did_you_mean(name, set(data) - set(fields))}")
    native = cls.from_dict({name: data[name] for name in fields})
    said = to_hf_config(native)
    for common in ("hidden_size", "num_hidden_layers", "num_heads", "tie_word_embeddings"):
        if data.get(common) is not None and data[common] != said[common]:
            raise ValueError(
                f"config.json contradicts itself: {common} is {data[common]!r}, and the fields of openxlstm make it "
                f"{said[common]!r}"
            )
    return native


def _from_in_tree(data: Mapping[str, Any], ffn_width: int | None) -> xLSTMLargeConfig:
    """Facts by their in-tree names and defaults, two names for one fact checked against each other."""
    known = {*IN_TREE_DEFAULTS, *ALIASES, *ALIASES.values()}
    facts = IN_TREE_DEFAULTS | {key: data[key] for key in IN_TREE_DEFAULTS if data.get(key) is not None}
    for name, alias in ALIASES.items():
        first, second = data.get(name), data.get(alias)
        if first is None and second is None:
            raise ValueError(f"config.json lacks {name!r}{did_you_mean(name, set(data) - known)}")
        if first is not None and second is not None and first != second:
            raise ValueError(
                f"config.json contradicts itself: {name} is {first!r} and {alias}, its other name, is {second!r}"
            )
        facts[name] = second if first is None else first
    for name in sorted(IN_TREE_DEFAULTS.keys() - data.keys()):
        if near := difflib.get_close_matches(name, data.keys() - known - set(MACHINE_FIELDS), n=1, cutoff=0.85):
            raise ValueError(f"config.json has no field {near[0]!r}; did you mean {name!r}?")
    facts |= {"embedding_dim": facts["hidden_size"], "num_blocks": facts["num_hidden_layers"]}
    return large_from_facts(facts, ffn_width=ffn_width)


def large_from_facts(facts: Mapping[str, Any], *, ffn_width: int | None = None) -> xLSTMLargeConfig:
    """The native config of facts named as in `large_facts`, widths by the peers' formulas unless a tensor says one.

    Args:
        facts: complete; `tie_word_embeddings` may be absent.
        ffn_width: what the tensors say, which counts: the factor is a recipe, and peers round it differently.

    Raises:
        ValueError: a value that is no size or factor; biases or a missing last norm, which this model has not; a width
            that is no width of the factor.
    """
    facts = checked(facts, SIZES | IN_TREE_DEFAULTS, "the config")
    if facts["use_bias"]:
        raise ValueError("use_bias is true; xLSTMLarge has no biases but those of the gates, as every published model")
    if not facts["add_out_norm"]:
        raise ValueError(
            "add_out_norm is false; xLSTMLarge always has a norm before its head, as every published model"
        )
    D, multiple = facts["embedding_dim"], facts["ffn_round_up_to_multiple_of"]
    peer = peer_width(D, facts["ffn_proj_factor"], multiple)
    exact = math.ceil(round(D * facts["ffn_proj_factor"] / multiple, 6)) * multiple
    if ffn_width is not None and ffn_width not in (peer, exact):
        raise ValueError(
            f"ffn_proj_factor={facts['ffn_proj_factor']} at width {D} means a feed-forward width of {peer}; "
            f"the tensors have {ffn_width}"
        )
    return xLSTMLargeConfig(
        vocab_size=facts["vocab_size"],
        width=D,
        blocks=facts["num_blocks"],
        heads=facts["num_heads"],
        qk_width=int(D * facts["qk_dim_factor"]),
        v_width=int(D * facts["v_dim_factor"]),
        ffn_width=peer if ffn_width is None else ffn_width,
        gate_soft_cap=facts["gate_soft_cap"],
        logit_soft_cap=facts["output_logit_soft_cap"],
        tie_embeddings=facts.get("tie_word_embeddings", False),
        norm_eps=facts["norm_eps"],
        eps=facts["eps"],
    )


def peer_width(width: int, factor: float, multiple: int) -> int:
    """The formula of both peers, on floats; at times it is `multiple` below the true ceiling."""
    return int((width * factor + multiple - 1) // multiple * multiple)


def _factor(size: int, width: int, multiple: int) -> float:
    """A factor from which the peers' formulas return exactly `size`; multiple 0: they truncate without rounding up."""
    factor = size / width
    for _ in range(4):  # a quotient is within half a unit of the last place, so its neighbour is enough
        got = peer_width(width, factor, multiple) if multiple else int(width * factor)
        if got == size:
            return factor
        factor = math.nextafter(factor, math.inf if got < size else 0.0)
    raise AssertionError(f"no factor makes {size} out of {width}")
