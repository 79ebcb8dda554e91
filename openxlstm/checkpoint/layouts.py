"""Whose checkpoint is this? Decided by facts: the config's own words and the names of the tensors.

  architecture, no model_type                           ours (`store` reads whole folders of ours itself)
  model_type "openxlstm" or "xlstm" in config.json      Hugging Face, ours or in-tree
  token_embedding.weight                                NX-AI xlstm, behind any prefix
  embedding.weight and backbone.blocks.                 NX-AI xlstm_large
  backbone.embeddings.weight                            Hugging Face, in-tree
A name that ends in qkv_opreact.weight says that matrices are fused. What fits nothing is refused with the names found.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openxlstm.checkpoint import config_large, config_nx, facts, hf_layout, rules_hf, rules_large, rules_nx
from openxlstm.checkpoint.hf_layout import Config
from openxlstm.checkpoint.plan import Plan, identity
from openxlstm.checkpoint.sources import Source, open_weights, parse_json, read_json
from openxlstm.models.xlstm import xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig

Given = str | os.PathLike[str] | Mapping[str, Any]

NX_ANCHOR = re.compile(r"(token_embedding|(xlstm_block_stack\.)?(post_blocks_norm|blocks\.0\.xlstm_norm))\.weight$")
NO_CONFIG = "no config was given, so what tensors cannot say is taken to be the peer's default: {}"


def open_foreign(path: Path, config: Given | None) -> tuple[Plan, Source]:
    """Whose checkpoint the file or folder is, and its tensors; not yet checked against each other.

    Raises:
        ValueError: nothing there, no known layout, or what a layout refuses.
    """
    source = open_weights(path)
    return recognise(source, read_config(config, source))


def read_config(given: Given | None, source: Source) -> dict[str, Any] | None:
    """The config: what the caller gives, else what lies beside the weights, else None.

    Raises:
        ValueError: a file that is no config.
    """
    if isinstance(given, Mapping):
        return _unwrapped(dict(given))
    if given is not None:
        return _unwrapped(_read_file(Path(given)))
    if source.path.is_dir():
        for name in ("config.json", "config.yaml"):
            if (source.path / name).is_file():
                return _unwrapped(_read_file(source.path / name))
    if "config" in source.metadata:  # our own weights carry a copy
        return parse_json(source.metadata["config"], f"{source.path}: the copy of the config in its header")
    return None


def recognise(source: Source, config: Mapping[str, Any] | None) -> tuple[Plan, Source]:
    """What the tensors are and by which rules they are read; and the source, names stripped of a wrapper's prefix.

    Raises:
        ValueError: no known layout, or contradictions between config and tensors, by name.
    """
    names = source.entries.keys()
    kind = None if config is None else config.get("model_type")
    architecture = None if config is None else config.get("architecture")
    if (
        config is not None
        and kind is None
        and isinstance(architecture, str)
        and architecture in hf_layout.ARCHITECTURES
    ):
        facts_of = hf_layout.ARCHITECTURES[architecture].from_dict
        native = facts_of({key: value for key, value in config.items() if key != "architecture"})
        return Plan("ours", native, identity(native)), source
    if kind == hf_layout.OURS:
        return _hf_ours(hf_layout.from_hf_config(config or {}), source), source
    if any(NX_ANCHOR.search(name) for name in names):
        if kind == hf_layout.IN_TREE and config is not None and not _is_community(config):
            raise ValueError(f"{source.path}: config.json describes transformers' own xLSTM, and the tensors are named "
                             f"as by NX-AI's xlstm: {_some(names)}")  # fmt: skip
        source = _cleaned(source)
        return _nxai(source, _nx_config(config)), source
    if kind == hf_layout.IN_TREE and config is not None and _is_community(config):
        raise ValueError(
            f"{source.path} is a checkpoint of custom code under the name 'xlstm', and its tensors are not those of "
            f"NX-AI's xlstm. Keys of config.json: {', '.join(sorted(config))}. Tensors: {_some(names)}"
        )
    if "backbone.embeddings.weight" in names:
        return _large(source, "hf", config), source
    if "embedding.weight" in names and any(name.startswith("backbone.blocks.") for name in names):
        return _large(source, "nxai-large", config), source
    if "embeddings.weight" in names:
        raise ValueError(f"{source.path} holds a backbone without a head (saved from AutoModel); save the "
                         f"xLSTMForCausalLM it belongs to")  # fmt: skip
    raise ValueError(
        f"{source.path} is of no known layout (openxlstm, Hugging Face xlstm, NX-AI xlstm or xlstm_large). Its tensors "
        f"are {_some(names)}"
    )


def _nx_config(config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The part of a config that is in NX-AI's terms; config.json of custom code may nest it, or leave it out."""
    if config is None or "model_type" not in config:
        return config
    nested = config.get("xlstm_cfg")
    if isinstance(nested, Mapping):
        return nested
    flat = {key: value for key, value in config.items() if key in config_nx.MODEL}
    return flat if "embedding_dim" in flat else None


def _cleaned(source: Source) -> Source:
    """Names without what a wrapper put before all of them (`module.`, `_orig_mod.`, `model.`); no stored masks.

    Raises:
        ValueError: a name without the prefix of the others.
    """
    anchor = min((name for name in source.entries if NX_ANCHOR.search(name)), key=len)
    prefix = NX_ANCHOR.sub("", anchor)
    entries = {}
    for name, entry in source.entries.items():
        if not name.startswith(prefix):
            raise ValueError(f"{entry.file} holds {name!r}; all other names begin with {prefix!r}")
        if not name.endswith(rules_nx.IGNORED):
            entries[name[len(prefix) :]] = entry
    return Source(source.path, entries, source.metadata)


def _nxai(source: Source, given: Mapping[str, Any] | None) -> Plan:
    """NX-AI's xlstm: facts from the tensors, checked against the config."""
    found, variant = facts.of_nx(source)
    tied = False
    notes: tuple[str, ...] = (NO_CONFIG.format("act_fn gelu, dropout 0, head and embedding two tensors"),)
    if given is not None:
        changes, tied, notes = config_nx.apply(given, found, variant)
        found = replace(found, **changes)
    if not isinstance(found, xLSTMConfig):
        return Plan("nxai", found, rules_nx.rules(found, variant, tied=None), notes)
    found = replace(found, tie_embeddings=tied)
    return Plan("nxai", found, rules_nx.rules(found, variant, tied=tied), notes)


def _large(source: Source, layout: str, given: Mapping[str, Any] | None) -> Plan:
    """The 7B architecture: sizes from the tensors, checked against the config, which alone knows caps and eps."""
    sizes, is_fused = facts.of_large(source, rules_large.EMBEDDING[layout])
    notes: tuple[str, ...] = ()
    if given is None:
        config = xLSTMLargeConfig.from_dict(sizes)
        notes = (NO_CONFIG.format("soft caps 15 and 30, eps 1e-6"),)
    elif layout == "hf":
        said = hf_layout.from_hf_config(given, ffn_width=sizes["ffn_width"])
        assert isinstance(said, xLSTMLargeConfig)  # the in-tree class has no other architecture
        config = said
    else:
        config = config_large.from_nx_large(given, ffn_width=sizes["ffn_width"])
    for name, size in sizes.items():
        if getattr(config, name) != size:
            raise ValueError(
                f"{source.path}: the config means {name}={getattr(config, name)!r}, and the tensors {size!r}"
            )
    head = "lm_head.weight" in source.entries
    if config.tie_embeddings and head and not facts.equal(source, rules_large.EMBEDDING[layout], "lm_head.weight"):
        config = replace(config, tie_embeddings=False)
        notes += (
            "the config says tie_word_embeddings, which transformers' own xLSTM ignores; head and embedding differ in "
            "the file, and stay two tensors",
        )
    return Plan(layout, config, rules_large.rules(config, layout, is_fused=is_fused, head=head), notes)


def _hf_ours(config: Config, source: Source) -> Plan:
    """model_type "openxlstm"."""
    if isinstance(config, xLSTMLargeConfig):
        head = "lm_head.weight" in source.entries
        return Plan("hf", config, rules_large.rules(config, "hf", head=head))
    return Plan("hf", config, rules_hf.rules(config))


def _is_community(config: Mapping[str, Any]) -> bool:
    """A nested config of custom code, or no flat sizes: not transformers' own xLSTM."""
    flat = any(name in config or alias in config for name, alias in hf_layout.ALIASES.items())
    return not flat or any(key in config for key in hf_layout.COMMUNITY_KEYS)


def _read_file(path: Path) -> dict[str, Any]:
    """A JSON or YAML file.

    Raises:
        ValueError: it is neither, holds no mapping, or is YAML and PyYAML is missing.
    """
    if not path.is_file():
        raise ValueError(f"there is no config {path}")
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path} is no config by its name; known are .json, .yaml and .yml")
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"reading {path} needs PyYAML: pip install 'openxlstm[convert]'") from error
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping; it holds {type(data).__name__}")
    return data


def _unwrapped(config: dict[str, Any]) -> dict[str, Any]:
    """The part about the model, of a file that describes a whole experiment."""
    inner = config.get("model")
    return inner if isinstance(inner, dict) and "embedding_dim" not in config else config


def _some(names: Iterable[str]) -> str:
    """The first names, and how many there are."""
    first = sorted(names)
    return ", ".join(first[:8]) + (f", ... ({len(first)} in all)" if len(first) > 8 else "")
