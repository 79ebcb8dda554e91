"""Published configurations: name -> config, with the source and a number of parameters that a test recomputes.

Every size is written out; none depends on a rounding rule. Vocabulary 50,304 everywhere: GPT-2's 50,257 tokens padded
to a multiple of 64, which reproduces the printed counts.

Two things to know. The paper lists positions of sLSTM blocks without saying whether it counts from 0 or 1; the
released code counts from 0, and so do we. Its 125M "xLSTM[7:1]" has 2 sLSTM blocks of 24, which is really 11:1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from openxlstm.models.checks import did_you_mean
from openxlstm.models.xlstm import xLSTMConfig
from openxlstm.models.xlstm_large import xLSTMLargeConfig

ConfigT = TypeVar("ConfigT", xLSTMConfig, xLSTMLargeConfig)


@dataclass(frozen=True, slots=True)
class Preset:
    """A published model: what it is, how many parameters its source (or its shapes) give, where it is from."""

    config: xLSTMConfig | xLSTMLargeConfig
    parameters: int
    source: str


def _pattern(blocks: int, slstm_at: tuple[int, ...]) -> str:
    return "".join("s" if index in slstm_at else "m" for index in range(blocks))


def _neurips(width: int, blocks: int, mlstm_width: int, ffn_width: int, slstm_at: tuple[int, ...] = ()) -> xLSTMConfig:
    return xLSTMConfig(
        vocab_size=50_304,
        width=width,
        pattern=_pattern(blocks, slstm_at),
        heads=4,
        mlstm_width=mlstm_width,
        ffn_width=ffn_width,
    )


def _large(width: int, blocks: int, heads: int, ffn_width: int) -> xLSTMLargeConfig:
    return xLSTMLargeConfig(
        vocab_size=50_304,
        width=width,
        blocks=blocks,
        heads=heads,
        qk_width=width // 2,
        v_width=width,
        ffn_width=ffn_width,
    )


_TABLE_7 = "arXiv:2405.04517, Table 7 and App. B.2"
_TABLE_7_COUNT = f"{_TABLE_7}; printed as 2788.3M, these shapes give 2788.4M"
_LADDER = "arXiv:2510.02228 and NX-AI/xlstm_scaling_laws, notebooks/run_dataset_tables.ipynb"
_SIX = (3, 5, 7, 40, 42, 44)

PRESETS: dict[str, Preset] = {
    "xlstm-125m": Preset(_neurips(768, 24, 1536, 1024), 163_806_144, _TABLE_7),
    "xlstm-125m-7-1": Preset(_neurips(768, 24, 1536, 1024, (3, 20)), 163_690_928, _TABLE_7),
    "xlstm-350m": Preset(_neurips(1024, 48, 2048, 1344), 409_290_112, _TABLE_7),
    "xlstm-350m-7-1": Preset(_neurips(1024, 48, 2048, 1344, _SIX), 408_436_048, _TABLE_7),
    "xlstm-760m": Preset(_neurips(1536, 48, 3072, 2048), 840_427_392, _TABLE_7),
    "xlstm-760m-7-1": Preset(_neurips(1536, 48, 3072, 2048, _SIX), 839_736_144, _TABLE_7),
    "xlstm-1.3b": Preset(_neurips(2048, 48, 4096, 2688), 1_422_559_616, _TABLE_7),
    "xlstm-1.3b-7-1": Preset(_neurips(2048, 48, 4096, 2688, _SIX), 1_420_065_104, _TABLE_7),
    "xlstm-2.7b": Preset(_neurips(2560, 64, 5120, 3328), 2_788_396_032, _TABLE_7_COUNT),
    "xlstm-large-164m": Preset(_large(768, 12, 6, 2112), 164_110_224, _LADDER),
    "xlstm-large-406m": Preset(_large(1024, 24, 4, 2752), 406_856_896, _LADDER),
    "xlstm-large-841m": Preset(_large(1536, 24, 4, 4160), 841_496_256, _LADDER),
    "xlstm-large-1.4b": Preset(_large(2048, 24, 4, 5504), 1_420_839_104, _LADDER),
    "xlstm-large-2.8b": Preset(_large(2560, 32, 5, 6848), 2_780_449_600, _LADDER),
    "xlstm-7b": Preset(_large(4096, 32, 8, 10_944), 6_865_424_896, "arXiv:2503.13427, Sec. 3 and App. A"),
}


def config_of(name: str, kind: type[ConfigT]) -> ConfigT:
    """The config of a preset, which must be of this architecture."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}{did_you_mean(name, PRESETS)}; known: {', '.join(PRESETS)}")
    config = PRESETS[name].config
    if not isinstance(config, kind):
        other = "xLSTM" if isinstance(config, xLSTMConfig) else "xLSTMLarge"
        raise ValueError(f"{name} is of the other architecture; use {other}.from_preset({name!r})")
    return config
