"""Cluster file: the settings of a site, such as partitions and GPU syntax.

Recipes (configs/nano, configs/landiff) have no settings of a site; `landiff submit --cluster FILE`
combines the two. Torch-free.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from landiff.configs.base import Config
from landiff.configs.loader import validate
from landiff.configs.secrets import redact_variables
from landiff.launchers.slurm.script_values import check_shell_lines, line_problem, variable_problem

TRAINERS = ("tokenizer", "lm", "diffusion")
STAGES = ("shards", "precompute", *TRAINERS, "convert", "sample", "evaluate")
TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d(:\d\d)?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
MEMORY = re.compile(r"\d+[KMGTkmgt]?[Bb]?")
GPU_TYPE = re.compile(r"[A-Za-z0-9_.+-]+")


def seconds(time: str) -> int:
    """Seconds of a time limit in SLURM's notation.

    The notations are minutes, M:SS, H:MM:SS and D-HH[:MM[:SS]].
    """
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
        return (int(days) * 24 + hours) * 3600 + minutes * 60 + secs
    if len(parts) == 1:
        return parts[0] * 60
    if len(parts) == 2:
        return parts[0] * 60 + parts[1]
    return parts[0] * 3600 + parts[1] * 60 + parts[2]


def _one_line(value: str) -> str:
    """Return `value`, for an #SBATCH line or a command. Raises ValueError unless it is one line."""
    problem = line_problem(value)
    if problem:
        raise ValueError(problem)
    return value


class Resources(Config):
    """Resources of one job."""

    nodes: PositiveInt = Field(
        default=1, description="Number of nodes. --nodes on the command line overrides it."
    )
    gpus_per_node: NonNegativeInt = Field(
        default=0,
        description="Number of GPUs per node. 0 is a job without GPUs, whose trainers use gloo.",
    )
    tasks_per_node: PositiveInt | None = Field(
        default=None,
        description=(
            "Ranks of a trainer per node. Default: one per GPU, or one on a node without GPUs."
        ),
    )
    cpus_per_task: PositiveInt = Field(
        default=1, description="CPU cores per rank, including its data loading."
    )
    memory: str | None = Field(
        default=None,
        description=(
            'Memory per node in SLURM notation, such as "64G". "0" is all of it. Default: that '
            "of the site."
        ),
    )
    time: str = Field(
        default="04:00:00",
        description="Time limit of one attempt: minutes, M:SS, H:MM:SS or D-HH[:MM[:SS]]. A run "
        "that needs longer is requeued and resumes from its last checkpoint.",
    )
    partition: str | None = Field(default=None, description="Partition. Default: that of the site.")
    array: PositiveInt = Field(
        default=1, description="Number of tasks of an array job that share the work of a stage."
    )
    array_limit: PositiveInt | None = Field(
        default=None,
        description=(
            "Maximum number of tasks of an array that run at the same time. Default: no limit."
        ),
    )

    @field_validator("partition")
    @classmethod
    def _is_one_line(cls, partition: str | None) -> str | None:
        return None if partition is None else _one_line(partition)

    @field_validator("memory")
    @classmethod
    def _is_an_amount(cls, memory: str | None) -> str | None:
        if memory is not None and not MEMORY.fullmatch(memory):
            raise ValueError(
                'memory is a number and a unit in SLURM\'s notation: 64G, or "0" for all'
            )
        return memory

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: str) -> str:
        if not TIME.fullmatch(time):
            raise ValueError(
                'a time limit is minutes, M:SS, H:MM:SS or D-HH[:MM[:SS]], in quotes: "04:00:00"'
            )
        return time

    @model_validator(mode="after")
    def _one_task_per_gpu(self) -> Resources:
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node = {self.tasks_per_node} with gpus_per_node = "
                f"{self.gpus_per_node}: a trainer has one process per GPU; leave tasks_per_node out"
            )
        return self

    @property
    def tasks(self) -> int:
        """Processes of a trainer on one node."""
        return self.tasks_per_node or self.gpus_per_node or 1


def _override(key: str) -> Any:
    """A field that replaces `default.KEY` for one stage."""
    return Field(default=None, description=f"Replaces `default.{key}` for this stage.")


class StageResources(Config):
    """Resources of one stage where they differ from `default`."""

    nodes: PositiveInt | None = _override("nodes")
    gpus_per_node: NonNegativeInt | None = _override("gpus_per_node")
    tasks_per_node: PositiveInt | None = _override("tasks_per_node")
    cpus_per_task: PositiveInt | None = _override("cpus_per_task")
    memory: str | None = _override("memory")
    time: str | None = _override("time")
    partition: str | None = _override("partition")
    array: PositiveInt | None = _override("array")
    array_limit: PositiveInt | None = _override("array_limit")


class ContainerConfig(Config):
    """Container of the ranks. The batch script itself runs on the node."""

    runtime: Literal["pyxis", "apptainer"] = Field(
        default="pyxis",
        description="Container runtime: `pyxis`, a plugin of srun, or `apptainer`.",
    )
    image: str = Field(description="Image, in the notation of the runtime.")
    mounts: tuple[str, ...] = Field(
        default=(),
        description=(
            "Further mounts, each as host:container[:flags]. The working directory and the run "
            "folder are always mounted."
        ),
    )

    @field_validator("image")
    @classmethod
    def _is_one_line(cls, image: str) -> str:
        return _one_line(image)

    @field_validator("mounts")
    @classmethod
    def _are_mounts(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            _one_line(mount)
            if "," in mount:
                raise ValueError(
                    f"{mount!r} holds a comma, which separates mounts; give each its own entry"
                )
        return mounts


class ClusterConfig(Config):
    """One cluster, as one user uses it."""

    scheduler: Literal["slurm", "local"] = Field(
        default="slurm",
        description="`slurm` submits jobs. `local` runs them on this machine, one after the other.",
    )
    launcher: Literal["srun", "torchrun"] = Field(
        default="srun",
        description="What starts the ranks of a trainer: `srun` one task per rank, `torchrun` one "
        "task per node. With scheduler = local it is always torchrun.",
    )
    default: Resources = Field(
        default=Resources(), description="Resources of all jobs, unless set in `stages`."
    )
    stages: dict[str, StageResources] = Field(
        default={}, description="Resources of single stages, by name of the stage."
    )

    account: str | None = Field(default=None, description="Account (sbatch --account).")
    qos: str | None = Field(default=None, description="Quality of service (sbatch --qos).")
    constraint: str | None = Field(
        default=None, description="Required features of nodes (sbatch --constraint)."
    )
    reservation: str | None = Field(default=None, description="Reservation (sbatch --reservation).")
    exclude: str | None = Field(
        default=None, description="Nodes not to use, such as node[3,7] (sbatch --exclude)."
    )
    gpu_syntax: Literal["gpus-per-node", "gres"] = Field(
        default="gpus-per-node",
        description="The sbatch option that requests GPUs: --gpus-per-node=8 or --gres=gpu:8.",
    )
    gpu_type: str | None = Field(
        default=None, description="Type of the GPUs: h100 requests gpu:h100:8 instead of gpu:8."
    )
    options: tuple[str, ...] = Field(
        default=(), description="Further sbatch options, passed on unchanged: --exclusive."
    )

    modules: tuple[str, ...] = Field(
        default=(), description="Environment modules to load, in this order."
    )
    setup: tuple[str, ...] = Field(
        default=(),
        description="Lines of bash that run on the first node, after the modules are loaded.",
    )
    env: dict[str, str] = Field(
        default={},
        description="Environment variables of all ranks, such as NCCL_SOCKET_IFNAME. Values are "
        "not expanded by bash.",
    )
    container: ContainerConfig | None = Field(
        default=None, description="Container of the ranks. Default: ranks run on the node."
    )
    python: str | None = Field(
        default=None,
        description=(
            "Python interpreter on the nodes. Default: that of `landiff submit`; in a container, "
            "python3."
        ),
    )

    restart: Literal["requeue", "chain", "none"] = Field(
        default="requeue",
        description=(
            "How an unfinished run is restarted: `requeue` requeues its job, `chain` submits "
            "several jobs that wait for each other, `none` does not restart it."
        ),
    )
    chain_length: PositiveInt = Field(
        default=4, description="Number of jobs of a chain, which run one after the other."
    )
    max_restarts: NonNegativeInt = Field(
        default=5,
        description=(
            "Maximum number of restarts after crashes, and of consecutive restarts without a new "
            "checkpoint. Stops that saved a checkpoint are not counted."
        ),
    )
    signal_margin_s: PositiveInt = Field(
        default=300,
        ge=10,
        description="Seconds before the time limit at which a run is asked to save and stop. SLURM "
        "may send the signal up to 60 seconds earlier.",
    )
    kill_wait_s: PositiveInt = Field(
        default=60,
        description="Seconds after the exit of the first rank until srun kills the others.",
    )
    preflight: bool = Field(
        default=True,
        description="Whether `landiff doctor --node` checks every node before the ranks of a "
        "trainer start.",
    )

    @field_validator("stages")
    @classmethod
    def _known_stages(cls, stages: dict[str, StageResources]) -> dict[str, StageResources]:
        unknown = sorted(set(stages) - set(STAGES))
        if unknown:
            raise ValueError(f"{', '.join(unknown)} is no stage; known: {', '.join(STAGES)}")
        return stages

    @field_validator("env", mode="before")
    @classmethod
    def _text_values(cls, env: object) -> object:
        """Numbers as text: YAML reads `NCCL_DEBUG: 1` as a number."""
        if not isinstance(env, dict):
            return env
        found = {}
        for name, value in env.items():
            if not VARIABLE.fullmatch(str(name)):
                raise ValueError(f"{name!r} is no name of an environment variable")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            found[name] = str(value) if is_number else value
        return found

    @field_validator("env")
    @classmethod
    def _can_be_exported(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            problem = variable_problem(value)
            if problem:
                raise ValueError(f"{name} {problem}")
        return env

    @field_validator("account", "qos", "constraint", "reservation", "exclude", "python")
    @classmethod
    def _is_one_line(cls, value: str | None) -> str | None:
        return None if value is None else _one_line(value)

    @field_validator("gpu_type")
    @classmethod
    def _is_a_gpu_type(cls, gpu_type: str | None) -> str | None:
        if gpu_type is not None and not GPU_TYPE.fullmatch(gpu_type):
            raise ValueError("a GPU type consists of letters, digits and _.+-, for example h100")
        return gpu_type

    @field_validator("modules")
    @classmethod
    def _are_modules(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        for module in modules:
            _one_line(module)
        return modules

    @field_validator("setup")
    @classmethod
    def _is_complete_bash(cls, setup: tuple[str, ...]) -> tuple[str, ...]:
        if setup:
            check_shell_lines(setup, "setup")
        return setup

    @field_validator("options")
    @classmethod
    def _are_options(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            if not option.startswith("-") or line_problem(option):
                raise ValueError(f"{option!r} is no sbatch option; write --name=value on one line")
        return options

    @model_validator(mode="after")
    def _stages_fit(self) -> ClusterConfig:
        for stage in STAGES:
            time = self.resources(stage).time
            if self.scheduler == "slurm" and seconds(time) <= self.signal_margin_s:
                minutes = -(-self.signal_margin_s // 60)
                raise ValueError(
                    f"signal_margin_s = {self.signal_margin_s} leaves nothing of time = {time!r} "
                    f"of {stage}; raise time to more than {minutes} minutes, or lower the margin"
                )
        return self

    def resources(self, stage: str, nodes: int | None = None) -> Resources:
        """Resources of a job of `stage`, on `nodes` nodes if given.

        Raises ConfigError for values that contradict each other.
        """
        merged = self.default.model_dump()
        changed: dict[str, Any] = {}
        if stage in self.stages:
            changed = self.stages[stage].model_dump(exclude_none=True)
        if "gpus_per_node" in changed and "tasks_per_node" not in changed:
            merged["tasks_per_node"] = None
        merged |= changed
        if nodes:
            merged["nodes"] = nodes
        return validate(Resources, merged, f"stages.{stage}")

    def redacted(self) -> ClusterConfig:
        """A copy without secrets in `env`, to be shown."""
        return self.model_copy(update={"env": redact_variables(self.env)})
