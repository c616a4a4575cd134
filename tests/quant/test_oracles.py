"""Reproduce the numbers of the released EfficientDM and QuEST quantisers."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.oracle import oracle, tensor
from trtq.quant import (
    ActivationQuantizer,
    QuantConv2d,
    QuantLinear,
    TimestepTable,
    activation_qparams,
    fake_quant,
    pack_codes,
    step_scope,
    weight_qparams,
)
from trtq.quant.activation import select_step
from trtq.quant.adaround import directed_codes, hard_direction, initial_alpha, soft_direction
from trtq.quant.fake_quant import quantize_codes
from trtq.quant.structure import SplitConv2d
from trtq.train.efficientdm import guided_error
from trtq.train.quest import alignment_loss


def close(actual, expected, atol=1e-5, rtol=0.0):
    if not isinstance(expected, torch.Tensor):
        expected = tensor(expected)
    torch.testing.assert_close(actual.detach(), expected.detach(), atol=atol, rtol=rtol)


def close_gradient(actual, expected, bits):
    close(actual, expected, atol=2e-2 if bits == 8 else 1e-3, rtol=1e-4)


@pytest.mark.parametrize("row", range(8))
def test_affine_fake_quant_values_and_gradients(row):
    data = oracle("effdm_act_fakequant")
    bits = int(data["n_bits"][row])
    x, scale, zero = (
        tensor(data[key][row]).requires_grad_() for key in ("x", "delta", "zero_point")
    )
    y = fake_quant(x, scale, zero, 0, 2**bits - 1)
    (y * tensor(data["upstream"][row])).sum().backward()
    close(y, data["y"][row])
    close(x.grad, data["grad_x"][row])
    close_gradient(scale.grad, data["grad_delta"][row], bits)
    close_gradient(zero.grad, data["grad_zero_point"][row], bits)
    moved = x.grad.numpy() != 0
    np.testing.assert_array_equal(moved | (data["upstream"][row] == 0), data["inside"][row])


@pytest.mark.parametrize("row", range(5))
def test_quest_fake_quant_values_and_gradients(row):
    data = oracle("quest_act_fakequant")
    x, scale = (tensor(data[key][row]).requires_grad_() for key in ("x", "delta"))
    low, high = int(data["clip_lo"][row]), int(data["clip_hi"][row])
    y = fake_quant(x, scale, float(data["zero_point"][row]), low, high)
    (y * tensor(data["upstream"][row])).sum().backward()
    close(y, data["y"][row])
    close(x.grad, data["grad_x"][row])
    close_gradient(scale.grad, data["grad_delta"][row], int(data["n_bits"][row]))


@pytest.mark.parametrize("bits", [4, 8])
def test_talsq_uses_and_trains_the_entry_of_its_step_only(bits):
    data = {
        key.split(".", 1)[1]: value
        for key, value in oracle("effdm_talsq").items()
        if key.startswith(f"b{bits}.")
    }
    quantizer = ActivationQuantizer(bits, TimestepTable(range(5)), "float", symmetric=False)
    x = tensor(data["x"])
    quantizer.set_range(tensor(data["init_delta"]).expand(5), tensor(data["init_zero_point"]))
    close(quantizer(x, 4), data["init_y"])
    quantizer.set_range(tensor(data["delta_list"]), tensor(data["zp_list"]))
    for call, step in enumerate(data["index_used"].tolist()):
        quantizer.zero_grad()
        x = tensor(data["x"]).requires_grad_()
        y = quantizer(x, step)
        (y * tensor(data["upstream"])).sum().backward()
        close(y, data["y"][call])
        close(x.grad, data["grad_x"][call])
        close_gradient(quantizer.scale.grad, data["grad_delta_list"][call], bits)
        close_gradient(quantizer.zero_point.grad, data["grad_zp_list"][call], bits)


def test_fewer_steps_keep_every_fifth_entry():
    data = oracle("effdm_talsq")
    hundred = TimestepTable([10 * i + 1 for i in range(100)])
    twenty = TimestepTable([50 * i + 1 for i in range(20)])
    quantizer = ActivationQuantizer(4, hundred)
    quantizer.set_range(tensor(data["downsample.full"]), torch.zeros(100))
    scale = select_step(quantizer.scale, hundred.index(twenty.timesteps), batch=20)
    close(scale, data["downsample.every5"], atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("method", ["minmax", "search"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_weight_ranges(kind, method, bits):
    data = oracle("weight_init")
    place = (0, ["minmax", "search"].index(method), [2, 4, 8].index(bits))
    weight = tensor(data[f"{kind}.weight"])
    scale, zero = weight_qparams(weight, bits, method)
    close(scale.flatten(), data[f"{kind}.delta"][place], atol=1e-7)
    close(zero.flatten(), data[f"{kind}.zero_point"][place], atol=0)
    codes = quantize_codes(weight, scale, zero, 0, 2**bits - 1)
    np.testing.assert_array_equal(codes.numpy(), data[f"{kind}.ints"][place])


def qalora_layer(data, kind, split_scale=False):
    weight = tensor(data["w_fp"])
    if kind == "linear":
        source = nn.Linear(weight.shape[1], weight.shape[0])
    else:
        source = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
    with torch.no_grad():
        source.weight.copy_(weight)
        source.bias.copy_(tensor(data["bias"]))
    cls = QuantLinear if kind == "linear" else QuantConv2d
    table = TimestepTable(range(4))
    return cls(source, table, rank=32, base="int", zero_point_mode="float", split_scale=split_scale)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_qalora_layer(kind):
    data = oracle(f"qalora_{kind}_w4a4")
    layer = qalora_layer(data, kind, split_scale=True)
    close(layer.weight_scale, data["w_delta"], atol=1e-8)
    np.testing.assert_array_equal(layer.base_codes.numpy(), data["base_ints"])
    np.testing.assert_array_equal(pack_codes(layer.base_codes, 4).numpy(), data["packed"])
    close(layer.updated_weight(), data["w0_dequant"])
    scale, zero = activation_qparams(tensor(data["x"]), 4, "search")
    close(scale, data["act_delta_init"], atol=1e-6)
    close(zero, data["act_zp_init"], atol=0)
    layer.activation.set_range(scale.expand(4), zero.expand(4))
    close(layer(tensor(data["x"]), 3), data["y_init_lora_zero"])

    with torch.no_grad():
        layer.lora_A.copy_(tensor(data["loraA"]))
        layer.lora_B.copy_(tensor(data["loraB"]))
    layer.activation.set_range(tensor(data["act_delta_list"]), tensor(data["act_zp_list"]))
    close(layer.lora_delta(), data["lora_delta_w"])
    np.testing.assert_array_equal(layer.merge().codes.numpy(), data["merged_ints"])
    # The merged integers differ from the naive ones by an integer offset.
    offsets = np.round(data["lora_delta_w"] / data["w_delta"])
    merged = np.clip(data["base_ints"] + offsets, 0, 15)
    np.testing.assert_array_equal(layer.merge().codes.numpy(), merged)
    for call in (0, 1):
        layer.zero_grad()
        x = tensor(data["x"]).requires_grad_()
        y = layer(x, int(data[f"call{call}.step_index"]))
        (y * tensor(data["upstream"])).sum().backward()
        close(y, data[f"call{call}.y"])
        for name, parameter in (
            ("act_delta_list", layer.activation.scale),
            ("act_zp_list", layer.activation.zero_point),
        ):
            close_gradient(parameter.grad, data[f"call{call}.grad_{name}"], 4)
        if call == 0:
            close_gradient(x.grad, data["call0.grad_x"], 4)
            close_gradient(layer.lora_A.grad, data["call0.grad_loraA"], 4)
            close_gradient(layer.lora_B.grad, data["call0.grad_loraB"], 4)
            requant, dequant = layer.weight_scale.grad, layer.weight_scale_dequant.grad
            close_gradient(requant, data["call0.grad_w_delta_requant"], 4)
            close_gradient(dequant, data["call0.grad_w_delta_dequant"], 4)


def test_a_shared_scale_gets_the_sum_of_both_gradients():
    data = oracle("qalora_linear_w4a4")
    layer = qalora_layer(data, "linear")
    with torch.no_grad():
        layer.lora_A.copy_(tensor(data["loraA"]))
        layer.lora_B.copy_(tensor(data["loraB"]))
    layer.activation.set_range(tensor(data["act_delta_list"]), tensor(data["act_zp_list"]))
    y = layer(tensor(data["x"]), int(data["call0.step_index"]))
    (y * tensor(data["upstream"])).sum().backward()
    both = data["call0.grad_w_delta_requant"] + data["call0.grad_w_delta_dequant"]
    close_gradient(layer.weight_scale.grad, both, 4)


def test_eight_optimiser_updates():
    data = oracle("effdm_optim_steps")
    layer = qalora_layer(data, "linear", split_scale=True)
    with torch.no_grad():
        layer.weight_scale.copy_(tensor(data["w_delta0"]))
        layer.lora_A.copy_(tensor(data["loraA0"]))
        layer.lora_B.copy_(tensor(data["loraB0"]))
    np.testing.assert_array_equal(layer.base_codes.numpy(), data["base_ints"])
    layer.activation.set_range(tensor(data["act_delta_list0"]), tensor(data["act_zp_list0"]))
    optimizer = torch.optim.AdamW(
        [
            {"params": [layer.lora_A, layer.lora_B], "lr": float(data["lr_lora"])},
            {
                "params": [layer.weight_scale, layer.weight_scale_dequant],
                "lr": float(data["lr_w_delta"]),
            },
            {"params": list(layer.activation.parameters()), "lr": float(data["lr_act"])},
        ],
        weight_decay=0.01,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    total = int(data["total_steps"])
    for iteration, step in enumerate(data["index_used"].tolist()):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - iteration / total)
        x = tensor(data["x"][iteration])
        target = nn.functional.linear(x, tensor(data["w_fp"]), tensor(data["bias"]))
        loss = guided_error(layer(x, step), target)
        np.testing.assert_allclose(loss.item(), data["loss"][iteration], rtol=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if iteration + 1 in (1, 8):
            after = f"after{iteration + 1}"
            close(layer.lora_A, data[f"{after}.loraA"], atol=1e-8)
            close(layer.lora_B, data[f"{after}.loraB"], atol=1e-8)
            close(layer.weight_scale, data[f"{after}.w_delta"], atol=1e-6)
            close(layer.activation.scale, data[f"{after}.act_delta_list"], atol=1e-6)
            close(layer.activation.zero_point, data[f"{after}.act_zp_list"], atol=1e-6)


def test_guided_loss():
    data = {key: tensor(value) for key, value in oracle("losses").items()}
    guidance = data["guidance"]

    def guided(kind):
        without, with_class = data[f"eps_uncond_{kind}"], data[f"eps_cond_{kind}"]
        return without + guidance * (with_class - without)

    torch.testing.assert_close(
        guided_error(guided("q"), guided("fp")), data["effdm_loss"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("weighting", "key"), [("released", "quest_local_plus_task"), ("global", "quest_task_only")]
)
def test_quest_losses(weighting, key):
    data = {key: tensor(value) for key, value in oracle("losses").items()}
    student, teacher = (dict(enumerate(data[f"acts_{kind}"])) for kind in ("q", "fp"))
    total = alignment_loss(student, teacher, data["out_q"], data["out_fp"], weighting)
    # The released code adds the samples of a file, each divided by the number of samples.
    torch.testing.assert_close(total / data["batch"], data[key], rtol=1e-5, atol=1e-6)


def test_quest_paper_weighting_has_one_global_term():
    data = {key: tensor(value) for key, value in oracle("losses").items()}
    student, teacher = (dict(enumerate(data[f"acts_{kind}"])) for kind in ("q", "fp"))
    outputs = data["out_q"], data["out_fp"]
    paper, released = (alignment_loss(student, teacher, *outputs, w) for w in ("paper", "released"))
    task = (data["out_q"] - data["out_fp"]).square().mean()
    torch.testing.assert_close(released - paper, (len(teacher) - 1) * task)


def test_learned_rounding_keeps_its_direction():
    data = {key: tensor(value) for key, value in oracle("quest_adaround").items()}
    w, scale, zero = data["w"], data["delta"], data["zero_point"]
    alpha = initial_alpha(w, scale)
    close(alpha, data["alpha_init"], atol=1e-4, rtol=1e-4)
    close(soft_direction(alpha), data["soft_init"])

    def value(weight, step, direction):
        return (directed_codes(weight, step, zero, 15, direction) - zero) * step

    close(value(w, scale, soft_direction(data["alpha_init"])), data["y_soft_init"])
    close(value(w, scale, hard_direction(data["alpha_init"])), data["y_hard_init"])
    moved, step = data["w_finetuned"].requires_grad_(), scale.requires_grad_()
    y = value(moved, step, hard_direction(data["alpha"]))
    (y * data["upstream"]).sum().backward()
    close(y, data["y_hard_finetuned"])
    close_gradient(moved.grad, data["grad_w"], 4)
    close_gradient(step.grad, data["grad_delta"], 4)


def test_split_skip_convolution():
    data = {key: tensor(value) for key, value in oracle("quest_split_conv1x1").items()}
    source = nn.Conv2d(7, 6, 1)
    with torch.no_grad():
        source.weight.copy_(data["w"])
        source.bias.copy_(data["bias"])
    split = SplitConv2d(source, int(data["split"]))
    table = TimestepTable(data["timesteps"].tolist())
    for index, half in enumerate(("first", "second")):
        part = split.parts[index]
        scale, zero = weight_qparams(part.weight, 4, "search")
        close(scale, data[f"{half}.w_delta"])
        close(zero, data[f"{half}.w_zero_point"], atol=0)
        layer = split.parts[index] = QuantConv2d(part, table, weight_method="search")
        layer.weight_scale.data, layer.weight_zero_point = scale, zero
        layer.activation = ActivationQuantizer(8, table, symmetric=False)
        entries = [
            torch.stack([data[f"t{int(t)}.{half}.act_{name}"] for t in table.timesteps])
            for name in ("delta", "zero_point")
        ]
        layer.activation.set_range(*entries)
    for timestep in (951, 451):
        with step_scope(table.index(timestep)):
            close(split(data[f"t{timestep}.x"]), data[f"t{timestep}.y"], atol=2e-5)
