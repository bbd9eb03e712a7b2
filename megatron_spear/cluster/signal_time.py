"""Whether a job is told early enough that the run has saved before its time limit."""

from megatron_spear.cluster.planner.job import Job
from megatron_spear.cluster.planner.models import planned_model
from megatron_spear.cluster.planner.resharding import WHOLE_BYTES_PER_S
from megatron_spear.cluster.planner.states import MASTER_BYTES, MOMENTS_BYTES, WEIGHT_BYTES
from megatron_spear.cluster.planner.times import step_times
from megatron_spear.config.schema import RunConfig
from megatron_spear.conversion.layout_fit import model_problems
from megatron_spear.conversion.sizes import model_parameters
from megatron_spear.errors import SpearError


def signal_warning(config: RunConfig) -> str | None:
    """What to tell where ``cluster.slurm.signal_before_s`` is below a step and a save, as planned.

    None where it is not, or nothing is planned: for CPU nodes, whose speed is not known here, a
    layout that is impossible, and a model that only the nodes see.

    Example: with 600 and a step of 690 s of a 7B model, "... is below the 701 s that a step (690 s)
    and a save (11 s) take by the plan ...".
    """
    try:
        _, shape = planned_model(config)
    except SpearError:
        return None
    job = Job.of_config(config, shape)
    if job.is_cpu or any(model_problems(job.policy, shape, job.trainer_gpus)):
        return None
    step_s, save_s = step_times(job).total_s, _save_s(job)
    before_s = config.cluster.slurm.signal_before_s
    if before_s >= step_s + save_s:
        return None
    return (
        f"cluster.slurm.signal_before_s={before_s} is below the {step_s + save_s:,.0f} s that a "
        f"step ({step_s:,.0f} s) and a save ({save_s:,.0f} s) take by the plan: when its time is "
        "over the job is killed before it has saved; raise it"
    )


def _save_s(job: Job) -> float:
    """Weights and Adam's state once, at the rate of a shared file system that the planner takes."""
    precision = job.policy.precision
    each = WEIGHT_BYTES[precision] + MOMENTS_BYTES + MASTER_BYTES[precision]
    return each * model_parameters(job.shape).total / WHOLE_BYTES_PER_S
