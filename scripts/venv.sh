#!/bin/sh
# Makes .venv and installs what is missing: sh scripts/venv.sh core|dev
# Called by the Makefile; PYTHON=/path/to/python chooses another Python.
set -eu
extra=$1
stamp=.venv/.installed-$extra

stop() { echo "setup: $*" >&2; exit 1; }

if [ -f "$stamp" ] && [ -z "$(find pyproject.toml constraints.txt -newer "$stamp")" ] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || stop "Python 3.11 or newer is needed; found $(${PYTHON:-python3} --version 2>&1 || true). Install it, or give its path: make PYTHON=/path/to/python3.12 ..."
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$python has no venv module. On Debian and Ubuntu: apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    [ ! -e .venv ] || stop "this .venv has no working Python 3.11 or newer; remove it: rm -rf .venv"
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv .venv
fi

if ! .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'; then
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "${SETUP_GIB:-7}" ] || stop "$free GiB free here; torch and what it needs take about 6. Make room, or clone elsewhere."
    echo "setup: installing torch and the rest (about 6 GB; takes some minutes, once)"
else
    echo "setup: installing what $extra needs"
fi
case $extra in
    core) what=. ;;
    *) what=".[$extra]" ;;
esac
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable "$what" ||
    stop "pip failed; its message is above. Run make again once the cause is removed."
touch "$stamp"
