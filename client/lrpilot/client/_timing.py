"""How long the client waits, and how much it keeps. Seconds unless said otherwise."""

CALL_S = 10.0
"""Deadline of a call that the server answers without waiting."""

LEAST_CALL_S = 0.1
"""Least deadline of a call, however little time is left."""

OPEN_CALL_S = 30.0
"""Deadline of a call that opens an attempt: a server that restores a run folds its state."""

ANSWER_S = 5.0
"""How much later than the wait it was asked for a long poll may be answered."""

BLOCKED_WAIT_S = 5.0
"""Wait asked for while the training thread is blocked, and time between two messages about it."""

REPORT_NOTICE_S = 60.0
"""Time between two messages about reports that cannot be delivered; the first comes earlier."""

RENEW_WAIT_S = 10.0
"""Wait asked for while values are renewed ahead."""

SAVE_WAIT_S = 5.0
"""Wait for final losses asked for in one call that saves a state."""

BACKOFF_FIRST_S = 0.1
"""Bound of the first pause before a call is repeated; it doubles with each repeat."""

BACKOFF_CAP_S = 2.0
"""Greatest bound of a pause. Each pause is random below its bound (full jitter), so that the
ranks of a job do not come back in step; 5,000 of them then repeat 5,000 calls a second."""

RECONNECT_CAP_S = 1.0
"""Greatest pause of gRPC between two attempts to connect. It adds to the pause between calls,
and a rank that waits should not miss a server that is back for a second or two."""

OUTAGE_TIMEOUT_S = 900.0
"""How long a training thread waits without any contact to the server, unless told otherwise."""

CONNECT_PATIENCE_S = 120.0
"""How long `connect` tries to reach the server: of a wrong address one should hear soon."""

OPEN_PATIENCE_S = 300.0
"""How long opening tries to reach the server. The other ranks wait in a collective meanwhile,
whose own timeout (NCCL: 600 s) would end the job with no word about the cause."""

SAVE_PATIENCE_S = 60.0
"""How long `state_dict()` takes at most, flushing included."""

LONGEST_WAIT_S = 86_400.0
"""How long values may be not fixed although the server answers. It ends such waits itself, by a
waiver after `feedback.timeout`; this bound only keeps a promise that nothing hangs for ever."""

ACKNOWLEDGE_PATIENCE_S = 10.0
"""How long the training thread tries to say what became of a directive."""

ROLL_BACK_FLUSH_S = 30.0
"""How long a rollback waits for queued reports to be delivered before it drops them."""

CLOSE_FLUSH_S = 30.0
"""How long `close()` waits for queued reports to be delivered."""

ABANDON_FLUSH_S = 5.0
"""The same where an exception ends the `with` block, or nobody called `close()`."""

JOIN_S = 2.0
"""How long to wait for a background thread to end."""

LEADER_PATIENCE_S = 5.0
"""Leader mode: how long the job waits for a server that does not answer before it goes on alone."""

FEEDBACK_PATIENCE_S = 30.0
"""The same where the server answers that losses are missing: its own `feedback.timeout` does not
count in leader mode, and this is that one's default."""

HOLDER_WAIT_S = 2.0
"""Wait asked for in a call for values in leader mode; it leaves time for an answer."""

ALONE_NOTICE_S = 60.0
"""Time between two messages of a job that goes on alone."""

NODE_POLL_FIRST_S = 0.001
"""Time between two looks for what another rank of the node was answered; it grows by half."""

NODE_POLL_BLOCKED_S = 0.01
"""Greatest time between two looks while the training thread is blocked."""

NODE_POLL_AHEAD_S = 0.1
"""The same while values are renewed ahead."""

MAX_STEPS = 128
"""Most steps in one block of values."""

RENEW_SHARE = 4
"""Values are asked for again before one part in so many of those that can be held is used up."""

UNKNOWN_STEP_S = 1.0
"""Length of a step where none was measured yet."""

MAX_AHEAD = 4096
"""Most steps of values held ahead, however large the delay."""

OFFERED_STEPS = 4096
"""Most steps of values offered in one call."""

MAX_OFFERED = 4 * OFFERED_STEPS
"""Steps of values offered ahead that are held: at 2 s a step nine hours of an outage."""

ALONE_STEPS = 32
"""Most steps passed on at once while the server is away: whether it is back is seen between."""

MAX_VALUES = 32_768
"""Most values declared in one call, steps x groups; the server takes no more."""

KEPT_PAST = 1024
"""Steps of values kept behind the one in use."""

MAX_BATCH = 512
"""Most reports in one call."""

BATCH_BYTES = 256 * 1024
"""Most bytes of reports in one call: their validation losses have names."""

MAX_BACKLOG = 1_000_000
"""Most reports that wait for delivery: about 100 MB, or weeks of an outage."""

KEPT_LOSSES = 65_536
"""Losses kept to recognise a repeated report here; the server knows them all."""

MESSAGE_BYTES = 1024 * 1024
"""Largest message sent or received."""

MAX_PROGRESS = 2**53
"""Greatest progress: every integer up to it is a float64."""
