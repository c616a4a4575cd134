"""The commands of `trtq`, in one or two per module; `trtq.cli` registers them.

A command parses its options, calls one library function and prints the result. Commands are plain
functions that do not depend on the application.
"""
