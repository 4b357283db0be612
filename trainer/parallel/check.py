"""Whether a model, a data set and a layout go together; asked before anything is made, without any process group."""

from __future__ import annotations

from collections.abc import Iterator

from shared.errors import UserError
from shared.geometry import Budget
from trainer.models.dinov3 import Dinov3Config
from trainer.models.vlm import ModelConfig
from trainer.parallel.mesh import ParallelConfig
from trainer.parallel.parallelize import ComputeConfig
from trainer.parallel.pipeline import stage_layers


def check_layout(
    model: ModelConfig,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    budget: Budget,
    *,
    device: str,
    dtype: str,
    accumulation: int,
) -> None:
    """Refuse what cannot be divided or combined.

    Raises:
        UserError: every fault in one line, each with the keys to change.
    """
    faults = [
        *_tensor_faults(model, parallel, budget),
        *_context_faults(parallel, budget),
        *_pipeline_faults(model, parallel, compute, accumulation),
        *_attention_faults(model, parallel, compute, device, dtype),
    ]
    if faults:
        raise UserError("layout: " + "; ".join(faults))


def vision_rows_note(parallel: ParallelConfig, rows: int) -> str | None:
    """A layout in which some ranks of cp and tp have no vision row to encode works, but wastes them."""
    ranks = parallel.cp * parallel.tp
    if rows % ranks == 0:
        return None
    return (
        f"{rows} vision rows of a microbatch on {ranks} ranks (cp x tp): some encode padding; "
        f"preprocess with budget.rows_multiple = {ranks}, or raise batch.packs_per_microbatch"
    )


def _tensor_faults(model: ModelConfig, parallel: ParallelConfig, budget: Budget) -> Iterator[str]:
    decoder, tp = model.decoder, parallel.tp
    sizes = {
        "decoder.num_heads": decoder.num_heads,
        "decoder.num_kv_heads": decoder.num_kv_heads,
        "decoder.intermediate_size": decoder.intermediate_size,
        "decoder.vocab_size": decoder.vocab_size,
    }
    for key, value in sizes.items():
        if value % tp:
            yield f"{key} {value} is no multiple of parallel.tp {tp}; change one of them"
    positions = budget.S // parallel.cp
    if parallel.sequence_parallel and positions % tp:
        yield (
            f"{positions} positions per rank are no multiple of parallel.tp {tp}; "
            "set parallel.sequence_parallel = false"
        )


def _context_faults(parallel: ParallelConfig, budget: Budget) -> Iterator[str]:
    if parallel.cp > 1 and budget.S % (2 * parallel.cp):
        yield (
            f"S {budget.S} of the data set is no multiple of 2 x parallel.cp = {2 * parallel.cp}; "
            "change parallel.cp, or preprocess with another budget.S"
        )


def _pipeline_faults(
    model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig, accumulation: int
) -> Iterator[str]:
    if parallel.pp == 1:
        return
    if compute.reduce == "microbatch":
        yield (
            "compute.reduce 'microbatch': torch's pipeline schedules reduce once per step; "
            "set it to 'step', or parallel.pp to 1"
        )
    try:
        stage_layers(model.decoder.num_layers, parallel)
    except ValueError as error:
        yield f"{error}; change parallel.pp, parallel.stages_per_rank or parallel.stage_layers"
    if model.decoder.tie_embeddings:
        yield (
            "decoder.tie_embeddings: the first stage of a pipeline has the table and the last one the head; "
            "set it to false, or parallel.pp to 1"
        )
    if accumulation < parallel.num_stages and parallel.stages_per_rank == 1:
        yield (
            f"{accumulation} microbatches per step do not fill {parallel.num_stages} pipeline stages; raise "
            "batch.packs_per_step or lower parallel.pp"
        )
    elif parallel.stages_per_rank > 1 and accumulation % parallel.pp:
        yield (
            f"{accumulation} microbatches per step are no multiple of parallel.pp {parallel.pp}, which the "
            "interleaved schedule needs; change batch.packs_per_step"
        )


def _attention_faults(
    model: ModelConfig, parallel: ParallelConfig, compute: ComputeConfig, device: str, dtype: str
) -> Iterator[str]:
    backend = compute.backend(device)
    if backend != "sdpa" and device == "cpu":
        yield f"compute.attention {backend!r} has no backward on a CPU; set it to 'sdpa' or 'auto'"
    if backend != "varlen":
        return
    if dtype != "bfloat16":
        yield f"compute.attention 'varlen' computes in bfloat16, dtype is {dtype}; use 'flex'"
    if parallel.cp > 1:
        yield "compute.attention 'varlen' knows no parallel.cp above 1; use 'flex'"
    if isinstance(model.encoder, Dinov3Config):
        yield "compute.attention 'varlen' takes the loader's borders, which leave out dinov3's own tokens; use 'flex'"
