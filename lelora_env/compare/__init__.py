"""Comparing methods on equal terms: a sweep (settings as data), its runs (one JSON line each), and what they say.

sweep.py      methods x problems x seeds, read from TOML or made in Python
contest.py    runs them, many to a model, one lane each
store.py      the lines; a sweep that was stopped goes on where it was
analysis.py   tables with intervals, from the lines alone
"""

from lelora_env.compare.analysis import Summary, summarise
from lelora_env.compare.contest import check_sweep, run_sweep
from lelora_env.compare.store import RunStore
from lelora_env.compare.sweep import Method, Problem, Sweep, load_sweep

__all__ = ["Method", "Problem", "RunStore", "Summary", "Sweep", "check_sweep", "load_sweep", "run_sweep",
           "summarise"]
