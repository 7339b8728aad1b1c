"""In place of Megatron-LM's scheduler, side by side with the real class, by a real server."""

import itertools
import json
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lrpilot.client as lrpilot
from lrpilot.client.megatron import (
    ExportRefused,
    OptimizerParamScheduler,
    connected,
    reporting,
    spec_from_args,
)
from lrpilot.core import parse_spec
from lrpilot.core._schedules import base_schedule
from lrpilot.v1 import runs_pb2 as pb
from tests.e2e.harness import Runs, serve
from tests.frameworks.harness import check, train_interrupted
from tests.side_by_side import said_by

Values = list[tuple[str, str]]

GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "golden" / "megatron_state_dict.jsonl")
    .read_text(encoding="ascii")
    .splitlines()
]

NEITHER = {"override_opt_param_scheduler": False, "use_checkpoint_opt_param_scheduler": False}
OVERRIDE = NEITHER | {"override_opt_param_scheduler": True}
USE_CHECKPOINT = NEITHER | {"use_checkpoint_opt_param_scheduler": True}

COSINE: dict[str, Any] = {
    "init_lr": 1e-6, "max_lr": 1e-3, "min_lr": 1e-5, "lr_warmup_steps": 100,
    "lr_decay_steps": 1000, "lr_decay_style": "cosine", "start_wd": 0.01, "end_wd": 0.1,
    "wd_incr_steps": 1000, "wd_incr_style": "linear", "wsd_decay_steps": None,
    "lr_wsd_decay_style": None,
}  # fmt: skip

GROUPS: list[dict[str, Any]] = [
    {"wd_mult": 1.0, "lr_mult": 1.0, "max_lr": 1e-3, "min_lr": 1e-5, "is_decoupled_lr": False},
    {"wd_mult": 0.0, "lr_mult": 1.0, "max_lr": 1e-3, "min_lr": 1e-5, "is_decoupled_lr": False},
    {"wd_mult": 1.0, "lr_mult": 0.1, "max_lr": 5e-4, "min_lr": 2e-5, "is_decoupled_lr": True},
    {"wd_mult": 1.0, "start_wd": 0.3, "end_wd": 0.2},
    {"params": []},
]
"""As Megatron-LM makes them: a main one, biases, the embedding; one ramps down, one is empty."""

ARGS = {
    "train_samples": 320, "lr": 1e-2, "min_lr": 1e-3, "lr_warmup_init": 1e-4,
    "lr_warmup_samples": 80, "lr_decay_style": "cosine", "lr_wsd_decay_style": "exponential",
    "weight_decay": 0.1, "start_weight_decay": 0.01, "end_weight_decay": 0.1,
    "weight_decay_incr_style": "cosine", "decoupled_lr": 5e-3, "global_batch_size": 8,
    **NEITHER,
}  # fmt: skip

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server."""
    program = serve(tmp_path_factory.mktemp("server") / "data")
    yield program.grpc
    program.dispose()


@pytest.fixture(scope="session")
def real() -> Any:
    """Megatron-LM's own class, whose import warns of what is not installed beside it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    return OptimizerParamScheduler


class Fleet:
    """Makes schedulers, and ends what is left of them."""

    def __init__(self, server: str) -> None:
        self._server = server
        self._made: list[OptimizerParamScheduler] = []

    def name(self) -> str:
        """Return the name of a run that nobody has."""
        return f"run-{next(NUMBERS)}"

    def make(
        self,
        config: Mapping[str, Any],
        groups: Sequence[Mapping[str, Any]] = ({},),
        *,
        flags: Mapping[str, bool] = NEITHER,
        run: str = "",
        optimizer: Any = None,
        **options: Any,
    ) -> OptimizerParamScheduler:
        """Return a scheduler of a run, a new one where none is named."""
        optimizer = optimizer or bare(groups)
        made = connected(self._server, run=run or self.name(), **options)(
            optimizer, **config, **flags
        )
        self._made.append(made)
        return made

    def close(self) -> None:
        """Close every scheduler; one that was superseded has said so already."""
        for scheduler in self._made:
            if scheduler._pilot is not None:
                scheduler._pilot._end(0.0)


@pytest.fixture
def fleet(server: str) -> Iterator[Fleet]:
    """Make schedulers of runs on the server."""
    made = Fleet(server)
    yield made
    made.close()


def bare(groups: Sequence[Mapping[str, Any]]) -> Any:
    """Return all of an optimizer that Megatron-LM's scheduler needs."""
    return SimpleNamespace(param_groups=[dict(group) for group in groups])


def held(scheduler: Any) -> Values:
    """Return LR and WD of each param group, in hexadecimal."""
    return [
        (float(group["lr"]).hex(), float(group["weight_decay"]).hex())
        for group in scheduler.optimizer.param_groups
    ]


def wanted(point: Mapping[str, Any]) -> Values:
    return list(zip(point["lr_hex"], point["wd_hex"], strict=True))


def loaded(
    real: Any,
    config: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    flags: Mapping[str, bool],
    state: Mapping[str, Any],
) -> Any:
    """Return the real class after loading a state as it is meant: once, from its start, WD written.

    Loading adds num_steps there, and leaves WD as the arguments had it.
    """
    scheduler = real(bare(groups), **config, **flags)
    scheduler.load_state_dict(dict(state))
    scheduler.step(0)
    return scheduler


def same(ours: OptimizerParamScheduler, theirs: Any) -> None:
    assert ours.num_steps == theirs.num_steps
    assert held(ours) == held(theirs), f"at {theirs.num_steps}"


# The golden vectors.


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row["id"])
def test_golden_states(fleet: Fleet, real: Any, row: dict[str, Any]) -> None:
    load, state = row["load"], row["state_dict"]
    config, groups, flags = load["config"], load["groups"], load["flags"]
    if flags == dict.fromkeys(flags, True):
        with pytest.raises(lrpilot.InvalidArgument, match="override_opt_param_scheduler"):
            fleet.make(config, groups, flags=flags)
        return
    scheduler = fleet.make(config, groups, flags=flags)
    for increment, times in load["pre_increments"]:
        for _ in range(times):
            scheduler.step(increment)
    assert held(scheduler) == wanted(row["before_load"])
    if not row["ok"]:
        before = scheduler.state_dict()
        with pytest.raises(lrpilot.LrpilotError):
            scheduler.load_state_dict(state)
        assert scheduler.state_dict() == before
        # There, a refusal that comes with the WD keys has moved the scheduler already.
        assert held(scheduler) == wanted(row["before_load"])
        return
    for _ in range(load["loads"]):
        scheduler.load_state_dict(state)
    # Loaded onto steps or twice, theirs is off by what it adds; with other WD keys, by a step.
    sane = loaded(real, config, groups, flags, state)
    is_sound = not load["pre_increments"] and load["loads"] == 1
    same(scheduler, sane)
    if is_sound and config["start_wd"] == state.get("start_wd", config["start_wd"]):
        assert held(scheduler) == wanted(row["after_load"])
    for name, value in row["attrs_after"].items():
        if name != "num_steps":
            assert getattr(scheduler, name) == value, name
    for (increment, times), point in zip(row["post_increments"], row["post"], strict=True):
        for _ in range(times):
            scheduler.step(increment)
            sane.step(increment)
        same(scheduler, sane)
        if is_sound:
            assert held(scheduler) == wanted(point)


def test_the_golden_states_show_the_bug_that_is_not_here() -> None:
    (row,) = [row for row in GOLDEN if row["id"] == "adds/loaded-twice"]
    assert row["state_dict"]["num_steps"] == 500
    assert row["after_load"]["num_steps"] == 1000


# Side by side.


RATES = st.sampled_from([0.0, 1e-6, 6e-6, 1e-5, 6e-5, 2e-4, 1e-3, 0.01, 0.1, 1 / 3])


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    low, peak = sorted(draw(st.tuples(RATES, RATES)))
    end = draw(st.integers(1, 400))
    style = draw(st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]))
    ramp = draw(st.sampled_from(["constant", "linear", "cosine"]))
    start_wd, end_wd = sorted(draw(st.tuples(RATES, RATES)))
    warmups = st.one_of(
        st.just(0),
        st.integers(0, end - 1),
        st.floats(0.0, 0.99).map(lambda share: share * end),
    )
    anneals = st.sampled_from(["linear", "cosine", "exponential", "minus_sqrt"])
    return {
        "init_lr": draw(st.sampled_from([0.0, peak, peak / 3])),
        "max_lr": peak,
        "min_lr": low,
        "lr_warmup_steps": draw(warmups),
        "lr_decay_steps": end,
        "lr_decay_style": style,
        "start_wd": end_wd if ramp == "constant" else start_wd,
        "end_wd": end_wd,
        "wd_incr_steps": draw(st.integers(1, 400)),
        "wd_incr_style": ramp,
        "wsd_decay_steps": draw(st.integers(0, 500)) if style == "WSD" else None,
        "lr_wsd_decay_style": draw(anneals) if style == "WSD" else None,
    }


@st.composite
def group_lists(draw: st.DrawFn, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    keys: dict[str, st.SearchStrategy[Any]] = {
        "max_lr": RATES,
        "min_lr": RATES,
        "wd_mult": st.sampled_from([0.0, 1.0, 0.5]),
        "lr_mult": st.just(0.1),
    }
    if config["wd_incr_style"] != "constant":
        keys |= {"start_wd": RATES, "end_wd": RATES}
    groups: st.SearchStrategy[list[dict[str, Any]]] = st.lists(
        st.fixed_dictionaries({}, optional=keys), min_size=1, max_size=4
    )
    return draw(groups)


FEW = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FEW
@given(data=st.data())
def test_every_call_gives_the_values_of_the_real_class(
    fleet: Fleet, real: Any, data: st.DataObject
) -> None:
    config = data.draw(configurations())
    groups = data.draw(group_lists(config))
    run = fleet.name()
    ours = fleet.make(config, groups, run=run)
    theirs = real(bare(groups), **config, **NEITHER)
    same(ours, theirs)
    batch = data.draw(st.integers(1, 40))
    calls = data.draw(st.lists(st.sampled_from(["step", "skip", "ramp", "resume", "hand over"])))
    for call in calls:
        if call == "ramp":
            batch += data.draw(st.integers(1, 40))
        elif call == "skip":
            # Megatron-LM does not step its scheduler where the optimizer refused.
            ours.step(batch, skipped=True)
        elif call == "step":
            ours.step(batch)
            theirs.step(batch)
        else:
            own = ours.state_dict()
            assert {name: own[name] for name in theirs.state_dict()} == theirs.state_dict()
            ours.close()
            if call == "resume":
                ours = fleet.make(config, groups, run=run)
                ours.load_state_dict(own)
            else:
                run = fleet.name()
                ours = fleet.make(config, groups, run=run)
                ours.load_state_dict(theirs.state_dict())
            theirs = loaded(real, config, groups, NEITHER, own)
        same(ours, theirs)
        for mine, other in zip(
            ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True
        ):
            assert ours.get_lr(mine) == theirs.get_lr(other)
            assert ours.get_wd(mine) == theirs.get_wd(other)
        assert ours.get_wd() == theirs.get_wd()
    ours.close()


OLD_NAMES = {
    "max_lr": ["start_lr"],
    "lr_warmup_steps": ["warmup_iter", "warmup_steps"],
    "lr_decay_steps": ["end_iter", "decay_steps"],
    "lr_decay_style": ["decay_style"],
    "num_steps": ["num_iters"],
}


@FEW
@given(data=st.data())
def test_any_state_loads_as_the_real_class_means_it(
    fleet: Fleet, real: Any, data: st.DataObject
) -> None:
    config = data.draw(configurations())
    saved = data.draw(st.one_of(st.just(config), configurations()))
    groups = data.draw(group_lists(config))
    flags = data.draw(st.sampled_from([NEITHER, OVERRIDE, USE_CHECKPOINT]))
    state = real(bare([{}]), **saved, **NEITHER).state_dict()
    state["num_steps"] = data.draw(st.integers(0, 500))
    for name, older in OLD_NAMES.items():
        # The older one counts also where today's is there.
        other = data.draw(st.sampled_from([None, *older]))
        if other is not None:
            state[other] = state[name]
            if data.draw(st.booleans()):
                del state[name]
    if data.draw(st.booleans()):
        del state["start_wd"]
    if data.draw(st.integers(0, 9)) == 0:
        del state[data.draw(st.sampled_from(sorted(state)))]
    ours = fleet.make(config, groups, flags=flags)
    for increment in data.draw(st.lists(st.integers(1, 50), max_size=3)):
        ours.step(increment)
    try:
        theirs = loaded(real, config, groups, flags, state)
    except Exception:
        before = held(ours)
        with pytest.raises(lrpilot.LrpilotError):
            ours.load_state_dict(state)
        assert held(ours) == before
        return
    try:
        ours.load_state_dict(state)
    except (lrpilot.InvalidArgument, lrpilot.InvalidSpec):
        # Values of both that do not go together: there they are used as they are.
        assert flags == USE_CHECKPOINT
        assert saved != config
        return
    for increment in (0, 1, 17, 200):
        ours.step(increment)
        theirs.step(increment)
        same(ours, theirs)
    ours.load_state_dict(state)
    assert ours.num_steps == state.get("num_iters", state.get("num_steps"))
    ours.close()


@pytest.mark.parametrize("moves", [(0,), (512, 512, 1024, 1024, 1536), (7, 3, 900, 250, 1)])
def test_the_real_class_goes_on_from_our_state(
    fleet: Fleet, real: Any, moves: tuple[int, ...]
) -> None:
    ours = fleet.make(COSINE, GROUPS)
    for increment in moves:
        ours.step(increment)
    for state in (ours.state_dict(), ours.megatron_state_dict()):
        theirs = loaded(real, COSINE, GROUPS, NEITHER, state)
        same(ours, theirs)
    assert set(ours.state_dict()) - set(ours.megatron_state_dict()) == {"lrpilot"}


# The bugs that are known there.


def test_loading_twice_and_onto_steps_sets_the_progress(fleet: Fleet, real: Any) -> None:
    state = {**real(bare([{}]), **COSINE, **NEITHER).state_dict(), "num_steps": 300}
    ours = fleet.make(COSINE, GROUPS)
    ours.step(50)
    for _ in range(3):
        ours.load_state_dict(state)
        same(ours, loaded(real, COSINE, GROUPS, NEITHER, state))


def test_the_first_step_after_a_resume_has_the_weight_decay_of_its_progress(
    fleet: Fleet, real: Any
) -> None:
    state = {**real(bare([{}]), **COSINE, **NEITHER).state_dict(), "num_steps": 300}
    other = COSINE | {"start_wd": 0.0, "end_wd": 0.0}
    ours = fleet.make(other, GROUPS[:1], flags=USE_CHECKPOINT)
    ours.load_state_dict(state)
    stale = real(bare(GROUPS[:1]), **other, **USE_CHECKPOINT)
    stale.load_state_dict(dict(state))
    assert held(stale)[0][1] == (0.0).hex()
    assert held(ours)[0][1] == (0.01 + 0.3 * (0.1 - 0.01)).hex()


def load_as_megatron_does(scheduler: Any, state: Mapping[str, Any], args: Namespace) -> None:
    """Load as `load_checkpoint` does: the optimizer's groups first, and the flag's own part."""
    for group, saved in zip(scheduler.optimizer.param_groups, state["optimizer"], strict=True):
        group.update(saved)
    scheduler.load_state_dict(state["opt_param_scheduler"])
    if args.override_opt_param_scheduler:
        for group in scheduler.optimizer.param_groups:
            decoupled = group.get("is_decoupled_lr", False)
            bounds = (args.decoupled_lr, None) if decoupled else (args.lr, args.min_lr)
            for name, bound in zip(("max_lr", "min_lr"), bounds, strict=True):
                if bound is not None:
                    group[name] = bound
        if scheduler.num_steps != args.consumed_train_samples:
            scheduler.num_steps = args.consumed_train_samples
        scheduler.step(increment=0)


def test_override_changes_the_lr_and_keeps_the_bounds_of_each_group(
    fleet: Fleet, real: Any
) -> None:
    before = fleet.make(COSINE, GROUPS)
    before.step(400)
    saved = {
        "optimizer": [dict(group) for group in before.optimizer.param_groups],
        "opt_param_scheduler": before.state_dict(),
    }
    before.close()
    # Everything halved: the arguments, and the bounds by which Megatron-LM builds its groups.
    halved = COSINE | {"init_lr": 5e-7, "max_lr": 5e-4, "min_lr": 5e-6}
    groups = [
        {**group, **{name: group[name] / 2 for name in ("max_lr", "min_lr") if name in group}}
        for group in GROUPS
    ]
    args = Namespace(
        lr=5e-4, min_lr=5e-6, decoupled_lr=2.5e-4, consumed_train_samples=420, **OVERRIDE
    )
    ours = fleet.make(halved, groups, flags=OVERRIDE, run=before._connection.run)
    load_as_megatron_does(ours, saved, args)
    theirs = real(bare(groups), **halved, **NEITHER)
    theirs.step(420)
    same(ours, theirs)
    for group, built in zip(ours.optimizer.param_groups, groups, strict=True):
        assert group["max_lr"] == built.get("max_lr", 5e-4)
        assert group["min_lr"] == built.get("min_lr", 5e-6)


def test_bounds_that_differ_from_the_checkpoint_are_refused_without_a_flag(fleet: Fleet) -> None:
    ours = fleet.make(COSINE, GROUPS)
    saved = {
        "optimizer": [{**group, "min_lr": 3e-5} for group in GROUPS],
        "opt_param_scheduler": ours.megatron_state_dict(),
    }
    with pytest.raises(lrpilot.InvalidArgument, match=r"min_lr of param group 0.*1e-05.*3e-05"):
        load_as_megatron_does(ours, saved, Namespace(**NEITHER))


def test_a_checkpoint_that_wins_brings_the_bounds_of_its_groups(fleet: Fleet, real: Any) -> None:
    ours = fleet.make(COSINE, GROUPS, flags=USE_CHECKPOINT)
    groups = [{**group, "max_lr": 2e-3} for group in GROUPS]
    state = {**ours.megatron_state_dict(), "num_steps": 250}
    saved = {"optimizer": groups, "opt_param_scheduler": state}
    load_as_megatron_does(ours, saved, Namespace(**USE_CHECKPOINT))
    theirs = real(bare(groups), **COSINE, **NEITHER)
    theirs.step(250)
    same(ours, theirs)


def test_a_start_without_the_saved_scheduler_is_refused(fleet: Fleet) -> None:
    ours = fleet.make(COSINE)
    ours.step(8, loss=3.0)
    ours.close()
    again = fleet.make(COSINE, run=ours._connection.run)
    with pytest.raises(lrpilot.ResumePointRequired, match="has losses"):
        again.begin()


def test_the_end_of_the_decay_is_a_position(fleet: Fleet) -> None:
    ours = fleet.make(COSINE | {"lr_decay_style": "linear", "init_lr": 0.0, "min_lr": 0.0})
    ours.step(550)
    assert ours.get_lr({}) == (1.0 - 450 / 900) * 1e-3
    ours.step(450)
    assert ours.get_lr({}) == 0.0


# Refused states, and those of other runs.


def test_a_state_that_the_server_refuses_leaves_the_scheduler_where_it_is(fleet: Fleet) -> None:
    ours = fleet.make(COSINE)
    ours.step(300, loss=2.0)
    state, seen = ours.state_dict(), held(ours)
    other = fleet.make(COSINE, run=fleet.name())
    other.step(200, loss=2.0)
    blob = other.state_dict()["lrpilot"]["state"]
    wrong = {**state["lrpilot"], "state": blob, "progress": 200}
    with pytest.raises(lrpilot.LrpilotError):
        ours.load_state_dict(state | {"num_steps": 200, "lrpilot": wrong})
    assert (ours.num_steps, held(ours)) == (300, seen)
    ours.step(100, loss=1.0)
    ours.load_state_dict(ours.state_dict())
    assert ours.num_steps == 400


def test_a_damaged_state_is_refused_before_the_run_is_revised(fleet: Fleet, server: str) -> None:
    before = fleet.make(COSINE)
    before.step(300, loss=2.0)
    state = before.state_dict()
    before.close()
    run = before._connection.run
    halved = COSINE | {"max_lr": 5e-4}
    again = fleet.make(halved, flags=OVERRIDE, run=run)
    damaged = state["lrpilot"] | {"state": "no base64"}
    with pytest.raises(lrpilot.InvalidState, match="damaged"):
        again.load_state_dict(state | {"lrpilot": damaged})
    # The run still has the spec that it was made with.
    fleet.make(COSINE, run=run).load_state_dict(state)


def test_losses_reported_before_another_state_is_loaded_arrive(fleet: Fleet, server: str) -> None:
    ours = fleet.make(COSINE)
    for _ in range(5):
        ours.step(10, loss=2.0)
    ours.load_state_dict({**ours.megatron_state_dict(), "num_steps": 40})
    with Runs(server) as runs:
        assert set(runs.losses(ours._connection.run)[1]) == {0, 10, 20, 30, 40}


def test_a_run_begins_from_the_state_of_another_where_told_so(fleet: Fleet, real: Any) -> None:
    before = fleet.make(COSINE, GROUPS)
    before.step(300, loss=2.0)
    state = before.state_dict()
    with pytest.raises(lrpilot.InvalidState, match=r"belongs to run .*resume_at=300"):
        fleet.make(COSINE, GROUPS).load_state_dict(state)
    with pytest.raises(lrpilot.InvalidState, match=r"belongs to run .*resume_at=300"):
        fleet.make(COSINE, GROUPS, resume_at=0).load_state_dict(state)
    ours = fleet.make(COSINE, GROUPS, resume_at=300)
    ours.load_state_dict(state)
    same(ours, loaded(real, COSINE, GROUPS, NEITHER, state))


def test_another_batch_size_after_a_resume_keeps_the_usual_delay(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "megatron.core.num_microbatches_calculator"
    calculator = SimpleNamespace(global_batch_size=8)
    module = SimpleNamespace(_GLOBAL_NUM_MICROBATCHES_CALCULATOR=calculator)
    monkeypatch.setitem(sys.modules, name, module)
    before = fleet.make(COSINE)
    before.step(8, loss=2.0)
    state = before.state_dict()
    before.close()
    calculator.global_batch_size = 16
    again = fleet.make(COSINE, run=before._connection.run)
    again.load_state_dict(state)
    assert again.num_steps == 8
    # One who gives another delay is told of it.
    other = fleet.make(COSINE, run=before._connection.run, feedback={"delay": 7})
    with pytest.raises(lrpilot.SpecChanged, match=r"feedback\.delay: 256 -> 7"):
        other.load_state_dict(state)


PLATEAU = {"kind": "plateau", "factor": 0.5, "patience": 1, "threshold": 0.0}


def test_the_lr_reacts_to_the_loss_and_not_again_after_a_resume(fleet: Fleet) -> None:
    options: dict[str, Any] = {"policies": [PLATEAU], "feedback": {"delay": 8}}
    steady = COSINE | {"lr_decay_style": "constant", "lr_warmup_steps": 0}
    ours = fleet.make(steady, GROUPS[:1], **options)
    used = []
    for _ in range(4):
        used.append(ours.get_lr(ours.optimizer.param_groups[0]))
        ours.step(8, loss=2.0)
    assert ours.get_lr(ours.optimizer.param_groups[0]) == 5e-4
    state, seen = ours.state_dict(), held(ours)
    ours.close()
    again = fleet.make(steady, GROUPS[:1], run=ours._connection.run, **options)
    again.load_state_dict(state)
    assert held(again) == seen
    again.step(8, loss=1.0)
    assert again.get_lr(again.optimizer.param_groups[0]) == 5e-4


def adjust(server: str, run: str) -> None:
    with Runs(server) as runs:
        runs.change(
            pb.AdjustRunRequest(
                run=run,
                request_id=f"halve {run}",
                author="op",
                reason="too hot",
                scale_lr=0.5,
            )
        )


def test_the_lr_changes_while_training_and_export_says_so(
    fleet: Fleet, server: str, real: Any
) -> None:
    ours = fleet.make(COSINE, GROUPS)
    ours.begin()
    adjust(server, ours._connection.run)
    ours.step(400)
    theirs = real(bare(GROUPS), **COSINE, **NEITHER)
    theirs.step(400)
    rates = [group["lr"] for group in ours.optimizer.param_groups]
    assert rates == [0.5 * group["lr"] for group in theirs.optimizer.param_groups]
    with pytest.raises(ExportRefused, match=r"1 changes.*\n.*operator.*too hot"):
        ours.megatron_state_dict()
    assert ours.megatron_state_dict(force=True) == theirs.state_dict()
    state = ours.state_dict()
    ours.close()
    again = fleet.make(COSINE, GROUPS, run=ours._connection.run)
    again.load_state_dict(state)
    assert [group["lr"] for group in again.optimizer.param_groups] == rates


@pytest.mark.parametrize("name", ["max_lr", "end_wd", "lr_decay_steps"])
def test_an_attribute_that_would_change_nothing_cannot_be_set(fleet: Fleet, name: str) -> None:
    ours = fleet.make(COSINE)
    with pytest.raises(AttributeError, match="lrpilot run revise"):
        setattr(ours, name, 1.0)


# Arguments.


def steps_of(args: Namespace) -> dict[str, Any]:
    """Return what Megatron-LM's `get_optimizer_param_scheduler` gives its class."""
    batch = args.global_batch_size
    if args.train_samples:
        ramp, decay, warmup = args.train_samples, args.lr_decay_samples, args.lr_warmup_samples
        anneal, batch = args.lr_wsd_decay_samples, 1
    else:
        ramp, decay, warmup = args.train_iters, args.lr_decay_iters, args.lr_warmup_iters
        anneal = args.lr_wsd_decay_iters
    end = (ramp if decay is None else decay) * batch
    fraction = args.lr_warmup_fraction
    return {
        "init_lr": args.lr_warmup_init,
        "max_lr": args.lr,
        "min_lr": args.min_lr,
        "lr_warmup_steps": warmup * batch if fraction is None else fraction * end,
        "lr_decay_steps": end,
        "lr_decay_style": args.lr_decay_style,
        "start_wd": args.start_weight_decay,
        "end_wd": args.end_weight_decay,
        "wd_incr_steps": ramp * batch,
        "wd_incr_style": args.weight_decay_incr_style,
        "wsd_decay_steps": None if anneal is None else anneal * batch,
        "lr_wsd_decay_style": args.lr_wsd_decay_style,
    }


@st.composite
def arguments(draw: st.DrawFn) -> Namespace:
    by_samples = draw(st.booleans())
    total, decay = draw(st.integers(2, 9999)), draw(st.integers(2, 9999))
    fraction = draw(st.none() | st.floats(0.0, 0.99))
    warmup = 0 if fraction is not None else draw(st.integers(0, 1))
    anneal = draw(st.integers(0, 9999))
    low, peak = sorted(draw(st.tuples(RATES, RATES)))
    ramp = draw(st.sampled_from(["constant", "linear", "cosine"]))
    start, end = sorted(draw(st.tuples(RATES, RATES)))
    if ramp == "constant":
        start = end
    return Namespace(
        train_iters=None if by_samples else total,
        train_samples=total if by_samples else None,
        lr_decay_iters=None if by_samples else decay,
        lr_decay_samples=decay if by_samples else None,
        lr_warmup_iters=0 if by_samples else warmup,
        lr_warmup_samples=warmup if by_samples else 0,
        lr_wsd_decay_iters=None if by_samples else anneal,
        lr_wsd_decay_samples=anneal if by_samples else None,
        lr_warmup_fraction=fraction,
        lr_warmup_init=draw(st.sampled_from([0.0, peak / 3])),
        lr=peak,
        min_lr=low,
        lr_decay_style=draw(
            st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"])
        ),
        lr_wsd_decay_style=draw(st.sampled_from(["linear", "cosine", "exponential", "minus_sqrt"])),
        weight_decay=end,
        start_weight_decay=start,
        end_weight_decay=end,
        weight_decay_incr_style=ramp,
        global_batch_size=draw(st.sampled_from([1, 512, 1536])),
    )


@settings(max_examples=200, deadline=None)
@given(args=arguments(), share=st.floats(0.0, 1.5))
def test_arguments_become_a_spec_with_the_values_of_the_real_class(
    real: Any, args: Namespace, share: float
) -> None:
    steps = steps_of(args)
    theirs = real(bare(GROUPS[:2]), **steps, **NEITHER)
    # Keys that every group of Megatron-LM has.
    for group in theirs.optimizer.param_groups:
        group.update(max_lr=args.lr, min_lr=args.min_lr)
    spec = parse_spec(spec_from_args(args, name="a", optimizer=theirs.optimizer))
    values = base_schedule(spec)
    for point in (0, 1, steps["lr_decay_steps"], int(share * steps["wd_incr_steps"])):
        theirs.step(point - theirs.num_steps)
        main, no_decay = (values(point)[index] for index in (0, -1))
        assert [(x.hex(), y.hex()) for x, y in (main, no_decay) if y is not None] == held(theirs)


def test_a_run_made_from_the_arguments_is_that_of_the_scheduler(fleet: Fleet, server: str) -> None:
    args = Namespace(**ARGS)
    extras: dict[str, Any] = {"policies": [PLATEAU], "feedback": {"delay": 64}}
    keys = {"max_lr": args.lr, "min_lr": args.min_lr}
    optimizer = bare([keys, {**keys, "max_lr": args.decoupled_lr}, {**keys, "wd_mult": 0.0}])
    config = steps_of(
        Namespace(**ARGS, lr_decay_samples=None, lr_wsd_decay_samples=None, lr_warmup_fraction=None)
    )
    for held_by in (None, optimizer):
        run = fleet.name()
        spec = spec_from_args(args, name=run, optimizer=held_by, **extras)
        with lrpilot.connect(server, run=run, spec=spec):
            pass
        # Another spec would be refused.
        fleet.make(config, optimizer=optimizer, run=run, **extras).begin()


# Where it opens.


def test_a_known_run_with_other_arguments_is_refused_and_a_flag_revises_it(
    fleet: Fleet, real: Any
) -> None:
    ours = fleet.make(COSINE)
    ours.step(200, loss=1.0)
    state = ours.state_dict()
    ours.close()
    other = COSINE | {"max_lr": 2e-3, "lr_decay_steps": 1500}
    again = fleet.make(other, run=ours._connection.run)
    with pytest.raises(lrpilot.InvalidArgument, match=r"max_lr: got 0\.002.*0\.001"):
        again.load_state_dict(state)
    again = fleet.make(other, run=ours._connection.run, flags=OVERRIDE)
    again.load_state_dict(state)
    same(again, loaded(real, other, [{}], OVERRIDE, state))
    again.close()
    # The checkpoint's values once more, whatever the run and the arguments have by now.
    last = fleet.make(other, run=ours._connection.run, flags=USE_CHECKPOINT)
    last.load_state_dict(state)
    same(last, loaded(real, COSINE, [{}], NEITHER, state))


def test_a_step_made_at_other_values_than_the_run_has_is_named(fleet: Fleet, server: str) -> None:
    ours = fleet.make(COSINE, resume_at=300)
    with pytest.raises(lrpilot.AttemptNotOpen, match=r"Call begin\(\) before the first step"):
        ours.step(8)
    again = fleet.make(COSINE, resume_at=300)
    again.begin()
    again.step(8)
    assert again.num_steps == 308


def test_a_lost_server_is_restored_from_the_checkpoint(
    fleet: Fleet, tmp_path: Path, server: str
) -> None:
    options: dict[str, Any] = {"policies": [PLATEAU], "feedback": {"delay": 8}}
    ours = fleet.make(COSINE, **options)
    for _ in range(4):
        ours.step(8, loss=2.0)
    state, seen = ours.state_dict(), held(ours)
    program = serve(tmp_path / "data")
    try:
        other = connected(program.grpc, run=ours._connection.run, **options)(
            bare([{}]), **COSINE, **NEITHER
        )
        other.load_state_dict(state)
        assert held(other) == seen
        assert held(other)[0][0] != held(loaded_schedule(state))[0][0]
        other.close()
    finally:
        program.dispose()


def loaded_schedule(state: Mapping[str, Any]) -> Any:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler as Real

    return loaded(Real, COSINE, [{}], NEITHER, state)


# Training.


def outcome(
    loss: Any, *, skipped: bool = False, norm: float | None = 1.0, ends: bool = False
) -> Any:
    losses = {} if loss is None else {"lm loss": loss}
    return losses, int(skipped), False, ends, 0, norm, 0


def run_train_step(scheduler: Any, returned: Any, increment: int | None) -> Callable[[], Any]:
    def train_step(optimizer: Any, opt_param_scheduler: Any) -> Any:
        before = held(scheduler)
        if increment is not None:
            opt_param_scheduler.step(increment=increment)
            # LR and WD come with the loss, when this returns.
            assert held(scheduler) == before
        return returned

    return lambda: reporting(train_step)(scheduler.optimizer, scheduler)


def test_train_step_reports_what_it_returns(fleet: Fleet, server: str, real: Any) -> None:
    ours = fleet.make(COSINE, GROUPS, feedback={"delay": 8}, policies=[PLATEAU | {"patience": 99}])
    theirs = real(bare(GROUPS), **COSINE, **NEITHER)
    # A batch that grows, an update that was skipped twice, an end without a step.
    calls: list[tuple[Any, int | None]] = [
        (outcome(3.0), 8),
        (outcome(float("inf"), skipped=True, norm=None), None),
        (outcome(float("nan"), skipped=True, norm=None), None),
        (outcome(2.5), 16),
        (outcome(None, ends=True, skipped=True), None),
        (outcome(None), 32),
    ]
    for returned, increment in calls:
        assert run_train_step(ours, returned, increment)() is returned
        theirs.step(increment or 0)
        same(ours, theirs)
    ours.state_dict()
    with Runs(server) as runs:
        found = [item for event in runs.events(ours._connection.run) for item in event.losses]
    said = [(item.progress, item.skipped, item.batch) for item in found]
    assert said == [(0, False, 8), (8, True, 0), (8, True, 0), (8, False, 16), (24, False, 32)]
    losses = [item.loss if item.HasField("loss") else None for item in found]
    assert repr(losses) == "[3.0, inf, nan, 2.5, None]"
    assert found[0].gradient_norm == 1.0


def test_a_train_step_that_fails_moves_nothing(fleet: Fleet) -> None:
    ours = fleet.make(COSINE)

    @reporting
    def train_step(opt_param_scheduler: Any, *, fails: bool) -> Any:
        opt_param_scheduler.step(increment=8)
        if fails:
            raise ValueError("a NaN")
        return outcome(1.0)

    with pytest.raises(ValueError, match="a NaN"):
        train_step(ours, fails=True)
    assert ours.num_steps == 0
    train_step(opt_param_scheduler=ours, fails=False)
    assert ours.num_steps == 8


def test_a_delay_of_less_than_a_step_needs_no_waiver(fleet: Fleet) -> None:
    # In lockstep the values of the next step wait for the loss of this one.
    ours = fleet.make(COSINE, feedback={"delay": 1, "timeout": "60s"}, policies=[PLATEAU])
    for _ in range(3):
        run_train_step(ours, outcome(1.0), 8)()
    assert ours.num_steps == 24


def test_two_pipeline_stages_have_one_lr_and_the_groups_of_both(
    fleet: Fleet, server: str, tmp_path: Path
) -> None:
    run, rendezvous = fleet.name(), (tmp_path / "rendezvous").as_uri()
    program = [sys.executable, "-m", "tests.frameworks.megatron_stages_program"]
    first, second = said_by([[*program, str(rank), rendezvous, server, run] for rank in (0, 1)])
    assert first["reporter"] == second["reporter"] == 1
    # The loss of the last stage halves the LR, on both at the same step.
    rates = [values["main"] for values in first["used"]]
    assert rates == [values["main"] for values in second["used"]]
    assert rates[0] == 1e-3
    assert rates[-1] == 5e-4
    assert [values["embedding"] for values in first["used"]] == [rate / 2 for rate in rates]
    with Runs(server) as runs:
        assert list(runs.losses(run)[1].values())[:3] == [1.0, 1.0, 1.0]
        groups = [group.name for group in runs.run(run).values]
    assert groups == ["main", "own_lr", "no_decay"]
    # A state that one stage cannot take is refused on both, and neither waits for the other.
    assert first["refused"].startswith("max_lr of param group 0: got 0.0005; allowed: 0.0009")
    assert second["refused"] == first["refused"] + " (rank 0)"


def test_a_gpt_of_megatron_core_uses_the_curve_through_restarts(tmp_path: Path) -> None:
    spec = spec_from_args(
        Namespace(**ARGS),
        name="megatron",
        policies=[{"kind": "plateau", "patience": 1_000}],
        feedback={"delay": 32, "timeout": "60s"},
    )
    training = train_interrupted(tmp_path, "megatron_program", spec, args=ARGS)
    check(training, tmp_path, spec, increment=8)
