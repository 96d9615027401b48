"""Depth: branches that can go whole, what they are worth, and how many should.

A branch F of a sum x + F(x) is removed by leaving the sum x. ``branches`` finds and proves such
branches by tracing, ``removal`` takes them out, ``scores`` says what the outputs lose with each,
and ``choice`` weighs that against what it saves (``savings``) and says how many go.
"""

from tpvprune.depth.branches import find_branches as find_branches
from tpvprune.depth.records import Branch as Branch
from tpvprune.depth.records import Removal as Removal
from tpvprune.depth.removal import remove_branches as remove_branches
from tpvprune.depth.savings import branch_savings as branch_savings
from tpvprune.depth.scores import branch_scores as branch_scores
