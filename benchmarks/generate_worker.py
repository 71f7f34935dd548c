"""One engine in one process that generates text with KerasHub's models; run by `benchmarks.generate`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

PROMPT, LENGTH = 32, 160
# name: (model, batch, dtype); int8: quantised by Keras
CASES = {
    "gpt2@1": ("gpt2", 1, "float32"),
    "gpt2@8": ("gpt2", 8, "float32"),
    "gpt2-bfloat16@1": ("gpt2", 1, "bfloat16"),
    "gpt2-int8@1": ("gpt2", 1, "int8"),
    "llama@1": ("llama", 1, "float32"),
    "gemma@1": ("gemma", 1, "float32"),
    "bart@1": ("bart", 1, "float32"),
}


def build(model: str, dtype: str):
    """A task of KerasHub with random weights, of the size of the smallest models that are in use."""
    from keras_hub import models

    if model == "gpt2":
        backbone = models.GPT2Backbone(50257, 12, 12, 768, 3072, max_sequence_length=1024, dtype=dtype)
        return models.GPT2CausalLM(backbone, preprocessor=None)
    if model == "llama":
        backbone = models.LlamaBackbone(
            vocabulary_size=32000,
            num_layers=12,
            num_query_heads=16,
            hidden_dim=1024,
            intermediate_dim=2816,
            num_key_value_heads=4,
            dtype=dtype,
        )
        return models.LlamaCausalLM(backbone, preprocessor=None)
    if model == "gemma":
        backbone = models.GemmaBackbone(
            vocabulary_size=32000,
            num_layers=10,
            num_query_heads=4,
            num_key_value_heads=1,
            hidden_dim=1024,
            intermediate_dim=8192,
            head_dim=256,
            dtype=dtype,
        )
        return models.GemmaCausalLM(backbone, preprocessor=None)
    backbone = models.BartBackbone(50265, 6, 12, 768, 3072, max_sequence_length=1024, dtype=dtype)
    return models.BartSeq2SeqLM(backbone, preprocessor=None)


def prompt(model: str, batch: int) -> dict:
    """Token ids of PROMPT places, padded to LENGTH, as the model's preprocessor would give them."""
    import numpy as np

    tokens = np.zeros((batch, LENGTH), np.int32)
    tokens[:, :PROMPT] = np.random.default_rng(0).integers(3, 1000, (batch, PROMPT))
    places = np.zeros((batch, LENGTH), np.int32)
    places[:, :PROMPT] = 1
    if model != "bart":
        return {"token_ids": tokens, "padding_mask": places}
    given = {"encoder_token_ids": tokens, "encoder_padding_mask": places}
    return {**given, "decoder_token_ids": tokens.copy(), "decoder_padding_mask": places.copy()}


def serve(engine: str) -> None:
    """Answer requests on standard input: "load" a case, "time" a call of it."""
    if engine == "kgraph":
        import kgraph  # noqa: F401
    import keras
    import numpy as np

    task = inputs = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            name, batch, dtype = CASES[request["case"]]
            keras.utils.set_random_seed(0)
            task, inputs = build(name, "float32" if dtype == "int8" else dtype), prompt(name, batch)
            if dtype == "int8":
                task.quantize("int8")
            task.compile(sampler="greedy")
            widths = {"int8": 1, "bfloat16": 2}
            weights = sum(widths.get(str(v.dtype), 4) * int(np.prod(v.shape)) for v in task.backbone.variables)
        start = time.perf_counter()
        task.generate(dict(inputs), stop_token_ids=None)
        reply = {"seconds": time.perf_counter() - start}
        if request["do"] == "load":
            reply["weights"] = weights
        status = Path("/proc/self/status").read_text().splitlines()
        reply["peak_mb"] = next(int(row.split()[1]) / 1024 for row in status if row.startswith("VmHWM"))
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
