"""Trajectories as trainers want them: one file an export, of pure functions over results, sequences and scores.

To add one, write ``exports/<name>.py`` with a ``register``ed function, and import it here; from outside the package,
``register`` is enough.
"""

from hermes_atropos.exports import atropos as atropos
from hermes_atropos.exports import jsonl as jsonl
from hermes_atropos.exports import trl as trl
from hermes_atropos.exports import verl as verl
from hermes_atropos.exports.listing import EXPORTS, register

__all__ = ["EXPORTS", "register"]
