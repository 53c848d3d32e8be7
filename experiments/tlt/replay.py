"""A recorded trace of segments, and what a strategy would have taken on it."""

import collections
from collections.abc import Iterable
import csv
import math
import pathlib
from typing import Any
from typing import NamedTuple

import numpy as np

from experiments import common
from rlax_llm.drafting.strategy.base import Occupancy
from rlax_llm.drafting.strategy.base import Spent
from rlax_llm.drafting.strategy.base import Strategy


class Record(NamedTuple):
  """One recorded segment, a line of the trace."""

  slots: int  # of the engine
  epoch: int
  step: int
  width: int
  running: int
  rows: int
  capacity: int
  seconds: float
  preparation: float
  forwards: int
  row_forwards: int
  accepted: tuple[int, ...]


class Trace:
  """Recorded segments by what a replayed segment asks for."""

  def __init__(self, records: Iterable[Record]) -> None:
    self._found: dict[tuple, list[Record]] = collections.defaultdict(list)
    self._next: dict[tuple, int] = collections.Counter()
    self._boundaries: dict[tuple, float] = {}
    self._tokens: dict[tuple, int] = collections.Counter()
    self._records = list(records)
    self.widths = sorted({r.width for r in self._records})
    for r in self._records:
      key = r.epoch, r.step, r.rows, r.capacity, r.width
      self._found[key].append(r)
      self._tokens[key] += sum(r.accepted)
    # Where the work of a step was done; every arm must have been there.
    self.sites = sorted(
      {
        key[:4]
        for key in self._found
        if all((*key[:4], w) in self._found for w in self.widths)
      }
    )

  def boundary(self, where: tuple) -> float:
    """Returns the seconds that a segment takes there besides its forwards.

    The least squares of seconds = boundary + forwards T(W) over the epoch's
    segments at (N, S), relative to the seconds of a forward.
    """
    epoch, _, rows, capacity = where
    site = epoch, rows, capacity
    if site not in self._boundaries:
      products = squares = 0.0
      for width in self.widths:
        per = np.array(
          [
            np.array([1, r.seconds]) / r.forwards
            for r in self._records
            if (r.epoch, r.rows, r.capacity) == site and r.width == width
          ]
        )
        x, y = (per - per.mean(0)).T / per[:, 1].mean()
        products += x @ y
        squares += x @ x
      fitted = products / squares if squares else 0.0
      self._boundaries[site] = max(fitted, 0.0)
    return self._boundaries[site]

  def rewind(self) -> None:
    """Starts from the first segment of every arm again."""
    self._next.clear()

  def take(self, where: tuple, width: int) -> Record:
    """Returns the arm's next segment there, in turn."""
    key = (*where, width)
    records = self._found[key]
    self._next[key] += 1
    return records[(self._next[key] - 1) % len(records)]

  def share(self, where: tuple, record: Record) -> float:
    """Returns which part of the step's work there the segment did."""
    return sum(record.accepted) / self._tokens[(*where, record.width)]

  def running(self, where: tuple, left: float) -> int:
    """Returns n when W = 1 had this part of the step's work before it."""
    records = self._found[(*where, 1)]
    for record in records:
      left += self.share(where, record)
      if left > 1:
        return record.running
    return records[-1].running


def replay(
  trace: Trace, strategy: Strategy, passes: int, first: int = 0
) -> dict[int, float]:
  """Returns seconds by N that a strategy takes for the work of the trace.

  Args:
    trace: of two epochs.
    strategy: is asked and told as by an engine.
    passes: how often the second epoch comes.
    first: the step that epochs begin with; those before it come last.
  """
  seconds: dict[int, float] = collections.defaultdict(float)
  left: dict[tuple, float] = collections.defaultdict(float)  # by (N, S)
  warm = set()
  trace.rewind()
  epochs = [0] + [1] * passes
  for epoch in epochs:
    sites = [w for w in trace.sites if w[0] == epoch]
    for where in sorted(sites, key=lambda w: (w[1] < first, w)):
      left[where[2:]] += 1.0  # of the step's work there, whatever arm does it
      while left[where[2:]] > 1e-6:
        running = trace.running(where, left[where[2:]])
        occupancy = Occupancy(running, *where[2:])
        arm, most, timed = strategy.choose(occupancy, 32)
        taken = trace.take(where, arm.width)
        # Of the recorded segment, as many forwards as are wanted. What they do
        # beyond the step's work is not to be done in the next one.
        done = trace.share(where, taken)
        wanted = math.ceil(taken.forwards * left[where[2:]] / done - 1e-6)
        forwards = min(most, wanted, taken.forwards)
        share = forwards / taken.forwards
        # One that is cut short takes its boundary all the same, which is fitted
        # and might exceed what a short one took.
        boundary = min(trace.boundary(where), taken.seconds / 2)
        took = boundary + (taken.seconds - boundary) * share
        spent = Spent(
          seconds=took,
          preparation=taken.preparation,
          forwards=forwards,
          row_forwards=round(taken.row_forwards * share),
          accepted=[round(n * share) for n in taken.accepted],
        )
        seconds[occupancy.rows] += took + taken.preparation
        left[where[2:]] -= done * share
        known = (*occupancy[1:], arm) in warm
        warm.add((*occupancy[1:], arm))
        if not (timed and known):
          spent = spent._replace(seconds=None)
        strategy.observe(occupancy, arm, spent)
  return seconds


def read(path: pathlib.Path) -> list[Record]:
  """Returns what `write` wrote."""
  with open(path, encoding='utf-8', newline='') as file:
    records = []
    for row in csv.DictReader(file):
      fields: dict[str, Any] = {
        name: float(row[name])
        if 'seconds' in name or name == 'preparation'
        else int(row[name])
        for name in Record._fields[:-1]
      }
      fields['accepted'] = tuple(map(int, row['accepted'].split()))
      records.append(Record(**fields))
  return records


def write(path: pathlib.Path, records: Iterable[Record]) -> None:
  """Writes one line for each segment."""
  common.write_csv(
    path,
    [
      r._asdict() | {'accepted': ' '.join(map(str, r.accepted))}
      for r in records
    ],
  )
