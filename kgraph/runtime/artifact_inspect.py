"""What is in a saved model, as text, without loading it: nothing in the file is executed."""

from __future__ import annotations

import os

from kgraph.runtime.artifact import Manifest, open_file
from kgraph.runtime.artifact_file import ArtifactFile
from kgraph.structure import Structure


def describe(path: str | os.PathLike, *, check: bool = True) -> str:
    """The contents of a file: the model's inputs and outputs, its levels and whether they run here, its sections.

    check: compare all checksums too. Raises ArtifactError for a file that is damaged, or no saved model.
    """
    file, manifest = open_file(path)
    if check:
        for name in file.sections:
            file.check(name)
    kind = "training step" if manifest.kind == "step" else "model"
    holds = ", all checksums hold" if check else ""
    lines = [f"{manifest.name}: a {kind} saved by kgraph {manifest.kgraph}, {file.size:,} bytes{holds}"]
    lines += _structure("input", manifest.inputs)
    try:
        for form in manifest.forms:
            sizes = ", ".join(f"{name}={size}" for name, size in form["sizes"].items())
            lines += _structure(f"output ({sizes})" if sizes else "output", Structure.from_json(form["outputs"]))
            lines += [f"  state {name}" for name, *_ in form["state"]["variables"]]
        lines += _levels(file, manifest)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        file.fail(f"its manifest is damaged: {error}")
    lines += [f"  on NumPy, for which the runtime alone does not suffice: {step}" for step in manifest.host_steps]
    lines.append("  sections")
    lines += [f"    {s.length:>14,}  {s.digest.hex()[:16]}  {name}" for name, s in file.sections.items()]
    return "\n".join(lines)


def _structure(what: str, structure: Structure) -> list[str]:
    return [f"  {what} {name!r}: {type_}" for name, type_ in zip(structure.names, structure.types)]


def _levels(file: ArtifactFile, manifest: Manifest) -> list[str]:
    lines = []
    for name, needs in manifest.levels.items():
        missing = needs.missing()
        runs = f"does not run here: it needs {', '.join(missing)}" if missing else "runs here"
        programs = [form["programs"][name] for form in manifest.forms]
        weights = dict.fromkeys(section for program in programs for section in program["weights"])
        nbytes = sum(file.section(section).length for section in weights)
        tested = "" if all(program["self_test"] for program in programs) else ", without a self-test"
        lines.append(f"  level {name} ({needs.machine}, {needs.system}): {runs}; {nbytes:,} bytes of weights{tested}")
    graphs = [form["graph"] is not None for form in manifest.forms]
    lines.append(f"  the graph is {'' if all(graphs) else 'not '}stored, to compile the model for other machines")
    return lines
