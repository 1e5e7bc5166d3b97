#!/usr/bin/env bash
# Unpacks packages of this Debian or Ubuntu into a folder, with what they need and this machine lacks, without
# installing them: no service is started, no account or configuration is touched, no root is needed. Where that cannot
# be, it says why and exits with 77.
#   unpack.sh FOLDER PACKAGE...     leaves FOLDER/usr/bin, FOLDER/usr/lib, ...
set -euo pipefail
folder=$1
shift

skip() {
  echo "SKIPPED: $1"
  exit 77
}

[[ -e $folder/.complete ]] && exit 0
command -v apt-get >/dev/null || skip "no apt-get here; this test takes $* from Debian's or Ubuntu's packages"
rm -rf "$folder"
mkdir -p "$folder/packages"
cd "$folder/packages"

# What is installed already is found where it is.
list() { apt-get install -s --no-install-recommends "$@" 2>error | sed -n 's/^Inst \([^ ]*\).*/\1/p'; }
if ! needed=$(list "$@"); then
  [[ $EUID -eq 0 ]] && apt-get update -qq >/dev/null 2>&1
  needed=$(list "$@") || skip "apt-get does not find $* ($(tail -n 1 error)); apt-get update by root may help"
fi
if [[ -n $needed ]]; then
  # shellcheck disable=SC2086  # one word a package
  timeout 120 apt-get download -qq $needed 2>error || skip "cannot download $* ($(tail -n 1 error))"
  for package in ./*.deb; do dpkg-deb -x "$package" ..; done
fi
touch ../.complete
