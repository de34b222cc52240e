"""Which tensor deserves which type: measured sensitivities, a cost model, an exact solver, validation."""
