"""What the core gives to the other rooms."""

from lrpilot import core

EXPORTED = """
    BUCKET_LOSSES ENDABLE MAX_BLOCK_STEPS MAX_OFFERED_STEPS MAX_PROGRESS MAX_STATE_BYTES PRESETS
    Acknowledged Action Adjusted Adjustment AdjustmentNotFound AdjustmentRefused AdviceExpired Ask
    Attached AttemptLosses AttemptSuperseded Averages BeforeAttempt BelowResumePoint BeyondHorizon
    BeyondPermit Block Change Created DecayNow Declaration Declared Direct EnterNextStage Event
    Finished Forgot Held HistoryNeeded HoldValues ImportRequest Imported InvalidFields
    InvalidRequest InvalidSpec InvalidState JoinRefused Joined LogForgotten LossConflict LossReader
    LossesPending LrpilotError NotHolder NotReporter Note Offer OfferRequest OpenRequest Opened
    Outcome Permitted Plan PlanChanged Preset Recorded Records ReleaseValues Report Reported
    ResumePointRequired Revised Revision RevisionRefused RunExists RunFinished RunLive RunNotFound
    RunSpec RunState SavedState ScaleDecay ScaleLearningRate Series SetLearningRate SetTotal
    SimulatedStep Smoothed SpecChanged StageSchedule StateMismatch Steps TakeBack ValuesConflict
    ValuesRequest Violation Waived acknowledge_directive adjust_run approve_advice attach_run
    base_schedule base_values chain change_from_mapping change_to_mapping check_attempt check_holder
    create_run declare_values decode encode finish_run fold get_values has_no_loss import_run
    is_routine learning_rate_schedule log_forgotten made_next missing offer_values offered
    open_attempt parse_spec planned read_state recorded_digest report_losses restore_snapshot
    revise_run rows run_not_found save_state simulate spec_difference stage_schedules summary_of
    values_digest waive weight_decay_schedule
"""


def test_the_names_are_pinned() -> None:
    assert core.__all__ == EXPORTED.split()
    assert all(hasattr(core, name) for name in core.__all__)
