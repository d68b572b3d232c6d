#!/bin/bash
# Template of the batch scripts. launchers/slurm/script.py copies the sections that a job needs, in
# the order of this file.
#
# `#: NAME` starts a section. Of the sections SLOT/VARIANT a script has at most one.
# `@name@` stands for text that script.py inserts, quoted for bash.
#
# Variables that sections share:
#   RUN, JOB, LOG   run folder, job folder, folder of the logs
#   T               suffix of a task of an array, e.g. ".3"; empty for other jobs
#   ID              job id; "here" without sbatch
#   DONE            file that marks a finished job
#   ERRORS          pattern of the error files of this job
#   MAX_RESTARTS    max_restarts of the cluster file
#   restart         number of restarts so far
#   asked           last signal that asked for a stop; empty before the first
#   ranks           process id of the command that runs the ranks
#   rc              exit code of the ranks
#
# shellcheck disable=SC2329  # some functions are called from other sections or by traps

#: early-signals
# Remember a signal that arrives while modules load.
asked=
for name in USR1 TERM INT; do
    # shellcheck disable=SC2064  # $name is expanded now
    trap "asked=$name" "$name"
done

#: site
# Set-up of the cluster file
@site@

#: constants
set -uo pipefail
cd @workdir@ || exit 1
RUN=@run@
JOB=$RUN/@job_folder@
T=${SLURM_ARRAY_TASK_ID:+.$SLURM_ARRAY_TASK_ID}
ID=@id@
ERRORS=@errors@
LOG=$JOB/@logs@
DONE=$RUN/done$T
MAX_RESTARTS=@max_restarts@
restart=${SLURM_RESTART_COUNT:-${LANDIFF_RESTART:-0}}
# Run the code as it was at submission, whatever happens to the working tree.
export PYTHONPATH=$JOB/@code@ PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
mkdir -p "$LOG"

#: end-with-parent
# Processes that this script starts end with it. Under SLURM that is SLURM's task.
export @parent_variable@=$$

#: threads
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-@cpus_per_task@}

#: fresh
# A new submission, not a restart: crashes of earlier submissions do not count.
if [ "$restart" = 0 ]; then
    rm -f "$JOB/state$T"
    if [ "$ID" = here ]; then rm -f "$JOB/stopped"; fi
fi

#: functions
# State that outlives an attempt:
#   crashes        number of crashes
#   crashed_at     newest checkpoint at the last crash; - before the first crash
#   restarted_at   newest checkpoint at the last restart; - before the first restart
#   stalls         restarts in a row that found the same newest checkpoint
#   restarts       number of restarts, for `landiff status`
#   phase          new, running or ended; still running if the node died
crashes=0 crashed_at=- restarted_at=- stalls=0 phase=new
if [ -e "$JOB/state$T" ]; then
    # shellcheck source=/dev/null
    . "$JOB/state$T"
fi

say() { echo "$(date -Is) $*"; }

remember() { # Write the state. Fails on a full disk.
    printf 'crashes=%s crashed_at=%s restarted_at=%s stalls=%s restarts=%s phase=%s\n' \
        "$crashes" "$crashed_at" "$restarted_at" "$stalls" "$restart" "$phase" \
        >"$JOB/.state$T" && mv "$JOB/.state$T" "$JOB/state$T"
}

remember_or_end() { # A job that cannot count its restarts would restart forever.
    remember || give_up 1 "$JOB/state$T cannot be written; is the disk full?"
}

give_up() { # give_up CODE REASON...: end without a restart.
    local code=$1
    shift
    say "giving up: $*"
    echo "$*" >"$JOB/given_up$T"
    phase=ended
    remember
    leave_chain # later jobs of the chain would fail for the same reason
    exit "$code"
}

stopped() { # Has `landiff stop` asked this job to end?
    grep -qsx "$ID" "$JOB/stopped"
}

leave_chain() { # Cancel the other jobs of a chain.
    if [ -e "$JOB/chain" ]; then
        grep -vx "${SLURM_JOB_ID:-}" "$JOB/chain" | xargs -r scancel
    fi
}

count_restart() { # count_restart crash|outside: outside is a dead node or a requested stop.
    local now
    now=$(newest)
    if [ "$1" = crash ]; then
        crashes=$((crashes + 1))
        if [ "$crashes" -gt "$MAX_RESTARTS" ]; then
            give_up 1 "crashed $crashes times, max_restarts = $MAX_RESTARTS"
        fi
        if [ "$now" != any ] && [ "$now" = "$crashed_at" ]; then
            give_up 1 "crashed again without a new checkpoint since the last crash" \
                "(${now:-none yet})"
        fi
        crashed_at=$now
    fi
    if [ "$now" = "$restarted_at" ]; then stalls=$((stalls + 1)); else stalls=0; fi
    if [ "$now" != any ] && [ "$stalls" -gt "$MAX_RESTARTS" ]; then
        give_up 1 "restarted $stalls times without a new checkpoint (${now:-none yet})," \
            "max_restarts = $MAX_RESTARTS"
    fi
    restarted_at=$now
}

show_failure() { # Print and record the error of the rank that failed first.
    local first srun_error number hang cause=
    # shellcheck disable=SC2086  # $ERRORS is a pattern
    first=$(grep -sH '^time:' "$RUN"/errors/$ERRORS | sort -t: -k3 | head -n 1 | cut -d: -f1)
    srun_error=$(grep -sm1 'srun: error: .*: task' "$LOG/srun$T.log")
    if [ -n "$first" ]; then cause="$(basename "$first" .txt): $(tail -n 1 "$first")"; fi
    case $srun_error in
    '') ;;
    *'Exited with exit code'*) cause=${cause:-$srun_error} ;;
    *) # A rank that was killed has no error file, but srun reports it.
        number=$(echo "${T#.}$srun_error" | grep -oE '^[0-9]+|tasks? [0-9]+' | head -n 1 | tr -dc 0-9)
        cause="$(printf 'rank_%04d' "$number"): $srun_error"
        ;;
    esac
    if [ -n "$cause" ]; then
        echo "first to fail: $cause"
        echo "$cause" >"$JOB/last_error$T"
    fi
    if [ -n "$first" ]; then
        echo "---- $first"
        tail -n 30 "$first"
        echo "----"
    fi
    for hang in "$RUN"/hangs/rank_*.txt; do
        if [ -s "$hang" ]; then
            echo "---- hang: $hang"
            head -n 30 "$hang"
            break
        fi
    done
}

#: newest/checkpoint
newest() { # Name of the newest checkpoint; empty before the first.
    find "$RUN/checkpoints/" -maxdepth 1 -name 'step_*' -printf '%f\n' 2>/dev/null |
        grep -xE 'step_[0-9]+' | sort -V | tail -n 1
}

#: newest/none
newest() { # The job has no checkpoints; it resumes unit by unit.
    echo any
}

#: again/requeue
again() { # Requeue before this script ends: dependent jobs would see it fail.
    local id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} state
    id=${id:-$SLURM_JOB_ID}
    for _ in $(seq 60); do
        state=$(scontrol show job -o "$id" 2>/dev/null | grep -o ' JobState=[A-Z_]*')
        if [ -z "$state" ]; then # the controller does not answer
            sleep 5
            continue
        fi
        if [ "$state" != " JobState=RUNNING" ]; then # cancelled, or requeued already
            say "no requeue:$state"
            return
        fi
        say "requeueing"
        trap 'exit 75' TERM # SLURM ends a requeued attempt with SIGTERM
        if scontrol requeue "$id"; then
            sleep 60
            return
        fi
        sleep 5
    done
    say "could not requeue"
}

#: again/chain
again() { say "the next job of the chain resumes"; }

#: again/none
again() { say "not restarted (restart = none); submit again to resume"; }

#: again/here
again() {
    # Ctrl-C, or the end of the allocation
    if [ "$asked" = INT ] || [ "$asked" = TERM ]; then return; fi
    say "starting again"
    LANDIFF_RESTART=$((restart + 1)) exec bash "$0"
}

#: stop/trainer
# Ranks read this file. A signal would end torchrun and the helper processes of data loaders.
stop_ranks() { touch "$RUN/stop"; }
finished() { [ -e "$DONE" ]; }

#: stop/other
# The job commits its results unit by unit; the next attempt resumes.
stop_ranks() {
    if [ -n "$ranks" ]; then kill -TERM "$ranks" 2>/dev/null; fi
}
finished() { [ "$rc" = 0 ] && touch "$DONE"; }

#: begin
say "job ${SLURM_JOB_ID:-here} restart $restart on ${SLURM_JOB_NODELIST:-$(hostname)}"
if [ -e "$DONE" ]; then
    say "already done"
    exit 0
fi
rm -f "$JOB/given_up$T" "$JOB/config_error$T" "$LOG/srun$T.log" "$RUN/stop"
echo "$ID" >"$JOB/current"
# If the last attempt never ended, its node died.
if [ "$phase" = running ]; then count_restart outside; fi
phase=running
remember_or_end
ranks=
on_signal() {
    if [ -z "$asked" ]; then say "signal $1: asking for a stop"; fi
    asked=$1
    stop_ranks
}
for name in USR1 TERM INT; do
    # shellcheck disable=SC2064  # $name is expanded now
    trap "on_signal $name" "$name"
done

#: hangs
# Keep the stack traces of an earlier attempt. NCCL's flight recorder writes to the same folder.
if [ -d "$RUN/hangs" ]; then
    rmdir "$RUN/hangs" 2>/dev/null || mv "$RUN/hangs" "$RUN/hangs.$(date +%Y%m%dT%H%M%S)"
fi
mkdir -p "$RUN/hangs"
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
export TORCH_FR_DUMP_TEMP_FILE=$RUN/hangs/nccl_rank_
# The name in older versions of torch. Newer ones accept it, with a warning when they write.
export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$RUN/hangs/nccl_rank_
# Error files of ranks of earlier attempts. Their cause is kept in job/last_error.
rm -f "$RUN"/errors/rank_*.txt

#: rendezvous
# The first node's name resolves on all nodes. The port differs between jobs on the same node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

#: preflight
say "pre-flight on every node"
rm -rf "$JOB/preflight"
mkdir -p "$JOB/preflight"
@preflight@ --report "$JOB/preflight" >>"$LOG/preflight.log" 2>&1
code=$?
if [ "$code" != 0 ] && [ -z "$asked" ]; then
    cat "$JOB"/preflight/*.bad 2>/dev/null || tail -n 20 "$LOG/preflight.log"
    bad=$(find "$JOB/preflight" -name '*.bad' -printf '%f\n' | sort |
        sed 's,\.bad$,,' | paste -sd ,)
    give_up 1 "pre-flight failed (exit code $code) on ${bad:-an unknown node};" \
        "leave it out with  exclude: ${bad:-NODE}  in the cluster file"
fi

#: ranks
rc=75
if [ -z "$asked" ]; then
    @ranks@ &
    ranks=$!
    while :; do
        if [ -n "$asked" ]; then
            stop_ranks # once a second: ranks that are just starting remove an old request
            sleep 1
        else
            wait "$ranks"
            rc=$?
        fi
        kill -0 "$ranks" 2>/dev/null || break
    done
    if [ -n "$asked" ]; then
        wait "$ranks"
        rc=$?
    fi
fi

#: ending
if [ -e "$JOB/refused.$ID$T" ]; then # another process owns the run folder: change nothing there
    say "refused: $(cat "$JOB/refused.$ID$T")"
    rm -f "$JOB/refused.$ID$T"
    exit 2
fi
rm -f "$RUN/stop"
if [ -s "$LOG/srun$T.log" ]; then cat "$LOG/srun$T.log"; fi
say "ended with $rc${asked:+ after signal $asked}"
if finished; then
    phase=ended
    remember
    rm -f "$JOB/last_error$T"
    say "done"
    exit 0
fi
if [ "$rc" != 0 ] && [ -z "$asked" ]; then show_failure; fi
if [ -e "$JOB/config_error$T" ]; then
    give_up 2 "an error that a restart would meet again: $(cat "$JOB/config_error$T")"
fi
phase=ended
if stopped; then
    remember
    leave_chain
    say "stopped by landiff stop; submit again to resume"
    exit 75
fi
if [ -n "$asked" ] || [ "$rc" = 0 ]; then count_restart outside; else count_restart crash; fi
remember_or_end
again
exit $((rc ? rc : 75))
