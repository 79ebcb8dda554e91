"""xLSTMConfig in the shape that transformers expects: a translation of the native configs, which hold the facts.

Two ways to say it. By our own names (width, blocks, heads, pattern, ...), with the common names of transformers
(hidden_size, num_hidden_layers, num_heads, tie_word_embeddings) as aliases: either architecture. By the names of the
in-tree class of transformers (hidden_size, qk_dim_factor, ffn_proj_factor, ...) alone: then they mean what they mean
there, formulas and defaults included, so that in-tree weights fit.

One name per fact: an alias that contradicts is an error, and a name near to one that we know is a misspelling.
"""

import dataclasses
from typing import Any, ClassVar, Literal, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from openxlstm.checkpoint import hf_layout
from openxlstm.models.checks import did_you_mean
from openxlstm.models.xlstm import xLSTMConfig as NativeConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig as NativeLargeConfig

logger = logging.get_logger(__name__)

Native = NativeConfig | NativeLargeConfig

FIELDS = {name: [f.name for f in dataclasses.fields(cls)] for name, cls in hf_layout.ARCHITECTURES.items()}
NATIVE = {name for names in FIELDS.values() for name in names}
ALIASES = {  # common name: ours
    "hidden_size": "width",
    "num_hidden_layers": "blocks",
    "num_heads": "heads",
    "num_attention_heads": "heads",
    "tie_word_embeddings": "tie_embeddings",
}
IN_TREE = {*hf_layout.IN_TREE_DEFAULTS, *hf_layout.ALIASES, *hf_layout.ALIASES.values()}
MACHINE = {*hf_layout.MACHINE_FIELDS} - {"use_cache"}  # use_cache is a field here: what a call without it does
OURS_ONLY = (NATIVE | {"architecture"}) - IN_TREE  # who says one of these speaks our language
IN_TREE_ONLY = IN_TREE - NATIVE - {*ALIASES}
IN_TREE_SIZES = {"hidden_size": 4096, "num_hidden_layers": 32}  # of the in-tree class called without arguments
IN_TREE_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

KNOWN_TO_TRANSFORMERS = {  # handled by PreTrainedConfig, though no fields of it; and what old files carry
    "torch_dtype", "num_labels", "name_or_path", "_name_or_path", "_commit_hash", "output_attentions",
    "per_layer_config", "attn_implementation", "experts_implementation", "_attn_implementation_internal",
    "_experts_implementation_internal", "quantization_config", "auto_map", "transformers_weights", "loss_type",
    "tie_last_hidden_states", "task_specific_params", "tokenizer_class", "finetuning_task", "is_decoder", "prefix",
    "torchscript", "use_bfloat16", "pruned_heads", "add_cross_attention", "tie_encoder_decoder",
    "cross_attention_hidden_size", "decoder_start_token_id", "sep_token_id", "use_return_dict",
}  # fmt: skip


@no_type_check  # in tests; `strict` checks its fields always, and its keywords are more than its fields
@strict
class xLSTMConfig(PreTrainedConfig):
    """Facts of an xLSTM of either architecture. A size that is None follows the rule of its architecture.

    Raises:
        ValueError: two names of one fact that contradict, a misspelt name, a size that cannot be built.
    """

    model_type = "openxlstm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = ALIASES

    architecture: Literal["xlstm", "xlstm_large"] | None = None  # None: "xlstm" if a field of it is given
    vocab_size: int | None = None  # W
    width: int | None = None  # D
    heads: int | None = None  # H
    blocks: int | None = None  # of the large architecture; of the other, the length of the pattern
    tie_embeddings: bool | None = None
    input_gate: str | None = None
    forget_gate: str | None = None
    norm_eps: int | float | None = None
    eps: int | float | None = None
    ffn_width: int | None = None  # U_f
    # the NeurIPS architecture
    pattern: str | None = None
    mlstm_width: int | None = None  # U_m
    conv: int | None = None  # J
    proj_block: int | None = None  # P
    bias: bool | None = None
    dropout: int | float | None = None
    recurrent_init: str | None = None
    # the large architecture
    qk_width: int | None = None  # H K
    v_width: int | None = None  # H V
    gate_soft_cap: int | float | None = None
    logit_soft_cap: int | float | None = None
    # what transformers asks for
    use_cache: bool = True
    max_position_embeddings: int | None = None  # the length in training: advice, never enforced, no limit of the model
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    classifier_dropout: int | float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Read the names of either language into the native fields; pass the rest on to transformers."""
        stated = kwargs.pop("model_type", None)
        given = {name: getattr(self, name) for name in sorted(NATIVE) if getattr(self, name) is not None}
        foreign = (IN_TREE | {*ALIASES} | MACHINE | {*hf_layout.COMMUNITY_KEYS}) - NATIVE
        other = {name: kwargs.pop(name) for name in sorted(foreign) if name in kwargs}
        other = {name: value for name, value in other.items() if value is not None}
        if self.architecture is not None:
            given["architecture"] = self.architecture
        _refuse_misspelt(kwargs)
        if stated == hf_layout.IN_TREE or (stated in (None, self.model_type) and not OURS_ONLY & given.keys()):
            native = _of_in_tree(given, other, from_file=stated == hf_layout.IN_TREE)
            self._machine_fields = {name: other[name] for name in sorted(MACHINE & other.keys())}
            if stated == hf_layout.IN_TREE:
                self.source_layout = "in-tree"
                for name, token in IN_TREE_TOKENS.items():
                    if getattr(self, name) is None:
                        setattr(self, name, token)
        else:
            native = _of_ours(given, other, stated)
        self._hold(native)
        super().__post_init__(**kwargs)

    def _hold(self, native: Native) -> None:
        self.architecture = "xlstm" if isinstance(native, NativeConfig) else "xlstm_large"
        for name, value in native.to_dict().items():
            setattr(self, name, value)
        if isinstance(native, NativeConfig):
            self.blocks = len(native.pattern)

    @classmethod
    def from_native(
        cls,
        native: Native,
        *,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        max_position_embeddings: int | None = None,
    ) -> "xLSTMConfig":
        """The same model, described to transformers."""
        return cls(
            architecture="xlstm" if isinstance(native, NativeConfig) else "xlstm_large",
            **native.to_dict(),
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            max_position_embeddings=max_position_embeddings,
        )

    def native(self) -> Native:
        """The frozen native config: what a model is built from.

        Raises:
            ValueError: the fields were changed to what cannot be built.
        """
        assert self.architecture is not None, "resolved in __post_init__"
        cls = hf_layout.ARCHITECTURES[self.architecture]
        facts = {name: getattr(self, name) for name in FIELDS[self.architecture]}
        native = cls.from_dict(facts)
        if isinstance(native, NativeConfig) and self.blocks != len(native.pattern):
            raise ValueError(
                f"xLSTMConfig: blocks={self.blocks}, and pattern={native.pattern!r} has {len(native.pattern)}"
            )
        return native

    def to_dict(self) -> dict[str, Any]:
        """Every fact of its architecture under our names, then the common names; nothing about a machine."""
        output = super().to_dict()
        assert self.architecture is not None, "resolved in __post_init__"
        for name in (*(NATIVE - {*FIELDS[self.architecture]}), "blocks", "_machine_fields", "source_layout"):
            output.pop(name, None)
        tokens = {name: getattr(self, name) for name in IN_TREE_TOKENS}
        return output | hf_layout.to_hf_config(self.native(), **tokens) | {"model_type": self.model_type}


def _of_in_tree(given: dict[str, Any], other: dict[str, Any], *, from_file: bool) -> Native:
    """In-tree names alone: the in-tree formulas and defaults."""
    if machine := sorted(MACHINE & other.keys()):
        logger.warning_once(
            f"xLSTMConfig: {', '.join(machine)} say how the in-tree class runs on a machine; nothing here reads them"
        )
    data = {"model_type": hf_layout.IN_TREE} | given | other
    if not from_file:
        for name, size in IN_TREE_SIZES.items():
            if name not in data and hf_layout.ALIASES[name] not in data:
                data[name] = size
    data.setdefault("num_heads", data.pop("num_attention_heads", hf_layout.IN_TREE_DEFAULTS["num_heads"]))
    return hf_layout.from_hf_config(data)


def _of_ours(given: dict[str, Any], other: dict[str, Any], stated: str | None) -> Native:
    """Our names, with the common ones as aliases."""
    if mixed := sorted((IN_TREE_ONLY | MACHINE | {*hf_layout.COMMUNITY_KEYS}) & other.keys()):
        ours = sorted(OURS_ONLY & given.keys())
        raise ValueError(
            f"xLSTMConfig: {mixed[0]} is a name of the in-tree class of transformers and {ours[0]} one of ours; say "
            f"all of it in one language"
        )
    if stated not in (None, hf_layout.OURS):
        raise ValueError(f"xLSTMConfig: model_type is {stated!r}; this class reads {hf_layout.OURS!r} and 'xlstm'")
    for alias, name in ALIASES.items():
        if alias in other and given.setdefault(name, other[alias]) != other[alias]:
            raise ValueError(f"xLSTMConfig: {name}={given[name]} and {alias}={other[alias]} are two names of one fact")
    only_neurips = set(FIELDS["xlstm"]) - set(FIELDS["xlstm_large"])
    architecture = given.pop("architecture", "xlstm" if only_neurips & given.keys() else "xlstm_large")
    blocks = given.pop("blocks", None) if architecture == "xlstm" else None
    if strangers := sorted(given.keys() - set(FIELDS[architecture])):
        raise ValueError(f"xLSTMConfig: {strangers[0]} is no fact of the architecture {architecture!r}")
    native = hf_layout.ARCHITECTURES[architecture].from_dict(given)
    if blocks is not None and isinstance(native, NativeConfig) and blocks != len(native.pattern):
        raise ValueError(
            f"xLSTMConfig: blocks={blocks} (num_hidden_layers), and pattern={native.pattern!r} has "
            f"{len(native.pattern)}"
        )
    return native


def _refuse_misspelt(kwargs: dict[str, Any]) -> None:
    """A keyword that nobody reads is kept by transformers without a word; near to a known one it is a misspelling."""
    known = {f.name for f in dataclasses.fields(xLSTMConfig)} | IN_TREE | MACHINE | {*ALIASES}
    fine = KNOWN_TO_TRANSFORMERS | GenerationConfig._get_default_generation_params().keys()
    for name in kwargs.keys() - fine:
        if near := did_you_mean(name, known):
            raise ValueError(f"xLSTMConfig has no field {name!r}{near}")
        logger.warning_once(f"xLSTMConfig has no field {name!r}: it is stored, and nothing of openxlstm reads it")
