"""The model class of lm-eval: what it answers to a batch of requests is what each request gets alone."""

import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry
from models.small_models import awake

from openxlstm.checkpoint.store import save
from openxlstm.data.tokenizer import Tokenizer
from openxlstm.models.xlstm import xLSTM, xLSTMConfig
from openxlstm.tasks import lm_eval as ours

END = 256
TEXTS = ["A", "Paris is the capital of France.", "zwölf Bären", "x" * 70, "one two three four five", "\n"]
PAIRS = [
    ("", "Berlin"), ("The capital of France is", " Paris"), ("The capital of France is", " Berlin, of course"),
    ("The capital of France is ", "Rome"), ("Q", "A"), (TEXTS[3], " y"), ("über", "all"), ("The capital", " of"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save(awake(xLSTM(xLSTMConfig(vocab_size=264, width=12, heads=3, pattern="ms", mlstm_width=24))), path)
    Tokenizer.bytes().save(path / "tokenizer.json")
    return path


def instances(kind, arguments):
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


def alone(model, context, continuation):
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]]))[0][0, len(context) - 1 : -1].double()
    logprobs = logits.log_softmax(-1)[torch.arange(len(continuation)), continuation]
    return logprobs.sum().item(), logits.argmax(-1).tolist() == list(continuation)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5])
def test_loglikelihood_is_that_of_each_request_alone(folder, batch_size, bos):
    """The end id stands before every context with bos, and before an empty one in any case."""
    lm = ours.OpenXLSTMLM(str(folder), batch_size=batch_size, device="cpu", bos=bos)
    got = lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(PAIRS, got, strict=True):
        whole = (context + continuation).encode()
        split = len(context.rstrip().encode())
        before = [END, *whole[:split]] if bos or not context else list(whole[:split])
        want = alone(lm.model, before, list(whole[split:]))
        assert logprob == pytest.approx(want[0], abs=1e-5 * max(1, abs(want[0])))
        assert greedy == want[1]


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_rolling_of_both_kinds_is_that_of_each_text_alone(folder, batch_size):
    requests = instances("loglikelihood_rolling", [(text,) for text in TEXTS])
    options = {"batch_size": batch_size, "device": "cpu"}
    stateful = ours.OpenXLSTMLM(str(folder), **options)
    want = [alone(stateful.model, [END], list(text.encode()))[0] for text in TEXTS]
    assert stateful.loglikelihood_rolling(requests) == pytest.approx(want, rel=1e-5)

    windowed = ours.OpenXLSTMLM(str(folder), rolling="windows", window=16, **options)
    want = []
    for text in TEXTS:
        pairs = ours.scoring.windows(list(text.encode()), END, 16)
        want.append(sum(alone(windowed.model, *pair)[0] for pair in pairs))
    assert windowed.loglikelihood_rolling(requests) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("options", [{"max_gen_toks": 9}, {"until": ["e", "o"], "max_new_tokens": 6}])
def test_generation_is_that_of_each_request_alone(folder, options):
    """Greedy and sampled texts at every batch size, with options that differ between requests."""
    for more in ({}, {"do_sample": True, "temperature": 0.9}):
        arguments = [(context, {**options, **more}) for context, _ in PAIRS]
        arguments[1] = (arguments[1][0], {"max_gen_toks": 3})
        results = []
        for batch_size in (1, 2, 3, 4, 5):
            lm = ours.OpenXLSTMLM(str(folder), batch_size=batch_size, device="cpu")
            results.append(lm.generate_until(instances("generate_until", arguments)))
        assert all(one == results[0] for one in results)
        assert not any("e" in text for text in results[0][2:]) or "until" not in options
    greedy = results[0][1]  # the request without do_sample
    context, written = [END, *PAIRS[1][0].encode()], []
    for _ in range(3):
        written.append(lm.model(torch.tensor([[*context, *written]]))[0][0, -1, :257].argmax().item())
    assert greedy == lm._tokenizer.decode([token for token in written if token != END])


def test_it_is_found_by_name_and_by_argument_string(folder):
    ours.register()
    ours.register()
    assert get_model("openxlstm") is ours.OpenXLSTMLM
    assert "openxlstm" in model_registry
    text = f"pretrained={folder},dtype=bfloat16,rolling=windows,window=32,bos=False"
    lm = ours.OpenXLSTMLM.create_from_arg_string(text, {"batch_size": 4, "device": "cpu"})
    assert (lm.batch_size, lm.rolling, lm.window, lm.bos) == (4, "windows", 32, False)
    assert next(lm.model.parameters()).dtype == torch.bfloat16
    assert lm.tokenizer_name == Tokenizer.bytes().sha256
    assert lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)[1][0] < 0


def test_a_run_folder_is_a_model_folder(folder, tmp_path):
    (tmp_path / "model").symlink_to(folder)
    assert ours.OpenXLSTMLM(str(tmp_path), device="cpu").eot_token_id == END


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rolling": "sliding"}, "rolling='sliding' must be one of stateful, windows"),
        ({"dtype": "fp8"}, "dtype='fp8' must be one of float32"),
        ({"batch_size": "auto"}, "batch_size='auto' must be a whole number above 0"),
        ({"tokenizer": "nowhere"}, "there is no tokenizer at nowhere"),
    ],
)
def test_a_mistake_gets_a_sentence(folder, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ours.OpenXLSTMLM(str(folder), device="cpu", **options)


def test_what_cannot_be_sampled_is_refused(folder):
    lm = ours.OpenXLSTMLM(str(folder), device="cpu")
    with pytest.raises(ValueError, match=r"generation option top_p=0.9 of a task that samples is not supported"):
        lm.generate_until(instances("generate_until", [("a", {"do_sample": True, "top_p": 0.9})]))
