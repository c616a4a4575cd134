"""Engines of TensorRT-RTX and TensorRT.

Both builders lie behind one `Backend`. A builder may crash its process or take all memory, so it runs in
a child process, from one JSON file to another: `compile_engine` writes the job, `worker` does it.
"""
