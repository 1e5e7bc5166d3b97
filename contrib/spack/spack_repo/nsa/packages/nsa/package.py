"""Spack recipe, for a checkout:

  spack repo add contrib/spack/spack_repo/nsa && spack dev-build nsa@0.1.0          (in the checkout)
  spack dev-build nsa@0.1.0 +cuda cuda_arch=90
"""

from spack.package import *
from spack_repo.builtin.build_systems.cmake import CMakePackage, generator
from spack_repo.builtin.build_systems.cuda import CudaPackage


class Nsa(CMakePackage, CudaPackage):
    """Native Sparse Attention (arXiv 2502.11089) on many ranks: run, measure, decide."""

    homepage = "https://arxiv.org/abs/2502.11089"
    license("BSD-3-Clause")

    # No archive is published: dev-build takes the checkout.
    version("0.1.0")

    variant("blas", default=True, description="Matrix products of the host backend by OpenBLAS")

    depends_on("c", type="build")
    depends_on("cxx", type="build")
    depends_on("cmake@3.25:", type="build")
    depends_on("ninja", type="build")
    depends_on("git", type="build")
    depends_on("mpi")
    depends_on("hdf5@1.10: +hl")
    depends_on("tomlplusplus@3.3:")
    depends_on("nlohmann-json@3.9:")
    depends_on("cli11@2.1:")
    depends_on("fmt@9:")
    depends_on("openblas", when="+blas")
    depends_on("cuda@12:", when="+cuda")
    depends_on("nccl", when="+cuda")

    generator("ninja")
    conflicts("cuda_arch=none", when="+cuda", msg="say which GPUs: cuda_arch=80, 89 or 90")
    conflicts("%gcc@:11", msg="C++20")

    def cmake_args(self):
        args = [
            self.define("NSA_TESTS", False),
            self.define_from_variant("NSA_BLAS", "blas"),
            self.define_from_variant("NSA_CUDA", "cuda"),
        ]
        if self.spec.satisfies("+cuda"):
            args.append(self.define("NSA_CUDA_ARCHITECTURES", self.spec.variants["cuda_arch"].value))
            args.append(self.define("NCCL_ROOT", self.spec["nccl"].prefix))
        return args

    def test_info(self):
        """the installed program says what it is made of"""
        Executable(self.prefix.bin.nsa)("info")
