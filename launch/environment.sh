# The scripts in this directory and tests/run.sh source this file. It sets $python to a Python that
# has all of megalard's requirements. If $PYTHON, or else python3, has them already, that Python is
# used. Otherwise the file makes .venv in the checkout and installs the requirements into it.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "megalard needs Python 3.10 or later, which '$python' is not: set PYTHON to a later Python" >&2
    exit 1
fi

# torch_version: prints the version of torch to install. Hopper GPUs get torch 2.11, because no other
# version was tested on them. All other machines get the newest tested version.
torch_version() {
    local capabilities
    capabilities=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null || true)
    if [[ $capabilities = 9.* ]]; then echo '2.11.*'; else echo 2.13.0; fi
}

if ! "$python" "$root/tools/check_environment.py" "${environment_extras:-}" 2>/dev/null; then
    venv="$root/.venv"
    if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "$venv"; then
        echo "cannot make $venv: install the venv package of your Python" >&2
        exit 1
    fi
    python="$venv/bin/python"
    if ! "$python" "$root/tools/check_environment.py" "${environment_extras:-}" 2>/dev/null; then
        echo "installing megalard's requirements into $venv (once)" >&2
        # Install torch first and exactly, so that no later installation chooses another build of
        # it.
        "$python" -m pip install --quiet "torch==$(torch_version)"
        "$python" -m pip install --quiet --editable "$root${environment_extras:+[$environment_extras]}"
    fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
