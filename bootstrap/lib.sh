# What bootstrap/run, bootstrap/test and .ci/run share: Debian packages and the Python environment.
# Source it from bash, after `set -euo pipefail`.

# Instances run as users of their own and must be able to read and execute what is installed here.
umask 022
# Only what is installed in the environment is run.
unset PYTHONPATH PYTHONHOME

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
python=/usr/bin/python3 # of the system: users of instances cannot execute one below somebody's home

say() {
    printf '\n== %s\n' "$*" >&2
}

fail() {
    printf '%s\n' "$@" >&2
    exit 1
}

# The packages, or the units, that bootstrap/packages lists under a heading.
listed() {
    sed -n "s/^$1: *//p" "$checkout/bootstrap/packages"
}

# The words among the arguments that are not installed Debian packages.
missing_packages() {
    local package
    for package in "$@"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || echo "$package"
    done
}

as_root() {
    if ((EUID == 0)); then
        "$@"
    else
        sudo -n -- "$@"
    fi
}

# Install the Debian packages among the arguments that are missing, or say which command does it and exit 3.
need_packages() {
    local missing
    command -v dpkg-query >/dev/null || fail "ConPaaS is set up by Debian's packages; this system has no dpkg." \
        "Needed: $*"
    mapfile -t missing < <(missing_packages "$@")
    ((${#missing[@]})) || return 0
    if ((EUID != 0)) && ! sudo -n true 2>/dev/null; then
        say_how_to_install "${missing[@]}"
        exit 3
    fi
    say "installing ${missing[*]}"
    (install_packages "${missing[@]}") >&2 || fail "These packages could not be installed: ${missing[*]}"
}

say_how_to_install() {
    local run="apt-get update && apt-get install -y --no-install-recommends $*"
    echo "These Debian packages are missing and only root can install them. Please run:" >&2
    if command -v sudo >/dev/null; then
        printf '\n    sudo sh -c "%s"\n\n' "$run" >&2
    else
        printf '\n    su -c "%s"\n\n' "$run" >&2
    fi
}

# Runs in a subshell of its own: the trap is its own as well.
install_packages() {
    local unit new=() now=()
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300)
    for unit in $(listed units); do
        unit_exists "$unit" || new+=("$unit.service")
    done
    if [[ ! -e /usr/sbin/policy-rc.d ]]; then
        # Debian asks this program before it starts a server: 101 is no.
        trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' | as_root tee /usr/sbin/policy-rc.d >/dev/null
        as_root chmod 755 /usr/sbin/policy-rc.d
    fi
    as_root "${apt[@]}" update || echo "the package lists could not be refreshed: going on with those that are here"
    as_root "${apt[@]}" install --no-install-recommends "$@" </dev/null || return
    # Not started now, and not at the next boot; servers that were here before stay as they are.
    command -v systemctl >/dev/null || return 0
    [[ ! -d /run/systemd/system ]] || now=(--now)
    for unit in "${new[@]}"; do
        if unit_exists "${unit%.service}"; then
            as_root systemctl disable --quiet "${now[@]}" "$unit" || echo "could not disable $unit"
        fi
    done
}

unit_exists() {
    [[ -e /lib/systemd/system/$1.service || -e /etc/systemd/system/$1.service ]]
}

# Where the Python environment of this checkout is: two checkouts never share one.
venv_path() {
    if [[ -n ${CONPAAS_VENV:-} ]]; then
        realpath -m -- "$CONPAAS_VENV"
    elif ((EUID == 0)); then
        # The checkout may be below a home that no other user may enter.
        echo "/opt/conpaas/venv-$(printf %s "$checkout" | sha256sum | cut -c1-8)"
    else
        echo "$checkout/.venv"
    fi
}

# One hash of this checkout's path and of everything in it that goes into the package.
source_hash() {
    (
        cd "$checkout" || exit
        {
            pwd
            find conpaas examples/guestbook bootstrap/browser bootstrap/browser_libraries.py pyproject.toml \
                README.md -name __pycache__ -prune -o -path conpaas/web/static/vendor -prune -o -type f -print0 |
                LC_ALL=C sort -z | xargs -0 sha256sum
        } | sha256sum | cut -d' ' -f1
    )
}

# Install this checkout, with the extras among the arguments, into its Python environment; sets `venv`.
# Extras that were installed before stay.
make_venv() {
    local lock
    venv=$(venv_path)
    mkdir -p -- "$venv"
    exec {lock}<"$venv"
    flock "$lock"
    fill_venv "$@"
    exec {lock}<&-
}

fill_venv() {
    local stamp=$venv/conpaas-bootstrap path='' hash='' installed='' extras wanted packages
    if [[ -r $stamp ]]; then
        { read -r path && read -r hash && read -r installed; } <"$stamp" || true
    fi
    wanted=$(source_hash)
    extras=$(printf '%s\n' $installed "$@" | sed '/^$/d' | LC_ALL=C sort -u | paste -sd' ')
    if [[ "$path $hash $installed" == "$venv $wanted $extras" ]] && "$venv/bin/python" -c '' 2>/dev/null; then
        return
    fi

    create_venv "$path"
    say "installing ConPaaS into $venv"
    printf '%s\n\n%s\n' "$venv" "$installed" >"$stamp" # if this is interrupted, the next run does it again
    "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$checkout${extras:+[${extras// /,}]}" >&2 ||
        fail "ConPaaS could not be installed; the lines above say why."
    # The tests are not in the package. What a .pth file names comes last in sys.path: `import tests` finds the
    # checkout, `import conpaas` finds what was installed, which the users of instances can read.
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$checkout" >"$packages/conpaas-checkout.pth"
    printf '%s\n' "$venv" "$wanted" "$extras" >"$stamp"
}

# Create the environment unless it works; start anew if it was made at another path: its scripts name that one.
create_venv() {
    local made_at=$1 clear=()
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "ConPaaS needs Python 3.11 or newer as $python; here it is $("$python" -V 2>&1)."
    if [[ -n $made_at && $made_at != "$venv" ]]; then
        clear=(--clear)
    elif "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    elif [[ ! -e $venv/pyvenv.cfg && -n $(ls -A -- "$venv") ]]; then
        fail "$venv is no Python environment: remove it, or set CONPAAS_VENV to another path."
    fi
    say "creating the Python environment $venv"
    "$python" -m venv "${clear[@]}" -- "$venv" || fail "The environment could not be created; the lines above say why."
}
