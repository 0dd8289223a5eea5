#!/usr/bin/env bash
# Run the whole job on a small teacher from this repository. Its RoPE is scaled by 8, and the
# student is restored on 2 ranks (tensor and sequence parallel) in both stages, once with the
# published relations and once with the Q/K relation in addition. The script needs no GPU, and
# downloads only Python packages.
#
#   bash launch/quickstart.sh [OUTPUT]        (default: runs/quickstart)
set -euo pipefail
case "${1:-}" in -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
source "$(dirname "$0")/environment.sh"
output=${1:-$root/runs/quickstart}
if [ -e "$output" ] && [ -n "$(ls -A "$output" 2>/dev/null)" ]; then
    echo "$output is not empty: remove it, or name another directory: bash $0 OUTPUT" >&2
    exit 1
fi
# Make the path absolute, because the commands below run in the checkout.
mkdir -p "$output" && output=$(cd "$output" && pwd)
cd "$root"

# Use two ranks, or one rank if there is exactly one GPU.
ranks=$("$python" -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
export OMP_NUM_THREADS=1

"$python" -m tools.quickstart.stdlib_text --output "$output/text"
# Every fourth file has several times the tokens that a run reads.
awk 'NR % 4 == 1' "$output/text/train.jsonl" > "$output/text/part.jsonl"
restore() {
    local name=$1
    shift
    echo
    echo "== restoring: $name"
    "$python" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m megalard train \
        --config launch/configs/quickstart.yaml --parallel.tp "$ranks" \
        --data.paths "$output/text/part.jsonl" --evaluation.paths "$output/text/heldout.jsonl" \
        --data.cache "$output/tokens" --run.output "$output/$name" "$@"
}
restore published
restore with-qk --objective.relations.qk 1.0 --run.report false
echo
"$python" tools/compare_runs.py "$output/published" "$output/with-qk" --output "$output"
echo
cat << 'END'
Both stages give back most of what scaling cost on short text, and make text of eight native windows
readable. The text is held out. One tiny model does not show how much comes back in a large model:
docs/restoration.md has those measurements.
END
