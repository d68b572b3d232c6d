"""Time of an optimizer step, estimated from a plan and the data sheet of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from landiff.launchers.budget.budget_plan import GIB, BudgetPlan
from landiff.training.observe.flops import PEAK_TFLOPS

USABLE = 0.9  # of the memory; the rest is for fragmentation of the allocator
NETWORK_GB_S = 40.0  # bandwidth of a GPU to other nodes, one direction
NODE = 8  # GPUs of a node, which share fast links
OVERLAPPED = 0.5  # of gradient traffic, hidden behind the backward pass if the config overlaps them


@dataclass(frozen=True)
class Gpu:
    """Data sheet of a GPU."""

    memory_gib: float
    peak_tflops: float  # dense bf16
    link_gb_s: float  # bandwidth to other GPUs of the node, one direction


GPUS = {
    "a100": Gpu(memory_gib=80, peak_tflops=PEAK_TFLOPS["A100"], link_gb_s=300),
    "h100": Gpu(memory_gib=80, peak_tflops=PEAK_TFLOPS["H100"], link_gb_s=450),
    "h200": Gpu(memory_gib=141, peak_tflops=PEAK_TFLOPS["H200"], link_gb_s=450),
    "b200": Gpu(memory_gib=180, peak_tflops=PEAK_TFLOPS["B200"], link_gb_s=900),
    "l40s": Gpu(memory_gib=48, peak_tflops=PEAK_TFLOPS["L40S"], link_gb_s=32),
}


def fits(plan: BudgetPlan, gpu: Gpu) -> bool:
    """Whether the fullest GPU has enough memory."""
    return plan.total_memory <= USABLE * gpu.memory_gib * GIB


def step_seconds(plan: BudgetPlan, gpu: Gpu, mfu: float) -> float:
    """Seconds of one optimizer step.

    The sum of arithmetic at the fraction `mfu` of the peak, stretched by the pipeline bubble;
    tensor-parallel traffic; and gradient traffic that the backward pass does not hide.
    """
    arithmetic = plan.hardware_flops / (plan.gpus * gpu.peak_tflops * 1e12 * mfu)
    arithmetic /= 1 - plan.bubble
    tensor_bandwidth = gpu.link_gb_s if plan.tensor <= NODE else NETWORK_GB_S
    tensor_bytes = plan.layer_bytes * 2 * (plan.tensor - 1) / plan.tensor
    # Copies of the model in one node use their connections to other nodes together.
    copies_in_node = max(1, NODE // plan.tensor)
    gradient_bandwidth = gpu.link_gb_s
    if plan.copies > copies_in_node:
        gradient_bandwidth = min(gpu.link_gb_s, NETWORK_GB_S * copies_in_node)
    exposed = 1 - OVERLAPPED if plan.overlap else 1.0
    return (
        arithmetic
        + tensor_bytes / (tensor_bandwidth * 1e9)
        + exposed * plan.gradient_bytes / (gradient_bandwidth * 1e9)
    )
