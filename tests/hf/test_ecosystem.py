"""What people do with a model of transformers: adapters, trainers, pipelines, offloading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from hf.tiny_hf import GREEDY, KINDS, PAD, build, padded, text
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    TextGenerationPipeline,
    Trainer,
    TrainingArguments,
)

import openxlstm.hf as oxhf

close = torch.testing.assert_close


def adapted(kind: str, **fields: Any) -> Any:
    """A model behind LoRA adapters that do something."""
    peft = pytest.importorskip("peft")
    targets = oxhf.LORA_TARGETS["xlstm_large" if kind == "large" else "xlstm"]
    config = peft.LoraConfig(**{"r": 2, "target_modules": targets, "task_type": "CAUSAL_LM"} | fields)
    model = peft.get_peft_model(build(kind), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_lora_changes_trains_saves_reloads_and_merges(kind: str, tmp_path: Path) -> None:
    model, x = adapted(kind), text(2, 13)
    plain = copy.deepcopy(model).unload()
    want = model(x).logits
    assert (want - plain(x).logits).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(x).logits, plain(x).logits)

    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in adapters)
    model.train()(x, labels=x).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())
    model.eval()

    model.save_pretrained(tmp_path)
    from peft import PeftModel

    again = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(again(x).logits, want)
    ids, mask = padded([x[0], x[1, :7]])
    said = again.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(said[1, ids.shape[1] :], again.generate(input_ids=x[1:, :7], **GREEDY)[0, 7:])
    merged = again.merge_and_unload()
    assert type(merged) is oxhf.xLSTMForCausalLM
    close(merged(x).logits, want, rtol=1e-4, atol=2e-5)


def test_all_linear_adapts_the_gates_too() -> None:
    model, x = adapted("large", target_modules="all-linear"), text(1, 9)
    assert "lora" in str(model.base_model.model.backbone.blocks[0].mlstm_layer.igate_preact)
    before = model(x).logits
    merged = copy.deepcopy(model).merge_and_unload()
    close(merged(x).logits, before, rtol=1e-4, atol=2e-5)
    gate = model.base_model.model.backbone.blocks[0].mlstm_layer.igate_preact
    nn.init.normal_(gate.lora_B["default"].weight, std=3.0)
    assert (model(x).logits - before).abs().max() > 1e-3


def test_headwise_maps_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="HeadwiseLinear"):
        adapted("neurips", target_modules=["q"])


def tokenizer() -> PreTrainedTokenizerFast:
    """A word per id."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {"<unk>": 0, "<pad>": PAD, "<bos>": 2} | {f"w{i}": i for i in range(3, 64)}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>", eos_token="<bos>"
    )


DOCUMENTS = [5, 9, 3, 12, 7, 4]


def documents() -> list[list[int]]:
    torch.manual_seed(3)
    return [text(1, length)[0].tolist() for length in DOCUMENTS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_batch_of_trl_has_the_loss_of_the_padded_one(kind: str) -> None:
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    model, rows = build(kind), [{"input_ids": ids} for ids in documents()]
    batch = trl.DataCollatorForLanguageModeling(pad_token_id=PAD)(rows)
    want = model(**batch).loss
    for multiple in (None, 16):
        packed = trl.DataCollatorForLanguageModeling(pad_token_id=PAD, padding_free=True, pad_to_multiple_of=multiple)(
            rows
        )
        assert packed["input_ids"].shape[0] == 1
        close(model(**packed).loss, want, rtol=1e-6, atol=1e-6)
        packed.pop("cu_seq_lens_q")
        close(model(**packed).loss, want, rtol=1e-6, atol=1e-6)  # by seq_idx alone


@pytest.mark.slow
def test_trl_sft_with_packing_has_the_loss_of_training_without(
    tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    losses, grads = {}, {}
    for packing in (False, True):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path / str(packing)), packing=packing, max_length=sum(DOCUMENTS), max_steps=1,
            per_device_train_batch_size=1 if packing else len(DOCUMENTS), learning_rate=0.0, report_to="none",
            logging_steps=1, save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            build("large"),
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": documents()}),
            processing_class=tokenizer(),
        )
        trainer.train()
        logged = next(line for line in trainer.state.log_history if "loss" in line)
        losses[packing], grads[packing] = logged["loss"], logged["grad_norm"]
    record_property("measured", f"SFT, loss packed {losses[True]:.5f}, padded {losses[False]:.5f}")
    close(losses[True], losses[False], rtol=1e-4, atol=0.0)
    close(grads[True], grads[False], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer_accumulates_exactly(checkpointing: bool, tmp_path: Path) -> None:
    """Rows of unequal length: a mean of means would be another loss."""
    rows = [{"input_ids": ids, "labels": ids} for ids in documents()[:4]]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids, mask = padded([torch.tensor(row["input_ids"]) for row in batch], "right")
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}

    after = []
    for size, steps in ((4, 1), (1, 4)):
        model = build("large").train()
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2,
            learning_rate=0.05, optim="sgd", report_to="none", save_strategy="no", use_cpu=True,
            lr_scheduler_type="constant", max_grad_norm=0.0, seed=1, gradient_checkpointing=checkpointing,
            remove_unused_columns=True,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, data_collator=collate).train()  # type: ignore[arg-type]
        after.append(model.state_dict())
    start = build("large").state_dict()
    for name, tensor in after[0].items():
        assert not torch.equal(tensor, start[name]), name
        close(after[1][name], tensor, rtol=1e-4, atol=1e-6, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_padded_left_and_answers_right_score_as_alone(kind: str) -> None:
    """The rows of GRPO and DPO."""
    model = build(kind)
    prompts, answers = [text(1, n)[0] for n in (3, 8, 5)], [text(1, n)[0] for n in (6, 2, 4)]
    ids, mask = torch.full((3, 14), PAD), torch.zeros(3, 14, dtype=torch.long)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, 8 - len(prompt) : 8 + len(answer)] = torch.cat((prompt, answer))
        mask[row, 8 - len(prompt) : 8 + len(answer)] = 1
    logits = model(ids, attention_mask=mask, logits_to_keep=7).logits
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        alone = model(torch.cat((prompt, answer))[None]).logits[0, len(prompt) - 1 :]
        close(logits[row, : len(answer) + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_generation_pipeline_says_the_same_in_batches(kind: str) -> None:
    words = tokenizer()
    words.padding_side = "left"
    pipe = TextGenerationPipeline(model=build(kind), tokenizer=words)
    prompts = ["w5 w9 w33", "w7 w8 w50 w12 w4 w21 w3", "w60"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    alone = [pipe(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert [out[0]["generated_text"] for out in pipe(prompts, batch_size=2, **options)] == alone


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_has_two_names_and_weights_may_wait_elsewhere(kind: str, tmp_path: Path) -> None:
    model, x = build(kind), text(2, 11)
    model.save_pretrained(tmp_path)
    for keyword in ("dtype", "torch_dtype"):
        half = AutoModelForCausalLM.from_pretrained(tmp_path, **{keyword: torch.bfloat16})
        assert half.dtype == torch.bfloat16
    pytest.importorskip("accelerate")
    parts = {"backbone.embeddings": "cpu", "backbone.blocks.0": "disk", "backbone.blocks.1": "cpu"}
    for where in ({"": "cpu"}, parts | {"backbone.out_norm": "cpu", "lm_head": "cpu"}):
        placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where, offload_folder=str(tmp_path / "off"))
        close(placed.eval()(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(placed.generate(x, **GREEDY), model.generate(x, **GREEDY))
