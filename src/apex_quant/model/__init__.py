"""What a model is made of: roles of tensors, facts of the architecture, depth zones.

Reports (inspect.py) and weight statistics (stats.py) are imported from their modules: a plan needs neither.
"""

from apex_quant.model.facts import ModelFacts, facts, facts_of
from apex_quant.model.patterns import Role
from apex_quant.model.roles import TensorRole, classify
from apex_quant.model.zones import ZoneRule, zone_rule

__all__ = [
    "ModelFacts",
    "Role",
    "TensorRole",
    "ZoneRule",
    "classify",
    "facts",
    "facts_of",
    "zone_rule",
]
