# Sourced by the step scripts: runs one step of run_sample.py.
# usage: . scripts/step.sh STEP METHOD [flags]
step=$1
shift
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
    echo "usage: $0 METHOD [flags of run_sample.py]" >&2
    exit 2
fi
. "$(dirname "${BASH_SOURCE[0]}")/env.sh" requirements.txt
exec .venv/bin/python run_sample.py "$@" --steps "$step"
