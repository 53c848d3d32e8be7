"""Verification rules on a trained pair: tokens per forward of the target.

  python -m experiments.verification.run

A target and a smaller drafter imitate the traces of the quickstart's task.
Then the target decodes held-out problems with every rule, shape of draft, size
of draft and temperature; both models run at that temperature. Before that, the
law of three tokens under each rule is tested against enumeration, and a rule
with a planted bias must fail. Writes laws.csv, acceptance.csv, efficiency.csv,
claims.csv and efficiency.png into --out.
"""

import pathlib

from absl import app
from absl import flags

from experiments import common
from experiments.verification import measure
from experiments.verification import settings
from rlax_llm.runtime import executables

_SIZE = flags.DEFINE_enum(
  'size', 'small', list(settings.SIZES), 'Of the models and the measurement.'
)
_NODES = flags.DEFINE_list(
  'nodes', ['4', '8', '16'], 'Sizes of the draft: 4, 8, 16, ... tokens.'
)
flags.register_validator(
  'nodes',
  lambda sizes: all(n.isdigit() and int(n) and int(n) % 4 == 0 for n in sizes),
  'must be multiples of 4: the shapes of one size are to be equal',
)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the parameters and the noise.')
_OUT = flags.DEFINE_string(
  'out', 'experiments/verification', 'Where results go.'
)


def main(argv: list[str]) -> None:
  """Runs the experiment that the flags describe."""
  del argv
  common.use_device()
  executables.enable_compilation_cache()
  measure.run(
    _SIZE.value,
    _SEED.value,
    [int(n) for n in _NODES.value],
    pathlib.Path(_OUT.value),
  )


if __name__ == '__main__':
  app.run(main)
