"""A small recorder of a denoiser's calls, and a runner of graphs, for tests of `trace_call`."""

import inspect

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
import torch.utils._pytree as pytree
from onnx_ir.passes.common import RemoveUnusedNodesPass


class Form:
    """The structure of a call: tensors by path, everything else constant."""

    def __init__(self, **arguments):
        leaves, self.spec = pytree.tree_flatten_with_path(arguments)
        self.tensors, self.leaves = {}, []
        for path, leaf in leaves:
            name = ".".join(str(getattr(p, "key", getattr(p, "idx", p))) for p in path)
            self.leaves.append((name, leaf))
            if isinstance(leaf, torch.Tensor):
                self.tensors[name] = leaf.detach().clone()

    def rebuild(self, tensors):
        return pytree.tree_unflatten(
            [tensors.get(name, leaf) for name, leaf in self.leaves], self.spec
        )


def first_call(pipeline, name, **arguments):
    """The form of the first call of a pipeline's denoiser."""
    forms = []

    def keep(module, args, kwargs):
        names = list(inspect.signature(module.forward).parameters)
        call = dict(zip(names, args, strict=False)) | kwargs
        call.pop("return_dict", None)
        forms.append(Form(**call))

    handle = getattr(pipeline, name).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        pipeline(**arguments)
    handle.remove()
    return forms[0]


def in_torch(denoiser, form):
    """The tensors of the denoiser's result."""
    arguments = form.rebuild(form.tensors)
    if "return_dict" in inspect.signature(denoiser.forward).parameters:
        arguments["return_dict"] = False
    with torch.no_grad():
        return [leaf for leaf in pytree.tree_leaves(denoiser(**arguments)) if leaf is not None]


def in_onnxruntime(model, form):
    """The outputs of a graph for the tensors of a form."""
    RemoveUnusedNodesPass()(model)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = {value.name for value in session.get_inputs()}
    feeds = {name: np.asarray(t) for name, t in form.tensors.items() if name in names}
    return [torch.from_numpy(value) for value in session.run(None, feeds)]
