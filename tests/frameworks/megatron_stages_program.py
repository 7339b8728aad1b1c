"""One of two pipeline stages, each with param groups of its own; run by test_megatron.py.

Prints one JSON object: who reports, LR by param group at each step, and how a state was refused.
"""

import json
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from lrpilot.client import InvalidArgument
from lrpilot.client.megatron import connected, reporting

RANK, RENDEZVOUS, ADDRESS, RUN = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]

warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")

MAIN = {"max_lr": 1e-3, "min_lr": 1e-5, "wd_mult": 1.0}

STAGES: list[dict[str, dict[str, Any]]] = [
    {"embedding": {"max_lr": 5e-4, "min_lr": 1e-5, "is_decoupled_lr": True}, "main": MAIN},
    {"main": MAIN, "bias": {**MAIN, "wd_mult": 0.0}},
]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": [torch.nn.Parameter(torch.ones(2))], **keys}
            for name, keys in STAGES[RANK].items()
        ]
    )


@reporting
def train_step(optimizer: Any, opt_param_scheduler: Any) -> Any:
    optimizer.step()
    opt_param_scheduler.step(increment=16)
    # The last stage alone has the loss, and it is the same on all of its ranks.
    losses = {"lm loss": torch.tensor(1.0)} if RANK == 1 else {}
    return losses, 0, False, False, 0, None, None


def refusal(held: torch.optim.Optimizer, scheduler: Any) -> str:
    """Load a checkpoint in which one stage alone has other bounds, and return what was said."""
    if RANK == 0:
        held.param_groups[0]["max_lr"] = 9e-4
    try:
        scheduler.load_state_dict(scheduler.megatron_state_dict(force=True))
    except InvalidArgument as error:
        return str(error)
    return ""


def main() -> None:
    from megatron.core import parallel_state

    dist.init_process_group("gloo", init_method=RENDEZVOUS, rank=RANK, world_size=2)
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    held = optimizer()
    scheduler = connected(
        ADDRESS,
        run=RUN,
        policies=[{"kind": "plateau", "patience": 1, "factor": 0.5, "threshold": 0.0}],
        feedback={"delay": 32},
    )(held, 0.0, 1e-3, 1e-5, 0, 1600, "constant", 0.1, 0.1, 1600, "constant", False)
    used = []
    for _ in range(6):
        train_step(held, scheduler)
        rates = [group["lr"] for group in held.param_groups]
        used.append(dict(zip(STAGES[RANK], rates, strict=True)))
    (reporter,) = scheduler.pilot._session._reporters
    refused = refusal(held, scheduler)
    sys.stdout.write(json.dumps({"reporter": reporter, "used": used, "refused": refused}))
    scheduler.close()
    dist.destroy_process_group()


main()
