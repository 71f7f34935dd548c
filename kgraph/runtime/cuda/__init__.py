"""Programs on a GPU: the device, its memory, launches. Nothing here is loaded before a target of CUDA is asked for."""
