# Sourced by the scripts beside it and by tests/run.sh: leaves a Python that has all of megalard's
# requirements in $python. A Python that has them already is used as it is (set PYTHON to choose
# one); otherwise .venv is made in the checkout and filled.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "megalard needs Python 3.10 or later; '$python' is not: set PYTHON to one" >&2
    exit 1
fi

if ! "$python" "$root/tools/check_environment.py" "${environment_extras:-}" 2>/dev/null; then
    venv="$root/.venv"
    if [ ! -x "$venv/bin/python" ] && ! "$python" -m venv "$venv"; then
        echo "cannot make $venv: install the venv package of your Python" >&2
        exit 1
    fi
    python="$venv/bin/python"
    if ! "$python" "$root/tools/check_environment.py" "${environment_extras:-}" 2>/dev/null; then
        echo "installing megalard's requirements into $venv (once)" >&2
        # torch first and exactly, so that nothing below chooses another build of it
        "$python" -m pip install --quiet torch==2.13.0
        "$python" -m pip install --quiet --editable "$root${environment_extras:+[$environment_extras]}"
    fi
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
