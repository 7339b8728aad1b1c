"""What can be wrong with a request, as exceptions that know nothing of gRPC.

Each carries its facts as attributes; the server's catalogue maps each class to a status
code, and the client raises a class of the same name.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """One field at fault."""

    field: str
    """Path of the field, such as `learning_rate.decay.style`."""
    got: str
    """The value got, as text."""
    allowed: str
    """What is allowed, as one phrase."""

    def __str__(self) -> str:
        place = f"{self.field}: " if self.field else ""
        return f"{place}got {self.got}; allowed: {self.allowed}"


class LrpilotError(Exception):
    """Base of every error that a request can meet; `facts` names its numbers and names."""

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.facts = facts


class HistoryNeeded(Exception):
    """A trimmed state dropped what the answer depends on; a state whose floor is lower knows it.

    No request's fault, and nothing has changed: read more of the log and do the same again.
    """

    def __init__(self, progress: int) -> None:
        super().__init__(f"what lies at progress {progress} was dropped from the state")
        self.progress = progress
        """A state with this floor, or a lower one, gets further."""


class InvalidFields(LrpilotError):
    """Fields of a request are at fault; `violations` lists every one that was found."""

    def __init__(self, message: str, violations: Sequence[Violation]) -> None:
        lines = "".join(f"\n  {violation}" for violation in violations)
        super().__init__(f"{message}{lines}")
        self.violations = tuple(violations)


class InvalidSpec(InvalidFields):
    """The run spec is at fault."""


class InvalidRequest(InvalidFields):
    """A field of a request other than the spec is at fault."""


class InvalidState(LrpilotError):
    """A saved state cannot be read: damaged, or of another version or run."""


class RunNotFound(LrpilotError):
    """No run has that name; the message gives the near ones."""


class RunExists(LrpilotError):
    """A run with that name exists already."""


class RunFinished(LrpilotError):
    """The run was finished and takes no more requests that change it."""


class RunLive(LrpilotError):
    """Ranks are active on the run; ending it needs force."""


class SpecChanged(LrpilotError):
    """The spec differs from the last one that a trainer gave."""


class RevisionRefused(LrpilotError):
    """A revision changes what only a new attempt may change, or a past the log has fixed."""


class ResumePointRequired(LrpilotError):
    """The run has losses, and the attempt was given neither a state nor a progress."""


class JoinRefused(LrpilotError):
    """The attempt cannot be joined: another progress, or a second incarnation of a reporter."""


class StateMismatch(LrpilotError):
    """A saved state and the log do not belong together; both are named."""


class AttemptSuperseded(LrpilotError):
    """A newer attempt has opened, or the token is not this attempt's."""


class LogForgotten(LrpilotError):
    """The log was put back from an older copy: ranks hold of the attempt what it has not."""


class BeyondHorizon(LrpilotError):
    """The values wanted lie further than a block beyond the horizon."""


class BeforeAttempt(LrpilotError):
    """The values wanted lie below the progress at which the attempt opened."""


class NotHolder(LrpilotError):
    """The attempt is in leader mode, and the request is not its holder's; or it is in none."""


class BeyondPermit(LrpilotError):
    """The holder used values further ahead than the log says that it may."""


class ValuesConflict(LrpilotError):
    """Other values were declared for that progress; both are named."""


class NotReporter(LrpilotError):
    """The rank is not the declared reporter, or another incarnation of it reports."""


class LossConflict(LrpilotError):
    """Another loss is recorded for that progress; both are named."""


class BelowResumePoint(LrpilotError):
    """The loss is for a progress below the one at which the attempt opened."""


class LossesPending(LrpilotError):
    """Losses below the progress to save at are not final yet."""


class AdjustmentRefused(LrpilotError):
    """The change cannot be made to this run now; the message says why and what can."""


class AdjustmentNotFound(LrpilotError):
    """No adjustment, advice or directive of the run has that id."""


class AdviceExpired(LrpilotError):
    """The advice is too old to be approved, or was approved or forgotten already."""


class PlanChanged(LrpilotError):
    """The plan is no longer the one that the caller saw; look again."""
