"""Time of an optimizer step, estimated from a plan and the data sheet of a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from landiff.launchers.budget.budget_plan import GIB, NODE, BudgetPlan
from landiff.training.observe.flops import PEAK_TFLOPS

USABLE = 0.9  # of the memory; the rest is for fragmentation of the allocator
NETWORK_GB_S = 40.0  # bandwidth of a GPU to other nodes, one direction
FASTEST = 0.75  # of the peak, reached by large matmuls
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


@dataclass(frozen=True)
class Speed:
    """How fast GPUs compute: a model FLOPs utilization, or what a run has reached.

    mfu: model FLOPs utilization of every plan.
    utilization: fraction of the peak while the GPUs compute, see `utilization_of`. It is taken
        instead of `mfu` if it is not None.
    """

    mfu: float
    utilization: float | None = None

    def step_seconds(self, plan: BudgetPlan, gpu: Gpu) -> float:
        """Seconds of one optimizer step."""
        utilization = self.utilization
        if utilization is None:
            utilization = utilization_of(plan, gpu, self.mfu)
        return step_seconds(plan, gpu, utilization)

    def fixed_by(self, plan: BudgetPlan, gpu: Gpu) -> Speed:
        """The same speed for other layouts of the model of `plan`, with their own traffic."""
        if self.utilization is not None:
            return self
        return Speed(self.mfu, utilization_of(plan, gpu, self.mfu))


def fits(plan: BudgetPlan, gpu: Gpu) -> bool:
    """Whether the fullest GPU has enough memory."""
    return plan.total_memory <= USABLE * gpu.memory_gib * GIB


def step_seconds(plan: BudgetPlan, gpu: Gpu, utilization: float) -> float:
    """Seconds of one optimizer step.

    utilization: fraction of the peak that the GPUs reach while they compute, see `utilization_of`.
    """
    return arithmetic_seconds(plan, gpu) / utilization + traffic_seconds(plan, gpu)


def utilization_of(plan: BudgetPlan, gpu: Gpu, mfu: float) -> float:
    """The fraction of the peak at which a step of `plan` has the model FLOPs utilization `mfu`.

    Model FLOPs utilization counts no recomputation, and the whole step: also traffic and pipeline
    bubbles. So the GPUs compute at a higher rate, which other layouts of the same model have too.
    It is at most `FASTEST`: traffic may leave less time than the arithmetic takes.
    """
    seconds = plan.model_flops / (plan.gpus * gpu.peak_tflops * 1e12 * mfu)
    left = seconds - traffic_seconds(plan, gpu)
    fastest = arithmetic_seconds(plan, gpu) / FASTEST
    if left <= fastest:
        return FASTEST
    return arithmetic_seconds(plan, gpu) / left


def model_flops_utilization(plan: BudgetPlan, gpu: Gpu, seconds: float) -> float:
    """Model FLOPs of a step of `seconds`, as a fraction of what the GPUs could do in this time."""
    return plan.model_flops / (plan.gpus * gpu.peak_tflops * 1e12 * seconds)


def arithmetic_seconds(plan: BudgetPlan, gpu: Gpu) -> float:
    """Seconds of all matmuls at the peak, increased by the pipeline bubble."""
    return plan.hardware_flops / (plan.gpus * gpu.peak_tflops * 1e12) / (1 - plan.bubble)


def traffic_seconds(plan: BudgetPlan, gpu: Gpu) -> float:
    """Seconds of traffic that is not hidden: within layers, and of gradients after the backward."""
    layer_bandwidth = gpu.link_gb_s if plan.layer_group <= NODE else NETWORK_GB_S
    # Copies of the model in one node use their connections to other nodes together.
    copies_in_node = max(1, NODE // plan.layer_group)
    gradient_bandwidth = gpu.link_gb_s
    if plan.copies > copies_in_node:
        gradient_bandwidth = min(gpu.link_gb_s, NETWORK_GB_S * copies_in_node)
    exposed = 1 - OVERLAPPED if plan.overlap else 1.0
    seconds = plan.gradient_bytes / gradient_bandwidth + plan.node_bytes / gpu.link_gb_s
    return (plan.layer_bytes / layer_bandwidth + exposed * seconds) / 1e9
