"""What a folder of each layout consists of beside its numbers: rules, config, and how its shards are called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from openxlstm.checkpoint import config_large, config_nx, hf_layout, rules_hf, rules_large, rules_nx
from openxlstm.checkpoint.forms import Rule
from openxlstm.checkpoint.hf_layout import Config
from openxlstm.checkpoint.plan import identity
from openxlstm.checkpoint.rules_nx import Backend, Variant
from openxlstm.models.xlstm import xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig


@dataclass(frozen=True, slots=True)
class Target:
    """A folder to be written."""

    rules: tuple[Rule, ...]
    config_name: str
    config_text: str
    given: dict[str, Any] | None  # the config to read it back with, so that verifying needs no YAML reader
    read_as: Config  # what reading it back must give
    metadata: dict[str, str]  # of every weights file
    shard_names: str | None = None  # None: as transformers names shards, with an index
    notes: tuple[str, ...] = ()


def target_of(
    config: Config, to: str, backend: Backend, dtypes: Mapping[str, torch.dtype], ids: Mapping[str, Any]
) -> Target:
    """The folder of layout `to` that holds this model.

    Raises:
        ValueError: what the layout cannot say.
    """
    if to == "ours":
        return _ours(config)
    if to == "hf":
        return _hf(config, dtypes, ids)
    if to == "nxai":
        if not isinstance(config, xLSTMConfig):
            raise ValueError(f"to='nxai' holds xLSTM[a:b]; this is an {config.label}. Use to='nxai-large'")
        return _nxai(config, backend)
    if not isinstance(config, xLSTMLargeConfig):
        raise ValueError(f"to='nxai-large' holds the 7B architecture; this is an {config.label}. Use to='nxai'")
    return _nxai_large(config)


def _ours(config: Config) -> Target:
    name = "xlstm" if isinstance(config, xLSTMConfig) else "xlstm_large"
    said = {"architecture": name, **config.to_dict()}
    metadata = {"format": "pt", "config": json.dumps(said)}
    return Target(identity(config), "config.json", json.dumps(said, indent=2) + "\n", None, config, metadata)


def _hf(config: Config, dtypes: Mapping[str, torch.dtype], ids: Mapping[str, Any]) -> Target:
    notes: tuple[str, ...] = ()
    if isinstance(config, xLSTMLargeConfig):
        said, rules = hf_layout.to_in_tree_config(config, **ids), rules_large.rules(config, "hf")
        said["dtype"] = str(dtypes["backbone.embeddings.weight"]).removeprefix("torch.")
        if config.tie_embeddings:
            notes = ("transformers' own xLSTM cannot tie head and embedding: it reads two equal tensors",)
        if config.QK % 64 or config.HV % 64:
            notes += (
                f"transformers' own xLSTM rounds the widths of queries and values ({config.QK} and {config.HV}) up "
                f"to 64 in its cache and then fails; openxlstm.hf does not",
            )
    else:
        said, rules = hf_layout.to_hf_config(config, **ids), rules_hf.rules(config)
        said["architectures"] = ["xLSTMForCausalLM"]
        said["dtype"] = str(dtypes["embedding.weight"]).removeprefix("torch.")
        notes = ("transformers has no xLSTM[a:b] of its own; import openxlstm.hf before loading this folder with it",)
    return Target(rules, "config.json", json.dumps(said, indent=2) + "\n", None, config, {"format": "pt"}, notes=notes)


def _nxai(config: xLSTMConfig, backend: Backend) -> Target:
    said = config_nx.to_nx_config(config, backend)
    rules = rules_nx.rules(config, Variant(backend), tied=config.tie_embeddings)
    notes = ("NX-AI's xlstm itself crashes with conv1d_kernel_size 1",) if config.conv == 1 else ()
    read_as = replace(config, recurrent_init="zeros")
    if "m" not in config.pattern:  # sizes that no block has are not in the file: read back, they follow their rules
        read_as = replace(read_as, mlstm_width=None, proj_block=4)
    if "s" not in config.pattern:
        read_as = replace(read_as, ffn_width=None)
    return Target(rules, "config.yaml", to_yaml(said), said, read_as, {"format": "pt"}, notes=notes)


def _nxai_large(config: xLSTMLargeConfig) -> Target:
    said = config_large.to_nx_large(config)
    notes: tuple[str, ...] = ()
    if config.tie_embeddings:
        notes = ("xlstm_large cannot tie head and embedding: it reads two equal tensors",)
    rules = rules_large.rules(config, "nxai-large")
    read_as = replace(config, tie_embeddings=False)
    return Target(
        rules, "config.yaml", to_yaml(said), said, read_as, {"format": "pt"}, "model_{number}.safetensors", notes
    )


def to_yaml(data: Mapping[str, Any], indent: int = 0) -> str:
    """Nested mappings of numbers, names, flags and lists of them as YAML that YAML 1.1 readers understand too.

    Of 1e-06 PyYAML makes a text, because YAML 1.1 wants a point before the exponent.
    """
    lines = []
    for key, value in data.items():
        if isinstance(value, Mapping):
            lines.append(f"{' ' * indent}{key}:\n{to_yaml(value, indent + 2)}")
        else:
            text = repr(value) if isinstance(value, float) else json.dumps(value)
            if isinstance(value, float) and "e" in text and "." not in text:
                text = text.replace("e", ".0e")
            lines.append(f"{' ' * indent}{key}: {text}\n")
    return "".join(lines)
