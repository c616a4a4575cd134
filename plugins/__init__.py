"""The low-bit core on NVIDIA GPUs: CUDA kernels, one folder each, and what carries calls to them.

    spec      sizes, layouts and variants: what a layer is to a kernel
    quantize  kernel.cu: values to codes, channels side by side
    low_bit   kernel.cu: the product of a linear layer or convolution, with everything behind it;
              reference.py in numpy, pack.py, and its faces: op.py (torch), tensorrt.py (a plugin in
              Python), tensorrt_aot.py (a kernel inside the engine)
    cuda      what both kernels include
    compile   CUDA C to cubins, by NVRTC
    launch    from a call of a layer to grids and arguments
    driver    loads cubins and starts them on the GPU that is there

Nothing here knows of diffusers, runs or graphs. `tests/plugins` runs the kernels on a CPU.
"""
