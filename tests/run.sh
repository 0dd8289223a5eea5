#!/usr/bin/env bash
# Runs the whole test suite, making its environment where there is none. Arguments go to pytest.
set -euo pipefail
environment_extras=dev
source "$(dirname "$0")/../launch/environment.sh"
cd "$root"

# transformers 4.57 reads exported students too, in a process of its own: it cannot live in one
# environment with version 5, so it lies beside the tests with what it needs in other versions
old=tests/.transformers-4.57
if [ ! -d "$old" ]; then
    echo "installing transformers 4.57 into $old (once)" >&2
    rm -rf "$old.partial"
    if "$python" -m pip install --quiet --no-deps --no-compile --target "$old.partial" \
        transformers==4.57.6 'huggingface_hub==0.36.*' 'tokenizers==0.22.*' \
        requests urllib3 charset-normalizer certifi; then
        mv "$old.partial" "$old"
    else
        echo "that failed: the tests with transformers 4.57 will be skipped" >&2
    fi
fi

# one thread a rank: distributed tests start several ranks on few cores
export OMP_NUM_THREADS=1
exec "$python" -m pytest "$@"
