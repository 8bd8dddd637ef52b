#!/bin/sh
# Makes .venv and installs what is missing: sh scripts/venv.sh core|dev
# Called by the Makefile. PYTHON=/path/to/python chooses another Python, whose torch is used if it has a suitable one.
# PIP_ARGS='...' are options for pip. A suitable torch that is in .venv already stays (docs/install.md).
set -eu
extra=$1
stamp=.venv/.installed-$extra

stop() { echo "setup: $*" >&2; exit 1; }

if [ -f "$stamp" ] && [ -z "$(find pyproject.toml constraints.txt -newer "$stamp")" ] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || stop "Python 3.11 or newer is needed; found $(${PYTHON:-python3} --version 2>&1 || true). Install it, or give its path: make PYTHON=/path/to/python3.12 ..."
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$python has no venv module. On Debian and Ubuntu: apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    [ ! -e .venv ] || stop "this .venv has no working Python 3.11 or newer; remove it: rm -rf .venv"
    if [ -n "${PYTHON:-}" ] && torch=$("$python" scripts/constraints.py torch); then
        echo "setup: making .venv with $("$python" --version) and its torch $torch"
        "$python" -m venv --system-site-packages .venv
        # if $python is of an environment itself, --system-site-packages means the Python below it: this adds its own
        "$python" -c 'import site; print("import site; list(map(site.addsitedir, %r))" % site.getsitepackages())' \
            >"$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
    else
        echo "setup: making .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
fi

if torch=$(.venv/bin/python scripts/constraints.py torch); then
    grep -qx "torch==$torch" constraints.txt || echo "setup: keeping torch $torch; tested with $(grep '^torch==' constraints.txt)"
    echo "setup: installing what $extra needs"
else
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "${SETUP_GIB:-7}" ] || stop "$free GiB free here; torch and what it needs take about 6. Make room, clone elsewhere, or install the smaller CPU build: docs/install.md."
    echo "setup: installing torch and the rest (about 6 GB; takes some minutes, once; smaller for the CPU: docs/install.md)"
fi
case $extra in
    core) what=. ;;
    *) what=".[$extra]" ;;
esac
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip # uv's environments have no pip
.venv/bin/python scripts/constraints.py tested >.venv/constraints.txt
eval "set -- ${PIP_ARGS:-}" # with the quotes that are in it
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv/constraints.txt --editable "$what" "$@" ||
    stop "pip failed; its message is above. Run make again once the cause is removed."
.venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("lightning") is None)' ||
    stop "pip has installed nothing. Run make again without --dry-run in PIP_ARGS."
.venv/bin/python -c 'import torchvision' 2>/dev/null ||
    stop "torchvision $(.venv/bin/python -c 'from importlib.metadata import version as v; print(v("torchvision"), "cannot be imported with torch", v("torch"))'). Install both from one index: docs/install.md."
touch "$stamp"
