# Sourced by scripts/demo, scripts/test and scripts/lint. `prepare EXTRAS` leaves $python naming an interpreter
# that has this checkout installed (editable), and its commands first on PATH.
#
# Which environment: the active one; else .venv of this checkout, made on first use. A new .venv sees the packages of the
# interpreter it is made from if that one has torch, because torch is a gigabyte that nobody wants twice.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
torch_for_new_environments="torch==2.13.0"

bold='' plain=''
if [ -t 1 ] && [ -t 2 ]; then
    bold=$'\033[1m' plain=$'\033[0m'
fi
say() { printf '%s==>%s %s\n' "$bold" "$plain" "$*" >&2; }
stop() { printf 'error: %s\n' "$*" >&2; exit 1; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_module() { "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$2"; }

find_python() {
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && is_recent "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    stop "Endor needs Python 3.11 or later, and none is on PATH."
}

choose_environment() {
    local active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}" base
    if [ -n "$active" ] && [ -x "$active/bin/python" ]; then
        python="$active/bin/python"
        is_recent "$python" || stop "the active environment $active has a Python older than 3.11."
        return
    fi
    python="$repository/.venv/bin/python"
    if [ ! -x "$python" ]; then
        base=$(find_python)
        say "Making .venv with $("$base" --version)"
        if has_module "$base" torch; then
            "$base" -m venv --system-site-packages "$repository/.venv"
        else
            "$base" -m venv "$repository/.venv"
        fi
    fi
}

# What an installation depends on. When none of it changed, there is nothing to install again.
fingerprint() {
    "$python" - "$repository" "$1" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
files = [root / "pyproject.toml", root / "setup.py", *sorted((root / "endor/kernels").rglob("native/*"))]
digest = hashlib.sha256(repr(sys.argv).encode())
for path in files:
    if path.is_file():
        digest.update(path.name.encode() + path.read_bytes())
print(digest.hexdigest())
PYTHON
}

install_checkout() {
    local extras="$1" stamp wanted
    stamp="$("$python" -c 'import sys; print(sys.prefix)')/.endor-installed${extras//[^a-z]/-}"
    wanted=$(fingerprint "$extras")
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    if ! has_module "$python" torch; then
        say "Installing $torch_for_new_environments (large; for the smaller build without CUDA, first set"
        say "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu)"
        "$python" -m pip install --quiet --disable-pip-version-check "$torch_for_new_environments"
    fi
    say "Installing Endor from this checkout: pip install -e .$extras"
    "$python" -m pip install --quiet --disable-pip-version-check -e "$repository$extras"
    printf '%s\n' "$wanted" >"$stamp"
}

# For the tests of the kvikio reader: the package and what it needs to be imported, 6 MB. Not through our extra, which
# brings cupy and the CUDA libraries, over a gigabyte. Where the package index does not have it, those tests are skipped.
install_kvikio_without_cuda() {
    local stamp
    stamp="$("$python" -c 'import sys; print(sys.prefix)')/.endor-kvikio-tried"
    if has_module "$python" kvikio || [ -f "$stamp" ] || [ "$(uname -s)" != Linux ]; then
        return
    fi
    say "Installing kvikio for the tests, without CUDA"
    "$python" -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 10 --no-deps \
        'kvikio-cu13==26.10.*' 'libkvikio-cu13==26.10.*' nvidia-cufile rapids-logger cuda-pathfinder packaging >&2 ||
        say "Note: kvikio could not be installed; its tests will be skipped."
    touch "$stamp"
}

note_about_compiler() {
    if ! has_module "$python" endor.kernels._native; then
        say "Note: the C++ kernels were not built, so decoding uses torch and is much slower. With a C++17"
        say "compiler installed, 'pip install -e $repository' shows why or builds them."
    fi
}

prepare() {
    cd "$repository"
    choose_environment
    install_checkout "${1:-}"
    PATH="$(dirname "$python"):$PATH"
    export PATH
    note_about_compiler
}
