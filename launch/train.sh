#!/usr/bin/env bash
# Restore a RoPE-scaled model on one node or on several, with torchrun.
#
#   bash launch/train.sh --model DIR --data PATH[,PATH...] --output DIR [options]
#                        [-- --section.key value ...]
#
#   --model DIR             teacher's Hugging Face directory
#   --data PATH[,PATH...]   text files, directories of them, or one prepared token directory
#   --output DIR            directory to write to; the same command resumes the run in it
#   --config FILE           configuration file, or the name of a recipe, such as
#                           linearard-llama2-7b-x8 (default: none)
#   --tp N                  tensor-parallel size (default: the recipe's, or 1)
#   --cp N                  context-parallel size (default: the recipe's, or 1)
#   --gpus N                processes on this node, one per GPU (default: all GPUs). Without a GPU
#                           the processes run on the CPU, in any number (default: 1)
#   --max-restarts N        after a failure, start all ranks again from the last checkpoint, at most
#                           N times (default: 0)
#   --verbose               also print torchrun's own messages
#   --preflight             check everything, take two steps, report, and exit without writing
#
# Several nodes: run the same command on each, with model, data and output on a shared disk. In a
# TrainJob of Kubeflow, a task of SkyPilot and a step of srun these options and --gpus come from the
# variables of the scheduler (launch/cluster.sh).
#
#   --nodes N               how many nodes (default: the scheduler's, or 1)
#   --rendezvous HOST:PORT  one of the nodes, and a port that is free there
#   --node-rank R           0 on HOST, and another number on each other node; needed only if HOST
#                           does not recognize this name as its own
#   --address NAME          the name or address of this node for the others (default: its host name)
#   --id NAME               the name of this job at the rendezvous (default: megalard)
#
# Everything after -- goes to the trainer; `python -m megalard train --help` lists the keys.
# SIGTERM, SIGUSR1 and Ctrl-C save a checkpoint and end the run with status 0. A second Ctrl-C ends
# the run without saving. The environment variable PYTHON chooses the Python interpreter.
set -euo pipefail

fail() {
    echo "train.sh: error: $*" >&2
    exit 2
}

model='' data='' output='' config='' tp='' cp='' gpus='' nodes='' rendezvous='' node_rank='' address=''
id='' restarts=0 preflight='' verbose=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set -/{s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        --preflight) preflight=--preflight; shift; continue ;;
        --verbose) verbose=--verbose; shift; continue ;;
        --) shift; break ;;
        --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    esac
    case $1 in
        --model | --data | --output | --config | --tp | --cp | --gpus | --nodes | --rendezvous | \
            --node-rank | --address | --id | --max-restarts)
            if [ $# -lt 2 ] || [ -z "$2" ] || [[ $2 = --* ]]; then fail "$1 needs a value"; fi ;;
        --*.*) fail "unknown option $1: the trainer's own settings come after --" ;;
        *) fail "unknown option $1: see --help" ;;
    esac
    case $1 in
        --tp | --cp | --gpus | --nodes)
            [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "$1 must be 1 or more, not '$2'" ;;
        --node-rank | --max-restarts)
            [[ $2 =~ ^[0-9]+$ ]] || fail "$1 must be 0 or more, not '$2'" ;;
    esac
    case $1 in
        --model) model=$2 ;;
        --data) data=$2 ;;
        --output) output=$2 ;;
        --config) config=$2 ;;
        --tp) tp=$2 ;;
        --cp) cp=$2 ;;
        --gpus) gpus=$2 ;;
        --nodes) nodes=$2 ;;
        --rendezvous) rendezvous=$2 ;;
        --node-rank) node_rank=$2 ;;
        --address) address=$2 ;;
        --id) id=$2 ;;
        --max-restarts) restarts=$2 ;;
    esac
    shift 2
done

[ -n "$model" ] || fail "--model is not given: the teacher's Hugging Face directory"
[ -n "$data" ] || fail "--data is not given: text files or directories, separated by commas"
[ -n "$output" ] || fail "--output is not given: the directory the run writes to"
if [ ! -d "$model" ]; then
    hint=''
    case $model in
        *.gguf) hint=": make one of it with python -m tools.convert_gguf $model DIR" ;;
        /* | ./* | ../* | */*/*) ;;
        */*) hint="; if that is a name on the Hugging Face Hub: hf download $model --local-dir DIR" ;;
    esac
    fail "--model $model is not a directory$hint"
fi
if [ -n "$config" ] && [ ! -f "$config" ] && [[ $config = */* || $config = *.yaml ]]; then
    fail "--config $config is not a file"
fi
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
if [ "$nodes" -gt 1 ]; then
    [ -n "$rendezvous" ] || fail "--nodes $nodes needs --rendezvous HOST:PORT"
    [[ $rendezvous =~ ^.+:[0-9]+$ ]] || fail "--rendezvous must be HOST:PORT, not '$rendezvous'"
else
    [ -z "$rendezvous$node_rank$address" ] ||
        fail "--rendezvous, --node-rank and --address need --nodes N"
fi

# The paths become a YAML list, in which a quote is doubled.
IFS=, read -r -a paths <<<"$data"
list=''
for path in "${paths[@]}"; do
    [ -e "$path" ] || fail "--data $path does not exist"
    list+="${list:+, }'${path//\'/\'\'}'"
done

# The traps note signals, and pass_on below sends them to the ranks as soon as there are ranks. A
# preflight that is stopped exits with 143, because it has not passed.
requested='' interrupted='' unsaved=0
[ -z "$preflight" ] || unsaved=143
note() {
    if [ -z "${!:-}" ]; then
        echo "SIG$1: stopped; nothing to save"
        exit "$unsaved"
    fi
    requested=${requested:-$1} signalled=yes
}
interrupt() {
    [ -n "${!:-}" ] || exit 130
    if [ -n "$requested" ]; then
        interrupted=yes
    else
        echo "train.sh: saving a checkpoint and stopping; Ctrl-C again ends the run without saving" >&2
    fi
    note TERM
}
trap 'note TERM' TERM HUP
trap 'note USR1' USR1
trap interrupt INT

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ -z "$gpus" ]; then
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')
fi
ranks=$((nodes * gpus)) share=$((${tp:-1} * ${cp:-1}))
if [ $((ranks % share)) != 0 ]; then
    fail "--tp ${tp:-1} x --cp ${cp:-1} is $share, which does not divide $ranks, the number of" \
        "processes: give --gpus N, the processes on this node (on the CPU any number works), or" \
        "other sizes"
fi
if [ "$nodes" -gt 1 ] && [ $((gpus % ${tp:-1})) != 0 ]; then
    echo "train.sh: warning: --tp $tp does not divide the $gpus processes of a node, so" \
        "tensor parallelism crosses the network" >&2
fi

# megalard.launcher is torchrun, except that it opens no port on one node, and prints the reason of
# a failure last.
torchrun=("$python" -m megalard.launcher ${verbose:+"$verbose"})
torchrun+=(--nproc-per-node "$gpus" --max-restarts "$restarts")
if [ "$nodes" -gt 1 ] && [ -n "$node_rank" ] && [ "$restarts" = 0 ]; then
    # Fixed ranks need no dynamic rendezvous, whose state torchrun would unpickle from the network.
    torchrun+=(--nnodes "$nodes" --node-rank "$node_rank" --rdzv-backend static --rdzv-id "$id")
    torchrun+=(--master-addr "${rendezvous%:*}" --master-port "${rendezvous##*:}")
elif [ "$nodes" -gt 1 ]; then
    # Nodes do not start at the same moment: wait up to five minutes for the rendezvous host.
    settings=read_timeout=300
    if [ -n "$node_rank" ]; then
        settings+=,is_host=$([ "$node_rank" = 0 ] && echo true || echo false)
    fi
    torchrun+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$rendezvous" --rdzv-id "$id")
    torchrun+=(--rdzv-conf "$settings" ${address:+--local-addr "$address"})
fi
# The store that torchrun shares with its ranks outlives the ranks and keeps their addresses.
# Restarted ranks would read the addresses of the previous ranks, and a node that joins later would
# wait forever for the address of a rank 0 that did not restart (torch 2.13). With this variable the
# store is not shared, so every start has a new store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
trainer=(-m megalard.train ${preflight:+"$preflight"} ${config:+--config "$config"})
trainer+=(--model.teacher "$model" --data.paths "[$list]" --run.output "$output")
trainer+=(${tp:+--parallel.tp "$tp"} ${cp:+--parallel.cp "$cp"} "$@")

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > gpus ? cores / gpus : 1))
fi

# torchrun kills its ranks 30 seconds after a SIGTERM, which may be too short to finish a step and
# save. This script therefore sends signals to the ranks, and torchrun only sees the ranks end.
set -m
(
    trap '' USR1 HUP
    exec "${torchrun[@]}" "${trainer[@]}"
) &
agent=$!

# runs PROCESS: succeeds if the process exists and is not a zombie
runs() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) && [[ ${stat##*) } != Z* ]]
}

# children_of PROCESS: prints its children, with or without /proc
children_of() {
    if [ -e "/proc/$$/task/$$/children" ]; then
        cat /proc/"$1"/task/*/children 2>/dev/null || true
    else
        ps -o pid= --ppid "$1" || true
    fi
}

# ranks_of PROCESS: prints the ranks among the descendants of the process. A rank need not be a
# child of torchrun, because PYTHON may be a script.
ranks_of() {
    local child
    for child in $(children_of "$1"); do
        if grep -qz '^RANK=' "/proc/$child/environ" 2>/dev/null; then
            echo "$child"
        else
            ranks_of "$child"
        fi
    done
}

# listens PROCESS SIGNAL: succeeds if the process has a handler for the signal
listens() {
    local caught
    caught=$(sed -n 's/^SigCgt:\s*//p' "/proc/$1/status" 2>/dev/null) || return 1
    [ -n "$caught" ] && [ $((16#$caught >> ($(kill -l "$2") - 1) & 1)) = 1 ]
}

# pass_on: sends the requested signal to each rank that has a handler and has not received it. A
# rank that is still starting would die of the signal, which torchrun would take for a failure.
# Ranks that torchrun restarts after a failure get the signal in the same way. torchrun itself gets
# SIGTERM if there have been no ranks for 3 seconds (after its ranks end, it ends by itself within
# some tenths of a second), or if a rank installs no handler within a minute.
signalled_ranks=' ' ticks_without_ranks=0 ticks_without_handler=0 stopped=''
pass_on() {
    local ranks rank has_deaf_rank=''
    ranks=$(ranks_of "$agent")
    if [ -n "$interrupted" ]; then
        # shellcheck disable=SC2086
        kill -s KILL $ranks "$agent" 2>/dev/null || true
        return 0
    fi
    for rank in $ranks; do
        if [[ $signalled_ranks = *" $rank "* ]]; then continue; fi
        if listens "$rank" "$requested"; then
            kill -s "$requested" "$rank" 2>/dev/null || true
            signalled_ranks+="$rank "
        else
            has_deaf_rank=yes
        fi
    done
    ticks_without_ranks=$((ticks_without_ranks + 1))
    ticks_without_handler=$((ticks_without_handler + 1))
    [ -z "$ranks" ] || ticks_without_ranks=0
    [ -n "$has_deaf_rank" ] || ticks_without_handler=0
    if [ "$ticks_without_ranks" = 15 ]; then
        stopped=yes
        kill -s TERM "$agent" 2>/dev/null || true
    elif [ "$ticks_without_handler" = 300 ]; then
        echo "train.sh: error: a rank did not handle SIG$requested for a minute: torchrun ends it" >&2
        kill -s TERM "$agent" 2>/dev/null || true
    fi
}

while true; do
    signalled='' status=0
    if [ -z "$requested" ]; then
        wait "$agent" 2>/dev/null || status=$?
        # A signal interrupts the wait; the loop then continues.
        [ -n "$signalled" ] || break
    elif runs "$agent"; then
        pass_on
        sleep 0.2 || true
    else
        wait "$agent" 2>/dev/null || status=$?
        break
    fi
done
if [ -n "$interrupted" ]; then
    exit 130
fi
if [ -n "$stopped" ]; then
    echo "SIG$requested: stopped while no ranks were running"
    exit "$unsaved"
fi
# The launcher has printed the reason of a failure as its last line, so print nothing more.
exit "$status"
