"""Models of this library for EleutherAI's lm-eval: loglikelihood, loglikelihood_rolling, generate_until.

    lm_eval --model openxlstm --model_args pretrained=runs/demo --tasks piqa     where lm-eval reads entry points
    xlstm eval runs/demo --tasks piqa                                            everywhere

lm-eval 0.4.13 does not read the entry point `lm_eval.models` that this package declares; `register()` tells it.
Nothing is truncated: the models have no context length.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from torch import Tensor

from openxlstm.checkpoint import gguf
from openxlstm.checkpoint.store import load
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.tasks import choice, scoring

NAME = "openxlstm"
ROLLING = ("stateful", "windows")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
UNUSED = {"do_sample", "temperature", "until", "max_gen_toks"}  # what _choose and generate_until have read


class OpenXLSTMLM(TemplateLM):
    """A model folder, a run folder or a GGUF file behind lm-eval's interface.

    Args:
        pretrained: the folder, or the file.
        tokenizer: a tokenizer.json or a folder that holds one; None: the model's folder, or what is in the file.
        batch_size: requests computed together; results do not depend on it.
        device: None: an accelerator if there is one.
        dtype: float32, bfloat16, ...; None: as the model was saved. Logits are fp32 always.
        rolling: "stateful" carries the state through a whole text; "windows" starts afresh every `window` tokens, for
            numbers to compare with models that have a context length.
        bos: put the end id before every context, as training puts it before every document. lm-eval's `hf` puts it
            there only if the tokenizer asks for it.
        seed: of the draws of tasks that sample.

    Raises:
        ValueError: an argument that does not exist or fit, with what would.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        rolling: str = "stateful",
        window: int = 2048,
        bos: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if rolling not in ROLLING:
            raise ValueError(f"rolling={rolling!r} must be one of {', '.join(ROLLING)}")
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number above 0; it changes speed only")
        folder = Path(pretrained)
        folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if tokenizer is None and gguf.is_gguf(folder):
            self._tokenizer = Tokenizer.from_json(gguf.tokenizer_json(folder))
        else:
            self._tokenizer = Tokenizer.from_file(tokenizer or folder)
        self.model = load(folder, device=self._device, dtype=None if dtype is None else DTYPES[dtype]).eval()
        self.batch_size, self.rolling, self.window, self.seed = int(batch_size), rolling, window, seed
        self.bos = bos and self._tokenizer.end_id is not None

    @property
    def eot_token_id(self) -> int:
        """The id that ends every document, and stands before every document."""
        if self._tokenizer.end_id is None:
            raise ValueError(f"{self._tokenizer!r} has no end token, so nothing can stand before an empty context")
        return self._tokenizer.end_id

    @property
    def tokenizer_name(self) -> str:
        """The identity of the tokenizer, by which lm-eval names its caches."""
        return self._tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; before them the end id if `bos` asks for it and the caller does not forbid it."""
        ids = self._tokenizer.encode(string)
        begin = self.bos if add_special_tokens is None else add_special_tokens
        return [self.eot_token_id, *ids] if begin else ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scores = scoring.loglikelihoods(self.model, pairs, batch_size=self.batch_size)
        answers = [(score.logprob, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, as `rolling` says. The first token always follows the end id."""
        texts = [self._tokenizer.encode(request.args[0]) for request in requests]
        if self.rolling == "stateful":
            answers = scoring.rolling(self.model, texts, self.eot_token_id, batch_size=self.batch_size)
        else:
            answers = scoring.rolling_in_windows(
                self.model, texts, self.eot_token_id, window=self.window, batch_size=self.batch_size
            )
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop string: the most probable tokens, or with do_sample draws at a temperature."""
        groups: dict[str, list[int]] = {}  # requests with the same options share batches
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        texts = [""] * len(requests)
        for members in groups.values():
            options = normalize_gen_kwargs(requests[members[0]].args[1], default_max_gen_toks=256)
            contexts = [self.tok_encode(requests[index].args[0]) or [self.eot_token_id] for index in members]
            found = scoring.continuations(
                self.model, self._tokenizer, contexts, until=options["until"], max_tokens=options["max_gen_toks"],
                choose=self._choose(dict(options), members), batch_size=self.batch_size,
            )  # fmt: skip
            for index, text in zip(members, found, strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _choose(self, options: dict[str, Any], members: list[int]) -> Callable[[int, Tensor], int] | None:
        """How the next token is drawn: None for the most probable one; every request has its own random numbers."""
        if not options.get("do_sample"):
            return None
        if unknown := sorted(options.keys() - UNUSED):
            raise ValueError(
                f"generation option {unknown[0]}={options[unknown[0]]!r} of a task that samples is not supported; only "
                f"temperature is (or set do_sample to false)"
            )
        temperature = float(options.get("temperature", 1.0))
        if temperature <= 0:
            return None
        drawn = [torch.Generator().manual_seed(self.seed * 1_000_003 + index) for index in members]

        def choose(member: int, logits: Tensor) -> int:
            probabilities = (logits.double().cpu() / temperature).softmax(-1)
            return int(torch.multinomial(probabilities, 1, generator=drawn[member]))

        return choose


def register() -> None:
    """Make `--model openxlstm` known to lm-eval, where it has not read the entry point by itself."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=OpenXLSTMLM)


def task_manager(names: list[str], include_path: Path | None) -> TaskManager:
    """What lm-eval knows of its own tasks, or of those in `include_path` alone.

    Raises:
        ValueError: a name that is not among them, with the nearest one that is. Patterns (`arc_*`) may match nothing.
    """
    local = include_path is not None
    manager = TaskManager(include_path=str(include_path) if local else None, include_defaults=not local)
    for name in names:
        if name not in manager.all_tasks and not set(name) & set("*?"):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            raise ValueError(
                f"{include_path or 'lm-eval'} has no task {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
            )
    return manager


def run(
    lm: OpenXLSTMLM, names: list[str], manager: TaskManager, *, limit: int | None = None, num_fewshot: int | None = None
) -> dict[str, Any]:
    """lm-eval's results of these tasks, without samples and without bootstrapped errors."""
    found = lm_eval.simple_evaluate(
        lm,
        tasks=names,
        limit=limit,
        num_fewshot=num_fewshot,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    assert found is not None, "one process computes everything, so it has the results"
    return dict(found)


def write_local_tasks(folder: Path, files: Mapping[str, Path]) -> None:
    """Official tasks with their data in local files: a YAML for each, which includes lm-eval's own, for `include_path`.

    Prompts and metrics stay those of the installed lm-eval; only where the rows are changes.

    Args:
        files: name of a task of `choice.TASKS` to the JSONL file of its rows.

    Raises:
        ValueError: a name that is not among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        task = choice.task_of(name)
        official = Path(lm_eval.__file__).parent / "tasks" / task.official
        others = [split for split in ("training", "validation", "test") if split != task.split]
        (folder / f"{name}.yaml").write_text(
            f"include: {official}\ntask: {name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {{data_files: {{{task.split}: {json.dumps(str(file.resolve()))}}}}}\n"
            f"{task.split}_split: {task.split}\n" + "".join(f"{split}_split: null\n" for split in others),
            encoding="utf-8",
        )
