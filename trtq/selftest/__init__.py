"""`trtq selftest`: what trtq does on an NVIDIA GPU, checked and measured on its owner's machine.

`run` starts each stage in a child process and rewrites the file after each; `worker` is the child. A
stage is a module with a function `trials`; `stages` lists them. `cases` is the suite of integers, which
the tests share with stage 2.
"""
