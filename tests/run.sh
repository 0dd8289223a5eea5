#!/usr/bin/env bash
# Run the whole test suite, after making its Python environment if there is none. Arguments go to
# pytest.
set -euo pipefail
environment_extras=dev
source "$(dirname "$0")/../launch/environment.sh"
cd "$root"

# install_apart FOLDER WHAT PIP_ARGUMENTS: installs packages into a separate folder, unless it
# exists. If the installation fails, the tests that need the packages are skipped.
install_apart() {
    local folder=$1 what=$2
    shift 2
    if [ -d "$folder" ]; then return; fi
    echo "installing $what into $folder (once)" >&2
    rm -rf "$folder.partial"
    if "$python" -m pip install --quiet --no-deps --no-compile --target "$folder.partial" "$@"; then
        mv "$folder.partial" "$folder"
    else
        echo "$what could not be installed: the tests that need it will be skipped" >&2
    fi
}

# Some tests read exported students with transformers 4.57, in a separate process. It cannot share
# an environment with transformers 5, so it gets a folder with the versions of packages that it
# needs.
install_apart tests/.transformers-4.57 "transformers 4.57" \
    transformers==4.57.6 'huggingface_hub==0.36.*' 'tokenizers==0.22.*' \
    requests urllib3 charset-normalizer certifi
# lm-evaluation-harness needs three dozen packages that nothing else here needs.
install_apart tests/.lm-eval lm-evaluation-harness --requirement tests/lm_eval.txt

# Without compiled files pytest would rewrite the asserts of all tests in each of its processes.
unset PYTHONDONTWRITEBYTECODE
# Each rank has one thread, because distributed tests start several ranks on few cores.
export OMP_NUM_THREADS=1
# One process per core, and at most eight, run whole test files (-n 0: one process).
exec "$python" -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"
