"""Engines of TensorRT-RTX and TensorRT.

`Backend` describes both builders. A builder may crash its process or take all memory, so it runs in a
child process: `compile_engine` writes the job to a JSON file, and `worker` runs it.
"""
