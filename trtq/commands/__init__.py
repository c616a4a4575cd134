"""The commands of `trtq`, one file per verb or pair of verbs; `trtq.cli` registers them.

A command parses its options, calls one library function and prints the result. No command knows the
application: each is a plain function.
"""
