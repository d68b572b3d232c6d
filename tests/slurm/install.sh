#!/usr/bin/env bash
# What tests marked `slurm` need on Debian or Ubuntu: SLURM's daemons and munge, 13 MB. Does nothing where they are.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"
hash slurmctld slurmd munged ip unshare sbatch 2>/dev/null && exit 0
[ "$(id -u)" = 0 ] || { echo "tests/slurm/install.sh: run it as root, once: sudo tests/slurm/install.sh" >&2; exit 1; }
exec "$(dirname "$0")/slurm_sandbox" install
