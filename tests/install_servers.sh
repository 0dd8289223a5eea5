#!/usr/bin/env bash
# Install what tests/training/test_servers.py reads exported students with, apart from everything
# else: vLLM's Python code and llama.cpp's converter. Some 400 MB are downloaded. Without it these
# tests are skipped.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
servers=$root/tests/.servers
if [ -d "$servers" ]; then exit 0; fi
rm -rf "$servers.partial"
mkdir "$servers.partial"
# vLLM's dependencies are gigabytes. Its configuration needs these alone.
"$python" -m pip install --quiet --no-deps --no-compile --target "$servers.partial/vllm" 'vllm==0.33.*'
"$python" -m pip install --quiet --no-compile --target "$servers.partial/vllm" \
    aiohttp cbor2 cloudpickle msgspec openai openai_harmony pillow psutil 'pydantic>=2' pyzmq
find "$servers.partial/vllm/vllm" -name '*.so' -delete
# The source of llama-cpp-python contains llama.cpp, and is not built.
"$python" -m pip install --quiet --target "$servers.partial/build" scikit-build-core
PYTHONPATH=$servers.partial/build "$python" -m pip download --quiet --no-deps --no-build-isolation \
    --no-binary :all: --dest "$servers.partial/source" 'llama-cpp-python==0.3.*'
tar --extract --gzip --file "$servers.partial"/source/*.tar.gz --directory "$servers.partial" \
    --strip-components=2 --wildcards '*/vendor/llama.cpp/*.py'
rm -rf "$servers.partial/build" "$servers.partial/source"
mv "$servers.partial" "$servers"
