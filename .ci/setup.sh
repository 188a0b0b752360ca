#!/usr/bin/env bash
# Make .venv, in which `python` has SGLang and this checkout installed. Quick when all is in place.
#
#   base   has SGLang: the active environment if it has the right version (used as it is, nothing
#          is installed into it), else one of our own, made once per user under ~/.cache
#   .venv  belongs to this checkout and holds the project and its tools, no more; it sees the
#          base's packages through a .pth file, so checkouts share 11 GB and no entry points
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."

SGLANG=0.5.23 # what is installed where there is none
RANGE='>=0.5.23,<0.5.24' # what an environment may have
PYTHON_NEEDED='sys.version_info >= (3, 11)'
RECORD=.venv/base-python
STAMP=.venv/project-installed

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

has_sglang() { # PYTHON: is a SGLang that we work with installed there?
    [ -x "$1" ] && "$1" - "$RANGE" <<'PY' 2>/dev/null
import importlib.metadata, sys
from packaging.specifiers import SpecifierSet
found = importlib.metadata.version("sglang")
sys.exit(not SpecifierSet(sys.argv[1]).contains(found, prereleases=True))
PY
}

find_base() { # prints the interpreter to build on; installs SGLang if there is none
    local python
    for python in "${VIRTUAL_ENV:-/nonexistent}/bin/python" "$(command -v python3 || true)"; do
        # A .venv of ours may be the active one: it stands on a base and is none itself.
        if [ -e "${python%/bin/*}/base-python" ]; then
            python="$(cat "${python%/bin/*}/base-python")"
        fi
        if has_sglang "$python"; then
            "$python" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    shared_base
}

shared_base() {
    local python version cache
    python="$(command -v python3)" || die "python3 is not on PATH"
    "$python" -c "import sys; sys.exit(not ($PYTHON_NEEDED))" || die "python3 must be 3.11 or newer"
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    cache="${XDG_CACHE_HOME:-$HOME/.cache}/sglang-jenga"
    local venv="$cache/sglang-$SGLANG-py$version"
    if [ ! -e "$venv/complete" ]; then
        mkdir -p "$cache"
        (
            if command -v flock >/dev/null; then
                flock -n 9 || { say "another set-up is installing SGLang, waiting for it"; flock 9; }
            fi
            [ -e "$venv/complete" ] || install_sglang "$python" "$venv"
        ) 9>"$cache/lock" >&2
    fi
    echo "$venv/bin/python"
}

install_sglang() { # PYTHON VENV
    say "no active environment has SGLang $RANGE"
    say "installing it, once for all checkouts, to $2 (11 GB, several minutes)"
    say "pip's complaints about other packages' versions below are harmless"
    # Both may find the remains of an interrupted installation, and go on from there.
    "$1" -m venv "$2" || die "python3 -m venv failed; on Debian it needs the package python3-venv"
    "$2/bin/python" -m pip install --disable-pip-version-check "sglang==$SGLANG" ||
        die "pip could not install SGLang; run the same command again to go on"
    touch "$2/complete"
}

make_venv() { # BASE
    say "making .venv on top of $1"
    rm -rf .venv
    # The base's pip serves .venv as well; one made by uv has none.
    local options=()
    "$1" -c 'import pip' 2>/dev/null && options=(--without-pip)
    "$1" -m venv ${options[@]+"${options[@]}"} .venv
    "$1" - .venv <<'PY'
import glob, os, sys
(site_packages,) = glob.glob(os.path.join(sys.argv[1], "lib", "python*", "site-packages"))
folders = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
# addsitedir, where a plain line would do: it obeys the .pth files of the base too.
with open(os.path.join(site_packages, "base_environment.pth"), "w") as file:
    file.writelines(f"import site; site.addsitedir({folder!r})\n" for folder in folders)
PY
    printf '%s\n' "$1" > "$RECORD"
}

install_project() {
    local pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet)
    say "installing this checkout and the tools of tests and benchmarks into .venv"
    "${pip[@]}" "setuptools>=77"
    "${pip[@]}" --no-deps --no-build-isolation --editable .
    # Python finds this folder before site-packages when it runs from here, and entry points in it
    # would shadow the installed ones as soon as it is out of date.
    rm -rf ./*.egg-info
    local tools
    mapfile -t tools < <(.venv/bin/python - <<'PY'
import importlib.metadata
for line in importlib.metadata.requires("sglang-jenga"):
    requirement, _, marker = line.partition(";")
    if marker.strip() in ('extra == "test"', 'extra == "bench"'):
        print(requirement.strip())
PY
    )
    "${pip[@]}" "${tools[@]}"
    pwd > "$STAMP"
}

base="$(find_base)"
if [ "$(cat "$RECORD" 2>/dev/null)" != "$base" ] || ! has_sglang .venv/bin/python; then
    make_venv "$base"
fi
# A copied checkout brings a .venv that points to where it was copied from.
if [ ! "$STAMP" -nt pyproject.toml ] || [ "$(cat "$STAMP")" != "$PWD" ]; then
    install_project
fi
