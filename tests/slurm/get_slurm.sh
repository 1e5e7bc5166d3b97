#!/usr/bin/env bash
# Unpacks this system's Slurm and MUNGE packages into a folder, without installing them: no service is started, no
# account or configuration of the machine is touched, and no root is needed. Where that cannot be, it says why and
# exits with 77.
#   get_slurm.sh FOLDER     leaves FOLDER/usr/bin, FOLDER/usr/sbin, FOLDER/usr/lib
set -euo pipefail
folder=$1
packages=(slurmctld slurmd slurm-client munge)

skip() {
  echo "SKIPPED: $1"
  exit 77
}

[[ -e $folder/.complete ]] && exit 0
command -v apt-get >/dev/null || skip "no apt-get here; this test takes Slurm from Debian's or Ubuntu's packages"
rm -rf "$folder"
mkdir -p "$folder/packages"
cd "$folder/packages"

# With what they need and this machine lacks; packages that are installed already are found where they are.
list() { apt-get install -s --no-install-recommends "${packages[@]}" 2>error | sed -n 's/^Inst \([^ ]*\).*/\1/p'; }
if ! needed=$(list); then
  [[ $EUID -eq 0 ]] && apt-get update -qq >/dev/null 2>&1
  needed=$(list) || skip "apt-get finds no Slurm ($(tail -n 1 error)); apt-get update by root may help"
fi
if [[ -n $needed ]]; then
  # shellcheck disable=SC2086  # one word a package
  timeout 120 apt-get download -qq $needed 2>error || skip "cannot download Slurm ($(tail -n 1 error))"
  for package in ./*.deb; do dpkg-deb -x "$package" ..; done
  # Debian installs slurmd as slurmd-wlm behind an alternative; the daemons behave by the name they are started under.
  for program in ../usr/sbin/*-wlm; do
    [[ -e $program ]] && ln -s "$(basename "$program")" "${program%-wlm}"
  done
fi
touch ../.complete
