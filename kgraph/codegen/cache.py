"""Keys of kernels in the disk cache: digests of all that their code depends on."""

from __future__ import annotations

import functools
import hashlib
import sys

from kgraph.codegen.cuda.target import CudaTarget
from kgraph.codegen.kernel import KernelSpec, template_module
from kgraph.codegen.sources import module_source
from kgraph.codegen.target import Target, host_target


@functools.cache
def source_digest(template: str, common: tuple[str, ...] = ()) -> str:
    """Digest of the sources behind a template's module: itself and what it imports of kgraph.codegen, at any depth,
    with the modules of kgraph.ops that these name (tables and layouts that kernels are made from).

    common: further modules, which the kernels of all templates depend on.

    Any change of them makes the earlier entries of its kernels unreachable.
    """
    digests: dict[str, bytes] = {}
    todo = [template_module(template), *common]
    while todo:
        name = todo.pop()
        if name not in digests:
            digests[name], imports = module_source(name)
            todo += [i for i in imports if i.startswith("kgraph.codegen")]
            if name.startswith("kgraph.codegen"):
                todo += [i for i in imports if i.startswith("kgraph.ops.")]
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


@functools.cache
def _environment_digest(template: str, target: Target | CudaTarget) -> bytes:
    parts = (source_digest(template, target.sources), target.toolchain, sys.platform, target)
    return hashlib.sha256(repr(parts).encode()).digest()


def spec_key(spec: KernelSpec, target: Target | CudaTarget | None = None) -> str:
    """Name of a kernel's entry: equal for equal specs, sources, toolchain and target, different otherwise."""
    digest = hashlib.sha256(_environment_digest(spec.template, target or host_target()))
    digest.update(repr((spec.name, spec.template, spec.params)).encode())
    return digest.hexdigest()[:40]
