"""Known configurations, as specs to start from.

Each says where its numbers come from. Where a source gives no planned length, `total` is the
end of the decay; nothing else is added but names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from lrpilot.core._spec import RunSpec, parse_spec


@dataclass(frozen=True, slots=True)
class Preset:
    """A known configuration."""

    summary: str
    """What it is, in one line."""
    source: str
    """Where the numbers come from, and what was read into them."""
    spec: RunSpec
    """The configuration; the run is named after the preset."""


def _preset(name: str, summary: str, source: str, **fields: Any) -> tuple[str, Preset]:
    return name, Preset(summary, source, parse_spec({"name": name, **fields}))


_TRILLION = 10**12
_DEEPSEEK_WARMUP = 2000 * 3072 * 4096

PRESETS: Mapping[str, Preset] = MappingProxyType(
    dict(
        (
            _preset(
                "gpt3-175b",
                "GPT-3 175B, the tutorial: cosine to 1e-5 over 100k iterations",
                "Megatron-LM's tutorial for GPT-3 175B. It names no length: total is the decay's.",
                unit="iterations",
                total=100_000,
                learning_rate={
                    "peak": 1.5e-4,
                    "min": 1e-5,
                    "warmup": 3000,
                    "decay": {"style": "cosine", "end": 100_000},
                },
                weight_decay=0.1,
            ),
            _preset(
                "gpt3-175b-script",
                "GPT-3 175B, the script: cosine to 6e-6 over 430k of 500k iterations",
                "Megatron-LM, examples/gpt3/train_gpt3_175b_distributed.sh. Its batch ramp makes"
                " the first iterations smaller; it counts samples, this counts iterations.",
                unit="iterations",
                total=500_000,
                learning_rate={
                    "peak": 6e-5,
                    "min": 6e-6,
                    "warmup": "0.1%",
                    "decay": {"style": "cosine", "end": 430_000},
                },
                weight_decay=0.1,
            ),
            _preset(
                "llama3-8b-fp8",
                "Llama3-8B FP8 on H100, the tutorial: linear to 1e-5 over 50k iterations",
                "The tutorial for Llama3-8B FP8 on H100. It names no length, total is the decay's,"
                " and no WD: the optimizer's own is left alone.",
                unit="iterations",
                total=50_000,
                learning_rate={
                    "peak": 2e-4,
                    "min": 1e-5,
                    "warmup": 1000,
                    "decay": {"style": "linear", "end": 50_000},
                },
            ),
            _preset(
                "llama3-8b-fp8-script",
                "Llama3-8B FP8 on H100, the script: cosine to 1e-5 in samples, decoupled LR",
                "Megatron-LM, examples/llama/train_llama3_8b_h100_fp8.sh. The decoupled LR is that"
                " of the embedding and the output; biases and norms have no WD.",
                unit="samples",
                total=1_953_125_000,
                learning_rate={
                    "peak": 1.5e-4,
                    "min": 1e-5,
                    "warmup": 3_906_252,
                    "decay": {"style": "cosine", "end": 1_949_218_748},
                },
                weight_decay=0.1,
                groups=[
                    {"name": "matrices"},
                    {"name": "no_decay", "weight_decay_multiplier": 0.0},
                    {"name": "embedding_and_output", "peak": 5e-4, "min": 4.5e-5},
                ],
            ),
            _preset(
                "deepseek-v3",
                "DeepSeek-V3: flat to 10T tokens, cosine over 4.3T to 2.2e-5, two flat stages",
                "The DeepSeek-V3 technical report. Its warmup is 2000 steps; in tokens they are"
                " counted at the first batch, of 3072 sequences of 4096 tokens.",
                unit="tokens",
                total=14_800 * _TRILLION // 1000,
                learning_rate={"peak": 2.2e-4},
                weight_decay=0.1,
                stages=[
                    {
                        "name": "flat",
                        "until": 10 * _TRILLION,
                        "learning_rate": {"warmup": _DEEPSEEK_WARMUP},
                    },
                    {
                        "name": "cosine",
                        "until": 14_300 * _TRILLION // 1000,
                        "learning_rate": {"min": 2.2e-5, "decay": {"style": "cosine"}},
                    },
                    {
                        "name": "low",
                        "until": 14_633 * _TRILLION // 1000,
                        "learning_rate": {"peak": 2.2e-5},
                    },
                    {"name": "lowest", "learning_rate": {"peak": 7.3e-6}},
                ],
            ),
        )
    )
)
"""By name."""
