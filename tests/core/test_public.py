"""What the core gives to the other rooms."""

from lrpilot import core

EXPORTED = """
    MAX_BLOCK_STEPS MAX_PROGRESS PRESETS Adjustment Attached AttemptSuperseded BeforeAttempt
    BelowResumePoint BeyondHorizon Block Created Event Finished InvalidFields InvalidRequest
    InvalidSpec InvalidState
    JoinRefused Joined LossConflict LossesPending LrpilotError NotReporter OpenRequest Opened
    Outcome Preset Recorded Report Reported ResumePointRequired Revised RevisionRefused
    RunExists RunFinished RunLive RunNotFound RunSpec RunState SavedState SpecChanged StageSchedule
    StateMismatch ValuesRequest Violation Waived attach_run base_schedule base_values check_attempt
    create_run decode encode finish_run fold get_values learning_rate_schedule open_attempt
    parse_spec read_state report_losses restore_snapshot revise_run rows run_not_found save_state
    spec_difference stage_schedules waive weight_decay_schedule
"""


def test_the_names_are_pinned() -> None:
    assert core.__all__ == EXPORTED.split()
    assert all(hasattr(core, name) for name in core.__all__)
