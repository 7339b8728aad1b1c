"""How near each policy is to a decision, as people are shown it."""

import math

import pytest

from lrpilot.core import Plan, parse_spec
from lrpilot.core._observers import Observers, Standing
from lrpilot.core._plan import Revision
from lrpilot.core._spec import parse_policy
from lrpilot.core.policies import Observation, build_policy
from lrpilot.core.policies._registry import POLICIES


def plan(**extra: object) -> Plan:
    spec = {"name": "small", "total": 1000, "learning_rate": {"peak": 1e-3}} | extra
    return Plan([Revision(0, 0, parse_spec(spec))], [])


@pytest.mark.parametrize("kind", POLICIES)
def test_what_a_policy_counts_is_in_its_state(kind: str) -> None:
    policy = build_policy(parse_policy({"kind": kind}), [""])
    if kind in {"batch-size", "slow-convergence"}:
        # They decide on what they see at once.
        assert policy.counts_bad == ""
    else:
        assert getattr(policy.initial(), policy.counts_bad) == 0


def test_each_one_that_watches_stands_somewhere() -> None:
    policies = [
        {"kind": "plateau", "patience": 5, "cooldown": 3},
        {"kind": "nonfinite", "mode": "advise"},
        {"kind": "batch-size", "mode": "off"},
    ]
    watched, observers = plan(policies=policies), Observers()
    for n, loss in enumerate([1.0, 1.0, 1.0, math.nan, math.nan]):
        observers, _ = observers.observe(watched, Observation(n, loss), n)
    assert observers.standings(watched, 5) == [
        Standing("policies.0 (plateau)", "plateau", "act", 2, 0),
        Standing("policies.1 (nonfinite)", "nonfinite", "advise", 2, None),
        Standing("policies.2 (batch-size)", "batch-size", "off", None, None),
        Standing("detector (spike)", "spike", "advise", 0, None),
        Standing("detector (divergence)", "divergence", "advise", 0, None),
    ]


def test_the_end_of_a_stage_stands_somewhere_too() -> None:
    stages = [
        {
            "name": "first",
            "latest": 900,
            "when": {"plateau": {"window": 1, "patience": 9}},
            "learning_rate": {"peak": 1e-3},
        },
        {"name": "second", "learning_rate": {"peak": 1e-4}},
    ]
    spec = {"name": "staged", "total": 1000, "stages": stages}
    watched = Plan([Revision(0, 0, parse_spec(spec))], [])
    observers = Observers()
    for n in range(3):
        observers, _ = observers.observe(watched, Observation(n, 1.0), n)
    assert observers.standings(watched, 3)[0] == Standing(
        "stages.0 (when)", "stage", "act", 2, None
    )
