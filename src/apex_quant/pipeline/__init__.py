"""`apex run`: from a checkpoint to published files, in phases that are recorded and resumed.

engine.py runs the table of table.py; phases.py says what a row is, state.py what is remembered, look.py why something
is due, steps_*.py do the work by the public functions of the other rooms. config.py has what a run can be told.
"""
