"""The fixed parts of a batch script, in bash, in the order in which they stand there.

Variables that they share: RUN the run folder, JOB what launched it, T the task of an array ("" or ".3"), DONE the
marker of a finished run, LOG, ID of the job, ERRORS its error files, MAX_RESTARTS, restart (how often SLURM started
this job before), rc, asked (the signal that asked for a stop).
"""

EARLY = r"""
# A signal that comes while modules load is remembered.
asked=
for name in USR1 TERM INT; do trap "asked=$name" $name; done
"""

FRESH = r"""
if [ "$restart" = 0 ]; then   # submitted anew: old crashes do not count
    rm -f "$JOB/state$T"
    [ "$ID" != here ] || rm -f "$JOB/stopped"
fi
"""

BOOKKEEPING = r"""
# What has to outlive an attempt: crashes so far and the newest checkpoint at the last of them (- before the first),
# the newest checkpoint at the last restart and how many restarts in a row found the same, is an attempt running.
crashes=0 crashed_at=- restarted_at=- stalls=0 phase=new
[ ! -e "$JOB/state$T" ] || . "$JOB/state$T"
remember() {
    printf 'crashes=%s crashed_at=%s restarted_at=%s stalls=%s phase=%s\n' \
        "$crashes" "$crashed_at" "$restarted_at" "$stalls" "$phase" >"$JOB/.state$T" && mv "$JOB/.state$T" "$JOB/state$T"
}
remember_or_end() { # who cannot count must not start again for ever
    remember || give_up 1 "$JOB/state$T cannot be written; is the disk full?"
}
say() { echo "$(date -Is) $*"; }
give_up() { # CODE WHY
    say "giving up: $2"
    echo "$2" >"$JOB/given_up$T"; phase=ended; remember
    leave_chain   # those queued behind would find the same
    exit "$1"
}
stopped() { grep -qsx "$ID" "$JOB/stopped"; }
leave_chain() { [ ! -e "$JOB/chain" ] || grep -vx "${SLURM_JOB_ID:-}" "$JOB/chain" | xargs -r scancel; }
count_restart() { # crash: ranks failed. outside: a node died, or a stop was asked for
    local now; now=$(newest)
    if [ "$1" = crash ]; then
        crashes=$((crashes + 1))
        [ $crashes -le $MAX_RESTARTS ] || give_up 1 "crashed $crashes times, max_restarts = $MAX_RESTARTS"
        [ "$now" = any ] || [ "$now" != "$crashed_at" ] || give_up 1 "crashed again without a new checkpoint since the last crash (${now:-none yet})"
        crashed_at=$now
    fi
    [ "$now" = "$restarted_at" ] && stalls=$((stalls + 1)) || stalls=0
    [ "$now" = any ] || [ $stalls -le $MAX_RESTARTS ] ||
        give_up 1 "restarted $stalls times without a new checkpoint (${now:-none yet}), max_restarts = $MAX_RESTARTS"
    restarted_at=$now
}
show_failure() { # the rank that failed first, first. One that was killed wrote no error file, but srun saw it
    local first told cause=
    first=$(grep -sH '^time:' "$RUN"/errors/$ERRORS | sort -t: -k3 | head -n 1 | cut -d: -f1)
    told=$(grep -sm1 'srun: error: .*: task' "$LOG/srun$T.log")
    [ -z "$first" ] || cause="$(basename "$first" .txt): $(tail -n 1 "$first")"
    case $told in
    '') ;;
    *'Exited with exit code'*) cause=${cause:-$told} ;;
    *) cause="$(printf 'rank_%04d' "$(echo "${T#.}$told" | grep -oE '^[0-9]+|tasks? [0-9]+' | head -n 1 | tr -dc 0-9)"): $told" ;;
    esac
    [ -z "$cause" ] || { echo "first to fail: $cause"; echo "$cause" >"$JOB/last_error$T"; }
    [ -z "$first" ] || { echo "---- $first"; tail -n 30 "$first"; echo "----"; }
    for first in "$RUN"/hangs/rank_*.txt; do [ ! -s "$first" ] || { echo "---- hang: $first"; head -n 30 "$first"; break; }; done
}
"""

NEWEST_CHECKPOINT = r"""
newest() { ls -1 "$RUN/checkpoints" 2>/dev/null | grep -xE 'step_[0-9]+' | sort -V | tail -n 1; }
"""

NO_CHECKPOINTS = r"""
newest() { echo any; }   # goes on where it was, unit by unit
"""

REQUEUE = r"""
again() { # before this script ends, or dependent jobs would see it fail
    local id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID} try state
    id=${id:-$SLURM_JOB_ID}
    for try in $(seq 60); do
        state=$(scontrol show job -o "$id" 2>/dev/null | grep -o ' JobState=[A-Z_]*')
        [ -n "$state" ] || { sleep 5; continue; }            # the controller is away
        [ "$state" = " JobState=RUNNING" ] || { say "no requeue:$state"; return; }   # cancelled, or requeued already
        say "requeueing"
        trap 'exit 75' TERM   # that is how SLURM takes this attempt away
        if scontrol requeue "$id"; then sleep 60; return; fi
        sleep 5
    done
    say "could not requeue"
}
"""

LEAVE_TO_CHAIN = r"""
again() { say "the next job of the chain goes on"; }
"""

NEVER_AGAIN = r"""
again() { say "not restarted (restart = none); submit again to go on"; }
"""

LOOP = r"""
again() {
    [ "$asked" != INT ] && [ "$asked" != TERM ] || return   # a person, or the end of the allocation
    say "starting again"; LANDIFF_RESTART=$((restart + 1)) exec bash "$0"
}
"""

STOP_TRAINER = r"""
# Never a signal to the ranks: it would end torchrun and the data loaders' helpers. They look at this file.
stop_ranks() { touch "$RUN/stop"; }
finished() { [ -e "$DONE" ]; }
"""

STOP_OTHER = r"""
stop_ranks() { [ -z "$ranks" ] || kill -TERM "$ranks" 2>/dev/null; }   # commits unit by unit; the next attempt goes on
finished() { [ $rc = 0 ] && touch "$DONE"; }
"""

BEGIN = r"""
say "job ${SLURM_JOB_ID:-here} restart $restart on ${SLURM_JOB_NODELIST:-$(hostname)}"
[ ! -e "$DONE" ] || { say "already done"; exit 0; }
rm -f "$JOB/given_up$T" "$JOB/config_error$T" "$LOG/srun$T.log" "$RUN/stop"
echo "$ID" >"$JOB/current"
[ "$phase" != running ] || count_restart outside   # the last attempt never ended: its node died
phase=running; remember_or_end
ranks=
on_signal() { [ -n "$asked" ] || say "signal $1: asking for a stop"; asked=$1; stop_ranks; }
for name in USR1 TERM INT; do trap "on_signal $name" $name; done
"""

HANGS = r"""
# Stacks of an earlier attempt stay where a person finds them; NCCL's flight recorder writes beside ours.
[ ! -d "$RUN/hangs" ] || rmdir "$RUN/hangs" 2>/dev/null || mv "$RUN/hangs" "$RUN/hangs.$(date +%Y%m%dT%H%M%S)"
mkdir -p "$RUN/hangs"
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
# The second is its name in older torch; newer torch takes it with a warning, when it writes.
export TORCH_FR_DUMP_TEMP_FILE=$RUN/hangs/nccl_rank_ TORCH_NCCL_DEBUG_INFO_TEMP_FILE=$RUN/hangs/nccl_rank_
rm -f "$RUN"/errors/rank_*.txt   # of ranks that may be no more; the last cause is kept in job/last_error
"""

RENDEZVOUS = r"""
# The first node's name resolves on all nodes; the port differs between jobs on a node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
"""

RANKS = r"""
rc=75
if [ -z "$asked" ]; then
%s &
ranks=$!
while :; do
    # Asked again and again: ranks that are just starting take an old request away.
    if [ -n "$asked" ]; then stop_ranks; sleep 1; else wait $ranks; rc=$?; fi
    kill -0 $ranks 2>/dev/null || break
done
[ -z "$asked" ] || { wait $ranks; rc=$?; }
fi
"""

ENDING = r"""
if [ -e "$JOB/refused.$ID$T" ]; then   # another process owns the run folder: leave it as it is
    say "refused: $(cat "$JOB/refused.$ID$T")"; rm -f "$JOB/refused.$ID$T"
    exit 2
fi
rm -f "$RUN/stop"
[ ! -s "$LOG/srun$T.log" ] || cat "$LOG/srun$T.log"
say "ended with $rc${asked:+ after signal $asked}"
if finished; then phase=ended; remember; rm -f "$JOB/last_error$T"; say "done"; exit 0; fi
[ $rc = 0 ] || [ -n "$asked" ] || show_failure
[ ! -e "$JOB/config_error$T" ] || give_up 2 "an error that the next attempt would meet again: $(cat "$JOB/config_error$T")"
phase=ended
if stopped; then remember; leave_chain; say "stopped by landiff stop; submit again to go on"; exit 75; fi
if [ -n "$asked" ] || [ $rc = 0 ]; then count_restart outside; else count_restart crash; fi
remember_or_end
again
exit $((rc ? rc : 75))
"""
