"""Tests of the runtime and of what it loads: cache, compiler, executor."""
