"""Names of the files in `RUN/job`, the folder that records what started a run and how it ended."""

from __future__ import annotations

JOB_FOLDER = "job"
CODE = "code"  # copy of the packages that the job runs
LOGS = "log"

# What was submitted
SCRIPT = "job.sbatch"
CONFIG = "config.yaml"
CLUSTER = "cluster.yaml"
RECORD = "job.json"
CHAIN = "chain"  # ids of the jobs of a chain

# State of the job, with a suffix such as `.3` for a task of an array
STATE = "state"  # what the batch script keeps between attempts
CURRENT = "current"  # id of the job that runs, or `here`
STOPPED = "stopped"  # ids of the jobs that `landiff stop` ended, or `here`
LAST_ERROR = "last_error"  # the rank that failed first and its error
GIVEN_UP = "given_up"  # why the job is not restarted
CONFIG_ERROR = "config_error"  # an error that a restart would meet again
REFUSED = "refused"  # another process owns the run folder
