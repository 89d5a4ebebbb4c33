#!/bin/sh
# Make a virtual environment with $1 (a python3) in $2. Where `venv` lacks ensurepip (Debian and
# Ubuntu ship it apart), install the package as root, or say how.
set -eu
python=$1
venv=$2

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "$python is $("$python" -V 2>&1): dsgd needs Python 3.10 or newer" >&2
    echo "fix: make PYTHON=/path/to/python3 ..." >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "python$version-venv" ||
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv
    else
        echo "$python has no ensurepip, which its virtual environments need" >&2
        echo "fix: sudo apt-get install python$version-venv   (or your system's equivalent)" >&2
        exit 1
    fi
fi
"$python" -m venv "$venv"
