"""A stand-in for Spack where there is none: names of its Package API v2, with which the recipe is loaded and asked.

It has only what Spack documents (https://spack.readthedocs.io/en/latest/package_api.html) and, of the package
repository's build systems, what spack_repo/builtin/build_systems/{cmake,cuda}.py define. A recipe that uses another
name fails to load, as it would in Spack.
"""

import re
import sys
import types

DIRECTIVES = ("build_system can_splice conditional conflicts depends_on extends license maintainers patch provides "
              "redistribute requires resource variant version").split()  # fmt: skip


class Recipe:
    """What the recipe declares: directive -> [(arguments, keywords)]."""

    def __init__(self):
        self.said = {name: [] for name in DIRECTIVES}

    def directive(self, name):
        return lambda *arguments, **keywords: self.said[name].append((arguments, keywords))


class Spec:
    """A concrete spec: variants that are on, and the prefixes of dependencies."""

    def __init__(self, on, **variants):
        self.on = on
        self.variants = {name: types.SimpleNamespace(value=value) for name, value in variants.items()}

    def satisfies(self, what):
        words = re.findall(r"[+~][\w-]+", what)
        assert words and "".join(words) == what, f"the stand-in knows variants only, not {what}"
        return all((word[1:] in self.on) == (word[0] == "+") for word in words)

    def __getitem__(self, name):
        return types.SimpleNamespace(prefix=f"/opt/{name}")


class CMakePackage:
    @staticmethod
    def define(name, value):
        if isinstance(value, bool):
            return f"-D{name}:BOOL={'ON' if value else 'OFF'}"
        return f"-D{name}:STRING={value if isinstance(value, str) else ';'.join(value)}"

    def define_from_variant(self, name, variant=None):
        return self.define(name, (variant or name.lower()) in self.spec.on)


class CudaPackage:
    pass


def load(path):
    """Executes the recipe; returns its module's names and the Recipe."""
    recipe = Recipe()
    package = types.ModuleType("spack.package")
    for name in DIRECTIVES:
        setattr(package, name, recipe.directive(name))
    package.Executable = package.which = lambda *a, **k: None
    cmake = types.ModuleType("spack_repo.builtin.build_systems.cmake")
    cmake.CMakePackage, cmake.generator = CMakePackage, recipe.directive("build_system")
    cuda = types.ModuleType("spack_repo.builtin.build_systems.cuda")
    cuda.CudaPackage = CudaPackage
    modules = {"spack": types.ModuleType("spack"), package.__name__: package, cmake.__name__: cmake,
               cuda.__name__: cuda}  # fmt: skip
    for parent in ("spack_repo", "spack_repo.builtin", "spack_repo.builtin.build_systems"):
        modules[parent] = types.ModuleType(parent)
    sys.modules.update(modules)
    names = {}
    try:
        exec(compile(path.read_text(), path, "exec"), names)
    finally:
        for name in modules:
            del sys.modules[name]
    return names, recipe
