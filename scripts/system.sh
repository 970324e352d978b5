# Sourced by the scripts of the published systems: reads their arguments and runs the published recipe, or the one
# that the variable preset names.
#
# usage: . "$(dirname "$0")/system.sh" NAME... -- "$@"
#        launch METHOD [flags of run_sample.py]
#
# GPUS=N before the calling script's command runs N processes, one a GPU (torchrun on this machine).
#
# Each NAME becomes a variable with the argument at its place, made absolute where it is a path ("version=" with an equals
# sign takes the argument as it is). What follows these arguments is added to the flags of launch. With too few arguments
# the calling script's header is printed.
names=()
while [ "$1" != -- ]; do
    names+=("$1")
    shift
done
shift
if [ $# -lt ${#names[@]} ]; then
    sed -n '2,/^set/p' "$0" | sed '$d'
    exit 2
fi
for name in "${names[@]}"; do
    case $name in  # before anything is installed; the others may be words or FILE,FILE, which run_sample.py checks
        root | saliency) [ -d "$1" ] || { echo "error: $1: there is no such folder." >&2; exit 2; } ;;
    esac
    case $name in
        *=) printf -v "${name%=}" %s "$1" ;;
        *) printf -v "$name" %s "$(realpath "$1")" ;;
    esac
    shift
done
more=("$@")
. "$(dirname "${BASH_SOURCE[0]}")/env.sh" requirements.txt

launch() {
    method=$1
    shift
    local python=(.venv/bin/python)
    [ "${GPUS:-1}" = 1 ] || python+=(-m torch.distributed.run --standalone --nproc-per-node "$GPUS")
    exec "${python[@]}" run_sample.py "$method" --preset "${preset:-published}" "$@" ${more[@]+"${more[@]}"}
}
