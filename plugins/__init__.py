"""Low-bit layers on NVIDIA GPUs: CUDA kernels, one folder per kernel, and the code that launches them.

    spec      sizes and memory layouts of a layer
    variants  variants of the kernels: tiles, architectures, macros
    quantize  kernel.cu: conversion of values to codes, channels last
    low_bit   kernel.cu: product of a linear layer or convolution with scale, bias, residual and SiLU
              (layer.cuh: sizes, loads.cuh: copies to shared memory, epilogue.cuh: outputs);
              reference.py (numpy), pack.py (weights), and three interfaces: op.py (torch), tensorrt.py
              (plugin in Python), tensorrt_aot.py (kernel inside the engine)
    cuda      headers of both kernels
    compile   compilation of CUDA C to cubins with NVRTC
    tile_choice
              tile and splits of a call, by a model of a processor's time
    arguments integers of the product kernel
    launch    grids and arguments of a layer's kernels
    driver    versions and calls of the CUDA driver
    device    GPUs, loaded kernels and memory

The package does not depend on diffusers, runs or graphs. `tests/plugins` runs the kernels on a CPU.
"""
