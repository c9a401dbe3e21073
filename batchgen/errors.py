"""What can go wrong, as users meet it.

* BatchgenError                (exit 1)
  - SpecError                  (exit 2)   the job file is wrong
  - InputError                 (exit 2)   the input table is missing, unreadable or of another shape
    - InputChangedError        (exit 2)   an input file changed between plan and read
  - ModelError                 (exit 2)   weights cannot be had, or head and target do not fit
    - ModelUnreachableError    (exit 1)   whence weights are fetched does not answer
  - EngineError                (exit 1)   the engine dies whatever it runs
  - ScreenError                (exit 1)   the service that finds personal data cannot be asked
  - StoreError                 (exit 1)   object storage kept failing
  - CorruptOutputError         (exit 1)   a part or segment does not read back as written
  - AcceptanceError            (exit 1)   the draft head accepts less than the job file demands
  - TooManyErrorsError         (exit 1)   rows do nothing but fail
  - ReconciliationError        (exit 1)   the output does not hold every input row exactly once
  - OutputConflictError        (exit 73)  the output folder holds another job's rows
  - DrainedError               (exit 75)  stopped on request; run the same command again to go on
  - ClusterError               (exit 1)   Ray does not start, has no place for a worker, or another batchgen
  - ClusterLostError           (exit 75)  Ray is gone in the middle of a run
  - LeaseHeldError             (exit 75)  another run writes to this output; run again when it has ended
  - LeaseLostError             (exit 75)  another run took this one's output over

Every message is one line that names the file, field, row or key, what was found, what was expected and what to do.
A row that cannot be generated is never an exception: it is a `record.Verdict` in the output.
"""


class BatchgenError(Exception):
    """Base of all errors that are shown to the user as one line, without a traceback."""

    exit_code = 1


class SpecError(BatchgenError):
    """The job file is wrong; `problems` lists everything that is, one line each."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class InputError(BatchgenError):
    """The input table is missing, unreadable or of another shape than the job file says."""

    exit_code = 2


class InputChangedError(InputError):
    """The input file `url` is not the one that was planned; rows that were read of it are of no use."""

    def __init__(self, message: str, url: str = "") -> None:
        super().__init__(message)
        self.url = url


class ModelError(BatchgenError):
    """Weights cannot be had, are not what they should be, or head and target do not fit."""

    exit_code = 2


class ModelUnreachableError(ModelError):
    """Whence weights are fetched does not answer; later it may."""

    exit_code = 1


class EngineError(BatchgenError):
    """The engine's process dies whatever it runs."""


class ScreenError(BatchgenError):
    """The service that finds personal data cannot be asked; what is finished is journalled."""


class StoreError(BatchgenError):
    """Object storage kept failing after every retry."""


class CorruptOutputError(BatchgenError):
    """A part or a journal segment does not read back as it was written."""


class AcceptanceError(BatchgenError):
    """Acceptance is below `speculation.min_acceptance`, or down by more than `max_drift`, and the job says to fail."""


class TooManyErrorsError(BatchgenError):
    """Most rows so far failed, and the job file does not allow for that."""


class ReconciliationError(BatchgenError):
    """The output does not hold every input row exactly once per sample."""


class OutputConflictError(BatchgenError):
    """The output folder holds rows of another generation fingerprint or with other columns."""

    exit_code = 73


class DrainedError(BatchgenError):
    """Stopped on request (SIGINT, SIGTERM) with everything finished so far journalled."""

    exit_code = 75


class ClusterError(BatchgenError):
    """Ray does not start, has no place for a worker, or another batchgen; what is finished is journalled."""


class ClusterLostError(BatchgenError):
    """Ray is gone in the middle of a run; what is finished is journalled."""

    exit_code = 75


class LeaseHeldError(BatchgenError):
    """Another run writes to this output."""

    exit_code = 75


class LeaseLostError(BatchgenError):
    """Another run took over, because this one gave no sign of life for longer than its lease."""

    exit_code = 75
