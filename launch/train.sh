#!/usr/bin/env bash
# Restores a RoPE-scaled model on one node or on several, with torchrun.
#
#   bash launch/train.sh --model DIR --data PATH[,PATH...] --output DIR [options]
#                        [-- --section.key value ...]
#
#   --model DIR             teacher's Hugging Face directory
#   --data PATH[,PATH...]   text files, directories of them, or one prepared token directory
#   --output DIR            where the run writes; the same command resumes the run that is in it
#   --config FILE           recipe, such as launch/configs/llama2-7b-x8.yaml
#   --tp N                  tensor-parallel size (default: the recipe's, or 1)
#   --cp N                  context-parallel size (default: the recipe's, or 1)
#   --gpus N                processes on this node, one a GPU (default: all GPUs; 1 where there is
#                           none, and then on the CPU)
#   --max-restarts N        start all ranks again, from the last checkpoint, up to N times after a
#                           failure (default: 0); needs checkpoint.save_every
#   --preflight             check everything, take two steps, report, and exit without writing
#
# Several nodes: the same command on each, with model, data and output on a disk that all share.
#
#   --nodes N               how many nodes (default: 1)
#   --rendezvous HOST:PORT  one of the nodes, and a port that is free there
#   --node-rank R           0 on HOST and anything else elsewhere; needed only where a node does not
#                           recognize HOST as a name of its own
#   --address NAME          this node as the others reach it (default: its host name)
#   --id NAME               name of this job at the rendezvous (default: megalard)
#
# What follows -- goes to the trainer; `python -m megalard.train --help` lists the keys.
# SIGTERM and SIGUSR1 save a checkpoint and end the run with status 0. PYTHON chooses the Python.
set -euo pipefail

fail() {
    echo "train.sh: error: $1" >&2
    exit 2
}

model='' data='' output='' config='' tp='' cp='' gpus='' nodes=1 rendezvous='' node_rank='' address=''
id=megalard restarts=0 preflight=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set -/{s/^# \{0,1\}//p}' "$0"; exit 0 ;;
        --preflight) preflight=--preflight; shift; continue ;;
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
[ -d "$model" ] || fail "--model $model is no directory"
[ -z "$config" ] || [ -f "$config" ] || fail "--config $config is no file"
if [ "$nodes" -gt 1 ]; then
    [ -n "$rendezvous" ] || fail "--nodes $nodes needs --rendezvous HOST:PORT"
    [[ $rendezvous =~ ^.+:[0-9]+$ ]] || fail "--rendezvous must be HOST:PORT, not '$rendezvous'"
else
    [ -z "$rendezvous$node_rank$address" ] ||
        fail "--rendezvous, --node-rank and --address need --nodes N"
fi

# as a YAML list, in which a quote is doubled
IFS=, read -r -a paths <<<"$data"
list=''
for path in "${paths[@]}"; do
    [ -e "$path" ] || fail "--data $path does not exist"
    list+="${list:+, }'${path//\'/\'\'}'"
done

# listens PROCESS SIGNAL: whether a handler of its own would get the signal
listens() {
    local caught
    caught=$(sed -n 's/^SigCgt:\s*//p' "/proc/$1/status" 2>/dev/null) || return 1
    [ -n "$caught" ] && [ $((16#$caught >> ($(kill -l "$2") - 1) & 1)) = 1 ]
}

# A rank that is still starting would die of a signal, and torchrun call that a failure: each gets it
# once it listens. With no ranks there is nothing to save, and torchrun may end.
pass_on() {
    signalled=yes
    local agent=${!:-} state children child deaf told=' '
    if [ -z "$agent" ]; then
        echo "SIG$1: stopped; nothing to save"
        exit 0
    fi
    while read -r _ _ state _ <"/proc/$agent/stat" && [ "$state" != Z ]; do
        children=$(cat /proc/"$agent"/task/*/children 2>/dev/null || true)
        if [ -z "$children" ]; then
            kill -s TERM "$agent" 2>/dev/null || true
            stopped=$1
            return 0
        fi
        deaf=''
        for child in $children; do
            if [[ $told = *" $child "* ]]; then continue; fi
            if listens "$child" "$1"; then
                kill -s "$1" "$child" 2>/dev/null || true
                told+="$child "
            else
                deaf=yes
            fi
        done
        [ -n "$deaf" ] || return 0
        sleep 0.1
    done 2>/dev/null
}
stopped=''
trap 'pass_on TERM' TERM
trap 'pass_on USR1' USR1

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ -z "$gpus" ]; then
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count() or 1)')
fi
ranks=$((nodes * gpus)) share=$((${tp:-1} * ${cp:-1}))
if [ $((ranks % share)) != 0 ]; then
    fail "--tp ${tp:-1} x --cp ${cp:-1} is $share, which does not divide the $ranks processes"
fi
if [ "$nodes" -gt 1 ] && [ $((gpus % ${tp:-1})) != 0 ]; then
    echo "train.sh: warning: --tp $tp does not divide the $gpus processes of a node, so that" \
        "tensor parallelism goes over the network" >&2
fi

torchrun=("$python" -m torch.distributed.run --nproc-per-node "$gpus" --max-restarts "$restarts")
if [ "$nodes" = 1 ]; then
    torchrun+=(--standalone)
else
    # nodes do not start at one moment: wait for the rendezvous host for five minutes
    settings=read_timeout=300
    if [ -n "$node_rank" ]; then
        settings+=,is_host=$([ "$node_rank" = 0 ] && echo true || echo false)
    fi
    torchrun+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$rendezvous" --rdzv-id "$id")
    torchrun+=(--rdzv-conf "$settings" ${address:+--local-addr "$address"})
fi
# The store that torchrun shares with its ranks outlives them, and with it what they told each other:
# ranks that start again find the addresses of those before them, and a node that joins later waits
# in vain for that of a rank 0 that stayed (torch 2.13). Not shared, it is made for every start.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
trainer=(-m megalard.train ${preflight:+"$preflight"} ${config:+--config "$config"})
trainer+=(--model.teacher "$model" --data.paths "[$list]" --run.output "$output")
trainer+=(${tp:+--parallel.tp "$tp"} ${cp:+--parallel.cp "$cp"} "$@")

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=$(getconf _NPROCESSORS_ONLN)
    export OMP_NUM_THREADS=$((cores > gpus ? cores / gpus : 1))
fi

# torchrun gives its ranks 30 seconds after a SIGTERM and then kills them, which may be too little
# to finish a step and save. So signals go to the ranks, and torchrun only sees them end.
set -m
(
    trap '' USR1
    exec "${torchrun[@]}" "${trainer[@]}"
) &
agent=$!

trap 'signalled=yes; kill -s INT "$agent" 2>/dev/null || true' INT

# a signal ends the wait, but not what is waited for
while true; do
    signalled='' status=0
    wait "$agent" 2>/dev/null || status=$?
    [ -n "$signalled" ] || break
done
if [ -n "$stopped" ]; then
    echo "SIG$stopped: stopped while no ranks were running; nothing to save"
    exit 0
fi
if [ "$status" != 0 ]; then
    echo "train.sh: error: the run failed with status $status; where the trainer knows why, a" \
        "line above torchrun's report begins with 'megalard: error'" >&2
fi
exit "$status"
