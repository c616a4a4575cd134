"""Low-bit layers on NVIDIA GPUs: CUDA kernels, one folder per kernel, and the code that launches them.

    spec      a layer as the kernels see it: sizes and layouts
    variants  compilations of the kernels: tiles, architectures, macros
    quantize  kernel.cu: values to codes, with adjacent channels
    low_bit   kernel.cu: product of a linear layer or convolution with scale, bias, residual and SiLU;
              reference.py (numpy), pack.py (weights), and three interfaces: op.py (torch), tensorrt.py
              (plugin in Python), tensorrt_aot.py (kernel inside the engine)
    cuda      headers of both kernels
    compile   compilation of CUDA C to cubins with NVRTC
    launch    grids and arguments of a layer's kernels
    driver    versions and calls of the CUDA driver
    device    GPUs, loaded kernels and memory

The package depends on neither diffusers nor runs nor graphs. `tests/plugins` runs the kernels on a CPU.
"""
