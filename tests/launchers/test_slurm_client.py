"""The thin client: what it asks SLURM, and what it makes of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from landiff.configs import ConfigError
from landiff.launchers.slurm.client import Answer, Slurm, SlurmAway, SlurmError, run_slurm_command

AWAY = Answer(1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)")


class Cluster:
    """Answers in turn, and remembers the questions."""

    def __init__(self, *answers: Answer) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, words: Sequence[str]) -> Answer:
        self.asked.append(list(words))
        return self.answers.pop(0)


def test_a_submission_names_its_dependencies_and_reads_the_id_of_a_federation():
    cluster = Cluster(Answer(0, "42;east\n", ""))
    assert Slurm(cluster).submit(Path("job.sbatch"), ["7", "8"]) == "42"
    assert cluster.asked == [
        ["sbatch", "--parsable", "--dependency=afterok:7,afterok:8", "job.sbatch"]
    ]


def test_a_controller_that_is_away_is_asked_again():
    cluster = Cluster(AWAY, AWAY, Answer(0, "42\n", ""))
    assert Slurm(cluster, retry_waits_s=(0, 0)).submit(Path("job.sbatch")) == "42"


def test_a_controller_that_stays_away_is_said_to_be():
    with pytest.raises(SlurmAway, match="Unable to contact"):
        Slurm(Cluster(AWAY, AWAY), retry_waits_s=(0,)).queue()


def test_a_refusal_is_not_asked_again():
    cluster = Cluster(Answer(1, "", "sbatch: error: invalid partition specified: gpux"))
    with pytest.raises(SlurmError, match="invalid partition specified: gpux"):
        Slurm(cluster).submit(Path("job.sbatch"))
    assert len(cluster.asked) == 1


def test_what_would_never_run_is_the_users_mistake():
    cluster = Cluster(
        Answer(1, "", "allocation failure: Requested node configuration is not available")
    )
    with pytest.raises(ConfigError, match="change the cluster file"):
        Slurm(cluster).check(Path("job.sbatch"))
    assert cluster.asked == [["sbatch", "--test-only", "job.sbatch"]]


def test_the_queue_is_read_with_arrays_and_other_peoples_jobs_left_out():
    lines = (
        "12|RUNNING|None|node[1-2]|9:59\n"
        "13_[0-3]|PENDING|Dependency||10:00\n"
        "99|RUNNING|None|node3|1:00\n"
    )
    found = Slurm(Cluster(Answer(0, lines, ""))).queue(["12", "13"])
    assert [(job.id, job.state, job.reason, job.nodes, job.active) for job in found] == [
        ("12", "RUNNING", "None", "node[1-2]", True),
        ("13_[0-3]", "PENDING", "Dependency", "", True),
    ]


def test_a_cancelled_job_is_cancelled_whoever_did_it():
    found = Slurm(Cluster(Answer(0, "12|CANCELLED by 0|0:15\n", ""))).accounting(["12"])
    assert (found[0].state, found[0].active, found[0].exit_code) == ("CANCELLED", False, "0:15")


def test_without_accounting_there_is_no_history():
    assert (
        Slurm(Cluster(Answer(1, "", "Slurm accounting storage is disabled"))).accounting(["12"])
        == []
    )


def test_a_machine_without_slurm_says_what_to_do():
    with pytest.raises(SlurmAway, match="--cluster local"):
        run_slurm_command(["sbatch-that-is-not-there", "--version"])
