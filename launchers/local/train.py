"""The command `landiff train`: checks the config and starts the ranks of a trainer on this machine.

Each rank runs `python -m landiff.training.<trainer> CONFIG_FILE`.
"""

from __future__ import annotations

import argparse

from landiff.configs import ConfigError
from landiff.configs.loader import write_config
from landiff.configs.problems import require_none
from landiff.launchers.checks import check_processes, load_with_problems
from landiff.launchers.commands import JobFailed, print_dry_run
from landiff.launchers.local.start import (
    default_processes,
    explain_exit,
    own_run,
    run_trainer,
    visible_gpus,
)
from landiff.launchers.slurm.stage_jobs import command_line
from landiff.launchers.stages import TRAINERS
from landiff.training.checkpoint.run_folder import RESOLVED
from landiff.training.checks import Launch


def train_command(args: argparse.Namespace) -> int:
    """Trains one of the three models. Returns the exit code.

    Raises ConfigError for problems found before or by the ranks, and JobFailed if the ranks end
    with another error.
    """
    trainer = TRAINERS[args.stage]
    overrides = list(args.overrides)
    if args.adopt:
        overrides.append("data.adopt=true")
    config, problems = load_with_problems(trainer.config_class, args.config, overrides)
    processes = default_processes(config) if args.nproc is None else args.nproc
    problems += check_processes(processes, visible_gpus())
    problems += trainer.check(config, Launch(max(1, processes)))
    if args.dry_run:
        print_dry_run(config, f"would train in {config.run} on {processes} process(es)")
    require_none(problems)
    if args.dry_run:
        return 0
    command = command_line(args.argv)
    with own_run(config, args.stage, processes, command, take_over=args.take_over) as owned:
        config_file = config.run / RESOLVED
        write_config(config_file, config)
        code = run_trainer(trainer.module, config_file, config.run, processes, owned)
    if code == 0:
        return 0
    message = f"{config.run} failed: {explain_exit(config.run, code)}"
    if code == 2:
        raise ConfigError(message)
    raise JobFailed(message)
