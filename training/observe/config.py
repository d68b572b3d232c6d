"""Config of the profiler and of experiment trackers. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from landiff.configs.base import Config


class ProfileConfig(Config):
    """A window of steps that torch's profiler records."""

    start: PositiveInt = Field(
        description="First step to record. The first steps of a run are slower than the others."
    )
    steps: PositiveInt = Field(
        default=3, description="Number of steps to record. Each takes some MB of trace."
    )
    ranks: tuple[NonNegativeInt, ...] = Field(
        default=(0,), description="Ranks that record. The others train as usual."
    )


class WandbConfig(Config):
    """Weights & Biases. Needs the package wandb (`pip install 'landiff-pretrain[wandb]'`)."""

    kind: Literal["wandb"] = Field(description="Name of the tracker.")
    project: str = Field(default="landiff", description="Project of the run.")
    name: str | None = Field(
        default=None, description="Name of the run. null: the path of the run folder."
    )
    entity: str | None = Field(
        default=None, description="User or team. null: the default of the account."
    )
    mode: Literal["offline", "online"] = Field(
        default="offline",
        description=(
            "`offline` writes into the run folder, for `wandb sync`. `online` also uploads and "
            "needs a login."
        ),
    )


class MlflowConfig(Config):
    """MLflow. Needs the package mlflow-skinny (`pip install 'landiff-pretrain[mlflow]'`)."""

    kind: Literal["mlflow"] = Field(description="Name of the tracker.")
    experiment: str = Field(default="landiff", description="Experiment of the run.")
    name: str | None = Field(
        default=None, description="Name of the run. null: the path of the run folder."
    )
    uri: str | None = Field(
        default=None,
        description=(
            "Tracking server or database, for example `http://host:5000`. null: the SQLite file "
            "mlflow.db in the run folder."
        ),
    )


TrackerConfig = Annotated[WandbConfig | MlflowConfig, Field(discriminator="kind")]
