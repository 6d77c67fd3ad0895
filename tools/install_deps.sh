#!/bin/sh
# Installs what is missing to build, test and fetch the model, on Debian and its relatives. Does
# nothing, at once, if all is there.
set -eu

missing=
need() { missing="$missing $1"; }
header() { [ -e "/usr/include/$1" ] || [ -e "/usr/local/include/$1" ]; }

command -v ${CXX:-g++} >/dev/null || need g++
command -v make >/dev/null || need make
header nlohmann/json.hpp || need nlohmann-json3-dev
header gtest/gtest.h || need libgtest-dev
# Not "pip --version", which takes half a second.
python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("pip") is None)' 2>/dev/null ||
  command -v pip3 >/dev/null || need python3-pip
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
  echo "install_deps.sh: please install, by the names they have on this system:$missing" >&2
  exit 1
fi
sudo=
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || {
    echo "install_deps.sh: please install as root: apt-get install$missing" >&2
    exit 1
  }
  sudo=sudo
fi
echo "installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # a list of words
$sudo apt-get -qq update && $sudo apt-get -qq install -y --no-install-recommends $missing >/dev/null || {
  echo "install_deps.sh: apt-get could not install$missing; its message stands above" >&2
  exit 1
}
