# Sourced by the other scripts: makes .venv once and installs what is asked for; a second call installs nothing.
# usage: . scripts/env.sh REQUIREMENTS_FILE...
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
find_python() {
    for name in python3.12 python3.11 python3.10 python3.13 python3 python; do
        if "$name" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: Python 3.10 or newer with venv is needed and was not found on the PATH (Debian: python3-venv)." >&2
    exit 1
}
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    python=$(find_python) || exit 1
    echo "== making .venv with $($python --version)"
    "$python" -m venv .venv || exit 1
fi
for file in "$@"; do
    stamp=".venv/installed-$file"
    if ! cmp -s "$file" "$stamp"; then
        echo "== installing $file into .venv (the first time this downloads several GB)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$file" || exit 1
        cp "$file" "$stamp"
    fi
done
# A package that may fail to install, once: NAME, the module to import, what its absence means.
try_package() {
    local tried=".venv/tried-$1"
    if [ ! -e "$tried" ] && ! .venv/bin/python -c "import $2" 2>/dev/null; then
        echo "== installing $1 into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$1" >"$tried.log" 2>&1 || true
        touch "$tried"
    fi
    if ! .venv/bin/python -c "import $2" 2>/dev/null; then
        echo "note: $1 could not be built (it needs a C++ compiler; see .venv/tried-$1.log): $3." >&2
        echo "      Remove .venv/tried-$1 to try again." >&2
    fi
}
