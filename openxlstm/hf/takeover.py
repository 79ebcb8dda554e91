"""Taking over the in-tree xLSTM of transformers: its weights, their names and its files stay, the computation is ours.

accelerate(model)        a live model, in place, behind adapters and offloading hooks too       undone by restore(model)
register(override=True)  what the Auto classes make of files with model_type "xlstm"            undone by unregister()
patch_transformers()     the backbone inside from_pretrained and from_config of other people's code
                                                                                    undone by unpatch_transformers()

The first fixes everything for one object, the second for every later call of an Auto class, the third all below the
head: `logits_to_keep` and masks that nobody passed are made, or not made, by the in-tree head.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    monkey_patching,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import output_capturing

from openxlstm.hf import in_tree
from openxlstm.hf.config import xLSTMConfig
from openxlstm.hf.heads import xLSTMForSequenceClassification, xLSTMForTokenClassification
from openxlstm.hf.modeling import xLSTMForCausalLM, xLSTMModel, xLSTMPreTrainedModel
from openxlstm.models.interface import ModelState, state_shapes
from openxlstm.models.xlstm_large import FeedForward, mLSTMBlock, mLSTMLayer, xLSTMLargeConfig
from openxlstm.nn.gates import GateLinear
from openxlstm.nn.norm import HeadNorm, RMSNorm

HEADS = {  # every head of ours: one that is not registered would resolve, by its class name, to the in-tree class
    AutoModel: xLSTMModel,
    AutoModelForCausalLM: xLSTMForCausalLM,
    AutoModelForSequenceClassification: xLSTMForSequenceClassification,
    AutoModelForTokenClassification: xLSTMForTokenClassification,
}

HERE, PEER = "transformers.models.xlstm.modeling_xlstm", "xlstm.xlstm_large"
MODELS: dict[str, type[xLSTMPreTrainedModel]] = {  # by name: importing theirs imports the package `xlstm`, if it exists
    f"{HERE}.xLSTMForCausalLM": xLSTMForCausalLM,
    f"{HERE}.xLSTMModel": xLSTMModel,
}
PARTS: dict[str, type[nn.Module]] = {  # without and with that package
    f"{HERE}.xLSTMBlock": mLSTMBlock,
    f"{HERE}.xLSTMLayer": mLSTMLayer,
    f"{HERE}.xLSTMFeedForward": FeedForward,
    f"{HERE}.xLSTMRMSNorm": RMSNorm,
    f"{HERE}.xLSTMMultiHeadLayerNorm": HeadNorm,
    f"{PEER}.model.mLSTMLayer": mLSTMLayer,
    f"{PEER}.model.FeedForward": FeedForward,
    f"{PEER}.components.RMSNorm": RMSNorm,
    f"{PEER}.components.MultiHeadLayerNorm": HeadNorm,
}
PATTERN = "^xLSTMModel$"  # transformers searches with it; without anchors it would replace every class of that prefix

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Before:
    """What a module was before it was taken over. It travels with the module through copies and pickles."""

    cls: type[nn.Module]
    replaced: dict[str, Any]
    added: list[str]


def accelerate(model: Model) -> Model:
    """Let a live in-tree xLSTM compute as ours, in place. Parameters, their names, hooks and adapters stay.

    Args:
        model: an in-tree `xLSTMForCausalLM` or `xLSTMModel`, or what wraps one (PEFT). One of ours stays as it is.

    Raises:
        ValueError: there is none in it, it is compiled, or ours cannot compute it; then nothing has changed.
    """
    found = [module for module in model.modules() if _name(module) in MODELS]
    if not found:
        if any(isinstance(module, xLSTMPreTrainedModel) for module in model.modules()):
            return model
        raise ValueError(
            f"accelerate() takes over the xLSTM of transformers; there is none in this {type(model).__name__}. A file "
            f"or folder is opened by openxlstm.load, or by the Auto classes after openxlstm.hf.register(override=True)"
        )
    _check_not_compiled(model)
    config = in_tree.of_in_tree(found[0].config)  # type: ignore[arg-type]
    _check_parts(found[0], config)
    native = config.native()
    assert isinstance(native, xLSTMLargeConfig), "the only architecture in-tree"
    old: Any = found[0].config
    for module in found:
        _take_over_model(module, config, native)
    _point_to(model, found, old, config)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: every class and attribute as before; weights keep what training has made of them.

    Raises:
        ValueError: it was not taken over.
    """
    taken = [module for module in model.modules() if "_before_takeover" in vars(module)]
    if not taken:
        raise ValueError(f"restore() undoes accelerate(); this {type(model).__name__} was not taken over")
    models = [module for module in taken if isinstance(module, xLSTMPreTrainedModel)]
    ours = models[0].config
    checkpointing = {module: getattr(module, "gradient_checkpointing", False) for module in models}
    for module in taken:
        before = vars(module)["_before_takeover"]
        _become(module, before.cls, before.replaced, drop=["_before_takeover", *before.added])
    _point_to(model, list(models), ours, models[0].config)
    for module, enabled in checkpointing.items():
        if enabled:
            module.gradient_checkpointing_enable()  # type: ignore[operator]
    return model


def register(*, override: bool = False) -> None:
    """Register our model type with the Auto classes, which importing `openxlstm.hf` does.

    Args:
        override: also have them make our models of files with `model_type: "xlstm"`, the in-tree model's. Such a model
            is saved in the in-tree layout.
    """
    for config in (xLSTMConfig, in_tree.xLSTMConfig) if override else (xLSTMConfig,):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, head in HEADS.items():
            auto.register(config, head, exist_ok=True)


def unregister() -> None:
    """Undo `register(override=True)`: model type "xlstm" is the in-tree model again. Ours stays registered."""
    if CONFIG_MAPPING._extra_content.get(in_tree.xLSTMConfig.model_type) is in_tree.xLSTMConfig:
        del CONFIG_MAPPING._extra_content[in_tree.xLSTMConfig.model_type]
    for auto in HEADS:
        registered: Any = auto._model_mapping
        registered._extra_content.pop(in_tree.xLSTMConfig, None)


class PatchedModel(xLSTMModel):
    """Our backbone, built from the config of the in-tree head around it."""

    def __init__(self, config: PreTrainedConfig):
        try:
            read = in_tree.of_in_tree(config)
        except ValueError:
            _put_back()  # transformers does so only behind a constructor that returns
            raise
        super().__init__(read)


def patch_transformers() -> None:
    """Have `from_pretrained` and `from_config` of in-tree classes build our backbone, in code that we cannot change."""
    importlib.import_module(HERE)  # classes of modules that are not imported yet are not replaced
    monkey_patching.register_patch_mapping({PATTERN: PatchedModel}, overwrite=True)


def unpatch_transformers() -> None:
    """Undo `patch_transformers`. Models that were built meanwhile stay as they are."""
    if PATTERN in monkey_patching.get_patch_mapping():
        monkey_patching.unregister_patch_mapping([PATTERN])
    _put_back()


def _put_back() -> None:
    """The in-tree class wherever transformers holds our replacement: a load that raises leaves it there."""
    places = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("transformers") and vars(module).get("xLSTMModel") is PatchedModel
    ]
    if places:
        from transformers.models.xlstm import modeling_xlstm

        # No module holds the original by its name any more; the base class of the head knows its children
        base: type = modeling_xlstm.xLSTMForCausalLM.__mro__[1]
        children: list[type] = base.__subclasses__()
        (original,) = (child for child in children if child.__qualname__ == "xLSTMModel")
        for module in places:
            module.xLSTMModel = original  # type: ignore[attr-defined]


def _check_not_compiled(model: nn.Module) -> None:
    """Compiled code goes on computing what it was traced from, whatever the class says."""
    for name, module in model.named_modules():
        where = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(f"{where} is compiled; take the model over first, then compile it")
        if "forward" in vars(module) and "_hf_hook" not in vars(module) and _part(module) is not None:
            raise ValueError(
                f"{where} has a forward of its own in place of its class's (compiled or patched), which would go on "
                f"being called; take the model over before that"
            )


def _part(module: nn.Module) -> type[nn.Module] | None:
    """The class of ours that computes what this in-tree module does."""
    return MODELS.get(_name(module)) or PARTS.get(_name(module))


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _check_parts(model: Any, config: xLSTMConfig) -> None:
    """That every block can be ours, and that what the config says is so."""
    backbone = model.backbone if MODELS[_name(model)] is xLSTMForCausalLM else model
    for index, block in enumerate(backbone.blocks):
        if _part(block) is not mLSTMBlock or _part(block.mlstm_layer) is not mLSTMLayer:
            raise ValueError(f"block {index} is a {type(block).__name__}, which is no block of the in-tree model")
        if "qkv_opreact" in block.mlstm_layer._modules:
            raise ValueError(
                "this model holds fused matrices (weight_mode='fused'), whose names are not those of our modules; open "
                "its file with openxlstm.hf.xLSTMForCausalLM.from_pretrained, which splits them"
            )
    if config.tie_embeddings and model is not backbone and model.lm_head.weight is not backbone.embeddings.weight:
        raise ValueError(
            "config.tie_word_embeddings is True, and lm_head.weight is another tensor than the embedding: the in-tree "
            "class does not tie. Say which is meant: model.lm_head.weight = model.backbone.embeddings.weight, or "
            "model.config.tie_word_embeddings = False"
        )


def _take_over_model(model: nn.Module, config: xLSTMConfig, native: xLSTMLargeConfig) -> None:
    """The head, or the backbone with its blocks."""
    ours = MODELS[_name(model)]
    facts: dict[str, Any] = {
        "config": config,
        "_no_split_modules": {*ours._no_split_modules},
        "_skip_keys_device_placement": {*ours._skip_keys_device_placement},
        "_keep_in_fp32_modules_strict": {*ours._keep_in_fp32_modules_strict},
    }
    if ours is xLSTMForCausalLM:
        if native.tie_embeddings:
            facts["all_tied_weights_keys"] = dict(xLSTMForCausalLM._tied_weights_keys)
        _become(model, ours, facts)
        return
    facts["checkpoint_every"] = int(bool(model.gradient_checkpointing))
    for part in list(model.modules()):
        if part is not model and _part(part) is not None:
            _take_over_part(part, native)
    empty = [block.empty_state(1, "meta", torch.float32) for block in model.blocks]  # type: ignore[operator, union-attr]
    _become(model, ours, facts | {"_state_shapes": state_shapes(ModelState(tuple(empty)))})


def _take_over_part(part: nn.Module, native: xLSTMLargeConfig) -> None:
    ours = _part(part)
    assert ours is not None, "chosen by it"
    facts: dict[str, Any] = {}
    if ours is mLSTMLayer:
        for gate in (part.igate_preact, part.fgate_preact):
            inner = getattr(gate, "base_layer", gate)  # an adapter keeps the linear map that it adds to there
            if type(inner) is nn.Linear:
                _become(inner, GateLinear, {})
        facts = {"heads": native.heads, "gate_soft_cap": native.gate_soft_cap, "eps": native.eps}
        facts |= {"input_gate": native.input_gate, "forget_gate": native.forget_gate}
    _become(part, ours, facts)


def _become(module: nn.Module, cls: type[nn.Module], facts: dict[str, Any], drop: list[str] | None = None) -> None:
    """Give a module another class and attributes, and remember the old ones unless some are dropped instead.

    A hook of the library accelerate keeps the bound forward of the old class, so it comes off and goes on again.
    """
    held = vars(module).copy()
    if "_hf_hook" in held:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(module)
        vars(module).pop("forward", None)  # it leaves the old class's there
    if drop is None:
        replaced = {name: held[name] for name in facts if name in held}
        before = Before(type(module), replaced, [name for name in facts if name not in held])
        facts = facts | {"_before_takeover": before}
    module.__class__ = cls
    for name in drop or []:
        vars(module).pop(name, None)
    vars(module).update(facts)
    if isinstance(module, PreTrainedModel):
        output_capturing._CAN_RECORD_REGISTRY[module] = module._can_record_outputs
    if "_hf_hook" in held:
        add_hook_to_module(module, held["_hf_hook"])
        for name, value in held.items():  # warnings that dispatch_model puts around `to` and `cuda` came off too
            if name not in (drop or []):
                vars(module).setdefault(name, value)


def _point_to(model: nn.Module, models: list[nn.Module], old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Wrappers keep the config, and methods bound to the old class (PEFT): they get the new ones."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if value is old and module not in models:
                vars(module)[name] = new
            elif isinstance(value, MethodType) and value.__self__ in models and name not in ("forward", "_old_forward"):
                vars(module)[name] = getattr(value.__self__, value.__name__)
