"""The config of NX-AI's package `xlstm`: checked against what the tensors say, and written so that it builds our sizes.

Facts that follow from names and shapes are read from the tensors and only compared with the config. The rest comes from
the config: the activation, dropout, whether head and embedding are one. Without a config the peer's defaults hold.

D model width, U_m and U_f inner widths, H heads, J taps, P width of the blocks of q, k, v.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from openxlstm.checkpoint.fields import checked
from openxlstm.checkpoint.rules_nx import Backend, Variant
from openxlstm.models.checks import did_you_mean
from openxlstm.models.xlstm import xLSTMConfig, xLSTMStackConfig

NORM_EPS, EPS = 1e-5, 1e-6  # fixed in the peer's code

UP_PROJECTION = {"round_proj_up_to_multiple_of": 64, "round_proj_up_dim_up": True}
# Field: the peer's default. What a config leaves out means these.
MODEL = {
    "embedding_dim": 128, "num_blocks": 1, "slstm_at": [], "bias": False, "dropout": 0.0, "add_post_blocks_norm": True,
    "vocab_size": -1, "tie_weights": False, "add_embedding_dropout": False, "mlstm_block": None, "slstm_block": None,
}  # fmt: skip
MLSTM = {"num_heads": 4, "proj_factor": 2.0, "conv1d_kernel_size": 4, "qkv_proj_blocksize": 4, **UP_PROJECTION}
SLSTM: dict[str, Any] = {
    "num_heads": 4, "conv1d_kernel_size": 4, "group_norm_weight": True, "function": "slstm",
    "gradient_recurrent_cut": False, "gradient_recurrent_clipval": None, "forward_clipval": None,
}  # fmt: skip
FFN = {"proj_factor": 1.3, "act_fn": "gelu", "bias": False, "dropout": 0.0, "ff_type": "ffn_gated", **UP_PROJECTION}
M_BLOCK = {"mlstm": None}
S_BLOCK = {"slstm": None, "feedforward": None}
# Fields about a run, a machine or a first draw of weights, and copies that the peer makes of the model's own fields.
IGNORED = {
    "model": {"context_length", "weight_decay_on_embedding"},
    "mlstm": {"embedding_dim", "bias", "dropout", "context_length"},
    "slstm": {
        "embedding_dim", "hidden_size", "dropout", "backend", "batch_size", "input_shape", "internal_input_shape",
        "output_shape", "constants", "initial_val", "enable_automatic_mixed_precision", "bias_init", "num_states",
        "recurrent_weight_init", "num_gates", "dtype", "dtype_b", "dtype_r", "dtype_w", "dtype_g", "dtype_s", "dtype_a",
    },
    "feedforward": {"embedding_dim"},
    "mlstm_block": set(),
    "slstm_block": set(),
}  # fmt: skip
REFUSED = {  # field: (what it may be, why nothing else)
    "function": ("slstm", "only the sLSTM's cell exists here"),
    "gradient_recurrent_cut": (False, "it would train differently without a word"),
    "gradient_recurrent_clipval": (None, "it would train differently without a word"),
    "forward_clipval": (None, "it changes what the cell computes"),
    "act_fn": ("gelu", "no other activation exists in this feed-forward layer"),
    "ff_type": ("ffn_gated", "no other feed-forward layer exists"),
    "add_post_blocks_norm": (True, "a norm always stands before the head"),
}


def up_width(width: int, part: Mapping[str, Any]) -> int:
    """The peer's formula of an inner width, on floats."""
    multiple = part["round_proj_up_to_multiple_of"]
    blocks = part["proj_factor"] * width / multiple
    return int((math.ceil(blocks) if part["round_proj_up_dim_up"] else math.floor(blocks)) * multiple)


def read_part(data: Mapping[str, Any], defaults: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """One level of the config with the peer's defaults filled in, strictly.

    Raises:
        ValueError: an unknown field, a value of another kind, or one under which this library would compute something
            else.
    """
    for key in data:
        if key not in defaults and key not in IGNORED[kind] and not key.startswith("_"):
            raise ValueError(f"the config's {kind} has no field {key!r}{did_you_mean(key, defaults)}")
    found = {key: value for key, value in data.items() if key in defaults}
    part = {**defaults, **checked(found, defaults, f"the config's {kind}")}
    for key, (allowed, why) in REFUSED.items():
        if key in part and part[key] != allowed:
            raise ValueError(f"the config's {kind} says {key}={part[key]!r}; only {allowed!r} can be read: {why}")
    return part


def apply(
    given: Mapping[str, Any], facts: xLSTMStackConfig, variant: Variant
) -> tuple[dict[str, Any], bool, tuple[str, ...]]:
    """What only the config knows, after checking the rest of it against the tensors.

    Returns:
        fields to change in `facts`, whether head and embedding are said to be one tensor, and notes.

    Raises:
        ValueError: a field that is unknown, refused, or contradicts the tensors.
    """
    model = read_part(given, MODEL, "model")
    said: dict[str, Any] = {"embedding_dim": model["embedding_dim"], "num_blocks": model["num_blocks"]}
    true: dict[str, Any] = {"embedding_dim": facts.width, "num_blocks": len(facts.pattern)}
    if isinstance(facts, xLSTMConfig):
        said["vocab_size"], true["vocab_size"] = model["vocab_size"], facts.vocab_size
    said["slstm_at"] = _s_blocks(model)
    true["slstm_at"] = [index for index, kind in enumerate(facts.pattern) if kind == "s"]
    _check_agreement(said, true)  # first what says most: another model altogether
    if "m" in facts.pattern:
        block = _nested(model, "mlstm_block", M_BLOCK)
        part = read_part(_mapping(block["mlstm"], "mlstm"), MLSTM, "mlstm")
        said["mlstm num_heads"], true["mlstm num_heads"] = part["num_heads"], facts.heads
        said["mlstm conv1d_kernel_size"], true["mlstm conv1d_kernel_size"] = part["conv1d_kernel_size"], facts.conv
        said["qkv_proj_blocksize"], true["qkv_proj_blocksize"] = part["qkv_proj_blocksize"], facts.proj_block
        said["inner width of mlstm"], true["inner width of mlstm"] = up_width(facts.width, part), facts.U_m
        said["bias"], true["bias"] = model["bias"], variant.mlstm_bias
    notes = []
    if "s" in facts.pattern:
        block = _nested(model, "slstm_block", S_BLOCK)
        part = read_part(_mapping(block["slstm"], "slstm"), SLSTM, "slstm")
        said["slstm num_heads"], true["slstm num_heads"] = part["num_heads"], facts.heads
        said["slstm conv1d_kernel_size"], true["slstm conv1d_kernel_size"] = part["conv1d_kernel_size"], facts.conv
        said["group_norm_weight"], true["group_norm_weight"] = part["group_norm_weight"], variant.group_norm
        if block["feedforward"] is None:
            raise ValueError("the config says feedforward: null for its sLSTM blocks; ours always have one")
        ffn = read_part(_mapping(block["feedforward"], "feedforward"), FFN, "feedforward")
        said["inner width of feedforward"], true["inner width of feedforward"] = up_width(facts.width, ffn), facts.U_f
        said["feedforward bias"], true["feedforward bias"] = ffn["bias"], variant.ffn_bias
        if ffn["dropout"] != model["dropout"]:
            notes.append(
                f"dropout is {model['dropout']} in the blocks and {ffn['dropout']} in the feed-forward layers of the "
                f"peer; here it is {model['dropout']} in both, in training"
            )
    _check_agreement(said, true)
    if model["add_embedding_dropout"] and model["dropout"]:
        notes.append("the peer drops out parts of the embedding in training (add_embedding_dropout); this library not")
    return {"dropout": model["dropout"]}, model["tie_weights"], tuple(notes)


def _check_agreement(said: Mapping[str, Any], true: Mapping[str, Any]) -> None:
    for field, value in said.items():
        if value != true[field]:
            raise ValueError(f"the config says {field}={value!r}, and the tensors {true[field]!r}")


def _s_blocks(model: Mapping[str, Any]) -> list[int]:
    """Where the config puts its sLSTM blocks; as in Python, -1 is the last."""
    count = model["num_blocks"]
    if model["slstm_at"] == "all" or model["mlstm_block"] is None:
        return list(range(count))
    for index in model["slstm_at"]:
        if not -count <= index < count:
            raise ValueError(f"the config's model says slstm_at has block {index}, and num_blocks={count}")
    return sorted({index % count for index in model["slstm_at"]})


def _nested(model: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The config of one kind of block, of which the tensors have some."""
    if model[name] is None:
        raise ValueError(f"the config has no {name}, and the tensors have such blocks")
    return read_part(_mapping(model[name], name), defaults, name)


def _mapping(part: Any, name: str) -> Mapping[str, Any]:
    """A level of the config; the peer fills a missing one with its defaults."""
    if part is not None and not isinstance(part, Mapping):
        raise ValueError(f"the config's {name} must hold fields; got {part!r}")
    return part or {}


def to_nx_config(config: xLSTMConfig, backend: Backend) -> dict[str, Any]:
    """The peer's config as plain data, nested as its dataclasses are; its own formulas return our sizes.

    Raises:
        ValueError: what the peer cannot compute.
    """
    fixed = {"input_gate": "exp", "forget_gate": "sigmoid", "norm_eps": NORM_EPS, "eps": EPS}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"NX-AI's xlstm is built for {name}={value!r}; this model has {getattr(config, name)!r}")
    if config.conv == 0 and "m" in config.pattern:
        raise ValueError("NX-AI's xlstm cannot build an mLSTM block without a convolution, and this model has conv=0")
    mlstm = {
        "num_heads": config.heads, "conv1d_kernel_size": config.conv, "qkv_proj_blocksize": config.proj_block,
        **_up_projection(config.U_m, config.width),
    }  # fmt: skip
    slstm = {"num_heads": config.heads, "conv1d_kernel_size": config.conv, "backend": backend}
    ffn = {"bias": config.bias, "dropout": config.dropout, "act_fn": "gelu", **_up_projection(config.U_f, config.width)}
    s_blocks = [index for index, kind in enumerate(config.pattern) if kind == "s"]
    return {
        "vocab_size": config.vocab_size,
        "embedding_dim": config.width,
        "num_blocks": len(config.pattern),
        "slstm_at": s_blocks,
        "bias": config.bias,
        "dropout": config.dropout,
        "tie_weights": config.tie_embeddings,
        "context_length": 2048,  # the peer needs one, for its mask; it is no property of the weights
        **({"mlstm_block": {"mlstm": mlstm}} if "m" in config.pattern else {}),
        **({"slstm_block": {"slstm": slstm, "feedforward": ffn}} if s_blocks else {}),
    }


def _up_projection(size: int, width: int) -> dict[str, Any]:
    """Fields from which `up_width` returns exactly `size`."""
    multiple = 64 if size % 64 == 0 else 1
    part = {"proj_factor": size / width, "round_proj_up_to_multiple_of": multiple, "round_proj_up_dim_up": True}
    if up_width(width, part) != size:  # a unit of the last place too high
        part["proj_factor"] = math.nextafter(size / width, 0.0)
    assert up_width(width, part) == size, f"no factor makes {size} out of {width}"
    return part
