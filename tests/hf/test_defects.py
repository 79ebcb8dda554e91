"""Every defect of the in-tree model, absent in ours; and present there: a check that cannot fail shows nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hf.defects import CHECKS, Kit

import openxlstm.hf as oxhf

TESTS = Path(__file__).parents[1]

OURS = Kit(
    config=oxhf.xLSTMConfig,
    build=oxhf.xLSTMForCausalLM,
    module=oxhf,
    tensors=lambda cache: cache.to_state().tensors(),
    read=lambda cache: cache.seen_tokens + cache.get_seq_length(),
)
IN_TREE = Kit(
    config=transformers.xLSTMConfig,
    build=transformers.xLSTMForCausalLM,
    module=transformers,
    tensors=lambda cache: [tensor for state in cache.rnn_state.values() for tensor in state],
    read=lambda cache: int(cache.seqlen_offset),
)


def test_all_thirty_are_here() -> None:
    assert list(CHECKS) == [f"{number:02}" for number in range(1, 31)]


@pytest.mark.parametrize("number", CHECKS)
def test_ours_is_free_of_defect(number: str) -> None:
    CHECKS[number](OURS)


@pytest.mark.slow
@pytest.mark.parametrize("number", [number for number in CHECKS if number != "30"])
def test_the_in_tree_model_has_defect(number: str) -> None:
    """If one is mended upstream, this says so, and the sentence in our documents goes."""
    with pytest.raises((Exception, pytest.fail.Exception)):
        CHECKS[number](IN_TREE)


@pytest.mark.slow
def test_the_in_tree_model_has_defect_30_without_the_package_xlstm() -> None:
    """With it, kernels of that package pad the last chunk. Without: 7401 operations for 63 tokens, 473 for 64."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import transformers.utils as utils, transformers.utils.import_utils as of\n"
            "of.is_xlstm_available = utils.is_xlstm_available = lambda: False\n"
            "from hf.test_defects import CHECKS, IN_TREE\n"
            "CHECKS['30'](IN_TREE)\n",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "in check_30" in done.stderr
    assert "AssertionError: [" in done.stderr
