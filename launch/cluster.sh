# launch/train.sh sources this file. If the variables of a scheduler show that it started the script
# once per node, the file sets $nodes, $node_rank, $rendezvous, $gpus and $id, unless they are set
# already. It takes, in this order:
#
#   PET_*        torchrun's own variables, which Kubeflow sets in the pods of a TrainJob
#   SKYPILOT_*   SkyPilot, which runs the commands of a task on every node
#   SLURM_*      a step of a Slurm job, which srun starts on every node
#
# It calls `fail` with a sentence if the variables contradict each other.

cluster_port=29400

# from_variables NODES NODE_RANK HOST PORT GPUS ID: takes what the command line does not give
from_variables() {
    nodes=${nodes:-$1}
    if [ "$nodes" -gt 1 ]; then
        node_rank=${node_rank:-$2} rendezvous=${rendezvous:-$3:$4} id=${id:-$6}
    fi
    [[ ! $5 =~ ^[1-9][0-9]*$ ]] || gpus=${gpus:-$5}
}

# slurm_job_port: prints a port that depends on the job, below those that the system assigns
slurm_job_port() { echo $((20000 + ${1:-0} % 10000)); }

if [ -n "${PET_NNODES:-}" ]; then
    if [[ ! $PET_NNODES =~ ^[1-9][0-9]*$ ]]; then
        fail "PET_NNODES is '$PET_NNODES', but the number of nodes has to be fixed: give --nodes N," \
            "or set minNodes and maxNodes of the job to the same number"
    fi
    host=${PET_MASTER_ADDR:-${MASTER_ADDR:-}} port=${PET_MASTER_PORT:-${MASTER_PORT:-$cluster_port}}
    if [ -z "$host" ] && [ -n "${PET_RDZV_ENDPOINT:-}" ]; then
        host=${PET_RDZV_ENDPOINT%:*} port=${PET_RDZV_ENDPOINT##*:}
    fi
    if [ "${nodes:-$PET_NNODES}" -gt 1 ] && [ -z "$host$rendezvous" ]; then
        fail "PET_NNODES is $PET_NNODES but PET_MASTER_ADDR is not set: give --rendezvous HOST:PORT"
    fi
    from_variables "$PET_NNODES" "${PET_NODE_RANK:-}" "$host" "$port" "${PET_NPROC_PER_NODE:-}" \
        "${PET_RDZV_ID:-megalard}"
elif [ -n "${SKYPILOT_NUM_NODES:-}" ]; then
    from_variables "$SKYPILOT_NUM_NODES" "${SKYPILOT_NODE_RANK:-}" \
        "$(sed -n 1p <<<"${SKYPILOT_NODE_IPS:-}")" "$cluster_port" \
        "${SKYPILOT_NUM_GPUS_PER_NODE:-}" "${SKYPILOT_TASK_ID:-megalard}"
elif [ -n "${SLURM_JOB_ID:-}" ] && [ -z "$nodes" ] && [ "${SLURM_NNODES:-1}" -gt 1 ]; then
    # 4294967290 is the step of the shell of salloc.
    if [[ ! ${SLURM_STEP_ID:-} =~ ^[0-9]+$ || $SLURM_STEP_ID = 4294967290 ]]; then
        fail "this Slurm job has $SLURM_NNODES nodes but train.sh was started on one: start it with" \
            "srun --ntasks-per-node=1, submit launch/slurm.sbatch, or give --nodes 1"
    fi
    if [ "${SLURM_STEP_NUM_TASKS:-$SLURM_NNODES}" != "${SLURM_STEP_NUM_NODES:-$SLURM_NNODES}" ]; then
        fail "srun starts ${SLURM_STEP_NUM_TASKS} tasks on ${SLURM_STEP_NUM_NODES} nodes, but train.sh" \
            "starts the processes of a node itself: give srun --ntasks-per-node=1"
    fi
    hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}") ||
        fail "scontrol cannot name the nodes of this job: give --nodes, --node-rank and --rendezvous"
    from_variables "${SLURM_STEP_NUM_NODES:-$SLURM_NNODES}" "${SLURM_NODEID:-}" \
        "$(sed -n 1p <<<"$hosts")" \
        "$(slurm_job_port "$SLURM_JOB_ID")" "${SLURM_GPUS_ON_NODE:-}" \
        "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
fi
nodes=${nodes:-1} id=${id:-megalard}
# torchrun would read these variables as well, in place of the options that train.sh leaves out.
unset "${!PET_@}"
