"""A stub for the worker processes of a benchmark."""

import json

import numpy as np

from trtq.bench.run import benchmark
from trtq.errors import (
    MeasurementError,
    TrtqError,
)


class StubWorker:
    """Answers like a worker without measuring; rows in `dying` fail at the named request."""

    dying: dict[str, str] = {}
    on_gpu: set[str] = set()
    error: type[TrtqError] = MeasurementError
    pace = {"slow": 4e-3, "fast": 1e-3}
    draw_pace: dict[str, float] = {}
    all_questions: list[str] = []

    def __init__(self, module, name):
        self.name = name
        self.questions = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.questions.append("close")

    def ask(self, question, **arguments):
        self.questions.append(question)
        self.all_questions.append(question)
        if self.dying.get(self.name) == question:
            raise self.error(f"{self.name}: its process was killed")
        pace = "slow" if "torch" in self.name else "fast"
        seconds = self.pace[pace]
        draw_seconds = 20 * (self.draw_pace or self.pace)[pace]
        if question == "draw" and arguments["out"] is not None:
            np.save(arguments["out"], np.zeros((arguments["batch"], 1, 2, 2), np.float32))
        memory = {"libraries_bytes": 1, "weights_bytes": 2, "load_peak_bytes": 3}
        return {
            "open": {"load_seconds": 1.0, "memory": memory, "shape": [1, 8, 8], "prompts": None}
            | {"model_class": "UNet2DModel", "parts": ["denoiser"], "guidance": 1.0}
            | {"weight_bytes": 4, "device": "gpu" if self.name in self.on_gpu else "cpu"},
            "prepare": {"first_call_seconds": 1.0, "calls": 2},
            "time": {"seconds": [seconds, seconds]},
            "draw": {"seconds": draw_seconds, "joules": None},
            "memory": {"activations_bytes": 5, "run_peak_bytes": 6},
            "operations": {"operations": 1000},
            "cpu_peak": {"operations": 1e9, "bytes": 1e9, "what": "a stub"},
        }[question]


def write_result(path, digits_onnx, **changes):
    """Write a result file with some changed fields."""
    measured = benchmark([str(digits_onnx), "digits"], batches=[1], turns=2, threads=1)
    path.write_text(json.dumps(measured.to_json() | changes))
    return path
