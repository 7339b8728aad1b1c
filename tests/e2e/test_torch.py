"""The Python API of the contract, with real optimizers of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

import lrpilot.client as lrpilot
from tests.e2e.harness import DEADLINE_S, ROOT, Expected, Runs, Spec, make_spec
from tests.e2e.training import loss_at
from tests.rules.reference import Hex
from tests.server.conftest import Program
from tests.side_by_side import said_by

Connect = Callable[..., lrpilot.Pilot]

GROUPS = [
    {"name": "matrices"},
    {"name": "no_decay", "weight_decay_multiplier": 0.0},
    {"name": "embedding", "peak": 5e-3},
]


def parameter(value: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor([value]))


def values_of(optimizer: torch.optim.Optimizer) -> Hex:
    """LR and then WD of every param group, as `float.hex`."""
    groups = optimizer.param_groups
    return tuple(float(group[key]).hex() for key in ("lr", "weight_decay") for group in groups)


def train(
    scheduler: lrpilot.Scheduler, optimizer: torch.optim.Optimizer, end: int, increment: int = 1
) -> dict[int, Hex]:
    """Train to a progress; return what was used at each before it."""
    used = {}
    while scheduler.progress < end:
        used[scheduler.progress] = values_of(optimizer)
        loss = sum(p.sum() for group in optimizer.param_groups for p in group["params"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # A tensor that is part of a graph, as a training loop has it.
        scheduler.step(increment, loss=loss * 0.0 + loss_at(scheduler.progress))
    return used


def expected(spec: Spec, end: int, increment: int = 1) -> dict[int, Hex]:
    """What the losses of `train` lead to."""
    reference = Expected.of(spec)
    reference.open(0)
    # A loss travels as the float32 that the tensor holds.
    reference.feed({n: torch.tensor(loss_at(n)).item() for n in range(0, end, increment)})
    return {n: reference.expected(n) for n in range(0, end, increment)}


class TestParamGroups:
    def test_by_name(self, shared: Program, connect: Connect) -> None:
        """In another order than in the spec, and two of one name."""
        spec = make_spec("by-name", groups=GROUPS)
        names = ("embedding", "matrices", "no_decay", "matrices")
        optimizer = torch.optim.AdamW([{"name": name, "params": [parameter()]} for name in names])
        scheduler = connect(shared.grpc, "by-name", spec=spec).scheduler(optimizer)
        used = train(scheduler, optimizer, 60)
        for n, (m, o, e, m_wd, o_wd, e_wd) in expected(spec, 60).items():
            assert used[n] == (e, m, o, m, e_wd, m_wd, o_wd, m_wd)
            assert o_wd == (0.0).hex()

    def test_by_position_in_samples(self, shared: Program, connect: Connect) -> None:
        spec = make_spec("by-position", groups=GROUPS, unit="samples", delay=128)
        optimizer = torch.optim.AdamW([{"params": [parameter()]} for _ in GROUPS])
        scheduler = connect(shared.grpc, "by-position", spec=spec).scheduler(optimizer)
        assert train(scheduler, optimizer, 64 * 60, 64) == expected(spec, 64 * 60, 64)

    def test_groups_that_the_spec_does_not_have(self, shared: Program, connect: Connect) -> None:
        pilot = connect(shared.grpc, "strange", spec=make_spec("strange", groups=GROUPS))
        optimizer = torch.optim.AdamW([{"name": "matrix", "params": [parameter()]}])
        with pytest.raises(lrpilot.GroupMismatch, match="matrix"):
            pilot.scheduler(optimizer)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_tensor_is_filled_in_place(
        self, shared: Program, connect: Connect, dtype: torch.dtype
    ) -> None:
        """What compiled and captured optimizers hold on to stays the same object."""
        name = f"tensor-{dtype}".replace("torch.", "")
        rate = torch.tensor(1.0, dtype=dtype)
        optimizer = torch.optim.AdamW([parameter()], lr=rate, foreach=False)
        scheduler = connect(shared.grpc, name, spec=(spec := make_spec(name))).scheduler(optimizer)
        used = train(scheduler, optimizer, 30)
        assert optimizer.param_groups[0]["lr"] is rate
        for n, (lr, decay) in expected(spec, 30).items():
            held = torch.tensor(float.fromhex(lr), dtype=dtype).item()
            assert used[n] == (held.hex(), decay)

    def test_its_weight_decay_is_left_alone(self, shared: Program, connect: Connect) -> None:
        spec = make_spec("no-decay")
        del spec["weight_decay"]
        optimizer = torch.optim.AdamW([parameter()], weight_decay=0.37)
        scheduler = connect(shared.grpc, "no-decay", spec=spec).scheduler(optimizer)
        used = train(scheduler, optimizer, 30)
        assert used == {n: (*lr, (0.37).hex()) for n, lr in expected(spec, 30).items()}
        assert "initial_weight_decay" not in optimizer.param_groups[0]


class TestDeferred:
    """The attempt opens at what comes first; until then the optimizer is left alone."""

    @pytest.fixture
    def deferred(
        self, shared: Program, connect: Connect, request: pytest.FixtureRequest
    ) -> tuple[lrpilot.Pilot, lrpilot.Scheduler, torch.optim.Optimizer]:
        name = request.node.name.replace("_", "-")[:60]
        pilot = connect(shared.grpc, name, spec=make_spec(name))
        optimizer = torch.optim.SGD([parameter(3.0)], lr=0.5, weight_decay=0.5)
        scheduler = pilot.scheduler(optimizer, defer=True)
        assert pilot.attempt is None
        assert optimizer.param_groups[0]["lr"] == 0.5
        with pytest.raises(lrpilot.AttemptNotOpen):
            scheduler.step()
        return pilot, scheduler, optimizer

    def test_at_the_first_step(self, deferred: Any) -> None:
        pilot, scheduler, optimizer = deferred
        weight = optimizer.param_groups[0]["params"][0]
        weight.grad = torch.tensor([1.0])
        optimizer.step()
        # The LR was there before the step used it.
        assert (pilot.attempt, scheduler.progress) == (1, 0)
        decayed = torch.tensor([3.0]) * 0.01 + 1.0
        torch.testing.assert_close(weight.detach(), torch.tensor([3.0]) - 1e-3 * decayed)
        assert len(train(scheduler, optimizer, 20)) == 20
        # What opened it is no longer asked at each step; what sees a captured one is.
        names = [hook.__name__ for hook in optimizer._optimizer_step_pre_hooks.values()]
        assert names == ["_before_step"]

    def test_at_apply(self, deferred: Any) -> None:
        pilot, scheduler, optimizer = deferred
        scheduler.apply()
        assert (pilot.attempt, scheduler.progress) == (1, 0)
        assert optimizer.param_groups[0]["lr"] == 1e-3
        optimizer.step()
        assert pilot.attempt == 1

    def test_at_load_state_dict(self, deferred: Any, shared: Program, connect: Connect) -> None:
        pilot, scheduler, optimizer = deferred
        scheduler.load_state_dict(scheduler.state_dict())
        assert (pilot.attempt, scheduler.progress) == (1, 0)
        first = train(scheduler, optimizer, 40)
        scheduler.step()
        state = scheduler.state_dict()
        optimizer = torch.optim.SGD([parameter(3.0)], lr=0.5, weight_decay=0.5)
        again = connect(shared.grpc, pilot.run).scheduler(optimizer, defer=True)
        again.load_state_dict(state)
        assert again.progress == 41
        second = train(again, optimizer, 60)
        spec = make_spec(pilot.run)
        reference = Expected.of(spec)
        reference.open(0)
        losses: dict[int, float | None] = {
            n: torch.tensor(loss_at(n)).item() for n in range(60) if n != 40
        }
        reference.feed(losses | {40: None})
        for n, got in (first | second).items():
            assert got == reference.expected(n)


def test_a_checkpoint_of_plain_types(shared: Program, connect: Connect) -> None:
    """Through torch.save and a load that takes nothing but plain types; a WD of 0 stays 0."""
    spec = make_spec("checkpoint")

    def build() -> torch.optim.Optimizer:
        groups = [{"params": [parameter()]}, {"params": [parameter()], "weight_decay": 0.0}]
        return torch.optim.AdamW(groups)

    optimizer = build()
    scheduler = connect(shared.grpc, "checkpoint", spec=spec).scheduler(optimizer)
    used = train(scheduler, optimizer, 30)
    file = BytesIO()
    torch.save(
        {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()},
        file,
    )
    train(scheduler, optimizer, 50)

    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    optimizer = build()
    optimizer.load_state_dict(checkpoint["optimizer"])
    pilot = connect(shared.grpc, "checkpoint", spec=spec)
    scheduler = pilot.scheduler(optimizer, state=checkpoint["scheduler"])
    assert (pilot.attempt, scheduler.progress) == (2, 30)
    # A framework that restores the scheduler once more changes nothing.
    scheduler.load_state_dict(checkpoint["scheduler"])
    used |= train(scheduler, optimizer, 90)
    wanted = expected(spec, 90)
    assert used == {n: (lr, lr, decay, (0.0).hex()) for n, (lr, decay) in wanted.items()}
    # What loads into the optimizer later replaces its groups; they are written again.
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.apply()
    here = values_of(optimizer)
    assert here[:2] != used[30][:2]
    assert here[3] == (0.0).hex()


def test_a_weight_decay_that_a_ramp_began_at_zero(shared: Program, connect: Connect) -> None:
    """A checkpoint holds it, and the group is not taken for one that has none of its own."""
    ramp = {"start": 0.0, "end": 0.1, "style": "linear", "over": 1000}
    spec = make_spec("ramp", weight_decay=ramp)
    optimizer = torch.optim.AdamW([parameter()])
    scheduler = connect(shared.grpc, "ramp", spec=spec).scheduler(optimizer)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    saved, state = optimizer.state_dict(), scheduler.state_dict()

    optimizer = torch.optim.AdamW([parameter()])
    optimizer.load_state_dict(saved)
    scheduler = connect(shared.grpc, "ramp", spec=spec).scheduler(optimizer, state=state)
    assert train(scheduler, optimizer, 30) == expected(spec, 30)


def test_several_ranks_need_something_to_agree_over(
    shared: Program, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    spec = make_spec("two-ranks")
    with pytest.raises(lrpilot.ConnectRefused, match=r"init_process_group\(\).*key="):
        connect(shared.grpc, "two-ranks", spec=spec)
    assert connect(shared.grpc, "two-ranks", spec=spec, key="given").rank == 0


def test_torch_is_never_imported_by_the_client(shared: Program) -> None:
    program = """
import sys
import lrpilot.client as lrpilot

class Optimizer:
    param_groups = [{"lr": 1.0, "weight_decay": 1.0}]

with lrpilot.connect(sys.argv[1], run="thin", spec=sys.argv[2]) as pilot:
    scheduler = pilot.scheduler(Optimizer())
    for _ in range(20):
        scheduler.step(loss=1.0)
    scheduler.state_dict()
    assert pilot.values(20)
    pilot.report(20, 1.0)
heavy = {"torch", "numpy", "pydantic", "yaml", "sqlalchemy", "lrpilot.core", "lrpilot.server"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    document = json.dumps(make_spec("thin"), indent=1)
    command = [sys.executable, "-W", "error", "-c", program, shared.grpc, document]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr


class TestTwoRanks:
    def run(self, shared: Program, tmp_path: Path, spec: Spec, **plan: Any) -> list[Any]:
        """Run both ranks; return what each said."""
        plan |= {
            "address": shared.grpc,
            "spec": spec,
            "checkpoint": str(tmp_path / "checkpoint.pt"),
            "rendezvous": (tmp_path / f"rendezvous-{plan['resumes']}").as_uri(),
        }
        program = str(ROOT / "tests/e2e/torch_program.py")
        return said_by(
            [[sys.executable, program, json.dumps(plan | {"rank": rank})] for rank in range(2)]
        )

    def test_they_use_the_same_bits(self, shared: Program, tmp_path: Path) -> None:
        spec = make_spec(
            "gloo",
            groups=[{"name": "weight"}, {"name": "bias", "weight_decay_multiplier": 0.0}],
            policies=[{"kind": "plateau", "patience": 1, "factor": 0.7}],
        )
        first, second = self.run(shared, tmp_path, spec, resumes=False, until=60, save_at=30)
        assert first == second
        assert first["attempt"] == 1
        assert [n for n, _, _ in first["used"]] == list(range(60))
        self.check(spec, first["used"])

        # Both go on from what rank 0 alone has saved; the same losses lead to the same values.
        resumed = self.run(shared, tmp_path, spec, resumes=True, until=80, save_at=None)
        assert resumed[0] == resumed[1]
        assert resumed[0]["attempt"] == 2
        assert resumed[0]["used"][:30] == first["used"][30:]
        self.check(spec, first["used"][:30] + resumed[0]["used"])
        with Runs(shared.grpc) as runs:
            run = runs.run("gloo")
        assert (run.attempt, run.waivers, run.losses) == (2, 0, 80)

    def check(self, spec: Spec, used: list[Any]) -> None:
        reference = Expected.of(spec)
        reference.open(0)
        reference.feed({n: float.fromhex(loss) for n, loss, _ in used})
        assert len(reference.decided().cuts) >= 2
        for n, _, values in used:
            assert tuple(values) == reference.expected(n)


PLATEAUS: list[dict[str, Any]] = [
    {"factor": 0.5, "patience": 0},
    {"factor": 0.3, "patience": 2, "cooldown": 3, "threshold": 0.05, "min_lr": 1e-3},
    {"factor": 0.9, "patience": 1, "threshold": 1e-3, "threshold_mode": "abs", "eps": 1e-4},
    {"factor": 0.7, "patience": 1, "objective": "max"},
]


@pytest.mark.parametrize("number", range(len(PLATEAUS)))
def test_it_is_reduce_lr_on_plateau(shared: Program, connect: Connect, number: int) -> None:
    """Two twins learn the same task, one under torch's scheduler; every LR is the same."""
    fields = PLATEAUS[number]
    spec = {
        "name": f"parity-{number}",
        "total": 1000,
        "learning_rate": {"peak": 0.4, "decay": {"style": "constant"}},
        "groups": [{"name": "weight"}, {"name": "bias", "peak": 0.1}],
        "policies": [{"kind": "plateau", "nonfinite": "count", **fields}],
        "feedback": {"delay": 1, "timeout": "60s"},
    }
    options = {"mode" if name == "objective" else name: value for name, value in fields.items()}

    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = torch.nn.Linear(4, 1)
        groups = [
            {"name": "weight", "params": [model.weight], "lr": 0.4},
            {"name": "bias", "params": [model.bias], "lr": 0.1},
        ]
        return model, torch.optim.SGD(groups)

    def learn(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> Any:
        torch.manual_seed(step)
        inputs = torch.randn(8, 4)
        loss = ((model(inputs) - inputs.sum(1, keepdim=True) - torch.randn(8, 1)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        special = {20: "nan", 21: "nan", 50: "inf", 90: "-inf" if number == 0 else "nan"}
        return float(special[step]) if step in special else loss.detach()

    (model, optimizer), (twin, twins) = build(), build()
    theirs = ReduceLROnPlateau(twins, **options)
    scheduler = connect(shared.grpc, spec["name"], spec=spec).scheduler(optimizer)
    seen = set()
    for step in range(120):
        seen.add(values_of(optimizer))
        assert values_of(optimizer) == values_of(twins), step
        scheduler.step(loss=learn(model, optimizer, step))
        theirs.step(learn(twin, twins, step))
    assert len(seen) > 3
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)
