"""The in-tree xLSTM of transformers (`model_type: "xlstm"`): how its config is read, and written back.

A model that came from there goes back there. Its config holds our fields in memory and is saved as the file that the
in-tree class reads, with the fields about machines as they were found.
"""

from typing import Any, no_type_check

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from openxlstm.checkpoint import hf_layout
from openxlstm.hf import config as ours
from openxlstm.models.xlstm_large import xLSTMLargeConfig


@no_type_check  # in tests, as its parent
@strict
class xLSTMConfig(ours.xLSTMConfig):
    """`openxlstm.hf.xLSTMConfig` of a model that is saved in the in-tree layout.

    The name is its parent's because the Auto classes compare a model's config class by name.
    """

    model_type = hf_layout.IN_TREE

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**({"model_type": hf_layout.IN_TREE} | kwargs))
        # Of this instance. Weights are converted by the instance's type, and what is registered for "xlstm" would also
        # be applied, and reversed on saving, by the in-tree class.
        self.model_type = hf_layout.OURS  # type: ignore[misc]

    def to_dict(self) -> dict[str, Any]:
        """What the in-tree class reads."""
        output = super().to_dict()
        native = self.native()
        for name in (*native.to_dict(), "architecture", "blocks"):
            output.pop(name, None)
        tokens = {name: getattr(self, name) for name in ours.IN_TREE_TOKENS}
        machine = {name: value for name, value in self._machine_fields.items() if name != "weight_mode"}
        return output | facts_of(native, tokens) | machine


def of_in_tree(config: PreTrainedConfig) -> xLSTMConfig:
    """Read the config of an in-tree model.

    Raises:
        ValueError: it contradicts itself, belongs to custom code, or asks for what the in-tree class ignores.
    """
    said = config.to_dict()
    return xLSTMConfig(**{name: value for name, value in said.items() if name != "transformers_version"})


def of_ours(config: ours.xLSTMConfig) -> xLSTMConfig:
    """The same model, to be saved in the in-tree layout.

    Raises:
        ValueError: the in-tree class has no such model.
    """
    if isinstance(config, xLSTMConfig):
        return config
    tokens = {name: getattr(config, name) for name in ours.IN_TREE_TOKENS}
    return xLSTMConfig(**(facts_of(config.native(), tokens) | getattr(config, "_machine_fields", {})))


def as_ours(config: ours.xLSTMConfig) -> ours.xLSTMConfig:
    """The same model, to be saved in our own layout."""
    if not isinstance(config, xLSTMConfig):
        return config
    tokens = {name: getattr(config, name) for name in ours.IN_TREE_TOKENS}
    return ours.xLSTMConfig.from_native(config.native(), **tokens)


def facts_of(native: ours.Native, tokens: dict[str, Any]) -> dict[str, Any]:
    """config.json of the in-tree class.

    Raises:
        ValueError: the in-tree class has no such model.
    """
    if not isinstance(native, xLSTMLargeConfig):
        raise ValueError(
            f'layout="in-tree": the xLSTM of transformers is the 7B architecture, without sLSTM blocks, convolutions '
            f'or biases; this model is {native.label}. Save it in our own layout (layout="openxlstm")'
        )
    return hf_layout.to_in_tree_config(native, **tokens)


def fresh_model(fields: dict[str, Any]) -> Any:
    """The in-tree class itself, newly initialised: what a takeover is compared with."""
    from transformers import xLSTMConfig as TheirConfig
    from transformers import xLSTMForCausalLM as TheirModel

    return TheirModel(TheirConfig(**fields))
