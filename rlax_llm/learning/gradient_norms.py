"""Squared norms of the gradients of single samples, for baselines."""

import jax
import jax.numpy as jnp
import optax

from rlax_llm.learning import update as updates
from rlax_llm.learning.update import UpdateConfig
from rlax_llm.models import language_model
from rlax_llm.models import lora
from rlax_llm.models.language_model import LanguageModel
from rlax_llm.ops.masking import select_masked
from rlax_llm.types import Array
from rlax_llm.types import Batch
from rlax_llm.types import Params


def squared_norms(
  params: Params, batch: Batch, *, model: LanguageModel, config: UpdateConfig
) -> Array:
  """Returns |grad log pi(y)|^2 at every token of each sample, [M, R, L].

  The gradient of the sum over a sample's target tokens, by all that is
  trained; unweighted and not divided by the length. VCPO,
  https://arxiv.org/abs/2602.17616. One backward pass of a microbatch for each
  sample: keep `learning.microbatch_rows` as small as the mesh allows.

  Args:
    params: the policy's.
    batch: packed samples.
    model: static.
    config: static.
  """
  trained, frozen = lora.split(params, model.trainable(params))

  def of_sample(part: Batch, mine: Array) -> Array:

    def logprob(trained: Params) -> Array:
      logprobs = language_model.score(
        lora.join(trained, frozen),
        part.tokens,
        part.positions,
        part.segments,
        model=model,
        sampling=config.sampling,
        chunk=config.chunk,
      )
      return jnp.sum(select_masked(mine, logprobs))

    gradient = model.place(jax.grad(logprob)(trained))
    return jnp.square(optax.global_norm(gradient))

  def of_row(row: Array, part: Batch, found: Array) -> Array:
    here = (jnp.arange(found.shape[0]) == row)[:, None]

    def add(segment: Array, found: Array) -> Array:
      mine = here & (part.segments == segment) & part.targets
      return jnp.where(mine, of_sample(part, mine), found)

    samples = jnp.max(jnp.where(here, part.segments, 0))
    return jax.lax.fori_loop(1, samples + 1, add, found)

  def of_microbatch(i: Array, out: Array) -> Array:
    part = updates.microbatch(batch, i)
    found = jax.lax.fori_loop(
      0,
      out.shape[1],
      lambda row, found: of_row(row, part, found),
      jnp.zeros(out.shape[1:], out.dtype),
    )
    return out.at[i].set(found)

  return jax.lax.fori_loop(
    0, batch.count, of_microbatch, jnp.zeros(batch.tokens.shape, jnp.float32)
  )
