"""Lets KerasHub write models in the format of Hugging Face's Transformers, which it does for backends that it names.

The finder of `frontend.install` hands `apply` the module in `install.EXPORTING` once it is loaded. Files are written by
the package `safetensors`, from NumPy's arrays. To be removed where KerasHub does so for other backends.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np


def apply(name: str, module) -> None:
    """Replace the function that writes configuration and weights in KerasHub's exporter, just loaded."""
    module.export_backbone = functools.wraps(module.export_backbone)(functools.partial(export_backbone, module))


def export_backbone(exporter, backbone, path, include_lm_head: bool = False) -> None:
    """Write `config.json` and `model.safetensors` of a backbone into the folder `path`, which is made.

    exporter: KerasHub's module, whose tables say for each class of backbones what its configuration is, and which
        weights it has under which names. include_lm_head: write the weights of the language model's head, too.

    Raises ValueError for backbones that KerasHub has no exporter of.
    """
    kind = type(backbone).__name__
    if kind not in exporter.MODEL_CONFIGS or kind not in exporter.MODEL_EXPORTERS:
        raise ValueError(f"Export to Transformers format not implemented for {kind}")
    from safetensors.numpy import save_file

    config = exporter.MODEL_CONFIGS[kind](backbone)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    weights = exporter.MODEL_EXPORTERS[kind](backbone, include_lm_head=include_lm_head)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    arrays = {name: np.ascontiguousarray(weight) for name, weight in weights.items()}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
