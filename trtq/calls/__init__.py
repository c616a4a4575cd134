"""The calls that a pipeline makes to its denoisers: recorded, described and made again."""
