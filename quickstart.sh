#!/usr/bin/env bash
# Builds nsa (installing what it needs) and runs inputs/quickstart.toml on 4 MPI ranks, 2 head shards x 2 KV shards.
# Leaves quickstart.h5 in this folder. Takes a few minutes the first time and seconds after that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
scripts/build.sh host -DNSA_TESTS=OFF

# Open MPI refuses root and more ranks than cores unless told otherwise (4.x in one way, 5.x in another).
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
export OMPI_MCA_btl_tcp_if_include=lo # all ranks are here; 5.x complains of networks that it cannot reach
rm -f quickstart.h5
mpirun -n 4 build/host/nsa run inputs/quickstart.toml --output quickstart.h5
