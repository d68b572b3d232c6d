"""What a site is like: the only place for partitions, accounts, GPU syntax, containers, NCCL variables. Torch-free.

Recipes (configs/nano, configs/landiff) hold none of it; `landiff submit --cluster FILE` brings the two together.
"""

from __future__ import annotations

import re
from typing import Literal

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
    """Of a time limit as SLURM writes it."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # D-HH[:MM[:SS]]
        hours, minutes, secs = (*parts, 0, 0)[:3]
    else:  # minutes, M:SS, H:MM:SS
        hours, minutes, secs = (
            (0, *parts, 0) if len(parts) == 1 else (0, *parts) if len(parts) == 2 else parts
        )
    return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + secs


def _one_line(value: str | None) -> str | None:
    """A value of an #SBATCH line or of a command in the script. Raises ValueError."""
    problem = line_problem(value) if value is not None else ""
    if problem:
        raise ValueError(problem)
    return value


class Resources(Config):
    """What one job asks for."""

    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeInt = 0  # 0: a job of CPUs; trainers then use gloo
    tasks_per_node: PositiveInt | None = (
        None  # processes a trainer starts on a node; none = one per GPU, or 1
    )
    cpus_per_task: PositiveInt = 1
    memory: str | None = (
        None  # of a node, as SLURM writes it: 64G; "0" = all of it; none = the site's default
    )
    time: str = "04:00:00"  # limit of one attempt; a run that needs longer is requeued, with its checkpoints
    partition: str | None = None
    array: PositiveInt = 1  # shards, precompute: tasks that share the work
    array_limit: PositiveInt | None = None  # of them at once

    @field_validator("partition")
    @classmethod
    def _is_one_line(cls, partition: str | None) -> str | None:
        return _one_line(partition)

    @field_validator("memory")
    @classmethod
    def _is_an_amount(cls, memory: str | None) -> str | None:
        if memory is not None and not MEMORY.fullmatch(memory):
            raise ValueError(
                'memory is a number and a unit, as SLURM writes it: 64G, or "0" for all'
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
                f"tasks_per_node = {self.tasks_per_node} with gpus_per_node = {self.gpus_per_node}: "
                "a trainer has one process per GPU; leave tasks_per_node out"
            )
        return self

    @property
    def tasks(self) -> int:
        """Processes of a trainer on one node."""
        return self.tasks_per_node or self.gpus_per_node or 1


class StageResources(Config):
    """Where one stage differs from `default`; the keys are those of `Resources`."""

    nodes: PositiveInt | None = None
    gpus_per_node: NonNegativeInt | None = None
    tasks_per_node: PositiveInt | None = None
    cpus_per_task: PositiveInt | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    array: PositiveInt | None = None
    array_limit: PositiveInt | None = None


class ContainerConfig(Config):
    """The image that the ranks run in; the batch script itself runs on the node."""

    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    image: str
    mounts: tuple[str, ...] = ()  # host:container[:flags]; the working directory is always mounted

    @field_validator("image")
    @classmethod
    def _is_one_line(cls, image: str) -> str | None:
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

    scheduler: Literal["slurm", "local"] = "slurm"  # local: run here and now, through torchrun
    launcher: Literal["srun", "torchrun"] = (
        "srun"  # srun: one task per GPU; torchrun: one task per node
    )
    default: Resources = Resources()
    stages: dict[str, StageResources] = Field(default={})

    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None  # nodes not to use
    gpu_syntax: Literal["gpus-per-node", "gres"] = "gpus-per-node"
    gpu_type: str | None = None  # gpu:h100:8 instead of gpu:8
    options: tuple[str, ...] = ()  # more sbatch options, as they are: --exclusive

    modules: tuple[str, ...] = ()  # module load, in this order
    setup: tuple[str, ...] = ()  # shell lines before anything else runs
    env: dict[str, str] = Field(default={})  # NCCL_SOCKET_IFNAME, HF_HOME, ...
    container: ContainerConfig | None = None
    python: str | None = (
        None  # interpreter on the nodes; none = the one that submits, in a container its python3
    )

    restart: Literal["requeue", "chain", "none"] = (
        "requeue"  # chain: for sites that forbid requeueing
    )
    chain_length: PositiveInt = 4  # jobs queued one behind the other; restart = chain
    max_restarts: NonNegativeInt = (
        5  # after crashes, or in a row without a new checkpoint; stops that saved are not counted
    )
    signal_margin_s: PositiveInt = Field(
        default=300, ge=10
    )  # the stop signal comes this long (up to 60 s more) before the limit
    kill_wait_s: PositiveInt = 60  # ranks left over when another has ended
    preflight: bool = True  # trainers: `landiff doctor --node` on every node before the ranks start

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
        """YAML reads `NCCL_DEBUG: 1` as a number; an environment variable is text."""
        if isinstance(env, dict):
            bad = [name for name in env if not VARIABLE.fullmatch(str(name))]
            if bad:
                raise ValueError(f"{bad[0]!r} is no name of an environment variable")
            return {
                name: str(value)
                if isinstance(value, (int, float)) and not isinstance(value, bool)
                else value
                for name, value in env.items()
            }
        return env

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
        return _one_line(value)

    @field_validator("gpu_type")
    @classmethod
    def _is_a_gpu_type(cls, gpu_type: str | None) -> str | None:
        if gpu_type is not None and not GPU_TYPE.fullmatch(gpu_type):
            raise ValueError("a GPU type is a word of letters, digits and _.+-, e.g. h100")
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
                raise ValueError(
                    f"signal_margin_s = {self.signal_margin_s} leaves nothing of time = {time!r} of {stage}; "
                    f"raise time to more than {-(-self.signal_margin_s // 60)} minutes, or lower the margin"
                )
        return self

    def resources(self, stage: str, nodes: int | None = None) -> Resources:
        """What a job of `stage` asks for. Raises ConfigError for combinations that make no sense."""
        merged = self.default.model_dump()
        changed = self.stages[stage].model_dump(exclude_none=True) if stage in self.stages else {}
        if "gpus_per_node" in changed and "tasks_per_node" not in changed:
            merged["tasks_per_node"] = None
        merged |= changed | ({"nodes": nodes} if nodes else {})
        return validate(Resources, merged, f"stages.{stage}")

    def redacted(self) -> ClusterConfig:
        """The same without secrets in `env`, for display."""
        return self.model_copy(update={"env": redact_variables(self.env)})
