#!/usr/bin/env bash
# Runs the whole test suite, making its environment where there is none. Arguments go to pytest.
set -euo pipefail
environment_extras=dev
source "$(dirname "$0")/../launch/environment.sh"
cd "$root"

# install_apart FOLDER WHAT PIP_ARGUMENTS: once, into a folder beside the tests; without it the tests
# that need it are skipped
install_apart() {
    local folder=$1 what=$2
    shift 2
    if [ -d "$folder" ]; then return; fi
    echo "installing $what into $folder (once)" >&2
    rm -rf "$folder.partial"
    if "$python" -m pip install --quiet --no-deps --no-compile --target "$folder.partial" "$@"; then
        mv "$folder.partial" "$folder"
    else
        echo "that failed: the tests with $what will be skipped" >&2
    fi
}

# transformers 4.57 reads exported students too, in a process of its own: it cannot live in one
# environment with version 5, so it lies beside the tests with what it needs in other versions
install_apart tests/.transformers-4.57 "transformers 4.57" \
    transformers==4.57.6 'huggingface_hub==0.36.*' 'tokenizers==0.22.*' \
    requests urllib3 charset-normalizer certifi
# lm-evaluation-harness brings three dozen packages that nothing else here needs
install_apart tests/.lm-eval lm-evaluation-harness --requirement tests/lm_eval.txt

# one thread a rank: distributed tests start several ranks on few cores
export OMP_NUM_THREADS=1
# a process a core, each with whole files (-n 0 for one process); see tests/conftest.py for GPUs
exec "$python" -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile "$@"
