"""The CUDA-graph decoder, everything but the capture: addresses, buckets, rows that leave, the model's numbers."""

from collections.abc import Callable

import pytest
import torch

import openxlstm as ox
from openxlstm.infer.graph import GraphDecoder, bucket, refuses

MODELS = [
    lambda: ox.xLSTM(ox.xLSTMConfig(vocab_size=23, width=32, heads=2, pattern="ms")),
    lambda: ox.xLSTMLarge(ox.xLSTMLargeConfig(vocab_size=23, width=32, heads=2, blocks=2)),
]


class Recorder:
    """Stands for the capture: counts it, and lets the step fall on whatever the buffers then hold."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        step()  # a capture runs the step's Python once
        return step


@pytest.mark.parametrize("make", MODELS)
def test_rows_leave_and_the_rest_goes_on_as_the_model_would(make: Callable[[], ox.xLSTM]) -> None:
    model, recorder = make().eval(), Recorder()
    prompt = torch.randint(23, (5, 9))
    with torch.no_grad():
        _, state = model(prompt)
        kept = state.clone()
        decoder = GraphDecoder(model, state, recorder)
        addresses = [x.data_ptr() for x in decoder._state.tensors()]
        rows = [0, 1, 2, 3, 4]
        for step, leave in enumerate((None, 1, None, 2, 0, None)):
            if leave is not None:
                rows.pop(leave)
                keep = torch.tensor([r for r in range(len(rows) + 1) if r != leave])
                decoder.select(keep)
                state = state.select(keep)
            tokens = torch.randint(23, (len(rows),))
            want, state = model(tokens[:, None], state)
            torch.testing.assert_close(decoder.step(tokens), want[:, 0], rtol=1e-5, atol=1e-5)
            if step == 1:  # 4 rows: another bucket
                assert recorder.captures == 2
                addresses = [x.data_ptr() for x in decoder._state.tensors()]
            if step in (0, 2, 3):  # 5 rows; 4; 3, which stay in the bucket of 4
                assert addresses == [x.data_ptr() for x in decoder._state.tensors()]
        assert recorder.captures == 3
        assert decoder.reason is None
        for a, b in zip(decoder.state.tensors(), state.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    _, again = model(prompt)
    for a, b in zip(kept.tensors(), again.tensors(), strict=True):
        torch.testing.assert_close(a, b)  # what was passed in was not written to


def test_what_cannot_be_captured_runs_plainly_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = MODELS[0]().eval()
    _, state = model(torch.randint(23, (2, 3)))
    assert "CUDA device" in str(refuses(model))
    assert "CUDA device" in str(GraphDecoder(model, state).reason)

    def fails(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    decoder = GraphDecoder(model, state, fails)
    assert "not permitted" in str(decoder.reason)
    assert "not permitted" in caplog.text
    tokens = torch.tensor([4, 5])
    with torch.no_grad():
        torch.testing.assert_close(decoder.step(tokens), model(tokens[:, None], state)[0][:, 0])
    with pytest.raises(ValueError, match="one for every row"):
        decoder.step(torch.tensor([1]))


def test_buckets_are_powers_of_two() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
