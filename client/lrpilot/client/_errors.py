"""What can go wrong, as exceptions.

Errors that the server raises keep their names on the wire: the classes of the first part
carry the names of the server's own. Those of the second part arise in the client alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """One field at fault."""

    field: str
    """Path of the field, such as `learning_rate.decay.style`."""
    description: str
    """The value got and what is allowed."""

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


class LrpilotError(Exception):
    """Base of every error of lrpilot."""

    def __init__(
        self,
        message: str,
        *,
        facts: Mapping[str, object] | None = None,
        violations: Sequence[Violation] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        """Text for people, in English."""
        self.facts = {name: str(fact) for name, fact in (facts or {}).items()}
        """Numbers and names of the error by name, as text; numbers in decimal."""
        self.violations = tuple(violations)
        """Every field at fault, where fields are."""

    def __reduce__(self) -> tuple[object, ...]:
        return _make, (type(self), self.message, self.facts, self.violations)

    def again(self, note: str = "", **facts: object) -> "LrpilotError":
        """Return an equal error to raise once more, with `note` and `facts` added."""
        return _make(type(self), self.message + note, {**self.facts, **facts}, self.violations)


def _make(
    kind: type[LrpilotError],
    message: str,
    facts: Mapping[str, object],
    violations: Sequence[Violation],
) -> LrpilotError:
    return kind(message, facts=facts, violations=violations)


# Errors of the server.


class InvalidFields(LrpilotError):
    """Fields of a request are at fault; `violations` lists every one that was found."""


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
    """The spec differs from the last one that a trainer gave; the message has the difference."""


class RevisionRefused(LrpilotError):
    """A revision changes what only a new attempt may change, or a past the log has fixed."""


class ResumePointRequired(LrpilotError):
    """The run has losses, and the attempt was given neither a state nor a progress."""


class JoinRefused(LrpilotError):
    """The attempt cannot be joined: another progress, or a second incarnation of a reporter."""


class StateMismatch(LrpilotError):
    """A saved state and the log do not belong together; both are named."""


class AttemptSuperseded(LrpilotError):
    """A newer attempt has opened, or the token is not this attempt's.

    The training that gets this must end: another start of the job has taken the run over.
    """


class LogForgotten(LrpilotError):
    """The server's database was put back from an older copy, which lacks what it gave to ranks.

    The training that gets this must end; the message says from where it may start again.
    """


class BeyondHorizon(LrpilotError):
    """The values wanted lie further than a block beyond the horizon."""


class BeforeAttempt(LrpilotError):
    """The values wanted lie below the progress at which the attempt opened."""


class NotHolder(LrpilotError):
    """Leader mode: the caller does not hold the values of the attempt."""


class BeyondPermit(LrpilotError):
    """Leader mode: what is declared lies beyond what the holder was permitted to use alone."""


class ValuesConflict(LrpilotError):
    """Leader mode: other values are declared for a progress than were before."""


class NotReporter(LrpilotError):
    """The rank is not the declared reporter, or another incarnation of it reports."""


class LossConflict(LrpilotError):
    """Another loss is recorded for that progress; both are named."""


class BelowResumePoint(LrpilotError):
    """The loss is for a progress below the one at which the attempt opened."""


class LossesPending(LrpilotError):
    """Losses below the progress to save at are not final yet."""


class AdjustmentNotFound(LrpilotError):
    """No adjustment, advice or directive of the run has that id."""


class AdjustmentRefused(LrpilotError):
    """An operator's change cannot be made or taken back; the message says why."""


class AdviceExpired(LrpilotError):
    """The advice lies too far back to be approved."""


class PlanChanged(LrpilotError):
    """The plan is no longer the one that was looked at."""


# Errors of the client alone.


class InvalidArgument(LrpilotError, ValueError):
    """An argument is at fault; the message names it, the value got and what is allowed."""


class ConnectRefused(LrpilotError):
    """Ranks are not connected alike, or have nothing to agree over; the message says what to do."""


class GroupMismatch(LrpilotError):
    """The optimizer's parameter groups are not those of the spec; both lists are named."""


class AttemptOpen(LrpilotError):
    """The attempt has opened already, at a progress that a state cannot change any more."""


class AttemptNotOpen(LrpilotError):
    """The attempt has not opened yet, so that there is no progress."""


class PilotClosed(LrpilotError):
    """The pilot was closed."""


class ServerUnavailable(LrpilotError):
    """The server could not be reached for longer than allowed."""


class ServerError(LrpilotError):
    """The server answered with an error or with data that this client has no name for."""


class ValuesDiffer(LrpilotError):
    """The server gave two values for one progress: ranks may train apart. Both are named."""


class ValuesPending(LrpilotError):
    """The server answered all along, and the values were not fixed even after a day."""


class BacklogFull(LrpilotError):
    """More reports wait for delivery than are kept in memory."""


class CaptureRefused(LrpilotError):
    """A CUDA graph would not follow the schedule; the message says why, and what to do."""


class LossUnreadable(LrpilotError):
    """A loss that was reported as a tensor could not be read from its device."""


class DirectiveDeclined(LrpilotError):
    """Raised by a handler that cannot do what a directive asks: training goes on without it."""


class ClientFailed(LrpilotError):
    """A background thread of the client ended by an error that nobody foresaw."""


def error_class(name: str) -> type[LrpilotError] | None:
    """Return the error class of that name, or None."""
    found = globals().get(name)
    return found if isinstance(found, type) and issubclass(found, LrpilotError) else None


def invalid_argument(argument: str, got: object, allowed: str) -> InvalidArgument:
    """Return the error for an argument: its name, the value got, what is allowed."""
    return InvalidArgument(
        f"{argument}: got {got!r}; allowed: {allowed}",
        facts={"argument": argument, "got": repr(got), "allowed": allowed},
    )
